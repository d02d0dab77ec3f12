"""The documents' own code, to be written where a user would write it."""

import re
import shlex
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, without its indentation."""

    page: str
    line: int
    language: str
    code: str


def fenced(page: str) -> list[Block]:
    """All fenced blocks of a page. A fence without a language has the language ""."""
    found, inside = list[Block](), list[str]()
    opened: tuple[int, str, int] | None = None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"( *)```(\w*)", line)
        if fence is None:
            inside.append(line)
        elif opened is None:
            opened, inside = (number, fence[2], len(fence[1])), []
        else:
            at, language, indent = opened
            found.append(Block(page, at, language, "\n".join(text[indent:] for text in inside)))
            opened = None
    assert opened is None, f"{page}, line {opened}: a block that does not end"
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block: of a shell's all, of printed text those behind a `$`. `\\` at its end joins a line."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "text":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    elif block.language != "bash":
        return []
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [shlex.join(command) for command in words if command]
