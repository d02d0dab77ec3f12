"""`wf selftext`: let a model write the text that `data=self` trains on."""

import logging
import shlex
import shutil
from pathlib import Path

from wrinklefree.config.compose import load_config
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside
from wrinklefree.distributed.world import join_world
from wrinklefree.models.find import model_source
from wrinklefree.models.load import load_pretrained, open_tokenizer
from wrinklefree.runs import self_text

log = logging.getLogger("wrinklefree")

TAKEN = ("data.self_", "output_root=", "model.trust_remote_code=")

UNITS = {"k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def run(
    model: str,
    tokens: str,
    *,
    minutes: float | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    overrides: list[str],
) -> None:
    """Write the text, unless it is kept already, and copy it to `out`. With `dry_run`, only say so.

    Raises UserError for what the user can fix.
    """
    for override in overrides:
        if not override.startswith(TAKEN):
            raise UserError(f"{override}: wf selftext takes {', '.join(key.rstrip('=') for key in TAKEN)}")
    _check_out(out, force)
    chosen = [setting("model", model), "training=full_precision", "data=self", f"data.self_tokens={count(tokens)}"]
    chosen += [] if minutes is None else [f"data.self_minutes={minutes}"]
    config = load_config([*chosen, *overrides])
    if dry_run:
        source = model_source(config.model.pretrained)
        log.info("%s", self_text.describe(config, open_tokenizer(source, config.model.trust_remote_code)))
        log.info("how long that takes is shown with the first tokens; --minutes ends it")
        log.info("dry run: nothing was written%s", "" if out is None else f", neither {out}")
        return
    world = join_world()
    log.info("loading %s", config.model.pretrained)
    original, tokenizer = load_pretrained(config.model)
    self_text.write(config, original.to(world.device), tokenizer, world)
    assert config.data.path is not None
    if out is not None:
        with file_aside(out) as aside:
            shutil.copyfile(config.data.path, aside)
    print(f"wrote {out or config.data.path}")
    print(f"next: {shlex.join(['wf', 'train', *chosen[:1], *chosen[2:], *overrides])}")


def _check_out(out: Path | None, force: bool) -> None:
    """Raises UserError if there is no folder for the copy, if it would replace a file, or if it is not read by name."""
    if out is None:
        return
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: give it the suffix .jsonl, by which data=local knows its rows")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out.exists() and not force:
        raise UserError(f"--out {out}: exists already; choose another, or give --force to replace it")


def count(text: str) -> int:
    """The number that `text` names, such as 50000, 200k or 1.5M. Raises UserError if it names none."""
    factor = UNITS.get(text[-1:], 1)
    number = text[:-1] if factor > 1 else text
    try:
        found = float(number.replace("_", "")) * factor
    except ValueError as error:
        raise UserError(f"--tokens {text}: not a number such as 50000, 200k or 2M") from error
    if not 1 <= found < 2**53:
        raise UserError(f"--tokens {text}: not a number of tokens")
    return int(found)
