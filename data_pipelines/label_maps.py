"""ADE20K, Mapillary Vistas and HumanParsing: a class for every pixel, in PNG files.

Each class that an image has is one target, and its name the phrase.

Reference: hustvl/EVF-SAM at 9935dc5, utils/ade20k_dataset.py and utils/humanparsing_dataset.py;
Mapillary Vistas as utils/sem_seg_dataset.py before 9d00853 reads it.

Differences: the indices of a palette PNG are read (the original reads the brightness of its
colours); pixels without a label can be left out (`ignore_unlabelled`), the original takes them for
background; ADE20K's validation images come in their order, not at random.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from PIL import Image
from tqdm import tqdm

from data_pipelines.ade20k_classes import CLASSES
from data_pipelines.coco_json import PresentFiles, missing_image, read_json
from data_pipelines.dataset import Dataset
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.segmentations import encode_mask
from data_pipelines.source import SEMANTIC_PREFIX, ReadingRules
from evf_sam_jax.errors import UserError

# Right and left as the viewer sees them, as in RefCOCO: the labels' own names are the person's.
HUMAN_PARSING_CLASSES = (
    "background, hat, hair, sunglasses, upper clothes, skirt, pants, dress, belt, right shoe, "
    "left shoe, face, right leg, left leg, right arm, left arm, bag, scarf"
).split(", ")

_IN_ONE_PROCESS = 200  # label maps up to which starting others takes longer


@dataclasses.dataclass(frozen=True)
class _Form:
    """Where a data set's files are.

    Attributes:
      labels: split to the folder of label maps, below the root.
      photos: split to the folder of images.
      names: the file that holds the classes' names, which may be missing where `classes` is given.
      classes: the root to name by label; labels without a name count as unlabelled.
    """

    name: str
    labels: Mapping[str, str]
    photos: Mapping[str, str]
    classes: Callable[[Path], Mapping[int, str | None]]
    names: str | None = None

    def inputs(self, root: Path, split: str) -> tuple[Path, ...]:
        names = () if self.names is None else (root / self.names,)
        return (*names, root / self.labels[split], root / self.photos[split])


def read_labels(path: Path) -> Integer[np.ndarray, "h w"]:
    """The labels in a grey or a palette PNG.

    Raises:
      UserError: it is no image, or one of colours.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise UserError(f"{path}: expected a grey or a palette PNG, found {image.mode}")
            return np.asarray(image).astype(np.int32)
    except UserError:
        raise
    except Exception as error:  # each decoder raises its own
        raise UserError(f"{path}: expected a whole PNG of labels, found a broken one") from error


def _load(form: _Form, root: Path, split: str) -> Iterator[AnnotatedImage | Problem]:
    classes = form.classes(root)
    folder = root / form.labels[split]
    stems = sorted(path.stem for path in folder.glob("*.png"))
    present = PresentFiles(root)
    photos = {stem: f"{form.photos[split]}/{stem}.jpg" for stem in stems}
    for stem in stems:
        if photos[stem] not in present:
            yield missing_image(f"{folder / stem}.png", photos[stem])
    jobs = [
        _Job(folder / f"{stem}.png", photos[stem], form.name, stem)
        for stem in stems
        if photos[stem] in present
    ]
    annotate = functools.partial(_annotate, classes)
    # Shown on a terminal only.
    progress = functools.partial(tqdm, total=len(jobs), desc=f"{form.name}/{split}", disable=None)
    if len(jobs) <= _IN_ONE_PROCESS:
        yield from progress(map(annotate, jobs))
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        yield from progress(pool.map(annotate, jobs, chunksize=64))


@dataclasses.dataclass(frozen=True)
class _Job:
    labels: Path
    photo: str
    dataset: str
    stem: str


def _annotate(classes: Mapping[int, str | None], job: _Job) -> AnnotatedImage | Problem:
    try:
        labels = read_labels(job.labels)
    except UserError as error:
        return Problem(str(job.labels), str(error).removeprefix(f"{job.labels}: "))
    targets = []
    ignore = np.zeros(labels.shape, bool)
    for label in np.unique(labels).tolist():
        if label not in classes:
            raise UserError(
                f"{job.labels}: expected the {len(classes)} labels of {job.dataset}, found {label}"
            )
        name, inside = classes[label], labels == label
        if name is None:
            ignore |= inside
        else:
            targets.append(Target(f"{job.stem}/{label}", (name,), (encode_mask(inside),), name))
    encoded = encode_mask(ignore) if ignore.any() else b""
    height, width = labels.shape
    image_id = f"{job.dataset}/{job.stem}"
    return AnnotatedImage(image_id, job.photo, height, width, tuple(targets), encoded)


def _ade20k_classes(root: Path) -> dict[int, str | None]:
    path = root / "ade20k" / "ade20k_classes.json"
    names = list(CLASSES)
    if path.exists():
        names = _names(path, "a list of names", read_json(path))
        if len(names) != len(CLASSES):
            raise UserError(f"{path}: expected {len(CLASSES)} names, found {len(names)}")
    # The original takes 0 and 255 for no label.
    return {0: None, **dict(enumerate(names, start=1)), 255: None}


def _mapillary_classes(root: Path) -> dict[int, str | None]:
    path = root / _MAPILLARY_NAMES
    content = read_json(path)
    labels = content.get("labels") if isinstance(content, dict) else None
    if isinstance(labels, list):
        labels = [one.get("readable") if isinstance(one, dict) else None for one in labels]
    names = [name.lower() for name in _names(path, "'labels', each with a 'readable' name", labels)]
    return {label: None if name == "unlabeled" else name for label, name in enumerate(names)}


def _human_parsing_classes(root: Path) -> dict[int, str | None]:
    return dict(enumerate(HUMAN_PARSING_CLASSES))


def _names(path: Path, expected: str, found: object) -> list[str]:
    """`found`, if it is a list of one name or more. Raises UserError otherwise."""
    if not isinstance(found, list) or not found:
        what = "an empty list" if found == [] else "none" if found is None else type(found).__name__
        raise UserError(f"{path}: expected {expected}, found {what}")
    for place, name in enumerate(found):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: expected {expected}, found {name!r} at place {place}")
    return found


def _dataset(form: _Form, prefix: str, published: Mapping[str, Mapping[str, int]]) -> Dataset:
    folders = itertools.chain.from_iterable(
        (f"  {form.photos[split]}/<image>.jpg", f"  {form.labels[split]}/<image>.png")
        for split in form.labels
    )
    names = [f"  {form.names}"] if form.names else []
    return Dataset(
        form.name,
        tuple(form.labels),
        "\n".join((*names, *folders)),
        inputs=form.inputs,
        load=functools.partial(_load, form),
        train_rules=ReadingRules(prefix=prefix),
        eval_rules=ReadingRules(prefix=prefix, text="lower"),
        published=published,
    )


_MAPILLARY_NAMES = "mapillary/config_v2.0.json"
_FOLDERS = {"train": "training", "val": "validation"}

DATASETS = (
    _dataset(
        _Form(
            "ade20k",
            {split: f"ade20k/annotations/{folder}" for split, folder in _FOLDERS.items()},
            {split: f"ade20k/images/{folder}" for split, folder in _FOLDERS.items()},
            _ade20k_classes,
        ),
        SEMANTIC_PREFIX,
        {},
    ),
    _dataset(
        _Form(
            "mapillary",
            {split: f"mapillary/{folder}/v2.0/labels" for split, folder in _FOLDERS.items()},
            {split: f"mapillary/{folder}/images" for split, folder in _FOLDERS.items()},
            _mapillary_classes,
            _MAPILLARY_NAMES,
        ),
        "",
        {},
    ),
    _dataset(
        _Form(
            "human_parsing",
            {"train": "humanparsing/SegmentationClassAug"},
            {"train": "humanparsing/JPEGImages"},
            _human_parsing_classes,
        ),
        SEMANTIC_PREFIX,
        {"train": {"images": 17_706}},
    ),
)
