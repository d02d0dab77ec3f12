"""`wf bitdistill`: BitDistill's stages, one after the other, each taking up where the one before ended.

What is done already, with the same settings, is skipped; what was interrupted goes on.
"""

from collections.abc import Iterator
from pathlib import Path

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import launch, report
from wrinklefree.tracking.terminal import print_table

STAGES = {
    "0": "stage0_sft",
    "1": "stage1_subln",
    "1.9": "stage1_9_layerwise",
    "2": "stage2_pretrain",
    "3": "stage3_distill",
}
ON_THE_TASK = ("0", "3")

# Where a setting without a stage's number means nothing: the task has its own data, the teacher no quantizer, and
# insertion no steps.
NOT_FOR = {
    "training.max_steps": ("1",),
    "data": ON_THE_TASK,
    "method": ("0",),
    "model.quantization": ("0",),
    "distillation": ("0", "1", "1.9", "2"),
}


def run(
    model: str,
    *,
    task: str | None,
    numbers: str,
    overrides: list[str],
    force: bool,
    processes: int | None,
) -> None:
    """Run the stages `numbers`, such as `0,1,2,3`. Raises UserError where one is unknown, or was run otherwise."""
    chosen = numbers.split(",")
    unknown = [number for number in chosen if number not in STAGES]
    if unknown:
        raise UserError(f"--stages {numbers}: no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    before: str | None = None
    finished = []
    for number in chosen:
        config = launch.run_once(settings(model, number, task, before, overrides), force, processes)
        finished.append(config)
        if number != "0":
            before = STAGES[number]
    summary(finished)


def settings(model: str, number: str, task: str | None, before: str | None, overrides: list[str]) -> list[str]:
    """The overrides of one stage. `3:KEY=VALUE` is for stage 3 alone; the rest goes where it has a meaning."""
    chosen = [f"model={model}", f"training={STAGES[number]}"]
    if before is not None:
        chosen.append(f"training.start_from=[{before}]")
    if task is not None and number in ON_THE_TASK:
        chosen.append(f"task={task}")
    if task == "cnn_dailymail" and number == "3":
        chosen.append("distillation=summarization")
    return chosen + [o for override in overrides for o in _meant_for(number, override)]


def _meant_for(number: str, override: str) -> Iterator[str]:
    start, colon, rest = override.partition(":")
    if colon and start in STAGES:
        if start == number:
            yield rest
        return
    if not any(override.startswith(section) and number in numbers for section, numbers in NOT_FOR.items()):
        yield override


def summary(finished: list[Config]) -> None:
    """What each stage came to."""
    rows = []
    for config in finished:
        figures = report.read_figures(Path(config.output_dir) / "results.json")
        accuracy = figures["accuracy"].get("trained")
        task = "" if accuracy is None else f"{accuracy['value']:.1%} on {config.data.task}"
        rows.append([config.training.stage, f"{figures['trained']['ppl']:.2f}", task])
    print_table(["stage", "held-out perplexity", "accuracy"], rows)
    print(f"\nnext: wf generate {finished[-1].output_dir} --prompt 'def '    wf export {finished[-1].output_dir}")
