"""Pixels are counted exactly, at any size, and scores are those of sets of pixels."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pycocotools.mask
import pytest

from data_pipelines.image_input import sam_input
from data_pipelines.tokenizers import pad_token_ids
from evf_sam_jax.evaluation.config import EvaluationJob
from evf_sam_jax.evaluation.job import evaluate_sets
from evf_sam_jax.evaluation.rows import read_rows
from evf_sam_jax.mask_geometry import resample_masks
from tests.evf_sam_jax.evaluation.made_set import (
    MODEL,
    TOKENIZER,
    MadeImage,
    MadeTarget,
    RandomModel,
    SeeingModel,
    made_set,
    random_phrase,
)

# 2,000 phrases in all: (height, width, phrases of an image, images).
SIZES = (
    (3000, 2000, 5, 1),
    (2000, 3000, 2, 1),
    (641, 640, 9, 2),
    (480, 640, 20, 2),
    (1, 1, 20, 4),
    (1, 300, 15, 4),
    (17, 5, 40, 5),
    (33, 64, 45, 33),
    (128, 127, 10, 11),
)


def job(**changes) -> EvaluationJob:
    """A job whose model and sets are given to it."""
    values = {"batch_size": 2, "phrases": 8, "bootstrap_samples": 20, **changes}
    return EvaluationJob(model="made", split="shapes/val", **values)


def rectangle(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    top, left = rng.integers(0, height), rng.integers(0, width)
    mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = True
    return mask


def made_image(rng: np.random.Generator, height: int, width: int, phrases: int) -> MadeImage:
    """Targets of no part, all of the image, one part, or several that overlap."""
    targets = []
    for i in range(phrases):
        parts = {
            0: (),
            1: (np.ones((height, width), bool),),
            2: (rectangle(rng, height, width),),
            3: tuple(rectangle(rng, height, width) for _ in range(3)),
        }[i % 4]
        targets.append(MadeTarget(random_phrase(rng, 1 + i % 9), parts))
    pixels = np.full((height, width, 3), rng.integers(0, 256), np.uint8)
    ignore = rectangle(rng, height, width) if rng.random() < 0.3 else None
    return MadeImage(height, width, tuple(targets), pixels, ignore)


@pytest.fixture(scope="module")
def images() -> list[MadeImage]:
    rng = np.random.default_rng(0)
    return [
        made_image(rng, height, width, phrases)
        for height, width, phrases, count in SIZES
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def evaluated(images: list[MadeImage], tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("counting")
    one, model = made_set(directory, images), RandomModel(devices=1)
    results = evaluate_sets(job(batch_size=1), [one], model, directory / "evaluation")
    return results, read_rows(directory / "evaluation").to_pylist()


def test_counts_and_scores_are_those_of_an_independent_count(images: list[MadeImage], evaluated):
    results, rows = evaluated
    assert len(rows) == sum(len(image.targets) for image in images) == 2000
    intersections, unions, ious = {"original": 0, "union": 0}, {"original": 0, "union": 0}, []
    for row in rows:
        image = images[row["image_index"]]
        target = image.targets[row["phrase_index"]]
        assert row["phrase"] == target.phrase
        size = [row["height"], row["width"]]
        counts = row["prediction_rle"].encode()
        predicted = pycocotools.mask.decode({"size": size, "counts": counts}).astype(bool)
        parts = sum((part.astype(int) for part in target.parts), np.zeros(size, int))
        counted = np.ones(size, bool) if image.ignore is None else ~image.ignore
        once, any_part = (parts == 1) & counted, (parts > 0) & counted
        predicted &= counted
        assert row["target_pixels"] == any_part.sum()
        assert row["predicted_pixels"] == predicted.sum()
        assert row["intersection"] == (predicted & once).sum()
        assert row["union"] == (predicted | once).sum()
        assert row["intersection_parts_union"] == (predicted & any_part).sum()
        assert row["union_parts_union"] == (predicted | any_part).sum()
        for way, inside in (("original", once), ("union", any_part)):
            intersections[way] += int((predicted & inside).sum())
            unions[way] += int((predicted | inside).sum())
        union = int((predicted | once).sum())
        ious.append(int((predicted & once).sum()) / (union + 1e-10) + (1.0 if union == 0 else 0.0))
    scores = results["sets"]["made/val"]
    for way in ("original", "union"):
        ciou = scores[f"as_{way}"]["ciou"]["value"]
        assert ciou == intersections[way] / (unions[way] + 1e-10)
    assert scores["as_original"]["giou"]["value"] == math.fsum(ious) / len(ious)
    assert [row["iou"] for row in rows] == ious
    # The case that the two ways to count differ in is among them, as are empty ones.
    assert scores["as_original"]["ciou"]["value"] != scores["as_union"]["ciou"]["value"]
    assert any(row["predicted_pixels"] == 0 for row in rows) and 1.0 in ious


def test_squares_of_pixels_meet_without_a_seam(images: list[MadeImage], evaluated):
    # Four squares of 640 meet within this one, of which a mask has a part.
    top, left, side = 900, 300, 700

    def window(row) -> np.ndarray:
        run_lengths = {"size": [3000, 2000], "counts": row["prediction_rle"].encode()}
        mask = pycocotools.mask.decode(run_lengths).astype(bool)
        return mask[top : top + side, left : left + side]

    large = [row for row in evaluated[1] if (row["height"], row["width"]) == (3000, 2000)]
    row = next(row for row in large if 0.1 < window(row).mean() < 0.9)
    pixels, frame = images[row["image_index"]].pixels, MODEL.segmenter.image_size
    assert pixels is not None
    sam_image, sam_size = sam_input(pixels, frame)
    text_ids, _ = pad_token_ids([TOKENIZER.encode(row["phrase"])], 16)
    logits = RandomModel(devices=1).logits(sam_image[None], text_ids[None])
    sizes = jnp.array([sam_size]), jnp.array([[3000, 2000]])
    whole = resample_masks(logits, *sizes, (side, side), frame, jnp.array([top, left]))
    assert (np.asarray(whole[0, 0] > 0) != window(row)).mean() <= 1e-5


def test_an_image_is_encoded_once_however_many_phrases_it_has(tmp_path: Path):
    rng = np.random.default_rng(1)
    model = RandomModel(devices=1)
    one = made_set(tmp_path, [made_image(rng, 20, 30, 50)])
    evaluate_sets(job(), [one], model, tmp_path / "evaluation")
    assert (model.encoded, model.decoded) == (1, 7)  # 50 phrases, 8 at a time


STRIPES = ((0, 16), (32, 48), (16, 64), None)  # columns of the target; None: nothing is meant


@pytest.mark.parametrize(
    ("factor", "ciou", "giou"),
    [
        (1.0, 1.0, 1.0),
        (0.0, 0.0, 1 / 4),  # the floor: nothing is right about the phrases that mean nothing
        (-1.0, 0.0, 0.0),
    ],
)
def test_a_perfect_an_empty_and_an_inverted_model(
    factor: float, ciou: float, giou: float, tmp_path: Path
):
    side = MODEL.segmenter.image_size
    images = []
    for stripe in STRIPES:
        mask = np.zeros((side, side), bool)
        if stripe:
            mask[:, slice(*stripe)] = True
        pixels = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
        images.append(MadeImage(side, side, (MadeTarget("it", (mask,) if stripe else ()),), pixels))
    sets = [made_set(tmp_path, images)]
    results = evaluate_sets(job(), sets, SeeingModel(factor, devices=2), tmp_path / "evaluation")
    score = results["sets"]["made/val"]["as_original"]
    np.testing.assert_allclose(score["ciou"]["value"], ciou, rtol=0, atol=1e-12)
    np.testing.assert_allclose(score["giou"]["value"], giou, rtol=0, atol=1e-12)
