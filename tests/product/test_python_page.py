"""The Python of README.md and docs/python.md runs as it is written, but on a toy and for two steps."""

import re
from pathlib import Path

import pytest
import yaml
from toyrun import toy_files
from transformers import AutoModelForCausalLM

import wrinklefree
from wrinklefree.packed.pack import packed_layers

ROOT = Path(__file__).parents[2]

SMALL = {
    "training": {"batch_size": 2, "precision": "fp32", "eval_tokens": 64, "final_eval_tokens": 64, "start": "plain"},
    "data": {"max_passes": 100},
}
TOY = {'"tiny"': '"./toy"', '"PATH"': '"./toy"', '"TEXTS"': '"text"', "steps=100": "steps=2", "minutes=60": "steps=2"}


def snippets(page: str) -> list[str]:
    """The blocks of Python on a page that quantize."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        block for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "quantize(" in block
    ]


@pytest.mark.parametrize(("page", "written"), [("README.md", "small"), ("docs/python.md", "tiny-w2")])
def test_the_lines_of_a_page_make_a_packed_model(
    page: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    small = {**SMALL, "training": {**SMALL["training"], "blockwise": {"enabled": False}}}
    Path("local.yaml").write_text(yaml.safe_dump(small))
    [code] = snippets(page)
    for there, here in TOY.items():
        code = code.replace(there, here)
    exec(code, {"wrinklefree": wrinklefree})
    assert len(packed_layers(AutoModelForCausalLM.from_pretrained(written))) == 14
