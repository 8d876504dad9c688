"""The training run: parameters, then each stage's loop, then a model directory.

A run's directory holds `config.json`, `metrics.jsonl`, TensorBoard events, `skipped.jsonl`
(examples that could not be read, if any), `checkpoints/`, `profile/` if asked for, `panel.png`
(held-out images with targets and predictions) and at the end `model/`, which `predict` and
`evaluate` open. The same command goes on with a run that was interrupted.
"""

import collections
import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from data_pipelines.assemble import Example
from data_pipelines.batch import Batch
from data_pipelines.eval_pipeline import EvalRows, eval_dataset, eval_rows
from data_pipelines.record_files import is_remote
from data_pipelines.tokenizers import Tokenizer
from data_pipelines.train_pipeline import iterate
from evf_sam_jax.checkpoints import Checkpoints, is_begun
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.held_out import evaluate, make_count_step, prediction_panel
from evf_sam_jax.experiment import ExperimentConfig
from evf_sam_jax.feature_cache import check_features, check_fingerprint
from evf_sam_jax.flops import peak_flops
from evf_sam_jax.initialize import finished_model, initial_params, tokenizer_directory
from evf_sam_jax.metrics import IouSums, StepMetrics
from evf_sam_jax.model_dir import path_leaves, require_space, write_model_dir
from evf_sam_jax.model_inputs import load_tokenizer
from evf_sam_jax.models.evf_sam import param_shapes
from evf_sam_jax.param_rules import Params, match_rules, merge
from evf_sam_jax.predictor import Predictor
from evf_sam_jax.preemption import Preempted, PreemptionNotice
from evf_sam_jax.processes import on_first_process
from evf_sam_jax.progress import STEPS_AHEAD, NotFinite, Progress
from evf_sam_jax.replay import save_failure
from evf_sam_jax.run_log import (
    RunLog,
    SkippedLog,
    make_workdir,
    resume_workdir,
    run_directory,
    run_files,
)
from evf_sam_jax.sharding import (
    check_placement,
    make_mesh,
    placement_table,
    process_rows,
    put_batch,
)
from evf_sam_jax.stage import Stage, cast_when_frozen, make_stage
from evf_sam_jax.train_state import TrainState
from evf_sam_jax.training_data import TrainingData, batch_spec, open_data

# Of an image with more phrases, the first are shown.
PANEL_PHRASES = 3
# Steps of one profile.
PROFILED_STEPS = 3


def train(config: ExperimentConfig, workdir: epath.PathLike) -> IouSums | None:
    """Trains all stages and writes the model directory; goes on where the run stopped before.

    Returns:
      What the last stage reached on held-out images; None if the run had been finished before.

    Raises:
      UserError: the directory holds another run, the configuration cannot be, or a loss stopped
        being finite.
      Preempted: SIGTERM came, and the state is saved.
    """
    tokenizer = load_tokenizer(tokenizer_directory(config), config.model)
    workdir = run_directory(workdir)
    stages = make_stages(config, make_mesh(config.mesh))
    data = open_data(config)
    check_features(config, data)
    first = jax.process_index() == 0
    notes = _open_workdir(config, workdir, data, stages)
    with RunLog(workdir, silent=not first) as log, PreemptionNotice() as notice:
        for note in notes:
            log.line(f"going on with {note}")
        shapes = param_shapes(config.model)
        log.line(parameter_overview.get_parameter_overview(shapes, include_stats=False))
        if (workdir / "model" / "manifest.json").exists():
            log.line(f"finished before: {workdir / 'model'}")
            return None
        begun = [stage for stage in stages if is_begun(workdir, stage.config.name)]
        current = stages.index(begun[-1]) if begun else 0
        params: Params | None = None
        sums = IouSums()
        for stage in stages[current:]:
            params, sums = run_stage(stage, data, params, tokenizer, log, workdir, notice)
        assert params is not None, "there is at least one stage"
        finish(config, data, params, tokenizer, log, workdir)
    return sums


def make_stages(config: ExperimentConfig, mesh: Mesh) -> list[Stage]:
    """All stages of a run. Raises UserError for what would otherwise stop it after hours."""
    match_rules(config.init.scale, path_leaves(param_shapes(config.model)), "init.scale")
    return [make_stage(config, stage, mesh) for stage in config.stages]


def run_stage(
    stage: Stage,
    data: TrainingData,
    params: Params | None,
    tokenizer: Tokenizer,
    log: RunLog,
    workdir: epath.Path,
    notice: PreemptionNotice,
) -> tuple[Params, IouSums]:
    """Trains one stage, from its newest checkpoint if it has one.

    Args:
      params: what the stage before left; None: the run's initial ones.

    Returns:
      All parameters, and what they reach on held-out images.
    """
    config, experiment = stage.config, stage.experiment
    mesh, name, size = stage.mesh, stage.config.name, stage.config.batch_size
    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, name, experiment.checkpoints) as checkpoints,
    ):
        restored = checkpoints.restore(stage.shapes, log.line)
        state = stage.create(_placed(stage, params)) if restored is None else restored
        if data.features is not None:
            check_fingerprint(experiment, data.features, merge(state.trainable, state.frozen))
        if restored is None:
            checkpoints.save_frozen(state)
            checkpoints.save(0, state)
        del params, restored
        start = int(state.step)
        names = [other.name for other in experiment.stages]
        log.forget_after(names[names.index(name) :], start)
        skipped = SkippedLog(
            log,
            name,
            data.mixture.describe,
            functools.partial(data.why_unread, tokenizer),
            experiment.data.max_skipped,
        )
        check_placement(state, stage.placement)
        _describe(stage, state, start, log)
        count_step = make_count_step(stage.model, stage.prompts, mesh)
        rows = eval_rows(data.held_out, data.phrases)

        def measure(step: int) -> IouSums:
            held_out = _held_out(stage, data, tokenizer)
            named = _named(held_out, data, rows, functools.partial(skipped.add_held_out, step))
            put = functools.partial(put_batch, mesh, batch_size=experiment.evaluation.batch_size)
            return evaluate(count_step, state.averaged_params, named, put)

        train_step = stage.step()
        profiler = _Profiler(workdir / "profile", experiment.profile_every, start)
        progress: Progress | None = None
        recent: collections.deque[tuple[int, Batch]] = collections.deque(maxlen=STEPS_AHEAD + 1)
        sums = None
        dataset = stage.batches(data, tokenizer)[start:]
        workers, threads = experiment.data.workers, experiment.data.threads
        with iterate(dataset, workers, threads=threads) as batches:
            for step, batch in enumerate(batches, start=start + 1):
                skipped.add(step, batch.skipped_id)
                recent.append((step, batch))
                on_devices = put_batch(mesh, batch, size)
                if progress is None:
                    progress = _progress(stage, log, start, on_devices)
                last = step == config.steps
                profiler.before(step)
                state, metrics = train_step(state, on_devices)
                profiler.after(step, last, metrics)
                stopping = notice.received()
                measuring = last or step % experiment.evaluation.every == 0
                saving = last or stopping or step % experiment.checkpoints.every == 0
                try:
                    progress.add(metrics)
                    if measuring or saving:
                        progress.drain()
                except NotFinite as error:
                    failed = next(one for number, one in recent if number == error.step)
                    folder = save_failure(workdir, stage, state, failed, error)
                    raise UserError(
                        f"{error}; state and batch are in {folder}, for --mode replay"
                    ) from None
                with progress.paused():
                    if measuring:
                        sums = measure(step)
                        progress.held_out(step, sums)
                    if saving:
                        checkpoints.save(step, state, sums.ciou if measuring and sums else None)
                if stopping and not last:
                    checkpoints.wait()
                    message = f"{name} {step}/{config.steps}: told to stop, the state is saved"
                    log.line(message)
                    raise Preempted(message)
            if sums is None:  # the run was stopped after the last step
                sums = measure(start)
        return state.averaged_params, sums


def finish(
    config: ExperimentConfig,
    data: TrainingData,
    params: Params,
    tokenizer: Tokenizer,
    log: RunLog,
    workdir: epath.Path,
) -> None:
    """Writes the model directory, and the panel of predictions."""
    if jax.process_count() > 1:
        # A leaf at a time, since not all of it is here.
        params = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), params)
    if jax.process_index() == 0:
        leaves, manifest, passthrough = finished_model(config, params, cast_when_frozen(config))
        tokenizer_dir = tokenizer_directory(config)
        with _local_directory(workdir / "model") as local:
            write_model_dir(local, leaves, manifest, tokenizer_dir, passthrough)
        log.line(f"model directory: {workdir / 'model'}")
        examples = list(_shown(data, tokenizer, config.evaluation.panel_images))
        if examples:
            host = jax.tree.map(np.asarray, params)
            picture = prediction_panel(Predictor(config.model, host, tokenizer), examples)
            with (workdir / "panel.png").open("wb") as file:
                Image.fromarray(picture).save(file, format="PNG")
            log.image(config.stages[-1].steps, f"{config.stages[-1].name}/panel", picture)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("finished")


def _open_workdir(
    config: ExperimentConfig, workdir: epath.Path, data: TrainingData, stages: list[Stage]
) -> list[str]:
    """Makes the run's directory or finds the run in it; all processes come to the same answer.

    Returns:
      What has changed since, as `resume_workdir`.
    """

    def opened() -> list[str]:
        fingerprints = data.fingerprints()
        if workdir.is_dir() and run_files(workdir):
            return resume_workdir(workdir, config, fingerprints)
        if not is_remote(workdir):
            require_space(workdir / "model", _bytes_on_disk(config, stages))
        make_workdir(workdir, config, fingerprints)
        return []

    return on_first_process(opened, workdir) or []


@contextlib.contextmanager
def _local_directory(path: epath.Path) -> Iterator[Path]:
    """Where to write a directory: at its place, or for a bucket beside it and copied there."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        yield local
        # The manifest last: with it the directory counts as whole.
        files = sorted(local.rglob("*"), key=lambda file: file.name == "manifest.json")
        for file in files:
            if file.is_file():
                target = path / file.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(file).copy(target, overwrite=True)


def _bytes_on_disk(config: ExperimentConfig, stages: list[Stage]) -> int:
    """What a run needs: its checkpoints (one more while it is written) and the model."""
    kept = config.checkpoints.keep + config.checkpoints.keep_best + 1
    total = 0
    for stage in stages:
        shapes = stage.shapes
        saved = (shapes.trainable, shapes.opt_state, shapes.ema)
        total += kept * _bytes(saved) + _bytes(shapes.frozen)
    return total + 4 * sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config.model)))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _placed(stage: Stage, params: Params | None) -> Params:
    """Parameters where the stage wants them: what the stage before left, or the initial ones."""
    places = merge(stage.placement.state.trainable, stage.placement.state.frozen)
    if params is not None:
        return jax.tree.map(jax.device_put, params, places)
    return initial_params(stage.experiment, path_leaves(places), cast_when_frozen(stage.experiment))


def _describe(stage: Stage, state: TrainState, start: int, log: RunLog) -> None:
    """Where the stage begins, and where its state lives."""
    if start:
        log.line(f"{stage.config.name}: going on after step {start}")
    log.line(placement_table(stage.experiment.mesh, state, stage.placement))


def _progress(stage: Stage, log: RunLog, start: int, batch: Batch) -> Progress:
    peak = peak_flops(stage.mesh.devices.flat[0].device_kind)
    return Progress(
        log,
        stage.config.name,
        start=start,
        steps=stage.config.steps,
        batch_size=stage.config.batch_size,
        every=stage.experiment.log_every,
        step_flops=None if peak is None else stage.flops(batch),
        peak_flops=None if peak is None else peak * stage.mesh.size,
    )


class _Profiler:
    """Profiles some steps every so often, never the first, which compiles."""

    def __init__(self, directory: epath.Path, every: int, start: int):
        self._directory, self._every, self._first = directory, every, start + 2
        self._until = 0

    def before(self, step: int) -> None:
        """Called before a step."""
        if self._every and step >= self._first and step % self._every == 0 and not self._until:
            jax.profiler.start_trace(str(self._directory))
            self._until = step + PROFILED_STEPS

    def after(self, step: int, last: bool, metrics: StepMetrics) -> None:
        """Called after a step has been handed to the device."""
        if self._until and (step + 1 >= self._until or last):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._until = 0


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


def _named(
    batches: Iterator[Batch], data: TrainingData, rows: EvalRows, name: Callable[[str], None]
) -> Iterator[Batch]:
    """Passes the batches on, and names what could not be read or had no room."""
    for batch in batches:
        skipped = np.asarray(batch.skipped_id)
        for row in skipped[skipped >= 0].tolist():
            name(data.held_out.describe(int(rows.image[row])))
        yield batch


def _held_out(stage: Stage, data: TrainingData, tokenizer: Tokenizer) -> Iterator[Batch]:
    experiment = stage.experiment
    size = experiment.evaluation.batch_size
    spec = batch_spec(experiment, stage.config, size, shrink=False)
    held = process_rows(stage.mesh, size)
    dataset = eval_dataset(data.held_out, tokenizer, spec, held=held, buckets=data.buckets)
    with iterate(dataset, threads=experiment.data.threads) as batches:
        yield from batches
