"""A parser for the scripts whose help says every flag's default."""

import argparse
from typing import Any


class Flags(argparse.ArgumentParser):
    """Adds its default to the help of every flag that has one and does not speak of it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        default, said = settings.get("default"), settings.get("help", "")
        if default not in (None, False, argparse.SUPPRESS) and "default" not in said:
            settings["help"] = f"{said} (default: {default})".strip()
        return super().add_argument(*names, **settings)
