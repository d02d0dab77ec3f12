"""`wf eval`: measure perplexity on held-out text, or lm-eval tasks, for a run, a packed folder or a hub id."""

import json
import math
from pathlib import Path
from typing import Any

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.core.errors import UserError
from wrinklefree.data.open import file_batches, heldout_batches
from wrinklefree.evaluate.perplexity import measure
from wrinklefree.families.architectures import positions
from wrinklefree.generate.open import open_model
from wrinklefree.tracking.terminal import print_table

_DEFAULT_CONTEXT = 512
_BATCH_SIZE = 8


def run(
    path: str,
    *,
    data: Path | None = None,
    context: int | None = None,
    tokens: int = 100_000,
    tasks: str | None = None,
    limit: int | None = None,
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Evaluate the model and print its figures as a table, or as one JSON object.

    Raises UserError for a file or a task that does not exist, and a context that is longer than the model's.
    """
    if data is not None and not data.is_file():
        raise UserError(f"--data {data}: no such file")
    asked = [] if tasks is None else [task.strip() for task in tasks.split(",")]
    if asked:
        from wrinklefree.evaluate.harness import check_tasks

        check_tasks(asked)
    model, tokenizer = open_model(path, trust_remote_code)
    if asked:
        figures = _task_figures(model, tokenizer, asked, limit)
    else:
        figures = perplexity(model, tokenizer, data, _choose_context(model, context), tokens)
    if as_json:
        # JSON has no infinity, and no NaN.
        said = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        print(json.dumps({"path": path, **said}, allow_nan=False))
    else:
        print_table(["", path], [[name.replace("_", " "), _readable(value)] for name, value in figures.items()])


def perplexity(model: Any, tokenizer: Any, data: Path | None, context: int, tokens: int) -> dict[str, Any]:
    """Perplexity, its logarithm (nats per token) and bits per byte, of independent windows of `context` tokens.

    Raises UserError if the tokenizer knows nothing of the text: a model that expects unknown tokens would seem perfect.
    """
    batches = _batches(tokenizer, data, context, tokens)
    source = "held-out standard library text" if data is None else str(data)
    size = _scored_bytes(tokenizer, batches)
    if size == 0:
        raise UserError(f"{source}: this model's tokenizer knows no word of it; give other text with --data")
    quality = measure(model, batches)
    return {
        "data": source,
        "context": context,
        "tokens": quality.tokens,
        "perplexity": quality.ppl,
        "nll": quality.nll,
        "bits_per_byte": quality.nll * quality.tokens / math.log(2) / size,
    }


def _batches(tokenizer: Any, data: Path | None, context: int, tokens: int) -> list[Batch]:
    if data is not None:
        return file_batches(data, tokenizer, batch_size=_BATCH_SIZE, length=context, max_tokens=tokens)
    stdlib = DataConfig(source="stdlib")
    return heldout_batches(stdlib, tokenizer, batch_size=_BATCH_SIZE, length=context, max_tokens=tokens)


def _scored_bytes(tokenizer: Any, batches: list[Batch]) -> int:
    """The number of UTF-8 bytes in the text of all scored tokens."""
    labels = [batch["labels"][:, 1:] for batch in batches]
    texts = [tokenizer.decode(row[row != IGNORE], skip_special_tokens=True) for rows in labels for row in rows]
    return sum(len(text.encode()) for text in texts)


def _choose_context(model: Any, context: int | None) -> int:
    """The window length. Raises UserError if `context` is longer than the model's."""
    most = positions(model.config)
    if context is None:
        return min(_DEFAULT_CONTEXT, most or _DEFAULT_CONTEXT)
    if most is not None and context > most:
        raise UserError(f"--context {context}: the model has {most} positions")
    return context


def _task_figures(model: Any, tokenizer: Any, tasks: list[str], limit: int | None) -> dict[str, Any]:
    """The numeric results of lm-eval, by `TASK METRIC`."""
    from wrinklefree.evaluate.harness import run_tasks

    results = run_tasks(model, tokenizer, tasks, limit)
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }


def _readable(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
