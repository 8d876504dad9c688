"""What a prediction costs: more phrases on one image, and all that is not the model.

    python -m benchmarks.predict [--encoder large --segmenter vit_h] [--model MODEL_DIR]
    bash tests/install_parity.sh
    python -m benchmarks.predict --encoder base --segmenter vit_b --torch

Whole predictions of a photograph, from pixels in memory to masks in memory, for several numbers of
phrases by turns, and a phrase of an image that has been encoded before; then what the command does
with an image, part by part: reading the file, resizing for both towers, the model up to masks on
the decoder's grid, and masks and overlay at the size of the image, written as PNGs. Weights are
random unless a model is given. `--torch` adds the PyTorch originals' modules, for up to 16 phrases,
with images resized by us and masks left as logits.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import skimage.data
from PIL import Image

from benchmarks.alternation import median_and_range, print_comparison
from data_pipelines.image_input import read_image
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
from evf_sam_jax.predict import write_masks
from evf_sam_jax.predictor import TOKEN_BUCKETS, Job, Predictor

PHRASES = (1, 4, 16, 64)
TOKENS = 12
TORCH_PHRASES = 16  # with more its memory would not fit beside ours


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


def torch_runs(predictor: Predictor, image: np.ndarray, ids: list[list[int]], counts: list[int]):
    """Predictions by the PyTorch originals, by name."""
    import torch  # noqa: PLC0415 (an optional peer)

    from benchmarks.original import Original  # noqa: PLC0415

    config = predictor.config
    assert isinstance(config.encoder, Beit3Config) and isinstance(config.segmenter, SamConfig)
    original = Original(config.encoder, config.segmenter)

    def predict(count: int) -> None:
        ready, text = predictor.prepare_image(image), np.asarray(ids[:count], np.int32)
        frame = ready.frame
        with torch.no_grad():
            original(
                ready.sam_image,
                frame.content,
                ready.encoder_image,
                text,
                np.ones(text.shape, bool),
                frame.size,
            )

    return {f"PyTorch, {words(count)}": functools.partial(predict, count) for count in counts}


def words(count: int) -> str:
    return f"{count} phrase{'s' if count > 1 else ''}"


MODEL = "encoder and decoder"


def parts_of_command(
    predictor: Predictor, file: Path, ids: list[int], out: Path
) -> Iterator[tuple[str, float]]:
    """Does what the command does with an image and a phrase, and says how long each part took."""
    moments = [time.perf_counter()]

    def took() -> float:
        moments.append(time.perf_counter())
        return moments[-1] - moments[-2]

    pixels = read_image(file)
    yield "read the file", took()
    prepared = predictor.prepare(Job(pixels, text_ids=[ids]))
    yield "resize and check", took()
    [decoded] = predictor.decode([prepared])
    yield MODEL, took()
    for _ in write_masks(predictor, decoded, pixels, ["a phrase"], out):
        pass
    yield "masks and overlay, written", took()


def print_parts(predictor: Predictor, image: np.ndarray, ids: list[int], repeats: int) -> None:
    """Prints the parts of several runs, and how much there is beyond the model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "photograph.jpg"
        Image.fromarray(image).save(file)
        runs = [
            dict(parts_of_command(predictor, file, ids, file.parent)) for _ in range(repeats + 1)
        ][1:]
    print("\n| part of the command, 1 phrase | s, median (min to max) |\n|---|---|")
    for part in runs[0]:
        print(f"| {part} | {median_and_range([run[part] for run in runs], 3)} |")
    beyond = [sum(run.values()) / run[MODEL] - 1 for run in runs]
    print(f"\nbeyond {MODEL}, of their time: {median_and_range(beyond, 4)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model directory; otherwise random weights")
    parser.add_argument("--encoder", choices=("base", "large"), default="large")
    parser.add_argument("--segmenter", choices=("vit_b", "vit_l", "vit_h"), default="vit_h")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--phrases", type=int, nargs="+", default=PHRASES)
    parser.add_argument("--torch", action="store_true", help="the PyTorch originals, too")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    predictor = load_predictor(options)
    image = skimage.data.astronaut()
    rng = np.random.default_rng(0)
    drawn = rng.integers(4, predictor.config.encoder.vocab_size, (max(options.phrases), TOKENS - 2))
    ids = [[0, *row, 2] for row in drawn.tolist()]

    runs = {
        f"predict, {words(count)}": functools.partial(
            predictor.predict, image, text_ids=ids[:count]
        )
        for count in options.phrases
    }
    encoded = predictor.encode(image)
    known = "predict, 1 phrase of an image encoded before"
    runs[known] = functools.partial(predictor.predict, encoded, text_ids=ids[:1])
    counts = dict(zip(runs, options.phrases, strict=False))
    if options.torch:
        few = [count for count in options.phrases if count <= TORCH_PHRASES]
        theirs = torch_runs(predictor, image, ids, few)
        counts |= dict(zip(theirs, few, strict=True))
        runs |= theirs
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        print(f"{name}: the first took {time.perf_counter() - start:.1f} s, compiling included")
    one, more = (operations(predictor.config, predictor.params, count) for count in (1, 2))
    print_comparison(
        f"{options.model or options.encoder + ' and ' + options.segmenter}, {options.dtype}, "
        f"an image of {image.shape[0]} x {image.shape[1]}",
        runs,
        options.repeats,
        operations={name: one + (count - 1) * (more - one) for name, count in counts.items()}
        | {known: more - one},
        dtype=options.dtype,
        packages=("segment-anything", "torchscale") if options.torch else (),
    )
    print_parts(predictor, image, ids[0], options.repeats)


if __name__ == "__main__":
    main()
