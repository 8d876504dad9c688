"""The prepared form: the same examples, whole after interruptions, refused where it is damaged."""

import dataclasses
import hashlib
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_pipelines.prepare
import data_pipelines.prepared
import data_pipelines.record_files
from data_pipelines.assemble import BatchSpec
from data_pipelines.eval_pipeline import eval_dataset
from data_pipelines.index import AnnotatedImage, Target
from data_pipelines.prepare import prepare
from data_pipelines.prepared import decode_record, encode_record, open_prepared
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.source import IndexedSource, LooseFiles, ReadingRules
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.tower_images import TowerImages
from data_pipelines.train_pipeline import iterate
from evf_sam_jax.errors import UserError
from tests.data_pipelines.refer_files import write_refer_root
from tests.data_pipelines.tiny_dataset import TinyDataset

ROOT = Path(__file__).parents[2]
IMAGES = 9
TINY = TinyDataset(images=IMAGES)
SUM = ReadingRules(overlap="sum", prefix="[semantic] ", ignore_unlabelled=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    TINY.write(tmp_path / "tiny")
    return tmp_path / "tiny"


def assert_same_examples(ours: IndexedSource, theirs: IndexedSource) -> None:
    assert len(ours) == len(theirs)
    for i in range(len(theirs)):
        assert ours.entry(i) == theirs.entry(i)
        assert ours.describe(i) == theirs.describe(i)
        one, other = dataclasses.asdict(ours[i]), dataclasses.asdict(theirs[i])
        assert one.keys() == other.keys()
        for field in one:
            np.testing.assert_array_equal(one[field], other[field], err_msg=field)


def shard_times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.array_record")}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def shard_names(count: int, split: str = "train") -> list[str]:
    return [f"{split}-{i:05}-of-{count:05}.array_record" for i in range(count)]


def in_process(root: Path, out: Path, before: str, workers: int = 1) -> subprocess.CompletedProcess:
    """Prepares in a process of its own, in 3 shards, after the statements `before`."""
    script = (
        "import os, resource, signal, sys\n"
        "from pathlib import Path\n"
        "import data_pipelines.prepare as module\n"
        "from evf_sam_jax.errors import run_command\n"
        "from tests.data_pipelines.tiny_dataset import TinyDataset\n"
        f"{before}\n"
        f"run_command(module.prepare, TinyDataset({IMAGES}).dataset(), Path({str(root)!r}),\n"
        f"            {str(out)!r}, 'train', 3, {workers})\n"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("rules", [None, SUM])
@pytest.mark.parametrize("split", ["train", "val"])
def test_examples_equal_those_of_the_loose_files(
    root: Path, tmp_path: Path, split: str, rules: ReadingRules | None
):
    dataset = TINY.dataset()
    prepare(dataset, root, tmp_path / "out", split, shards=4)
    prepared = open_prepared(tmp_path / "out" / "tiny" / split, rules)
    assert_same_examples(prepared, dataset.source(root, split, rules))


def test_a_directory_holds_shards_index_and_manifest(root: Path, tmp_path: Path):
    manifest = prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=4)
    directory = tmp_path / "out" / "tiny" / "train"
    assert names(directory) == {*shard_names(4), "index", "manifest.json"}
    written = json.loads((directory / "manifest.json").read_text())
    assert written["format_version"] == 1
    assert (written["name"], written["split"]) == ("tiny", "train")
    assert [shard["records"] for shard in written["shards"]] == [2, 2, 2, 3]
    for shard in written["shards"]:
        content = (directory / shard["file"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    images = [TINY.annotated(i) for i in range(IMAGES)]
    assert manifest.counts == {
        "images": IMAGES,
        "targets": sum(len(image.targets) for image in images),
        "phrases": sum(len(target.phrases) for image in images for target in image.targets),
        "problems": 0,
    }
    assert written["counts"] == manifest.counts


def test_a_record_keeps_the_file_byte_for_byte():
    target = Target("7", ("a caf\xe9", "it"), (b"04a", b"1"), "cup")
    image = AnnotatedImage("coco/7", "a/7.jpg", 2, 3, (target, Target("8", ("no",), ())), b"05")
    record = encode_record(image, b"\xff\xd8 any bytes")
    length = int.from_bytes(record[:4], "little")
    assert json.loads(record[4 : 4 + length])["targets"][0]["parts"] == ["04a", "1"]
    assert decode_record(record) == (image, b"\xff\xd8 any bytes")


def test_worker_processes_write_the_same_files(root: Path, tmp_path: Path):
    alone = prepare(TINY.dataset(), root, tmp_path / "a", "train", shards=3)
    assert prepare(TINY.dataset(), root, tmp_path / "b", "train", shards=3, workers=2) == alone


def test_batches_of_worker_processes_equal_those_of_the_loose_files(root: Path, tmp_path: Path):
    dataset, tokenizer = TINY.dataset(), load_tokenizer(SHAPES_TOKENIZER)
    prepare(dataset, root, tmp_path / "out", "val", shards=2)
    prepared = open_prepared(tmp_path / "out" / "tiny" / "val")
    prepared[0]  # what is open here must not hinder it from going to another process
    spec = BatchSpec(
        batch_size=4,
        phrases=4,
        text_length=16,
        images=TowerImages(frame=32, encoder_size=16),
        canvas=(64, 64),
    )
    loose = [*eval_dataset(dataset.source(root, "val"), tokenizer, spec)]
    with iterate(eval_dataset(prepared, tokenizer, spec), workers=2) as batches:
        for ours, theirs in zip(batches, loose, strict=True):
            for name, value in dataclasses.asdict(theirs).items():
                np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_with_its_finished_shards(root: Path, tmp_path: Path, workers: int):
    out = tmp_path / "out"
    directory = out / "tiny" / "train"
    # Killed in the middle of the last shard, once another is finished.
    ending = (
        "read = module._checked_content\n"
        "def read_or_end(root, image):\n"
        "    if image.image_id == 'tiny/7':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(root, image)\n"
        "module._checked_content = read_or_end"
    )
    if workers > 1:  # the workers do not know of the patch: the first result kills the command
        ending = "module.tqdm.update = lambda self, n: n and os.kill(os.getpid(), signal.SIGKILL)"
    done = in_process(root, out, ending, workers)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if workers == 1:
        assert ".train-00002-of-00003.array_record.partial" in names(directory)
    assert "manifest.json" not in names(directory)
    with pytest.raises(UserError, match="manifest.json: expected a prepared data set, found not"):
        open_prepared(directory)
    finished = shard_times(directory)
    assert len(finished) >= 1
    manifest = prepare(TINY.dataset(), root, out, "train", shards=3)
    assert names(directory) == {*shard_names(3), "index", "manifest.json"}
    kept = shard_times(directory)
    if workers == 1:
        assert set(finished) == set(shard_names(3)[:2])
        assert {name: kept[name] for name in finished} == finished
    assert manifest == prepare(TINY.dataset(), root, tmp_path / "other", "train", shards=3)
    assert_same_examples(open_prepared(directory), TINY.dataset().source(root, "train"))


def test_shards_of_other_annotations_are_not_kept(root: Path, tmp_path: Path):
    out = tmp_path / "out"
    in_process(root, out, "module._write_kept_index = lambda *_: sys.exit(1)")
    assert len(shard_times(out / "tiny" / "train")) == 3
    (root / "images" / "another.png").touch()  # the folder of images has changed
    before = shard_times(out / "tiny" / "train")
    prepare(TINY.dataset(), root, out, "train", shards=3)
    after = shard_times(out / "tiny" / "train")
    assert all(before[name] != after[name] for name in before)


def test_shards_of_another_number_of_them_are_removed(root: Path, tmp_path: Path):
    out = tmp_path / "out"
    in_process(root, out, "module._write_kept_index = lambda *_: sys.exit(1)")
    prepare(TINY.dataset(), root, out, "train", shards=2)
    assert names(out / "tiny" / "train") == {*shard_names(2), "index", "manifest.json"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_sentence_and_finished_shards_stay(
    root: Path, tmp_path: Path, workers: int
):
    with (root / "images" / "00008.png").open("ab") as file:
        file.write(np.random.default_rng(0).bytes(500_000))  # the last shard exceeds the limit
    out = tmp_path / "out"
    directory = out / "tiny" / "train"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    done = in_process(root, out, limit, workers)
    assert done.returncode == 2
    path = directory / "train-00002-of-00003.array_record"
    assert done.stderr.splitlines()[-1] == f"error: {path} cannot be written: File too large"
    first, second, _ = shard_names(3)
    assert names(directory) == {first, f"{first}.json", second, f"{second}.json"}
    finished = shard_times(directory)
    prepare(TINY.dataset(), root, out, "train", shards=3)
    assert finished.items() <= shard_times(directory).items()


def test_a_full_disk_at_the_manifest_leaves_no_half_of_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=2)
    directory = tmp_path / "out" / "tiny" / "train"
    (directory / "manifest.json").unlink()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"\.array_record\.json cannot be written: No space left "):
        prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=2)
    assert not [name for name in names(directory) if name.endswith((".partial", ".json"))]


def test_images_that_cannot_be_read_are_left_out_and_listed(root: Path, tmp_path: Path):
    images = root / "images"
    (images / "00008.png").unlink()
    whole = (images / "00001.png").read_bytes()
    (images / "00001.png").write_bytes(whole[:-200])
    (images / "00002.png").write_bytes(b"")
    Image.new("RGB", (5, 4)).save(images / "00004.png")
    manifest = prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=3)
    assert (manifest.counts["images"], manifest.counts["problems"]) == (IMAGES - 4, 4)
    assert [shard.records for shard in manifest.shards] == [1, 2, 2]
    prepared = open_prepared(tmp_path / "out" / "tiny" / "train")
    kept = np.array([0, 3, 5, 6, 7])
    loose = TINY.dataset().source(root, "train")
    assert_same_examples(prepared, IndexedSource(loose.index, LooseFiles(root), images=kept))
    assert [(problem.where, problem.what) for problem in prepared.index.problems()] == [
        (
            "tiny/train, image tiny/1",
            f"{images}/00001.png: expected a whole image, found a broken one",
        ),
        (
            "tiny/train, image tiny/2",
            f"{images}/00002.png: expected an image file, found an empty one",
        ),
        (
            "tiny/train, image tiny/4",
            f"{images}/00004.png: expected 30 x 30 pixels as its annotations say, found 5 x 4",
        ),
        (
            "tiny/train, image tiny/8",
            f"{images}/00008.png: expected an image file, found No such file or directory",
        ),
    ]


def test_a_shard_without_records_does_not_shift_the_others(root: Path, tmp_path: Path):
    for i in (3, 4, 5):
        (root / "images" / f"{i:05}.png").write_bytes(b"no image")
    manifest = prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=3)
    assert [shard.records for shard in manifest.shards] == [3, 0, 3]
    prepared = open_prepared(tmp_path / "out" / "tiny" / "train")
    assert [prepared[i].phrases for i in range(6)] == [prepared.entry(i).phrases for i in range(6)]


def test_a_finished_directory_is_left_as_it_is(root: Path, tmp_path: Path):
    first = prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=3)
    directory = tmp_path / "out" / "tiny" / "train"
    (directory / f"{shard_names(3)[0]}.json").write_text("{}")  # killed while it removed these
    before = shard_times(directory)
    assert prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=3) == first
    assert shard_times(directory) == before
    assert names(directory) == {*shard_names(3), "index", "manifest.json"}


def test_a_damaged_directory_is_refused_until_it_is_prepared_again(root: Path, tmp_path: Path):
    out = tmp_path / "out"
    prepare(TINY.dataset(), root, out, "train", shards=3)
    directory = out / "tiny" / "train"
    first, second, third = (directory / name for name in shard_names(3))
    size = second.stat().st_size
    before = shard_times(directory)
    second.write_bytes(second.read_bytes()[:-1])
    message = f"{second}: expected {size} bytes, found {size - 1}; run data_pipelines.prepare again"
    with pytest.raises(UserError) as raised:
        open_prepared(directory)
    assert str(raised.value) == message
    first.unlink()
    with pytest.raises(UserError, match=f"{first}: expected a file of records, found nothing"):
        open_prepared(directory)
    prepare(TINY.dataset(), root, out, "train", shards=3)
    assert shard_times(directory)[third.name] == before[third.name]
    assert_same_examples(open_prepared(directory), TINY.dataset().source(root, "train"))


def test_a_split_made_from_other_files_is_not_written_over(root: Path, tmp_path: Path):
    out = tmp_path / "out"
    prepare(TINY.dataset(), root, out, "train", shards=3)
    before = shard_times(out / "tiny" / "train")
    with pytest.raises(UserError, match="tiny/train from the same files in as many shards, found"):
        prepare(TINY.dataset(), root, out, "train", shards=2)
    (root / "images" / "another.png").touch()
    with pytest.raises(UserError, match="remove it first"):
        prepare(TINY.dataset(), root, out, "train", shards=3)
    assert shard_times(out / "tiny" / "train") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format_version": 2}, "format_version: expected 1, found 2"),
        (lambda m: {k: v for k, v in m.items() if k != "shards"}, "expected the key 'shards'"),
        (lambda m: [], "expected a manifest of a prepared data set"),
    ],
)
def test_another_manifest_is_refused(root: Path, tmp_path: Path, change, message: str):
    prepare(TINY.dataset(), root, tmp_path / "out", "train")
    path = tmp_path / "out" / "tiny" / "train" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        open_prepared(path.parent)


def test_a_record_with_other_bytes_is_named(root: Path, tmp_path: Path):
    prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=3)
    directory = tmp_path / "out" / "tiny" / "train"
    path = directory / shard_names(3)[1]
    content = bytearray(path.read_bytes())
    place = content.index((root / "images" / "00004.png").read_bytes())
    content[place + 100 : place + 120] = bytes(20)
    path.write_bytes(content)
    source = open_prepared(directory)
    with pytest.raises(UserError) as raised:
        source[4]
    assert str(raised.value).startswith(f"{path}, record 1: expected a record, found Corrupted")
    source[7]  # of another shard


def test_shards_of_another_split_are_refused(root: Path, tmp_path: Path):
    prepare(TINY.dataset(), root, tmp_path / "out", "train", shards=1)
    source = open_prepared(tmp_path / "out" / "tiny" / "train")
    with pytest.raises(UserError, match=r"record 2: expected images/x.png, found images/00002.png"):
        source.store.read(2, "images/x.png")
    assert pickle.loads(pickle.dumps(source.store)).read(0, "images/00000.png").shape == (20, 30, 3)


def test_a_bucket_is_written_and_read_through_local_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bucket = tmp_path / "bucket"  # a folder that all modules take for one
    for module in (data_pipelines.prepare, data_pipelines.prepared, data_pipelines.record_files):
        monkeypatch.setattr(module, "is_remote", lambda path: str(path).startswith(str(bucket)))
    prepare(TINY.dataset(), root, bucket, "train", shards=2)
    directory = bucket / "tiny" / "train"
    assert names(directory) == {*shard_names(2), "index", "manifest.json"}
    prepared = open_prepared(directory, cache=tmp_path / "cache")
    assert prepared.index.directory.is_relative_to(tmp_path / "cache")
    copies = shard_times(prepared.index.directory.parent)
    assert set(copies) == set(shard_names(2))
    again = open_prepared(directory, cache=tmp_path / "cache")
    assert shard_times(again.index.directory.parent) == copies
    assert_same_examples(again, TINY.dataset().source(root, "train"))


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_pipelines.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_prepares_the_splits_asked_for(tmp_path: Path):
    write_refer_root(tmp_path / "data")
    out = tmp_path / "out"
    done = run(
        *("refcoco", "--root", str(tmp_path / "data"), "--out", str(out)),
        *("--split", "train", "--split", "testB", "--shards", "1", "--workers", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert names(out / "refcoco") == {"train", "testB"}
    train, test = done.stdout.splitlines()
    counts = open_prepared(out / "refcoco" / "train").index.meta
    assert train == (
        f"{out}/refcoco/train: {counts['images']} images, {counts['targets']} targets, "
        f"{counts['phrases']} phrases, {counts['problems']} problems"
    )
    assert test.startswith(f"{out}/refcoco/testB: 1 images, 1 targets, 1 phrases, 0 problems")


def test_mistakes_are_one_sentence(tmp_path: Path):
    done = run("nothing", "--root", str(tmp_path), "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: data set 'nothing': expected one of refcoco,")
    write_refer_root(tmp_path / "data")
    (tmp_path / "out").touch()
    common = ("refcoco", "--root", str(tmp_path / "data"), "--split", "train")
    done = run(*common, "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    path = tmp_path / "out" / "refcoco" / "train"
    assert done.stderr.splitlines()[-1] == f"error: {path} cannot be written: Not a directory"
    done = run(*common, "--out", str(tmp_path / "new"), "--shards", "0")
    assert done.stderr.splitlines()[-1] == "error: --shards: expected 1 or more, found 0"
