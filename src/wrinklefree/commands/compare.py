"""`wf compare`: methods side by side on one model, on equal terms, with a page to show for it.

Every method is trained by an ordinary run with the same text, tokens, seeds and objective, and measured as packed on
the same held-out text. The same command goes on where it was interrupted.
"""

import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import transformers

from wrinklefree.compare import mixed, page, references
from wrinklefree.compare.entries import METHODS, Entry, entries, with_bits
from wrinklefree.compare.quality import Test
from wrinklefree.compare.rows import Row, Store, grouped
from wrinklefree.compare.trained import source, trained
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside, write_json
from wrinklefree.core.processor import processor
from wrinklefree.core.text import parse_bytes
from wrinklefree.runs import launch
from wrinklefree.runs.setup import Run, open_run
from wrinklefree.tracking.one_line import one_line
from wrinklefree.tracking.terminal import print_table, printed_aside, spoken_time

log = logging.getLogger("wrinklefree")

MIXED = ("fairy2_w2",)  # by default, if bits are mixed
SENSITIVITY = "sensitivity"  # what each layer suffers from few bits
LOGS = "logs"  # what each run printed
KINDS = {"mixed": mixed.best, "even": mixed.even}

LONG_ENOUGH = 10.0  # seconds of finished runs, to tell from them how long the others will take

PAGE, TABLE, FIGURES = "index.html", "comparison.md", "comparison.json"


def run(
    model: str,
    *,
    methods: str | None = None,
    references_named: str | None = None,
    seeds: int = 1,
    steps: int | None = None,
    budget: str | None = None,
    fit_bytes: str | None = None,
    bits: float | None = None,
    processes: int | None = None,
    dry_run: bool = False,
    as_json: bool = False,
    out: Path | None = None,
    force: bool = False,
    overrides: list[str],
) -> None:
    """Compare `methods`, names separated by commas, on `model`, and write the results into `out`.

    Each run has the time `budget`, such as `2h`, or `steps` steps, and trains in so many `processes`. With `fit_bytes`,
    such as `60MB`, or with `bits`, methods are trained in mixed precision of that size, and with bits that are evenly
    spread. With `as_json`, the figures are all that standard output gets.
    Raises UserError for anything that the user can fix.
    """
    if dry_run and as_json:
        raise UserError("--json: has no effect with --dry-run, which measures nothing")
    if steps is not None and budget is not None:
        raise UserError("--steps and --budget: give one of them; each says how long a run is")
    if fit_bytes is not None and bits is not None:
        raise UserError("--fit-bytes and --bits: give one of them; each says how large a model may be")
    size = None if fit_bytes is None else parse_bytes("--fit-bytes", fit_bytes)
    mixes = size is not None or bits is not None
    names = list(MIXED if mixes else METHODS) if methods is None else methods.split(",")
    others = references.installed() if references_named is None else _references(references_named)
    first = entries(model, names[:1], 1, steps, overrides, Path("outputs"))[0].config()
    out = out or Path(first.output_root) / f"compare_{first.model.name}"
    chosen = entries(model, names, seeds, steps, overrides, out)
    for entry in chosen[: len(names)] if mixes else ():
        mixed.ladder(entry.config().method, entry.method)
    if dry_run:
        _show(chosen, others, mixes, steps, budget)
        return
    with printed_aside() if as_json else nullcontext():
        store = _open_store(out, force)
        rows = _measure_others(chosen[0], others, store, out, asked=references_named is not None)
        notes = list[str]()
        if mixes:
            chosen, notes = _mixed(chosen, len(names), out, size, bits)
        measured, facts = _train_and_measure(chosen, store, out, budget, processes, force)
        ways = len({entry.method for entry in chosen})
        title = f"{first.model.name}: {ways} way{'s' if ways > 1 else ''} to fewer bits"
        _write(out, title, [*facts, *notes], [*rows, *measured])
    if as_json:
        print((out / FIGURES).read_text(encoding="utf-8"), end="")


def _train_and_measure(
    chosen: list[Entry], store: Store, out: Path, budget: str | None, processes: int | None, force: bool
) -> tuple[list[Row], list[str]]:
    """The rows of all runs, and what they have in common, in sentences. What was trained and measured is kept."""
    began = time.monotonic()
    for number, entry in enumerate(chosen):
        about = _to_go(number, len(chosen), time.monotonic() - began)
        log.info("== %d of %d: %s, seed %d%s", number + 1, len(chosen), entry.method, entry.seed, about)
        with one_line(entry.name, out / LOGS / f"{entry.name}.log"):
            launch.run_chain([list(entry.overrides)], force, processes, budget)
    with _opened(chosen[0], out) as opened:
        test = Test(opened)
        rows = [_kept(store, entry.name, test, source(entry)) or _measured(store, entry, test) for entry in chosen]
        return rows, _facts(opened, chosen, budget)


def _to_go(done: int, of: int, seconds: float) -> str:
    """What is left after `done` runs, if they took long enough to tell. Runs of an earlier call take no time."""
    if not done or seconds < LONG_ENOUGH:
        return ""
    return f" ({spoken_time(seconds)} so far, about {spoken_time(seconds / done * (of - done))} to go)"


def _show(chosen: list[Entry], others: list[str], mixes: bool, steps: int | None, budget: str | None) -> None:
    """Print what would run, and how long."""
    length = f"{steps} steps" if steps is not None else budget or "the default time"
    print(f"would measure the original{''.join(f', {name}' for name in others)}")
    rows = [[entry.method, str(entry.seed), length, str(entry.folder)] for entry in chosen]
    print_table(["training", "seed", "for", "into"], rows)
    if mixes:
        print("each of them twice: with bits by sensitivity, which is measured first, and with even bits")


def _mixed(
    chosen: list[Entry], number: int, out: Path, size: int | None, bits: float | None
) -> tuple[list[Entry], list[str]]:
    """The runs with bits by layer in place of the `chosen` ones, and what was chosen, in sentences.

    The first `number` runs are those of the first seed. Raises UserError if no choice of bits is small enough.
    """
    changes, notes = dict[str, dict[str, list[str]]](), list[str]()
    for entry in chosen[:number]:
        with _opened(entry, out) as opened:
            key, _ = mixed.ladder(opened.config.method, entry.method)
            costs = mixed.measured(opened, out / SENSITIVITY / f"{entry.method}.json")
            budget = mixed.budget_of(opened, costs, size, bits)
        layers = {kind: choose(costs, budget.bytes) for kind, choose in KINDS.items()}
        names = {kind: f"{entry.method}_{kind}_{budget.label}" for kind in KINDS}
        changes[entry.method] = {names[kind]: mixed.per_layer(key, layers[kind]) for kind in KINDS}
        for kind, name in names.items():
            notes.append(f"{name}: {mixed.described(key, costs, layers[kind])}.")
            log.info(notes[-1])
    return [with_bits(e, name, layers) for e in chosen for name, layers in changes[e.method].items()], notes


def _open_store(out: Path, force: bool) -> Store:
    """The rows in `out`; with `force` none is kept. Raises UserError if the folder holds something else."""
    store = Store(out / "rows", keeps=not force)
    if out.exists() and not store.folder.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: holds other files: choose another folder, or an empty one")
    return store


def _references(names: str) -> list[str]:
    found = [] if names == "none" else names.split(",")
    references.check(found)
    return found


def _opened(entry: Entry, out: Path) -> Run:
    """The set-up of a run that only measures: it leaves no folder. With data=self, the text is written now."""
    config = entry.config()
    config.output_dir = str(out / "measuring")
    return open_run(config)


def _measure_others(entry: Entry, names: list[str], store: Store, out: Path, asked: bool) -> list[Row]:
    """The rows of the original and of the references. Raises UserError if one that was `asked` for cannot be made."""
    with _opened(entry, out) as opened:
        test = Test(opened)
        rows = [_kept(store, references.ORIGINAL, test) or _put(store, references.original(test), test)]
        for name in names:
            row = _kept(store, name, test)
            if row is None:
                log.info("measuring %s", name)
                try:
                    row = _put(store, references.reference(name, test), test)
                except UserError as error:
                    if asked:
                        raise
                    log.warning("%s is left out: %s", name, error)
                    continue
            rows.append(row)
    return rows


def _kept(store: Store, name: str, test: Test, made_by: str = "") -> Row | None:
    return store.get(name, test.key, made_by)


def _measured(store: Store, entry: Entry, test: Test) -> Row:
    log.info("measuring %s", entry.name)
    return _put(store, trained(entry, test), test, source(entry))


def _put(store: Store, row: Row, test: Test, made_by: str = "") -> Row:
    version = transformers.__version__
    return store.put(replace(row, measured_on=test.key, source=made_by, processor=processor(), version=version))


def _facts(opened: Run, chosen: list[Entry], budget: str | None) -> list[str]:
    """What all rows have in common, in sentences."""
    config, seeds = opened.config, sorted({entry.seed for entry in chosen})
    t = config.training
    length = f"{t.max_steps} step{'s' if t.max_steps > 1 else ''}" if t.max_steps else budget or "the default time"
    text = config.data.path or config.data.source
    return [
        f"Each run had {length}, the text {Path(text).name}, the objective {t.objective} (KL to the original), and the "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
        f"Measured on held-out text in windows of {t.max_seq_length} tokens. The embedding has 8 bits in all but the "
        f"original.",
        f"Processor: {processor()}.",
    ]


def _write(out: Path, title: str, facts: list[str], rows: list[Row]) -> None:
    groups = grouped(rows)
    write_json(out / FIGURES, {"title": title, "facts": facts, "rows": [asdict(row) for row in rows]})
    for name, text in ((TABLE, page.markdown(title, facts, groups)), (PAGE, page.html(title, facts, groups))):
        with file_aside(out / name) as aside:
            aside.write_text(text, encoding="utf-8")
    print_table(*page.short_table(groups))
    print(f"\nwrote {out}/: {PAGE}, {TABLE}, {FIGURES}, runs/, {LOGS}/")
    print(f"next: open {out / PAGE} in a browser")
