"""A user's own data, as JSON lines and as a COCO json; among it a real photograph."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image
from pycocotools import mask as coco

from data_pipelines.index import Problem
from data_pipelines.own_data import DATASETS
from evf_sam_jax.errors import UserError
from tests.data_pipelines.astronaut import OBJECTS, write_astronaut

JSONL, COCO = DATASETS
HEIGHT, WIDTH = 20, 30
TRIANGLE = [2, 2, 12, 3, 6, 15]
SQUARE = [10, 10, 20, 10, 20, 18, 10, 18]


def drawn(*polygons: list, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Union of the polygons, as pycocotools draws them."""
    encoded = coco.frPyObjects([list(map(float, p)) for p in polygons], height, width)
    return coco.decode(coco.merge(encoded))


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path, **options)


def write_lines(root: Path, *records: Any, split: str = "train") -> Path:
    path = root / f"{split}.jsonl"
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def record(image: str = "a.png", **rest) -> dict[str, Any]:
    return {"image": image, "phrase": "the thing", "mask": TRIANGLE, **rest}


# --- The photograph


def test_a_photograph_arrives_with_its_phrases_and_masks(tmp_path: Path):
    write_astronaut(tmp_path)
    source = JSONL.source(tmp_path, "train")
    assert len(source) == 1 and not source.index.problems()
    example = source[0]
    np.testing.assert_array_equal(example.image, skimage.data.astronaut())
    assert example.phrases == tuple(p for phrases, _ in OBJECTS.values() for p in phrases)
    masks = [
        drawn(*polygons, height=512, width=512)
        for phrases, polygons in OBJECTS.values()
        for _ in phrases
    ]
    np.testing.assert_array_equal(example.masks, masks)


def test_the_masks_lie_on_what_the_phrases_say(tmp_path: Path):
    write_astronaut(tmp_path)
    example = JSONL.source(tmp_path, "train")[0]
    masks = dict(zip(example.phrases, example.masks > 0, strict=True))

    def colour(phrase: str) -> np.ndarray:
        return example.image[masks[phrase]].mean(0)

    def centre(phrase: str) -> np.ndarray:
        return np.argwhere(masks[phrase]).mean(0)

    red, green, blue = colour("the orange suit")
    assert red > green + 50 and green > blue + 10
    red, green, blue = colour("short brown hair")
    assert red > green > blue
    red, green, blue = colour("the round blue patch on the suit")
    assert blue > red
    assert colour("the black helmet at the bottom right").mean() < 80
    assert colour("the woman's face").mean() > 140
    assert centre("the flag on the left")[1] < 100
    assert centre("the rocket on the right")[1] > 380
    assert (centre("the black helmet at the bottom right") > 380).all()
    woman = masks["the smiling woman"]
    for part in ("the orange suit", "short brown hair", "the woman's face"):
        assert not (masks[part] & ~woman).any()


# --- JSON lines


def test_lines_of_one_image_are_grouped_in_order_of_first_appearance(tmp_path: Path):
    write_image(tmp_path / "photos/b.png")
    write_image(tmp_path / "photos/a.png", (40, 25))
    write_lines(
        tmp_path,
        record("photos/b.png", phrase=["one", "Uno "], id="first", category="Digit"),
        record("photos/a.png", phrase="two"),
        "",
        record("./photos/b.png", phrase="three", mask=[TRIANGLE, SQUARE]),
    )
    source = JSONL.source(tmp_path, "train")
    assert [source.entry(i).phrases for i in range(2)] == [("one", "Uno ", "three"), ("two",)]
    np.testing.assert_array_equal(
        source[0].masks, [drawn(TRIANGLE), drawn(TRIANGLE), drawn(TRIANGLE, SQUARE)]
    )
    np.testing.assert_array_equal(source[1].masks, [drawn(TRIANGLE, height=25, width=40)])
    first = source.index.annotated(0)
    assert (first.image_id, first.file) == ("own/photos/b.png", "photos/b.png")
    assert [(t.target_id, t.category) for t in first.targets] == [("first", "Digit"), ("4", "")]


def test_each_split_has_its_lines_and_evaluation_reads_lower_case(tmp_path: Path):
    write_image(tmp_path / "a.png")
    for split in ("train", "val", "test"):
        write_lines(tmp_path, record(phrase=f"The {split} "), split=split)
    phrases = [JSONL.source(tmp_path, split).entry(0).phrases for split in JSONL.splits]
    assert phrases == [("The train ",), ("the val",), ("the test",)]


def test_a_mask_may_be_run_lengths(tmp_path: Path):
    write_image(tmp_path / "a.png")
    mask = drawn(SQUARE)
    encoded = coco.encode(np.asfortranarray(mask))
    compressed = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    plain = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT, HEIGHT, HEIGHT * (WIDTH - 2)]}
    write_lines(tmp_path, record(mask=compressed), record(mask=[plain, compressed]))
    column = np.zeros_like(mask)
    column[:, 1] = 1
    masks = JSONL.source(tmp_path, "train")[0].masks
    np.testing.assert_array_equal(masks, [mask, mask | column])


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_a_mask_may_be_a_png_whose_inside_is_not_0(tmp_path: Path, mode: str):
    write_image(tmp_path / "a.png")
    inside = drawn(TRIANGLE)
    if mode == "I;16":
        mask = Image.fromarray(inside.astype(np.uint16) * 256)
    elif mode == "P":
        mask = Image.fromarray(inside)
        mask.putpalette([255, 255, 255, 0, 0, 0])  # inside is black
    elif mode == "RGB":
        mask = Image.fromarray(np.stack([0 * inside, 0 * inside, inside * 9], -1))
    else:
        mask = Image.fromarray(inside * 255).convert(mode)
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/a.png")
    with Image.open(tmp_path / "masks/a.png") as saved:
        assert saved.mode == mode
    write_lines(tmp_path, record(mask="masks/a.png"))
    np.testing.assert_array_equal(JSONL.source(tmp_path, "train")[0].masks, [inside])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_masks_belong_to_the_upright_image(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(tmp_path / "a.jpg", exif=exif)
    write_lines(tmp_path, record("a.jpg"))
    height, width = (WIDTH, HEIGHT) if orientation > 4 else (HEIGHT, WIDTH)
    example = JSONL.source(tmp_path, "train")[0]
    assert example.image.shape[:2] == (height, width)
    np.testing.assert_array_equal(example.masks, [drawn(TRIANGLE, height=height, width=width)])


def test_what_is_wrong_with_one_annotation_is_a_problem_with_its_line(tmp_path: Path):
    write_image(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (WIDTH + 1, HEIGHT), 1).save(tmp_path / "wide.png")
    Image.new("L", (WIDTH, HEIGHT), 0).save(tmp_path / "empty.png")
    Image.new("RGBA", (16, 16), "red").save(tmp_path / "icon.png", format="ICO")
    path = write_lines(
        tmp_path,
        record(),
        record(mask=[1, 2, 3, 4]),
        record(mask="wide.png"),
        record(mask="text.png"),
        record(mask="empty.png"),
        record(mask="none.png"),
        record("missing.png"),
        record("text.png"),
        record(phrase=" "),
        record(phrase=["words", ""]),
        record(phrase=[]),
        record(mask="icon.png"),
        record(phrase=["red \ud800", "red"]),
    )
    index = JSONL.index(tmp_path, "train")
    whats = {
        2: "expected a polygon of at least 3 points, found 2",
        3: f"expected a mask as large as the image, 30 x 20, found {tmp_path}/wide.png of 31 x 20",
        4: f"expected a mask as a PNG, found another {tmp_path}/text.png",
        5: f"expected a mask that is not 0 everywhere, found {tmp_path}/empty.png",
        6: f"expected the mask {tmp_path}/none.png, found nothing there",
        9: "expected words, found an empty phrase",
        10: "expected words, found an empty phrase",
        11: "expected words, found an empty phrase",
        12: f"expected a mask as a PNG, found another {tmp_path}/icon.png",
        13: "expected Unicode text, found half a character",
        7: "expected the image missing.png, found nothing there",
        8: f"{tmp_path}/text.png: expected an image file, "
        "found something else than PNG, JPEG, WebP, BMP, GIF or TIFF",
    }
    assert index.problems() == [Problem(f"{path}:{n}", what) for n, what in whats.items()]
    assert [t.target_id for t in index.annotated(0).targets] == ["1", "10", "13"]
    assert [t.phrases for t in index.annotated(0).targets[1:]] == [("words",), ("red",)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'image': 1}", "expected a json object, found Expecting property name"),
        ("[1, 2]", "expected a json object, found '[1, 2]'"),
        ('{"image": "a.png", "mask": []}', "expected the key 'phrase', found image, mask"),
        (record(image=3), "'image': expected a string, found '3'"),
        (record(image=""), "expected a path relative to the root, found ''"),
        (record(image="/a.png"), "expected a path relative to the root, found '/a.png'"),
        (record(mask="/a.png"), "expected a path relative to the root, found '/a.png'"),
        (record(phrase=3), "'phrase': expected a string or a list of strings, found '3'"),
        (record(phrase=["a", 1]), "'phrase': expected a string or a list of strings, found"),
        (record(mask=None), "'mask': expected polygons, run lengths or the path of a PNG, found"),
        (record(id=[1]), "'id': expected a string or a whole number, found '[1]'"),
        (record(image="\ud800.png"), "'image': expected Unicode text, found '\\ud800.png'"),
        (record(mask="\ud800.png"), "'mask': expected Unicode text, found '\\ud800.png'"),
        (record(id="\ud800"), "'id': expected Unicode text, found '\\ud800'"),
        (record(category=5), "'category': expected a string, found '5'"),
        (record(id=1), "expected each id once (a line without has its number), found '1' as in "),
    ],
)
def test_an_ill_formed_line_is_refused(tmp_path: Path, line: Any, message: str):
    write_image(tmp_path / "a.png")
    path = write_lines(tmp_path, record(), line)
    with pytest.raises(UserError) as error:
        JSONL.index(tmp_path, "train")
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_a_changed_mask_or_an_added_image_makes_a_new_index(tmp_path: Path):
    write_image(tmp_path / "a.png")
    Image.fromarray(drawn(TRIANGLE)).save(tmp_path / "mask.png")
    write_lines(tmp_path, record(mask="mask.png"), record("more/b.png"), record("c.png"))
    first = JSONL.index(tmp_path, "train")
    assert JSONL.index(tmp_path, "train").directory == first.directory
    Image.fromarray(drawn(SQUARE)).save(tmp_path / "mask.png")
    os.utime(tmp_path / "mask.png", ns=(1, 1))  # clocks of file systems may be coarse
    np.testing.assert_array_equal(JSONL.source(tmp_path, "train")[0].masks, [drawn(SQUARE)])
    write_image(tmp_path / "more/b.png")
    assert len(JSONL.index(tmp_path, "train")) == 2
    write_image(tmp_path / "c.png")
    assert len(JSONL.index(tmp_path, "train")) == 3


# --- COCO with phrases


def write_coco(root: Path, annotations: list[dict], split: str = "train", **rest) -> Path:
    write_image(root / "images/x/a.jpg")
    images = [{"id": "a", "file_name": "x/a.jpg", "height": HEIGHT, "width": WIDTH}]
    path = root / f"{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, **rest}))
    return path


def annotation(ann_id: int, polygon: list[int] = TRIANGLE, **rest) -> dict[str, Any]:
    return {"id": ann_id, "image_id": "a", "segmentation": [polygon], **rest}


def test_coco_annotations_bring_phrases_under_any_of_three_keys(tmp_path: Path):
    annotations = [
        annotation(7, phrases=["one", "two"], category_id=3),
        annotation(8, SQUARE, phrase="three"),
        annotation(9, SQUARE, caption="four"),
    ]
    write_coco(tmp_path, annotations, categories=[{"id": 3, "name": "cup"}])
    source = COCO.source(tmp_path, "train")
    example = source[0]
    assert example.phrases == ("one", "two", "three", "four")
    masks = [drawn(TRIANGLE)] * 2 + [drawn(SQUARE)] * 2
    np.testing.assert_array_equal(example.masks, masks)
    one = source.index.annotated(0)
    assert (one.image_id, one.file) == ("own/images/x/a.jpg", "images/x/a.jpg")
    assert [(t.target_id, t.category) for t in one.targets] == [("7", "cup"), ("8", ""), ("9", "")]


def test_coco_without_phrases_is_refused_though_it_has_categories(tmp_path: Path):
    categories = [{"id": 3, "name": "cup"}]
    path = write_coco(tmp_path, [annotation(7, category_id=3)], "val", categories=categories)
    with pytest.raises(UserError) as error:
        COCO.index(tmp_path, "val")
    assert str(error.value) == (
        f"{path}: annotation 7: expected the key 'phrases' or 'phrase' or 'caption', found id, "
        "image_id, segmentation, category_id"
    )


def test_coco_with_an_unknown_category_is_refused(tmp_path: Path):
    write_coco(tmp_path, [annotation(7, category_id=3, phrase="a")])
    with pytest.raises(UserError, match="annotation 7: expected the id of one of the file's 0"):
        COCO.index(tmp_path, "train")


def test_bad_coco_annotations_are_problems(tmp_path: Path):
    annotations = [
        annotation(1, phrase="good"),
        annotation(2, [1, 2, 3, 4], phrase="bad"),
        annotation(3, phrase=""),
        annotation(4, phrase="red \ud800"),
    ]
    path = write_coco(tmp_path, annotations)
    assert COCO.index(tmp_path, "train").problems() == [
        Problem(f"{path}: annotation 2", "expected a polygon of at least 3 points, found 2"),
        Problem(f"{path}: annotation 3", "expected words, found an empty phrase"),
        Problem(f"{path}: annotation 4", "expected Unicode text, found half a character"),
    ]
