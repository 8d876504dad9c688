"""The values of an evaluation, as a config file gives them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.splits import split_names
from evf_sam_jax.evaluation.tables import PAPER
from evf_sam_jax.models.config_checks import DTYPES
from evf_sam_jax.predictor import NO_TARGET_PIXELS

AUTO = "auto"
# What may change where an evaluation goes on: no row depends on it. `config.json` keeps the values
# that it began with; `results.json`, written last, has those that its numbers were made with.
FREE = ("devices", "threads", "shard_phrases", "coco_json", "bootstrap_samples", "bootstrap_seed")
FREE += ("no_target_pixels", "paper")


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
    """The evaluation of a model on splits of data sets.

    Attributes:
      model: a model directory, or the directory of a training run.
      split: data sets and splits with "+" between them; see `splits.split_names`.
      checkpoint: of a run: "newest", "best", or a step; of a model directory "newest".
      data: folder of the data sets, as in training.
      images: of each set, from its beginning; 0: all.
      batch_size: images that a device takes at a time.
      phrases: of an image that are decoded at a time, at most.
      dtype: of activations and matrix products, "float32" or "bfloat16".
      devices: of each process, at most; 0: all.
      threads: that read images ahead.
      masks: whether rows have the predicted masks.
      coco_json: whether to write these as `predictions.json` too, in COCO's format.
      ignore_unlabelled: whether pixels without a label do not count.
      semantic_prefix: whether categories are asked for with `[semantic]`.
      no_target_pixels: fewer predicted pixels say that a phrase names nothing.
      bootstrap_samples: resamplings of the images for the intervals.
      bootstrap_seed: of these.
      paper: the paper's variant to stand beside; "auto": the one of the model's sizes.
      shard_phrases: phrases after which rows are written, or a minute.
    """

    model: str
    split: str
    checkpoint: str = "newest"
    data: str = ""
    images: int = 0
    batch_size: int = 4
    phrases: int = 8
    dtype: str = "float32"
    devices: int = 0
    threads: int = 2
    masks: bool = True
    coco_json: bool = False
    ignore_unlabelled: bool = False
    semantic_prefix: bool = True
    no_target_pixels: int = NO_TARGET_PIXELS
    bootstrap_samples: int = 1000
    bootstrap_seed: int = 0
    paper: str = AUTO
    shard_phrases: int = 2000

    def __post_init__(self) -> None:
        """Raises UserError for a value that cannot be."""
        if not self.model:
            raise UserError("config.model: expected a model directory, found nothing")
        split_names(self.split)
        for key in ("batch_size", "phrases", "bootstrap_samples", "shard_phrases", "threads"):
            if getattr(self, key) < 1:
                raise UserError(f"config.{key}: expected 1 or more, found {getattr(self, key)}")
        for key in ("images", "devices", "no_target_pixels", "bootstrap_seed"):
            if getattr(self, key) < 0:
                raise UserError(f"config.{key}: expected 0 or more, found {getattr(self, key)}")
        for key, choices in (("dtype", DTYPES), ("paper", (AUTO, *PAPER))):
            if getattr(self, key) not in choices:
                expected = " or ".join(choices)
                raise UserError(f"config.{key}: expected {expected}, found {getattr(self, key)!r}")
        if self.coco_json and not self.masks:
            raise UserError("config.coco_json: expected false without config.masks, found true")


def job_from_dict(values: Mapping[str, Any]) -> EvaluationJob:
    """Returns the evaluation that a config file describes.

    Raises:
      UserError: a key is unknown or missing, or a value is not possible.
    """
    known = {field.name: field for field in dataclasses.fields(EvaluationJob)}
    for key in values:
        if key not in known:
            raise UserError(f"config: unknown key {key!r}, expected one of {', '.join(known)}")
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UserError(f"config: the key {key!r} is missing")
        if key in values and type(values[key]) is not field.type:
            what = {str: "text", int: "a whole number", bool: "true or false"}[field.type]
            raise UserError(f"config.{key}: expected {what}, found {values[key]!r}")
    return EvaluationJob(**values)
