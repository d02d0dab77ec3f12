"""torchrun, without its tracebacks: `python -m wrinklefree.distributed.workers` takes the same arguments.

What went wrong is on the terminal already, in the words of the process that it went wrong in.
"""

import logging

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Start the processes and wait for them; exit code 1 where one failed, or where they were told to stop."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except (ChildFailedError, SignalException):
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
