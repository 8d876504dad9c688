"""What more phrases cost on one image: the image is encoded once for all of them.

    python -m benchmarks.phrases --model MODEL_DIR --image FILE

Whole predictions, from the image in memory to masks in memory, in alternation.
"""

import argparse
import functools

import numpy as np

from benchmarks.alternation import print_comparison
from data_pipelines.image_input import read_image
from evf_sam_jax.predictor import Predictor

PHRASES = (1, 16)
TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    predictor = Predictor.load(options.model, dtype=options.dtype)
    image = read_image(options.image)
    rng = np.random.default_rng(0)
    words = rng.integers(4, predictor.config.encoder.vocab_size, (max(PHRASES), TOKENS - 2))
    ids = [[0, *row, 2] for row in words.tolist()]

    runs = {
        f"{count} phrases": functools.partial(predictor.predict, image, text_ids=ids[:count])
        for count in PHRASES
    }
    for run in runs.values():  # compiles
        run()
    print_comparison(f"prediction, {options.dtype}", runs, options.repeats)


if __name__ == "__main__":
    main()
