"""cIoU and gIoU of a model in training over held-out images, and pictures of what it predicts.

Reference: hustvl/EVF-SAM at 9935dc5, `eval.py`.

Differences: examples are batched; each counts once, however many devices there are.

What is measured here is a stream of batches on the mesh of the training; `job.py` measures a
finished model, phrase by phrase.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int32, UInt8

from data_pipelines.assemble import Example
from data_pipelines.batch import Batch
from evf_sam_jax.metrics import IouSums, overlap_counts
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.param_rules import Params
from evf_sam_jax.predictor import Predictor
from evf_sam_jax.sharding import replicated
from evf_sam_jax.train_step import PromptKind, predict_masks
from evf_sam_jax.visualize import COLORS, Cell, outline, overlay, panel

# Intersection, union, and which of them count.
Counts = tuple[Int32[Array, "b k"], Int32[Array, "b k"], Bool[Array, "b k"]]


def make_count_step(
    config: EvfSamConfig, prompts: PromptKind, mesh: Mesh | None = None
) -> Callable[[Params, Batch], Counts]:
    """Returns the compiled function that counts intersection and union of each mask of a batch.

    Args:
      mesh: that the batch is split over; every process gets the counts of all of it.
    """
    whole = None if mesh is None else replicated(mesh)
    return jax.jit(functools.partial(_count, config, prompts), out_shardings=whole)


def evaluate(
    count_step: Callable[[Params, Batch], Counts],
    params: Params,
    batches: Iterable[Batch],
    put: Callable[[Batch], Batch] = lambda batch: batch,
) -> IouSums:
    """Sums over all valid phrases of all valid examples.

    Args:
      put: takes a batch (of several processes: the rows of this one) to the devices.
    """
    sums = IouSums()
    pending: list[Counts] = []
    for batch in batches:
        pending.append(count_step(params, put(batch)))
        if len(pending) > 1:  # the device computes this batch while the last one is summed
            sums = sums.merge(_sums(pending.pop(0)))
    for last in pending:
        sums = sums.merge(_sums(last))
    return sums


def prediction_panel(
    predictor: Predictor, examples: Iterable[Example]
) -> UInt8[np.ndarray, "h w 3"]:
    """A row an example: the image, then each phrase with its target and its prediction."""
    target_color, mask_color = COLORS["blue"], COLORS["vermilion"]
    rows = []
    for example in examples:
        prediction = predictor.predict(example.image, texts=list(example.phrases))
        row = [Cell(example.image, "image")]
        for phrase, target, mask in zip(
            example.phrases, example.masks, prediction.masks, strict=True
        ):
            for marked, color, caption in (
                (target > 0, target_color, f"target: {phrase}"),
                (mask, mask_color, "prediction"),
            ):
                # Outlined too: objects may have the color of the overlay.
                picture = outline(overlay(example.image, marked, color), marked, color)
                row.append(Cell(picture, caption))
        rows.append(row)
    return panel(rows)


def _count(config: EvfSamConfig, prompts: PromptKind, params: Params, batch: Batch) -> Counts:
    logits = predict_masks(config, params, batch, prompts)
    counts = overlap_counts(logits, batch.mask, batch.mask_valid, batch.phrase_valid)
    return *counts, batch.phrase_valid & batch.example_valid[:, None]


def _sums(counts: Counts) -> IouSums:
    return IouSums.count(*map(np.asarray, counts))
