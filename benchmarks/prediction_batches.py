"""What predicting together gains over one by one: phrases of one image, and different images.

    python -m benchmarks.prediction_batches --model MODEL_DIR --image FILE

Whole predictions, from images in memory to masks in memory, in alternation. Without `--model`, a
model of random weights that is small enough to be measured in minutes on a CPU.
"""

import argparse
import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.alternation import print_comparison
from data_pipelines.image_input import read_image
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.predictor import Job, Predictor

PHRASES = 8
IMAGES = 8
TOKENS = 12


def small_predictor() -> Predictor:
    """A model with the proportions of the released ones, a hundredth of their arithmetic."""
    encoder = Beit3Config(width=256, heads=4, layers=6, mlp_width=1024, dtype="float32")
    segmenter = dataclasses.replace(
        SamConfig.vit_b(), width=256, depth=8, heads=4, global_every=4, image_size=512
    )
    segmenter = dataclasses.replace(segmenter, dtype="float32")
    config = evf_sam.EvfSamConfig(encoder, segmenter)
    return Predictor(config, evf_sam.init_params(config, jax.random.key(0)))


def together(predictor: Predictor, jobs: list[Job]) -> Callable[[], object]:
    return lambda: list(predictor.predict_batch(jobs))


def one_by_one(predictor: Predictor, jobs: list[Job]) -> Callable[[], object]:
    return lambda: [list(predictor.predict_batch([job])) for job in jobs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--image")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    predictor = small_predictor()
    if options.model:
        predictor = Predictor.load(options.model, dtype=options.dtype)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (480, 640, 3), np.uint8)
    if options.image:
        image = read_image(options.image)
    words = rng.integers(4, predictor.config.encoder.vocab_size, (PHRASES, TOKENS - 2))
    ids = [[0, *row, 2] for row in words.tolist()]
    images = [np.roll(image, 16 * i, axis=1) for i in range(IMAGES)]
    sets = {
        f"{PHRASES} phrases of one image": [Job(image, text_ids=[phrase]) for phrase in ids],
        f"{IMAGES} images of one phrase": [Job(other, text_ids=ids[:1]) for other in images],
        f"{IMAGES - 3} images of one phrase": [
            Job(other, text_ids=ids[:1]) for other in images[: IMAGES - 3]
        ],
    }
    for name, jobs in sets.items():
        runs = {
            "one by one": one_by_one(predictor, jobs),
            "together": together(predictor, jobs),
        }
        for run in runs.values():  # compiles
            run()
        print_comparison(f"{name}, {predictor.config.encoder.dtype}", runs, options.repeats)


if __name__ == "__main__":
    main()
