"""The signals that ask a run to save and end: Ctrl-C, SIGTERM (Slurm, Kubernetes, spot machines) and SIGHUP."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handling(handle: Callable[[int], None], *, once: bool = False) -> Iterator[None]:
    """Call `handle` with the number of each stopping signal that comes while the block runs.

    With `once`, a signal that comes again does what it did before the block. A signal that was ignored before stays
    ignored, as SIGHUP is under nohup.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}

    def handler(number: int, frame: object) -> None:
        if once:
            signal.signal(number, before[signal.Signals(number)])
        handle(number)

    try:
        for number in STOPPING:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
