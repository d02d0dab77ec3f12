"""What is promised about runs and files, tried at random: kills, resumes, hostile files, failing stores.

    python -m benchmarks.reliability [--quick] [--json] [--parts kills,resumes,...] [--seed 0]

kills     Runs of every objective and some methods get SIGKILL or SIGTERM at random moments, and are started again with
          the same command. `kills_same_bits` counts kills after which the run ended with the bits of an unbroken one.
resumes   Runs over a number of tokens are stopped and resumed with other batch sizes and numbers of processes. A resume
          is right if the run ends at the same place in the data, having trained on as many tokens.
mutants   Damaged and forged files of every kind (benchmarks/hostile.py): each is read, or refused in a few lines.
code      Folders and pickles that would write a file if their code ran.
uploads   A store on loopback that answers 500, refuses, or is gone. Runs go on; a later one uploads what is missing.
folders   A second run in a folder, with `--force` and with `resume_from=latest`.
stores    Machines that are lost: runs that upload to an S3 server (moto) and a GCS emulator get SIGKILL at random
          moments, their folders are removed, and the same command goes on with what the store has. With `--quick` only
          if it is named. `store_resumes` counts runs that found a checkpoint there, `store_broken` checkpoints there
          that were not whole.

Everything happens on this machine, in a temporary folder. One process has imported the package, and runs are its forks.
"""

import argparse
import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import fsspec
import torch
from fsspec import AbstractFileSystem
from safetensors.torch import load_file

from benchmarks import hostile
from wrinklefree import cli
from wrinklefree.config.schema import TrainingConfig
from wrinklefree.runs import mirror
from wrinklefree.runs.report import RESULTS
from wrinklefree.thinking import compare, compressor, pairs_stage, stages  # noqa: F401  # imported before forking
from wrinklefree.tracking.run_log import read_rows
from wrinklefree.training import checkpoint, saved_state, uploads

Figures = dict[str, Any]

STEPS = 24
CLOCKS = ("elapsed_sec", "tokens_per_sec")
# How a run ends that is killed, or told to stop in its steps or outside of them.
ENDED = (-signal.SIGKILL, -signal.SIGTERM, 2, 128 + signal.SIGTERM)

PATIENCE = 120.0  # seconds for one run; they take two or three


# Runs, each in a fork


def start(arguments: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start `wf ARGUMENTS` in a fork, after `before` has been called there, and return its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()
        cli.main(list(arguments))
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def wait(pid: int, seconds: float = PATIENCE) -> int | None:
    """Return the exit code of a process, negative for a signal; None if it has not ended in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def run(arguments: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run `wf ARGUMENTS` and return its exit code. Raises TimeoutError if it does not end."""
    pid = start(arguments, log, before)
    code = wait(pid)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise TimeoutError(f"no end after {PATIENCE:.0f} s: wf {' '.join(arguments)}")
    return code


def must(arguments: Sequence[str], log: Path) -> None:
    """Run `wf ARGUMENTS`. Raises RuntimeError, with what it said, if it fails."""
    code = run(arguments, log)
    if code:
        raise RuntimeError(f"exit code {code}: wf {' '.join(arguments)}\n{log.read_text()[-2000:]}")


# Kills


class Case(NamedTuple):
    """A kind of training: a verb, and settings in addition to those of the samples."""

    verb: tuple[str, ...]
    settings: tuple[str, ...]


TRM = ("experiment=toy", "thinking.d_compressed=8", "training.precision=fp32", "training.log_interval=1")
PAIRS = tuple(
    f"thinking.pairs.{setting}"
    for setting in ("num_problems=60", "num_heldout=20", "max_new_tokens=20", "keep_wrong=true", "segments=tokens")
)
NETWORK = tuple(f"thinking.network.{setting}" for setting in ("hidden_size=16", "num_heads=2", "max_thoughts=6"))
STAGE = ("training.max_steps=8", "training.batch_size=4", "training.eval_examples=8", "training.eval_interval=3")

CASES: dict[str, Case] = {
    "kl": Case(("train",), ()),
    "ce": Case(("train",), ("distillation=none",)),
    "relations": Case(("train",), ("distillation.attention.weight=0.1", "distillation.attention.split_heads=4")),
    "hidden": Case(("train",), ("distillation.hidden.enabled=true",)),
    "cached": Case(("train",), ("training.objective=cached_kd", "distillation.cache={root}/cache")),
    "best": Case(("train",), ("training.keep_best=true", "training.eval_interval=2", "training.patience=20")),
    "muon": Case(("train",), ("training.optimizer.name=muon", "training.gradient_accumulation_steps=2")),
    "ternary": Case(("train",), ("training=stage2_pretrain", "training.start_from=[]")),
    "tables": Case(("train",), ("training=anemll_q2a4", "method.rank=4", "method.attn_rank=4")),
    "integers": Case(("train",), ("training=uniform_w4", "method.group_size=16")),
    "compressor": Case(("trm", "compressor"), (*TRM, "thinking.init=orthogonal", "training.max_steps=12")),
    "recursion": Case(("trm", "train"), (*TRM, *PAIRS, *NETWORK, *STAGE)),
    "injection": Case(("trm", "inject"), (*TRM, *PAIRS, *NETWORK, *STAGE)),
    "grpo": Case(("trm", "grpo"), (*TRM, *PAIRS, *NETWORK, *STAGE)),
}


def command(case: Case, root: Path, out: Path) -> list[str]:
    """The command line of a case, whose run writes into `out`."""
    values = {"max_steps": STEPS, "batch_size": 2, "max_seq_length": 16, "lr": 1e-3, "precision": "fp32"}
    values |= {"save_interval": 3, "eval_interval": 100, "eval_tokens": 64, "final_eval_tokens": 64, "log_interval": 1}
    values |= {"pack": "false"} if case.verb == ("train",) else {}
    thinking = case.verb[0] == "trm"
    given = [f"training.{key}={value}" for key, value in values.items()]
    text = ["data=local", f"data.path={root / 'text'}"]
    model = [f"model={root / ('lm' if thinking else 'model')}", f"output_root={root}", f"output_dir={out}"]
    first = [setting for setting in case.settings if setting.startswith(("training=", "distillation=", "method="))]
    rest = [setting.format(root=root) for setting in case.settings if setting not in first]
    return [
        *case.verb,
        *model,
        *(["training=fairy2_w2"] if not thinking and not any(f.startswith("training=") for f in first) else []),
        *first,
        *text,
        *given,
        *rest,
    ]


def thinking_samples(root: Path, log: Path) -> None:
    """A model that has learned a little of the task, its compressor, its hidden pairs, and the stages on them."""
    task = ["data=downstream", "task=mod7_chains", "training.batch_size=8", "training.max_seq_length=64"]
    learn = ["training=full_precision", "training.max_steps=60", "training.lr=5e-3", "training.final_eval_tokens=256"]
    must(["train", f"model={root / 'model'}", *learn, *task, f"output_dir={root / 'learned'}"], log)
    shutil.copytree(root / "learned" / "final", root / "lm")
    (root / "lm" / checkpoint.CONFIG).unlink()
    shared = [f"model={root / 'lm'}", f"output_root={root}", *TRM]
    text = ["data=local", f"data.path={root / 'text'}", "training.max_seq_length=16", "training.final_eval_tokens=64"]
    must(["trm", "compressor", *shared, *NETWORK, *text, "thinking.moment_tokens=2000"], log)
    must(["trm", "pairs", *shared, *PAIRS, *NETWORK], log)
    for verb in ("train", "inject"):
        must(["trm", verb, *shared, *PAIRS, *NETWORK, *STAGE], log)


def result(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """What a finished run leaves: its final weights, and its log without clocks."""
    rows = [
        {key: value for key, value in row.items() if key not in CLOCKS} for row in read_rows(out / "training_log.csv")
    ]
    return load_file(out / "final" / "model.safetensors"), rows


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same bits."""
    (weights, rows), (others, other_rows) = result(a), result(b)
    return (
        rows == other_rows
        and weights.keys() == others.keys()
        and all(torch.equal(weights[name], others[name]) for name in weights)
    )


def again(arguments: Sequence[str], out: Path) -> list[str]:
    """The command line that goes on with a killed run, as a user would type it."""
    if checkpoint.step_folders(out / "checkpoints"):
        return [*arguments, "training.resume_from=latest"]
    return [*arguments, "--force"]


def kills(root: Path, count: int, draw: random.Random) -> Figures:
    """Kill runs `count` times at random moments, and see whether they end with the bits of unbroken ones."""
    log = root / "kills.log"
    names, done, good, waits = list(CASES), 0, 0, []
    if count < len(CASES):
        names = ["kl", "cached", "best"]
    else:
        thinking_samples(root, log)
    while done < count:
        for name in names:
            whole = root / f"whole_{name}"
            began = time.monotonic()
            if not whole.exists():
                must(command(CASES[name], root, whole), log)
                waits.append(time.monotonic() - began)
            killed, ended_same = _killed(name, root, draw, log, min(2, count - done))
            done, good = done + killed, good + (killed if ended_same else 0)
            if not ended_same:
                print(f"not the same bits: {name}", file=sys.stderr)
            if done >= count:
                break
    return {"kills": done, "kills_same_bits": good, "objectives": len(names)}


def _killed(name: str, root: Path, draw: random.Random, log: Path, most: int) -> tuple[int, bool]:
    """Kill one run at most `most` times. Returns how often it was killed, and whether it ended with the right bits."""
    out, arguments = root / f"killed_{name}_{draw.randrange(10**9)}", None
    plain = command(CASES[name], root, out)
    seconds = _length(root / f"whole_{name}")
    killed = 0
    while killed < most:
        pid = start(arguments or plain, log)
        _until_begun(out, pid)
        time.sleep(draw.random() * seconds)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        code = wait(pid)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return killed + 1, False
        if code == 0:  # it was faster than the signal
            break
        if code not in ENDED:
            return killed + 1, False
        killed += 1
        arguments = again(plain, out)
    if killed:
        must(arguments or plain, log)
    return killed, same(root / f"whole_{name}", out)


def _length(whole: Path) -> float:
    """The seconds that the steps of a run took."""
    return float(read_rows(whole / "training_log.csv")[-1]["elapsed_sec"])


def _until_begun(out: Path, pid: int) -> None:
    """Wait until a run has begun to train, or has ended."""
    before = (out / "training_log.csv").stat().st_mtime_ns if (out / "training_log.csv").exists() else 0
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        log = out / "training_log.csv"
        if log.exists() and log.stat().st_mtime_ns != before:
            return
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.005)


# Resumes of another size


def resumes(root: Path, count: int, processes: int, draw: random.Random) -> Figures:
    """Stop runs over a number of tokens, and resume them with other batch sizes, and in `processes` runs with two."""
    log, tokens = root / "resumes.log", 16 * 96
    right = 0
    plan = ["training.max_steps=null", f"training.total_tokens={tokens}", "data.max_passes=100"]
    whole = root / "resume_whole"
    must([*command(CASES["ce"], root, whole), *plan], log)
    place = _place(whole)
    for number in range(count + processes):
        out = root / f"resume_{number}"
        arguments = [*command(CASES["ce"], root, out), *plan]
        pid = start(arguments, log)
        _until_begun(out, pid)
        time.sleep(draw.random() * 0.5 * _length(whole))
        os.kill(pid, signal.SIGTERM)
        wait(pid)
        sizes = [f"training.batch_size={draw.choice([1, 4, 6])}"] if number < count else ["--nproc", "2"]
        code = run([*again(arguments, out), *sizes], log)
        left = tokens - int(read_rows(out / "training_log.csv")[-1]["tokens"])
        wasted = 16 * 6 if number < count else 16 * 4
        ended = code == 0 and 0 <= left < wasted and (left > 0 or _place(out) == place)
        right += ended
        if not ended:
            print(f"wrong: {sizes} exit code {code}, {left} tokens left", file=sys.stderr)
    return {"resumes": count + processes, "resumes_right": right}


def _place(out: Path) -> dict[str, Any]:
    """The place in the data at the end of a run."""
    stream: dict[str, Any] = saved_state.load_state(checkpoint.step_folders(out / "checkpoints")[-1])["stream"]
    return {key: stream[key] for key in ("epoch", "chunk", "document", "offset")}


# Mutants


def mutants(samples: dict[str, Path], root: Path, count: int, seed: int) -> Figures:
    """Attempt mutated files of every kind, a hundred in each fork, so that one that hangs in C code is seen."""
    counts: dict[str, int] = {}
    size = min(100, count)
    for first in range(0, count, size):
        told = root / f"mutants_{first}.jsonl"
        pid = os.fork()
        if not pid:
            _attempt_all(samples, root / f"scratch_{first}", told, min(size, count - first), seed + first)
        while wait(pid, 75) is None:
            if told.exists() and time.time() - told.stat().st_mtime < 75:
                continue
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            counts["hang"] = counts.get("hang", 0) + 1
            break
        for line in told.read_text().splitlines() if told.exists() else []:
            found = json.loads(line)
            counts[found["verdict"]] = counts.get(found["verdict"], 0) + 1
            if found["verdict"] not in ("read", "refused"):
                print(f"{found['verdict']}: {found['what']}", file=sys.stderr)
    return {
        "mutated": sum(counts.values()),
        "read": counts.get("read", 0),
        "refused_in_one_line": counts.get("refused", 0),
        "internal_errors": counts.get("internal error", 0),
        "hangs": counts.get("hang", 0),
        "written_outside": counts.get("wrote outside", 0),
    }


def _attempt_all(samples: dict[str, Path], scratch: Path, told: Path, count: int, seed: int) -> None:
    """Attempt `count` mutants, tell the verdicts in a file, and end this process."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        scratch.mkdir()
        with told.open("a", buffering=1) as file:
            for mutant, outcome in hostile.run(samples, hostile.mutations(samples, count, seed), scratch):
                what = f"{mutant.kind} {mutant.name} (seed {seed}): {outcome.message[:300]}"
                file.write(json.dumps({"verdict": outcome.verdict, "what": what}) + "\n")
    except BaseException as error:  # this fork must not go on as its parent, which removes the samples at its end
        with told.open("a") as file:
            what = f"the attempts ended (seed {seed}): {type(error).__name__}: {error}"
            file.write(json.dumps({"verdict": "internal error", "what": what}) + "\n")
    os._exit(0)


# Code that must not run

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("was here")
class Mine(LlamaForCausalLM):
    config_class = LlamaConfig
"""


class Pickled:
    """A pickle that writes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.marker, "was here")


def code(samples: dict[str, Path], root: Path) -> Figures:
    """Give every verb folders with code of their own, and pickles; count those whose code ran."""
    log, ran, tried = root / "code.log", 0, 0
    folder, marker = root / "hostile", root / "marker"
    shutil.copytree(samples["model"], folder)
    (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "mine.Mine", "AutoConfig": "mine.LlamaConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    text = (samples["run"] / checkpoint.CONFIG).read_text()
    (folder / checkpoint.CONFIG).write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    resume = root / "pickled"
    shutil.copytree(samples["resume"], resume)
    for file in resume.rglob("trainer.pt"):
        file.write_bytes(pickle.dumps(Pickled(marker)))
    pickled = root / "pickled_model"
    shutil.copytree(samples["model"], pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(marker)))
    train = hostile.settings(root, root / "code_run", "training.resume_from=latest")
    verbs = [[verb, str(folder)] for verb in ("eval", "export")] + [["generate", str(folder), "--prompt", "a"]]
    verbs += [["fairy2", "-m", str(folder), "training.max_steps=0"], ["generate", str(pickled), "--prompt", "a"]]
    verbs += [["train", *train[1:], f"model={samples['model']}", f"output_dir={resume}"]]
    for arguments in verbs:
        tried += 1
        run(arguments, log)
        ran += marker.exists()
        marker.unlink(missing_ok=True)
    return {"code_tried": tried, "code_run": ran}


# Uploads

STORED = TrainingConfig(stage="").save_total_limit  # as many checkpoints stay in the store


class Store(BaseHTTPRequestHandler):
    """A store that keeps what is put there. While `mood` is not `fine` it fails in that way."""

    mood: ClassVar[str] = "fine"
    failed: ClassVar[int] = 0
    kept: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if Store.mood != "fine":
            Store.failed += 1
            if Store.mood == "gone":  # in the middle of an answer
                self.close_connection = True
                return
            self.send_error({"500": 500, "refused": 403}[Store.mood])
            return
        Store.kept[self.path] = body
        if not body:  # removed
            del Store.kept[self.path]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        """What is there: sizes by path."""
        body = json.dumps({path: len(kept) for path, kept in Store.kept.items()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed for a request."""


class StoreFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The driver for `loopback://`, as gcsfs and s3fs are for theirs: an HTTP request for each file."""

    protocol = "loopback"
    address: ClassVar[str] = ""

    def _put(self, path: str, body: bytes) -> None:
        request = Request(f"{StoreFileSystem.address}/{self._strip_protocol(path)}", data=body, method="PUT")
        try:
            urlopen(request, timeout=5).close()
        except HTTPError as error:
            raise OSError(f"{error.code} {error.reason}") from error

    def _kept(self) -> dict[str, int]:
        with urlopen(StoreFileSystem.address, timeout=5) as answer:
            return dict(json.load(answer))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """A store has no folders."""

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        self._put(path, value)

    def put_file(self, local: str, remote: str, **more: Any) -> None:
        self._put(remote, Path(local).read_bytes())

    def rm_file(self, path: str) -> None:
        self._put(path, b"")

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        name, kept = self._strip_protocol(path).rstrip("/"), self._kept()
        if f"/{name}" in kept:
            return {"name": name, "size": kept[f"/{name}"], "type": "file"}
        if any(there.startswith(f"/{name}/") for there in kept):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
        name = self._strip_protocol(path).rstrip("/")
        below = {there[1:].removeprefix(f"{name}/").partition("/")[0] for there in self._kept() if f"/{name}/" in there}
        found = [self.info(f"{name}/{each}") for each in sorted(below)]
        return found if detail else [entry["name"] for entry in found]


def failing_uploads(root: Path) -> Figures:
    """Train while a store fails in each way, then once more while it works; count failures, and what is missing."""
    fsspec.register_implementation("loopback", StoreFileSystem, clobber=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    StoreFileSystem.address = f"http://127.0.0.1:{server.server_address[1]}"
    log, ended, missing = root / "uploads.log", 0, 0
    for mood in ("500", "refused", "gone"):
        out = root / f"uploads_{mood}"
        arguments = [*command(CASES["ce"], root, out), f"training.upload_to=loopback://bucket/{mood}"]
        _while_failing(arguments, log, mood)  # ends with code 2 if its results could not be uploaded
        ended += not (out / RESULTS).is_file()
        Store.mood = "fine"
        code = run(again(arguments, out), log, _soon)
        ended += code != 0
        kept = {path.split("/")[3] for path in Store.kept if f"/{mood}/" in path and path.endswith("trainer.pt")}
        newest = checkpoint.step_folders(out / "checkpoints")[-STORED:]
        missing += len({path.name for path in newest} - kept)
    server.shutdown()
    return {"uploads_failed": Store.failed, "runs_ended_by_upload": ended, "uploads_missing": missing}


def _while_failing(arguments: Sequence[str], log: Path, mood: str) -> int:
    """Run with a store that works when the run begins, and fails from the first step on."""
    Store.mood = "fine"
    pid = start(arguments, log, _soon)
    out = Path(next(word.removeprefix("output_dir=") for word in arguments if word.startswith("output_dir=")))
    _until_begun(out, pid)
    Store.mood = mood
    code = wait(pid)
    return 99 if code is None else code


def _soon() -> None:
    """Try uploads again at once, so that the benchmark takes seconds."""
    uploads.FIRST_WAIT, uploads.LONGEST_WAIT, uploads.LAST_TRY, mirror.FINAL_WAIT = 0.05, 0.1, 2.0, 2.0


# Machines that are lost

MACHINES = ("ce", "best", "muon")  # the cases that run there, without what comes before the steps: no upload is in it
PLAIN = ("training.start=plain", "training.blockwise.enabled=false")


@contextlib.contextmanager
def amazon() -> Iterator[str]:
    """An S3 server in a process of its own; the address of a bucket there."""
    port = _free_port()
    values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with (
        _environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", **values),
        _server("moto.server", "-H", "127.0.0.1", "-p", str(port), port=port),
    ):
        urlopen(Request(f"http://127.0.0.1:{port}/machines", method="PUT"), timeout=10).close()
        yield "s3://machines"


@contextlib.contextmanager
def google() -> Iterator[str]:
    """A GCS emulator in a process of its own; the address of a bucket there."""
    port = _free_port()
    words = ("start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=machines")
    with (
        _environment(STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{port}", GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false"),
        _server("gcp_storage_emulator", *words, port=port),
    ):
        yield "gs://machines"


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _server(module: str, *words: str, port: int) -> Iterator[None]:
    """Run `python -m MODULE WORDS` until the block ends. Raises RuntimeError if nothing listens within a minute."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{module} does not start; it comes with the extra `dev`")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def lost_machines(root: Path, count: int, draw: random.Random) -> Figures:
    """Kill runs `count` times and remove their folders, on each store; count those that end with the right bits."""
    figures: Figures = {"store_kills": 0, "store_kills_same_bits": 0, "store_resumes": 0, "store_broken": 0}
    for name in MACHINES:
        must([*command(CASES[name], root, root / f"lost_{name}"), *PLAIN], root / "stores.log")
    for store in (amazon, google):
        with store() as bucket:
            _lose_machines(root, bucket, count, draw, figures)
    return figures


def _lose_machines(root: Path, bucket: str, count: int, draw: random.Random, figures: Figures) -> None:
    killed = number = 0
    while killed < count:
        name = MACHINES[number % len(MACHINES)]
        out = root / f"machine_{bucket[:2]}_{number}"
        log = root / f"{out.name}.log"
        plain = command(CASES[name], root, out)
        arguments = [*plain, *PLAIN, f"training.upload_to={bucket}/{out.name}", "training.resume_from=latest"]
        times, number = 0, number + 1
        while times < min(2, count - killed) and _lost(
            arguments, out, log, draw.random() * 1.5 * _length(root / f"lost_{name}")
        ):
            times += 1
        if not times:
            continue
        killed += times
        must(arguments, log)
        said = log.read_text()
        figures["store_kills"] += times
        figures["store_kills_same_bits"] += times * same(root / f"lost_{name}", out)
        figures["store_resumes"] += said.count("fetched from its store")
        figures["store_broken"] += said.count("an earlier one is tried")


def _lost(arguments: Sequence[str], out: Path, log: Path, seconds: float) -> bool:
    """Kill a run `seconds` after its first step, and remove its folder. Returns whether it was killed in time."""
    pid = start(arguments, log)
    _until_begun(out, pid)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    killed = wait(pid) == -signal.SIGKILL
    shutil.rmtree(out)
    return killed


# Two runs in one folder


def folders(root: Path) -> Figures:
    """Start second runs in the folder of a run; count those that were refused, and see that the first is whole."""
    log, out = root / "folders.log", root / "shared_folder"
    arguments = command(CASES["ce"], root, out)
    must(command(CASES["ce"], root, root / "alone"), log)
    pid = start([*arguments], log)
    _until_begun(out, pid)
    os.kill(pid, signal.SIGSTOP)
    codes = [run([*arguments, more], log) for more in ("--force", "training.resume_from=latest")]
    os.kill(pid, signal.SIGCONT)
    first = wait(pid)
    return {
        "second_runs": len(codes),
        "second_runs_refused": codes.count(2),
        "first_run_whole": int(first == 0 and same(root / "alone", out)),
    }


# All of it


@contextlib.contextmanager
def workplace() -> Iterator[tuple[Path, dict[str, Path]]]:
    """A temporary folder with a sample of each kind of file, made in a fork."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "samples"
        pid = os.fork()
        if not pid:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            hostile.make_samples(root)
            os._exit(0)
        if wait(pid) != 0:
            raise RuntimeError("the samples could not be made")
        yield root, {path.name: path for path in sorted(root.iterdir()) if path.name in hostile.READERS}


QUICK = ("kills", "resumes", "mutants", "code", "uploads", "folders")
PARTS = (*QUICK, "stores")


def measure(quick: bool = False, parts: Sequence[str] = (), seed: int = 0) -> Figures:
    """All figures by name, or those of `parts`. With `quick`, few of everything."""
    parts = parts or (QUICK if quick else PARTS)
    figures: Figures = {}
    draw = random.Random(seed)
    with workplace() as (root, samples):
        steps: dict[str, Callable[[], Figures]] = {
            "kills": lambda: kills(root, 4 if quick else 48, draw),
            "resumes": lambda: resumes(root, 2 if quick else 8, 0 if quick else 2, draw),
            "mutants": lambda: mutants(samples, root, 40 if quick else 3000, seed),
            "code": lambda: code(samples, root),
            "uploads": lambda: failing_uploads(root),
            "folders": lambda: folders(root),
            "stores": lambda: lost_machines(root, 3 if quick else 20, draw),
        }
        for part in parts:
            began = time.monotonic()
            figures |= steps[part]()
            figures[f"seconds_{part}"] = round(time.monotonic() - began, 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few of everything, in a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    figures = measure(args.quick, args.parts.split(",") if args.parts else (), args.seed)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
