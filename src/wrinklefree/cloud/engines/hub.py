"""Hugging Face Jobs, through huggingface_hub. The package travels in a private bucket of the user's."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, errors, get_token

from wrinklefree.cloud.job import Job
from wrinklefree.cloud.task import BUCKET, Task, run_script, setup_script
from wrinklefree.core.errors import UserError
from wrinklefree.core.text import first_line

IMAGE = "python:3.12"

AT = "/wrinklefree"  # where the package is mounted

TIMEOUT = "7d"  # a job ends after half an hour otherwise


def check() -> None:
    """Raises UserError if there is no token."""
    if get_token() is None:
        raise UserError("--cloud hf: no token of the hub: log in with `hf auth login`, or set HF_TOKEN")


def flavor(task: Task) -> str:
    """The hub's word for the machine, such as `h200x2`."""
    return task.gpu.lower() + (f"x{task.gpus}" if task.gpus > 1 else "")


def script(task: Task) -> str:
    """What the job runs: the set-up, then the command."""
    return setup_script(task, AT) + run_script(task).removeprefix("set -e\n")


def describe(task: Task) -> str:
    """The job as a person reads it; secrets by their names."""
    head = f"# {task.name}: Hugging Face Jobs\nflavor: {flavor(task)}\nimage: {IMAGE}\ntimeout: {TIMEOUT}\n"
    named = ", ".join(dict.fromkeys(["HF_TOKEN", *task.secrets]))
    lines = "".join(f"  {line}\n" for line in script(task).splitlines())
    return f"{head}secrets: [{named}]\nscript: |\n{lines}"


def launch(job: Job, task: Task, detach: bool) -> str:
    """Start the job and return the hub's id of it. Without `detach`, show its log to the end.

    Raises UserError if the hub refuses.
    """
    check()
    if any("credentials" in there for there in task.files):
        raise UserError(
            "--cloud hf: credentials are no files there: use --bucket hf://buckets/ME/NAME, or keys of s3://"
        )
    secrets = {name: os.environ[name] for name in task.secrets if name != BUCKET}
    secrets |= {"HF_TOKEN": get_token() or "", BUCKET: task.bucket}
    with _refusals_explained():
        hub = HfApi()
        mounted = hub.sync_job_volume(job.folder, AT, remote_name=job.name)
        started = hub.run_job(
            image=IMAGE,
            command=["bash", "-c", script(task)],
            secrets=secrets,
            flavor=flavor(task),
            timeout=TIMEOUT,
            name=job.name,
            volumes=[mounted],
        )
        if not detach:
            _show(lambda: hub.fetch_job_logs(job_id=started.id, follow=True))
    return str(started.id)


def logs(job: Job, follow: bool) -> None:
    """Print what the job has written so far. With `follow`, go on until it ends."""
    with _refusals_explained():
        _show(lambda: HfApi().fetch_job_logs(job_id=job.id, follow=follow))


def cancel(job: Job) -> None:
    """End the job."""
    with _refusals_explained():
        HfApi().cancel_job(job_id=job.id)


def _show(lines: Callable[[], object]) -> None:
    found = lines()
    assert hasattr(found, "__iter__")
    for line in found:
        print(line, flush=True)


@contextmanager
def _refusals_explained() -> Iterator[None]:
    """Turn what the hub answers into a UserError of one line."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        hint = ": log in with `hf auth login`" if error.response.status_code in (401, 403) else ""
        raise UserError(f"{constants.ENDPOINT} answered {error.response.status_code}{hint}") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # that of the client's own HTTP library
        raise UserError(f"{constants.ENDPOINT}: {first_line(error)}; try again") from error
