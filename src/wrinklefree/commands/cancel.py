"""`wf cancel`: end a job, on this machine or on a cloud."""

from wrinklefree.cloud import job
from wrinklefree.cloud.start import engine


def run(name: str) -> None:
    """End the job `name`. Raises UserError if there is no such job, or if it has ended."""
    found = job.find(name)
    engine(found.engine).cancel(found)
    print(f"{found.name}: ended; the same command with training.resume_from=latest goes on")
