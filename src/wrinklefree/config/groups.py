"""The groups of settings, such as `training`, and the YAML files that each may be set to. Without heavy imports."""

from pathlib import Path

from wrinklefree.core.errors import UserError
from wrinklefree.core.find import METHODS, names

CONFIGS = Path(__file__).parent / "yaml"
USERS = "configs"  # the user's folder, in the working directory
GROUPS = ("training", "model", "data", "distillation", "distributed", "method")


def options(group: str) -> list[str]:
    """The names that a group may be set to: all methods, or the group's YAML files (the package's and the user's)."""
    if group == "method":
        return names(METHODS)
    return sorted(path.stem for path in option_files(group))


def option_files(group: str) -> list[Path]:
    """The YAML files of a group: the package's, then those in the user's `configs/`.

    Raises UserError if a user's file has a name that the package has already.
    """
    own, users = (sorted((root / group).glob("*.yaml")) for root in (CONFIGS, Path.cwd() / USERS))
    for path in users:
        if path.name in [mine.name for mine in own]:
            raise UserError(f"{path}: the package has a {group}={path.stem} already; rename the file")
    return own + users
