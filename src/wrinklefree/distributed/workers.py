"""torchrun without its tracebacks. `python -m wrinklefree.distributed.workers` takes torchrun's arguments.

The process that failed has printed its own error already, so torchrun's report would only repeat it.
"""

import logging

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Start the processes and wait for them. Exits with code 1 if one failed or they were told to stop."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except (ChildFailedError, SignalException):
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
