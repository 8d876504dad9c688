"""A small data set on disk: images of several sizes, each with targets and phrases."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.dataset import Dataset
from data_pipelines.index import AnnotatedImage, Problem, Target
from data_pipelines.segmentations import encode_mask

WORDS = ("the red circle", "strip", "The Square ", "the large circle left of the strip")


@dataclasses.dataclass(frozen=True)
class TinyDataset:
    """Loads `images` images below a root, image i with 1 + i % 4 phrases on 1 or 2 targets."""

    images: int

    def annotated(self, i: int) -> AnnotatedImage:
        height, width = 20 + i % 3 * 10, 30 + i % 2 * 20
        targets = []
        for t in range(1 + i % 2):
            mask = np.zeros((height, width), bool)
            mask[2 + t : 9 + t, 3 + i % 5 : 12 + t] = True
            other = np.zeros((height, width), bool)
            other[5:15, 8:20] = True
            phrases = WORDS[t :: 1 + i % 2][: (1 + i % 4 + t) // (1 + i % 2) or 1]
            parts = (encode_mask(mask), encode_mask(other))
            targets.append(Target(f"{i}-{t}", phrases, parts, ("thing", "part")[t]))
        ignore = np.zeros((height, width), bool)
        ignore[-1] = True
        file = f"images/{i:05}.png"
        return AnnotatedImage(f"tiny/{i}", file, height, width, tuple(targets), encode_mask(ignore))

    def write(self, root: Path) -> None:
        (root / "images").mkdir(parents=True)
        for i in range(self.images):
            one = self.annotated(i)
            rng = np.random.default_rng(i)
            pixels = rng.integers(0, 256, (one.height, one.width, 3), np.uint8)
            Image.fromarray(pixels).save(root / one.file)

    def load(self, root: Path, split: str) -> Iterator[AnnotatedImage | Problem]:
        yield from map(self.annotated, range(self.images))

    def inputs(self, root: Path, split: str) -> tuple[Path, ...]:
        return (root / "images",)

    def dataset(self, name: str = "tiny") -> Dataset:
        return Dataset(
            name,
            ("train", "val"),
            "  images/   PNG files",
            inputs=self.inputs,
            load=self.load,
        )
