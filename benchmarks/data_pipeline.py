"""What the input pipeline costs beside a bare loop that reads the same samples.

    python -m benchmarks.data_pipeline

Draws a data set of photograph-sized JPEGs with polygons, then times, by turns in one process: a
loop that decodes, makes both resizes and the masks; and the pipeline with its index, sampling,
tokenizer and batches. Then the pipeline with one and with two worker processes and a consumer that
does nothing. Then how long the first batch of a large index takes, and how large the index is.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import environment
from benchmarks.alternation import print_comparison
from data_pipelines.assemble import BatchSpec
from data_pipelines.image_input import encoder_input, read_image, sam_input
from data_pipelines.index import AnnotatedImage, Target, write_index
from data_pipelines.mixture import Mixture
from data_pipelines.segmentations import decode_parts, encode_segmentation
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.source import IndexedSource, LooseFiles
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.train_pipeline import iterate, train_dataset

HEIGHT, WIDTH = 480, 640
SPEC = BatchSpec(batch_size=8, phrases=3, text_length=32)


def annotated(i: int, files: int) -> AnnotatedImage:
    """Three targets of some twenty points each, on one of the files."""
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
    return AnnotatedImage(f"{i}", f"{i % files}.jpg", HEIGHT, WIDTH, tuple(targets))


def write_images(root: Path, files: int) -> None:
    """JPEGs as large as photographs of COCO, smooth with some noise."""
    for i in range(files):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (30, 40, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (HEIGHT, WIDTH, 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.jpg", quality=90)


def bare_loop(source: IndexedSource, root: Path, samples: int) -> None:
    """Decodes, makes both resizes and three masks, and keeps nothing."""
    for i in range(samples):
        index = source.index
        image = read_image(root / index.file(i % len(source)))
        sam_input(image)
        encoder_input(image)
        for target in range(3):
            decode_parts(index.parts(3 * (i % len(source)) + target), HEIGHT, WIDTH)


def batches(source: IndexedSource, samples: int):
    mixture, tokenizer = Mixture((source,), (1.0,)), load_tokenizer(SHAPES_TOKENIZER)
    steps = samples // SPEC.batch_size
    return train_dataset(mixture, tokenizer, SPEC, seed=0, steps=steps)


def consume(source: IndexedSource, samples: int, workers: int) -> float:
    """Images per second from the second batch of each worker on, which excludes their start."""
    with iterate(batches(source, samples), workers) as stream:
        for _ in range(2 * max(workers, 1)):
            next(stream)
        start = time.perf_counter()
        count = sum(1 for _ in stream)
        return count * SPEC.batch_size / (time.perf_counter() - start)


def large_index(images: int) -> Iterator[AnnotatedImage]:
    template = annotated(0, 1)
    for i in range(images):
        targets = tuple(Target(f"{i}-{t.target_id}", t.phrases, t.parts) for t in template.targets)
        yield AnnotatedImage(f"{i}", template.file, HEIGHT, WIDTH, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, options.files)
        items = [annotated(i, options.files) for i in range(options.files)]
        index = write_index(root / "index", items, {"name": "benchmark", "split": "train"})
        source = IndexedSource(index, LooseFiles(root))
        dataset = batches(source, options.samples)
        runs = {
            "pipeline": lambda: [dataset[i] for i in range(len(dataset))],
            "bare loop": lambda: bare_loop(source, root, options.samples),
        }
        print_comparison(f"{options.samples} images in one process", runs, options.repeats)

        print("\n| workers | images/s |\n|---|---|")
        for _ in range(options.repeats):
            for workers in (1, 2):
                print(f"| {workers} | {consume(source, 3 * options.samples, workers):.1f} |")

        write_index(root / "large", large_index(60_000), {"name": "large", "split": "train"})
        start = time.perf_counter()
        large = IndexedSource(type(index)(root / "large"), LooseFiles(root))
        _ = batches(large, SPEC.batch_size)[0]
        seconds = time.perf_counter() - start
        on_disk = sum(file.stat().st_size for file in (root / "large").iterdir()) / 2**20
        print(
            f"\n60,000 images: first batch after {seconds:.2f} s, from an index of "
            f"{on_disk:.0f} MiB on disk, mapped into memory"
        )
        print(environment.describe("grain", "pillow", "pycocotools"))


if __name__ == "__main__":
    main()
