"""The command that predicts: images and phrases in; masks, overlays and a COCO JSON out.

    python -m evf_sam_jax.predict --model DIR --image cat.jpg --text "the cat on the left" --out out
    python -m evf_sam_jax.predict --model DIR --image photos --image 'more/*.png' --text cat --out o
    python -m evf_sam_jax.predict --model DIR --jobs jobs.jsonl --out out

Of one image, its files are in the output directory itself; of more, each has a directory of its
own. `predictions.json` has all masks. Exit code 0: all is there; 1: some images could not be
predicted, which are listed; 2: none, and there is no output directory.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Bool, UInt8
from PIL import Image
from pycocotools import mask as coco
from tqdm import tqdm

from data_pipelines import image_input
from data_pipelines.segmentations import encode_mask
from data_pipelines.source import SEMANTIC_PREFIX
from evf_sam_jax import compilation_cache, visualize
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.models.quantized import CHOICES as INT8_CHOICES
from evf_sam_jax.output_directory import new_directory
from evf_sam_jax.prediction_jobs import FileJob, image_files, read_jobs, with_prefix
from evf_sam_jax.predictor import (
    NO_TARGET_PIXELS,
    DecodedJob,
    InputImage,
    Job,
    Predictor,
    PreparedJob,
)

IMAGES_AT_A_TIME = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command is asked.

    Attributes:
      model: a model directory.
      out: the directory to make.
      images: paths, folders and patterns of image files; or else
      jobs: a JSON lines file, see `prediction_jobs`.
      texts: phrases asked of every image; or else
      id_lines: phrases as token ids, such as "0 5 2".
      dtype: "float32" or "bfloat16".
      int8: as of `Predictor.load`.
      semantic: whether phrases are names of classes, which `[semantic] ` is put before.
      multimask: three alternatives a prompt.
      no_target_pixels: a mask of fewer positive pixels is said to have no target.
    """

    model: str | os.PathLike
    out: str | os.PathLike
    images: tuple[str, ...] = ()
    jobs: str | os.PathLike | None = None
    texts: tuple[str, ...] = ()
    id_lines: tuple[str, ...] = ()
    dtype: str = "float32"
    int8: str = ""
    semantic: bool = False
    multimask: bool = False
    no_target_pixels: int = NO_TARGET_PIXELS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What has been predicted: a line a mask, and a sentence a job that could not be."""

    lines: tuple[str, ...]
    failures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MaskFile:
    """A mask that has been written.

    Attributes:
      line: its phrase, area, predicted IoU, colour and file, for the user.
      annotation: the same in COCO's format, with the mask; without ids.
    """

    line: str
    annotation: dict[str, Any]


def read_request(request: Request) -> tuple[list[FileJob], bool]:
    """Returns the jobs of a request, and whether it is about one image file only.

    Raises:
      UserError: what is asked is missing, there twice, or cannot be read.
    """
    if bool(request.images) == bool(request.jobs):
        found = "both" if request.jobs else "neither"
        raise UserError(f"expected images by --image or by --jobs, found {found}")
    if request.jobs:
        if request.texts or request.id_lines:
            raise UserError("--jobs: expected phrases in its lines, found --text or --text_ids too")
        return [_semantic(job, request.semantic) for job in read_jobs(request.jobs)], False
    if bool(request.texts) == bool(request.id_lines):
        found = "both" if request.texts else "neither"
        raise UserError(f"expected phrases by --text or by --text_ids, found {found}")
    text_ids = tuple(_parse_ids(line) for line in request.id_lines)
    files = image_files(request.images)
    jobs = [FileJob(str(file), file, request.texts, text_ids) for file in files]
    alone = len(request.images) == 1 and files == [Path(request.images[0])]
    return [_semantic(job, request.semantic) for job in jobs], alone


def predict_files(request: Request) -> Outcome:
    """Predicts what is asked into a new directory, which is there as a whole or not at all.

    An image that cannot be predicted is left out, unless there is no other.

    Raises:
      UserError: the request, the model or the output directory cannot be used, or nothing can be
        predicted.
    """
    jobs, alone = read_request(request)
    results = CocoResults()
    try:
        with new_directory(request.out, name="--out") as directory:
            if alone:  # before the model, which takes longer
                pixels = image_input.read_image(jobs[0].image)
            predictor = Predictor.load(request.model, dtype=request.dtype, int8=request.int8)
            _check_phrases(predictor, jobs, request.semantic)
            if alone:
                prepared = _prepare(predictor, predictor.prepare_image(pixels), jobs[0], request)
                [decoded] = predictor.decode([prepared])
                names = jobs[0].names
                masks = list(write_masks(predictor, decoded, pixels, names, directory))
                results.add(jobs[0].image, decoded.image.size, masks)
                lines, failures = [mask.line for mask in masks], []
            else:
                lines, failures = _predict_many(predictor, jobs, request, directory, results)
            (directory / "predictions.json").write_text(json.dumps(results.to_dict()))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out: cannot write {request.out}: {reason}") from None
    return Outcome(tuple(lines), tuple(failures))


def _predict_many(
    predictor: Predictor,
    jobs: Sequence[FileJob],
    request: Request,
    directory: Path,
    results: "CocoResults",
) -> tuple[list[str], list[str]]:
    lines: list[str] = []
    failures: list[str] = []
    folders: set[str] = set()
    with tqdm(total=len(jobs), desc="predicting", unit="image", disable=None) as progress:
        ready = _prepared(predictor, jobs, request, failures, progress.update)
        while group := list(itertools.islice(ready, IMAGES_AT_A_TIME)):
            for one, decoded in zip(
                group, predictor.decode([one.prepared for one in group]), strict=True
            ):
                folder = _new_name(_file_name(one.job.image.stem, "image"), folders)
                (directory / folder).mkdir()
                where = directory / folder, f"{folder}/"
                names = one.job.names
                masks = list(write_masks(predictor, decoded, one.pixels, names, *where))
                lines += [mask.line for mask in masks]
                results.add(one.job.image, decoded.image.size, masks)
                progress.update()
    if not results.images:
        words = f"none of {len(jobs)} images could be predicted: " if len(jobs) > 1 else ""
        raise UserError(words + failures[0])
    return lines, failures


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A job with its image in memory."""

    job: FileJob
    pixels: UInt8[np.ndarray, "h w 3"]
    prepared: PreparedJob


def _prepared(
    predictor: Predictor,
    jobs: Iterable[FileJob],
    request: Request,
    failures: list[str],
    failed: Callable[[], object],
) -> Iterator[_Ready]:
    """Reads the image of each job (once where jobs in a row share it) and checks what is asked."""
    path = pixels = image = None
    for job in jobs:
        try:
            if pixels is None or image is None or path != job.image:
                path, pixels = None, image_input.read_image(job.image)
                path, image = job.image, predictor.prepare_image(pixels)
            prepared = _prepare(predictor, image, job, request)
        except UserError as error:
            named = str(error).startswith(str(job.image)) and job.where == str(job.image)
            failures.append(str(error) if named else f"{job.where}: {error}")
            failed()
            continue
        yield _Ready(job, pixels, prepared)


def _prepare(
    predictor: Predictor, image: InputImage, job: FileJob, request: Request
) -> PreparedJob:
    return predictor.prepare(
        Job(
            image,
            **job.arguments(),
            multimask=request.multimask,
            no_target_pixels=request.no_target_pixels,
        )
    )


def write_masks(
    predictor: Predictor,
    decoded: DecodedJob,
    image: UInt8[np.ndarray, "h w 3"],
    names: Sequence[str],
    directory: Path,
    prefix: str = "",
) -> Iterator[MaskFile]:
    """Writes a PNG (0 or 255) a mask, and `overlay.png` of each prompt's mask; yields the masks.

    Of several masks a prompt, the overlay shows that of the highest predicted IoU. One mask at a
    time is held at the size of the image.

    Args:
      names: what each prompt is called, such as its phrase.
      prefix: what a file is called before its name.
    """
    digits = len(str(len(names) - 1))
    picture = image
    for number, name in enumerate(names):
        best = int(decoded.iou[number].argmax())
        color = list(visualize.COLORS)[number % len(visualize.COLORS)]
        for i, low_res_logits in enumerate(decoded.low_res_logits[number]):
            mask = predictor.upsample(decoded.image, low_res_logits) > 0
            suffix = f"_{i}" if decoded.multimask else ""
            file = f"{number:0{digits}}_{_file_name(name)}{suffix}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(directory / file)
            if i == best:
                picture = visualize.overlay(picture, mask, visualize.COLORS[color])
            yield _mask_file(
                name,
                mask,
                float(decoded.iou[number, i]),
                color,
                prefix + file,
                decoded.no_target_pixels,
            )
    Image.fromarray(picture).save(directory / "overlay.png")


def _mask_file(
    name: str,
    mask: Bool[np.ndarray, "h w"],
    iou: float,
    color: str,
    file: str,
    no_target_pixels: int,
) -> MaskFile:
    area = int(mask.sum())
    no_target = area < no_target_pixels
    # repr: a phrase may hold what a terminal would obey.
    line = (
        f"{name!r}: {area} pixels ({area / mask.size:.1%}), "
        f"predicted IoU {iou:.3f}, {color}, {file}"
    )
    run_lengths: Any = {"size": list(mask.shape), "counts": encode_mask(mask).decode("ascii")}
    annotation = {
        "segmentation": run_lengths,
        "area": area,
        "bbox": coco.toBbox(run_lengths).tolist(),
        "iscrowd": 0,
        "phrase": name,
        "predicted_iou": round(iou, 4) if math.isfinite(iou) else None,
        "no_target": no_target,
        "file": file,
    }
    return MaskFile(line + (", no target" if no_target else ""), annotation)


class CocoResults:
    """Predictions as a data set in COCO's format, which `pycocotools.coco.COCO` opens.

    Each annotation also has its phrase, the predicted IoU, whether it has no target, and its PNG.
    """

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self._image_ids: dict[Path, int] = {}

    def add(self, image: Path, size: tuple[int, int], masks: Sequence[MaskFile]) -> None:
        """Adds masks of an image, of height and width `size`."""
        if image not in self._image_ids:
            self._image_ids[image] = len(self.images) + 1
            entry = {"id": len(self.images) + 1, "file_name": str(image)}
            self.images.append(entry | {"height": size[0], "width": size[1]})
        for mask in masks:
            ids = {"id": len(self.annotations) + 1, "image_id": self._image_ids[image]}
            self.annotations.append(ids | {"category_id": 1} | mask.annotation)

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "info": {"description": "predicted by evf_sam_jax"},
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": 1, "name": "what the phrase refers to"}],
        }


def _semantic(job: FileJob, semantic: bool) -> FileJob:
    if semantic and job.text_ids:
        raise UserError("--semantic: expected phrases as text, found token ids")
    return with_prefix(job, SEMANTIC_PREFIX) if semantic else job


def _check_phrases(predictor: Predictor, jobs: Sequence[FileJob], semantic: bool) -> None:
    """Raises UserError before anything is predicted where no job could be, or all would be wrong.

    Phrases of `--text` are asked of every image, so they are checked once; those of a line are its
    own, and fail with it.
    """
    with_texts = [job for job in jobs if job.texts]
    if with_texts and predictor.tokenizer is None:
        predictor.token_ids(texts=with_texts[0].texts)  # says so
    if semantic and predictor.tokenizer is not None:
        # One token, and none of the words: <s>, [semantic], </s>.
        if len(predictor.tokenizer.encode(SEMANTIC_PREFIX.strip())) != 3:
            raise UserError(
                "--semantic: expected a model whose tokenizer knows [semantic], such as "
                "evf-sam-multitask, found one that spells it out"
            )
    first = jobs[0]
    if all((job.texts, job.text_ids) == (first.texts, first.text_ids) for job in jobs):
        if first.texts or first.text_ids:
            predictor.token_ids(first.texts or None, first.text_ids or None)


def _new_name(name: str, taken: set[str]) -> str:
    """`name`, or with the first number behind it that nobody has; it is taken then."""
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    new = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(new)
    return new


def _file_name(phrase: str, otherwise: str = "phrase") -> str:
    """Lower-case letters and digits of a phrase: safe on every disk, never empty."""
    words = re.findall(r"[a-z0-9]+", phrase.lower())
    return "_".join(words)[:40].rstrip("_") or otherwise


def _parse_ids(line: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in line.split())
    except ValueError:
        raise UserError(f'--text_ids: expected numbers such as "0 5 2", found {line!r}') from None


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    compilation_cache.define_flag()
    flags.DEFINE_string("model", None, "The model directory.")
    flags.DEFINE_multi_string(
        "image", [], "An image file, a folder, or a pattern such as '*.jpg'; may be given again."
    )
    flags.DEFINE_string(
        "jobs", None, 'JSON lines instead of images and phrases: {"image": "a.jpg", "text": "dog"}.'
    )
    flags.DEFINE_multi_string("text", [], "A phrase; give it again for more phrases.")
    flags.DEFINE_multi_string(
        "text_ids", [], 'A phrase as token ids, "0 5 2"; for models without a tokenizer.'
    )
    flags.DEFINE_string("out", None, "The directory to make, for masks, overlays and a COCO JSON.")
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "float32: exact; bfloat16: half the memory."
    )
    flags.DEFINE_enum(
        "int8",
        "",
        ["", *INT8_CHOICES],
        "Linear layers in 8 bits, their inputs too or not; needs the extra int8.",
    )
    flags.DEFINE_bool(
        "semantic", False, "Phrases are names of classes: '[semantic] ' is put before them."
    )
    flags.DEFINE_bool(
        "multimask", False, "Three alternatives a prompt, as SAM has them; EVF-SAM uses only one."
    )
    flags.DEFINE_integer(
        "no_target_pixels",
        NO_TARGET_PIXELS,
        "Masks of fewer pixels are said to have no target.",
        lower_bound=0,
    )


def main(argv: list[str]) -> None:
    """Checks the flags, predicts, and prints a line a mask; lists what could not be predicted."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    for name in ("model", "out"):
        if not options[name].value:
            raise UserError(f"--{name}: expected a path, found nothing")
    request = Request(
        model=options.model,
        out=options.out,
        images=tuple(options.image),
        jobs=options.jobs,
        texts=tuple(options.text),
        id_lines=tuple(options.text_ids),
        dtype=options.dtype,
        int8=options.int8,
        semantic=options.semantic,
        multimask=options.multimask,
        no_target_pixels=options.no_target_pixels,
    )
    compilation_cache.keep_compiled()
    outcome = predict_files(request)
    print("\n".join(outcome.lines))
    print(f"written to {options.out}")
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if outcome.failures:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    run_app(main)
