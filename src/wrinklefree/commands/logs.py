"""`wf logs`: show what a job has written, on this machine or on a cloud."""

from wrinklefree.cloud import job
from wrinklefree.cloud.start import engine


def run(name: str, follow: bool) -> None:
    """Print the log of the job `name`. With `follow`, go on until it ends. Raises UserError if there is no such job."""
    found = job.find(name)
    engine(found.engine).logs(found, follow)
