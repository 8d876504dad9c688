"""One experiment: its values as frozen dataclasses, read and checked from a config file's dict."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from data_pipelines.features import STORED
from data_pipelines.shapes import ShapesConfig
from data_pipelines.source import ReadingRules
from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import read_manifest
from evf_sam_jax.models.config_checks import DTYPES
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.optimizer import OptimizerConfig
from evf_sam_jax.param_rules import Rules, check_rules
from evf_sam_jax.sharding import MeshConfig
from evf_sam_jax.train_step import PROMPT_KINDS, LossWeights

# Splits of the embedded data set that no model is trained on.
HELD_OUT = ("val", "test")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_positive(key: str, value: int) -> None:
    if not (isinstance(value, int) and value > 0):
        raise UserError(f"{key}: expected a positive number, found {value!r}")


def _check_not_negative(key: str, value: int) -> None:
    if not (isinstance(value, int) and value >= 0):
        raise UserError(f"{key}: expected 0 or more, found {value!r}")


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
      features: as of `DatasetsConfig`.
    """

    shapes: ShapesConfig
    text_length: int
    canvas: tuple[int, int]
    workers: int = 0
    threads: int = 1
    max_skipped: int = 0
    features: str = ""

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
      features: the directory of the segmenter's features of all that is trained on, which
        `--mode cache_features` has written; "": they are computed in each step.
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
    features: str = ""

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
      batch_size: images an update, over all devices and parts.
      accumulate: parts that a batch goes through one after another, to the same gradients.
      ema_decay: of a moving average of the trained parameters, which then is what is evaluated
        and handed on; None: there is none.
    """

    name: str
    prompts: str
    steps: int
    batch_size: int
    trainable: Rules[bool]
    optimizer: OptimizerConfig
    loss: LossWeights = LossWeights()
    accumulate: int = 1
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.prompts not in PROMPT_KINDS:
            raise UserError(
                f"stages.{self.name}.prompts: expected one of {', '.join(PROMPT_KINDS)}, "
                f"found {self.prompts!r}"
            )
        for key in ("steps", "batch_size", "accumulate"):
            _check_positive(f"stages.{self.name}.{key}", getattr(self, key))
        check_rules(
            self.trainable,
            f"stages.{self.name}.trainable",
            "True or False",
            lambda value: isinstance(value, bool),
        )
        decay = self.ema_decay
        if decay is not None and not (isinstance(decay, int | float) and 0 <= decay < 1):
            raise UserError(
                f"stages.{self.name}.ema_decay: expected None or a number from 0 to below 1, "
                f"found {decay!r}"
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out images.

    Attributes:
      split: "val" or "test".
      images: from the beginning of the split.
      every: steps between evaluations; there is one at the end of each stage in any case.
      panel_images: images of the panel of predictions; 0: there is none.
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
        for key in ("images", "batch_size", "every"):
            _check_positive(f"evaluation.{key}", getattr(self, key))
        _check_not_negative("evaluation.panel_images", self.panel_images)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a run begins with, besides random parameters.

    Attributes:
      model: a model directory, for all parameters and the tokenizer; "": none.
      encoder: a directory of a foundation encoder (`python -m convert beit3`), with its tokenizer.
      segmenter: a directory of a foundation segmenter (`python -m convert sam`).
      scale: (regex, factor) over all parameters, on top of all that.
      frozen_dtype: what matrices that no stage trains are cast to when they are read, "float32" or
        "bfloat16"; the model that is written in the end has them as they were.
    """

    model: str = ""
    encoder: str = ""
    segmenter: str = ""
    scale: Rules[float] = ((".*", 1.0),)
    frozen_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.model and (self.encoder or self.segmenter):
            raise UserError("init: expected model, or encoder and segmenter, found both")
        check_rules(self.scale, "init.scale", "a number", _is_number)
        if self.frozen_dtype not in DTYPES:
            raise UserError(
                f"init.frozen_dtype: expected {' or '.join(DTYPES)}, found {self.frozen_dtype!r}"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state of training is saved, and which states are kept.

    Attributes:
      every: steps between two of them; there is one at the beginning and end of a stage too.
      keep: the newest ones that are kept.
      keep_best: the best ones by held-out cIoU that are kept besides.
      asynchronous: whether training goes on while a copy is written; the copy needs memory.
    """

    every: int = 1000
    keep: int = 2
    keep_best: int = 1
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _check_positive("checkpoints.every", self.every)
        _check_positive("checkpoints.keep", self.keep)
        _check_not_negative("checkpoints.keep_best", self.keep_best)


@dataclasses.dataclass(frozen=True)
class FeatureCacheConfig:
    """How `--mode cache_features` writes what `data.features` reads.

    Attributes:
      dtype: "float32", "bfloat16", or "int8" with a scale for each channel of each image.
      batch_size: images at a time, over the devices of a process; made a multiple of their number.
      images_a_file: of the files that are written; what is under way when the command is killed is
        computed again.
    """

    dtype: str = "bfloat16"
    batch_size: int = 8
    images_a_file: int = 500

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise UserError(
                f"feature_cache.dtype: expected one of {', '.join(STORED)}, found {self.dtype!r}"
            )
        for key in ("batch_size", "images_a_file"):
            _check_positive(f"feature_cache.{key}", getattr(self, key))


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """The row of the paper's tables that an experiment is about.

    Attributes:
      source: which row.
      sets: what the scores are of.
      ciou: in percent; None: not available.
      parameters: as the paper writes them; "": none.
      modules: what the paper counts: modules whose names begin so.
      note: why our count is another.
    """

    source: str
    sets: str
    ciou: tuple[float | None, ...]
    parameters: str = ""
    modules: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A whole run.

    Attributes:
      seed: of the initial parameters and of the order of the data.
      model: sizes and dtypes. Of what `init` names, the directories' own; a config file changes
        single ones (`model.encoder.remat`).
      data: what it is trained on.
      stages: what is trained, one after another.
      log_every: steps between two lines of progress.
      profile_every: steps between two profiles (of `PROFILED_STEPS` steps each, in `profile/`); 0:
        none.
      paper: what it is to be compared with.
    """

    seed: int
    model: EvfSamConfig
    data: ShapesDataConfig | DatasetsConfig
    stages: tuple[StageConfig, ...]
    evaluation: EvaluationConfig
    init: InitConfig = InitConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    log_every: int = 100
    profile_every: int = 0
    feature_cache: FeatureCacheConfig = FeatureCacheConfig()
    paper: PaperRow | None = None

    def __post_init__(self) -> None:
        _check_positive("log_every", self.log_every)
        _check_not_negative("profile_every", self.profile_every)
        if not self.stages:
            raise UserError("stages: expected at least one, found none")


def experiment_from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Returns the experiment that a config file describes.

    Stages run in `stage_order`, since a ConfigDict forgets in which order its keys were set.

    Raises:
      UserError: a key is unknown or missing, or a value is not possible.
    """
    values = dict(values)
    order = list(values.pop("stage_order", values.get("stages", ())))
    _check_known(ExperimentConfig, values, "config")
    init = _build(InitConfig, values.get("init", {}), "config.init")
    values["model"] = _plain(_merged(_initial_sizes(init), values.get("model", {})))
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
        model=EvfSamConfig.from_dict(values["model"]),
        data=_data_from_dict(values["data"]),
        stages=tuple(stages),
        evaluation=_build(EvaluationConfig, values["evaluation"], "config.evaluation"),
        init=init,
        mesh=_build(MeshConfig, values.get("mesh", {}), "config.mesh"),
        feature_cache=_build(
            FeatureCacheConfig, values.get("feature_cache", {}), "config.feature_cache"
        ),
        checkpoints=_build(CheckpointConfig, values.get("checkpoints", {}), "config.checkpoints"),
        paper=_build(PaperRow, values["paper"], "config.paper") if values.get("paper") else None,
    )
    experiment = _build(ExperimentConfig, values, "config")
    _warn_of_profile(init, experiment.model)
    return experiment


def _warn_of_profile(init: InitConfig, model: EvfSamConfig) -> None:
    """Says so if a model goes on in another profile than it was trained in."""
    if not init.model or not model.segmenter.stretches:  # of a SAM ViT both mean the same
        return
    if (trained := read_manifest(init.model).profile) != model.profile:
        logging.warning(
            "config.model.profile: %s, but %s was trained with %s: it sees other images, and its "
            "masks will be worse at first",
            model.profile,
            init.model,
            trained,
        )


def _initial_sizes(init: InitConfig) -> dict[str, Any]:
    """The model configuration that the directories of `init` have, as far as they go.

    Raises:
      UserError: one is no model directory, or has not what it is named for.
    """
    if init.model:
        return _sizes("init.model", init.model, ("encoder", "segmenter"))
    sizes: dict[str, Any] = {}
    for tower in ("encoder", "segmenter"):
        if directory := getattr(init, tower):
            sizes[tower] = _sizes(f"init.{tower}", directory, (tower,))[tower]
    return sizes


def _sizes(key: str, directory: str, towers: tuple[str, ...]) -> dict[str, Any]:
    manifest = read_manifest(directory)
    for tower in towers:
        if tower not in manifest.config:
            found = " and ".join(set(manifest.config) & {"encoder", "segmenter"}) or "neither"
            raise UserError(
                f"{key}: expected a model directory with {' and '.join(towers)}, found "
                f"{manifest.variant}, which has {found}, in {directory}"
            )
    return dict(manifest.config)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the changes, key by key in nested dicts."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


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
    _check_known(cls, values, where)
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: the key {field.name!r} is missing")
    return dict(values)


def _check_known(cls: type, values: Mapping[str, Any], where: str) -> None:
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}, expected one of {', '.join(fields)}")


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    values = {key: _tuples(value) for key, value in _checked(cls, values, where).items()}
    return cls(**values)


def _tuples(value: Any) -> Any:
    """Lists as tuples, so that every config is hashable."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) if isinstance(v, Mapping) else v for k, v in values.items()}
