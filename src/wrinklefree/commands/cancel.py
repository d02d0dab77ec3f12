"""`wf cancel`: end a job, on this machine or on a cloud."""

from pathlib import Path

from wrinklefree.cloud import job
from wrinklefree.cloud.job import Job
from wrinklefree.cloud.start import engine
from wrinklefree.runs import folder

# Commands that go on by themselves, and what the stages of LLM-TRM that do so keep in their folders.
GO_ON, KEPT = ("bitdistill", "anemll"), ("thoughts-*.jsonl", ".moments.*")


def run(name: str) -> None:
    """End the job `name`. Raises UserError if there is no such job, or if it has ended."""
    found = job.find(name)
    engine(found.engine).cancel(found)
    print(f"{found.name}: ended; {what_next(found)}")


def what_next(found: Job) -> str:
    """How a job that has ended can be gone on with: that depends on what it has saved."""
    if found.engine != "background":
        return "the same command with training.resume_from=latest goes on from its newest checkpoint in the store"
    folders = [Path(path) for path in found.folders]
    if found.verb in GO_ON or any(kept for path in folders for name in KEPT for kept in path.glob(name)):
        return "the same command goes on"
    if any(folder.can_go_on(path) for path in folders):
        return "the same command with training.resume_from=latest goes on"
    anew = "with --force " if any(folder.outputs(path) for path in folders) else ""
    return f"it had saved nothing yet, so the same command {anew}starts anew"
