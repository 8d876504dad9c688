"""The report as one HTML page that asks for nothing else: no script, no request, data in it.

Phrases, ids, paths and categories are somebody else's text: all goes through `_text`.
"""

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from evf_sam_jax.evaluation.splits import PAPER_SETS
from evf_sam_jax.evaluation.tables import FEWEST_IMAGES
from evf_sam_jax.report import charts
from evf_sam_jax.report.analysis import (
    HISTOGRAM_BINS,
    Comparison,
    Counting,
    Difference,
    GroupScores,
    SetAnalysis,
)
from evf_sam_jax.report.breakdown import FEWEST
from evf_sam_jax.report.estimates import LEVEL, PERMUTATIONS, Estimate

LONGEST_TEXT = 300  # letters of a phrase or name that are shown
LISTED_FLIPS = 500  # phrases of a set that flipped, each way
OPENED_FLIPS = 50  # longer lists are closed, and not on the paper
SIGNIFICANT = 0.05

# Besides what the style sheet asks for: nothing is loaded, nothing is run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A thumbnail with its alternative text."""

    uri: str
    width: int
    height: int
    says: str


@dataclasses.dataclass(frozen=True)
class Card:
    """One phrase with its pictures, or why there are none.

    Attributes:
      score: such as "IoU 12.3".
      place: set, image and phrase.
      problem: a sentence; "" where there is none.
    """

    phrase: str
    score: str
    place: str
    pictures: tuple[Picture, ...]
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
      run: name of the run.
      other: name of the run that it is compared with; "" without one.
      model: what was evaluated; "" if the run does not say.
      config: what it was evaluated with.
      counting: how it counts.
      sets: by set.
      paper: the paper's cIoU of this model's variant, in percent, by the set it is of.
      only_here: sets that the other run does not have.
      only_there: sets that only the other run has.
      worst: cards, the worst first.
      best: cards, the best first.
      gained: per set, cards of the first phrases that only this run finds.
      lost: likewise of those that only the other run finds.
      without_pictures: why there are none, a sentence; "" if there are.
    """

    run: str
    other: str
    model: str
    config: Mapping[str, Any]
    counting: Counting
    sets: Sequence[SetAnalysis]
    paper: Mapping[str, float]
    only_here: Sequence[str]
    only_there: Sequence[str]
    worst: Sequence[Card]
    best: Sequence[Card]
    gained: Mapping[str, Sequence[Card]]
    lost: Mapping[str, Sequence[Card]]
    without_pictures: str


def render(report: Report) -> str:
    """The page."""
    style = (resources.files("evf_sam_jax.report") / "page.css").read_text()
    title = f"Evaluation {report.run}"
    sections = [("scores", "Scores", _scores(report))]
    if report.other:
        sections.append(("comparison", f"Against {_text(report.other)}", _comparison(report)))
    for i, one in enumerate(report.sets):
        content = _set(one, report.other)
        if one.comparison is not None:
            content += _flips(one, report)
        sections.append((f"set-{i}", _text(one.phrases.name), content))
    for key, heading, cards in (
        ("worst", f"The worst {len(report.worst)}", report.worst),
        ("best", f"The best {len(report.best)}", report.best),
    ):
        if cards:
            sections.append((key, heading, _gallery(cards, report.without_pictures, "", False)))
    sections.append(("method", "How this was counted", _method(report)))
    links = " ".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{heading}</h2>{content}</section>'
        for key, heading, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or browsers ask for one
        f"<title>{_text(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{_text(title)}</h1>{_facts(report)}<nav>{links}</nav></header>"
        f"<main>{body}</main></body></html>\n"
    )


def _facts(report: Report) -> str:
    images = sum(one.phrases.images for one in report.sets)
    phrases = sum(len(one.phrases) for one in report.sets)
    sets = f"{len(report.sets)} set{'' if len(report.sets) == 1 else 's'}"
    model = f"Model <code>{_text(report.model)}</code>, " if report.model else ""
    return f'<p class="quiet">{model}{sets}, {images:,} images, {phrases:,} phrases.</p>'


def _scores(report: Report) -> str:
    names = list(dict.fromkeys(name for one in report.sets for name in one.scores))
    heads = "".join(f"<th>{name}" for name in names)
    if report.paper:
        heads = "<th>paper\u2019s cIoU" + heads
    rows = []
    for i, one in enumerate(report.sets):
        cells = "".join(_score_cell(one.scores.get(name)) for name in names)
        if report.paper:
            figure = report.paper.get(one.phrases.name)
            cells = f"<td>{'' if figure is None else f'{figure:.1f}'}{cells}"
        rows.append(
            f'<tr><td class="name"><a href="#set-{i}">{_text(one.phrases.name)}</a>'
            f"<td>{one.phrases.images:,}<td>{len(one.phrases):,}{cells}"
        )
    if len(report.paper) == len(PAPER_SETS):
        ours = [s.scores["cIoU"].value for s in report.sets if s.phrases.name in report.paper]
        paper = sum(report.paper.values()) / len(PAPER_SETS)
        mean = _percent(sum(ours) / len(ours))
        rest = "<td>" * (len(names) - 1)
        rows.append(f"<tr><td>average<td><td><td>{paper:.1f}<td>{mean}{rest}")
    intro = f"<p>In percent; below each its {LEVEL:.0%} interval by a bootstrap over images.</p>"
    table = f"<thead><tr><th>set<th>images<th>phrases{heads}</thead><tbody>{''.join(rows)}</tbody>"
    notes = "".join(map(_no_target_note, report.sets))
    return f'{intro}<div class="scroll"><table class="scores">{table}</table></div>{notes}'


def _no_target_note(one: SetAnalysis) -> str:
    """What N-acc and T-acc stand beside, where phrases name nothing."""
    without = int((one.phrases.target_pixels == 0).sum())
    if not without:
        return ""
    always = _percent(1 - without / len(one.phrases))
    return (
        f'<p class="quiet">{_text(one.phrases.name)}: {without:,} phrases name nothing. A model '
        "that always finds something has an N-acc of 0, a T-acc of 100, and is right about "
        f"{always} % of all.</p>"
    )


def _score_cell(score: Estimate | None) -> str:
    if score is None:
        return "<td>\u2013"
    return f"<td>{_percent(score.value)}<small>{_interval(score)}</small>"


def _comparison(report: Report) -> str:
    parts = []
    for names, run in ((report.only_here, report.run), (report.only_there, report.other)):
        if names:
            listed = ", ".join(map(_text, names))
            parts.append(f"<p>Only in {_text(run)}, so not compared: {listed}.</p>")
    rows = []
    for one in report.sets:
        if one.comparison is None:
            continue
        parts.append(f"<p>{_verdict(one.phrases.name, one.comparison, report.other)}</p>")
        differences = one.comparison.differences
        reach = max(
            [abs(x) for d in differences for x in (d.difference.low, d.difference.high, 0.01)]
        )
        for i, d in enumerate(differences):
            name = _text(one.phrases.name) if i == 0 else ""
            drawn = charts.difference_bar(
                d.difference.value, d.difference.low, d.difference.high, reach
            )
            rows.append(
                f'<tr><td class="name">{name}<td>{d.score}<td>{_percent(d.one)}'
                f"<td>{_percent(d.other)}<td>{_difference(d.difference)}<td>{_p(d.p)}"
                f'<td class="chart">{drawn}'
            )
    heads = (
        f"<th>set<th>score<th>{_text(report.run)}<th>{_text(report.other)}<th>difference "
        f'<small>{LEVEL:.0%} interval</small><th>p<th class="chart">'
    )
    table = f"<thead><tr>{heads}</thead><tbody>{''.join(rows)}</tbody>"
    note = (
        '<p class="quiet">The interval is of a paired bootstrap: images are drawn again, and both '
        "runs see the same draws. p is of a permutation test, two-sided: the two runs\u2019 "
        f"predictions are swapped for images at random, {PERMUTATIONS:,} times. Neither is "
        "corrected for the number of sets and scores.</p>"
    )
    return f'{"".join(parts)}<div class="scroll"><table>{table}</table></div>{note}'


def _verdict(name: str, comparison: Comparison, other: str) -> str:
    """The difference in cIoU as a sentence."""
    gained, lost = len(comparison.gained), len(comparison.lost)
    flips = (
        f"{gained:,} phrase{'s are' if gained != 1 else ' is'} found (IoU of 0.5 or more) that "
        f"{_text(other)} misses, and {lost:,} missed that it finds."
    )
    ciou = next((d for d in comparison.differences if d.score == "cIoU"), None)
    if ciou is None:
        return f"{_text(name)}: {flips}"
    return f"{_text(name)}: {_ciou_sentence(ciou, other)} {flips}"


def _ciou_sentence(ciou: Difference, other: str) -> str:
    value = ciou.difference.value
    if value == 0:
        return f"cIoU is the same as {_text(other)}\u2019s."
    if abs(100 * value) < 0.05:
        return f"cIoU is within 0.05 points of {_text(other)}\u2019s (p {_p_sentence(ciou.p)})."
    size = f"{abs(100 * value):.1f} points {'higher' if value > 0 else 'lower'}"
    clear = "a significant difference" if ciou.p < SIGNIFICANT else "no significant difference"
    return (
        f"cIoU is {size} than {_text(other)}\u2019s, {clear} at {SIGNIFICANT:g} "
        f"(interval {_signed_interval(ciou.difference)}, p {_p_sentence(ciou.p)})."
    )


def _set(one: SetAnalysis, other: str) -> str:
    keys = ""
    if one.other_histogram is not None:
        keys = (
            '<p class="quiet"><span class="key value"></span>this run'
            f'<span class="key other"></span>{_text(other)}</p>'
        )
    edges = [i / HISTOGRAM_BINS for i in range(HISTOGRAM_BINS + 1)]
    drawn = charts.histogram(one.histogram, edges, one.other_histogram)
    parts = [f"<h3>Phrases by IoU</h3>{keys}{drawn}"]
    plain, words = [], []
    for title, groups in one.breakdowns.items():
        (words if groups[0].to_rest is not None else plain).append((title, groups))
    tables = "".join(f"<div><h3>{t}</h3>{_groups(g, other)}</div>" for t, g in plain)
    compared = "" if one.comparison is None else " compared"
    parts.append(f'<div class="pair{compared}">{tables}</div>')
    for title, groups in words:
        parts.append(
            f'<h3>{title}</h3><p class="quiet">The difference is to the cIoU of the set\u2019s '
            "other phrases; bold where its interval leaves out 0. Words in fewer than "
            f"{FEWEST} phrases are left out.</p>{_groups(groups, other)}"
        )
    return "".join(parts)


def _groups(groups: Sequence[GroupScores], other: str) -> str:
    with_rest = groups[0].to_rest is not None
    compared = groups[0].to_other is not None
    differences = [g.to_rest for g in groups if g.to_rest is not None]
    finite = [abs(x) for d in differences for x in (d.low, d.high) if math.isfinite(x)]
    reach = max([*finite, 0.01])
    heads = "<th><th>phrases<th>cIoU <small>interval</small>"
    heads += "<th>difference <small>interval</small>" if with_rest else ""
    heads += f"<th>against {_text(other)}" if compared else ""
    rows = []
    for group in groups:
        cells = f"<td>{group.phrases:,}<td>{_percent(group.ciou.value)} "
        cells += f"<small>{_interval(group.ciou)}</small>"
        drawn = ""
        if _drawable(group.ciou):
            drawn = charts.bar(group.ciou.value, group.ciou.low, group.ciou.high)
        if group.to_rest is not None:
            cells += f"<td>{_difference(group.to_rest)}"
            drawn = ""
            if _drawable(group.to_rest):
                value, low, high = dataclasses.astuple(group.to_rest)
                drawn = charts.difference_bar(value, low, high, reach)
        if group.to_other is not None:
            cells += f"<td>{_difference(group.to_other)}"
        name = "name indented" if group.indented else "name kind" if with_rest else "name"
        label = _text(group.label)
        rows.append(f'<tr><td class="{name}">{label}{cells}<td class="chart">{drawn}')
    table = f'<thead><tr>{heads}<th class="chart"></thead><tbody>{"".join(rows)}</tbody>'
    return f'<div class="scroll"><table>{table}</table></div>'


def _flips(one: SetAnalysis, report: Report) -> str:
    assert one.comparison is not None and one.other is not None
    parts = []
    for rows, cards, heading in (
        (one.comparison.gained, report.gained, f"Found here, missed by {_text(report.other)}"),
        (one.comparison.lost, report.lost, f"Missed here, found by {_text(report.other)}"),
    ):
        parts.append(f"<h3>{heading}: {len(rows):,}</h3>")
        if not rows:
            continue
        shown = cards.get(one.phrases.name, ())
        if shown and not report.without_pictures:
            parts.append(_gallery(shown, "", report.other, True))
        lines = []
        for row in rows[:LISTED_FLIPS]:
            before, after = one.other.iou[row], one.phrases.iou[row]
            lines.append(
                f'<tr><td class="words"><bdi>{_text(one.phrases.phrase[row])}</bdi>'
                f"<td>{_text(one.phrases.image_id[row])}<td>{_percent(before)}<td>{_percent(after)}"
            )
        if len(rows) > LISTED_FLIPS:
            parts.append(
                f'<p class="quiet">The {LISTED_FLIPS} with the greatest change are listed.</p>'
            )
        heads = f"<th>phrase<th>image<th>IoU of {_text(report.other)}<th>IoU here"
        table = f"<thead><tr>{heads}</thead><tbody>{''.join(lines)}</tbody>"
        opened = " open" if len(rows) <= OPENED_FLIPS else ""
        parts.append(f"<details{opened}><summary>The phrases</summary>")
        parts.append(f'<div class="scroll"><table>{table}')
        parts.append("</table></div></details>")
    return "".join(parts)


def _gallery(cards: Sequence[Card], without_pictures: str, other: str, wide: bool) -> str:
    if without_pictures:
        note = f"<p>Without pictures: {_text(without_pictures)}</p>"
    else:
        note = '<p class="quiet"><span class="key target"></span>target'
        if other:
            note += f'<span class="key before"></span>prediction of {_text(other)}'
        note += '<span class="key prediction"></span>prediction</p>'
    figures = "".join(map(_figure, cards))
    return f'{note}<div class="cards{" wide" if wide else ""}">{figures}</div>'


def _figure(card: Card) -> str:
    pictures = "".join(
        f'<img src="{p.uri}" width="{p.width}" height="{p.height}" alt="{_text(p.says)}">'
        for p in card.pictures
    )
    shown = f'<div class="pictures">{pictures}</div>' if pictures else ""
    problem = f"<small>{_text(card.problem)}</small>" if card.problem else ""
    return (
        f"<figure>{shown}<figcaption><b>{_text(card.score)}</b><bdi>{_text(card.phrase)}</bdi>"
        f"<small>{_text(card.place)}</small>{problem}</figcaption></figure>"
    )


def _method(report: Report) -> str:
    counting = report.counting
    config = json.dumps(dict(report.config), indent=2, ensure_ascii=False, default=str)
    return (
        "<p>cIoU is the sum of all intersections over the sum of all unions, in pixels of the "
        "original images; gIoU the mean of the phrases\u2019 IoUs; a phrase without target and "
        "without prediction has IoU 1. Where parts of a target overlap, the original leaves those "
        "pixels out of it, as do these numbers but for \u201cparts united\u201d. P@0.5 is the "
        "share of phrases whose IoU is 0.5 or more. N-acc is the share of phrases without target "
        f"for which fewer than {counting.no_target_pixels} pixels are predicted, T-acc the share "
        "of the others for which as many or more are.</p>"
        f"<p>Intervals are percentiles of {counting.resamples:,} bootstrap draws of images with "
        f"all their phrases; groups of fewer than {FEWEST_IMAGES} images have none. A phrase may "
        "be in several groups of words.</p>"
        f"<details><summary>Configuration</summary><pre>{_text(config, None)}</pre></details>"
    )


def _text(text: str, longest: int | None = LONGEST_TEXT) -> str:
    """Somebody else's text, cut and made harmless."""
    if longest is not None and len(text) > longest:
        text = text[:longest] + "\u2026"
    shown = "".join(c if c.isprintable() or c in "\n\t " else "\ufffd" for c in text)
    return html.escape(shown)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "\u2013"


def _interval(estimate: Estimate) -> str:
    if not math.isfinite(estimate.low):
        return ""
    return f"{_percent(estimate.low)} to {_percent(estimate.high)}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\u2212") if math.isfinite(value) else "\u2013"


def _signed_interval(estimate: Estimate) -> str:
    return f"{_signed(estimate.low)} to {_signed(estimate.high)}"


def _difference(estimate: Estimate) -> str:
    value = _signed(estimate.value)
    if not _drawable(estimate):
        return value
    shown = f'<span class="clear">{value}</span>' if estimate.excludes_zero else value
    return f"{shown} <small>{_signed_interval(estimate)}</small>"


def _drawable(estimate: Estimate) -> bool:
    return all(map(math.isfinite, dataclasses.astuple(estimate)))


def _p(p: float) -> str:
    if not math.isfinite(p):
        return "\u2013"
    return "&lt; 0.001" if p < 0.001 else f"{p:.3f}"


def _p_sentence(p: float) -> str:
    return _p(p) if p < 0.001 else f"= {_p(p)}"
