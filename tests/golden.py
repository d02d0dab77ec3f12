"""Golden traces: does another state of the code do exactly what this one does?

    python tests/golden.py record golden.json              with the Python of one checkout (five minutes on one core)
    python tests/golden.py record other.json               with that of the other, on the same machine
    python tests/golden.py compare golden.json other.json  exits with 1 and names what differs

`record` runs the product at toy size through its commands alone, so that it works on any state of the code: Fairy2i,
BitDistill's stages, ANEMLL's tables from V1 to V2, a KD cache and a training on it, the chain of LLM-TRM, and the
exports but `compressed-tensors`. What it keeps is a checksum of each file that a run leaves: figures of logs without
their clocks, tensors of checkpoints and packed folders, trainer states. The loader in a packed folder, model cards and
resolved configs are left out, because they may be worded anew while nothing changes.

Bits depend on the processor and on torch, so traces are compared on one machine and none is kept in the repository.
"""

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# What no two runs share.
CLOCKS = ("elapsed_sec", "tokens_per_sec", "seconds", "tokens_per_second", "speed", "p50", "p95")
LEFT_OUT = (".py", ".md", ".yaml", ".png", ".log", ".mlmodel")
RANDOM = ("Manifest.json",)  # coremltools draws new names for each package, here and in the .mlmodel

SMALL = [
    *("training.max_seq_length=64", "training.batch_size=4", "training.precision=fp32", "training.log_interval=1"),
    *("training.eval_interval=2", "training.save_interval=2", "training.eval_tokens=1024"),
    "training.final_eval_tokens=2048",
]
PACKAGE = "package"  # under this key a file of traces says whose they are
FEW = [*SMALL, "training.max_steps=4"]
CHAINS = ["model=chains", "training.precision=fp32", "training.log_interval=1"]
THINK = [*CHAINS, "training.max_steps=3", "training.eval_examples=20"]
PAIRS = ["pairs.keep_wrong=true", "pairs.num_problems=200", "pairs.num_heldout=40"]


def commands(thinking: str) -> list[list[str]]:
    """Every command, in order. `thinking` is the section of LLM-TRM's settings; up to version 0.1 it was `method`."""
    pairs = [f"{thinking}.{setting}" for setting in PAIRS]
    cached = ["training.objective=cached_kd", "distillation.cache=cache", "training.max_seq_length=auto"]
    return [
        ["fairy2", "-m", "tiny", "--mode", "w2", *FEW],
        [
            "fairy2",
            "-m",
            "tiny",
            "--mode",
            "w1",
            *FEW,
            "training.optimizer.name=muon",
            "training.scheduler.name=cosine",
        ],
        ["train", "model=tiny", "training=stage1_subln", *SMALL],
        ["train", "model=tiny", "training=stage1_9_layerwise", *FEW],
        ["train", "model=tiny", "training=stage2_pretrain", *FEW, "training.scheduler.name=linear"],
        ["train", "model=tiny", "training=stage0_sft", "task=stdlib_kind", *FEW, "training.eval_examples=20"],
        ["train", "model=tiny", "training=stage3_distill", "task=stdlib_kind", *FEW, "training.eval_examples=20"],
        ["anemll", "-m", "tiny", "--workflow", "a", *FEW],
        ["train", "model=tiny", "training=uniform_w4", *FEW, "export.head_bits=8"],
        ["cache", "-m", "teacher", "--out", "cache", "--length", "64", "--sequences", "40", "--heldout", "8"],
        ["train", "model=tiny", "training=anemll_v2", *FEW, *cached, "output_dir=outputs/cached"],
        ["pretrain", *CHAINS, "training.max_steps=30"],
        ["trm", "compressor", *CHAINS, "training.eval_tokens=1024", f"{thinking}.moment_tokens=4096"],
        ["trm", "pairs", *THINK, *pairs],
        ["trm", "train", *THINK],
        ["trm", "inject", *THINK],
        ["trm", "grpo", *THINK],
        ["trm", "eval", *THINK],
        *(
            ["export", "outputs/fairy2_tiny_w2", "--format", name, "--out", f"fairy2_{name}"]
            for name in ("hf", "dense")
        ),
        *(["export", "outputs/bitdistill_tiny_stage2_pretrain", "--format", name] for name in ("bitnet", "gguf")),
        ["export", "outputs/anemll_tiny_a_v2", "--format", "coreml"],
        [
            "generate",
            "outputs/fairy2_tiny_w2/packed",
            "--prompt",
            "def ",
            "--temperature",
            "0",
            "--max-new-tokens",
            "24",
        ],
    ]


def record(out: Path) -> None:
    """Run everything in an empty folder, and write a checksum for each file that comes of it."""
    thinking = "thinking" if "thinking" in shown_config() else "method"
    with tempfile.TemporaryDirectory() as name:
        folder, trace = Path(name), dict[str, str]()
        shutil.copytree(embedded_model(), folder / "teacher")  # a KD cache keeps the place of its teacher
        for command in commands(thinking):
            said = run(command, folder)
            if command[0] == "generate":
                trace[" ".join(command)] = digest(said.encode())
        trace |= dict(traces(folder))
    trace[PACKAGE] = str(package_folder())
    out.write_text(json.dumps(trace, indent=1, sort_keys=True) + "\n")
    print(f"wrote {out}: {len(trace)} traces")


def package_folder() -> Path:
    """The folder of the package that this Python imports: in an editable installation, that of its checkout."""
    package = importlib.util.find_spec("wrinklefree")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent


def embedded_model() -> Path:
    """The folder of the model `tiny` in the package, wherever that keeps it."""
    return next(path.parent for path in package_folder().rglob("tiny/config.json"))


def shown_config() -> list[str]:
    """The sections of LLM-TRM's resolved config."""
    said = run(["config", "training=trm_compressor"], Path.cwd())
    return [line.partition(":")[0] for line in said.splitlines() if not line.startswith(" ")]


def run(command: list[str], folder: Path) -> str:
    """What a command prints. It has one thread, for bits that do not depend on how work is split."""
    print("wf", *command, file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "wrinklefree.cli", *command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: wf {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def traces(folder: Path) -> Iterator[tuple[str, str]]:
    """(place, checksum) of every file in a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in LEFT_OUT and path.name not in RANDOM:
            yield path.relative_to(folder).as_posix(), digest(content(path, folder))


def content(path: Path, folder: Path) -> bytes:
    """A file's content without clocks and places."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return repr([without_clocks(row) for row in csv.DictReader(file)]).encode()
    if path.suffix == ".json":
        return repr(without_clocks(json.loads(path.read_text()))).replace(str(folder), "").encode()
    if path.suffix == ".pt":
        return repr(plain(torch.load(path, map_location="cpu", weights_only=True))).encode()
    return path.read_bytes()


def without_clocks(value: Any) -> Any:
    """A tree of JSON values without the entries that say how long something took, in the order of their keys."""
    if isinstance(value, dict):
        return {key: without_clocks(value[key]) for key in sorted(value) if key not in CLOCKS}
    return [without_clocks(entry) for entry in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A nested state with a checksum in place of each tensor."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else value
        return [str(value.dtype), tuple(value.shape), digest(flat.numpy().tobytes())]
    if isinstance(value, dict):
        return sorted((repr(key), plain(entry)) for key, entry in value.items())
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compare(one: Path, other: Path) -> None:
    """Name every trace that is in one file alone, or differs. Exits with 1 if there is one."""
    mine, others = json.loads(one.read_text()), json.loads(other.read_text())
    packages = mine.pop(PACKAGE, "unknown"), others.pop(PACKAGE, "unknown")
    print(f"packages: {packages[0]} against {packages[1]}")
    if not mine or not others:
        sys.exit("a file has no traces")
    different = sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))
    for name in different:
        where = "differs" if name in mine and name in others else f"only in {one if name in mine else other}"
        print(f"{name}: {where}")
    print(f"{len(mine.keys() & others.keys()) - sum(n in mine and n in others for n in different)} traces are equal")
    sys.exit(bool(different))


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    {"record": record, "compare": compare}[verb](*map(Path, paths))
