"""A folder runs its own Python only if this user says so, on the command line or in a call."""

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import llama, tokenizer, toy, with_toy_method
from toyrun import toy_files
from typer.testing import CliRunner

import wrinklefree
from wrinklefree import cli
from wrinklefree.config.compose import config_yaml, load_config, read_config
from wrinklefree.models.load import load_model
from wrinklefree.training import checkpoint

torch.set_num_threads(1)

SOURCE = Path(wrinklefree.__file__).parents[1]
AUTO = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoModel")
CALLS = ("from_pretrained", "from_config")
# Class methods of other names: a generation config brings no code, and the loader in packed folders passes on all.
WITHOUT_CODE = ("GenerationConfig", "super()")

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("was here")

class HostileConfig(LlamaConfig):
    model_type = {model_type!r}

class HostileModel(LlamaForCausalLM):
    config_class = HostileConfig

class HostileTokenizer(PreTrainedTokenizerFast):
    pass

def generate(*args, **kwargs):
    raise AssertionError
"""


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Every call in the package, and in the guides' packages, that loads something by a class of transformers."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        methods = [(node, node.func) for node in nodes if isinstance(node.func, ast.Attribute)]
        loading = [node for node, func in methods if func.attr in CALLS and ast.unparse(func.value) not in WITHOUT_CODE]
        found += [(f"{path.relative_to(SOURCE)}:{node.lineno}", node) for node in loading]
    return found


def test_every_load_states_whether_remote_code_may_run() -> None:
    """Without the argument, transformers asks on stdin."""
    calls = loading_calls()
    assert len(calls) > 8
    assert not [where for where, call in calls if "trust_remote_code" not in [word.arg for word in call.keywords]]


def test_only_the_user_grants_permission() -> None:
    """True itself stands nowhere in the code, so it can come from arguments and from the user's settings alone."""
    for where, call in loading_calls():
        (given,) = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
        assert not (isinstance(given, ast.Constant) and given.value is not False), where


class Hostile:
    """A model folder with code of its own, a run folder of that model, and a file that the code would write."""

    def __init__(self, folder: Path, model_type: str) -> None:
        model, self.text = toy_files(folder)
        self.root, self.marker = folder, folder / "marker"
        code = CODE.format(marker=str(self.marker), model_type=model_type)
        self.model, self.run = model, folder / "run"
        config = load_config([f"model={model}", "training=fairy2_w2", "data=local", f"data.path={self.text}"])
        config.model.trust_remote_code = True
        config.training.max_seq_length = 16
        with with_toy_method():
            config.method = toy()
            checkpoint.save(self.run / "final", toy().prepare(llama()), tokenizer(), config_yaml(config), None)
        for place in (self.model, self.run / "final"):
            self._arm(place, code, model_type)

    @staticmethod
    def _arm(place: Path, code: str, model_type: str) -> None:
        (place / "hostile.py").write_text(code)
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(code)
        names = {"AutoConfig": "HostileConfig", "AutoModelForCausalLM": "HostileModel"}
        parts = {
            "config.json": {"auto_map": {key: f"hostile.{name}" for key, name in names.items()}},
            "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "hostile.HostileTokenizer"]}},
        }
        parts["config.json"]["model_type"] = model_type  # type: ignore[assignment]
        for name, more in parts.items():
            file = place / name
            file.write_text(json.dumps(json.loads(file.read_text()) | more))


TEXT = ["--data", "text/00.txt", "--tokens", "40", "--context", "8"]
WORDS = ["--prompt", "w1 w2", "--max-new-tokens", "2"]
VERBS: dict[str, Callable[[Hostile], list[list[str]]]] = {
    "generate": lambda h: [["generate", str(folder), *WORDS] for folder in (h.model, h.run)],
    "eval": lambda h: [["eval", str(folder), *TEXT] for folder in (h.model, h.run)],
    "export": lambda h: [["export", str(h.run), "--format", name] for name in ("hf", "dense")],
    "train": lambda h: [training(h), training(h, f"training.start_from=[{h.run}/final]"), [*training(h), "--dry-run"]],
    "serve": lambda h: [["serve", str(folder), "--port", "0"] for folder in (h.model, h.run)],
    "trm": lambda h: [["trm", "compressor", *training(h)[1:-1], "thinking.d_compressed=8"]],
    "think": lambda h: [["generate", str(h.model), *WORDS, "--think", "none"]],
    "cache": lambda h: [["cache", "-m", str(h.model), "--out", "kd", "data=local", "data.path=text"]],
    "others": lambda h: [["doctor"], ["runs", str(h.root)], ["config", f"model={h.model}"]],
}


def training(hostile: Hostile, *more: str) -> list[str]:
    steps = ["training.max_steps=1", "training.max_seq_length=8", "training.batch_size=1", "training.precision=fp32"]
    small = ["training.eval_tokens=16", "training.final_eval_tokens=16", "training.pack=false", "--force"]
    data = ["data=local", f"data.path={hostile.text}", f"output_dir={hostile.root / 'out'}"]
    return ["train", f"model={hostile.model}", *data, *steps, *small, *more, "training=fairy2_w2"]


@pytest.mark.parametrize("model_type", ["llama", "hostile"])
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_a_folders_code(
    verb: str, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not transformers knows the model type: what can be read without the code is, the rest is one line."""
    hostile = Hostile(tmp_path, model_type)
    monkeypatch.setattr("wrinklefree.serve.server.run", lambda *given: None)
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("asked on stdin"))
    monkeypatch.chdir(tmp_path)
    with with_toy_method():
        for arguments in VERBS[verb](hostile):
            result = CliRunner().invoke(cli.app, arguments)
            assert result.exit_code in (0, 2), result.output
            assert "internal error" not in result.output
    assert not hostile.marker.exists()
    assert not [name for name in sys.modules if name.startswith("transformers_modules") and name.endswith(".hostile")]


def test_the_code_runs_with_permission(tmp_path: Path) -> None:
    """So that the tests above can fail."""
    hostile = Hostile(tmp_path, "hostile")
    model, _ = load_model(hostile.model, trust_remote_code=True)
    assert type(model).__name__ == "HostileModel"
    assert hostile.marker.exists()


def test_a_run_with_permission_does_not_hand_it_on(tmp_path: Path) -> None:
    hostile = Hostile(tmp_path, "hostile")
    settings = hostile.run / "final" / checkpoint.CONFIG
    assert "trust_remote_code: true" in settings.read_text()
    with with_toy_method():
        assert not read_config(settings).model.trust_remote_code


@pytest.mark.parametrize("verb", ["generate", "eval", "serve", "export"])
def test_verbs_that_take_a_folder_have_the_option(verb: str) -> None:
    assert "--trust-remote-code" in CliRunner().invoke(cli.app, [verb, "--help"]).output


def test_evaluation_with_permission_runs_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = Hostile(tmp_path, "hostile")
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(hostile.text / "00.txt"), "--tokens", "40", "--context", "8"]
    refused = CliRunner().invoke(cli.app, ["eval", str(hostile.model), *data])
    assert refused.exit_code == 2
    assert "add --trust-remote-code" in refused.output
    assert not hostile.marker.exists()
    assert CliRunner().invoke(cli.app, ["eval", str(hostile.model), *data, "--trust-remote-code"]).exit_code == 0
    assert hostile.marker.exists()
