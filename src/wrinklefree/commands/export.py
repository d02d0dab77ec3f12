"""`wf export`: write a trained run in another format, read it back with that format's own library, and compare."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.base import LARGEST
from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import written_aside
from wrinklefree.core.find import EXPORT_FORMATS, constant, find_module
from wrinklefree.core.text import did_you_mean
from wrinklefree.data.open import heldout_batches
from wrinklefree.export.card import card
from wrinklefree.export.flags import check_package, formats, module_name, options
from wrinklefree.export.proof.certify import CERTIFY_TOKENS, CertificateError
from wrinklefree.families.architectures import positions
from wrinklefree.models.find import model_folder
from wrinklefree.models.load import load_model
from wrinklefree.runs.setup import resolved_length
from wrinklefree.tracking.terminal import markdown_table, print_table
from wrinklefree.training import checkpoint

ALL = "all"  # the word for every format
SAME = 1e-6  # nats of KL that sums in another order may cause


def run(
    run: str | Path, format: str, out: Path | None, force: bool, trust_remote_code: bool = False, **settings: Any
) -> None:
    """Export the trained model of a run or checkpoint folder, and print the comparison.

    With `all` it is exported in every format, each into `out/FORMAT`, and one table tells what became of it.
    Raises UserError if the model cannot be exported, or the exported model differs from the trained one.
    """
    run, known = Path(run), formats()
    if format != ALL and format not in known:
        raise UserError(f"--format {format}: unknown{did_you_mean(format, known)}; available: {', '.join(known)}, all")
    chosen = {name: value for name, value in settings.items() if value is not None}
    if format == ALL:
        write_all(run, out, force, trust_remote_code, chosen)
        return
    refuse_foreign(format, chosen)
    check_package(format)
    target = out or default_out(run, format)
    refuse_existing(target, force)
    table = write(opened(run, trust_remote_code), format, target, chosen)
    print_table(["", str(target)], table)
    hint = next_step(format, target)
    print(f"\nwrote {target}/" + (f"; next: {hint}" if hint else ""))


@dataclass(frozen=True)
class Opened:
    """A trained model, and the held-out text on which exports of it are compared."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: Config
    batches: list[Any]


def opened(run: Path, trust_remote_code: bool) -> Opened:
    """Load the model of a run. Raises UserError if it has none that was quantized."""
    folder = model_folder(run)
    config = _config(folder)
    model, tokenizer = load_model(folder, trust_remote_code=trust_remote_code)
    length = min(resolved_length(config), positions(model.config) or LARGEST)
    batches = heldout_batches(config.data, tokenizer, batch_size=1, length=length, max_tokens=CERTIFY_TOKENS)
    return Opened(model, tokenizer, config, list(batches))


def write(source: Opened, format: str, target: Path, chosen: dict[str, Any]) -> list[list[str]]:
    """Write one format into `target` with its card, and return rows of what was read back and compared.

    Raises UserError if the format cannot hold the model, CertificateError if it is another one than was trained.
    """
    module = vars(find_module(EXPORT_FORMATS, module_name(formats()[format])))
    if "from_run" in module:
        chosen = module["from_run"](source.config, target) | chosen
    with written_aside(target) as aside:
        table: list[list[str]] = module["write"](source.model, source.tokenizer, aside, source.batches, **chosen)
        readme = aside / "README.md"
        if not readme.exists():
            readme.write_text(f"{card(source.config)}\n{described(format, table)}", encoding="utf-8")
    return table


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
        own = {name: value for name, value in chosen.items() if options()[name][0] == format}
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
            rows.append([format, f"{size:,}", lossless(table), top1, next_step(format, target)])
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


def refuse_existing(target: Path, force: bool) -> None:
    """Raise UserError if there is something at `target` that may not be replaced."""
    if target.exists() and not force:  # checked first, because loading a large model takes minutes
        raise UserError(f"{target}: exists already; choose another with --out or give --force to replace it")


def next_step(format: str, target: Path) -> str:
    """What to do with the written folder, as a line for a shell or for Python."""
    hint = constant(formats()[format], "NEXT", "")
    return str(hint.format(target=target if "'{target}" in hint else shlex.quote(str(target))))


def refuse_foreign(format: str, chosen: dict[str, Any]) -> None:
    """Raise UserError for an option that belongs to another format."""
    for name in chosen:
        owner = options()[name][0]
        if owner != format:
            flag = f"--{name}".replace("_", "-")
            raise UserError(f"{flag}: has no effect with --format {format}, it is for --format {owner}")


def described(format: str, table: list[list[str]]) -> str:
    """The comparison `table` as a section of the model card."""
    return f"## Exported as {format}\n\n{markdown_table(['read back and compared', 'value'], table)}\n"


def default_out(run: Path, format: str) -> Path:
    """The default folder of an export: `RUN/packed`, `RUN/gguf` and so on.

    For a checkpoint folder it is a sibling, such as `step_100-gguf`.
    """
    name = module_name(formats()[format]).replace("_", "-")
    return run / name if model_folder(run) != run else run.with_name(f"{run.name}-{name}")


def _config(folder: Path) -> Config:
    """The config that trained this checkpoint. Raises UserError if there is none, or it has no quantization method."""
    file = folder / checkpoint.CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: no {checkpoint.CONFIG}, so not a checkpoint that `wf train` wrote")
    config = read_config(file)
    if config.method is None:
        raise UserError(
            f"{folder}: trained without quantization, so there is nothing to pack: {folder} is a plain model already"
        )
    return config
