"""`wf config`: every setting, resolved, as YAML that could be saved and edited."""

from wrinklefree.config import load, to_yaml


def run(overrides: list[str]) -> None:
    """Print the resolved configuration. Raises UserError naming every mistake in `overrides`."""
    print(to_yaml(load(overrides)), end="")
