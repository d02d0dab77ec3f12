"""`wf config`: print every setting as YAML, which can be saved and edited."""

from wrinklefree.config.compose import config_yaml, load_config


def run(overrides: list[str]) -> None:
    """Print the config that `overrides` give. Raises UserError naming every mistake in them."""
    print(config_yaml(load_config(overrides)), end="")
