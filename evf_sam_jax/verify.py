"""Compares a converted model with the five masks that the authors of EVF-SAM published.

    python -m evf_sam_jax.verify --model DIR --photos ASSETS_DIR

The masks (`published_masks.json`) were recovered from the pictures `*_vis.png` in hustvl/EVF-SAM at
9935dc5, folder `assets`, where the photographs are too; those are not part of this package. Which
checkpoint made them is not stated there, so a model that does not match may still be a right
conversion of another one. Exit code 0: all five match; 1: they do not; 2: not all could be
compared.
"""

import dataclasses
import enum
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Bool

from data_pipelines import image_input, segmentations
from evf_sam_jax import compilation_cache
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.predictor import Predictor

PHOTOS_AT = "https://github.com/hustvl/EVF-SAM/tree/9935dc5/assets"

# The same weights may differ from themselves by rounding (the authors compute in float16, which
# moves logits by some hundredths) and by how the JPEG is decoded. That moves an outline by a small
# fraction of a pixel, so half a pixel all along it is generous, and still less than what tells
# another checkpoint's mask of the same thing. A bound on IoU would be too strict for the small
# masks here, or too lax for the large ones. Chosen by this reasoning; no run with the released
# weights is behind it.
MATCHING_OUTLINE_FRACTION = 0.5
# Two masks below this do not show the same thing; above it, people draw the same thing differently.
SAME_THING_IOU = 0.7


class Verdict(enum.Enum):
    """How a mask compares with the published one."""

    MATCHES = "matches"
    SAME_THING = "same thing, other outline"
    DIFFERS = "does not match"


@dataclasses.dataclass(frozen=True)
class Case:
    """A published mask.

    Attributes:
      image: file name of the photograph.
      image_sha256: of that file as published.
      phrase: what the mask shows.
      mask: at the size of the photograph.
    """

    image: str
    image_sha256: str
    phrase: str
    mask: Bool[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A predicted mask beside the published one.

    Attributes:
      iou: 1 where both are empty.
      differing: pixels that are inside one of them only.
      outline: pixels of the published mask that touch its outside.
    """

    iou: float
    differing: int
    outline: int

    @property
    def verdict(self) -> Verdict:
        """See `MATCHING_OUTLINE_FRACTION` and `SAME_THING_IOU`."""
        if self.differing <= MATCHING_OUTLINE_FRACTION * self.outline:
            return Verdict.MATCHES
        return Verdict.SAME_THING if self.iou >= SAME_THING_IOU else Verdict.DIFFERS


def published_cases() -> tuple[Case, ...]:
    """Returns what the authors published."""
    content = json.loads(Path(__file__).with_name("published_masks.json").read_text())
    return tuple(
        Case(case["image"], case["image_sha256"], case["phrase"], _decode(case["mask_rle"]))
        for case in content["cases"]
    )


def compare(found: Bool[np.ndarray, "h w"], published: Bool[np.ndarray, "h w"]) -> Comparison:
    """Compares two masks of one size."""
    differing = int((found ^ published).sum())
    union = int((found | published).sum())
    padded = np.pad(published, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return Comparison(
        iou=1 - differing / union if union else 1.0,
        differing=differing,
        outline=int((published & ~inner).sum()),
    )


def require_photos(photos: str | os.PathLike, cases: Sequence[Case]) -> None:
    """Raises UserError, with where they come from, unless all photographs are there."""
    missing = [case.image for case in cases if not (Path(photos) / case.image).is_file()]
    if missing:
        raise UserError(
            f"--photos: expected {', '.join(missing)} of {PHOTOS_AT} in {photos}, found none there"
        )


def verify(
    predictor: Predictor, photos: str | os.PathLike, cases: Sequence[Case]
) -> Iterator[tuple[Case, Comparison, bool]]:
    """Yields each case, how the prediction compares, and whether its file is the published one.

    Raises:
      UserError: a photograph cannot be read or has another size than its mask, or the model has no
        tokenizer.
    """
    for case in cases:
        file = Path(photos) / case.image
        image = image_input.read_image(file)
        if image.shape[:2] != case.mask.shape:
            expected, found = (
                f"{width} x {height}" for height, width in (case.mask.shape, image.shape[:2])
            )
            raise UserError(f"{file}: expected {expected} pixels as published, found {found}")
        [mask] = predictor.predict(image, texts=[case.phrase]).masks
        as_published = hashlib.sha256(file.read_bytes()).hexdigest() == case.image_sha256
        yield case, compare(mask, case.mask), as_published


def describe(case: Case, comparison: Comparison, as_published: bool) -> str:
    """Returns a line of text on one case, with a note if the file is not the published one."""
    line = (
        f"{case.image} {case.phrase!r}: IoU {comparison.iou:.4f}, "
        f"{comparison.differing} of {case.mask.size} pixels differ "
        f"(outline {comparison.outline}): {comparison.verdict.value}"
    )
    if as_published:
        return line
    return f"{line}\nnote: {case.image} is not the published file: its sha256 is another"


def summarize(comparisons: Sequence[Comparison]) -> str:
    """Returns the line of text that says how many masks match."""
    verdicts = [comparison.verdict for comparison in comparisons]
    line = f"{verdicts.count(Verdict.MATCHES)} of {len(verdicts)} masks match the published ones"
    if same_thing := verdicts.count(Verdict.SAME_THING):
        line += (
            f", {same_thing} show the same thing with another outline, "
            "as another checkpoint of EVF-SAM may"
        )
    return line


def _decode(run_lengths: dict) -> Bool[np.ndarray, "h w"]:
    height, width = run_lengths["size"]
    parts = segmentations.encode_segmentation(run_lengths, height, width)
    return segmentations.decode_parts(parts, height, width).astype(bool)


# The command line.


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    compilation_cache.define_flag()
    flags.DEFINE_string("model", None, "The model directory.")
    flags.DEFINE_string("photos", None, f"The directory with the photographs of {PHOTOS_AT}.")
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "float32: exact; bfloat16: half the memory."
    )


def main(argv: list[str]) -> None:
    """Checks the flags, predicts, prints a line a photograph and the verdict."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    for name in ("model", "photos"):
        if not options[name].value:
            raise UserError(f"--{name}: expected a directory, found nothing")
    compilation_cache.keep_compiled()
    sys.exit(verify_directory(options.model, options.photos, options.dtype))


def verify_directory(
    model: str | os.PathLike,
    photos: str | os.PathLike,
    dtype: str = "float32",
) -> int:
    """Prints how a model directory compares with the published masks; returns the exit code.

    Raises:
      UserError: the model or the photographs cannot be used.
    """
    published = published_cases()
    require_photos(photos, published)
    predictor = Predictor.load(model, dtype=dtype)
    if predictor.tokenizer is None:
        raise UserError(
            f"{model}: expected a model directory with tokenizer files, found none in it"
        )
    return print_comparison(predictor, photos, published)


def print_comparison(predictor: Predictor, photos: str | os.PathLike, cases: Sequence[Case]) -> int:
    """Prints a line a case as it is compared, then the verdict; returns the exit code."""
    comparisons = []
    for case, comparison, as_published in verify(predictor, photos, cases):
        print(describe(case, comparison, as_published), flush=True)
        comparisons.append(comparison)
    print(summarize(comparisons))
    return 0 if all(one.verdict is Verdict.MATCHES for one in comparisons) else 1


if __name__ == "__main__":
    define_flags()
    run_app(main)
