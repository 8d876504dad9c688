"""From the directories of one or two runs to the page that shows them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.splits import PAPER_SETS, EvaluationSet, open_sets
from evf_sam_jax.evaluation.tables import PAPER
from evf_sam_jax.report.analysis import Counting, SetAnalysis, analyse, worst_and_best
from evf_sam_jax.report.evaluated_set import EvaluatedSet, read_sets, require_same_phrases
from evf_sam_jax.report.page import Card, Picture, Report, render
from evf_sam_jax.report.pictures import ReadExample, predicted_mask, read_matching, thumbnail
from evf_sam_jax.run_log import run_directory

SHOWN = 50  # of the worst, and of the best
RESULTS = "results.json"
SHOWN_FLIPS = 40  # with pictures, of all sets and both ways


def build_report(run: epath.PathLike, against: epath.PathLike | None = None) -> str:
    """The page of a finished evaluation, as HTML.

    Args:
      against: a run to compare with, on some of the same sets.

    Raises:
      UserError: one is no finished evaluation (it has no `results.json`), or the two have no set in
        common, or asked other phrases of one.
    """
    results = _results(run)
    sets = read_sets(run)
    others = {}
    if against is not None:
        _results(against)
        others = read_sets(against)
    common = [name for name in sets if name in others]
    if against is not None and not common:
        raise UserError(
            f"--against: expected a run with one of the sets of {run} ({', '.join(sets)}), "
            f"found {against} with {', '.join(others)}"
        )
    for name in common:
        require_same_phrases(sets[name], others[name], run, against or "")
    config = results["config"]
    counting = _counting(config)
    analyses = [analyse(one, others.get(name), counting) for name, one in sets.items()]

    read, without = _reader(sets, config)
    worst, best = worst_and_best(list(sets.values()), SHOWN)
    here, there = _names(run, against)
    each = max(1, SHOWN_FLIPS // (2 * max(len(common), 1)))
    ordered = list(sets.values())
    return render(
        Report(
            run=here,
            other=there,
            model=str(config.get("model", "")),
            config=config,
            counting=counting,
            sets=analyses,
            paper=_paper_figures(results, list(sets)),
            only_here=[name for name in sets if against is not None and name not in others],
            only_there=[name for name in others if name not in sets],
            worst=[_card(read, ordered[i], None, row) for i, row in worst],
            best=[_card(read, ordered[i], None, row) for i, row in best],
            gained=_flip_cards(read, analyses, each, gained=True),
            lost=_flip_cards(read, analyses, each, gained=False),
            without_pictures=without,
        )
    )


def _names(run: epath.PathLike, against: epath.PathLike | None) -> tuple[str, str]:
    """The runs' last folders, or whole paths where these are the same."""
    here = run_directory(run).name
    if against is None:
        return here or str(run), ""
    there = run_directory(against).name
    return (here, there) if here and there and here != there else (str(run), str(against))


def _results(run: epath.PathLike) -> Mapping[str, Any]:
    """What the run wrote last, with the config that its numbers were made with.

    Raises:
      UserError: it has not got that far, or the file is not what it wrote.
    """
    path = epath.Path(run) / RESULTS
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{run}: expected the directory of a finished evaluation, found no {RESULTS}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected what the run wrote there, found {error}") from None
    if not isinstance(values, Mapping) or not isinstance(values.get("config"), Mapping):
        raise UserError(f"{path}: expected an object with a config, found something else")
    return values


def _paper_figures(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The paper's cIoU of these sets, in percent, if the run is of one of the paper's models."""
    model = results.get("model")
    variant = model.get("paper_variant") if isinstance(model, Mapping) else None
    if not isinstance(variant, str) or variant not in PAPER:
        return {}
    figures = dict(zip(PAPER_SETS, PAPER[variant][1], strict=True))
    return {name: figures[name] for name in names if name in figures}


def _counting(config: Mapping[str, Any]) -> Counting:
    """How the run counts; as by default where it does not say."""
    keys = {
        "resamples": "bootstrap_samples",
        "seed": "bootstrap_seed",
        "no_target_pixels": "no_target_pixels",
    }
    found = {name: config.get(key) for name, key in keys.items()}
    return Counting(**{name: value for name, value in found.items() if isinstance(value, int)})


def _reader(
    sets: Mapping[str, EvaluatedSet], config: Mapping[str, Any]
) -> tuple[ReadExample | None, str]:
    """Reads examples of the run's data; or None and why there are none to show."""
    if not any(any(one.prediction_rle) for one in sets.values()):
        return None, "the run has kept no masks."
    try:
        opened = open_sets(
            list(sets),
            str(config.get("data", "")),
            images=config["images"] if isinstance(config.get("images"), int) else 0,
            ignore_unlabelled=bool(config.get("ignore_unlabelled", False)),
            semantic_prefix=bool(config.get("semantic_prefix", True)),
        )
    except UserError as error:
        return None, f"the data cannot be read: {str(error).splitlines()[0]}"
    by_name: dict[str, EvaluationSet] = dict(zip(sets, opened, strict=True))
    return lambda name, image, phrase: by_name[name].read(image, [phrase]), ""


def _flip_cards(
    read: ReadExample | None, analyses: Sequence[SetAnalysis], count: int, gained: bool
) -> dict[str, list[Card]]:
    cards = {}
    for one in analyses:
        if one.comparison is not None and read is not None:
            rows = one.comparison.gained if gained else one.comparison.lost
            chosen = rows[:count]
            cards[one.phrases.name] = [_card(read, one.phrases, one.other, r) for r in chosen]
    return cards


def _card(
    read: ReadExample | None, phrases: EvaluatedSet, other: EvaluatedSet | None, row: int
) -> Card:
    """A phrase with pictures of its target, perhaps of the other run's mask, and of the mask."""
    score = f"IoU {100 * phrases.iou[row]:.1f}"
    if other is not None:
        score = f"IoU {100 * other.iou[row]:.1f} \u2192 {100 * phrases.iou[row]:.1f}"
    details = [phrases.name, f"image {phrases.image_id[row]}"]
    if phrases.category[row]:
        details.append(phrases.category[row])
    details.append(f"target {phrases.target_pixels[row]:,} px")
    details.append(f"predicted {phrases.predicted_pixels[row]:,} px")
    pictures: list[Picture] = []
    problem = ""
    if read is not None:
        try:
            example = read_matching(read, phrases, row)
            masks = [("target", "blue", example.masks[0] > 0)]
            if other is not None and other.prediction_rle[row]:
                masks.append(("other prediction", "pink", predicted_mask(other, row)))
            if phrases.prediction_rle[row]:
                masks.append(("prediction", "vermilion", predicted_mask(phrases, row)))
            for what, color, mask in masks:
                uri, (width, height) = thumbnail(example.image, mask, color)
                says = f"{what} of \u201c{phrases.phrase[row]}\u201d"
                pictures.append(Picture(uri, width, height, says))
        except UserError as error:
            pictures, problem = [], str(error).splitlines()[0]
    return Card(phrases.phrase[row], score, ", ".join(details), tuple(pictures), problem)
