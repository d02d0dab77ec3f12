"""`wf config`: every setting, resolved, as YAML that could be saved and edited."""

from wrinklefree.config.compose import config_yaml, load_config


def run(overrides: list[str]) -> None:
    """Print the resolved configuration. Raises UserError naming every mistake in `overrides`."""
    print(config_yaml(load_config(overrides)), end="")
