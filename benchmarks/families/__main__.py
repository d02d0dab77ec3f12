"""`python -m benchmarks.families`: run the census, and write docs/models.md from it.

    --only llama,gpt2    these families alone
    --store DIR          where each family's row is kept; a row that is there is not made again
    --again              make all rows again
    --json               print the counts as JSON
    --docs               write docs/models.md

Each family runs in a process of its own. Packed folders are also read without this package, in forks of a process that
never imported it.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import shutil
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # imported once, before the forks

STORE = Path(tempfile.gettempdir()) / "wrinklefree-families"
SECONDS = 300  # for one family, at most
LOGITS = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader = WithoutPackage()
    from benchmarks.families.small import families

    with tempfile.TemporaryDirectory() as scratch:
        product("llama", Path(scratch))  # imports what a run needs once, before the forks
    args.store.mkdir(parents=True, exist_ok=True)
    names = args.only.split(",") if args.only else families()
    rows = [row_of(name, args.store, args.again, f"{n}/{len(names)}", reader) for n, name in enumerate(names, 1)]
    counts = count(rows)
    if args.docs:
        write_docs(rows, counts)
    print(json.dumps(counts | {"rows": rows}, indent=1) if args.json else json.dumps(counts))


def row_of(name: str, store: Path, again: bool, progress: str, reader: "WithoutPackage") -> dict[str, Any]:
    """The family's row: the kept one, or a new one."""
    file = store / f"{name}.json"
    if again or not file.is_file():
        row = run_apart(name, reader)
        file.write_text(json.dumps(row, indent=1))
        print(progress, name, row["verdict"], f"{row['share']:.0%}", row["where"], said(row)[:150], flush=True)
    kept: dict[str, Any] = json.loads(file.read_text())
    return kept


def said(row: dict[str, Any]) -> str:
    return "; ".join([*row["silent"], *([row["reason"]] if row["reason"] else [])])


def run_apart(name: str, reader: "WithoutPackage") -> dict[str, Any]:
    """Run a family in a fork, and then the loader of its packed folder in another."""
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="wrinklefree-family-"))
    try:
        row = in_fork(product, name, scratch)
        if row is None:
            row = empty(name) | {"verdict": "traceback", "where": "process", "reason": "killed, or out of time"}
        if row["verdict"] in ("whole", "partial"):
            problem = reader.read(scratch)
            row["loader"] = problem == ""
            if problem != "":
                row |= {"verdict": "silent", "where": "loader", "silent": [f"its own loader: {problem}"]}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return row | {"seconds": round(time.monotonic() - started, 1)}


class WithoutPackage:
    """A process that was forked before this package was imported. It reads packed folders, each in its own fork."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=self._serve, args=(other,), daemon=False)
        self.process.start()
        other.close()

    def _serve(self, pipe: Any) -> None:
        self.pipe.close()
        with contextlib.suppress(EOFError):
            while True:
                pipe.send(in_fork(load_without_package, pipe.recv()))

    def read(self, scratch: Path) -> str | None:
        """Read the packed folder of the run in `scratch`. Return what is wrong, or an empty text."""
        self.pipe.send(scratch)
        problem: str | None = self.pipe.recv()
        return problem


def empty(name: str) -> dict[str, Any]:
    return {"family": name, "share": 0.0, "silent": [], "unreadable": False, "exports": [], "loader": False}


def in_fork(work: Any, *arguments: Any) -> Any:
    """The result of `work` in a forked process. None if it died, or took too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(alone(work, *arguments)), daemon=False)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def alone(work: Any, *arguments: Any) -> Any:
    """Call `work` in a fork. Torch makes its pool of threads anew there, which two threads must not do at once."""
    torch.set_num_threads(1)
    return work(*arguments)


def product(name: str, scratch: Path) -> dict[str, Any]:
    """Run the product on a family. Whatever it raises becomes a row: that is what is measured."""
    from benchmarks.families import product as tried
    from wrinklefree.core.errors import UserError

    result = tried.Result(name)
    due = tried.without_loader()
    try:
        with tried.quiet():
            tried.run_family(name, scratch, result)
    except UserError as error:
        result.verdict, result.reason = "refused", str(error).replace(str(scratch), "")
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        result.verdict = "traceback" if result.where != "make" else "unmade"
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({place})"
    else:
        result.verdict = "silent" if result.silent else "whole" if result.share >= 0.9 else "partial"
        torch.save(due[0][1:], scratch / "expected.pt")
    return dataclasses.asdict(result)


def load_without_package(scratch: Path) -> str:
    """Read the packed folder by its own loader. Return what is wrong, or an empty text."""
    import os
    import sys

    sys.modules["wrinklefree"] = None  # type: ignore[assignment]  # importing it fails
    os.environ["HF_MODULES_CACHE"] = str(scratch)
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(scratch / "modules")
    ids, expected = torch.load(scratch / "expected.pt")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            scratch / "run" / "packed", dtype=torch.float32, trust_remote_code=True
        )
        with torch.no_grad():
            logits = model.eval()(ids, use_cache=False).logits
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    return "" if difference <= LOGITS else f"logits differ by {difference:.1e} of the largest"


def count(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many families ended how."""
    verdicts = [row["verdict"] for row in rows]
    names = {"whole": "whole", "partial": "partial", "refused": "refused", "tracebacks": "traceback"}
    counts = {name: verdicts.count(verdict) for name, verdict in names.items()}
    return {
        "families": len(rows),
        **counts,
        "silent": verdicts.count("silent"),
        "unmade": verdicts.count("unmade"),
        "unreadable_checkpoints": sum(row["unreadable"] for row in rows),
        "transformers": transformers.__version__,
    }


def write_docs(rows: list[dict[str, Any]], counts: dict[str, Any]) -> None:
    from benchmarks.families.table import page

    file = Path(__file__).parents[2] / "docs" / "models.md"
    file.write_text(page(rows, counts), encoding="utf-8")


if __name__ == "__main__":
    main()
