"""What a data set is: its splits, its files, its loader; and how one is opened by name."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_pipelines.index import AnnotatedImage, Index, Problem, open_index
from data_pipelines.source import ImageStore, IndexedSource, LooseFiles, ReadingRules
from evf_sam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set in one of the forms in which people hold it.

    Attributes:
      name: as in `--config` and on the command line.
      splits: in the order in which they are listed.
      layout: the folders and files expected below the root, as lines for messages.
      inputs: (root, split) to the annotation files and the image folders, all of which must exist.
      load: (root, split) to its annotations.
      evaluation_only: whether it may not be trained on.
      train_rules: how the original reads it for training.
      eval_rules: likewise for evaluation.
      published: split to counts that its publishers give, of "images", "targets" (objects, refs) or
        "phrases".
      image_store: (root, split) to where the pixels are; None: files below the root.
    """

    name: str
    splits: tuple[str, ...]
    layout: str
    inputs: Callable[[Path, str], Sequence[Path]]
    load: Callable[[Path, str], Iterator[AnnotatedImage | Problem]]
    evaluation_only: bool = False
    train_rules: ReadingRules = ReadingRules()
    eval_rules: ReadingRules = ReadingRules(text="lower")
    published: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    image_store: Callable[[Path, str], ImageStore] | None = None

    def check_files(self, root: Path, split: str) -> None:
        """Raises UserError, with the expected layout, if the split or one of its files is missing.

        Root, annotation files and image folders are looked at, not each image.
        """
        if split not in self.splits:
            raise UserError(
                f"{self.name}: expected one of the splits {', '.join(self.splits)}, found {split!r}"
            )
        for path in (root, *self.inputs(root, split)):
            if not path.exists():
                what = "folder" if path.suffix == "" else "file"
                raise UserError(
                    f"{path}: expected a {what} of {self.name}/{split}, found nothing there; "
                    f"below {root} there should be\n{self.layout}"
                )

    def index(self, root: Path, split: str) -> Index:
        """The index of a split, built if there is none yet.

        Raises:
          UserError: a file is missing, or its annotations are no such.
        """
        self.check_files(root, split)
        inputs = self.inputs(root, split)
        return open_index(root, self.name, split, inputs, lambda: self.load(root, split))

    def source(self, root: Path, split: str, rules: ReadingRules | None = None) -> IndexedSource:
        """The examples of a split; by default read as the original does.

        Raises:
          UserError: as `index`.
        """
        if rules is None:
            rules = self.train_rules if split == "train" else self.eval_rules
        index = self.index(root, split)
        store = LooseFiles(root) if self.image_store is None else self.image_store(root, split)
        return IndexedSource(index, store, rules)
