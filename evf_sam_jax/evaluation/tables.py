"""Results as Markdown: a table of the sets, and the paper's splits beside the paper's figures.

Reference: arXiv 2406.20076 version 5, Tables 1, 2, 5 and 6; cIoU in percent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.source import SEMANTIC_PREFIX
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.evaluation.scores import THRESHOLDS
from evf_sam_jax.evaluation.splits import PAPER_SETS
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.released import released_variant

# Variant -> its name, and cIoU of `PAPER_SETS`.
PAPER: dict[str, tuple[str, tuple[float, ...]]] = {
    "evf-sam": (
        "EVF-SAM (BEiT-3-L, SAM ViT-H), trained on referring expressions",
        (82.1, 83.7, 80.0, 75.2, 78.3, 70.1, 76.8, 77.4),
    ),
    "evf-sam-multitask": (
        "EVF-SAM (BEiT-3-L, SAM ViT-H), multi-task",
        (82.4, 84.2, 80.2, 76.5, 80.0, 71.9, 78.2, 78.3),
    ),
    "evf-sam-base": (
        "EVF-SAM (BEiT-3-B, SAM ViT-H)",
        (78.9, 80.6, 75.3, 69.8, 74.2, 63.0, 71.6, 72.9),
    ),
    "evf-sam2": (
        "EVF-SAM2 (BEiT-3-L, SAM-2-L)",
        (82.7, 84.1, 80.0, 76.3, 80.1, 71.8, 77.0, 78.4),
    ),
    "evf-effi-sam": (
        "EVF-EfficientSAM (BEiT-3-L, EfficientSAM-S)",
        (82.5, 83.5, 80.4, 75.4, 77.9, 70.2, 76.1, 77.1),
    ),
}
NOT_AVAILABLE = "not available"
# Of which an interval is shown: to draw from fewer says nothing.
FEWEST_IMAGES = 10


def variant(config: EvfSamConfig, tokenizer: Tokenizer) -> str | None:
    """The model of the paper that has this one's sizes; None if there is none.

    A multi-task model is told by its tokenizer, which has a token of its own for `[semantic]`.
    """
    name = released_variant(config)
    if len(tokenizer.encode(SEMANTIC_PREFIX.strip())) == 3:  # between <s> and </s>
        name = f"{name}-multitask"
    return name if name in PAPER else None


def markdown(results: Mapping[str, Any]) -> str:
    """The text of `results.md`.

    Args:
      results: as `results.json` has them.
    """
    sets = results["sets"]
    parts = [
        f"Model `{results['model']['path']}` ({results['model']['fingerprint']}). Scores in "
        "percent; intervals of 95 % over images. Where parts of a target overlap, pixels are "
        "counted as the original does, and in the columns of the union as inside.",
        _sets_table(sets),
    ]
    if any(name in sets for name in PAPER_SETS):
        parts.append(paper_table(sets, results["model"]["paper_variant"]))
    parts += [_no_target_line(name, one) for name, one in sets.items() if _asks_for_none(one)]
    parts += [_category_table(name, one) for name, one in sets.items() if "categories" in one]
    if left_out := results["left_out"]:
        parts.append(
            f"{len(left_out)} images or phrases are left out, see `results.json`; "
            "the same command tries them again."
        )
    return "\n\n".join(parts) + "\n"


def paper_table(sets: Mapping[str, Any], paper_variant: str | None) -> str:
    """The eight splits of the paper's Table 2 with their average, ours beside the paper's.

    Args:
      sets: name -> numbers, as in `results.json`.
      paper_variant: key of `PAPER`.
    """
    ours = [
        sets[name]["as_original"]["ciou"]["value"] if name in sets else None for name in PAPER_SETS
    ]
    if paper_variant in PAPER:
        title, figures = PAPER[paper_variant]
        paper = [f"{value:.1f}" for value in (*figures, average(figures))]
    else:
        title, paper = NOT_AVAILABLE, [NOT_AVAILABLE] * (len(PAPER_SETS) + 1)
    known = [value for value in ours if value is not None]
    mean = average(known) if len(known) == len(ours) else None
    lines = [
        f"cIoU on the paper's splits; the paper's figures: {title}.\n",
        "| | ours | paper |",
        "|---|---|---|",
    ]
    for name, value, figure in zip((*PAPER_SETS, "average"), (*ours, mean), paper, strict=True):
        text = "not evaluated" if value is None else f"{100 * value:.1f}"
        lines.append(f"| {name} | {text} | {figure} |")
    return "\n".join(lines)


def average(values: Sequence[float]) -> float:
    """Their mean, as exact as a float can be: 77.95 is rounded up."""
    return math.fsum(values) / len(values)


def _sets_table(sets: Mapping[str, Any]) -> str:
    names = [f"P@{least}" for least in THRESHOLDS]
    header = ["set", "images", "phrases", "cIoU", "gIoU", "cIoU, union", "gIoU, union"]
    header += [*names, "IoU per image"]
    lines = [_line(header), "|" + "---|" * len(header)]
    for name, one in sets.items():
        original, union = one["as_original"], one["as_union"]
        cells = [name, f"{one['images']:,}", f"{one['phrases']:,}"]
        cells += [
            _estimate(score[key], one["images"])
            for score in (original, union)
            for key in ("ciou", "giou")
        ]
        cells += [_percent(original["precision"][str(least)]) for least in THRESHOLDS]
        lines.append(_line([*cells, _percent(original["mean_image_iou"])]))
    return "\n".join(lines)


def _asks_for_none(one: Mapping[str, Any]) -> bool:
    return one["no_target"]["without_target"] > 0


def _no_target_line(name: str, one: Mapping[str, Any]) -> str:
    found = one["no_target"]
    t_acc = "undefined" if found["t_acc"] is None else _percent(found["t_acc"])
    return (
        f"{name}: {found['without_target']:,} of {one['phrases']:,} phrases name nothing. With "
        f"fewer than {found['fewer_than']} pixels taken for that, N-acc is "
        f"{_percent(found['n_acc'])}, T-acc {t_acc}, and {_percent(found['accuracy'])} of all are "
        "right; of a model that always finds something, N-acc is 0.0, T-acc 100.0, and "
        f"{_percent(found['always_positive_accuracy'])} are right."
    )


def _category_table(name: str, one: Mapping[str, Any]) -> str:
    mean = _percent(one["category_mean_ciou"])
    lines = [
        f"{name} by category (the union of parts); mean cIoU {mean}.\n",
        "| category | phrases | cIoU |",
        "|---|---|---|",
    ]
    for category, values in one["categories"].items():
        cells = [category, f"{values['phrases']:,}", _percent(values["ciou"])]
        lines.append(_line(cells))
    return "\n".join(lines)


def _estimate(values: Mapping[str, float], images: int) -> str:
    value = _percent(values["value"])
    if images < FEWEST_IMAGES:
        return value
    return f"{value} ({_percent(values['low'])} to {_percent(values['high'])})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
