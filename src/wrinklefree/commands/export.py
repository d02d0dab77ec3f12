"""`wf export`: write a trained run in another format, read it back with that format's own library, and compare."""

from pathlib import Path
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.core.find import summary
from wrinklefree.core.text import did_you_mean
from wrinklefree.export.flags import check_package, formats, options
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.runs.exporting import default_out, next_step, opened, refuse_existing, trained_by, write
from wrinklefree.tracking.terminal import print_table

ALL = "all"  # the word for every format
SAME = 1e-6  # nats of KL that sums in another order may cause


def run(
    run: str | Path,
    format: str,
    out: Path | None,
    force: bool,
    trust_remote_code: bool = False,
    *,
    dry_run: bool = False,
    **settings: Any,
) -> None:
    """Export the trained model of a run or checkpoint folder, and print the comparison.

    With `all` it is exported in every format, each into `out/FORMAT`, and one table tells what became of it.
    With `dry_run`, nothing is loaded or written.
    Raises UserError if the model cannot be exported, or the exported model differs from the trained one.
    """
    run, known = Path(run), formats()
    if format != ALL and format not in known:
        raise UserError(f"--format {format}: unknown{did_you_mean(format, known)}; available: {', '.join(known)}, all")
    chosen = {name: value for name, value in settings.items() if value is not None}
    if dry_run:
        show(run, format, out, force, chosen)
        return
    if format == ALL:
        write_all(run, out, force, trust_remote_code, chosen)
        return
    refuse_foreign(format, chosen)
    check_package(format)
    target = out or default_out(run, format)
    refuse_existing(target, force)
    source = opened(run, trust_remote_code)
    table = write(source, format, target, chosen)
    print_table(["", str(target)], table)
    hint = next_step(format, target, source.config)
    print(f"\nwrote {target}/" + (f"; next: {hint}" if hint else ""))


def show(run: Path, format: str, out: Path | None, force: bool, chosen: dict[str, Any]) -> None:
    """Print what an export would write, and where. Raises UserError for what it would refuse before it loads the model.

    Whether a format can hold the model is seen only when it is written.
    """
    folder, config = trained_by(run)
    if format != ALL:
        refuse_foreign(format, chosen)
        check_package(format)
    named = formats() if format == ALL else {format: formats()[format]}
    targets = {name: (out / name if out and format == ALL else out) or default_out(run, name) for name in named}
    for target in targets.values():
        refuse_existing(target, force)
    print(f"would export {folder}, quantized with {config.method.name}")
    rows = [
        [name, f"{target}/", summary(named[name]).removeprefix(f"`--format {name}`: ")]
        for name, target in targets.items()
    ]
    print_table(["format", "into", "what it is"], rows)


def write_all(run: Path, out: Path | None, force: bool, trust_remote_code: bool, chosen: dict[str, Any]) -> None:
    """Write every format that can hold the model, and print one table.

    Raises CertificateError if one of them is not the trained model, UserError if no format can hold it.
    """
    targets = {format: out / format if out else default_out(run, format) for format in formats()}
    for target in targets.values():
        refuse_existing(target, force)
    source = opened(run, trust_remote_code)
    rows, refusals, failed = [], [], None
    for format, target in targets.items():
        own = {name: value for name, value in chosen.items() if format in options()[name][0]}
        print(f"{format} ...", flush=True)
        try:
            check_package(format)
            table = dict(write(source, format, target, own))
        except CertificateError as error:
            failed = failed or error
            refusals.append([format, f"failed: {error}"])
        except UserError as error:
            refusals.append(
                [format, str(error).removeprefix(f"--format {format}: ").removeprefix(f"--format {format} ")]
            )
        else:
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            top1 = table.get("same most likely token", "not run")
            rows.append([format, f"{size:,}", lossless(table), top1, next_step(format, target, source.config)])
    if rows:
        print_table(["target", "bytes", "lossless", "top-1", "how to run it"], rows)
    if refusals:
        print()
        print_table(["not written", "why"], refusals)
    if failed is not None:
        raise failed
    if not rows:
        raise UserError(f"{run}: no format can hold this model")
    print(f"\nwrote {len(rows)} of {len(targets)} formats; next: one of the commands in the table")


def lossless(table: dict[str, str]) -> str:
    """Say whether the exported model computes what was trained: `yes`, or its KL.

    `weights` means that only the weights were compared, because nothing here runs the format.
    """
    found = next((value for name, value in table.items() if name.startswith("KL(")), None)
    if found is None:
        return "weights"
    return "yes" if float(found) <= SAME else f"KL {found}"


def refuse_foreign(format: str, chosen: dict[str, Any]) -> None:
    """Raise UserError for an option that belongs to another format."""
    for name in chosen:
        owners = options()[name][0]
        if format not in owners:
            flag = f"--{name}".replace("_", "-")
            raise UserError(f"{flag}: has no effect with --format {format}, it is for --format {' and '.join(owners)}")
