"""HTML for a self-contained page: no scripts, no network, and all text from data escaped."""

import html
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --bar: #4a7ebb; --line: #8886; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1.4rem 2rem; }
.charts table, .wide { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.charts td { padding: 0 .4rem 0 0; white-space: nowrap; font-size: 13px; }
.charts td:first-child { text-align: right; max-width: 11rem; overflow: hidden; text-overflow: ellipsis; }
.charts td:nth-child(2) { width: 100%; }
.charts i { display: block; height: .8rem; background: var(--bar); min-width: 1px; }
.wide th, .wide td { text-align: right; padding: .1rem .6rem; border-bottom: 1px solid var(--line); }
.wide th:first-child, .wide td:first-child { text-align: left; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { max-width: 100%; display: block; }
figcaption { font-size: 12px; overflow-wrap: anywhere; max-height: 9rem; overflow: hidden; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: what a browser may load, whatever the page contains."""
BINS = 20
LONGEST_LABEL = 60


class Bar(NamedTuple):
    label: str
    clips: int


def page(title: str, sections: Sequence[str]) -> str:
    """Return a whole page. `sections` are HTML, `title` is text."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escaped(title)}</h1>",
            *sections,
            "</body></html>",
            "",
        ]
    )


def escaped(text: object) -> str:
    """Escape text for HTML."""
    return html.escape(str(text), quote=True)


def histogram(values: Sequence[float]) -> list[Bar]:
    """Count values: one bar per value if few are different, otherwise bins of equal width.

    Values above the 99th percentile are in the last bar, so that a few outliers do not hide the others.
    """
    if len(counts := Counter(f"{value:.4g}" for value in values)) <= BINS:
        return [Bar(label, counts[label]) for label in sorted(counts, key=float)]
    ordered = sorted(values)
    low, high = ordered[0], ordered[math.ceil(0.99 * len(ordered)) - 1]
    step = round_step((high - low) / BINS) if high > low else round_step((ordered[-1] - low) / BINS)
    first = math.floor(low / step)
    last = max(first, math.floor(high / step))
    bins = Counter(min(last, math.floor(value / step)) for value in values)
    bars = []
    for place in range(first, last + 1):
        begin, end = place * step, (place + 1) * step
        open_ended = place == last and ordered[-1] >= end
        bars.append(Bar(f"{begin:.6g} and more" if open_ended else f"{begin:.6g} to {end:.6g}", bins[place]))
    return bars


def round_step(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def count_texts(values: Sequence[str]) -> list[Bar]:
    """Count texts: one bar for each of the most frequent, and one for all others."""
    ordered = Counter(values).most_common()
    bars = [Bar(text, count) for text, count in ordered[:BINS]]
    rest = sum(count for _, count in ordered[BINS:])
    return [*bars, Bar(f"{len(ordered) - BINS} others", rest)] if rest else bars


def chart(title: str, bars: Sequence[Bar]) -> str:
    """Return a bar chart with its numbers."""
    most = max((bar.clips for bar in bars), default=0) or 1
    rows = [
        f"<tr><td>{escaped(shortened(bar.label))}</td>"
        f'<td><i style="width:{100 * bar.clips / most:.1f}%"></i></td><td>{bar.clips}</td></tr>'
        for bar in bars
    ]
    return f"<div><h3>{escaped(title)}</h3><table>{''.join(rows)}</table></div>"


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; cells are text."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="wide"><tr>{head}</tr>{body}</table>'


def figure(jpeg: str | None, lines: Sequence[str]) -> str:
    """Return a picture (JPEG in base64, or None) above lines of text."""
    image = f'<img alt="" src="data:image/jpeg;base64,{escaped(jpeg)}">' if jpeg else ""
    return f"<figure>{image}<figcaption>{'<br>'.join(map(escaped, lines))}</figcaption></figure>"


def shortened(text: str, longest: int = LONGEST_LABEL) -> str:
    """Cut text off at `longest` characters."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
