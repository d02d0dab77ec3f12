"""This machine, behind the terminal: a process in a session of its own, whose output goes to a file.

A job lives as long as it holds the lock of its record's folder, which ends with the process. So a process id that the
system has given to another program is never signalled.
"""

import os
import signal
import subprocess
import sys
import time

from wrinklefree.cloud.job import LOG, Job
from wrinklefree.core.errors import UserError
from wrinklefree.core.lock import is_locked, lock_to_hand_on

PAUSE = 0.3  # seconds between two looks at a log

LONGEST_END = 900  # seconds that a job may take to save and end


def launch(job: Job, words: list[str]) -> str:
    """Start `wf WORDS` and return its process id. It survives a closed terminal."""
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "wrinklefree.cli", *words]
    with lock_to_hand_on(job.folder) as lock, (job.folder / LOG).open("wb") as log:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the terminal's end is not this process's
            pass_fds=[lock],
        )
    return str(started.pid)


def logs(job: Job, follow: bool) -> None:
    """Print what the job has written so far. With `follow`, go on until it ends."""
    path = job.folder / LOG
    if not path.is_file():
        raise UserError(f"{path}: missing")
    with path.open(encoding="utf-8", errors="replace", newline="") as log:
        while True:
            ended = not is_locked(job.folder)  # asked before the last read, so that nothing is left out
            while text := log.read(1 << 16):
                sys.stdout.write(text)
            sys.stdout.flush()
            if ended or not follow:
                return
            time.sleep(PAUSE)


def cancel(job: Job) -> None:
    """Let the job finish its step, save a checkpoint and end. Raises UserError if it runs no more, or does not end."""
    if not is_locked(job.folder):
        raise UserError(f"{job.name}: has ended already; its log: wf logs {job.name}")
    os.kill(int(job.id), signal.SIGTERM)
    until = time.monotonic() + LONGEST_END
    while is_locked(job.folder):
        if time.monotonic() > until:
            raise UserError(f"{job.name}: still saving; look again with `wf logs {job.name}`")
        time.sleep(PAUSE)
