"""Which sets are evaluated: names such as "refcoco/val" to sources of images with phrases.

Every set is read as the original reads it for evaluation (`Dataset.eval_rules`), but for
overlapping parts: their pixels count how many parts they are in, so that one reading serves both
ways to count them.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from data_pipelines.assemble import Example
from data_pipelines.datasets import DATASETS, find_dataset
from data_pipelines.shapes import DEFAULT_CONFIG, ShapesSource
from data_pipelines.source import Entry, IndexedSource
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import HELD_OUT, DatasetConfig
from evf_sam_jax.training_data import fingerprint, open_source

# Those of the paper's Table 2, in its order.
PAPER_SETS = (
    "refcoco/val",
    "refcoco/testA",
    "refcoco/testB",
    "refcoco+/val",
    "refcoco+/testA",
    "refcoco+/testB",
    "refcocog/val",
    "refcocog/test",
)
# Whose phrases are names of categories.
_BY_CATEGORY = ("ade20k", "mapillary", "human_parsing", "objects365", "objects365_boxes")
_BY_CATEGORY += ("partimagenet", "pascal_part")
SHAPES = "shapes"
# Of the embedded data set, which has no end worth waiting for.
SHAPES_IMAGES = 2000


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A split of a data set, image by image.

    Attributes:
      name: such as "refcoco/val".
      source: its images and phrases.
      by_category: whether its phrases are names of categories, which are then scored each.
    """

    name: str
    source: ShapesSource | IndexedSource
    by_category: bool = False

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """What tells its annotations from others."""
        return fingerprint(self.source)

    def entry(self, image: int) -> Entry:
        """Size and phrases of an image."""
        return self.source.entry(image)

    def read(self, image: int, chosen: Sequence[int]) -> Example:
        """An image with some of its phrases. Raises UserError if it cannot be read."""
        return self.source.read(image, chosen)

    def masks(self, image: int, chosen: Sequence[int]) -> UInt8[np.ndarray, "k h w"]:
        """Targets of some of the phrases, without the image where that is possible."""
        if isinstance(self.source, IndexedSource):
            return self.source.masks(image, chosen)
        return self.source.read(image, chosen).masks

    def image_id(self, image: int) -> str:
        """The same for the same picture in other data sets."""
        if isinstance(self.source, ShapesSource):
            return f"{SHAPES}/{self.source.example_id(image)}"
        return self.source.index.image_id(int(self.source.images[image]))

    def describe(self, image: int) -> str:
        """A name for messages."""
        return self.source.describe(image)

    def category(self, image: int, phrase: int) -> str:
        """Of the phrase's target; "" if there is none."""
        if isinstance(self.source, ShapesSource):
            return ""
        index = self.source.index
        row = self.source.phrase_rows(image)[phrase]
        return index.category(int(index.phrase_target[row]))


def split_names(text: str) -> tuple[str, ...]:
    """The sets that a command names.

    Args:
      text: names with "+" between them ("refcoco/val+refcoco+/testA"); "paper" stands for the eight
        splits of the paper's Table 2. "-" may stand for "_".

    Raises:
      UserError: one is no "DATASET/SPLIT" of those there are, or is there twice.
    """
    names: list[str] = []
    # A "+" before a "/" belongs to RefCOCO+.
    for word in re.split(r"\+(?!/)", text):
        names += PAPER_SETS if word == "paper" else (_checked_name(word),)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config.split: expected each set once, found {name} twice")
    return tuple(names)


def open_sets(
    names: Sequence[str],
    root: str,
    images: int = 0,
    ignore_unlabelled: bool = False,
    semantic_prefix: bool = True,
) -> tuple[EvaluationSet, ...]:
    """Opens sets, building their indices where there are none yet.

    Args:
      names: as `split_names` gives them.
      root: folder of the data, in the layout of the original or as `data_pipelines.prepare` wrote
        it.
      images: of each set, from its beginning; 0: all (of the embedded data set 2,000).
      ignore_unlabelled: whether pixels without a label do not count; in the original they are
        background.
      semantic_prefix: whether names of categories are asked for with the prefix that the multi-task
        models know.

    Raises:
      UserError: files are missing or are none of the data set's.
    """
    sets = []
    for name in names:
        dataset_name, _, split = name.partition("/")
        if dataset_name == SHAPES:
            source = ShapesSource(split, DEFAULT_CONFIG, images or SHAPES_IMAGES)
            sets.append(EvaluationSet(name, source))
            continue
        if not root:
            raise UserError(f"config.data: expected the folder that has {name}, found nothing")
        rules = find_dataset(dataset_name).eval_rules
        rules = dataclasses.replace(
            rules,
            overlap="sum",
            ignore_unlabelled=ignore_unlabelled,
            prefix=rules.prefix if semantic_prefix else "",
        )
        source = open_source(
            DatasetConfig(dataset_name, root, split, rules=tuple(vars(rules).items()))
        )
        if images:
            source = IndexedSource(source.index, source.store, source.rules, source.images[:images])
        sets.append(EvaluationSet(name, source, dataset_name in _BY_CATEGORY))
    return tuple(sets)


def _checked_name(word: str) -> str:
    dataset_name, slash, split = word.partition("/")
    for name in (dataset_name, dataset_name.replace("-", "_")):
        splits = HELD_OUT if name == SHAPES else name in DATASETS and DATASETS[name].splits
        if splits and slash and split in splits:
            return f"{name}/{split}"
        if splits:
            these = ", ".join(f"{name}/{one}" for one in splits)
            raise UserError(f"config.split: expected one of {these}, found {word!r}")
    known = ", ".join((SHAPES, *DATASETS))
    raise UserError(
        f"config.split: expected DATASET/SPLIT or paper, with one of the data sets {known}, "
        f"found {word!r}"
    )
