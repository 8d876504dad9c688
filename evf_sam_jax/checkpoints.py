"""The resumable state of training on disk, which any mesh can go on with.

    WORKDIR/checkpoints/STAGE/STEP/     trainable, opt_state, ema, meta: an Orbax item each
    WORKDIR/checkpoints/STAGE-frozen/   what the stage does not train, stored once

The data order is a function of (seed, step), so the step is all there is to know of the data. A
checkpoint appears whole or not at all, and carries a checksum of every item, so that one that was
damaged later is recognised and the one before it is taken.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import CheckpointConfig
from evf_sam_jax.param_rules import merge
from evf_sam_jax.train_state import TrainState

FOLDER = "checkpoints"
_ITEMS = ("trainable", "opt_state", "ema")
_METRIC = "ciou"
_OTHER_CHECKSUM = "the checksum is not the one it was written with"


class Checkpoints:
    """The checkpoints of one stage; a context, at whose end all have been written."""

    def __init__(self, workdir: epath.Path, stage: str, config: CheckpointConfig):
        self._directory = epath.Path(workdir) / FOLDER / stage
        self._frozen = epath.Path(workdir) / FOLDER / f"{stage}-frozen"
        logging.get_absl_logger().addFilter(_is_news)
        self._scores: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(config, self._scores),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=config.asynchronous,
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_handlers={**handlers, "meta": _json()}
        )
        self._damaged: list[int] = []
        for step in self._manager.all_steps():
            with contextlib.suppress(Exception):  # it is damaged, which `restore` will notice
                meta = _json().restore(self._directory / str(step) / "meta")
                self._note(step, meta[_METRIC])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        try:
            with _writing(self._directory):
                self._manager.close()
        except UserError:
            if kind is None:  # otherwise there is something else to say
                raise

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, ciou: float | None = None) -> None:
        """Begins to write a state, unless there is one of this step; returns when it is copied.

        Args:
          ciou: of held-out images, if it has been measured at this step.

        Raises:
          UserError: this or the one before could not be written.
        """
        with _writing(self._directory):
            while self._damaged:  # they would count as the newest
                self._manager.delete(self._damaged.pop())
        if step in self._manager.all_steps():
            return
        items = {name: getattr(state, name) for name in _ITEMS if getattr(state, name) is not None}
        meta = {
            "step": step,
            "checksums": {name: checksum(tree) for name, tree in items.items()},
            "frozen": checksum(state.frozen),
            "devices": state.step.sharding.num_devices,
            _METRIC: ciou,
        }
        self._note(step, ciou)
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with _writing(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta)),
                force=True,
            )

    def _note(self, step: int, ciou: float | None) -> None:
        if ciou is not None:
            self._scores[step] = ciou

    def wait(self) -> None:
        """Returns when all is written. Raises UserError if it could not be."""
        with _writing(self._directory):
            self._manager.wait_until_finished()

    def save_frozen(self, state: TrainState) -> None:
        """Writes what the stage does not train, unless that has been done."""
        if jax.tree.leaves(state.frozen) and not self._frozen.exists():
            with _writing(self._frozen), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._frozen, state.frozen)

    def restore(self, like: TrainState, say: Callable[[str], None]) -> TrainState | None:
        """The newest state that is whole; None if there is no checkpoint at all.

        Args:
          like: shapes with shardings.
          say: is told of checkpoints that are not whole, which the next `save` removes, and of a
        number of devices that has changed.

        Raises:
          UserError: there are checkpoints, and none is whole; or the frozen parameters are not.
        """
        steps = self.steps[::-1]
        if not steps:
            return None
        frozen = self._restore_frozen(like)
        for step in steps:
            try:
                state, devices = self._restore(step, like, frozen)
            except UserError:
                raise
            except Exception as error:  # each layer below raises its own for what is damaged
                problem = _first_line(error)
            else:
                problem = None
            # One process may have read what another could not.
            if not _any_process(problem is not None):
                self._damaged = steps[: steps.index(step)]
                if devices != (now := like.step.sharding.num_devices):
                    say(f"going on with another mesh: devices: {devices} before, {now} now")
                return state
            where = self._directory / str(step)
            say(f"{where} is damaged and passed over: {problem or 'on another process'}")
        raise UserError(
            f"{self._directory}: expected a checkpoint that is whole, found {len(steps)} damaged; "
            "without this directory the stage begins anew"
        )

    def _restore(self, step: int, like: TrainState, frozen: Any) -> tuple[TrainState, int]:
        """A state, and on how many devices it was saved."""
        items = {name: getattr(like, name) for name in _ITEMS if getattr(like, name) is not None}
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        found = self._manager.restore(
            step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonRestore())
        )
        meta = found["meta"]
        for name in items:
            if checksum(found[name]) != meta["checksums"][name]:
                raise ValueError(f"{name}: {_OTHER_CHECKSUM}")
        if checksum(frozen) != meta["frozen"]:
            raise self._frozen_damaged(_OTHER_CHECKSUM)
        state = TrainState(
            step=jax.device_put(np.int32(step), like.step.sharding),
            finite=jax.device_put(np.bool_(True), like.finite.sharding),
            trainable=found["trainable"],
            frozen=frozen,
            opt_state=found["opt_state"],
            ema=found["ema"] if "ema" in items else None,
        )
        return state, meta["devices"]

    def _restore_frozen(self, like: TrainState) -> Any:
        if not jax.tree.leaves(like.frozen):
            return like.frozen
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(self._frozen, like.frozen)
        except Exception as error:  # each layer below raises its own for what is damaged
            raise self._frozen_damaged(_first_line(error)) from error

    def _frozen_damaged(self, problem: str) -> UserError:
        return UserError(
            f"{self._frozen}: expected the frozen parameters of the stage, found them damaged: "
            f"{problem}"
        )


def is_begun(workdir: epath.Path, stage: str) -> bool:
    """Whether a stage has a checkpoint: a kill before its first one leaves a directory without."""
    directory = workdir / FOLDER / stage
    return directory.exists() and bool(ocp.utils.checkpoint_steps(directory))


def list_checkpoints(workdir: epath.Path, stage: str) -> dict[int, float | None]:
    """Step -> held-out cIoU, if it was measured then, of each checkpoint of a stage, oldest first.

    Raises:
      UserError: what a checkpoint says of itself cannot be read.
    """
    directory = epath.Path(workdir) / FOLDER / stage
    return {
        step: _read_meta(directory / str(step)).get(_METRIC)
        for step in sorted(ocp.utils.checkpoint_steps(directory))
    }


def read_averaged_params(workdir: epath.Path, stage: str, step: int) -> Mapping[str, Any]:
    """All parameters of a checkpoint on the host, without its optimizer state.

    Those that were trained are their moving average where there is one, as training evaluates them.

    Raises:
      UserError: the checkpoint, or the frozen parameters of the stage, are damaged.
    """
    directory = epath.Path(workdir) / FOLDER / stage / str(step)
    meta = _read_meta(directory)
    name = "ema" if "ema" in meta["checksums"] else "trainable"
    params = _read_arrays(directory / name, meta["checksums"][name])
    frozen = epath.Path(workdir) / FOLDER / f"{stage}-frozen"
    return merge(params, _read_arrays(frozen, meta["frozen"])) if frozen.exists() else params


def _read_meta(directory: epath.Path) -> dict[str, Any]:
    try:
        return dict(_json().restore(directory / "meta"))
    except Exception as error:  # each layer below raises its own for what is damaged
        raise UserError(
            f"{directory}: expected a checkpoint that is whole, found it damaged: "
            f"{_first_line(error)}"
        ) from error


def _read_arrays(path: epath.Path, expected: int) -> dict[str, Any]:
    """A tree as NumPy arrays, whatever mesh it was saved on."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            shapes = checkpointer.metadata(path).item_metadata.tree
            as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_arrays))
        if checksum(tree) != expected:
            raise ValueError(_OTHER_CHECKSUM)
    except Exception as error:  # each layer below raises its own for what is damaged
        raise UserError(
            f"{path}: expected parameters that are whole, found them damaged: {_first_line(error)}"
        ) from error
    return tree


def checksum(tree: Any) -> int:
    """A number that depends on every bit of the arrays of a tree and on the place of each.

    It does not depend on the mesh: sums of integers that wrap around have no order.
    """
    total = 0
    for number in jax.device_get([_checksum(leaf) for leaf in jax.tree.leaves(tree)]):
        total = (31 * total + int(number)) % 2**32
    return total


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    # Of each element a number that its bits and its place are mixed into (the last steps of
    # MurmurHash3). For one place it is another for all other bits, so that no change of a single
    # element vanishes; a mere product would lose changes of high bits, such as of two signs.
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place * np.uint32(size) + along
    mixed = _bits(leaf) ^ (place * np.uint32(2654435761))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


def _bits(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)


def _is_news(record: Any) -> bool:
    """Not the stack of an error in a thread of Orbax: it is raised where the thread is awaited."""
    return not (record.exc_info and "orbax" in record.pathname)


def _json() -> ocp.JsonCheckpointHandler:
    return ocp.JsonCheckpointHandler()


def _any_process(problem: bool) -> bool:
    if jax.process_count() == 1:
        return problem
    return bool(multihost_utils.process_allgather(np.array(problem)).any())


class _NewestAndBest(policies.PreservationPolicy):
    """Which checkpoints stay; Orbax's own policy knows no scores of an earlier part of the run."""

    def __init__(self, config: CheckpointConfig, scores: Mapping[int, float]):
        self._config, self._scores = config, scores

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        ranked = sorted((self._scores[step], step) for step in steps if step in self._scores)
        best = ranked[max(0, len(ranked) - self._config.keep_best) :]
        kept = {*steps[-self._config.keep :], *(step for _, step in best)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


class _writing:
    """What Orbax and the disk raise becomes one sentence."""

    def __init__(self, path: epath.Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            reason = getattr(error, "strerror", None) or _first_line(error)
            raise UserError(f"{self._path} cannot be written: {reason}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
