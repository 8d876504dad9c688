"""Whether a model trained on the shapes reads: its cIoU with the phrases of other images.

    python -m benchmarks.shapes_baselines --model runs/shapes/model

Held-out images, and the model asked about them in three ways: the right phrase for each target; the
phrases of the same image in another order; those of the next image. Then what needs no model: the
best mask that ignores the phrase, chosen knowing all targets; one of the shapes at random, with its
exact outline; and a perfect reader who is handed the phrases of the next image.
"""

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np

from benchmarks import environment
from data_pipelines.assemble import BatchSpec
from data_pipelines.batch import Batch
from data_pipelines.eval_pipeline import eval_dataset
from data_pipelines.shapes import ShapesSource
from data_pipelines.shapes_baselines import (
    best_phrase_blind_ciou,
    random_object_ciou,
    shuffled_phrases_ciou,
)
from data_pipelines.train_pipeline import iterate
from evf_sam_jax.errors import run_command
from evf_sam_jax.evaluation.held_out import evaluate, make_count_step
from evf_sam_jax.metrics import IouSums
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.predictor import Predictor

BATCH_SIZE = 16
TEXT_LENGTH = 16


def with_phrases(batch: Batch, move: Callable[[np.ndarray], np.ndarray]) -> Batch:
    """The batch with its phrases moved to other targets; images and targets stay."""
    return dataclasses.replace(
        batch, text_ids=move(batch.text_ids), text_valid=move(batch.text_valid)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=992)
    options = parser.parse_args()
    if options.images % BATCH_SIZE:
        # A padded row would hand its empty phrases to the first image of its batch.
        parser.error(f"--images: expected a multiple of {BATCH_SIZE}, found {options.images}")

    predictor = Predictor.load(options.model)
    tokenizer = predictor.tokenizer
    if tokenizer is None:
        parser.error(f"--model: expected a model with a tokenizer, {options.model} has none")
    source = ShapesSource(options.split, length=options.images)
    spec = BatchSpec(
        batch_size=BATCH_SIZE,
        phrases=source.config.phrases,
        text_length=TEXT_LENGTH,
        images=tower_images(predictor.config),
        canvas=(max(source.config.sides), max(source.config.sides)),
    )
    count_step = make_count_step(predictor.config, "text")

    def score(move: Callable[[np.ndarray], np.ndarray]) -> IouSums:
        with iterate(eval_dataset(source, tokenizer, spec)) as batches:
            return evaluate(
                count_step, predictor.params, (with_phrases(batch, move) for batch in batches)
            )

    rows = {
        "the right phrases": score(lambda x: x),
        "phrases shuffled within each image": score(lambda x: np.roll(x, 1, axis=1)),
        "phrases of the next image": score(lambda x: np.roll(x, 1, axis=0)),
    }
    print(environment.describe())
    masks = rows["the right phrases"].masks
    print(f"shapes/{options.split}, {options.images} images, {masks} phrases\n")
    print("| asked with | cIoU | gIoU |\n|---|---|---|")
    for name, sums in rows.items():
        print(f"| {name} | {sums.ciou:.3f} | {sums.giou:.3f} |")
    bounds = {
        "no model: the best mask that ignores the phrase": best_phrase_blind_ciou(
            source[i] for i in range(len(source))
        ),
        "no model: a random shape": random_object_ciou(source, len(source)),
        "no model: a perfect reader, phrases of the next image": shuffled_phrases_ciou(
            source, len(source)
        ),
    }
    for name, ciou in bounds.items():
        print(f"| {name} | {ciou:.3f} | |")


if __name__ == "__main__":
    run_command(main)
