"""A step whose loss was no number: what it was made of, kept on disk, and looked at again.

    WORKDIR/failure/state/          the training state before the step, as Orbax writes it
    WORKDIR/failure/batch-0.npz     the rows of the batch that process 0 held, and so on
    WORKDIR/failure/failure.json    stage, step, and what was wrong

`--mode replay` with the config of the run computes the step once more and says which examples and
which parameters' gradients are not finite.
"""

import dataclasses
import json
import zipfile
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from data_pipelines.batch import Batch, CachedFeatures
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import ExperimentConfig
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.models.evf_sam import with_dtype
from evf_sam_jax.progress import NotFinite
from evf_sam_jax.run_log import run_directory
from evf_sam_jax.sharding import make_mesh, process_rows
from evf_sam_jax.stage import Stage, make_stage
from evf_sam_jax.train_state import TrainState
from evf_sam_jax.train_step import make_loss

FOLDER = "failure"
# What cached features are called in the file of a batch.
_FINISHED, _VALUES, _SCALES = "features_finished", "features_values_", "features_scales_"


def save_failure(
    workdir: epath.Path, stage: Stage, state: TrainState, batch: Batch, error: NotFinite
) -> epath.Path:
    """Writes state and batch of a step; of several processes, each its rows.

    Args:
      state: as the steps since have left it, none of which changed anything.
      batch: this process's rows of the batch of step `error.step`.
    """
    folder = workdir / FOLDER
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()  # of an earlier try
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", dataclasses.replace(state, finite=state.step >= 0))
    rows = process_rows(stage.mesh, stage.config.batch_size)
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    fields |= _feature_fields(fields.pop("image_features", None))
    with (folder / f"batch-{jax.process_index()}.npz").open("wb") as file:
        np.savez_compressed(file, rows=np.array(rows), **fields)
    if jax.process_index() == 0:
        record = {"stage": stage.config.name, "step": error.step, "what": str(error)}
        (folder / "failure.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def replay(experiment: ExperimentConfig, workdir: epath.PathLike) -> bool:
    """Computes a failed step again, in the run's dtype and in float32, and prints what it finds.

    Returns:
      Whether loss and gradients are finite this time, in the run's dtype.

    Raises:
      UserError: the run has no failure on record, or one that is damaged or of another config.
    """
    folder = run_directory(workdir) / FOLDER
    record = _read_record(folder)
    named = {one.name: one for one in experiment.stages}
    if record["stage"] not in named:
        raise UserError(
            f"--config: expected the stage {record['stage']} of the failed run, found "
            f"{', '.join(named)}"
        )
    config = named[record["stage"]]
    mesh = make_mesh(experiment.mesh)
    stage = make_stage(experiment, config, mesh)
    batch = _read_batch(folder, config.batch_size)
    state = _read_state(folder / "state", stage.shapes)
    print(f"{record['what']}\nstage {record['stage']}, step {record['step']}, from {folder}")
    print(f"examples: {', '.join(map(str, np.asarray(batch.example_id).tolist()))}")
    finite = _report("as it ran", stage, state, batch)
    exact = dataclasses.replace(experiment, model=with_dtype(experiment.model, "float32"))
    _report("in float32", dataclasses.replace(stage, experiment=exact), state, batch)
    return finite


def _report(title: str, stage: Stage, state: TrainState, batch: Batch) -> bool:
    loss = make_loss(stage.model, stage.prompts, stage.config.loss)

    def measure(trainable: Any, frozen: Any, batch: Batch):
        phrases = batch.phrase_valid.sum(dtype="float32")
        (total, sums), gradients = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch, phrases
        )
        norms = jax.tree.map(lambda leaf: (leaf.astype("float32") ** 2).sum() ** 0.5, gradients)
        return total, sums, norms

    found = jax.device_get(jax.jit(measure)(state.trainable, state.frozen, batch))
    total, sums, norms = found
    norms = path_leaves(norms)
    broken = [path for path, norm in norms.items() if not np.isfinite(norm)]
    print(f"{title}: loss {total:.6g}, bce {sums['bce']:.6g}, dice {sums['dice']:.6g}")
    print(f"  gradients that are not finite: {len(broken)} of {len(norms)}")
    for path in broken[:10]:
        print(f"    {path}")
    largest = sorted(set(norms) - set(broken), key=lambda path: -norms[path])[:5]
    for path in largest:
        print(f"  norm {norms[path]:.4g}: {path}")
    weights = path_leaves(state.trainable)
    bad = [path for path, leaf in weights.items() if not bool(np.isfinite(leaf).all())]
    print(f"  parameters that are not finite: {', '.join(bad) or 'none'}")
    return bool(np.isfinite(total)) and not broken


def _read_record(folder: epath.Path) -> dict[str, Any]:
    path = folder / "failure.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"--workdir {folder.parent}: expected a run that failed, found none"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: expected the record of a failure, found {error}") from None
    keys = {"stage", "step", "what"}
    if not isinstance(record, dict) or not keys <= record.keys():
        raise UserError(f"{path}: expected the keys {', '.join(sorted(keys))}, found {record!r}")
    return record


def _read_state(path: epath.Path, shapes: TrainState) -> TrainState:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, shapes)
    except Exception as error:  # each layer below Orbax raises its own
        found = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: expected the training state of this config, found {found[0]}"
        ) from None


def _read_batch(folder: epath.Path, batch_size: int) -> Batch:
    """The batch as it was, of the rows that each process wrote."""
    parts = []
    for path in sorted(folder.glob("batch-*.npz")):
        try:
            with path.open("rb") as file, np.load(file) as content:
                parts.append(dict(content))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: expected rows of a batch, found {error}") from None
    rows = np.concatenate([[], *(part.pop("rows", []) for part in parts)]).astype(int)
    if sorted(rows.tolist()) != list(range(batch_size)):
        raise UserError(
            f"{folder}/batch-*.npz: expected the {batch_size} rows of the batch, found {len(rows)}"
        )
    order = np.argsort(rows)
    finished = [bool(part.pop(_FINISHED, True)) for part in parts]
    fields = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
    values, scales = (
        [fields.pop(name) for name in sorted(fields) if name.startswith(kind)]
        for kind in (_VALUES, _SCALES)
    )
    cached = CachedFeatures(tuple(values), tuple(scales), finished[0]) if values else None
    return Batch(**{"sam_image": None, "image_features": cached, **fields})


def _feature_fields(cached: CachedFeatures | None) -> dict[str, np.ndarray]:
    """Cached features as arrays with names, bfloat16 as the float32 that it is."""
    if cached is None:
        return {}
    fields = {_FINISHED: np.array(cached.finished)}
    for i, value in enumerate(cached.values):
        fields[f"{_VALUES}{i}"] = value if value.dtype == np.int8 else value.astype(np.float32)
    return fields | {f"{_SCALES}{i}": scale for i, scale in enumerate(cached.scales)}
