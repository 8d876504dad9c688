"""Writes the directory of an evaluation that no model made: targets, shifted or mistaken."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.segmentations import encode_mask
from data_pipelines.shapes import ShapesSource
from evf_sam_jax.evaluation.config import EvaluationJob
from evf_sam_jax.evaluation.rows import PhraseRow, schema, write_rows

CATEGORIES = ("circle", "square", "triangle", "strip", "object")


def predict(target: np.ndarray, others: np.ndarray, rng: np.random.Generator, skill: float):
    """The target shifted, sometimes another target of the image, sometimes nothing."""
    chance = rng.random()
    if chance > skill:
        miss = (chance - skill) / (1 - skill)
        if miss < 0.6 and len(others):
            return others[rng.integers(len(others))] > 0
        if miss < 0.8:
            return np.zeros(target.shape, bool)
    shift = rng.integers(-3, 4, 2)
    return np.roll(target > 0, shift, (0, 1))


def write_run(
    workdir: Path,
    splits: tuple[str, ...] = ("val",),
    images: int = 40,
    skill: float = 0.7,
    seed: int = 0,
    masks: bool = True,
) -> Path:
    """Writes the run of a made-up model on the embedded data set."""
    rows = []
    for split in splits:
        source = ShapesSource(split, length=images)
        for index in range(images):
            example = source[index]
            rng = np.random.default_rng([seed, example.example_id])
            for place, phrase in enumerate(example.phrases):
                target = example.masks[place] > 0
                predicted = predict(target, np.delete(example.masks, place, 0), rng, skill)
                rows.append(
                    row_of(f"shapes/{split}", example.example_id, index, place, phrase, target)
                    | prediction_columns(target, predicted, masks)
                )
    write(workdir, rows)
    return workdir


def row_of(
    name: str, image_id: int, index: int, place: int, phrase: str, target: np.ndarray
) -> dict:
    """The columns that no prediction changes."""
    named = [word for word in CATEGORIES if word in phrase]
    return dict(
        set=name,
        image_id=f"shapes/{image_id}",
        image_index=index,
        phrase_index=place,
        phrase=phrase,
        category=named[0] if named else "",
        height=target.shape[0],
        width=target.shape[1],
        target_pixels=int(target.sum()),
        predicted_iou=0.5,
    )


def prediction_columns(target: np.ndarray, predicted: np.ndarray, masks: bool = True) -> dict:
    """The columns that a prediction of the target has."""
    intersection, union = int((target & predicted).sum()), int((target | predicted).sum())
    return dict(
        predicted_pixels=int(predicted.sum()),
        intersection=intersection,
        union=union,
        intersection_parts_union=intersection,
        union_parts_union=union,
        iou=intersection / (union + 1e-10) + (union == 0),
        prediction_rle=encode_mask(predicted).decode() if masks else "",
    )


def write(workdir: Path, rows: list[dict], **values) -> None:
    """Writes rows, and a config with the results; `values` are some of the config's."""
    workdir.mkdir(parents=True, exist_ok=True)
    checked = [vars(PhraseRow(**row)) for row in rows]
    write_rows(workdir, pa.Table.from_pylist(checked, schema=schema()))
    job = EvaluationJob(model="runs/made_up/model", split="shapes/val", **values)
    (workdir / "results.json").write_text(json.dumps({"config": dataclasses.asdict(job)}))
