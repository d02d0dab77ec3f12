"""The picture of the README: bytes of a whole file against its perplexity, ours and what one would pick instead."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.real.rows import Row
from wrinklefree.compare.charts import HEIGHT, WIDTH, Point, scatter

NAMES = {
    "w2": "Fairy2i W2",
    "w1": "Fairy2i W1",
    "ternary": "ternary",
    "q2a4": "ANEMLL q2a4",
    "llama_iq2_xs": "IQ2_XS",
    "llama_q2_k": "Q2_K",
    "llama_q4_0": "Q4_0",
    "auto_round_asym": "AutoRound, groups of 64",
    "auto_round_sym_rows": "AutoRound, a scale a row",
}
OURS = ("w2", "w1", "ternary", "q2a4")
STYLE = "font-family:system-ui,sans-serif;font-size:13px;color:#24292f;background:#fff"


def write(rows: Mapping[str, Row], file: Path) -> None:
    """Draw the rows that have a name above, an SVG. Ours are blue, others grey."""
    points = [
        Point(label, rows[name].bytes / 1e6, rows[name].ppl, grey=name not in OURS)
        for name, label in NAMES.items()
        if name in rows
    ]
    title = "SmolLM2-135M: whole file against perplexity on WikiText-2"
    across = "whole file, MB (embedding at 8 bits; the original has 269)"
    up = f"perplexity (original {rows['original'].ppl:.1f})"
    chart = scatter(points, across, up, title)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" style="{STYLE}"'
    file.write_text(chart.replace("<svg", head, 1) + "\n", encoding="utf-8")
