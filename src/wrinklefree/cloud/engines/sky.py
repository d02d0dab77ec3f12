"""SkyPilot, as a program of its own: it cannot share an environment with transformers 5, so it is never imported.

Jobs are managed jobs: SkyPilot starts them again elsewhere if their machines are taken away.
"""

import os
import shlex
import shutil
import subprocess

from wrinklefree.cloud.job import Job
from wrinklefree.cloud.task import BUCKET, Task
from wrinklefree.core.errors import UserError

VERSION = "0.14.1"  # task files are checked with this one

PROGRAM = "WF_SKY"  # the variable that says how `sky` is started here


def program() -> list[str]:
    """The words that start `sky`: WF_SKY, the program on the path, or what uvx or pipx fetches.

    Raises UserError if there is none of these.
    """
    if os.environ.get(PROGRAM):
        return shlex.split(os.environ[PROGRAM])
    if shutil.which("sky"):
        return ["sky"]
    package = f"skypilot[all]=={VERSION}"
    if shutil.which("uvx"):
        return ["uvx", "--from", package, "sky"]
    if shutil.which("pipx"):
        return ["pipx", "run", "--spec", package, "sky"]
    raise UserError(
        f"SkyPilot is not here: install it in an environment of its own (pipx install 'skypilot[nebius]=={VERSION}', "
        f"with your cloud in the brackets), or say where its program is with {PROGRAM}=/path/to/sky"
    )


def check() -> None:
    """Raises UserError if jobs cannot be launched from here."""
    program()


def launch(job: Job, task: Task, detach: bool) -> str:
    """Hand the task file to SkyPilot. With `detach`, return once it is accepted; else show its log to the end.

    Returns its id, which is its name. Raises UserError if SkyPilot refuses; it has said why.
    """
    named = [word for name in task.secrets for word in ("--secret", name)]  # sky reads the values itself
    options = ["--yes", *(["--detach-run"] if detach else []), *named]
    _sky(["jobs", "launch", *options, str(job.folder / "task.yaml")], {BUCKET: task.bucket})
    return job.name


def logs(job: Job, follow: bool) -> None:
    """Print what the job has written so far. With `follow`, go on until it ends."""
    _sky(["jobs", "logs", "--name", job.id, "--follow" if follow else "--no-follow"])


def cancel(job: Job) -> None:
    """End the job and give its machines back."""
    _sky(["jobs", "cancel", "--yes", "--name", job.id])


def _sky(words: list[str], more: dict[str, str] | None = None) -> None:
    """Run `sky WORDS` in this terminal. Raises UserError if it fails."""
    done = subprocess.run([*program(), *words], env=os.environ | (more or {}), check=False)
    if done.returncode:
        raise UserError(f"sky {words[0]} {words[1]} failed (code {done.returncode}); its message is above")
