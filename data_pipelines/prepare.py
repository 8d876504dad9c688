"""Writes a data set into a few large files, images, phrases and masks together.

python -m data_pipelines.prepare refcoco --root DATA --out PREPARED --split train

OUT/NAME/SPLIT then holds what `data_pipelines.prepared` describes. OUT may be in a bucket
("gs://...", with `etils[epath-gcs]` installed); each file is then written locally first. After an
interruption the same command goes on: finished shards stay, each with a `.json` beside it that says
what it was made from, until the manifest, which comes last, makes the whole valid. An image that
cannot be read is left out, of records and index alike, and listed among the index's problems. Only
one command at a time may write to an OUT/NAME/SPLIT.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path

from etils import epath
from tqdm import tqdm

from data_pipelines.dataset import Dataset
from data_pipelines.datasets import find_dataset
from data_pipelines.image_input import decode_image
from data_pipelines.index import AnnotatedImage, Index, Problem, write_index
from data_pipelines.prepared import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    Manifest,
    encode_record,
    read_manifest,
)
from data_pipelines.record_files import (
    Shard,
    finished_shard,
    is_remote,
    remove_leftovers,
    remove_sidecars,
    reporting,
    shard_name,
    write_shard,
    write_text,
)
from data_pipelines.source import LooseFiles
from evf_sam_jax.errors import UserError, run_command

IMAGES_A_SHARD = 1000  # some 100 to 200 MB of photographs


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write: rows `begin` to `end` of an index, into `directory`/`file`."""

    index: Index
    root: Path
    directory: str
    file: str
    begin: int
    end: int

    @property
    def fingerprint(self) -> str:
        """Of all that its content depends on."""
        return f"{FORMAT_VERSION} {self.index.meta['fingerprint']} {self.begin} {self.end}"


def prepare(
    dataset: Dataset,
    root: Path,
    out: str | os.PathLike,
    split: str,
    shards: int | None = None,
    workers: int = 1,
) -> Manifest:
    """Writes `out`/name/split, or what is missing of it.

    Args:
      shards: number of files; by default one for each `IMAGES_A_SHARD` images.
      workers: processes that write shards; up to 1: this one.

    Raises:
      UserError: the data set cannot be read, the directory cannot be written, or holds the same
        split made from other files.
    """
    if shards is not None and shards < 1:
        raise UserError(f"--shards: expected 1 or more, found {shards}")
    source = dataset.source(root, split)
    if not isinstance(source.store, LooseFiles):
        raise UserError(f"{dataset.name}: expected a data set of image files, found another form")
    index, directory = source.index, epath.Path(out) / dataset.name / split
    count = min(len(index), shards or -(-len(index) // IMAGES_A_SHARD))
    bounds = [i * len(index) // count for i in range(count + 1)]
    names = [shard_name(split, i, count) for i in range(count)]
    tasks = [
        ShardTask(index, source.store.root, os.fspath(directory), name, begin, end)
        for name, begin, end in zip(names, bounds[:-1], bounds[1:], strict=True)
    ]
    old = read_manifest(directory)
    if old is not None and not _made_from(old, index, names):
        raise UserError(
            f"{directory}: expected nothing, or {source.name} from the same files in as many "
            f"shards, found another; remove it first"
        )
    with reporting(directory):
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory, rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}", names)
    known = {} if old is None else {shard.file: shard for shard in old.shards}
    done = {
        task.file: shard
        for task in tasks
        if (
            shard := finished_shard(
                task.directory, task.file, task.fingerprint, known.get(task.file)
            )
        )
    }
    missing = [task for task in tasks if task.file not in done]
    if old is not None and not missing and (directory / INDEX / "meta.json").exists():
        remove_sidecars(directory, names)
        return old
    with tqdm(total=len(index), desc=source.name, unit="image", disable=None) as progress:
        progress.update(sum(task.end - task.begin for task in tasks if task.file in done))
        for task, shard in _write_shards(missing, workers):
            done[task.file] = shard
            progress.update(task.end - task.begin)
    written = [done[name] for name in names]
    kept = _write_kept_index(index, written, directory)
    counts = {key: kept[key] for key in ("images", "targets", "phrases", "problems")}
    fingerprint = index.meta["fingerprint"]
    manifest = Manifest(dataset.name, split, fingerprint, source.rules, counts, tuple(written))
    write_text(directory / MANIFEST, manifest.to_json())
    remove_sidecars(directory, names)
    return manifest


def write_images(task: ShardTask) -> Shard:
    """Writes one file of records. Raises UserError if it cannot be written."""

    def records() -> Iterator[bytes | tuple[int, str]]:
        for row in range(task.begin, task.end):
            image = task.index.annotated(row)
            try:
                content = _checked_content(task.root, image)
            except UserError as error:
                yield row, str(error)
            else:
                yield encode_record(image, content)

    return write_shard(task.directory, task.file, task.fingerprint, records())


def _checked_content(root: Path, image: AnnotatedImage) -> bytes:
    """The bytes of an image file, which have been decoded once.

    Raises:
      UserError: it is missing or unreadable, no image, or of another size than annotated.
    """
    path = root / image.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected an image file, found {error.strerror}") from None
    height, width = decode_image(content, str(path)).shape[:2]
    if (height, width) != (image.height, image.width):
        raise UserError(
            f"{path}: expected {image.width} x {image.height} pixels as its annotations say, "
            f"found {width} x {height}"
        )
    return content


def _write_shards(tasks: Sequence[ShardTask], workers: int) -> Iterator[tuple[ShardTask, Shard]]:
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task, write_images(task)
        return
    pool = futures.ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )
    try:
        running = {pool.submit(write_images, task): task for task in tasks}
        for future in futures.as_completed(running):
            yield running[future], future.result()
    except futures.process.BrokenProcessPool:
        raise UserError(
            "expected the worker processes to finish, found one of them killed (by lack of "
            "memory?); the same command with fewer --workers goes on where this one ended"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when the command is killed; it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _made_from(old: Manifest, index: Index, names: Sequence[str]) -> bool:
    same_files = old.fingerprint == index.meta["fingerprint"]
    return same_files and [shard.file for shard in old.shards] == list(names)


def _write_kept_index(index: Index, shards: Sequence[Shard], directory: epath.Path) -> dict:
    """Writes the index of the images that have records, in their order; returns its counts."""
    left_out = dict(pair for shard in shards for pair in shard.left_out)

    def items() -> Iterator[AnnotatedImage | Problem]:
        yield from index.problems()
        for row in range(len(index)):
            if row in left_out:
                where = f"{index.meta['name']}/{index.meta['split']}, image {index.image_id(row)}"
                yield Problem(where, left_out[row])
            else:
                yield index.annotated(row)

    meta = {key: index.meta[key] for key in ("name", "split", "fingerprint")}
    target = directory / INDEX
    with reporting(target), contextlib.ExitStack() as stack:
        if target.exists():
            target.rmtree()
        if not is_remote(target):
            return write_index(target, items(), meta).meta
        local = Path(stack.enter_context(tempfile.TemporaryDirectory())) / INDEX
        counts = write_index(local, items(), meta).meta
        target.mkdir()
        for path in local.iterdir():
            epath.Path(path).copy(target / path.name, overwrite=True)
        return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="such as refcoco")
    parser.add_argument("--root", required=True, type=Path, help="the data set's folder")
    parser.add_argument("--out", required=True, help="a folder, or gs://...")
    parser.add_argument("--split", action="append", help="may be given often; default: all")
    parser.add_argument("--shards", type=int, help=f"default: one for {IMAGES_A_SHARD} images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    run_command(_run, parser.parse_args())


def _run(options: argparse.Namespace) -> None:
    dataset = find_dataset(options.name)
    for split in options.split or dataset.splits:
        manifest = prepare(
            dataset, options.root, options.out, split, options.shards, options.workers
        )
        counts = ", ".join(f"{count} {what}" for what, count in manifest.counts.items())
        print(f"{epath.Path(options.out) / dataset.name / split}: {counts}")


if __name__ == "__main__":
    main()
