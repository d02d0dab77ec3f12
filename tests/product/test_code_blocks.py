"""Every command and every block of code of README.md and docs/*.md is run, at toy size.

| blocks | test |
|---|---|
| all commands | fast: the program that they name reads them, with its `--dry-run` all settings too; without a network |
| all commands | slow: page by page and in their order, on a toy model and for two steps |
| Python, YAML, JSON | fast: as they are written, on a toy model; or the test that BY_OTHERS names |

Commands that only the first test reads are in READ_ONLY, and those that no test runs in NOT_RUN, each with its reason.
"""

import contextlib
import importlib.metadata
import io
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Command, Context, Group
from pages import ROOT, Block, blocks, commands, fenced, put
from serve.serving import served
from tiny import llama
from toyrun import toy_files
from typer.main import get_command
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.core import library
from wrinklefree.core.method import quant_layers
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.packed.pack import packed_layers

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
BLOCKS = [block for page in PAGES for block in fenced(page)]
LANGUAGES = {"bash", "python", "yaml", "json", "text"}  # text: what is printed, and pictures
COMMANDS = [
    pytest.param(block, command, id=f"{block.page}-{command}"[:100]) for block in BLOCKS for command in commands(block)
]

# The beginnings of commands that no test runs.
NOT_RUN = {
    "python3 -m venv": "makes an environment: the tests have one already",
    ". .venv/bin/activate": "changes the shell that it is typed into",
    "pip install": "asks a registry of packages; the extras that it names are checked",
    "lm_eval": "the program of the extra [eval], which downloads its tasks",
    "wf train model=tiny training=sign": "a method that the page adds; tests/methods/test_worked_method.py",
}

# The beginnings and words of commands that are read with all their settings, but not run.
READ_ONLY = {
    "make": "installs, builds and tests this checkout; `make --dry-run`",
    "bash": "a script of the commands in docs/trm.md, which are run; `bash -n`",
    "wf serve": "serves until it is stopped; test_the_page_of_the_server",
    "--cloud": "rents machines; tests/cloud runs it with stand-ins for them",
    "--background": "a process that outlives the test; tests/cloud",
    "--nproc": "several processes; tests/distributed",
    "torchrun": "several processes; tests/distributed",
    "accelerate launch": "several processes on GPUs",
    "model=smollm3_3b": "thinks in words, which no toy does, about problems from the hub",
    "--stage": "reads text and thoughts from the hub; tests/thinking/test_compressor_guide.py",
    "python -m src.train.phase1_compressor --sweep": "reads text from the hub; the lines with data=stdlib are run",
    "tatsu-lab/alpaca": "rows from the hub; tests/product/test_anemll_guide.py has such rows in a file",
    "--import": "a cache of .pt files; tests/data/test_kd_import.py",
    "training.resume_from=": "a run that was interrupted; tests/training/test_loop.py",
    "wf fairy2 -m tiny training.max_step=3 method.num_stage=2": "an error, which is compared with the page",
}

# Blocks of Python and YAML that another test runs as they are written, by the beginning of their code.
BY_OTHERS = {
    ("README.md", "student = "): "tests/product/test_python_page.py",
    ("docs/python.md", "import wrinklefree\n\nstudent"): "tests/product/test_python_page.py",
    ("docs/architecture.md", "# src/"): "tests/methods/test_worked_method.py",
    ("CONTRIBUTING.md", "# "): "tests/product/test_byname.py",
    ("docs/serve.md", ""): "tests/product/test_code_blocks.py",
}

# `local.yaml` of the folder where the commands run.
SMALL: dict[str, Any] = {
    "training": {
        **{"max_steps": 2, "batch_size": 2, "max_seq_length": 16, "precision": "fp32", "start": "plain"},
        **{"eval_tokens": 64, "final_eval_tokens": 64, "eval_examples": 4, "gradient_accumulation_steps": 1},
        "blockwise": {"enabled": False},
    },
    "data": {"max_passes": 1000},
}

# What stands for the pages' models, texts and sizes.
NAMES = {
    r"(?<=[ =])(tiny|PATH|FOLDER|qwen3_4b|qwen3_0_6b)(?= |$)": "./tiny",
    r"(?<=[ =])smollm2_135m(?= |$)": "./smollm2_135m",
    r"(?<=[ =])TEXTS(?= |$)": "text",
    r"outputs/RUN": "outputs/ternary",
}
SIZES = {
    r"data=(stdlib|fineweb_edu)": "data=local data.path=text",
    r"--dataset_name stdlib": "--dataset_name text",
    r" --scale small": "",
    r"--data README.md": "--data text/00.txt",
    r"\bsst2\b": "stdlib_kind",
    r"(max_steps=|--max-steps )\d+": r"\g<1>2",
    r"(wf compare .*)--budget \w+": r"\1--steps 2",
    r" --budget \w+": "",
    r" 3:training.budget_share=2": "",
    r"--steps \d+": "--steps 2",
    r"--seeds 3": "--seeds 1",
    r"--fit-bytes 60MB": "--fit-bytes 50kB",
    r"--(length|max_length) 128": r"--\1 16",
    r"--topk \d+": "--topk 8",
    r"--(sequences|num_sequences) \d+": r"--\1 24",
    r"--heldout \d+": "--heldout 4",
    r"--tokens \d+k": "--tokens 100",
    r"--num_samples \d+": "--num_samples 24",
    r"16,32,64,128": "8,16",
    r"(16 32 64 128|36 72 144 288)": "8 16",
    r"d_compressed=\d+": "d_compressed=16",
    r"(--model_name ./tiny data=local data.path=text)$": r"\1 --d_compressed 16",
    r"--context 128": "--context 16",
}
TRAINS = r"wf (fairy2|bitdistill|anemll|train|compare|trm compressor) |python scripts/train.py "


def reason(table: dict[str, str], command: str) -> str | None:
    """Why `table` excepts a command: one that begins with its entry, or has a word that begins with it."""
    return next((why for part, why in table.items() if f" {part}" in f" {command}"), None)


def changed(command: str, *tables: dict[str, str]) -> str:
    for table in tables:
        for pattern, stand_in in table.items():
            command = re.sub(pattern, stand_in, command)
    return command


def at_toy_size(command: str) -> str:
    """The command on a toy, and on the toy's text if it names none."""
    small = changed(command, NAMES, SIZES)
    if not re.match(TRAINS, small) or "model=chains" in small:
        return small
    own_text = re.search(r"\b(data=|--task|task=|data\.path=|--cache)", small)
    # Lines of a page may be alternatives that write the same folder, so each replaces what is there.
    return f"{small} --force" if own_text else f"{small} data=local data.path=text --force"


def script(words: list[str]) -> int:
    """Run a file as Python does; its exit code."""
    file = ROOT / ("src/train/phase1_compressor.py" if words[0] == "-m" else words[0])
    arguments = words[2:] if words[0] == "-m" else words[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(file), *arguments])
        patch.setattr(sys, "stdin", io.StringIO())
        patch.syspath_prepend(str(file.parent))
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def run(command: str) -> str:
    """Run a command of `wf` or a Python script in this process; what it printed. Fails if its exit code is not 0."""
    words = shlex.split(command)
    if words[0] == "python":
        assert script(words[1:]) == 0, command
        return ""
    assert words[0] == "wf", f"{command}: no test knows this program; run it, or say in NOT_RUN why not"
    result = CliRunner().invoke(app, words[1:], input="")
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: models and text."""
    folder = tmp_path_factory.mktemp("pages")
    _, text = toy_files(folder, llama(vocab_size=300))
    documents = [file.read_text() for file in text.iterdir()]
    train_tokenizer(documents, 300).save_pretrained(folder / "toy")  # of a kind that GGUF has, with a chat template
    put(folder, "questions.jsonl", '{"question": "w1 w2"}\n')
    for name in ("tiny", "smollm2_135m"):
        shutil.copytree(folder / "toy", folder / name)
    return folder


@pytest.fixture(scope="module")
def quantized(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And a run at 2 bits."""
    folder = tmp_path_factory.mktemp("quantized")
    shutil.copytree(toys, folder, dirs_exist_ok=True)
    put(folder, "local.yaml", yaml.safe_dump(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("wf fairy2 -m ./tiny --mode w2 data=local data.path=text")
    return folder


@pytest.fixture(scope="module")
def made(quantized: Path) -> Path:
    """And a ternary run, for formats that others read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(quantized)
        run("wf train model=./tiny training=ternary data=local data.path=text output_dir=outputs/ternary")
    return quantized


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_every_block_says_its_language() -> None:
    """Commands are found by it."""
    unknown = [f"{block.page}:{block.line}" for block in BLOCKS if block.language not in LANGUAGES]
    hidden = [
        f"{block.page}:{block.line}"
        for block in BLOCKS
        if block.language == "text" and re.search(r"^(wf|python|make|pip) ", block.code, re.MULTILINE)
    ]
    assert (unknown, hidden) == ([], [])


def test_every_exception_is_one() -> None:
    """No entry of a table has outlived its command, and every test that an entry names exists."""
    every = [command.values[1] for command in COMMANDS]
    for table in (NOT_RUN, READ_ONLY):
        assert [part for part in table if not any(reason({part: "it"}, command) for command in every)] == []
    named = re.findall(
        r"tests/[\w/]+(?:\.py)?", " ".join([*NOT_RUN.values(), *READ_ONLY.values(), *BY_OTHERS.values()])
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def parsed(words: list[str]) -> tuple[Command, list[str]]:
    """The verb that a command line of `wf` names, and the words behind it. Fails if the verb does not take them."""
    group, context = get_command(app), Context(get_command(app))
    while isinstance(group, Group):
        _, command, words = group.resolve_command(context, words)
        assert command is not None
        group = command
    group.make_context(group.name, list(words))
    return group, words


def read(command: str) -> None:
    """Let the program that a command names read it; with `--dry-run`, if it has that, for the rest."""
    words = shlex.split(command)
    if words[0] in ("torchrun", "accelerate"):
        start = next(place for place, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["wf", *words[start + 2 :]] if words[start + 1] == "wrinklefree.cli" else ["python", *words[start:]]
    if words[0] == "wf":
        verb, _ = parsed(words[1:])
        if "dry_run" in [parameter.name for parameter in verb.params]:
            run(shlex.join([*words, *([] if "--dry-run" in words else ["--dry-run"])]))
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "bash":
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
    elif words[1] == "scripts/train.py" or words[1] == "-m":
        assert script([*words[1:], "--dry-run"]) == 0
    else:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            script([words[1], "--help"])
        flags = {word for word in words if word.startswith("--")}
        assert flags
        assert flags <= set(re.findall(r"--[\w-]+", said.getvalue()))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("block", "command"), COMMANDS)
def test_a_command_is_read(block: Block, command: str, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toys)
    if reason(NOT_RUN, command):
        extras = set(re.findall(r"[\[,]([a-z][\w-]*)(?=[\],])", command))
        assert extras <= set(importlib.metadata.metadata("wrinklefree").get_all("Provides-Extra") or [])
    elif "\nerror: " in block.code:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 2
        assert result.stderr.splitlines() == block.code.splitlines()[1:]
    else:
        read(changed(command, {r"(?<=[ =])(PATH|FOLDER)(?= |$)": "./tiny", r"(?<==)TEXTS(?= |$)": "text"}))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(block) for block in fenced(page))])
def test_the_commands_of_a_page_run(page: str, made: Path, here: Path) -> None:
    shutil.copytree(made, here, dirs_exist_ok=True)
    for command in (command for block in fenced(page) for command in commands(block)):
        if not reason(NOT_RUN | READ_ONLY, command):
            run(at_toy_size(command))


def code_blocks(language: str) -> list[Any]:
    """The blocks of a language that no other test runs."""
    others = [any(block.page == page and block.code.startswith(start) for page, start in BY_OTHERS) for block in BLOCKS]
    return [
        pytest.param(block, id=f"{block.page}:{block.line}")
        for block, other in zip(BLOCKS, others, strict=True)
        if block.language == language and not other
    ]


@pytest.mark.skipif(library.available() is not None, reason=str(library.available()))
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_runs(block: Block, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quantized)
    names: dict[str, Any] = {"path": "tiny", "folder": "outputs/fairy2_tiny_w2/packed"}
    exec(block.code, names)
    assert packed_or_quantized(names["model"]) == 14


def packed_or_quantized(model: Any) -> int:
    return len(packed_layers(model)) + len(quant_layers(model))


@pytest.mark.parametrize("block", code_blocks("json"))
def test_the_settings_of_a_packed_folder_are_as_the_page_shows_them(block: Block, quantized: Path) -> None:
    shown = json.loads(block.code)
    packed = json.loads((quantized / "outputs" / "fairy2_tiny_w2" / "packed" / "config.json").read_text())
    written = packed["quantization_config"]
    assert {name: type(value) for name, value in shown.items()}.items() <= {
        name: type(value) for name, value in written.items()
    }.items()
    [(fqn, layer)] = shown["layers"].items()
    assert set(layer) <= set(written["layers"][fqn])


def test_the_files_of_the_page_of_settings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = blocks("docs/configuration.md")
    assert set(files) == {"local.yaml", "configs/data/mybook.yaml", "configs/training/short.yaml"}
    for path, code in files.items():
        put(tmp_path, path, code)
    put(tmp_path, "book.txt", "Once upon a time. " * 1000)
    assert "batch_size: 4" in run("wf config")
    (tmp_path / "local.yaml").unlink()
    assert "output_dir: outputs/fairy2_tiny_short" in run("wf train data=mybook training=short --dry-run")


@pytest.mark.slow
def test_the_page_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's lines, one block after the other, against a server of the embedded model."""
    pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    Path("local.yaml").write_text(yaml.safe_dump(SMALL))
    run("wf train model=tiny training=fairy2_w2")
    names: dict[str, Any] = {}
    with served(Path("outputs/fairy2_tiny_w2/packed")) as server:
        for block in fenced("docs/serve.md"):
            if block.language == "python":
                exec(block.code.replace("http://127.0.0.1:8000", server.url), names)
    assert names["answer"].choices[0].text
    assert names["city"].people >= 0
