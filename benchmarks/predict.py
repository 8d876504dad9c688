"""What a prediction costs: more phrases on one image, and all that is not the model.

    python -m benchmarks.predict [--encoder large --segmenter vit_h] [--model MODEL_DIR]

Whole predictions of a photograph, from pixels in memory to masks in memory, for several numbers of
phrases by turns; and the compiled encoder and decoder alone, on an image that has been resized
before, up to masks on the decoder's grid. Weights are random unless a model is given.
"""

import argparse
import functools
import time

import jax
import numpy as np
import skimage.data

from benchmarks.alternation import print_comparison
from evf_sam_jax.flops import count_flops
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.evf_sam import (
    EvfSamConfig,
    Params,
    decode,
    encode_image,
    encode_phrases,
    init_params,
    with_dtype,
)
from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.predictor import TOKEN_BUCKETS, Job, Predictor

PHRASES = (1, 4, 16, 64)
TOKENS = 12


def load_predictor(options: argparse.Namespace) -> Predictor:
    if options.model:
        return Predictor.load(options.model, dtype=options.dtype)
    encoder, segmenter = (
        getattr(kind, name)()
        for kind, name in ((Beit3Config, options.encoder), (SamConfig, options.segmenter))
    )
    config = with_dtype(EvfSamConfig(encoder, segmenter), options.dtype)
    return Predictor(config, init_params(config, jax.random.key(0)))


def operations(config: EvfSamConfig, params: Params, phrases: int) -> int:
    """Of encoding an image and decoding phrases of 16 tokens, the bucket of theirs."""
    side, small = config.segmenter.image_size, config.encoder.image_size

    def predict(
        params: Params, frame: jax.Array, size: jax.Array, image: jax.Array, ids: jax.Array
    ) -> jax.Array:
        features = encode_image(config, params, frame, size)
        text = encode_phrases(config, params, image, ids, ids > 0)
        prompts = Prompts(text=text)
        return decode(config, params, features, prompts, multimask=False).low_res_logits

    shape = jax.ShapeDtypeStruct
    return count_flops(
        predict,
        params,
        shape((1, side, side, 3), "uint8"),
        shape((1, 2), "int32"),
        shape((1, small, small, 3), "float32"),
        shape((1, phrases, TOKEN_BUCKETS[0]), "int32"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model directory; otherwise random weights")
    parser.add_argument("--encoder", choices=("base", "large"), default="large")
    parser.add_argument("--segmenter", choices=("vit_b", "vit_l", "vit_h"), default="vit_h")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--phrases", type=int, nargs="+", default=PHRASES)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    predictor = load_predictor(options)
    image = skimage.data.astronaut()
    rng = np.random.default_rng(0)
    words = rng.integers(4, predictor.config.encoder.vocab_size, (max(options.phrases), TOKENS - 2))
    ids = [[0, *row, 2] for row in words.tolist()]
    prepared = predictor.prepare(Job(image, text_ids=ids[:1]))

    runs = {"encoder and decoder alone, 1 phrase": lambda: predictor.decode([prepared])}
    runs |= {
        f"predict, {count} phrase{'s' if count > 1 else ''}": functools.partial(
            predictor.predict, image, text_ids=ids[:count]
        )
        for count in options.phrases
    }
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        print(f"{name}: the first took {time.perf_counter() - start:.1f} s, compiling included")
    one, more = (operations(predictor.config, predictor.params, count) for count in (1, 2))
    counts = dict(zip(runs, (1, *options.phrases), strict=True))
    print_comparison(
        f"{options.model or options.encoder + ' and ' + options.segmenter}, {options.dtype}, "
        f"an image of {image.shape[0]} x {image.shape[1]}",
        runs,
        options.repeats,
        operations={name: one + (count - 1) * (more - one) for name, count in counts.items()},
        dtype=options.dtype,
    )


if __name__ == "__main__":
    main()
