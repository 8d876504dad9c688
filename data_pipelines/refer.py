"""RefCOCO, RefCOCO+, RefCOCOg, RefCLEF and gRefCOCO, as their publishers' files hold them.

Reference: hustvl/EVF-SAM at 9935dc5, utils/refer.py, utils/grefer.py and
utils/refer_seg_dataset.py:140-215.

Differences: pickles run no code; a segmentation that is empty or covers no pixel is reported, and
its object has an empty mask, as in the original; so is an ill-formed part of one, which is left
out; a ref of several objects (gRefCOCO) is their union; images may also have the names of
train2017; a split that the file does not hold is an error.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.coco_json import (
    CocoFile,
    CocoImage,
    Id,
    PresentFiles,
    missing_image,
    read_coco,
    read_json,
)
from data_pipelines.dataset import Dataset
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.restricted_pickle import load_plain_pickle
from data_pipelines.segmentations import encode_drawable_parts
from evf_sam_jax.errors import UserError

COCO_IMAGES = (
    "refer_seg/images/mscoco/images/train2014",
    "refer_seg/images/mscoco/images/train2017",
)
CLEF_IMAGES = ("refer_seg/images/saiapr_tc-12",)
NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class _Form:
    """One set of refs.

    Attributes:
      folder: below `refer_seg`.
      refs: the file's name, and another that it may have instead.
      image_folders: of which one at least must be there.
      image_set: what image ids begin with.
    """

    name: str
    folder: str
    refs: tuple[str, ...]
    image_folders: tuple[str, ...] = COCO_IMAGES
    image_set: str = "coco"

    def folder_of(self, root: Path) -> Path:
        return root / "refer_seg" / self.folder

    def refs_file(self, root: Path) -> Path:
        paths = [self.folder_of(root) / name for name in self.refs]
        return next((path for path in paths if path.exists()), paths[0])

    def inputs(self, root: Path, split: str) -> tuple[Path, ...]:
        folders = [root / folder for folder in self.image_folders]
        present = [folder for folder in folders if folder.exists()] or folders[:1]
        return (self.folder_of(root) / "instances.json", self.refs_file(root), *present)


def has_split(split: str, of_ref: str) -> bool:
    """Whether a ref belongs to a split, by the rule of the publishers' reader.

    The "split" of a RefCLEF ref may name several: "testAB" is in testA and in testB; "test" is in
    whatever has it in its name.
    """
    if split in ("testA", "testB", "testC"):
        return split[-1] in of_ref
    return split in of_ref if split == "test" else split == of_ref


def _load(form: _Form, root: Path, split: str) -> Iterator[AnnotatedImage | Problem]:
    coco = read_coco(form.folder_of(root) / "instances.json")
    refs = _refs_of_split(form.refs_file(root), split)
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for ref in refs:
        by_image.setdefault(ref["image_id"], []).append(ref)
    images = {image.coco_id: image for image in coco.images}
    annotations = {one["id"]: one for image in coco.images for one in image.annotations}
    present = PresentFiles(root)
    for image_id in sorted(by_image, key=lambda key: (isinstance(key, str), key)):
        where = f"{form.refs_file(root)}: ref {by_image[image_id][0]['ref_id']}"
        if image_id not in images:
            raise UserError(
                f"{where}: expected an image of {coco.path.name}, found image_id {image_id!r}"
            )
        image = images[image_id]
        names = [f"{folder}/{name}" for folder in form.image_folders for name in _names(image)]
        file = next((name for name in names if name in present), None)
        if file is None:
            for ref in by_image[image_id]:
                yield missing_image(f"{form.refs_file(root)}: ref {ref['ref_id']}", names[0])
            continue
        targets = []
        for ref in by_image[image_id]:
            target, problems = _target(form.refs_file(root), ref, image, coco, annotations)
            targets.append(target)
            yield from problems
        image_id = f"{form.image_set}/{image_id}"
        yield AnnotatedImage(image_id, file, image.height, image.width, tuple(targets))


def _names(image: CocoImage) -> tuple[str, str]:
    """The image's name, and what it is called in COCO's releases since 2017."""
    return image.file_name, image.file_name.removeprefix("COCO_train2014_")


def _target(
    path: Path,
    ref: Mapping[str, Any],
    image: CocoImage,
    coco: CocoFile,
    annotations: Mapping[Any, Mapping[str, Any]],
) -> tuple[Target, list[Problem]]:
    ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    where = f"{path}: ref {ref['ref_id']}"
    parts: list[bytes] = []
    names: list[str] = []
    problems = []
    for ann_id in ids:
        if ann_id == NO_TARGET:
            continue
        if not isinstance(ann_id, Id) or ann_id not in annotations:
            raise UserError(
                f"{where}: expected an annotation of {coco.path.name}, found ann_id {ann_id!r}"
            )
        annotation = annotations[ann_id]
        names.append(coco.category(annotation))
        if annotation["image_id"] != image.coco_id:
            found = f"one of image {annotation['image_id']}"
            problems.append(Problem(where, f"expected an annotation of its image, found {found}"))
        found = annotation.get("segmentation")
        drawn, wrong = encode_drawable_parts(found, image.height, image.width)
        parts += drawn
        problems += [Problem(coco.where(annotation), what) for what in wrong]
    category = "+".join(sorted(set(names)))
    phrases = tuple(sentence["sent"] for sentence in ref["sentences"])
    return Target(str(ref["ref_id"]), phrases, tuple(parts), category), problems


def _refs_of_split(path: Path, split: str) -> list[Mapping[str, Any]]:
    refs = read_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(refs, list):
        raise UserError(f"{path}: expected a list of refs, found {type(refs).__name__}")
    for i, ref in enumerate(refs):
        _check_ref(f"{path}: ref number {i}", ref)
    chosen = [ref for ref in refs if has_split(split, ref["split"])]
    if not chosen:
        found = ", ".join(sorted({ref["split"] for ref in refs})) or "none"
        raise UserError(f"{path}: expected refs of the split {split}, found those of {found}")
    return chosen


def _check_ref(where: str, ref: Any) -> None:
    """Raises UserError if a ref lacks what is read of it."""
    kinds = {"ref_id": Id, "ann_id": Id | list, "image_id": Id, "split": str}
    for key, kind in {**kinds, "sentences": list}.items():
        if not isinstance(ref, dict) or not isinstance(ref.get(key), kind):
            found = repr(ref.get(key))[:40] if isinstance(ref, dict) else type(ref).__name__
            raise UserError(f"{where}: expected a ref with the key {key!r}, found {found}")
    for sentence in ref["sentences"]:
        if not isinstance(sentence, dict) or not isinstance(sentence.get("sent"), str):
            raise UserError(f"{where}: expected sentences with the key 'sent', found others")


# Refs and images of each split, as tensorflow_datasets 4.9.10 lists them
# (datasets/ref_coco/README.md). Of RefCLEF and gRefCOCO no counts are at hand.
PUBLISHED = {
    name: {split: {"targets": refs, "images": images} for split, refs, images in splits}
    for name, splits in {
        "refcoco": (
            ("train", 42_404, 16_994),
            ("val", 3_811, 1_500),
            ("testA", 1_975, 750),
            ("testB", 1_810, 750),
        ),
        "refcoco_google": (
            ("train", 40_000, 19_213),
            ("val", 5_000, 4_559),
            ("test", 5_000, 4_527),
        ),
        "refcoco+": (
            ("train", 42_278, 16_992),
            ("val", 3_805, 1_500),
            ("testA", 1_975, 750),
            ("testB", 1_798, 750),
        ),
        "refcocog": (("train", 42_226, 21_899), ("val", 2_573, 1_300), ("test", 5_023, 2_600)),
        "refcocog_google": (("train", 44_822, 24_698), ("val", 5_000, 4_650)),
    }.items()
}


def _dataset(form: _Form, splits: tuple[str, ...]) -> Dataset:
    refs = " or ".join(form.refs)
    folders = " or ".join(form.image_folders)
    names = "<image>.jpg"
    if form.image_folders == COCO_IMAGES:
        names = "COCO_train2014_<12 digits>.jpg, or <12 digits>.jpg, in either folder"
    return Dataset(
        form.name,
        splits,
        f"  refer_seg/{form.folder}/instances.json\n"
        f"  refer_seg/{form.folder}/{refs}\n"
        f"  {folders}/\n"
        f"    {names}",
        inputs=form.inputs,
        load=functools.partial(_load, form),
        published=PUBLISHED.get(form.name, {}),
    )


_TEST_AB = ("train", "val", "testA", "testB")
_TEST = ("train", "val", "test")

DATASETS = (
    _dataset(_Form("refcoco", "refcoco", ("refs(unc).p",)), _TEST_AB),
    _dataset(_Form("refcoco_google", "refcoco", ("refs(google).p",)), _TEST),
    _dataset(_Form("refcoco+", "refcoco+", ("refs(unc).p",)), _TEST_AB),
    _dataset(_Form("refcocog", "refcocog", ("refs(umd).p",)), _TEST),
    _dataset(_Form("refcocog_google", "refcocog", ("refs(google).p",)), ("train", "val")),
    _dataset(
        _Form("refclef", "refclef", ("refs(unc).p",), CLEF_IMAGES, "saiapr"),
        (*_TEST_AB, "testC"),
    ),
    _dataset(
        _Form("refclef_berkeley", "refclef", ("refs(berkeley).p",), CLEF_IMAGES, "saiapr"),
        _TEST,
    ),
    _dataset(
        _Form("grefcoco", "grefcoco", ("grefs(unc).p", "grefs(unc).json")),
        _TEST_AB,
    ),
)
