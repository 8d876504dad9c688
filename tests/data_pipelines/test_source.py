"""A source reads examples by the rules, and says what is wrong with a file."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_input import read_image
from data_pipelines.segmentations import decode_parts
from data_pipelines.source import IndexedSource, ReadingRules, Source
from evf_sam_jax.errors import UserError
from tests.data_pipelines.tiny_dataset import TinyDataset

TINY = TinyDataset(images=9)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "tiny"
    TINY.write(root)
    return root


def source(root: Path, **rules) -> IndexedSource:
    return TINY.dataset().source(root, "train", ReadingRules(**rules))


def test_an_example_is_its_image_phrases_and_masks(root: Path):
    whole = source(root)
    assert isinstance(whole, Source) and len(whole) == 9
    example, one = whole[7], TINY.annotated(7)
    np.testing.assert_array_equal(example.image, read_image(root / one.file))
    assert example.phrases == tuple(p for t in one.targets for p in t.phrases)
    masks = [decode_parts(t.parts, one.height, one.width) for t in one.targets for _ in t.phrases]
    np.testing.assert_array_equal(example.masks, masks)
    assert example.ignore is None
    assert len(example.phrases) > 2  # among them, two of one target


def test_chosen_phrases_keep_their_masks(root: Path):
    whole = source(root)
    example, part = whole[7], whole.read(7, [2, 0])
    assert part.phrases == (example.phrases[2], example.phrases[0])
    np.testing.assert_array_equal(part.masks, example.masks[[2, 0]])


def test_an_entry_knows_size_and_phrases_without_the_image(root: Path, tmp_path: Path):
    entry = source(root).entry(7)
    example = source(root)[7]
    assert (entry.height, entry.width) == example.image.shape[:2]
    assert entry.phrases == example.phrases
    assert source(root).phrase_count(7) == len(entry.phrases)


def test_overlapping_parts_are_united_or_summed(root: Path):
    assert source(root)[0].masks.max() == 1
    summed = source(root, overlap="sum")[0].masks
    assert summed.max() == 2
    np.testing.assert_array_equal(summed > 0, source(root)[0].masks > 0)


def test_case_is_as_written_or_stripped_and_lowered(root: Path):
    assert "The Square " in source(root)[6].phrases
    assert "the square" in source(root, text="lower")[6].phrases


def test_by_default_training_keeps_the_case_and_evaluation_does_not(root: Path):
    dataset = TINY.dataset()
    assert "The Square " in dataset.source(root, "train")[6].phrases
    assert "the square" in dataset.source(root, "val")[6].phrases


def test_a_prefix_comes_before_each_phrase(root: Path):
    assert source(root, prefix="[semantic] ", text="lower")[0].phrases == (
        "[semantic] the red circle",
    )


def test_unlabelled_pixels_can_be_ignored(root: Path):
    ignore = source(root, ignore_unlabelled=True)[0].ignore
    assert ignore is not None and ignore[-1].all() and not ignore[:-1].any()


def test_a_category_can_be_left_out(root: Path):
    whole, some = source(root), source(root, without_categories=("thing",))
    assert len(some) == 4  # the other five images have nothing else
    assert sum(map(some.phrase_count, range(4))) < sum(map(whole.phrase_count, range(9)))
    assert some.target_areas(0) == [int(some[0].masks[0].sum())] * some.phrase_count(0)


def test_a_source_goes_to_worker_processes(root: Path):
    some = source(root, without_categories=("thing",))
    again = pickle.loads(pickle.dumps(some))
    assert again[2].phrases == some[2].phrases


def test_an_unknown_category_or_rule_is_refused(root: Path):
    with pytest.raises(UserError, match="without_categories: expected categories of tiny"):
        source(root, without_categories=("sky",))


@pytest.mark.parametrize("content", ["missing", "empty", "truncated", "other size"])
def test_a_bad_image_is_named(tmp_path: Path, content: str):
    TINY.write(tmp_path / "tiny")
    file = tmp_path / "tiny" / "images" / "00003.png"
    if content == "missing":
        file.unlink()
    elif content == "other size":
        Image.new("RGB", (31, 20)).save(file)
    else:
        file.write_bytes(file.read_bytes()[: 100 if content == "truncated" else 0])
    with pytest.raises(UserError, match="00003.png.*: expected .* found"):
        _ = source(tmp_path / "tiny")[3]


def test_a_missing_root_or_folder_shows_the_layout(root: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: expected a folder of tiny/train, .*\n  images/"):
        source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"images: expected a folder of tiny/train"):
        source(tmp_path / "empty")


def test_an_unknown_split_is_refused(root: Path):
    with pytest.raises(UserError, match="one of the splits train, val, found 'testC'"):
        TINY.dataset().source(root, "testC")
