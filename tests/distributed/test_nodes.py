"""Several machines: two torchruns on loopback, each in a folder of its own, as if it had its own disk."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toyrun import overrides, rows, toy_files

from wrinklefree.core.errors import UserError
from wrinklefree.distributed.nodes import this_node
from wrinklefree.training import checkpoint


@pytest.mark.parametrize("values", [("2", "2", "host"), ("2", "0", ""), ("two", "0", "host"), ("2", "", "host")])
def test_variables_that_do_not_fit_are_one_line(values: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("WF_NODES", "WF_NODE", "WF_HEAD"), values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="WF_NODE has to be a number below WF_NODES"):
        this_node()


def test_torchrun_is_told_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_node().torchrun_options() == ["--standalone"]
    for name, value in (("WF_NODES", "4"), ("WF_NODE", "3"), ("WF_HEAD", "10.0.0.1")):
        monkeypatch.setenv(name, value)
    options = this_node().torchrun_options()
    assert {"--nnodes=4", "--node_rank=3", "--master_addr=10.0.0.1"} <= set(options)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def machine(folder: Path, number: int, port: int, settings: list[str]) -> "subprocess.Popen[str]":
    """`wf train` on one of two machines, which sees the toy files and its own folder alone."""
    own = folder / f"machine_{number}"
    own.mkdir(exist_ok=True)
    words = [word for word in overrides(folder, *settings) if not word.startswith("output_dir=")]
    variables = {"WF_NODES": "2", "WF_NODE": str(number), "WF_HEAD": f"127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "wrinklefree.cli", "train", *words, "output_dir=run", "--nproc", "1"]
    return subprocess.Popen(
        command, cwd=own, env=os.environ | variables, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_machines_of_which_one_dies_and_a_restart_that_resumes(tmp_path: Path) -> None:
    """Sharded over two machines without a common disk. The checkpoint of the first has the shards of both."""
    toy_files(tmp_path)
    store = tmp_path / "store"
    settings = ["distributed=fsdp_multi", "training.save_interval=2", f"training.upload_to=file://{store}"]
    settings += ["training.max_steps=200", "training.resume_from=latest", "training.save_total_limit=3"]
    port = free_port()
    both = [machine(tmp_path, number, port, settings) for number in (0, 1)]
    log = tmp_path / "machine_0" / "run" / "training_log.csv"
    until = time.monotonic() + 240
    while not list(store.glob("step_*/.wrinklefree-manifest.json")) or len(rows(log.parent)) < 5:
        assert time.monotonic() < until
        assert [one.poll() for one in both] == [None, None], [one.communicate()[1] for one in both if one.poll()]
        time.sleep(0.3)
    for process in on_the_second_machine(tmp_path):
        os.kill(process, signal.SIGKILL)
    _, errors = both[0].communicate(timeout=120)
    both[1].communicate()
    assert both[0].returncode == 2, errors
    steps = checkpoint.step_folders(tmp_path / "machine_0" / "run" / "checkpoints")
    assert all(len(list((step / "state" / "shards").glob("*.safetensors"))) == 2 for step in steps)

    # New machines: their disks are empty.
    for number in (0, 1):
        (tmp_path / f"machine_{number}").rename(tmp_path / f"gone_{number}")
    last = checkpoint.step_of(steps[-1])
    settings = [*settings, f"training.max_steps={last + 4}"]
    port = free_port()
    both = [machine(tmp_path, number, port, settings) for number in (0, 1)]
    told = [one.communicate(timeout=300)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    assert "fetched from its store" in told[0]
    assert (tmp_path / "machine_0" / "run" / "packed" / "model.safetensors").is_file()
    assert (store / "finished.json").is_file()
    assert (tmp_path / "machine_1" / "run" / "results.json").is_file()  # fetched, for a stage that starts from it


def on_the_second_machine(folder: Path) -> list[int]:
    """All its processes, by the folder that they work in."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve().is_relative_to(folder / "machine_1"):
                found.append(int(process.name))
        except OSError:
            continue
    return found
