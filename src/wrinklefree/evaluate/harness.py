"""Runs tasks of lm-evaluation-harness on a model in memory."""

import logging
from typing import Any

from wrinklefree.core.errors import UserError


def check_tasks(tasks: list[str]) -> None:
    """Raises UserError if the harness is not installed, or does not know a task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'wrinklefree[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about files of its own tasks
    manager = TaskManager()
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"no such lm-eval task: {', '.join(unknown)}; `lm_eval ls tasks` lists them")


def run_tasks(model: Any, tokenizer: Any, tasks: list[str], limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Return {task: {metric: value}} on at most `limit` examples per task. Metrics have names such as `acc,none`.

    Raises UserError if the harness cannot fetch their data. Call `check_tasks` first.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")
    try:
        results: dict[str, Any] = simple_evaluate(harness, tasks=tasks, limit=limit)
    except ConnectionError as error:
        raise UserError(
            f"--tasks {','.join(tasks)}: their data is on the hub, which does not answer ({error})"
        ) from error
    return {str(task): dict(metrics) for task, metrics in results["results"].items()}
