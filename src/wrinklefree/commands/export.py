"""`wf export`: write a trained run in another format, read it back with that format's own library, and compare."""

import shlex
from pathlib import Path
from typing import Any

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
from wrinklefree.export.proof.certify import CERTIFY_TOKENS
from wrinklefree.families.architectures import positions
from wrinklefree.models.find import model_folder
from wrinklefree.models.load import load_model
from wrinklefree.runs.setup import resolved_length
from wrinklefree.tracking.terminal import markdown_table, print_table
from wrinklefree.training import checkpoint


def run(
    run: Path, format: str, out: Path | None, force: bool, trust_remote_code: bool = False, **settings: Any
) -> None:
    """Export the trained model of a run or checkpoint folder, and print the comparison.

    Raises UserError if the model cannot be exported, or the exported model differs from the trained one.
    """
    known = formats()
    if format not in known:
        raise UserError(f"--format {format}: unknown{did_you_mean(format, known)}; available: {', '.join(known)}")
    chosen = {name: value for name, value in settings.items() if value is not None}
    refuse_foreign(format, chosen)
    check_package(format)
    folder, target = model_folder(run), out or default_out(run, format)
    config = _config(folder)
    if target.exists() and not force:  # checked first, because loading a large model takes minutes
        raise UserError(f"{target}: exists already; choose another with --out or give --force to replace it")
    model, tokenizer = load_model(folder, trust_remote_code=trust_remote_code)
    length = min(resolved_length(config), positions(model.config) or LARGEST)
    batches = heldout_batches(config.data, tokenizer, batch_size=1, length=length, max_tokens=CERTIFY_TOKENS)
    module = vars(find_module(EXPORT_FORMATS, module_name(known[format])))
    if "from_run" in module:
        chosen = module["from_run"](config, target) | chosen
    with written_aside(target) as aside:
        table = module["write"](model, tokenizer, aside, batches, **chosen)
        readme = aside / "README.md"
        if not readme.exists():
            readme.write_text(f"{card(config)}\n{described(format, table)}", encoding="utf-8")
    print_table(["", str(target)], table)
    hint = constant(known[format], "NEXT", "")
    hint = hint.format(target=target if "'{target}" in hint else shlex.quote(str(target)))  # Python, or a shell's line
    print(f"\nwrote {target}/" + (f"; next: {hint}" if hint else ""))


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
