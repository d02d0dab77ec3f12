"""How many processes a scale starts on this machine."""

import torch

from wrinklefree.cloud.places import scales
from wrinklefree.core.errors import UserError


def for_scale(scale: str | None, asked: int | None) -> int | None:
    """The processes to train in: `asked`, or those of `scale`. None leaves it to the settings.

    Raises UserError if this machine has fewer GPUs than the scale wants. `dev` runs without one.
    """
    if scale is None or asked is not None:
        return asked
    wanted, gpus = scales()[scale].gpus, torch.cuda.device_count()
    if scale != "dev" and gpus < wanted:
        raise UserError(
            f"--scale {scale} needs {wanted} GPU(s), this machine has {gpus}: use --scale dev, leave it out, or rent "
            f"them with --cloud"
        )
    return wanted
