"""`wf wandb-status`: the newest runs of a Weights & Biases project."""

import os
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import first_line
from wrinklefree.tracking.services import check_service
from wrinklefree.tracking.terminal import print_table

TIMEOUT = 30  # seconds that W&B has for an answer


def run(project: str, entity: str | None, number: int) -> None:
    """Print a table of the newest runs. Raises UserError without the package or a key, or if W&B does not answer."""
    check_service("wandb", "wf wandb-status")
    import wandb

    if not os.environ.get("WANDB_API_KEY"):
        raise UserError("WANDB_API_KEY is not set: get a key from your W&B settings; runs on this machine: wf runs")
    name = project if entity is None else f"{entity}/{project}"
    try:
        found = wandb.Api(timeout=TIMEOUT).runs(name, order="-created_at", per_page=number)
        newest = [found[place] for place in range(min(number, len(found)))]
        rows = [_row(run) for run in newest]
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    if not rows:
        raise UserError(f"{name}: no runs there")
    print_table(["run", "state", "step", "loss", "lr", "last seen"], rows)
    print("\n" + "\n".join(run.url for run in newest))  # below, because a table would fold them


def _row(run: Any) -> list[str]:
    figures = run.summary
    return [
        run.name,
        run.state,
        str(figures.get("_step", "")),
        _short(figures.get("train_loss")),
        _short(figures.get("lr")),
        str(run.heartbeatAt or "")[:16].replace("T", " "),
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
