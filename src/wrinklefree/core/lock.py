"""One writer for a folder: a lock that ends with the process that holds it."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wrinklefree.core.errors import UserError

log = logging.getLogger("wrinklefree")

MOMENT = 0.05  # seconds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create `folder`, and keep other processes from writing there while the block runs.

    Raises UserError if another process holds the lock, or if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: choose another folder") from error
    try:
        _lock(folder, handle)
        yield
    finally:
        os.close(handle)  # this unlocks it, and so does the end of the process


@contextmanager
def lock_to_hand_on(folder: Path) -> Iterator[int]:
    """Lock `folder` and yield the lock's file descriptor, for a process that is started in the block and inherits it.

    The lock then ends with that process, and with the block if there was none.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    finally:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`."""
    if not folder.is_dir():
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def _lock(folder: Path, handle: int) -> None:
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # perhaps `is_locked`, which holds it for a moment
            time.sleep(MOMENT)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{folder}: another process is writing it: wait for that one, or choose another folder"
        ) from error
    except OSError:
        log.info("%s: cannot be locked on this file system: let no other process write there", folder)
