"""Launching: what a rented machine is told, what is refused before anything is spent, and how jobs are found again.

SkyPilot is a program of its own here too: a script that writes down how it was called.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.cloud import estimate, job, places, start, wheel
from wrinklefree.cloud.engines import hub
from wrinklefree.cloud.job import Job
from wrinklefree.commands import anemll, trm
from wrinklefree.config.compose import load_config
from wrinklefree.core.lock import lock_to_hand_on

VERBS = {
    "fairy2": ["fairy2", "-m", "smollm2_135m", "--mode", "w2"],
    "train": ["train", "model=qwen3_4b", "training=stage2_pretrain", "distributed=fsdp_multi"],
    "bitdistill": ["bitdistill", "-m", "smollm2_135m", "--task", "sst2"],
    "anemll": ["anemll", "-m", "qwen3_0_6b", "--workflow", "c", "q2:training.max_steps=1000"],
    "trm": ["trm", "grpo", "model=smollm3_3b", "thinking.grpo.group_size=8"],
}

KEY = "a-key-that-nobody-may-see"

# What SkyPilot 0.14.1 takes in a task file, of what is used here.
KEYS = {"name", "num_nodes", "resources", "file_mounts", "secrets", "setup", "run"}
RESOURCES = {"infra", "accelerators", "use_spot", "disk_size", "job_recovery"}


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a home of one's own, and no keys but those that a test sets."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WF_BUCKET", "GOOGLE_APPLICATION_CREDENTIALS", "WF_SKY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wf(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose each list of settings once: that takes a second, and the clouds share them. No estimates."""
    made: dict[tuple[str, ...], Any] = {}

    def load(overrides: list[str]) -> Any:
        key = tuple(overrides)
        if key not in made:
            made[key] = load_config(overrides)
        return made[key]

    for module in (start, anemll, trm):
        monkeypatch.setattr(module, "load_config", load)
    monkeypatch.setattr(estimate, "skeleton", lambda config: None)


def task_of(out: str) -> dict[str, Any]:
    """The task that `--dry-run` printed before the estimate."""
    values = yaml.safe_load(out.partition("\n\n")[0])
    assert isinstance(values, dict)
    return values


def possible(verb: str) -> list[tuple[str, str]]:
    """Every cloud of the table with every scale that it has."""
    return [
        (cloud.name, scale)
        for cloud in places.clouds().values()
        for scale, row in places.scales().items()
        if cloud.name != "hf" and row.gpus in cloud.counts and (verb != "trm" or row.gpus == 1)
    ]


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("verb", VERBS)
def test_every_cloud_and_scale_gives_a_task_that_runs_the_command(verb: str) -> None:
    for cloud, scale in possible(verb):
        if scale not in ("dev", "xlarge"):  # the others differ in the number of GPUs alone
            continue
        code, out, err = wf(*VERBS[verb], "--cloud", cloud, "--scale", scale, "--bucket", "gs://mine", "--dry-run")
        assert code == 0, err
        task = task_of(out)
        assert task.keys() <= KEYS
        assert task["resources"].keys() <= RESOURCES
        assert task["resources"]["infra"] == cloud
        assert task["resources"]["accelerators"] == f"H100:{places.scales()[scale].gpus}"
        assert f'"$WF_BUCKET"/{verb}/' in task["run"]
        assert "training.resume_from=latest" in task["run"]
        assert "gs://" not in task["setup"] + task["run"]
    assert subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=False).returncode == 0


def test_the_command_arrives_as_it_was_given(apart: Path) -> None:
    """The words of the task, read by a shell, make the same settings as here."""
    given = ["fairy2", "-m", "smollm2_135m", "training.max_steps=7", "data.path=a b'c"]
    _, out, _ = wf(*given, "--cloud", "nebius", "--bucket", "gs://mine", "--dry-run")
    line = task_of(out)["run"].replace("exec ~/wf-env/bin/wf", "printf '%s\\n'")
    words = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=True, env={"WF_BUCKET": "gs://mine"}
    ).stdout.splitlines()
    assert words == [
        *("fairy2", "--model", "smollm2_135m", "training.max_steps=7", "data.path=a b'c"),
        "training.upload_to=gs://mine/fairy2/smollm2_135m",
        "training.resume_from=latest",
    ]
    code, out, err = wf(*words, "--dry-run")
    assert code == 0, err
    assert yaml.safe_load(out)["training"]["max_steps"] == 7


def test_a_checkpoint_to_start_from_is_only_the_first_start() -> None:
    url = "training.resume_from=gs://other/fairy2/step_5000.pt"
    _, out, _ = wf(*VERBS["fairy2"], url, "--cloud", "nebius", "--bucket", "gs://mine", "--dry-run")
    assert "training.resume_from=latest,gs://other/fairy2/step_5000.pt" in task_of(out)["run"]


def test_bare_cloud_is_nebius_and_spot_and_nodes_arrive() -> None:
    _, out, _ = wf(
        *VERBS["train"], "--cloud", "--spot", "--nodes", "4", "--scale", "xlarge", "--bucket", "s3://b", "--dry-run"
    )
    task = task_of(out)
    assert (task["resources"]["infra"], task["resources"]["use_spot"], task["num_nodes"]) == ("nebius", True, 4)
    assert 'WF_NODE="$SKYPILOT_NODE_RANK"' in task["run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cloud", "nebiu", "--bucket", "gs://b"], "did you mean 'nebius'"),
        (
            ["--cloud", "nebius", "--scale", "large", "--bucket", "gs://b"],
            "no machine with 4 GPUs; its scales: dev (1)",
        ),
        (["--cloud", "kubernetes", "--spot", "--bucket", "gs://b"], "has no spot machines"),
        (["--cloud", "hf", "--nodes", "2", "--bucket", "hf://buckets/me/b"], "at most 1 machine"),
        (["--cloud", "nebius"], "say where checkpoints go with --bucket"),
        (["--cloud", "nebius", "--bucket", "/mnt/disk"], "a rented machine writes to gs://"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_spent(options: list[str], message: str, apart: Path) -> None:
    code, out, err = wf(*VERBS["fairy2"], *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(apart.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "left", "message"),
    [
        (["fairy2", "-m", "mine"], {"mine/config.json": "{}"}, "model=mine: a rented machine does not have it"),
        (["trm", "grpo", "model=chains"], {}, "model=outputs/pretrain_chains: a rented machine does not have it"),
        (["train", "model=tiny", "data=local", "data.path=t"], {"t": "x"}, "data.path=t: a rented machine does not"),
        (["train", "model=tiny", "training.start_from=[old]"], {"old/x": ""}, "training.start_from=old: a rented"),
        (["trm", "pairs", "model=smollm3_3b", "thinking.pairs.problems=p"], {"p": ""}, "thinking.pairs.problems=p: a"),
        (["fairy2", "-m", "tiny"], {"local.yaml": "seed: 7"}, "local.yaml: a rented machine does not have it"),
        (
            ["train", "model=tiny", "training=mine"],
            {"configs/training/mine.yaml": "# @package _global_\ntraining: {stage: mine}\n"},
            "configs/training/mine.yaml: a rented machine",
        ),
        (
            ["train", "model=tiny", "training.scheduler.name=mine"],
            {"schedules/mine.py": "def rate(progress):\n    return 1.0\n"},
            "schedules/mine.py: a rented machine",
        ),
    ],
)
def test_what_is_on_this_machine_alone_is_named_before_anything_is_spent(
    words: list[str], left: dict[str, str], message: str, apart: Path
) -> None:
    for name, text in left.items():
        (apart / name).parent.mkdir(parents=True, exist_ok=True)
        (apart / name).write_text(text)
    code, out, err = wf(*words, "--cloud", "nebius", "--bucket", "gs://b", "--dry-run")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--spot", "--nodes=2", "--no-detach", "--bucket=gs://b"])
def test_options_of_a_cloud_without_one_are_refused(option: str) -> None:
    code, _, err = wf("fairy2", "-m", "tiny", option)
    assert code == 2
    assert "has no effect without --cloud" in err


@pytest.fixture
def called(apart: Path, monkeypatch: pytest.MonkeyPatch, composed_once: None) -> Path:
    """A `sky` that writes down its words and the secrets that it could read, and a store in memory."""
    log = apart / "called.jsonl"
    program = apart / "sky.py"
    program.write_text(
        "import json, os, sys\n"
        f"names = [w for i, w in enumerate(sys.argv) if sys.argv[i - 1] == '--secret']\n"
        f"print(json.dumps([sys.argv[1:], {{n: os.environ[n] for n in names}}]), file=open({str(log)!r}, 'a'))\n"
    )
    monkeypatch.setenv("WF_SKY", f"{sys.executable} {program}")
    monkeypatch.setattr("wrinklefree.training.storage.check_writable", lambda url: None)
    monkeypatch.setattr("wrinklefree.training.storage.names", lambda url: [])
    monkeypatch.setattr(wheel, "build", lambda folder: (folder / wheel.wheel_name()).write_bytes(b"PK") and folder)
    return log


def calls(log: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def test_a_launch_hands_secrets_to_sky_and_writes_none(
    called: Path, apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    code, out, err = wf(*VERBS["fairy2"], "--cloud", "nebius", "--bucket", "gs://a-bucket-of-mine")
    assert code == 0, err
    words, secrets = calls(called)[0]
    assert words[:4] == ["jobs", "launch", "--yes", "--detach-run"]
    assert secrets == {"WF_BUCKET": "gs://a-bucket-of-mine", "WANDB_API_KEY": KEY}
    assert KEY not in words
    called.unlink()
    written = [file for file in apart.rglob("*") if file.is_file()]
    assert {"job.json", "task.yaml"} <= {file.name for file in written}
    for file in written:
        assert KEY.encode() not in file.read_bytes()
        assert b"a-bucket-of-mine" not in file.read_bytes()
    assert KEY not in out + err
    assert "training.logging.wandb.enabled=true" in job.jobs()[0].folder.joinpath("task.yaml").read_text()


def test_without_detach_sky_shows_the_log_to_the_end(called: Path) -> None:
    assert wf(*VERBS["train"], "--cloud", "nebius", "--bucket", "gs://b", "--no-detach")[0] == 0
    words = calls(called)[0][0]
    assert words[:2] == ["jobs", "launch"]
    assert "--detach-run" not in words


def test_jobs_are_found_by_the_guides_name_and_have_names_of_their_own(called: Path) -> None:
    for _ in range(3):
        assert wf(*VERBS["fairy2"], "--cloud", "nebius", "--bucket", "gs://b")[0] == 0
    assert wf(*VERBS["bitdistill"], "--cloud", "nebius", "--bucket", "gs://b")[0] == 0
    names = [found.name for found in job.jobs()]
    assert len(set(names)) == 4
    newest = next(name for name in names if name.startswith("wf-fairy2-smollm2-135m-w2-"))
    assert wf("logs", "wf-fairy2-train", "-f")[0] == 0
    assert calls(called)[-1][0] == ["jobs", "logs", "--name", newest, "--follow"]
    assert wf("cancel", "wf-bitdistill-train")[0] == 0
    assert calls(called)[-1][0] == ["jobs", "cancel", "--yes", "--name", names[0]]
    code, _, err = wf("logs", "wf-anemll-train")
    assert code == 2
    assert "no such job" in err
    assert newest in wf("runs", "nowhere")[1]


def test_a_place_that_holds_a_run_is_refused(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wrinklefree.training.storage.names", lambda url: ["step_10"])
    launch = [*VERBS["fairy2"], "--cloud", "nebius", "--bucket", "gs://b"]
    code, _, err = wf(*launch)
    assert code == 2
    assert "gs://.../fairy2/smollm2_135m: holds a run already" in err
    assert not called.exists()
    assert wf(*launch, "training.resume_from=latest")[0] == 0


def test_without_skypilot_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, apart: Path) -> None:
    monkeypatch.setenv("PATH", str(apart))
    code, _, err = wf(*VERBS["fairy2"], "--cloud", "nebius", "--bucket", "gs://b")
    assert code == 2
    assert err.count("\n") == 1
    assert "pipx install 'skypilot[nebius]==" in err


def test_a_failing_sky_is_said(called: Path, apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WF_SKY", "false")
    code, _, err = wf(*VERBS["fairy2"], "--cloud", "nebius", "--bucket", "gs://b")
    assert code == 2
    assert "sky jobs launch failed (code 1)" in err


def test_hugging_face_jobs(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hub that writes down what it is asked."""
    asked: dict[str, Any] = {}

    class Hub:
        def sync_job_volume(self, source: Path, mount_path: str, **more: Any) -> str:
            asked["files"] = sorted(path.name for path in source.iterdir())
            return "volume"

        def run_job(self, **values: Any) -> Any:
            asked.update(values)
            return type("Started", (), {"id": "68af"})()

        def fetch_job_logs(self, job_id: str, follow: bool) -> list[str]:
            return [f"log of {job_id}"]

        def cancel_job(self, job_id: str) -> None:
            asked["cancelled"] = job_id

    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "get_token", lambda: KEY)
    code, out, err = wf(*VERBS["fairy2"], "--cloud", "hf", "--scale", "medium", "--bucket", "hf://buckets/me/b")
    assert code == 0, err
    assert asked["flavor"] == "h200x2"
    assert asked["secrets"] == {"HF_TOKEN": KEY, "WF_BUCKET": "hf://buckets/me/b"}
    assert wheel.wheel_name() in asked["files"]
    assert KEY not in str(asked["command"]) + out + err
    assert subprocess.run(["bash", "-n", "-c", asked["command"][2]], check=False).returncode == 0
    assert "log of 68af" in wf("logs", "wf-fairy2-train")[1]
    assert wf("cancel", "wf-fairy2-train")[0] == 0
    assert asked["cancelled"] == "68af"


def test_hugging_face_jobs_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    code, _, err = wf(*VERBS["fairy2"], "--cloud", "hf", "--bucket", "hf://buckets/me/b")
    assert code == 2
    assert "no token of the hub" in err


def test_records_that_are_broken_are_left_out(apart: Path) -> None:
    for text in ("{", "[]", '{"name": 1}'):
        folder = job.jobs_folder() / str(len(text))
        folder.mkdir(parents=True)
        (folder / job.RECORD).write_text(text)
    assert job.jobs() == []


@pytest.mark.slow
def test_the_wheel_of_the_checkout_has_the_package_and_its_tables(tmp_path: Path) -> None:
    import zipfile

    names = zipfile.ZipFile(wheel.build(tmp_path)).namelist()
    assert {"wrinklefree/cli.py", "wrinklefree/cloud/places.yaml", "wrinklefree/config/yaml/config.yaml"} <= set(names)


def sky_python() -> str | None:
    """The Python of an environment that has SkyPilot, which WF_SKY_PYTHON names."""
    return os.environ.get("WF_SKY_PYTHON")


@pytest.mark.skipif(sky_python() is None, reason="WF_SKY_PYTHON names no Python with SkyPilot")
@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("verb", VERBS)
def test_skypilot_takes_every_task(verb: str, apart: Path) -> None:
    """Offline: its own parser of task files, for every cloud and scale."""
    files = []
    for number, (cloud, scale) in enumerate(possible(verb)):
        _, out, _ = wf(*VERBS[verb], "--cloud", cloud, "--scale", scale, "--bucket", "gs://mine", "--dry-run")
        task = task_of(out)
        for path in task["file_mounts"].values():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            if not Path(path).exists():
                Path(path).write_bytes(b"PK")
        files.append(apart / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(task))
    code = (
        "import sys, yaml, sky\n"
        "for path in sys.argv[1:]:\n"
        "    task = yaml.safe_load(open(path))\n"
        "    secrets = [(name, 'x') for name in task['secrets']]\n"
        "    made = sky.Task.from_yaml_config(task, secrets_overrides=secrets)\n"
        "    assert made.name and made.run and made.resources\n"
    )
    done = subprocess.run(
        [str(sky_python()), "-c", code, *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_runs_says_whether_a_job_of_this_machine_goes_on(apart: Path) -> None:
    one = Job("wf-fairy2-tiny-w2-0000", "fairy2", "background", "this machine", 0.0, "1")
    job.save(one)
    assert wf("runs")[1].split()[-1] == "ended"
    with lock_to_hand_on(one.folder):
        assert wf("runs")[1].split()[-1] == "running"


def test_the_job_of_a_background_run_is_not_a_clouds() -> None:
    made = Job("wf-fairy2-tiny-w2-0000", "fairy2", "background", "this machine", 0.0, "1")
    job.save(made)
    code, _, err = wf("cancel", made.name)
    assert code == 2
    assert "has ended already" in err


def test_engines_have_the_same_functions() -> None:
    for name in ("sky", "hub", "background"):
        assert {"launch", "logs", "cancel"} <= vars(start.engine(name)).keys()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs end as soon as they are told to."""
    for name in ("background", "sky"):
        monkeypatch.setattr(start.engine(name), "cancel", lambda job: None)


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize(
    ("verb", "left", "said"),
    [
        ("fairy2", [], "it had saved nothing yet, so the same command starts anew"),
        ("fairy2", ["training_log.csv"], "it had saved nothing yet, so the same command with --force starts anew"),
        ("fairy2", ["blocks/plan.json"], "the same command with training.resume_from=latest goes on"),
        ("fairy2", ["checkpoints/step_7/x", "training_log.csv"], "with training.resume_from=latest goes on"),
        ("bitdistill", ["training_log.csv"], "the same command goes on"),
        ("trm", ["thoughts-000.jsonl"], "the same command goes on"),
        ("trm", [".moments.0.safetensors"], "the same command goes on"),
    ],
)
def test_cancel_says_how_to_go_on_with_what_is_there(verb: str, left: list[str], said: str, apart: Path) -> None:
    for name in left:
        (apart / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (apart / "run" / name).touch()
    made = Job(f"wf-{verb}-tiny-0000", verb, "background", "this machine", 0.0, "1", [str(apart / "run")])
    job.save(made)
    assert wf("cancel", made.name)[1].endswith(f"{said}\n")


@pytest.mark.usefixtures("ended")
def test_cancel_on_a_cloud_names_the_store() -> None:
    job.save(Job("wf-fairy2-tiny-0000", "fairy2", "sky", "nebius", 0.0))
    assert "newest checkpoint in the store" in wf("cancel", "wf-fairy2-train")[1]


def test_a_dry_run_of_a_thinker_has_an_estimate() -> None:
    code, out, err = wf(*VERBS["trm"], "--cloud", "nebius", "--scale", "dev", "--bucket", "gs://mine", "--dry-run")
    assert code == 0, err
    rows = {line.split()[0]: line for line in out.partition("\n\n")[2].splitlines() if line}
    assert {"tokens", "time", "memory", "cost:"} <= rows.keys()
    assert "200 steps x 16 problems x 8 answers" in rows["tokens"]
