"""The documents' own code, to be written where a user would write it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> dict[str, str]:
    """The code of a page by the path in its first line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {path.removeprefix("src/wrinklefree/"): code for path, code in found}


def put(here: Path, path: str, code: str) -> None:
    file = here / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code, encoding="utf-8")
