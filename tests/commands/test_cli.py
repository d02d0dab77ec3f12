"""The command line as a person meets it: help, mistakes, exit codes, tables."""

import importlib.metadata
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from huggingface_hub import constants
from toyrun import toy_files
from typer.testing import CliRunner

from wrinklefree.cli import SECTIONS, app, main
from wrinklefree.commands import doctor
from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.groups import options as options_of
from wrinklefree.core import files
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import constant
from wrinklefree.core.lock import locked
from wrinklefree.export.flags import formats, options

VERBS = [
    "anemll",
    "fairy2",
    "bitdistill",
    "train",
    "pretrain",
    "cache",
    "compare",
    "selftext",
    "eval",
    "plot",
    "push",
    "generate",
    "serve",
    "export",
    "config",
    "methods",
    "doctor",
    "runs",
    "plan",
    "logs",
    "cancel",
    "wandb-status",
    "trm",
]

NOW = time.time()
LOG = "step,train_loss,eval_loss,lr,elapsed_sec,grad_norm,tokens,tokens_per_sec\n"


def wf(*args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `wf args`."""
    result = CliRunner().invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert wf("--version") == (0, f"wrinklefree {importlib.metadata.version('wrinklefree')}\n", "")


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[object, ...], dict[str, object]]]:
    """What the verbs hand to `commands.<name>.run`, in place of running it."""
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def run(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))

    for name in ("train", "pretrain", "export"):
        monkeypatch.setitem(sys.modules, f"wrinklefree.commands.{name}", types.SimpleNamespace(run=run))
    return calls


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `wf doctor` raise."""

    def run(**options: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "wrinklefree.commands.doctor", types.SimpleNamespace(run=run))


def test_help_lists_every_verb() -> None:
    code, out, _ = wf("--help")
    assert code == 0
    assert "Example" in out
    verbs = out.partition("Quantize:")[2]
    first = [line.split()[0] for line in verbs.splitlines() if line.startswith("  ")]
    assert sorted(word for word in first if word != "$") == sorted(VERBS)
    assert first.count("$") == len(SECTIONS)  # an example in each
    assert "..." not in verbs


THINKING = [f"trm {verb}" for verb in ("compressor", "pairs", "train", "inject", "grpo", "eval")]


@pytest.mark.parametrize("verb", [*VERBS, *THINKING])
def test_every_help_has_an_example_that_starts_with_the_verb(verb: str) -> None:
    code, out, _ = wf(*verb.split(), "--help")
    assert code == 0
    assert f" wf {verb}" in out.partition("Example")[2]


@pytest.mark.parametrize("verb", ["", *VERBS, *THINKING])
def test_help_fits_into_80_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = wf(*verb.split(), "--help")
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert "..." not in out.partition("Commands:")[2]


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "hydra", "omegaconf", "pydantic", "datasets", "matplotlib", "numpy", "rich"]
    code = (
        "import sys; from wrinklefree.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == 0


def test_fairy2_is_train_with_two_overrides_first(received) -> None:
    code, _, err = wf(
        "fairy2", "training.lr=1e-4", "-m", "org/name", "--dry-run", "a.b=c", "--mode", "w1", "--scale", "dev"
    )
    assert (code, err) == (0, "")
    overrides = ["model=org/name", "training=fairy2_w1", "training.lr=1e-4", "a.b=c"]
    assert received == [
        ((overrides,), {"dry_run": True, "force": False, "processes": None, "scale": "dev", "budget": None})
    ]


def test_train_pretrain_and_export_pass_their_arguments_on(received) -> None:
    assert wf("train", "model=tiny", "--force", "--nproc", "2")[0] == 0
    assert wf("pretrain", "--force", "seed=1")[0] == 0
    assert wf("export", "run", "--format", "hf", "--out", "small")[0] == 0
    assert received == [
        ((["model=tiny"],), {"force": True, "processes": 2, "budget": None}),
        ((["seed=1"],), {"force": True, "processes": None, "dry_run": False}),
        (("run", "hf", Path("small"), False, False), dict.fromkeys(options()) | {"dry_run": False}),
    ]


@pytest.mark.parametrize(
    "args",
    [
        ["fairy2", "-m", "tiny", "--sclae", "dev"],
        ["fairy2", "-m", "tiny", "--mode", "w3"],
        ["fairy2"],
        ["train", "--nope", "model=tiny"],
        ["evaluate"],
    ],
)
def test_wrong_flags_are_errors(args: list[str], received) -> None:
    code, out, err = wf(*args)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert received == []


def test_several_mistakes_are_reported_together() -> None:
    code, out, err = wf("config", "training.max_stepz=10", "training.batch_size=many", "data.shufle_buffer=1")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    assert "error: training.max_stepz: unknown key (did you mean 'training.max_steps'?)" in lines


def test_config_prints_what_it_was_given() -> None:
    code, out, err = wf("config", "training.max_steps=7")
    assert (code, err) == (0, "")
    assert "max_steps: 7" in out


def test_user_error_is_a_line_per_problem(monkeypatch) -> None:
    raising(monkeypatch, UserError("first\nsecond"))
    assert wf("doctor") == (2, "", "error: first\nerror: second\n")


def test_ctrl_c_exits_with_130(monkeypatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert wf("doctor") == (130, "", "interrupted\n")


def test_our_own_defects_are_short_unless_debugging(monkeypatch) -> None:
    raising(monkeypatch, ValueError("boom"))
    monkeypatch.delenv("WF_DEBUG", raising=False)
    code, _, err = wf("doctor")
    assert code == 1
    assert err.startswith("internal error: ValueError: boom\n")
    assert "Traceback" not in err
    monkeypatch.setenv("WF_DEBUG", "1")
    assert "Traceback" in wf("doctor")[2]


def test_methods_names_every_training_config_that_chooses_one() -> None:
    code, out, _ = wf("methods")
    assert code == 0
    shown = re.split(r"^  (\w+) ", out.partition("\n\n")[0], flags=re.MULTILINE)  # name, text, name, text, ...
    listed = dict(zip(shown[1::2], shown[2::2], strict=True))
    trainings = {name: re.findall(r"\w+", text.partition("training=")[2]) for name, text in listed.items()}
    assert {name: sorted(chosen) for name, chosen in trainings.items()} == trainings
    resolved = {training: load_config([f"training={training}"]).method for training in options_of("training")}
    others = ("blockwise", "pretrain")  # blocks of any method, and no method at all
    chosen = {name: method.name for name, method in resolved.items() if method is not None and name not in others}
    assert {training: name for name, chosen in trainings.items() for training in chosen} == chosen


def test_doctor_reports_line_by_line(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment when it was imported
    code, out, err = wf("doctor")
    assert (code, err) == (0, "")
    assert {line.split()[0] for line in out.splitlines()} <= {"OK", "missing"}
    assert ["OK", "model", "tiny"] in [line.split()[:3] for line in out.splitlines()]
    assert ["missing", "hub", "HF_HUB_OFFLINE=1"] in [line.split()[:3] for line in out.splitlines()]


def test_runs_shows_last_figures_newest_first(tmp_path: Path) -> None:
    for age, name, last in ((900, "old", ""), (0, "new", "10,2.25,,1e-4,3,0.5,80,20\n")):
        run = tmp_path / name
        (run / "final").mkdir(parents=True)
        (run / "training_log.csv").write_text(LOG + "5,2.75,2.5,1e-4,1,0.5,40,20\n" + last)
        os.utime(run / "training_log.csv", (NOW - age, NOW - age))
        (run / "final" / "wrinklefree.yaml").write_text("method: {name: fairy2}\n")
    code, out, _ = wf("runs", str(tmp_path))
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    assert list(rows) == ["new", "old"]
    assert rows["new"][1:5] == ["fairy2", "10", "2.250", "2.500"]
    assert rows["old"][1:5] == ["fairy2", "5", "2.750", "2.500"]
    assert rows["new"][-1] == "stopped"  # killed before its results were written
    (tmp_path / "new" / "results.json").write_text("{}")
    assert wf("runs", str(tmp_path))[1].splitlines()[1].split()[-1] == "done"
    with locked(tmp_path / "new"):
        assert wf("runs", str(tmp_path))[1].splitlines()[1].split()[-1] == "running"


def test_runs_says_where_there_are_none(tmp_path: Path) -> None:
    code, _, err = wf("runs", str(tmp_path))
    assert code == 2
    assert "no runs here" in err


def test_plot_takes_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "training_log.csv").write_text(LOG + "1,2.5,,1e-4,1,0.5,40,20\n2,2.25,2.5,1e-4,2,0.5,80,20\n")
    code, out, _ = wf("plot", str(tmp_path))
    assert code == 0
    assert (tmp_path / "plots" / "loss.png").is_file()
    assert str(tmp_path / "plots" / "loss.png") in out


def test_generate_wants_a_prompt_or_a_conversation() -> None:
    code, _, err = wf("generate", "tiny")
    assert code == 2
    assert "--prompt" in err


@pytest.mark.parametrize(
    "options", [("--top-k", "5"), ("--stop", "x"), ("--engine", "native"), ("--threads", "1"), ("--top-p", "0.5")]
)
def test_thinking_refuses_what_it_would_ignore(options: tuple[str, str]) -> None:
    code, _, err = wf("generate", "nowhere", "--prompt", "a", "--think", "latent", *options)
    assert code == 2
    assert "--think samples by --temperature and --seed alone" in err


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("repetition-penalty", "0", "1e-6 to 1e6"),
        ("repetition-penalty", "1e-46", "1e-6 to 1e6"),
        ("repetition-penalty", "1e+39", "1e-6 to 1e6"),
        ("temperature", "1e+39", "0 to 1e6"),
        ("top-p", "0", "above 0 and at most 1"),
    ],
)
def test_sampling_out_of_range_is_refused_before_a_model_is_sought(option: str, value: str, limit: str) -> None:
    code, _, err = wf("generate", "nowhere", "--prompt", "a", f"--{option}", value)
    assert code == 2
    assert f"--{option} {value}: must be {limit}" in err


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose `final/` is a model of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from wrinklefree.data.tokenizer import train_tokenizer

    run = tmp_path_factory.mktemp("run")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes))
    model.lm_head.weight.data.zero_()
    model.save_pretrained(run / "final")
    train_tokenizer(["some text, any text\n"], 300).save_pretrained(run / "final")
    return run


def test_eval_of_a_model_that_knows_nothing_is_its_vocabulary(random_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what a uniform guess costs does not depend on the text " * 20)
    code, out, err = wf("eval", str(random_model), "--data", str(text), "--tokens", "128", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["perplexity"] == pytest.approx(300, rel=1e-4)
    assert figures["context"] == 64
    assert figures["bits_per_byte"] > 1


def test_eval_refuses_what_does_not_fit(random_model: Path) -> None:
    code, out, err = wf("eval", str(random_model), "--context", "65")
    assert (code, out) == (2, "")
    assert "the model has 64 positions" in err
    assert wf("eval", str(random_model), "--data", "nowhere.txt")[0] == 2


def test_eval_refuses_a_text_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    model, _ = toy_files(tmp_path)
    code, out, err = wf("eval", str(model), "--context", "16", "--tokens", "64")
    assert (code, out) == (2, "")
    assert "knows no word of it; give other text with --data" in err


def test_missing_lm_eval_names_the_extra(random_model: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = wf("eval", str(random_model), "--tasks", "piqa")
    assert code == 2
    assert "pip install 'wrinklefree[eval]'" in err


NEEDING = {flag: constant(path, "NEEDS", None) for flag, path in formats().items()}


@pytest.mark.parametrize("flag", [flag for flag, package in NEEDING.items() if package])
def test_an_export_without_its_package_names_the_extra_before_the_model_is_loaded(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    from wrinklefree.runs import exporting

    monkeypatch.setitem(sys.modules, NEEDING[flag], None)
    monkeypatch.setattr(exporting, "load_model", lambda *given, **more: pytest.fail("the model was loaded"))
    code, _, err = wf("export", str(random_model), "--format", flag)
    assert code == 2
    assert f"pip install 'wrinklefree[{flag}]'" in err


def test_an_unknown_task_is_said_before_the_model_is_loaded(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wrinklefree.commands import evaluate

    tasks = types.SimpleNamespace(TaskManager=lambda: types.SimpleNamespace(match_tasks=lambda names: []))
    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(tasks=tasks))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(evaluate, "open_model", lambda *given: pytest.fail("the model was loaded"))
    code, _, err = wf("eval", str(random_model), "--tasks", "piqua")
    assert code == 2
    assert "no such lm-eval task: piqua" in err


def test_generate_prints_prompt_and_text(random_model: Path) -> None:
    command = [sys.executable, "-m", "wrinklefree.cli", "generate", str(random_model / "final"), "--prompt", "some"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr == "engine: transformers (not a packed folder)\n"
    assert result.stdout.startswith("some")


def test_generate_prints_one_object_for_json(random_model: Path) -> None:
    options = ["--prompt", "some", "--max-new-tokens", "4", "--temperature", "0", "--json"]
    code, out, _ = wf("generate", str(random_model / "final"), *options)
    assert code == 0
    said = json.loads(out)
    assert (said["prompt"], said["tokens"], said["finish"]) == ("some", 1, "stop")  # all logits are alike: token 0
    assert isinstance(said["text"], str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a\udcff"], "--prompt: not UTF-8 text"),
        (["--prompt", "a", "--stop", ""], "--stop '': an empty text"),
        (["--interactive", "--json"], "--json: works only with --prompt"),
    ],
)
def test_texts_are_checked_before_a_model_is_sought(options: list[str], message: str) -> None:
    code, _, err = wf("generate", "nowhere", *options)
    assert code == 2
    assert message in err


def test_a_half_cache_is_the_native_engines(random_model: Path) -> None:
    pytest.importorskip("uvicorn")
    code, _, err = wf("serve", str(random_model / "final"), "--port", "0", "--half-cache")
    assert code == 2
    assert "--half-cache: works only with the native engine, and this is another (engine: transformers" in err


def test_a_model_config_name_stands_for_its_model() -> None:
    from wrinklefree.generate.open import pretrained_of

    assert pretrained_of("tiny") == "builtin:tiny"
    assert pretrained_of("smollm2_135m") == "HuggingFaceTB/SmolLM2-135M"
    assert pretrained_of("org/other") == "org/other"


@pytest.mark.parametrize(("last", "code"), [("2.5", 0), ("3.5", 0), ("nan", 1), ("", 1)])
def test_smoke_script_judges_the_log(tmp_path: Path, monkeypatch, capsys, last: str, code: int) -> None:
    script = Path(__file__).parents[2] / "scripts" / "smoke_test.py"
    given: list[list[str]] = []

    def run(overrides: list[str], **options: object) -> None:
        given.append(overrides)
        out = Path(dict(o.split("=", 1) for o in overrides)["output_dir"])
        out.mkdir(parents=True)
        (out / "training_log.csv").write_text(LOG + "1,3,,1e-4,1,0.5,40,20\n2," + last + ",,1e-4,1,0.5,40,20\n")

    monkeypatch.setitem(sys.modules, "wrinklefree.commands.train", types.SimpleNamespace(run=run))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smoke_test.py", "--model", "tiny", "--mode", "w1", "--steps", "2"])
    monkeypatch.syspath_prepend(str(script.parent))  # as Python does for a script
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == code
    assert ("ALL TESTS PASSED!" in capsys.readouterr().out) == (code == 0)
    config = load_config(given[0])
    assert (config.training.max_steps, config.training.stage, config.model.name) == (2, "w1", "tiny")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_of_training_ends_a_command_as_ctrl_c_does(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_and_be_ended(**options: object) -> None:
        with files.written_aside(tmp_path / "packed") as aside:
            (aside / "half").touch()
            signal.raise_signal(number)

    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        monkeypatch.setattr(doctor, "run", write_and_be_ended)
        with pytest.raises(SystemExit) as ended:
            main(["doctor"])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_a_comparison_is_listed_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = wf("compare", "model=tiny", "--methods", "fairy2_w1,ternary", "--steps", "3", "--dry-run")
    assert code == 0, err
    assert "would measure the original, int8, int4" in out
    assert [line.split()[:4] for line in out.splitlines()[2:] if line] == [
        ["fairy2_w1", "42", "3", "steps"],
        ["ternary", "42", "3", "steps"],
    ]
    assert list(tmp_path.iterdir()) == []


def test_reports_are_also_one_json_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "a").mkdir(parents=True)
    (tmp_path / "outputs" / "a" / "training_log.csv").write_text("step,train_loss,eval_loss\n3,1.5,\n")
    code, out, _ = wf("runs", "--json")
    assert code == 0
    [run] = json.loads(out)["runs"]
    assert (run["run"], run["steps"], run["loss"], run["status"]) == ("a", "3", "1.500", "stopped")
    code, out, _ = wf("methods", "--json")
    assert code == 0
    listed = {kind: [each["name"] for each in found] for kind, found in json.loads(out).items()}
    assert listed["export formats"] == list(formats())
    [fairy2] = [each for each in json.loads(out)["methods"] if each["name"] == "fairy2"]
    assert fairy2["trainings"] == ["fairy2_w1", "fairy2_w2"]
    code, out, _ = wf("doctor", "--json")
    assert code == 0
    assert {"python", "torch", "disk"} <= {check["name"] for check in json.loads(out)["checks"]}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a run, without weights: what is described is not loaded."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    (final / "wrinklefree.yaml").write_text(config_yaml(load_config(["model=tiny", "training=fairy2_w2"])))
    return final.parent


def test_an_export_is_described_before_it_is_written(trained: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = wf("export", str(trained), "--dry-run", "--out", str(tmp_path / "small"))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"would export {trained / 'final'}, quantized with fairy2"
    assert out.splitlines()[2].split()[:2] == ["hf", f"{tmp_path / 'small'}/"]
    code, out, _ = wf("export", str(trained), "--format", "all", "--dry-run")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(formats())
    assert f"{trained / 'packed'}/" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_described_export_is_refused_as_the_export_itself(trained: Path) -> None:
    (trained / "packed").mkdir()
    said = f"error: {trained / 'packed'}: exists already; choose another with --out or give --force to replace it\n"
    assert wf("export", str(trained), "--dry-run") == wf("export", str(trained)) == (2, "", said)
    assert wf("export", str(trained), "--dry-run", "--force")[0] == 0
    foreign = ("--out", "new", "--gguf-type", "q2_0", "--dry-run")
    assert "has no effect with --format hf" in wf("export", str(trained), *foreign)[2]
    assert wf("export", str(trained / "final" / "no"), "--dry-run")[0] == 2
