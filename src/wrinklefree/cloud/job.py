"""A training somewhere else: what was asked for, its name, and the record of it on this machine.

    CACHE/jobs/NAME/    job.json      what `wf logs` and `wf cancel` need to find it
                        task.yaml     what was handed to the cloud
                        *.whl         this package, as it was when the job was launched
                        log.txt       of a job in the background of this machine

Neither keys nor the bucket are in these files.
"""

import dataclasses
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, write_json
from wrinklefree.core.text import did_you_mean
from wrinklefree.training import storage

RECORD, LOG, TASK = "job.json", "log.txt", "task.yaml"

LONGEST_NAME = 60  # characters; SkyPilot makes the name of a cluster of it


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line: `wf WORDS`, run somewhere else."""

    words: list[str]
    cloud: str | None = None  # None is this machine, in the background
    scale: str | None = None
    nodes: int = 1
    spot: bool = False
    bucket: str | None = None
    detach: bool = True

    @property
    def verb(self) -> str:
        """`fairy2`, or `trm` of `trm grpo`."""
        return self.words[0]


@dataclass(frozen=True)
class Job:
    """A job that was launched, as its record tells of it."""

    name: str
    verb: str
    engine: str  # a module of cloud/engines
    cloud: str
    launched: float  # seconds since 1970
    id: str = ""  # what the engine calls it, if that is not its name
    folders: list[str] = field(default_factory=list)  # where a job of this machine writes

    @property
    def folder(self) -> Path:
        """Where the record is."""
        return jobs_folder() / self.name


def jobs_folder() -> Path:
    """The folder of all records."""
    return storage.cache_folder() / "jobs"


def new_name(verb: str, config: Config) -> str:
    """A name that no other job has, such as `wf-fairy2-smollm2-135m-w2-3f2a`."""
    words = re.sub(r"[^a-z0-9]+", "-", f"wf-{verb}-{config.model.name}-{config.training.stage}".lower())
    return f"{words[: LONGEST_NAME - 5].strip('-')}-{secrets.token_hex(2)}"


def save(job: Job) -> None:
    """Write the record of a job."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / RECORD, dataclasses.asdict(job))


def jobs() -> list[Job]:
    """All jobs that this machine launched, newest first. Broken records are left out."""
    found = [job for file in jobs_folder().glob(f"*/{RECORD}") if (job := _read(file)) is not None]
    return sorted(found, key=lambda job: job.launched, reverse=True)


def _read(file: Path) -> Job | None:
    try:
        return Job(**read_json(file))
    except (UserError, TypeError):
        return None


def find(name: str) -> Job:
    """Return the job called `name`. Raises UserError if there is none.

    `wf-fairy2-train` is the newest of `wf fairy2`, and the beginning of a name is the newest that begins so.
    """
    known = jobs()
    verb = re.fullmatch(r"wf-(.+)-train", name)
    for job in known:
        if job.name == name:
            return job
    for job in known:
        if (verb and job.verb == verb[1]) or job.name.startswith(name):
            return job
    names = [job.name for job in known]
    there = f"; newest first: {', '.join(names[:5])}" if names else "; this machine has launched none"
    raise UserError(f"{name}: no such job{did_you_mean(name, names)}{there}")


def age(job: Job) -> str:
    """When the job was launched, as a date and time."""
    return time.strftime("%m-%d %H:%M", time.localtime(job.launched))
