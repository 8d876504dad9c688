"""The command that predicts: phrases and an image in, mask PNGs and an overlay out.

python -m evf_sam_jax.predict --model DIR --image cat.jpg --text "the cat on the left" --out out
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import image_input
from evf_sam_jax import visualize
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.output_directory import new_directory
from evf_sam_jax.predictor import Job, Prediction, Predictor

__all__ = ["Prediction", "Predictor", "predict_file", "write_prediction"]


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    flags.DEFINE_string("model", None, "The model directory.")
    flags.DEFINE_string("image", None, "The image file.")
    flags.DEFINE_multi_string("text", [], "A phrase; give it again for more phrases.")
    flags.DEFINE_multi_string(
        "text_ids", [], 'A phrase as token ids, "0 5 2"; for models without a tokenizer.'
    )
    flags.DEFINE_string("out", None, "The directory to make, for mask PNGs and an overlay PNG.")
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "float32: exact; bfloat16: half the memory."
    )


def main(argv: list[str]) -> None:
    """Checks the flags, predicts, and prints a line a phrase."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    for name in ("model", "image", "out"):
        if not options[name].value:
            raise UserError(f"--{name}: expected a path, found nothing")
    lines = predict_file(
        options.model, options.image, options.text, options.text_ids, options.out, options.dtype
    )
    print("\n".join(lines))
    print(f"written to {options.out}")


def predict_file(
    model: str | os.PathLike,
    image: str | os.PathLike,
    texts: Sequence[str],
    id_lines: Sequence[str],
    out: str | os.PathLike,
    dtype: str = "float32",
) -> list[str]:
    """Predicts phrases in an image file into a new directory; the directory is whole or not there.

    Args:
      model: a model directory.
      texts: phrases; or else
      id_lines: phrases as token ids, such as "0 5 2".
      out: the directory to make.

    Returns:
      A line of text for each phrase: its area, predicted IoU, colour and file.

    Raises:
      UserError: any of these cannot be used.
    """
    if bool(texts) == bool(id_lines):
        found = "both" if texts else "neither"
        raise UserError(f"expected phrases by --text or by --text_ids, found {found}")
    text_ids = [_parse_ids(line) for line in id_lines]
    try:
        with new_directory(out, name="--out") as directory:
            pixels = image_input.read_image(image)
            predictor = Predictor.load(model, dtype=dtype)
            ids = predictor.token_ids(texts or None, text_ids or None)
            return list(write_prediction(predictor, pixels, texts or id_lines, ids, directory))
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from None


def write_prediction(
    predictor: Predictor,
    image: UInt8[np.ndarray, "h w 3"],
    phrases: Sequence[str],
    ids: Sequence[Sequence[int]],
    directory: Path,
) -> Iterator[str]:
    """Writes a mask PNG (0 or 255) a phrase and `overlay.png`; yields a line of text a phrase.

    One mask at a time is held at the size of the image.
    """
    [decoded] = predictor.decode([Job(image, text_ids=ids)])
    encoded = decoded.image
    digits = len(str(len(phrases) - 1))
    picture = image
    for number, phrase in enumerate(phrases):
        mask = predictor.upsample(encoded, decoded.low_res_logits[number, 0]) > 0
        file = f"{number:0{digits}}_{_file_name(phrase)}.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(directory / file)
        names = list(visualize.COLORS)
        color = names[number % len(names)]
        picture = visualize.overlay(picture, mask, visualize.COLORS[color])
        area = int(mask.sum())
        # repr: a phrase may hold what a terminal would obey.
        yield (
            f"{phrase!r}: {area} pixels ({area / math.prod(encoded.size):.1%}), "
            f"predicted IoU {decoded.iou[number, 0]:.3f}, {color}, {file}"
        )
    Image.fromarray(picture).save(directory / "overlay.png")


def _file_name(phrase: str) -> str:
    """Lower-case letters and digits of a phrase: safe on every disk, never empty."""
    words = re.findall(r"[a-z0-9]+", phrase.lower())
    return "_".join(words)[:40].rstrip("_") or "phrase"


def _parse_ids(line: str) -> list[int]:
    try:
        return [int(number) for number in line.split()]
    except ValueError:
        raise UserError(f'--text_ids: expected numbers such as "0 5 2", found {line!r}') from None


if __name__ == "__main__":
    define_flags()
    run_app(main)
