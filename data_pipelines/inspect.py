"""Looks at a data set: counts beside the published ones, histograms, and a sheet of examples.

python -m data_pipelines.inspect refcoco --root DATA --split val --sheet refcoco_val.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.dataset import Dataset
from data_pipelines.datasets import find_dataset
from data_pipelines.source import IndexedSource
from evf_sam_jax.errors import UserError, run_command
from evf_sam_jax.visualize import COLORS, Cell, outline, overlay, panel

COUNTED = ("images", "targets", "phrases", "problems")
SAMPLED_IMAGES = 2000  # of which histograms are made, evenly spaced
LENGTH_EDGES = (1, 2, 3, 4, 6, 9, 13, 21)  # words; the last bin is open
AREA_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # share of the image
SHOWN_PROBLEMS = 5
SHEET_PHRASES = 3
_BAR = 40  # characters of the longest bar


def inspect(dataset: Dataset, root: Path, split: str) -> str:
    """The counts and histograms of a split, as text.

    Raises:
      UserError: a file is missing, or is not what it should be.
    """
    source = dataset.source(root, split)
    published = dataset.published.get(split, {})
    lines = [f"{dataset.name}/{split}", f"  {'':10}{'found':>10}  published"]
    for key in COUNTED:
        found, expected = source.index.meta[key], published.get(key)
        beside = "" if expected is None else f"{expected} ({_verdict(found, expected)})"
        lines.append(f"  {key:10}{found:>10}  {beside}".rstrip())
    words, shares = _samples(source)
    lines += histogram("words a phrase", words, LENGTH_EDGES)
    lines += histogram("share of the image", shares, AREA_EDGES)
    for problem in source.index.problems()[:SHOWN_PROBLEMS]:
        lines.append(f"  problem: {problem.where}: {problem.what}")
    return "\n".join(lines)


def histogram(title: str, values: Sequence[float | int], edges: Sequence[float | int]) -> list[str]:
    """A line a bin: from an edge up to the next one, the last bin with all above."""
    counts, _ = np.histogram(values, [*edges, np.inf])
    lines = [f"  {title}"]
    for low, count in zip(edges, counts.tolist(), strict=True):
        bar = "#" * round(_BAR * count / max(counts.max(), 1))
        lines.append(f"    {low:>5} and more {count:>8} {bar}".rstrip())
    return lines


def sheet(source: IndexedSource, images: int) -> UInt8[np.ndarray, "h w 3"]:
    """A row an image, evenly spaced over the source: the image, then its first phrases' masks."""
    rows = []
    for index in _spaced(len(source), images):
        chosen = range(min(SHEET_PHRASES, source.phrase_count(index)))
        try:
            example = source.read(index, chosen)
        except UserError as error:
            rows.append([Cell(np.full((64, 64, 3), 200, np.uint8), str(error))])
            continue
        row = [Cell(example.image, source.index.image_id(int(source.images[index])))]
        for phrase, mask in zip(example.phrases, example.masks, strict=True):
            marked = mask > 0
            picture = overlay(example.image, marked, COLORS["blue"])
            row.append(Cell(outline(picture, marked, COLORS["blue"]), phrase))
        rows.append(row)
    return panel(rows)


def _samples(source: IndexedSource) -> tuple[list[int], list[float]]:
    """Words of each phrase and the share of the image of each target, of some images."""
    words: list[int] = []
    shares: list[float] = []
    for index in _spaced(len(source), SAMPLED_IMAGES):
        entry = source.entry(index)
        words += [len(phrase.split()) for phrase in entry.phrases]
        shares += [a / (entry.height * entry.width) for a in source.target_areas(index)]
    return words, shares


def _spaced(length: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, length - 1, min(length, count)).astype(int)).tolist()


def _verdict(found: int, expected: int) -> str:
    return "equal" if found == expected else "differs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="such as refcoco")
    parser.add_argument("--root", required=True, type=Path, help="the data set's folder")
    parser.add_argument("--split", action="append", help="may be given often; default: all")
    parser.add_argument("--sheet", type=Path, help="a PNG to write, of the first split given")
    parser.add_argument("--images", type=int, default=8, help="rows of the sheet")
    run_command(_run, parser.parse_args())


def _run(options: argparse.Namespace) -> None:
    dataset = find_dataset(options.name)
    if options.images < 1:
        raise UserError(f"--images: expected 1 or more, found {options.images}")
    splits = options.split or dataset.splits
    for split in splits:
        print(inspect(dataset, options.root, split))
    if options.sheet is not None:
        picture = sheet(dataset.source(options.root, splits[0]), options.images)
        try:
            options.sheet.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(options.sheet)
        except (OSError, ValueError) as error:  # ValueError: no such kind of picture
            raise UserError(f"--sheet {options.sheet} cannot be written: {error}") from None
        print(options.sheet)


if __name__ == "__main__":
    main()
