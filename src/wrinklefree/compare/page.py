"""What a comparison leaves to read: one HTML page that needs nothing else, and the same table as Markdown."""

from collections.abc import Sequence
from html import escape

from wrinklefree.compare.charts import Point, curves, scatter
from wrinklefree.compare.references import ORIGINAL
from wrinklefree.compare.rows import Group, dominated
from wrinklefree.tracking.terminal import markdown_table, short_number, short_size

HEAD = (
    ("", "the method, or what one could have without training"),
    ("bits", "per quantized weight, scales included"),
    ("bits/param", "per parameter of the whole file"),
    ("covered", "share of the decoder layers' matrices that is quantized"),
    ("file", "bytes of the whole file, embedding at 8 bits"),
    ("perplexity", "on held-out text"),
    ("KL", "to the original, nats per token, on the same text"),
    ("top-1", "share of tokens with the same likeliest word as the original"),
    ("agrees", "share of greedy text before the first token that the original would not write"),
    ("distinct", "share of the words in greedy text that differ; text that goes in circles has few"),
    ("tok/s", "greedy decoding, one text"),
    ("memory", "weights while decoding"),
    ("minutes", "to make it"),
    ("tokens", "that it was trained on"),
)
SHORT = (0, 1, 4, 5, 6, 7, 8, 10, 12)  # the columns that fit on a terminal

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
caption { text-align: left; padding: .5rem 0; }
th, td { padding: .3rem .45rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.dominated { color: #767a80; }
.wide { overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-size: .875rem; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.samples td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }
.samples th { vertical-align: top; }
@media (prefers-color-scheme: dark) {
  [fill="#0b6e99"] { fill: #5cc0ea; } [fill="#b3541e"] { fill: #f0935b; } [fill="#3a7d44"] { fill: #7fd08b; }
  [fill="#8a3ffc"] { fill: #c39bff; } [fill="#a2191f"] { fill: #ff8389; } [fill="#5c5f66"] { fill: #b6bac0; }
  [stroke="#0b6e99"] { stroke: #5cc0ea; } [stroke="#b3541e"] { stroke: #f0935b; }
  [stroke="#3a7d44"] { stroke: #7fd08b; }
  [stroke="#8a3ffc"] { stroke: #c39bff; } [stroke="#a2191f"] { stroke: #ff8389; }
  [stroke="#5c5f66"] { stroke: #b6bac0; }
}
footer { margin-top: 2rem; font-size: .875rem; color: #767a80; }
"""


def cells(group: Group) -> list[str]:
    """The figures of one method, in the order of `HEAD`."""
    first = group.first
    return [
        group.method,
        f"{group.mean('bits'):.2f}",
        f"{group.mean('bits_per_parameter'):.2f}",
        f"{group.mean('coverage'):.0%}",
        short_size(group.mean("bytes")),
        _with_spread(group, "ppl"),
        _with_spread(group, "kl"),
        f"{group.mean('top1'):.1%}",
        f"{group.mean('agreement'):.0%}",
        f"{group.mean('distinct'):.0%}",
        "" if first.tokens_per_second is None else short_number(group.mean("tokens_per_second")),
        "" if first.memory is None else short_size(group.mean("memory")),
        f"{group.mean('minutes'):.1f}",
        short_number(first.tokens) if first.tokens else "",
    ]


def _with_spread(group: Group, figure: str) -> str:
    mean, spread = group.mean(figure), group.spread(figure)
    text = f"{mean:.3g}" if mean >= 1000 else f"{mean:.2f}" if mean >= 10 else f"{mean:.3f}"
    return f"{text} ± {spread:.2g}" if spread else text


def short_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The head and rows of the table for a terminal."""
    rows = [cells(group) for group in groups]
    return [HEAD[i][0] for i in SHORT], [[row[i] for i in SHORT] for row in rows]


def markdown(title: str, facts: Sequence[str], groups: Sequence[Group]) -> str:
    """The comparison as Markdown."""
    table = markdown_table([name for name, _ in HEAD], [cells(group) for group in groups])
    legend = "\n".join(f"- {name}: {meaning}" for name, meaning in HEAD if name)
    return "\n".join([f"# {title}", "", *(f"{fact}  " for fact in facts), "", table, "", legend, ""])


def html(title: str, facts: Sequence[str], groups: Sequence[Group]) -> str:
    """The comparison as one page: table, charts, samples."""
    grey = dominated(groups, "kl")
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{'<br>'.join(escape(fact) for fact in facts)}</p>",
        f'<div class="wide">{_table(groups, grey)}</div>',
        f'<div class="charts">{_charts(groups)}</div>',
        f"<h2>What they write</h2><p>Greedy text after the first words of held-out text.</p>{_samples(groups)}",
        "<footer>Written by wf compare. This page asks nothing of the network.</footer>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _table(groups: Sequence[Group], grey: set[str]) -> str:
    head = "".join(f'<th scope="col" title="{escape(meaning)}">{escape(name)}</th>' for name, meaning in HEAD)
    rows = []
    for group in groups:
        first, *others = (escape(cell) for cell in cells(group))
        kind = ' class="dominated"' if group.method in grey else ""
        data = "".join(f"<td>{cell}</td>" for cell in others)
        rows.append(f'<tr{kind}><th scope="row">{first}</th>{data}</tr>')
    note = "Grey: another one is no larger and no further from the original. Hover over a heading for what it means."
    return f"<table><caption>{note}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _charts(groups: Sequence[Group]) -> str:
    shown = [group for group in groups if group.method != ORIGINAL]
    found = []
    for figure, name in (("ppl", "perplexity"), ("kl", "KL to the original, nats per token")):
        grey = dominated(shown, figure)
        points = [
            Point(g.method, g.mean("bytes") / 1e6, g.mean(figure), g.spread(figure), g.method in grey)
            for g in shown
            if 0 < g.mean(figure) < float("inf")
        ]
        title = f"Bytes against {name.split(',')[0]}"
        aims = [(g.method, g.mean(figure)) for g in groups if g.method == ORIGINAL and g.mean(figure) > 0]
        svg = scatter(points, "MB of the whole file", name, title, next(iter(aims), None))
        found.append((svg, f"{title}. Lower and further left is better."))
    lines = [(group.method, group.first.curve) for group in shown if group.first.curve]
    title = "Loss of the training over its minutes"
    found.append((curves(lines, "minutes", "KL, nats per token", title), f"{title}, first seed."))
    return "".join(f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for svg, text in found if svg)


def _samples(groups: Sequence[Group]) -> str:
    tables = []
    for prompt in dict.fromkeys(prompt for group in groups for prompt in group.first.samples):
        texts = [(escape(group.method), escape(group.first.samples.get(prompt, ""))) for group in groups]
        rows = "".join(f'<tr><th scope="row">{method}</th><td>{text}</td></tr>' for method, text in texts)
        caption = f"<caption><b>{escape(prompt)}</b> ...</caption>"
        tables.append(f'<table class="samples">{caption}<tbody>{rows}</tbody></table>')
    return "".join(tables)
