"""`wf bitdistill`: run the stages of BitDistill in order. Each starts from the model of the stage before.

A stage that is done with the same settings is skipped, and an interrupted stage resumes.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wrinklefree.cloud.start import run_chain
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import report
from wrinklefree.tracking.terminal import print_table

STAGES = {
    "0": "stage0_sft",
    "1": "stage1_subln",
    "1.9": "stage1_9_layerwise",
    "2": "stage2_pretrain",
    "3": "stage3_distill",
}
ON_THE_TASK = ("0", "3")

# Stages that a setting without a stage number does not reach, by the beginning of its key:
# - stage 1 inserts SubLN and trains no steps,
# - stages 0 and 3 take their data from the task,
# - stage 0 trains the teacher, which is not quantized,
# - only stage 3 distils.
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
    budget: str | None = None,
    scale: str | None = None,
    dry_run: bool = False,
    elsewhere: dict[str, Any] | None = None,
) -> None:
    """Run the stages `numbers`, such as `0,1,2,3`. They share the time `budget`, such as `2h`.

    `scale`, `dry_run` and `elsewhere` are as for `wf train`, but a scale leaves the stages' batches as they are.

    Raises UserError if a stage is unknown, or was run with other settings before.
    """
    chosen = numbers.split(",")
    unknown = [number for number in chosen if number not in STAGES]
    if unknown:
        raise UserError(f"--stages {numbers}: no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    before: str | None = None
    chain = []
    for number in chosen:
        chain.append(settings(model, number, task, before, overrides))
        if number != "0":
            before = STAGES[number]
    finished = run_chain(
        chain, elsewhere, dry_run=dry_run, force=force, scale=scale, processes=processes, budget=budget
    )
    if finished:
        summary(finished)


def settings(model: str, number: str, task: str | None, before: str | None, overrides: list[str]) -> list[str]:
    """The overrides of one stage, which starts from the stage `before`.

    `3:KEY=VALUE` applies to stage 3 only. Other settings apply to every stage that uses them (NOT_FOR has the others).
    """
    chosen = [f"model={model}", f"training={STAGES[number]}"]
    if before is not None:
        chosen.append(f"training.start_from=[{before}]")
    if task is not None and number in ON_THE_TASK:
        chosen.append(f"task={task}")
    if task == "cnn_dailymail" and number == "3":
        chosen.append("distillation=summarization")
    return chosen + [o for override in overrides for o in _meant_for(number, override)]


def _meant_for(number: str, override: str) -> Iterator[str]:
    """Yield `override`, without its stage number, if it applies to the stage `number`."""
    start, colon, rest = override.partition(":")
    if colon and start in STAGES:
        if start == number:
            yield rest
        return
    if not any(override.startswith(section) and number in numbers for section, numbers in NOT_FOR.items()):
        yield override


def summary(finished: list[Config]) -> None:
    """Print a table of perplexity and accuracy after each stage."""
    rows = []
    for config in finished:
        figures = report.read_figures(Path(config.output_dir) / report.RESULTS)
        accuracy = figures["accuracy"].get("trained")
        task = "" if accuracy is None else f"{accuracy['value']:.1%} on {config.data.task}"
        rows.append([config.training.stage, f"{figures['trained']['ppl']:.2f}", task])
    print_table(["stage", "held-out perplexity", "accuracy"], rows)
    last = shlex.quote(finished[-1].output_dir)
    print(f"\nnext: wf generate {last} --prompt {report.first_words(finished[-1])}    wf export {last}")
