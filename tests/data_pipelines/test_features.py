"""Features come back as they were stored, of their own image, and damage is named."""

import contextlib
import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from data_pipelines.features import (
    MANIFEST,
    FeatureManifest,
    FeatureStore,
    Layout,
    image_key,
    keys_name,
    write_keys,
)
from data_pipelines.record_files import shard_name, write_shard
from evf_sam_jax.errors import UserError

SHAPES = ((4, 4, 8), (16, 16, 2))
IMAGES = [np.random.default_rng(i).integers(0, 256, (5 + i, 7, 3), np.uint8) for i in range(5)]


def features(i: int) -> list[np.ndarray]:
    rng = np.random.default_rng(100 + i)
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]


def write(directory: Path, dtype: str = "float32") -> FeatureStore:
    """Two files, of three and of two images."""
    layout = Layout(SHAPES, dtype)
    directory.mkdir()
    shards = []
    for number, rows in enumerate((range(3), range(3, 5))):
        keys = [image_key(IMAGES[i]) for i in rows]
        records = [layout.encode(key, features(i)) for key, i in zip(keys, rows, strict=True)]
        shard = write_shard(directory, shard_name("features", number, 2), "as is", records)
        write_keys(directory, shard.file, keys)
        shards.append(shard)
    manifest = FeatureManifest("0123", layout, tuple(shards))
    (directory / MANIFEST).write_text(manifest.to_json())
    return FeatureStore(directory)


def test_float32_comes_back_bit_by_bit(tmp_path: Path):
    store = write(tmp_path / "features")
    assert len(store) == store.manifest.images == 5
    for i, image in enumerate(IMAGES):
        for found, expected in zip(store.read(image), features(i), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)


def test_bfloat16_comes_back_rounded(tmp_path: Path):
    for found, expected in zip(
        write(tmp_path / "features", "bfloat16").read(IMAGES[3]), features(3), strict=True
    ):
        np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))


def test_int8_is_within_half_a_step_of_its_channel(tmp_path: Path):
    *values, scale, finer_scale = write(tmp_path / "features", "int8").read(IMAGES[0])
    for value, one, expected in zip(values, (scale, finer_scale), features(0), strict=True):
        assert value.dtype == np.int8
        assert np.abs(value).max((0, 1)).tolist() == [127] * expected.shape[-1]
        assert (np.abs(value * one - expected) <= one * 0.5001).all()


def test_a_channel_of_zeros_stays_zero():
    layout = Layout(((2, 2, 3),), "int8")
    record = layout.encode(bytes(16), [np.zeros((2, 2, 3), np.float32)])
    value, scale = layout.decode(record)
    assert not value.any() and np.isfinite(scale).all()


def test_an_image_is_told_by_its_pixels_and_size(tmp_path: Path):
    store = write(tmp_path / "features")
    changed = IMAGES[1].copy()
    changed[0, 0, 0] ^= 1
    for image in (changed, IMAGES[1].transpose(1, 0, 2), IMAGES[1][:, ::-1]):
        with pytest.raises(UserError, match="expected features of these pixels, found none"):
            store.read(image)
    np.testing.assert_array_equal(store.read(IMAGES[1].copy(order="F"))[0], features(1)[0])


def test_a_store_that_was_pickled_reads_the_same(tmp_path: Path):
    store = write(tmp_path / "features")
    store.read(IMAGES[0])  # has files open
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.read(IMAGES[4])[1], features(4)[1])


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path: Path):
    store = write(tmp_path / "features")
    path = tmp_path / "features" / store.manifest.shards[0].file
    content = bytearray(path.read_bytes())
    at = content.index(features(1)[0].tobytes())
    content[at + 100] ^= 255
    path.write_bytes(content)
    again = FeatureStore(tmp_path / "features")
    with pytest.raises(UserError, match="record 1: expected features, found "):
        again.read(IMAGES[1])
    np.testing.assert_array_equal(again.read(IMAGES[2])[0], features(2)[0])


def test_a_record_of_another_image_is_named(tmp_path: Path):
    store = write(tmp_path / "features")
    path = tmp_path / "features" / keys_name(store.manifest.shards[0].file)
    keys = np.load(path)
    np.save(path, keys[[1, 0, 2]])
    with pytest.raises(UserError, match="record 1: expected features, found that of another image"):
        FeatureStore(tmp_path / "features").read(IMAGES[0])


def damaged(directory: Path, how: str) -> None:
    manifest, file = directory / MANIFEST, directory / shard_name("features", 1, 2)
    keys = directory / keys_name(file.name)
    if how == "no manifest":
        manifest.unlink()
    elif how == "no JSON":
        manifest.write_text("[")
    elif how == "another version":
        manifest.write_text(
            manifest.read_text().replace('"format_version": 1', '"format_version": 2')
        )
    elif how == "no fingerprint":
        manifest.write_text(manifest.read_text().replace("fingerprint", "print"))
    elif how == "another dtype":
        manifest.write_text(manifest.read_text().replace('"float32"', '"float8"'))
    elif how == "no file":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "no keys":
        keys.unlink()
    elif how == "keys cut off":
        keys.write_bytes(keys.read_bytes()[:-4])
    elif how == "too few keys":
        np.save(keys, np.zeros(1, np.uint64))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no manifest", "manifest.json: expected a finished directory of features, found nothing"),
        ("no JSON", "expected a manifest of features"),
        ("another version", "format_version: expected 1, found 2"),
        ("no fingerprint", "expected a manifest of features: .*fingerprint"),
        ("another dtype", "dtype: expected one of float32, bfloat16, int8"),
        (
            "no file",
            "array_record: expected a file of records, found nothing there; write it again",
        ),
        ("cut off", r"expected \d+ bytes, found \d+; write it again with --mode cache_features"),
        ("no keys", "keys.npy: expected the keys of records"),
        ("keys cut off", "keys.npy: expected the keys of records"),
        ("too few keys", r"expected 2 keys, found uint64 \[1\]"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(tmp_path: Path, how: str, said: str):
    write(tmp_path / "features")
    damaged(tmp_path / "features", how)
    with pytest.raises(UserError, match=said):
        FeatureStore(tmp_path / "features")


def test_a_record_is_as_long_as_was_said_beforehand():
    for dtype in ("float32", "bfloat16", "int8"):
        layout = Layout(SHAPES, dtype)
        assert len(layout.encode(bytes(16), features(0))) == layout.record_bytes


def test_a_bucket_is_refused():
    with pytest.raises(UserError, match="data.features: expected a local or mounted directory"):
        FeatureStore("gs://bucket/features")


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors by Linux's /proc")
def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def opened() -> int:
        found = 0
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile, by another thread
                found += descriptor.readlink().parent == tmp_path / "features"
        return found

    monkeypatch.setattr("data_pipelines.features.OPEN_FILES", 1)
    store = write(tmp_path / "features")
    for i in (0, 4, 1, 3, 2):
        np.testing.assert_array_equal(store.read(IMAGES[i])[0], features(i)[0])
        assert opened() == 1
