"""Compare what our methods make of a real model with what one would pick instead.

    python -m benchmarks.real --json
    python -m benchmarks.real --model FOLDER --text FILE [--json] [--peers rtn,hqq,...] [--runs NAME=FOLDER ...]

Without --model it shows the rows in `kept/`: measured once, in hours, each with its commit and processor.

The first 8,192 tokens of the text, in windows of 512, are the test. The rest is for calibration and training. KL is on
8,192 tokens that the original wrote (--self; made if it is not given). Rows are kept under --out and measured once.

--peers  those of `peers.py`, or `all`; auto_round_* and llama_* need a Python that has them
--runs   finished runs of ours. One name given several times is a headline with several seeds: its mean counts
--train  runs to make first, by the commands in `ours.py`; w2.2 is the second seed of w2. With --settings they take
         the same steps, whatever else the machine does; with --budget, the same minutes
--keep   also put the rows into `kept/`

LOG.md has the results.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import print_figures
from benchmarks.real import measure, ours, peers, picture
from benchmarks.real.rows import Row, Store, show, show_samples
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json
from wrinklefree.core.processor import processor
from wrinklefree.models.load import load_model

Figures = dict[str, Any]

HERE = Path(__file__).parent
KEPT = HERE / "kept"
STEP_TIME = HERE / "step_time.json"
TEXT = HERE.parents[1].parent / "shared/data/wikitext-2/valid.txt"
RATIOS = ("w2", "w2_seeds", "w2_avx2", "ternary", "w1", "q2a4")


def main() -> None:
    print_figures(arguments().parse_args(), figures)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--model", type=Path, help="folder of the original; without it, the kept rows are shown")
    parser.add_argument("--text", type=Path, default=TEXT, help="WikiText-2 valid.txt")
    parser.add_argument("--self", type=Path, dest="written", help="jsonl of texts that the original wrote")
    parser.add_argument("--peers", default="", help=f"comma-separated, of {', '.join(peers.PEERS)}; or all")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=FOLDER", help="finished runs to measure")
    parser.add_argument("--train", default="", help=f"comma-separated, of {', '.join(ours.COMMANDS)}")
    parser.add_argument("--budget", default="2h", help="of each run that --train makes")
    parser.add_argument("--settings", help="of each run that --train makes, instead of a budget: KEY=VALUE ...")
    parser.add_argument("--rows", type=int, default=64, help="calibration sequences of the peers")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--auto-round-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--auto-round-iters", type=int, default=50, help="steps a block; its light recipe has 50")
    parser.add_argument("--llama-python", type=Path, default=Path(sys.executable))
    parser.add_argument(
        "--step-time", type=Path, default=STEP_TIME, help="JSON of benchmarks/step_time.py; one is kept"
    )
    parser.add_argument("--again", default="", help="comma-separated rows to measure again, or all")
    parser.add_argument("--out", type=Path, default=Path("outputs/real"), help="folder for rows, runs and peers")
    parser.add_argument("--keep", action="store_true", help="put the rows into benchmarks/real/kept as well")
    parser.add_argument("--picture", type=Path, metavar="SVG", help="draw the rows, as in the README")
    return parser


def figures(args: argparse.Namespace) -> Figures:
    """Measure what is missing, print the table and return the figures. Raises UserError for wrong arguments."""
    store = Store(KEPT if args.model is None else args.out / "rows")
    if args.model is not None:
        fill(store, args)
    if args.keep:
        kept = Store(KEPT)
        for row in store.rows.values():
            kept.put(row)
    if args.picture is not None:
        picture.write(store.rows, args.picture)
    show(store.rows)
    show_samples(store.rows)
    return summary(store.rows, args.step_time)


def fill(store: Store, args: argparse.Namespace) -> None:
    """Measure the rows that are wanted and not there yet."""
    setup = open_setup(args)
    names = list(peers.PEERS) if args.peers == "all" else [name for name in args.peers.split(",") if name]
    for name in ["original", *names]:
        if wanted(store, name, args.again):
            store.put(peer(name)(setup, name))
            say(store.rows[name], store)
    for name, folder in {**trained(args, setup), **given(args.runs)}.items():
        if wanted(store, name, args.again, str(folder)):
            store.put(ours.row(name, folder, setup.test))
            say(store.rows[name], store)


def open_setup(args: argparse.Namespace) -> peers.Setup:
    """Load the original and the texts. Writes the training text and, if it is not given, what the original writes."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    windows, rest = measure.split(ids)
    (args.out / "rest.txt").write_text(tokenizer.decode(rest), encoding="utf-8")
    written = args.written or args.out / "self.jsonl"
    if not written.exists():
        measure.write_documents(model, tokenizer, written)
    texts = measure.documents(written, tokenizer)
    original = measure.remembered(measure.of_model(model))
    test = measure.Test(windows, texts, original, tokenizer)
    rows = measure.calibration(rest, args.rows, args.length)
    return peers.Setup(
        args.model,
        model,
        test,
        rows,
        args.out,
        args.auto_round_python,
        args.auto_round_iters,
        args.llama_python,
    )


def peer(name: str) -> peers.Peer:
    """The function that measures a row. Raises UserError if there is no such peer."""
    if name == "original":
        return peers.original
    if name not in peers.PEERS:
        raise UserError(f"--peers {name}: none of {', '.join(peers.PEERS)}")
    return peers.PEERS[name]


def wanted(store: Store, name: str, again: str, source: str | None = None) -> bool:
    """Whether a row has to be measured: it is new, or asked for again, or comes from another folder now."""
    row = store.rows.get(name)
    return row is None or again == "all" or name in again.split(",") or source not in (None, row.source)


def given(runs: list[str]) -> dict[str, Path]:
    """Row names and folders of `--runs`. The second run of a name is NAME.2, the third NAME.3."""
    found: dict[str, Path] = {}
    for run in runs:
        name, equals, folder = run.partition("=")
        if not equals:
            raise UserError(f"--runs {run}: not NAME=FOLDER")
        seeds = sum(known.partition(".")[0] == name for known in found)
        found[f"{name}.{seeds + 1}" if seeds else name] = Path(folder)
    return found


def trained(args: argparse.Namespace, setup: peers.Setup) -> dict[str, Path]:
    """Row names and folders of `--train`, each run made if it is not finished."""
    found = {name: args.out / "runs" / name for name in args.train.split(",") if name}
    chosen = {name: name_and_seed(name) for name in found}
    length = f"--budget {args.budget}" if args.settings is None else args.settings
    for name, folder in found.items():
        command, seed = chosen[name]
        ours.train(command, setup.folder, args.out / "rest.txt", folder, length, seed)
    return found


def name_and_seed(text: str) -> tuple[str, int]:
    """Split `w2.3`, the third run of `w2`, into the command's name and the seed 2. `w2` has the seed 0.

    Raises UserError if there is no such command.
    """
    name, dot, number = text.partition(".")
    if name not in ours.COMMANDS or (dot and not number.isdecimal()):
        raise UserError(f"--train {text}: none of {', '.join(ours.COMMANDS)}, perhaps with .2 or .3 for more seeds")
    return name, int(number or 1) - 1


def say(row: Row, store: Store) -> None:
    """Print one line as soon as a row is measured."""
    ratio = row.ppl / store.rows["original"].ppl
    print(f"{row.name}: {row.bytes / 1e6:.1f} MB, perplexity {row.ppl:.2f} ({ratio:.2f}x), KL {row.kl:.3f}", flush=True)


def summary(rows: dict[str, Row], step_time: Path) -> Figures:
    """The figures of the JSON. A figure whose row or file is missing is null."""
    original = rows["original"].ppl
    found: Figures = {f"{name}_ppl_ratio": mean_ppl(rows, name, original) for name in RATIOS}
    found |= over_w2(rows)
    found["minutes"] = rows["w2"].minutes if "w2" in rows else None
    found["step_time_ratio_135m"] = read_json(step_time)["step_time_ratio_135m"] if step_time.exists() else None
    found["processor"] = processor()
    found["w2_ppl_ratio_seeds"] = [row.ppl / original for row in seeds(rows, "w2_seeds") or seeds(rows, "w2")]
    table = {name: figures_of(row) for name, row in rows.items()}
    return found | {"rows": table}


def seeds(rows: dict[str, Row], name: str) -> list[Row]:
    """The rows of one name: NAME, NAME.2, NAME.3."""
    return [row for known, row in rows.items() if known.partition(".")[0] == name]


def mean_ppl(rows: dict[str, Row], name: str, original: float) -> float | None:
    """Mean perplexity over all seeds, over that of the original."""
    values = [row.ppl / original for row in seeds(rows, name)]
    return statistics.mean(values) if values else None


def over_w2(rows: dict[str, Row]) -> Figures:
    """Perplexity of each peer over that of our W2, and the best of those whose files are no larger."""
    if "w2" not in rows:
        return {"best_peer_over_w2": None, "peer_over_w2": {}}
    w2, ppl = rows["w2"], statistics.mean(row.ppl for row in seeds(rows, "w2"))
    others = [row for name, row in rows.items() if name in peers.PEERS or name in ours.CONTROLS]
    small = [row.ppl / ppl for row in others if row.bytes <= w2.bytes]
    ratios = {row.name: row.ppl / ppl for row in others}
    return {"best_peer_over_w2": min(small) if small else None, "peer_over_w2": ratios}


def figures_of(row: Row) -> Figures:
    names = ("bits", "bytes", "ppl", "kl", "top1", "minutes", "commit", "date", "processor", "threads")
    return {name: vars(row)[name] for name in names}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
