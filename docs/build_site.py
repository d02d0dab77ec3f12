"""`make docs`: the documentation site, from the Markdown in docs/ and at the top of the repository.

    python docs/build_site.py BUILD      copy the pages to BUILD, which Zensical then builds (mkdocs.yml)
    python docs/build_site.py            write docs/commands.md, which a test compares with the commands

Links that lead out of docs/ become links to the copied page. Those to source files become the file's name.
Formulas become MathML, so that the site needs no script from elsewhere.
"""

import ast
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from typer.main import get_command
from typer.testing import CliRunner

from wrinklefree.cli import SECTIONS, app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MORE_PAGES = {
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "native/README.md": "native.md",
}
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)  # blocks and words of it
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)", re.DOTALL)
LINK = re.compile(r"\[([^]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")  # not those to other hosts


def commands() -> str:
    """The page of all commands: what each prints with --help."""
    page = ["# Commands\n", "What each command prints with `--help`. `python docs/build_site.py` writes this page.\n"]
    for title, verbs in SECTIONS.items():
        page.append(f"## {title}\n")
        for words in (words for verb in verbs for words in with_parts(verb)):
            page.append(f"### `wf {' '.join(words)}`\n\n```text\n{help_of(words)}\n```\n")
    return "\n".join(page)


def with_parts(verb: str) -> list[list[str]]:
    """The verb, and what it groups: [["trm"], ["trm", "train"], ...]."""
    parts = vars(get_command(app).commands[verb]).get("commands", {})  # type: ignore[attr-defined]
    return [[verb], *([verb, part] for part in parts)]


def help_of(words: list[str]) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="wf", terminal_width=100)
    lines = [line.rstrip() for line in result.output.strip().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def in_site(text: str, folder: Path) -> str:
    """Rewrite the links of a page that stands in `folder` for a site that has docs/ and MORE_PAGES."""

    def rewritten(link: re.Match[str]) -> str:
        words, target, anchor = link[1], (folder / link[2]).resolve(), link[3] or ""
        if target.parent == DOCS and target.suffix in (".md", ".svg"):
            return f"[{words}]({target.name}{anchor})"
        outside = target.relative_to(ROOT).as_posix()
        if outside in MORE_PAGES:
            return f"[{words}]({MORE_PAGES[outside]}{anchor})"
        return words if "`" in words else f"`{words}`"

    return LINK.sub(rewritten, text)


def with_mathml(text: str) -> str:
    """Put MathML in place of formulas in LaTeX, `$...$` and `$$...$$`, which browsers show without a script or a font.

    Code stays as it is.
    """
    parts = CODE.split(text)
    return "".join(part if place % 2 else FORMULA.sub(_mathml, part) for place, part in enumerate(parts))


def _mathml(formula: re.Match[str]) -> str:
    if formula[1] is not None:
        return convert(formula[1].strip(), display="block")
    return f"<span>{convert(formula[2])}</span>"  # without it, Markdown takes one that begins a line for a block


def docstring_of(name: str) -> str:
    """A section with the docstring of the method `name`, which also has the shapes; "" for another page."""
    file = ROOT / "src" / "wrinklefree" / "methods" / name / "__init__.py"
    if not file.is_file():
        return ""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    return f"\n## In the code\n\nThe top of the method's file:\n\n```text\n{docstring}\n```\n"


def build(out: Path) -> None:
    """Copy all pages to `out`, with links that hold there."""
    out.mkdir(parents=True, exist_ok=True)
    pages = {page.name: page for page in DOCS.glob("*.md")} | {new: ROOT / old for old, new in MORE_PAGES.items()}
    for name, page in pages.items():
        text = in_site(page.read_text(encoding="utf-8"), page.parent) + docstring_of(page.stem)
        text = with_mathml(text) if page.parent == DOCS else text
        (out / name).write_text(text, encoding="utf-8")
    for picture in DOCS.glob("*.svg"):
        (out / picture.name).write_bytes(picture.read_bytes())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        build(Path(sys.argv[1]))
    else:
        (DOCS / "commands.md").write_text(commands(), encoding="utf-8")
