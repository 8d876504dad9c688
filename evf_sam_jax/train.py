"""The training run: parameters, then each stage's loop, then a model directory.

A run's directory holds `config.json`, `metrics.jsonl`, TensorBoard events, `skipped.jsonl`
(examples that could not be read, if any), `panel.png` (held-out
images with targets and predictions) and at the end `model/`, which `predict` and `evaluate` open.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import jax
import numpy as np
from clu import parameter_overview
from PIL import Image

from data_pipelines.assemble import Example
from data_pipelines.batch import Batch
from data_pipelines.eval_pipeline import eval_dataset, eval_rows
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from data_pipelines.train_pipeline import iterate, train_dataset
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluate import evaluate, make_count_step, prediction_panel
from evf_sam_jax.experiment import ExperimentConfig, StageConfig
from evf_sam_jax.metrics import IouSums, StepMetrics
from evf_sam_jax.model_dir import Manifest, path_leaves, write_model_dir
from evf_sam_jax.models.evf_sam import init_params, param_shapes
from evf_sam_jax.optimizer import learning_rate_schedule, make_optimizer
from evf_sam_jax.param_rules import Params, map_rules, match_rules
from evf_sam_jax.predict import Predictor
from evf_sam_jax.run_log import RunLog, SkippedLog, check_finite, clock, make_workdir
from evf_sam_jax.train_state import create_state, split_params
from evf_sam_jax.train_step import PromptKind, make_train_step
from evf_sam_jax.training_data import TrainingData, open_data

# Steps the host may be ahead of the device: it prepares the next one while the last one runs, and
# reads no number that is not there yet.
STEPS_AHEAD = 2
# Of an image with more phrases, the first are shown.
PANEL_PHRASES = 3


def train(config: ExperimentConfig, workdir: Path) -> IouSums:
    """Trains all stages and writes the model directory.

    Returns:
      What the last stage reached on held-out images.

    Raises:
      UserError: the directory holds another run, the configuration cannot be, or a loss stopped
        being finite.
    """
    tokenizer = load_tokenizer(_tokenizer_dir(config), config.model.encoder.max_text_tokens)
    tokenizer.check_vocabulary(config.model.encoder.vocab_size)
    check_experiment(config)
    data = open_data(config)
    make_workdir(workdir, config)
    params = initial_params(config)
    with RunLog(workdir) as log:
        log.line(parameter_overview.get_parameter_overview(params, include_stats=False))
        for stage in config.stages:
            params, sums = run_stage(config, stage, data, params, tokenizer, log)
        manifest = Manifest(variant="evf-sam", config=config.model.to_dict())
        write_model_dir(workdir / "model", params, manifest, _tokenizer_dir(config))
        log.line(f"model directory: {workdir / 'model'}")
        examples = list(_shown(data, tokenizer, config.evaluation.panel_images))
        if examples:
            picture = prediction_panel(Predictor(config.model, params, tokenizer), examples)
            Image.fromarray(picture).save(workdir / "panel.png")
            log.image(config.stages[-1].steps, f"{config.stages[-1].name}/panel", picture)
    return sums


def check_experiment(config: ExperimentConfig) -> None:
    """Raises UserError for what would otherwise stop the run after minutes of training."""
    params = param_shapes(config.model)
    match_rules(config.init_scale, path_leaves(params), "init_scale")
    for stage in config.stages:
        trainable, _ = split_params(params, stage.trainable)
        make_optimizer(stage.optimizer, stage.steps, trainable)


def initial_params(config: ExperimentConfig) -> Params:
    """The parameters of `init_model`, or random ones, each scaled by its factor in `init_scale`."""
    if config.init_model:
        params = Predictor.load(config.init_model).params
    else:
        params = init_params(config.model, jax.random.key(config.seed))
    return map_rules(lambda factor, leaf: factor * leaf, config.init_scale, params, "init_scale")


def run_stage(
    config: ExperimentConfig,
    stage: StageConfig,
    data: TrainingData,
    params: Params,
    tokenizer: Tokenizer,
    log: RunLog,
) -> tuple[Params, IouSums]:
    """Trains one stage.

    Returns:
      All parameters, and what they reach on held-out images.
    """
    trainable, frozen = split_params(params, stage.trainable)
    optimizer = make_optimizer(stage.optimizer, stage.steps, trainable)
    state = create_state(trainable, frozen, optimizer)
    schedule = learning_rate_schedule(stage.optimizer, stage.steps)
    prompts = cast(PromptKind, stage.prompts)  # StageConfig has checked it
    step_function = jax.jit(
        make_train_step(config.model, prompts, stage.loss, optimizer, schedule),
        donate_argnums=0,
    )
    count_step = make_count_step(config.model, prompts)
    progress = Progress(config, stage, log)
    sums = IouSums()
    skipped = SkippedLog(log, stage.name, data.mixture.describe, config.data.max_skipped)
    dataset = _train_batches(config, stage, data, tokenizer)
    with iterate(dataset, config.data.workers, threads=config.data.threads) as batches:
        pending: list[StepMetrics] = []
        for step, batch in enumerate(batches, start=1):
            skipped.add(step, batch.skipped_id)
            state, metrics = step_function(state, batch)
            pending.append(metrics)
            if len(pending) > STEPS_AHEAD:
                progress.add(pending.pop(0))
            if step % config.evaluation.every == 0 or step == stage.steps:
                while pending:
                    progress.add(pending.pop(0))
                with progress.paused():
                    held_out = _held_out(config, stage, data, tokenizer)
                    named = _named(held_out, data, functools.partial(skipped.add_held_out, step))
                    sums = evaluate(count_step, state.params, named)
                    progress.held_out(step, sums)
    return state.params, sums


class Progress:
    """Means over the steps since the last line of progress, and the time that is left."""

    def __init__(self, config: ExperimentConfig, stage: StageConfig, log: RunLog):
        self._stage, self._log, self._every = stage, log, config.log_every
        self._step = 0
        self._start: float | None = None  # after the first step, which compiles
        self._excluded = 0.0
        self._recent: list[dict[str, float]] = []

    def add(self, metrics: StepMetrics) -> None:
        """Takes the next step's numbers (waiting for them), and writes a line when it is time.

        Raises:
          UserError: the loss or the norm of the gradients is not finite.
        """
        self._step += 1
        values = {name: float(value) for name, value in jax.device_get(vars(metrics)).items()}
        for name in ("loss", "grad_norm"):
            check_finite(f"{self._stage.name}/{name}", self._step, values[name])
        self._recent.append(values)
        if self._start is None:
            self._start = time.monotonic()
        if self._step % self._every == 0 or self._step == self._stage.steps:
            self._write()

    def held_out(self, step: int, sums: IouSums) -> None:
        """Writes what held-out images say."""
        name = self._stage.name
        self._log.scalars(step, {f"{name}/val_ciou": sums.ciou, f"{name}/val_giou": sums.giou})
        self._log.line(
            f"{name} {step}/{self._stage.steps}: held out "
            f"cIoU {sums.ciou:.3f}, gIoU {sums.giou:.3f} ({sums.masks} phrases)"
        )

    def paused(self) -> "_Paused":
        """A context whose time counts as no training."""
        return _Paused(self)

    def _write(self) -> None:
        stage, recent, self._recent = self._stage, self._recent, []
        means = {name: float(np.mean([values[name] for values in recent])) for name in recent[0]}
        ciou = means.pop("intersection") / max(means.pop("union"), 1.0)
        assert self._start is not None
        seconds = time.monotonic() - self._start - self._excluded
        per_step = seconds / max(self._step - 1, 1)
        images_per_second = stage.batch_size / per_step if per_step else 0.0
        values = {**means, "ciou": ciou, "images_per_second": images_per_second}
        self._log.scalars(self._step, {f"{stage.name}/{key}": v for key, v in values.items()})
        self._log.line(
            f"{stage.name} {self._step}/{stage.steps}: loss {means['loss']:.4f}, cIoU {ciou:.3f}, "
            f"{images_per_second:.0f} images/s, {clock(per_step * (stage.steps - self._step))} left"
        )


class _Paused:
    def __init__(self, progress: Progress):
        self._progress = progress

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._progress._excluded += time.monotonic() - self._begin


def _tokenizer_dir(config: ExperimentConfig) -> Path:
    return Path(config.init_model) / "tokenizer" if config.init_model else SHAPES_TOKENIZER


def _shown(data: TrainingData, tokenizer: Tokenizer, count: int) -> Iterator[Example]:
    """Of the first `count` held-out examples those that can be read, with their first phrases."""
    source = data.held_out
    for index in range(min(count, len(source))):
        chosen = range(min(PANEL_PHRASES, source.phrase_count(index)))
        with contextlib.suppress(UserError):  # it is named in skipped.jsonl
            example = source.read(index, chosen)
            for phrase in example.phrases:
                tokenizer.encode(phrase)
            yield example


def _train_batches(
    config: ExperimentConfig, stage: StageConfig, data: TrainingData, tokenizer: Tokenizer
):
    # Each stage has an order of its own: otherwise the second would begin with the same images.
    seed = config.seed + 1 + [other.name for other in config.stages].index(stage.name)
    spec = data.spec(config, stage, stage.batch_size, shrink=True)
    return train_dataset(
        data.mixture, tokenizer, spec, seed=seed, steps=stage.steps, buckets=data.buckets
    )


def _named(
    batches: Iterator[Batch], data: TrainingData, name: Callable[[str], None]
) -> Iterator[Batch]:
    """Passes the batches on, and names what could not be read or had no room."""
    rows = eval_rows(data.held_out, data.phrases)
    for batch in batches:
        skipped = np.asarray(batch.skipped_id)
        for row in skipped[skipped >= 0].tolist():
            name(data.held_out.describe(int(rows.image[row])))
        yield batch


def _held_out(
    config: ExperimentConfig, stage: StageConfig, data: TrainingData, tokenizer: Tokenizer
) -> Iterator[Batch]:
    spec = data.spec(config, stage, config.evaluation.batch_size, shrink=False)
    dataset = eval_dataset(data.held_out, tokenizer, spec, buckets=data.buckets)
    with iterate(dataset, threads=config.data.threads) as batches:
        yield from batches
