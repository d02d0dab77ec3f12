"""Copies checkpoints to an object store beside the training. An upload that fails neither ends nor delays a run.

One thread uploads in order. It tries a checkpoint again, after longer and longer waits, until the run ends. What is
there is written down in `uploads.json` in the run folder, so that a later run in it uploads what is missing. Once there
are more than `training.save_total_limit` checkpoints in the store, the oldest are removed there too.
"""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, write_json
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.core.text import without_bucket
from wrinklefree.tracking.run_log import CSV_NAME
from wrinklefree.tracking.services import WANDB_ID
from wrinklefree.training import checkpoint, storage

log = logging.getLogger("wrinklefree")

RECORD = "uploads.json"

FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds before an upload is tried again; the wait doubles each time

REMOVED = "%s: removed before it could be uploaded"

AFTERWARDS = "for some minutes (Ctrl-C ends that, and the same command uploads what is missing)"

LAST_TRY = 60.0  # seconds that the end of a run waits for what is still missing


# Files of the run folder that a run goes on with elsewhere. They are uploaded before each checkpoint: a resume leaves
# out rows of the log that are past its checkpoint, but could not make up for rows that are missing.
ALONGSIDE = (CSV_NAME, WANDB_ID)


class Uploads:
    """Uploads what is in `folder` to `url`: checkpoints, or given names. `close` has to be called at the end."""

    def __init__(self, folder: Path, url: str, names: Sequence[str] | None = None, keep: int | None = None) -> None:
        """Begin with the checkpoints that an earlier run could not upload, or with the files and folders `names`.

        `keep` is how many checkpoints stay in the store; None keeps all.
        """
        self.folder, self.url, self.keep = folder, url.rstrip("/"), keep
        self._record = folder.parent / RECORD if names is None else None
        self._done = set[str]() if self._record is None else _read(self._record, self.url)
        newest = checkpoint.step_folders(folder)[-(keep or 0) :]  # others would be removed there at once
        steps = [path.name for path in newest if path.name not in self._done]
        self._waiting = steps if names is None else list(names)
        self._changed, self._ending, self._failed, self._until = threading.Condition(), False, False, 0.0
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def add(self, name: str) -> None:
        """Upload the checkpoint `name` after those that wait already."""
        with self._changed:
            self._waiting.append(name)
            self._changed.notify()

    def waiting(self) -> list[str]:
        """The names of the checkpoints that are still to be uploaded, oldest first."""
        with self._changed:
            return list(self._waiting)

    def close(self, seconds: float | None = None) -> list[str]:
        """Try to upload what is missing for at most `seconds`; None is LAST_TRY.

        Logs what is still missing then, and returns its names.
        """
        seconds = LAST_TRY if seconds is None else seconds
        with self._changed:
            self._ending, self._until = True, time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds)
        waiting = self.waiting()
        missing = [name for name in waiting if (self.folder / name).exists()]
        for name in waiting:
            if name not in missing:
                log.warning(REMOVED, name)
        if missing:
            log.warning(
                "not uploaded to %s: %s; they are in %s, and the next run in this folder uploads them",
                *(without_bucket(self.url), ", ".join(missing), self.folder),
            )
        return missing

    def _work(self) -> None:
        wait = FIRST_WAIT
        while (name := self._next()) is not None:
            if self._upload(name):
                wait = FIRST_WAIT
                continue
            with self._changed:
                if self._ending and time.monotonic() + wait > self._until:  # the last try has failed
                    return
                if self._ending:
                    self._changed.wait(wait)
                elif self._changed.wait_for(lambda: self._ending, wait):
                    wait = FIRST_WAIT  # the run ends: try again at once
                    continue
            wait = min(2 * wait, LONGEST_WAIT)

    def _next(self) -> str | None:
        """Wait for the oldest checkpoint that is missing. None if there is none and the run ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            return self._waiting[0] if self._waiting else None

    def _upload(self, name: str) -> bool:
        """Whether the checkpoint is done with: it is in the store now, or gone from the disk."""
        if not (self.folder / name).exists():
            log.warning(REMOVED, name)
            with self._changed:
                self._waiting.remove(name)
            return True
        try:
            self._send_log()
            storage.push(self.folder / name, f"{self.url}/{name}")
            self._after_checkpoint(name)
        except UserError as error:
            if not self._failed:
                how_long = "while the training goes on" if self._record is not None else AFTERWARDS
                log.warning("upload failed, and is tried again %s: %s", how_long, error)
            self._failed = True
            return False
        if self._failed:
            log.info("uploads work again: %s is at %s", name, without_bucket(self.url))
        self._failed = False
        with self._changed:
            self._waiting.remove(name)
            self._done.add(name)
        return True

    def _send_log(self) -> None:
        """Upload a copy of the log, because the training writes on. Raises UserError if the store refuses."""
        if self._record is None:
            return
        with tempfile.TemporaryDirectory() as aside:
            for file in ALONGSIDE:
                if (self._record.parent / file).is_file():
                    copy = Path(shutil.copy2(self._record.parent / file, aside))
                    storage.push(copy, f"{self.url}/{file}")

    def _after_checkpoint(self, name: str) -> None:
        """Write down that a checkpoint is there, and remove checkpoints that are too many.

        Raises UserError if the store refuses.
        """
        if self._record is None:
            return
        write_json(self._record, {"store": fingerprint(self.url), "done": sorted({*self._done, name})})
        if self.keep is not None:
            there = sorted((n for n in storage.names(self.url) if checkpoint.is_step(n)), key=checkpoint.number_of)
            for old in there[: -self.keep]:
                storage.remove(f"{self.url}/{old}")


def _read(record: Path, url: str) -> set[str]:
    """The names of the checkpoints that an earlier run uploaded to `url`."""
    if not record.is_file():
        return set()
    try:
        values = read_json(record)
        return set(values["done"]) if values["store"] == fingerprint(url) else set()
    except (UserError, LookupError, TypeError):  # not written by this file: then upload everything again
        return set()
