"""What the input pipeline costs beside a bare loop that reads the same samples.

    python -m benchmarks.data_pipeline

Draws a data set of photograph-sized JPEGs with polygons, then times, by turns in one process: a
loop that decodes, makes both resizes and the masks; and the pipeline with its index, sampling,
tokenizer, buckets and batches. Then the same from prepared and from loose files, and with cached
features in place of the segmenter's images, all with files in the system's cache and with none
there (Linux); with threads, with worker processes that prepare batches in threads or in none, and a
consumer that does nothing; and the first batch of a large index.
"""

import argparse
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import environment
from benchmarks.alternation import median_and_range, print_comparison
from data_pipelines.assemble import BatchSpec
from data_pipelines.buckets import Buckets
from data_pipelines.dataset import Dataset
from data_pipelines.features import (
    MANIFEST,
    FeatureManifest,
    FeatureStore,
    Layout,
    image_key,
    write_keys,
)
from data_pipelines.image_input import read_image
from data_pipelines.index import AnnotatedImage, Target
from data_pipelines.mixture import Mixture
from data_pipelines.prepare import prepare
from data_pipelines.prepared import open_prepared
from data_pipelines.record_files import shard_name, write_shard
from data_pipelines.segmentations import decode_parts, encode_segmentation
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.source import IndexedSource
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.train_pipeline import iterate, train_dataset

HEIGHT, WIDTH = 480, 640
SPEC = BatchSpec(batch_size=8, phrases=3, text_length=32)
# Grain shuffles a small range slowly: the index is of a size that data sets have.
IMAGES = 5_000
BUCKETS = Buckets((16, 32), ((640, 640),))
FEATURES = Layout(((64, 64, 256),), "bfloat16")  # of SAM, 2.1 MB an image


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Loads `images` annotated images, each with three targets, over as few as `files` files."""

    images: int
    files: int

    def annotated(self, i: int) -> AnnotatedImage:
        """Three polygons of twenty points, with two phrases each."""
        rng = np.random.default_rng(i)
        targets = []
        for t in range(3):
            angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
            radius = rng.uniform(40, 110, 20)
            x = np.clip(rng.uniform(150, 490) + radius * np.cos(angle), 0, WIDTH)
            y = np.clip(rng.uniform(120, 360) + radius * np.sin(angle), 0, HEIGHT)
            polygon = np.stack([x, y], axis=1).ravel().tolist()
            parts = encode_segmentation([polygon], HEIGHT, WIDTH)
            targets.append(Target(f"{i}-{t}", ("the red circle", "the strip on the left"), parts))
        file = f"images/{i % self.files}.jpg"
        return AnnotatedImage(f"{i}", file, HEIGHT, WIDTH, tuple(targets))

    def load(self, root: Path, split: str) -> Iterator[AnnotatedImage]:
        return map(self.annotated, range(self.images))

    def inputs(self, root: Path, split: str) -> tuple[Path, ...]:
        return (root / "images",)

    def dataset(self) -> Dataset:
        """As a data set."""
        name = f"drawn_{self.images}"
        return Dataset(name, ("train",), "  images/", inputs=self.inputs, load=self.load)


def write_images(root: Path, files: int) -> None:
    """JPEGs as large as photographs of COCO, smooth with some noise."""
    (root / "images").mkdir()
    for i in range(files):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (30, 40, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (HEIGHT, WIDTH, 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"images/{i}.jpg", quality=90)


def write_features(directory: Path, root: Path, files: int) -> FeatureStore:
    """Random features of each picture."""
    directory.mkdir()
    file, rng = shard_name("features", 0, 1), np.random.default_rng(0)
    keys = [image_key(read_image(root / f"images/{i}.jpg")) for i in range(files)]
    records = (
        FEATURES.encode(key, [rng.standard_normal(shape, np.float32) for shape in FEATURES.shapes])
        for key in keys
    )
    shard = write_shard(directory, file, "random", records)
    write_keys(directory, file, keys)
    (directory / MANIFEST).write_text(FeatureManifest("random", FEATURES, (shard,)).to_json())
    return FeatureStore(directory)


def bare_loop(source: IndexedSource, root: Path, samples: int) -> None:
    """Decodes, makes both resizes and the masks of three targets, and keeps nothing."""
    index = source.index
    for i in range(samples):
        row = i % len(source)
        image = read_image(root / index.file(row))
        SPEC.images.segmenter(image)
        SPEC.images.encoder(image)
        for target in range(3 * row, 3 * row + 3):
            decode_parts(index.parts(target), HEIGHT, WIDTH)


def batches(source: IndexedSource, samples: int, features: FeatureStore | None = None):
    mixture, tokenizer = Mixture((source,), (1.0,)), load_tokenizer(SHAPES_TOKENIZER)
    steps = samples // SPEC.batch_size
    layout = None if features is None else features.manifest.layout
    spec = dataclasses.replace(SPEC, features=layout)
    return train_dataset(
        mixture, tokenizer, spec, seed=0, steps=steps, buckets=BUCKETS, features=features
    )


def consume(source: IndexedSource, samples: int, workers: int, threads: int) -> float:
    """Images per second without the first batches, whose time is that of starting."""
    with iterate(batches(source, samples), workers, threads=threads) as stream:
        for _ in range(8 * max(workers, threads, 1)):
            next(stream)
        start = time.perf_counter()
        count = sum(1 for _ in stream)
        return count * SPEC.batch_size / (time.perf_counter() - start)


def consume_all(source: IndexedSource, samples: int, features: FeatureStore | None = None) -> None:
    """Makes the batches in this process."""
    dataset = batches(source, samples, features)
    for step in range(len(dataset)):
        batch = dataset[step]
        assert batch is not None and (batch.skipped_id < 0).all(), "each can be read"


def forget(folder: Path) -> None:
    """Drops the files of a folder from the system's cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_batch(root: Path, images: int) -> None:
    """Opens a large index that is there already, and makes one batch."""
    dataset = Drawn(images, 1).dataset()
    dataset.index(root, "train")
    before, start = _own_memory(), time.perf_counter()
    source = dataset.source(root, "train")
    _ = batches(source, SPEC.batch_size)[0]
    seconds, grown = time.perf_counter() - start, _own_memory() - before
    on_disk = sum(file.stat().st_size for file in source.index.directory.iterdir()) / 2**20
    print(
        f"\n{images:,} images: first batch after {seconds:.2f} s; memory of the process grew by "
        f"{grown:.0f} MiB, the index has {on_disk:.0f} MiB on disk, mapped"
    )


def _own_memory() -> float:
    """MiB of this process that no file stands for (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(environment.describe("grain", "pillow", "pycocotools", "array-record"))
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "loose", Path(folder) / "prepared"
        root.mkdir()
        write_images(root, options.files)
        dataset = Drawn(IMAGES, options.files).dataset()
        source = dataset.source(root, "train")
        prepare(dataset, root, out, "train", workers=2)
        prepared = open_prepared(out / dataset.name / "train")
        features = write_features(Path(folder) / "features", root, options.files)
        samples = options.samples
        compare = functools.partial(print_comparison, repeats=options.repeats)
        loops = {
            "pipeline": lambda: consume_all(source, samples),
            "bare loop": lambda: bare_loop(source, root, samples),
        }
        forms = {
            "prepared": lambda: consume_all(prepared, samples),
            "loose files": lambda: consume_all(source, samples),
            "loose files and features": lambda: consume_all(source, samples, features),
        }
        for run in (*loops.values(), *forms.values()):
            run()  # once untimed
        compare(f"{samples} images in one process", loops)
        compare(f"\n{samples} images, files in the system's cache", forms)
        compare(f"\n{samples} images, none there", forms, before=lambda: forget(Path(folder)))
        rates: dict[tuple[int, int], list[float]] = {
            kind: [] for kind in ((0, 1), (0, 2), (1, 0), (2, 0), (1, 1), (2, 1))
        }
        for _ in range(options.repeats):
            for kind, found in rates.items():
                found.append(consume(source, 6 * samples, *kind))
        print("\n| worker processes | threads | images/s, median (min to max) |\n|---|---|---|")
        for (workers, threads), found in rates.items():
            print(f"| {workers} | {threads} | {median_and_range(found, 0)} |")
        first_batch(root, 60_000)


if __name__ == "__main__":
    main()
