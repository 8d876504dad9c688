"""Small charts as inline SVG, from numbers to strings.

Every place is a percentage and every text has its own size, so a chart is as wide as what holds it
and stays readable on a phone. Colours are classes, which the page's style sheet knows.
"""

import html
from collections.abc import Sequence

# The height, in pixels, of a histogram without its labels, and of those.
HISTOGRAM_HEIGHT = 150
LABEL_HEIGHT = 22


def bar(value: float, low: float, high: float) -> str:
    """A bar from 0 to `value` with its interval as a line over it; all of 0 to 1."""
    return (
        '<svg class="bar" aria-hidden="true">'
        f'<rect class="track" {_span(0.0, 1.0)} y="25%" height="50%"/>'
        f'<rect class="value" {_span(0.0, value)} y="25%" height="50%"/>'
        f"{_interval(low, high)}</svg>"
    )


def difference_bar(value: float, low: float, high: float, reach: float) -> str:
    """A bar from the middle, to the right if `value` is above 0, with its interval.

    Args:
      reach: the difference at the right end; the left end is its opposite. What is beyond is cut.
    """

    def place(difference: float) -> float:
        return min(max(0.5 + 0.5 * difference / reach, 0.0), 1.0)

    sign = "gain" if value >= 0 else "loss"
    begin, end = sorted((0.5, place(value)))
    return (
        '<svg class="bar" aria-hidden="true">'
        f'<rect class="{sign}" {_span(begin, end)} y="25%" height="50%"/>'
        '<line class="zero" x1="50%" x2="50%" y1="5%" y2="95%"/>'
        f"{_interval(place(low), place(high))}</svg>"
    )


def histogram(
    counts: Sequence[int], edges: Sequence[float], against: Sequence[int] | None = None
) -> str:
    """Columns of n counts between n + 1 edges, labelled below; another run's beside them.

    What counts how many is said by a title of each column, which a pointer shows.
    """
    highest = max(*counts, *(against or ()), 1)
    width = 1 / len(counts)
    parts = []
    for level in (0.5, 1.0):
        y = HISTOGRAM_HEIGHT * (1 - level) + 12
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text text-anchor="end" x="-6" y="{y + 4:.1f}">{highest * level:,.0f}</text>'
        )
    for i in range(len(counts)):
        runs = [("value", counts[i])] + ([("other", against[i])] if against else [])
        share = 0.84 * width / len(runs)
        for place, (kind, count) in enumerate(runs):
            begin = (i + 0.08) * width + place * share
            height = HISTOGRAM_HEIGHT * count / highest
            title = f"{edges[i]:g} to {edges[i + 1]:g}: {count:,}"
            parts.append(
                f'<rect class="{kind}" {_span(begin, begin + share)} '
                f'y="{HISTOGRAM_HEIGHT + 12 - height:.1f}" height="{height:.1f}">'
                f"<title>{html.escape(title)}</title></rect>"
            )
    base = HISTOGRAM_HEIGHT + 12
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    for i, edge in enumerate(edges):
        if i % 2:  # every second label has room on a phone
            continue
        anchor = "start" if i == 0 else "end" if i == len(counts) else "middle"
        parts.append(
            f'<text text-anchor="{anchor}" x="{100 * i * width:.2f}%" '
            f'y="{base + 16}">{edge:g}</text>'
        )
    total = base + LABEL_HEIGHT
    return (
        f'<svg class="histogram" role="img" height="{total}" '
        f'aria-label="{html.escape(_spoken(counts, edges))}">{"".join(parts)}</svg>'
    )


def _interval(low: float, high: float) -> str:
    ends = f'x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="50%" y2="50%"'
    return f'<line class="interval" {ends}/>'


def _span(begin: float, end: float) -> str:
    return f'x="{100 * begin:.2f}%" width="{100 * max(end - begin, 0.0):.2f}%"'


def _spoken(counts: Sequence[int], edges: Sequence[float]) -> str:
    """What a histogram shows, for those who hear the page."""
    return ", ".join(f"{edges[i]:g} to {edges[i + 1]:g}: {count}" for i, count in enumerate(counts))
