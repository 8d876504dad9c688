"""Masks of boxes: the right ones, the same after any interruption, and readable as Objects365."""

import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from data_pipelines.objects365 import BOX_FILES, DATASETS, FOLDER, MASK_FILES
from evf_sam_jax import annotate as command_file
from evf_sam_jax.annotate import EMPTY, UNREADABLE, Outcome, Request, annotate
from evf_sam_jax.annotation.boxes import CROWDS, NO_AREA, SEVERAL, clip_box, read_boxes
from evf_sam_jax.annotation.parts import GroupMasks, Parts
from evf_sam_jax.errors import UserError
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax.test_resume import ENVIRONMENT, no_longer_than_this
from tests.evf_sam_jax.tiny_model import (
    CONFIG,
    edited,
    picture,
    write_tiny_model,
    write_tiny_segmenter,
)
from tests.test_architecture import ROOT

SEED = 8  # with random parameters of others, boxes matter less
SIZES = {1: (40, 60), 2: (70, 33), 3: (24, 24), 4: (50, 90)}  # height, width of each image
PERSON, CUP, DOG = 1, 7, 9


def annotation(number: int, image: int, category: int, bbox: list, **more: Any) -> dict[str, Any]:
    x = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": 5.5}
    return x | {"iscrowd": 0, "isfake": 1} | more


# What the filter leaves: 11, 14, 21, 31 and 32. Image 4 has nothing left.
ANNOTATIONS = [
    annotation(31, 3, DOG, [0, 0, 24, 24]),
    annotation(11, 1, PERSON, [5.25, 4, 30, 20.5]),
    annotation(12, 1, CUP, [1, 1, 9, 9]),
    annotation(13, 1, CUP, [20, 10, 9, 9]),
    annotation(14, 1, DOG, [-2, 30, 90, 30]),  # beyond three edges
    annotation(21, 2, CUP, [3, 20, 28, 40]),
    annotation(22, 2, PERSON, [1, 1, 0, 8]),
    annotation(32, 3, CUP, [8, 2, 12, 18]),
    annotation(33, 3, PERSON, [30, 2, 5, 5]),  # beside the image
    annotation(41, 4, PERSON, [1, 2, 30, 30], iscrowd=1),
]
ROUNDED = 0.002  # of an image's pixels
EDGES = {14: [0, 30, 60, 40]}  # what is left of it


def coco_content() -> dict[str, Any]:
    names = {i: f"patch/{i}.png" for i in SIZES}
    images = [
        {"id": i, "file_name": names[i], "height": h, "width": w, "license": None}
        for i, (h, w) in SIZES.items()
    ]
    categories = [
        {"id": i, "name": name} for i, name in ((PERSON, "Person"), (CUP, "Cup é"), (DOG, "Dog"))
    ]
    return {
        "info": {"year": 2019},
        "images": images,
        "annotations": ANNOTATIONS,
        "categories": categories,
        "licenses": [],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_segmenter(tmp_path_factory.mktemp("models") / "sam2", Sam2Config.tiny(), SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`boxes.json` beside the folder of its images; nothing is changed in it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "patch").mkdir()
    for i, size in SIZES.items():
        Image.fromarray(picture(*size, seed=i)).save(folder / "patch" / f"{i}.png")
    (folder / "boxes.json").write_text(json.dumps(coco_content()))
    return folder


def request(model: Path, data: Path, out: Path, **changes: Any) -> Request:
    """Of groups of two images, so that there are several."""
    asked = Request(model, data / "boxes.json", data, out, batch_size=2)
    return dataclasses.replace(asked, **changes)


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a job that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole") / "new" / "masks.json"
    assert annotate(request(model, data, out)) == Outcome(
        masks=5,
        images=3,
        left_out={SEVERAL: 2, CROWDS: 1, NO_AREA: 2, EMPTY: 0, UNREADABLE: 0},
        failures=(),
    )
    assert [file.name for file in out.parent.iterdir()] == ["masks.json"]
    return out


def decoded(entry: dict[str, Any]) -> np.ndarray:
    [run_lengths] = entry["segmentation"]
    return coco.decode(run_lengths).astype(bool)


def assert_masks_of_boxes(entries: list[dict[str, Any]], model: Path) -> None:
    """That each annotation has the mask that the model alone gives for its box."""
    predictor = Predictor.load_segmenter(model)
    for entry in entries:
        x, y, w, h = entry["bbox"]
        box = EDGES.get(entry["id"], [x, y, x + w, y + h])
        size = SIZES[entry["image_id"]]
        image = picture(*size, seed=entry["image_id"])
        expected = predictor.predict(image, boxes=[box]).masks[0]
        found = decoded(entry)
        assert found.shape == size and 0 < found.sum() < found.size
        # A pixel may be of the other sign by rounding, where others are in the batch.
        assert (found != expected).mean() < ROUNDED, entry["id"]


def test_objects_alone_of_their_category_get_the_mask_of_their_box(whole: Path, model: Path):
    content, given = json.loads(whole.read_text()), coco_content()
    assert list(content) == list(given)
    assert {**content, "annotations": None} == {**given, "annotations": None}
    entries = content["annotations"]
    assert [entry["id"] for entry in entries] == [11, 14, 21, 31, 32]
    by_id = {one["id"]: one for one in ANNOTATIONS}
    for entry in entries:
        rest = {key: value for key, value in entry.items() if key != "segmentation"}
        assert rest == by_id[entry["id"]]
    assert_masks_of_boxes(entries, model)


def test_without_the_filter_all_boxes_but_crowds_get_masks(model: Path, data: Path, tmp_path: Path):
    out = tmp_path / "masks.json"
    outcome = annotate(request(model, data, out, only_alone=False, batch_size=3))
    assert (outcome.masks, outcome.left_out[SEVERAL], outcome.left_out[CROWDS]) == (7, 0, 1)
    entries = json.loads(out.read_text())["annotations"]
    assert [entry["id"] for entry in entries] == [11, 12, 13, 14, 21, 31, 32]
    assert_masks_of_boxes(entries, model)
    for one, other in itertools.combinations(entries, 2):
        if one["image_id"] == other["image_id"]:
            different = decoded(one) != decoded(other)
            assert different.mean() > 5 * ROUNDED, "the box must matter"


def test_of_a_whole_model_the_segmenter_makes_the_masks(data: Path, whole: Path, tmp_path: Path):
    config = dataclasses.replace(CONFIG, segmenter=Sam2Config.tiny())
    model = write_tiny_model(tmp_path / "model", config, SEED)
    annotate(request(model, data, tmp_path / "masks.json"))
    assert (tmp_path / "masks.json").read_bytes() == whole.read_bytes()


def test_objects365_reads_what_was_made(model: Path, data: Path, whole: Path, tmp_path: Path):
    folder = tmp_path / FOLDER
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "patch").symlink_to(data / "patch")
    boxes = folder / BOX_FILES["train"]
    boxes.write_bytes((data / "boxes.json").read_bytes())
    out = folder / MASK_FILES["train"]
    annotate(request(model, data, out, boxes=boxes, images=folder / "train"))
    source = DATASETS[0].source(tmp_path, "train")
    entries = json.loads(whole.read_text())["annotations"]
    read = {
        target.target_id: (phrase, mask)
        for i in range(len(source))
        for target, phrase, mask in zip(
            source.index.annotated(i).targets, source[i].phrases, source[i].masks, strict=True
        )
    }
    assert source.index.problems() == [] and len(read) == len(entries)
    names = {PERSON: "Person", CUP: "Cup é", DOG: "Dog"}
    for entry in entries:
        phrase, mask = read[str(entry["id"])]
        assert phrase == names[entry["category_id"]]
        np.testing.assert_array_equal(mask, decoded(entry))


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_to_the_same_bytes(
    model: Path, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    count = 60
    (tmp_path / "patch").mkdir()
    images, annotations = [], []
    for i in range(count):
        Image.fromarray(picture(40, 80, seed=i)).save(tmp_path / "patch" / f"{i}.png")
        images.append({"id": i, "file_name": f"patch/{i}.png", "height": 40, "width": 80})
        annotations += [annotation(3 * i + k, i, k, [k, 2, 20 + i, 30]) for k in range(3)]
    categories = [{"id": k, "name": str(k)} for k in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    expected = tmp_path / "expected.json"
    assert annotate(request(model, tmp_path, expected)).masks > count

    out = tmp_path / "masks.json"
    paths = [f"--model={model}", f"--boxes={tmp_path}/boxes.json", f"--images={tmp_path}"]
    lines = tmp_path / "masks.json.parts" / "masks.jsonl"
    log = tmp_path / "log"
    with log.open("w") as printed:
        killed = subprocess.Popen(
            **process(compiled, *paths, f"--out={out}", "--batch_size=2"),
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    with no_longer_than_this(killed):
        wanted = random.randint(1, 6)  # wherever it is then
        while not lines.exists() or lines.read_bytes().count(b"\n") < wanted:
            assert killed.poll() is None, log.read_text()
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not out.exists()
    annotate(request(model, tmp_path, out))
    begun = re.fullmatch(
        rf"{lines.parent}: (\d+) of {count} images have their masks\n", capsys.readouterr().out
    )
    assert begun and 0 < int(begun[1]) < count
    assert out.read_bytes() == expected.read_bytes() and not lines.parent.exists()


def process(compiled: Path, *arguments: str) -> dict[str, Any]:
    """What starts the command, as arguments of `subprocess`."""
    environment = {**os.environ, **ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    line = [sys.executable, "-m", "evf_sam_jax.annotate", *arguments]
    return {"args": line, "cwd": ROOT, "env": environment, "text": True}


def test_an_empty_mask_is_left_out_and_counted(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    upsample = Predictor.upsample

    def nothing_but_in_image_1(*asked: Any) -> np.ndarray:
        logits = upsample(*asked)
        return logits if logits.shape == SIZES[1] else np.minimum(logits, 0)

    monkeypatch.setattr(Predictor, "upsample", nothing_but_in_image_1)
    outcome = annotate(request(model, data, tmp_path / "masks.json"))
    assert (outcome.masks, outcome.images, outcome.left_out[EMPTY]) == (2, 1, 3)
    entries = json.loads((tmp_path / "masks.json").read_text())["annotations"]
    assert [entry["id"] for entry in entries] == [11, 14]


class Stopped(Exception):
    """As a kill, but that the test goes on."""


def stop(*_: Any) -> None:
    raise Stopped


@pytest.fixture
def stopped(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Request]:
    """A job that has made all masks and not written the file."""
    job = request(model, data, tmp_path / "masks.json", batch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(command_file, "write_masks", stop)
        with pytest.raises(Stopped):
            annotate(job)
    assert not (tmp_path / "masks.json").exists()
    yield job


@pytest.fixture(scope="module")
def one_by_one(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes that `stopped` must come to."""
    out = tmp_path_factory.mktemp("one_by_one") / "masks.json"
    annotate(request(model, data, out, batch_size=1))
    return out.read_bytes()


def test_a_line_that_was_cut_anywhere_is_made_again(stopped: Request, one_by_one: bytes):
    out = Path(stopped.out)
    parts = out.with_name("masks.json.parts")
    lines, job = (parts / "masks.jsonl").read_bytes(), (parts / "job.json").read_bytes()
    first, second = lines.index(b"\n") + 1, lines.index(b"\n", lines.index(b"\n") + 1) + 1
    damaged = [lines[:0], lines[: first - 1], lines[:first], lines[: second - 5], lines]
    damaged += [lines[:first] + b"\0" * 20 + lines[first + 20 :], lines + b'{"group": 7, "co']
    for content in damaged:
        parts.mkdir(exist_ok=True)
        (parts / "masks.jsonl").write_bytes(content)
        (parts / "job.json").write_bytes(job)
        annotate(stopped)
        assert out.read_bytes() == one_by_one and not parts.exists()
        out.unlink()


def test_a_kill_while_the_file_is_written_or_the_parts_are_removed(
    stopped: Request, one_by_one: bytes, monkeypatch: pytest.MonkeyPatch
):
    out = Path(stopped.out)
    parts = out.with_name("masks.json.parts")
    (parts / "result.json").write_text('{"images": [')
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", stop)
        with pytest.raises(Stopped):
            annotate(stopped)
    assert out.read_bytes() == one_by_one
    (parts / "masks.jsonl").unlink()
    annotate(stopped)
    assert out.read_bytes() == one_by_one and not parts.exists()
    with pytest.raises(UserError, match="--out: expected a path where nothing is yet"):
        annotate(stopped)


def test_the_masks_of_another_job_are_not_taken(stopped: Request, tmp_path: Path):
    other = write_tiny_segmenter(tmp_path / "other", Sam2Config.tiny(), seed=1)
    boxes = tmp_path / "other.json"
    boxes.write_text(json.dumps(coco_content() | {"annotations": ANNOTATIONS[:5]}))
    changes: dict[str, dict[str, Any]] = {
        "model": {"model": other},
        "boxes": {"boxes": boxes},
        "filter": {"only_alone": False},
        "batch_size": {"batch_size": 3},
        "dtype": {"dtype": "bfloat16"},
    }
    for key, change in changes.items():
        words = f"masks.json.parts: expected masks made with the same {key}, found them made with"
        with pytest.raises(UserError, match=words):
            annotate(dataclasses.replace(stopped, **change))


def test_an_image_that_cannot_be_read_is_named_and_tried_again(
    model: Path, data: Path, whole: Path, tmp_path: Path
):
    images, out = tmp_path / "images", tmp_path / "masks.json"
    (images / "patch").mkdir(parents=True)
    for file in (data / "patch").iterdir():
        (images / "patch" / file.name).write_bytes(file.read_bytes())
    bad = images / "patch" / "1.png"
    turned = images / "patch" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    Image.fromarray(picture(24, 25)).save(turned)
    job = request(model, data, out, images=images)
    outcome = annotate(job)
    assert outcome.failures == (
        f"{bad}: expected a whole image, found a broken one",
        f"{turned}: expected 24 x 24 pixels as {data / 'boxes.json'} says, found 25 x 24",
    )
    assert (outcome.masks, outcome.left_out[UNREADABLE]) == (1, 4)
    entries = json.loads(out.read_text())["annotations"]
    assert [entry["id"] for entry in entries] == [21]
    # The same again, with the same file; then with one of the images, then with both.
    before = out.read_bytes()
    assert annotate(job) == outcome and out.read_bytes() == before
    bad.write_bytes((data / "patch" / "1.png").read_bytes())
    assert annotate(job).failures == outcome.failures[1:]
    turned.write_bytes((data / "patch" / "3.png").read_bytes())
    assert annotate(job).failures == ()
    assert out.read_bytes() == whole.read_bytes()
    assert not out.with_name("masks.json.parts").exists()


def test_the_command_says_what_it_left_out_and_fails_with_1(
    model: Path, data: Path, compiled: Path, tmp_path: Path
):
    images, out = tmp_path / "images", tmp_path / "masks.json"
    (images / "patch").mkdir(parents=True)
    (images / "patch" / "2.png").symlink_to(data / "patch" / "2.png")
    result = command(
        compiled,
        f"--model={model}",
        f"--boxes={data}/boxes.json",
        f"--images={images}",
        f"--out={out}",
        "--nofilter",
    )
    missing = "expected an image file, found nothing there"
    failures = [f"failed: {images / 'patch' / f'{i}.png'}: {missing}" for i in (1, 3)]
    assert result.returncode == 1 and result.stderr.splitlines() == failures
    assert result.stdout.splitlines() == [
        "1 masks of 1 images",
        f"left out: 1 {CROWDS}",
        f"left out: 2 {NO_AREA}",
        f"left out: 6 {UNREADABLE}",
        f"written to {out}",
    ]


def command(compiled: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**process(compiled, *arguments), capture_output=True)


def test_the_command_answers_a_mistake_in_one_line(compiled: Path):
    result = command(compiled, "--model=none", "--boxes=none")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --images: expected a path, found nothing\n"


def test_no_image_can_be_read(model: Path, data: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    job = request(model, data, tmp_path / "masks.json", images=tmp_path / "images")
    with pytest.raises(UserError, match=r"^none of 3 images could be read: .*1\.png: expected an"):
        annotate(job)
    assert [file.name for file in tmp_path.iterdir()] == ["images"]


Edit = Callable[[dict[str, Any]], object]
BOX = "expected 'bbox' x, y, width, height in pixels, found "
BAD_BOXES: dict[str, tuple[Edit | str, str]] = {
    "cut short": ('{"images": [', "expected json, found"),
    "a list": ("[]", "the content: expected an object, found '[]'"),
    "no annotations": (lambda c: c.pop("annotations"), "expected the key 'annotations'"),
    "no boxes": (lambda c: c["annotations"][1].pop("bbox"), "expected the key 'bbox'"),
    "no image": (lambda c: c["annotations"][0].update(image_id=8), "'image_id', found 8"),
    "no category": (lambda c: c["annotations"][2].update(category_id=8), "'category_id', found 8"),
    "NaN": (
        lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]),
        f"annotation 11: {BOX}[1, 2, nan, 4]",
    ),
    "infinity": (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, 1e999]), "[1, 2, 3, inf]"),
    "huge": (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, 10**400]), BOX + "[1, 2, 3, 1000"),
    "three": (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), BOX + "[1, 2, 3]"),
    "words": (lambda c: c["annotations"][1].update(bbox=["1", 2, 3, 4]), BOX + "['1', 2, 3, 4]"),
    "a number": (lambda c: c["annotations"][1].update(bbox=5), BOX + "5"),
    "nothing left": (
        lambda c: c.update(annotations=ANNOTATIONS[2:4] + ANNOTATIONS[-1:]),
        f"expected boxes to make masks of, found 2 {SEVERAL}, 1 {CROWDS}",
    ),
    "nothing": (lambda c: c.update(annotations=[]), "to make masks of, found none at all"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_boxes_that_cannot_be_used(case: str, tmp_path: Path):
    edit, words = BAD_BOXES[case]
    content, path = json.loads(json.dumps(coco_content())), tmp_path / "boxes.json"
    if isinstance(edit, str):
        path.write_text(edit)
    else:
        edit(content)
        path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_boxes(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([1, 2, 3, 4], (1, 2, 4, 6)),
        ([-5, -5, 100, 100], (0, 0, 30, 20)),
        ([29.5, 0, 1, 0.25], (29.5, 0, 30, 0.25)),
        ([30, 0, 5, 5], None),
        ([-5, 0, 5, 5], None),
        ([5, 5, -2, 3], None),
        ([5, 5, 2, 0], None),
    ],
)
def test_boxes_are_cut_at_the_edges(bbox: list, expected: tuple | None):
    assert clip_box(bbox, height=20, width=30) == expected


BAD_REQUESTS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no folder": (lambda d: {"images": d / "none"}, "--images: expected a folder, found none at"),
    "no boxes": (lambda d: {"boxes": d / "none.json"}, "none.json: expected a readable file"),
    "no model": (lambda d: {"model": d / "none"}, "none does not exist"),
    "no segmenter": (lambda d: {"model": d / "beit3"}, "with a segmenter, found one without"),
    "there already": (lambda d: {"out": d / "boxes.json"}, "--out: expected a path where nothing"),
    "below a file": (lambda d: {"out": d / "boxes.json" / "a.json"}, "--out: cannot write"),
    "other parts": (lambda d: {"out": d / "full.json"}, "expected job.json in it, found notes"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_what_cannot_be_asked(case: str, model: Path, data: Path, tmp_path: Path):
    changes, words = BAD_REQUESTS[case]
    (tmp_path / "boxes.json").write_bytes((data / "boxes.json").read_bytes())
    edited(model, tmp_path / "beit3", config={"encoder": CONFIG.to_dict()["encoder"]})
    (tmp_path / "full.json.parts").mkdir()
    (tmp_path / "full.json.parts" / "notes").touch()
    before = sorted(tmp_path.rglob("*"))
    asked = request(model, data, tmp_path / "masks.json")
    with pytest.raises(UserError, match=words):
        annotate(dataclasses.replace(asked, **changes(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before


def test_of_several_lines_of_a_group_the_last_counts(tmp_path: Path):
    parts = Parts(tmp_path / "parts", {})
    parts.append(GroupMasks(1, ("a", None), ("broken",)))
    parts.append(GroupMasks(0, ("", "b")))
    parts.append(GroupMasks(1, ("a", "b")))
    parts.close()
    again = Parts(tmp_path / "parts", {})
    assert again.finished == {0, 1} and again.read(1).counts == ("a", "b")
    again.append(GroupMasks(1, (None, "b"), ("broken",)))
    assert again.finished == {0} and again.read(0).counts == ("", "b")
    again.remove()
    assert not (tmp_path / "parts").exists()
