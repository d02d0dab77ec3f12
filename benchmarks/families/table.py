"""The page docs/models.md: what the census found, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from wrinklefree.tracking.terminal import markdown_table

PAGE = """\
# Models

Every family of causal language models in transformers {transformers}, made small (two layers, random weights), with the
whole product run on it: prepared, trained for four steps, packed, read back with this package and without it, generated
from, alone and in a batch padded on the left, resumed from a checkpoint, exported. This page is written by
`python -m benchmarks.families --docs`, and never by hand.

| {families} families | |
|---|---|
| whole: all of that, with at least 90 % of the blocks' weights quantized | {whole} |
| partial: all of that with `method.allow_partial=true`, with less of them quantized | {partial} |
| refused in one line, before the training | {refused} |
| a traceback | {tracebacks} |
| something wrong that nothing says | {silent} |
| not made small yet, so not tried | {unmade} |
| folders that could not be read back | {unreadable_checkpoints} |

The share is that of the blocks' weights, which are all parameters of two or more dimensions but embeddings and the
output head. Low-rank parts, routers and convolutions weigh more in models as small as these.

{table}
"""


def page(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    cells = [[f"`{row['family']}`", row["verdict"], share(row), remark(row)] for row in rows]
    return PAGE.format(**counts, table=markdown_table(["family", "ends as", "share", "remark"], cells))


def share(row: Mapping[str, Any]) -> str:
    """The share of quantized weights; nothing for a family that did not come so far."""
    return f"{row['share']:.0%}" if row["share"] else ""


def remark(row: Mapping[str, Any]) -> str:
    """Why a family is not whole, in one line of a table."""
    parts = [*row["silent"], *([row["reason"]] if row["reason"] else [])]
    return "; ".join(parts).replace("|", "\\|").strip("/ ")
