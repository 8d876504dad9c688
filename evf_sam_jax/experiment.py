"""One experiment: its values as frozen dataclasses, read and checked from a config file's dict."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.shapes import ShapesConfig
from data_pipelines.source import ReadingRules
from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import read_manifest
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.optimizer import OptimizerConfig
from evf_sam_jax.param_rules import Rules
from evf_sam_jax.train_step import PROMPT_KINDS, LossWeights

# Splits of the embedded data set that no model is trained on.
HELD_OUT = ("val", "test")


@dataclasses.dataclass(frozen=True)
class ShapesDataConfig:
    """The embedded data set, and the shapes of its batches.

    Attributes:
      shapes: how the embedded data set is drawn.
      text_length: tokens a phrase, `<s>` and `</s>` included.
      canvas: height and width that hold every image at its original size.
      workers: processes that make batches; 0: this one does.
      threads: that make batches ahead, of this process or of each worker; drawing gains nothing by
        more than one.
      max_skipped: examples that may turn out unreadable before the run stops; none is.
    """

    shapes: ShapesConfig
    text_length: int
    canvas: tuple[int, int]
    workers: int = 0
    threads: int = 1
    max_skipped: int = 0

    def __post_init__(self) -> None:
        _check_positive("data.text_length", self.text_length)
        largest = max(self.shapes.sides)
        if not (isinstance(self.canvas, tuple) and len(self.canvas) == 2):
            raise UserError(f"data.canvas: expected a height and a width, found {self.canvas!r}")
        if min(self.canvas) < largest:
            raise UserError(
                f"data.canvas: expected at least {largest} x {largest}, the largest image, found "
                f"{self.canvas[0]} x {self.canvas[1]}"
            )
        _check_not_negative("data.workers", self.workers)
        _check_not_negative("data.threads", self.threads)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One split of a data set on disk.

    Attributes:
      name: as in `data_pipelines/datasets.py`.
      root: its folder, or the one that `data_pipelines.prepare` wrote it into.
      weight: how often it is drawn from, beside the others.
      rules: (name, value) of `ReadingRules`, where they differ from the original's for it.
    """

    name: str
    root: str
    split: str = "train"
    weight: float = 1.0
    rules: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for key in ("name", "root", "split"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value):
                raise UserError(f"data: expected {key} as a string, found {value!r}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise UserError(f"data: expected weight as a number, found {self.weight!r}")
        known = [field.name for field in dataclasses.fields(ReadingRules)]
        for rule, _ in self.rules:
            if rule not in known:
                raise UserError(f"data: unknown rule {rule!r}, expected one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class DatasetsConfig:
    """Data sets on disk, and the shapes of their batches.

    Attributes:
      train: what is trained on, drawn by weight.
      held_out: what is measured on.
      phrases: k, phrases an image.
      text_lengths: tokens a phrase, `<s>` and `</s>` included, of which each batch gets one.
      canvases: heights and widths that hold images at their original size; of an image larger than
        all, the target is shrunk in training, and the canvas grown in evaluation.
      exclude_images_of: images of these splits are not trained on.
      max_skipped: examples that may turn out unreadable before the run stops.
      workers: processes that make batches; 0: this one does.
      threads: that make batches ahead, of this process or of each worker.
    """

    train: tuple[DatasetConfig, ...]
    held_out: tuple[DatasetConfig, ...]
    phrases: int = 3
    text_lengths: tuple[int, ...] = (16, 32, 64)
    canvases: tuple[tuple[int, int], ...] = ((640, 640),)
    exclude_images_of: tuple[DatasetConfig, ...] = ()
    max_skipped: int = 100
    workers: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        _check_positive("data.phrases", self.phrases)
        for key in ("workers", "threads", "max_skipped"):
            _check_not_negative(f"data.{key}", getattr(self, key))
        for key in ("text_lengths", "canvases"):
            if not (isinstance(getattr(self, key), tuple) and getattr(self, key)):
                raise UserError(f"data.{key}: expected a list, found {getattr(self, key)!r}")
        for length in self.text_lengths:
            _check_positive("data.text_lengths", length)
        for canvas in self.canvases:
            if not (isinstance(canvas, tuple) and len(canvas) == 2):
                raise UserError(f"data.canvases: expected heights and widths, found {canvas!r}")
            for side in canvas:
                _check_positive("data.canvases", side)
        for key in ("train", "held_out"):
            if not getattr(self, key):
                raise UserError(f"data.{key}: expected at least one data set, found none")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
      name: the stage's numbers are logged under it.
      prompts: what tells the segmenter which object is meant.
      trainable: (regex, whether it is trained) over all parameters.
      batch_size: images a step.
    """

    name: str
    prompts: str
    steps: int
    batch_size: int
    trainable: Rules[bool]
    optimizer: OptimizerConfig
    loss: LossWeights = LossWeights()

    def __post_init__(self) -> None:
        if self.prompts not in PROMPT_KINDS:
            raise UserError(
                f"stages.{self.name}.prompts: expected one of {', '.join(PROMPT_KINDS)}, "
                f"found {self.prompts!r}"
            )
        for key in ("steps", "batch_size"):
            _check_positive(f"stages.{self.name}.{key}", getattr(self, key))


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out images.

    Attributes:
      split: "val" or "test".
      images: from the beginning of the split.
      every: steps between evaluations; there is one at the end of each stage in any case.
      panel_images: images of the panel of predictions.
    """

    split: str = "val"
    images: int = 256
    batch_size: int = 16
    every: int = 1000
    panel_images: int = 4

    def __post_init__(self) -> None:
        if self.split not in HELD_OUT:
            raise UserError(
                f"evaluation.split: expected {' or '.join(HELD_OUT)}, found {self.split!r}"
            )
        for key in ("images", "batch_size", "every", "panel_images"):
            _check_positive(f"evaluation.{key}", getattr(self, key))


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A whole run.

    Attributes:
      seed: of the initial parameters and of the order of the data.
      init_scale: (regex, factor) over all parameters, on top of the model's own initialisation.
      init_model: a model directory whose parameters, sizes and tokenizer the run begins with; "": a
        model of random parameters.
      model: sizes; those of `init_model`, where there is one.
      data: what it is trained on.
      stages: what is trained, one after another.
      log_every: steps between two lines of progress.
    """

    seed: int
    model: EvfSamConfig
    data: ShapesDataConfig | DatasetsConfig
    stages: tuple[StageConfig, ...]
    evaluation: EvaluationConfig
    init_scale: Rules[float] = ((".*", 1.0),)
    init_model: str = ""
    log_every: int = 100

    def __post_init__(self) -> None:
        _check_positive("log_every", self.log_every)
        if not self.stages:
            raise UserError("stages: expected at least one, found none")


@dataclasses.dataclass(frozen=True)
class ModelEvaluationConfig:
    """The evaluation of a model directory.

    Attributes:
      model: the directory.
      split: data set and split, such as "shapes/val".
      images: from the beginning of the split.
      text_length: tokens a phrase, `<s>` and `</s>` included.
    """

    model: str
    split: str
    images: int
    batch_size: int
    text_length: int

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("config.model: expected a model directory, found nothing")
        splits = [f"shapes/{split}" for split in HELD_OUT]
        if self.split not in splits:
            raise UserError(f"config.split: expected {' or '.join(splits)}, found {self.split!r}")
        for key in ("images", "batch_size"):
            _check_positive(f"config.{key}", getattr(self, key))


def evaluation_from_dict(values: Mapping[str, Any]) -> ModelEvaluationConfig:
    """Returns the evaluation that a config file describes. Raises UserError as below."""
    return _build(ModelEvaluationConfig, values, "config")


def experiment_from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Returns the experiment that a config file describes.

    Stages run in `stage_order`, since a ConfigDict forgets in which order its keys were set.

    Raises:
      UserError: a key is unknown or missing, or a value is not possible.
    """
    values = dict(values)
    order = list(values.pop("stage_order", values.get("stages", ())))
    if values.get("init_model"):
        if "model" in values:
            raise UserError("config: expected model or init_model, which has its own, found both")
        values["model"] = read_manifest(values["init_model"]).config
    values = _checked(ExperimentConfig, values, "config")
    if sorted(order) != sorted(values["stages"]):
        named = ", ".join(sorted(values["stages"]))
        raise UserError(f"config.stage_order: expected each of {named} once, found {order}")
    stages = []
    for name in order:
        where = f"config.stages.{name}"
        stage = _checked(StageConfig, {"name": name, **values["stages"][name]}, where)
        stage["optimizer"] = _build(OptimizerConfig, stage["optimizer"], f"{where}.optimizer")
        if "loss" in stage:
            stage["loss"] = _build(LossWeights, stage["loss"], f"{where}.loss")
        stages.append(_build(StageConfig, stage, where))
    values.update(
        model=EvfSamConfig.from_dict(_plain(values["model"])),
        data=_data_from_dict(values["data"]),
        stages=tuple(stages),
        evaluation=_build(EvaluationConfig, values["evaluation"], "config.evaluation"),
    )
    return _build(ExperimentConfig, values, "config")


def _data_from_dict(values: Mapping[str, Any]) -> ShapesDataConfig | DatasetsConfig:
    if "shapes" in values:
        data = _checked(ShapesDataConfig, values, "config.data")
        data["shapes"] = _build(ShapesConfig, data["shapes"], "config.data.shapes")
        return _build(ShapesDataConfig, data, "config.data")
    data = _checked(DatasetsConfig, values, "config.data")
    for key in ("train", "held_out", "exclude_images_of"):
        data[key] = tuple(
            _build(DatasetConfig, _with_rules(entry, f"config.data.{key}"), f"config.data.{key}")
            for entry in _list(data.get(key, ()), f"config.data.{key}")
        )
    return _build(DatasetsConfig, data, "config.data")


def _with_rules(entry: Any, where: str) -> dict[str, Any]:
    """An entry with its rules as pairs. Raises UserError if one or the other has no keys."""
    for part in (entry, entry.get("rules", {}) if isinstance(entry, Mapping) else {}):
        if not isinstance(part, Mapping):
            raise UserError(f"{where}: expected keys with values, found {part!r}")
    return {**entry, "rules": tuple(entry.get("rules", {}).items())}


def _list(values: Any, where: str) -> Sequence[Any]:
    if not isinstance(values, list | tuple):
        raise UserError(f"{where}: expected a list of data sets, found {values!r}")
    return values


def _checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as a dict, if their keys are those of the dataclass."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}, expected one of {', '.join(fields)}")
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: the key {key!r} is missing")
    return dict(values)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    values = {key: _tuples(value) for key, value in _checked(cls, values, where).items()}
    return cls(**values)


def _tuples(value: Any) -> Any:
    """Lists as tuples, so that every config is hashable."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _check_positive(key: str, value: int) -> None:
    if not (isinstance(value, int) and value > 0):
        raise UserError(f"{key}: expected a positive number, found {value!r}")


def _check_not_negative(key: str, value: int) -> None:
    if not (isinstance(value, int) and value >= 0):
        raise UserError(f"{key}: expected 0 or more, found {value!r}")
