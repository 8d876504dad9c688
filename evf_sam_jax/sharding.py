"""The mesh, where every leaf of the training state lives on it, and the check that it does.

The mesh has two axes, over both of which the batch is split: `data`, whose devices hold copies of
the same state, and `fsdp`, over which state is split in the stages of ZeRO (Rajbhandari et al.
2020; the paper's section 4.2 trains with stage 2 of DeepSpeed):

    stage   optimizer state and EMA   gradients       parameters
    1       split                     copied          copied
    2       split                     split           copied
    3       split                     split           split, gathered where they are used

XLA makes the collectives from these placements: a gradient that ends split is reduce-scattered
where the backend can (GPU, TPU), and reduced and cut up where it cannot (CPU).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from evf_sam_jax.errors import UserError
from evf_sam_jax.model_dir import nest, path_leaves
from evf_sam_jax.param_rules import Params, Rules, check_rules, match_rules
from evf_sam_jax.train_state import TrainState

AXES = ("data", "fsdp")
TARGETS = ("fsdp", "replicated")
# A leaf of so many elements that cannot be split where it shall be would spoil the plan: 4 MB of
# float32, three times over with Adam's moments.
LARGE = 2**20


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work.

    Attributes:
      data: groups of devices with copies of the same state; 0: as many as there are devices for.
        On TPU pods of several slices, groups are whole slices or parts of one. A run of one process
        may take fewer devices than there are: the first ones.
      fsdp: devices of a group, over which state is split.
      zero_stage: which state is split, see above; 2 is what the paper used.
      rules: (regex, target) over all parameters: "fsdp" splits a leaf along its last side that is a
        multiple of `fsdp`, "replicated" never splits it.
      min_size: elements below which a leaf is not worth splitting.
    """

    data: int = 0
    fsdp: int = 1
    zero_stage: int = 2
    rules: Rules[str] = ((".*", "fsdp"),)
    min_size: int = 2**14

    def __post_init__(self) -> None:
        for key, least in (("data", 0), ("fsdp", 1), ("min_size", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"mesh.{key}: expected {least} or more, found {value!r}")
        if self.zero_stage not in (1, 2, 3):
            raise UserError(f"mesh.zero_stage: expected 1, 2 or 3, found {self.zero_stage!r}")
        check_rules(self.rules, "mesh.rules", " or ".join(TARGETS), TARGETS.__contains__)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices (of all processes).

    Raises:
      UserError: their number is not `data` x `fsdp`, or slices cannot share it out.
    """
    devices = jax.devices() if devices is None else devices
    wanted = config.data * config.fsdp
    if jax.process_count() == 1 and 0 < wanted < len(devices):
        devices = devices[:wanted]
    data, fsdp = mesh_shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        # Only gradients of whole groups cross the slow network between slices.
        if data % slices:
            raise UserError(f"mesh.data: expected a multiple of {slices} slices, found {data}")
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp), (slices, 1), devices=devices
        )
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices=devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int]:
    """Sizes of the axes `data` and `fsdp` on so many devices. Raises UserError if there is none."""
    if config.fsdp > devices:
        raise UserError(f"mesh.fsdp: expected at most the {devices} devices, found {config.fsdp}")
    data = config.data or devices // config.fsdp
    if data * config.fsdp != devices:
        raise UserError(
            f"mesh: expected data x fsdp to be the {devices} devices, found {data} x {config.fsdp}"
        )
    return data, config.fsdp


def check_batch_size(mesh: Mesh, key: str, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError if a batch cannot be split over the devices of a mesh."""
    share = mesh.size * accumulate
    if batch_size % share:
        parts = f"{mesh.size} devices" + (f" x {accumulate} parts" if accumulate > 1 else "")
        raise UserError(f"{key}: expected a multiple of {parts}, found {batch_size}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of each field of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index for row in range(batch_size)[index[0]]})


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """The global batch on the devices, of which this process gives the rows it holds.

    Args:
      batch: NumPy arrays of the rows that `process_rows` names.
    """
    sharding = batch_sharding(mesh)
    position = {row: i for i, row in enumerate(process_rows(mesh, batch_size))}

    def put(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every device has a part of the batch"
            rows = range(batch_size)[index[0]]
            return local[position[rows[0]] : position[rows[-1]] + 1]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the leaves of a training state live.

    Attributes:
      state: a `TrainState` of shardings.
      gradients: of the trainable parameters' gradients.
    """

    mesh: Mesh
    state: TrainState
    gradients: Params

    @property
    def batch(self) -> NamedSharding:
        """Of each field of a batch."""
        return batch_sharding(self.mesh)


def param_shardings(
    config: MeshConfig, mesh: Mesh, shapes: Mapping[str, Any], split: bool
) -> dict[str, NamedSharding]:
    """'/'-path -> sharding of parameters, split as the rules say, or all copied.

    Raises:
      UserError: no rule covers a leaf, a rule covers none, or a large one cannot be split.
    """
    leaves = path_leaves(shapes)
    targets = match_rules(config.rules, leaves, "mesh.rules", allow_unused=True)
    shardings = {}
    for path, leaf in leaves.items():
        spec = PartitionSpec()
        if targets[path] == "fsdp" and math.prod(leaf.shape) >= config.min_size:
            spec = _split_last(path, leaf.shape, mesh.shape["fsdp"])
        shardings[path] = NamedSharding(mesh, spec if split else PartitionSpec())
    return shardings


def place(
    config: MeshConfig,
    mesh: Mesh,
    trainable: Params,
    frozen: Params,
    optimizer: optax.GradientTransformation,
    ema: bool = False,
) -> Placement:
    """The placement of a training state with such parameters (arrays or their shapes).

    Raises:
      UserError: as `param_shardings`.
    """
    stage = config.zero_stage
    split = nest(param_shardings(config, mesh, trainable, True))
    copied = nest(param_shardings(config, mesh, trainable, False))
    shapes = jax.eval_shape(optimizer.init, trainable)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        split,
        transform_non_params=lambda _: replicated(mesh),
    )
    state = TrainState(
        step=replicated(mesh),
        finite=replicated(mesh),
        trainable=split if stage == 3 else copied,
        frozen=nest(param_shardings(config, mesh, frozen, stage == 3)),
        opt_state=opt_state,
        ema=split if ema else None,
    )
    return Placement(mesh, state, split if stage >= 2 else copied)


def check_placement(state: TrainState, placement: Placement) -> None:
    """Raises AssertionError if a leaf does not live where it shall: a mistake of the program."""

    def check(path, leaf: jax.Array, sharding: NamedSharding) -> None:
        where = jax.tree_util.keystr(path)
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (
            f"{where}: expected {sharding}, found {leaf.sharding}"
        )

    jax.tree_util.tree_map_with_path(check, state, placement.state)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of arrays (or shapes) on each device, which the shardings split evenly."""

    def of_leaf(leaf, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, shardings)))


def placement_table(config: MeshConfig, state: TrainState, placement: Placement) -> str:
    """What each rule places, and the bytes that it takes on each device.

    Args:
      state: arrays or shapes.
    """
    size = "x".join(str(placement.mesh.shape[axis]) for axis in AXES)
    lines = [
        f"mesh {size} (data x fsdp), ZeRO stage {config.zero_stage}; MB on each device",
        f"{'rule':<32} {'target':<10} {'parameters':>13} {'weights':>9} {'gradients':>9} "
        f"{'optimizer':>9}",
    ]
    leaves = {**path_leaves(state.trainable), **path_leaves(state.frozen)}
    homes = {**path_leaves(placement.state.trainable), **path_leaves(placement.state.frozen)}
    gradients = path_leaves(placement.gradients)
    opt_leaves = [*optimizer_leaves(state, state.trainable)]
    opt_homes = [*optimizer_leaves(placement.state, state.trainable)]
    totals = [0, 0, 0, 0]
    matched = match_rules(
        tuple((p, i) for i, (p, _) in enumerate(config.rules)), leaves, "mesh.rules", True
    )
    for number, (pattern, target) in enumerate(config.rules):
        paths = [path for path in leaves if matched[path] == number]
        trained = [path for path in paths if path in gradients]
        row = [
            sum(math.prod(leaves[path].shape) for path in paths),
            sum(bytes_per_device(leaves[path], homes[path]) for path in paths),
            sum(bytes_per_device(leaves[path], gradients[path]) for path in trained),
            sum(
                bytes_per_device(tree[path], home[path])
                for tree, home in zip(opt_leaves, opt_homes, strict=True)
                for path in trained
            ),
        ]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        lines.append(_row(pattern, target, row))
    return "\n".join([*lines, _row("total", "", totals)])


def optimizer_leaves(state: TrainState, like: Params) -> list[dict[str, Any]]:
    """The trees of optimizer state (and EMA) that mirror the parameters, by '/'-path."""
    structure = jax.tree.structure(like)

    def mirrors(node: Any) -> bool:
        return isinstance(node, dict) and jax.tree.structure(node) == structure

    trees = jax.tree.leaves((state.opt_state, state.ema), is_leaf=mirrors)
    return [path_leaves(tree) for tree in trees if mirrors(tree)]


def _row(name: str, target: str, row: Sequence[int]) -> str:
    count, *sizes = row
    megabytes = " ".join(f"{size / 1e6:>9,.1f}" for size in sizes)
    return f"{name:<32} {target:<10} {count:>13,} {megabytes}"


def _split_last(path: str, shape: Sequence[int], parts: int) -> PartitionSpec:
    """Splits the last side that can be: features, so that rows of embeddings are found anywhere.

    The first side of layers that are scanned over comes last, and is hardly ever a multiple.
    """
    axes = [axis for axis, side in enumerate(shape) if side % parts == 0]
    if not axes:
        if math.prod(shape) >= LARGE:
            raise UserError(
                f"mesh.rules: expected {path} to have a side that is a multiple of fsdp = {parts}, "
                f"found {tuple(shape)}; a rule with the target replicated would keep it whole"
            )
        return PartitionSpec()
    return PartitionSpec(*(AXES[1] if i == axes[-1] else None for i in range(len(shape))))
