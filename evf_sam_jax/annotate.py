"""The command that makes masks of boxes, such as those of Objects365 that EVF-SAM is trained on.

    python -m convert sam2 sam2_hiera_large.pt foundations/sam2_hiera_large
    python -m evf_sam_jax.annotate --model foundations/sam2_hiera_large \\
        --boxes DATA/Object365/raw/Objects365_v1/2019-08-02/objects365_train.json \\
        --images DATA/Object365/raw/Objects365_v1/2019-08-02/train \\
        --out DATA/Object365/raw/Objects365_v1/2019-08-02/o365_res_instances.json

The model is a segmenter, alone or in a whole model, and each box is a prompt that it draws one mask
for. As in the paper, only objects that are alone of their category in their image get one, unless
`--filter=false`. The new file is the old one, with the annotations that have got a mask in
`segmentation`; their `bbox` and `area` stay those of the box.

Started again after whatever has ended it, the command goes on from `OUT.parts`, and the file is the
same to the byte, provided that the device is of the same kind. Only one command at a time may write
to it. Exit code 0: all is there; 1: some images could not be read, which are listed and left out;
started again, the command tries them anew; 2: there is no new file.

Reference: EVF-SAM's paper, appendix A.2: SAM 2, prompted with the annotated boxes, made 1.8 million
masks on 524,000 of the 600,000 images of Objects365, which has 10 million boxes.

Differences: what the paper does not say: a box without area, or whose mask is empty, is left out.
"""

import collections
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from data_pipelines.image_input import read_image
from data_pipelines.record_files import file_sha256
from data_pipelines.segmentations import encode_mask
from evf_sam_jax import compilation_cache
from evf_sam_jax.annotation.boxes import BoxedImage, BoxFile, read_boxes, with_mask, write_masks
from evf_sam_jax.annotation.parts import GroupMasks, Parts
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.evaluation.loading import fingerprint
from evf_sam_jax.model_dir import read_manifest
from evf_sam_jax.output_directory import require_absent
from evf_sam_jax.predictor import PHRASE_BUCKETS, InputImage, Job, Predictor

EMPTY = "boxes whose mask is empty"
UNREADABLE = "boxes of images that cannot be read"
BATCH_SIZE, THREADS = 8, 2

Group = Sequence[BoxedImage]
# An image for the model, or why there is none.
Read = InputImage | str


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command is asked.

    Attributes:
      model: a model directory with a segmenter.
      boxes: a COCO json.
      images: the folder that its file names are relative to.
      out: the COCO json to write.
      only_alone: whether a category that an image has several instances of is left out there.
      dtype: "float32" or "bfloat16".
      batch_size: images encoded at a time, and held with their features.
      threads: that read images ahead.
    """

    model: str | os.PathLike
    boxes: str | os.PathLike
    images: str | os.PathLike
    out: str | os.PathLike
    only_alone: bool = True
    dtype: str = "float32"
    batch_size: int = BATCH_SIZE
    threads: int = THREADS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What has been made.

    Attributes:
      masks: how many.
      images: that have masks.
      left_out: how many annotations have none, by reason.
      failures: a sentence for each image that could not be read.
    """

    masks: int
    images: int
    left_out: Mapping[str, int]
    failures: tuple[str, ...]


def annotate(request: Request) -> Outcome:
    """Makes a COCO json with masks, which is there as a whole or not at all.

    Raises:
      UserError: the request, the boxes or the model cannot be used, what an earlier job left is of
        another model or other boxes, no image can be read, or nothing can be written.
    """
    out, images = Path(request.out), Path(request.images)
    parts_directory = out.with_name(f"{out.name}.parts")
    if not images.is_dir():
        raise UserError(f"--images: expected a folder, found none at {images}")
    if not parts_directory.exists():
        require_absent(out, "--out")
    read_manifest(request.model)  # before the boxes, which take longer
    boxes = read_boxes(request.boxes, request.only_alone)
    predictor = Predictor.load_segmenter(request.model, request.dtype)
    job = {
        "filter": request.only_alone,
        "dtype": request.dtype,
        "batch_size": request.batch_size,
        "boxes": file_sha256(Path(request.boxes)),
        "model": fingerprint(predictor.config, predictor.params),
    }
    try:
        parts = Parts(parts_directory, job)
        try:
            return _annotate(predictor, boxes, parts, request)
        finally:
            parts.close()
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from None


def _annotate(predictor: Predictor, boxes: BoxFile, parts: Parts, request: Request) -> Outcome:
    # Each group is always computed as a whole: beside others, a mask would be rounded otherwise.
    size = request.batch_size
    groups = [boxes.images[i : i + size] for i in range(0, len(boxes.images), size)]
    left = {i: group for i, group in enumerate(groups) if i not in parts.finished}
    total, to_do = len(boxes.images), sum(map(len, left.values()))
    if to_do < total:
        print(f"{parts.directory}: {total - to_do:,} of {total:,} images have their masks")
    bar = tqdm(total=total, initial=total - to_do, desc="annotating", unit="image", disable=None)
    with bar, ThreadPoolExecutor(request.threads) as pool:
        for number, read in _read_ahead(pool, predictor, left, request):
            parts.append(_group_masks(predictor, number, groups[number], read))
            bar.update(len(read))
    made = _Made(groups, parts, dict(boxes.left_out) | {EMPTY: 0, UNREADABLE: 0})
    write_masks(parts.result, boxes.rest, made.annotations())
    if len(made.failures) == total:
        parts.remove()
        raise UserError(f"none of {total} images could be read: {made.failures[0]}")
    os.replace(parts.result, request.out)
    if not made.failures:
        parts.remove()
    return Outcome(made.masks, made.images, made.left_out, tuple(made.failures))


def _read_ahead(
    pool: ThreadPoolExecutor, predictor: Predictor, groups: Mapping[int, Group], request: Request
) -> Iterator[tuple[int, list[Read]]]:
    """Reads the images of groups, of one more than is computed."""
    waiting: collections.deque[tuple[int, list[Future[Read]]]] = collections.deque()

    def first() -> tuple[int, list[Read]]:
        number, futures = waiting.popleft()
        return number, [future.result() for future in futures]

    for number, group in groups.items():
        waiting.append((number, [pool.submit(_read, predictor, one, request) for one in group]))
        if len(waiting) > 1:
            yield first()
    while waiting:
        yield first()


def _read(predictor: Predictor, image: BoxedImage, request: Request) -> Read:
    path = Path(request.images) / image.file_name
    try:
        pixels = read_image(path)
    except UserError as error:
        return str(error)
    height, width = pixels.shape[:2]
    if (height, width) != (image.height, image.width):
        expected = f"{image.width} x {image.height} pixels as {request.boxes} says"
        return f"{path}: expected {expected}, found {width} x {height}"
    return predictor.prepare_image(pixels)


def _group_masks(
    predictor: Predictor, number: int, group: Group, read: Sequence[Read]
) -> GroupMasks:
    """Makes the masks of a group's images, of some boxes at a time."""
    ready = {i: one for i, one in enumerate(read) if isinstance(one, InputImage)}
    encoded = dict(zip(ready, predictor.encode_batch(list(ready.values())), strict=True))
    asked = [(i, box) for i in ready for box in group[i].boxes]
    made: dict[int, list[str | None]] = {i: [] for i in ready}
    for start in range(0, len(asked), PHRASE_BUCKETS[-1]):
        chunk = asked[start : start + PHRASE_BUCKETS[-1]]
        jobs = [Job(encoded[i], boxes=[box]) for i, box in chunk]
        for (i, _), decoded in zip(chunk, predictor.decode(jobs), strict=True):
            mask = predictor.upsample(decoded.image, decoded.low_res_logits[0, 0]) > 0
            made[i].append(encode_mask(mask).decode("ascii") if mask.any() else "")
    counts = [made.get(i, [None] * len(image.annotations)) for i, image in enumerate(group)]
    failures = tuple(one for one in read if isinstance(one, str))
    return GroupMasks(number, tuple(one for of_image in counts for one in of_image), failures)


class _Made:
    """The annotations with masks, one after the other, counted as they are taken."""

    def __init__(self, groups: Sequence[Group], parts: Parts, left_out: dict[str, int]):
        self._groups, self._parts = groups, parts
        self.left_out = left_out
        self.masks = self.images = 0
        self.failures: list[str] = []

    def annotations(self) -> Iterator[dict[str, Any]]:
        for number, group in enumerate(self._groups):
            masks = self._parts.read(number)
            self.failures += masks.failures
            counts = iter(masks.counts)
            for image in group:
                before = self.masks
                for annotation in image.annotations:
                    one = next(counts)
                    if one:
                        self.masks += 1
                        yield with_mask(annotation, image, one)
                    else:
                        self.left_out[UNREADABLE if one is None else EMPTY] += 1
                self.images += self.masks > before


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    compilation_cache.define_flag()
    flags.DEFINE_string("model", None, "The model directory: a segmenter such as SAM 2.")
    flags.DEFINE_string("boxes", None, "A COCO JSON with boxes.")
    flags.DEFINE_string("images", None, "The folder of its images.")
    flags.DEFINE_string("out", None, "The COCO JSON to write, the same with masks.")
    flags.DEFINE_bool(
        "filter", True, "Only objects that are alone of their category in their image get a mask."
    )
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "float32: exact; bfloat16: half the memory."
    )
    flags.DEFINE_integer("batch_size", BATCH_SIZE, "Images encoded at a time.", lower_bound=1)
    flags.DEFINE_integer("threads", THREADS, "Threads that read images ahead.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Checks the flags, makes the masks, and prints how many; lists images that have none."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    for name in ("model", "boxes", "images", "out"):
        if not options[name].value:
            raise UserError(f"--{name}: expected a path, found nothing")
    request = Request(
        model=options.model,
        boxes=options.boxes,
        images=options.images,
        out=options.out,
        only_alone=options.filter,
        dtype=options.dtype,
        batch_size=options.batch_size,
        threads=options.threads,
    )
    compilation_cache.keep_compiled()
    outcome = annotate(request)
    print(f"{outcome.masks:,} masks of {outcome.images:,} images")
    for reason, count in outcome.left_out.items():
        if count:
            print(f"left out: {count:,} {reason}")
    print(f"written to {options.out}")
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if outcome.failures:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    run_app(main)
