"""Memory of activations, counted from the equations of loss and gradient as they are written.

`peak_bytes` runs through a jaxpr. Every result is whole from where it is made to where it is last
used; reshapes and broadcasts take nothing. Parts that are recomputed, chunks of the image encoder
and tiles of attention come in where they stand. Gradients do not count: where they live is known
from their shapes. Compilers fuse equations and need less; they also reorder, copy and pad, and need
more.

`saved_bytes` is the part of it that the backward pass needs of the forward pass: exactly the
residuals of the loss that are neither parameters nor batch nor views of them.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import PartitionSpec

from data_pipelines.batch import Batch
from evf_sam_jax.experiment import ExperimentConfig, StageConfig
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.models.evf_sam import encode_image
from evf_sam_jax.param_rules import Params
from evf_sam_jax.sharding import MeshConfig, make_mesh
from evf_sam_jax.train_step import make_loss

# Of the residuals, the largest are named.
NAMED_RESIDUALS = 4
# Results that are views of an operand, or that a compiler makes where they are used.
VIEWS = frozenset(
    ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "stop_gradient", "copy", "iota")
)


def activation_bytes(
    experiment: ExperimentConfig,
    config: StageConfig,
    trainable: Params,
    frozen: Params,
    batch: Batch,
) -> tuple[collections.Counter[str], int, int | None]:
    """What a batch needs on one device besides state, batch and gradients.

    Args:
      trainable: shapes, as are the following.
      batch: what the device has at a time.

    Returns:
      Bytes of what the backward pass needs of the forward pass, by dtype and shape; the peak of
      both; and the peak of the image encoder, None where it is trained or not computed.
    """
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])  # so that layers gather and split
    loss = make_loss(experiment.model, _prompts(config, batch.sam_size.shape[0]), config.loss)
    inputs = (trainable, frozen, batch, jax.ShapeDtypeStruct((), "float32"))
    inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    gathered = experiment.mesh.zero_stage == 3
    segmenter = {path.split("/")[1] for path in path_leaves(trainable) if "segmenter/" in path}
    with jax.set_mesh(mesh):
        saved = saved_bytes(loss, *inputs, gathered=gathered)
        gradient = jax.make_jaxpr(jax.grad(loss, has_aux=True))(*inputs)
        encoding = None
        if batch.sam_image is not None and "image_encoder" not in segmenter:
            encode = jax.make_jaxpr(lambda *args: encode_image(experiment.model, *args))
            encoder = encode({**inputs[1]}, batch.sam_image, batch.sam_size)
            encoding = peak_bytes(encoder, gathered)
    results = len(jax.tree.leaves(trainable))
    return saved, peak_bytes(gradient, gathered, results), encoding


def saved_bytes(
    loss: Callable[..., Any], trainable: Any, *inputs: Any, gathered: bool = False
) -> collections.Counter[str]:
    """Bytes by dtype and shape of what the gradient keeps of `loss`, except its own inputs.

    Args:
      loss: of (trainable, *inputs), returns a pair, whose first is the loss.
      gathered: as for `peak_bytes`.
    """

    def forward(trainable: Any, *inputs: Any):
        return jax.vjp(lambda wrt: loss(wrt, *inputs), trainable, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(forward)(trainable, *inputs).jaxpr
    _, results = _flat(jaxpr, [0] * len(jaxpr.invars), gathered)
    counts: collections.Counter[str] = collections.Counter()
    for buffer in set(results):
        if buffer.size:
            counts[buffer.name] += buffer.size
    return counts


def peak_bytes(jaxpr: ClosedJaxpr, gathered: bool = False, results: int = 0) -> int:
    """Bytes at the fullest moment while the equations run as they are written, without inputs.

    Args:
      gathered: whether parameters that a layer asks for whole are copies, as in stage 3 of ZeRO.
      results: the first outputs, which do not count: memory for them is the caller's.
    """
    return _peak(jaxpr.jaxpr, [0] * len(jaxpr.jaxpr.invars), gathered, results)


@dataclasses.dataclass(eq=False)
class _Buffer:
    """What one result takes; each is equal to itself only.

    Attributes:
      size: in bytes; 0 where memory for it is somebody else's.
      name: dtype and shape.
    """

    size: int
    name: str = ""


@dataclasses.dataclass(frozen=True)
class _Step:
    """An equation that makes something."""

    equation: JaxprEqn
    operands: list[_Buffer | None]
    results: list[_Buffer]


def _peak(jaxpr: Jaxpr, inputs: Sequence[int], gathered: bool, elsewhere: int = 0) -> int:
    """The most bytes at once of what the equations make, and of the inputs until last used.

    Args:
      inputs: bytes of each input; 0: it is the caller's.
      elsewhere: the first outputs, which take no memory here.
    """
    steps, outputs = _flat(jaxpr, inputs, gathered)
    for buffer in outputs[:elsewhere]:
        buffer.size = 0
    last = {buffer: i for i, step in enumerate(steps) for buffer in (*step.operands, *step.results)}
    last |= dict.fromkeys(outputs, len(steps))
    dying: dict[int, set[_Buffer]] = collections.defaultdict(set)
    for buffer, index in last.items():
        if buffer is not None:
            dying[index].add(buffer)
    live = peak = sum(inputs)
    for index, step in enumerate(steps):
        inside, lent = _inside(step, dying[index], gathered)
        peak = max(peak, live - sum(buffer.size for buffer in lent) + inside)
        live += sum(buffer.size for buffer in step.results)
        live -= sum(buffer.size for buffer in dying[index])
    return peak


def _inside(
    step: _Step, dying: AbstractSet[_Buffer], gathered: bool
) -> tuple[int, AbstractSet[_Buffer]]:
    """The peak of one step with its results.

    Returns:
      Bytes, and those of the dying operands that are among them, since they go on the way.
    """
    params = step.equation.params
    made = sum(buffer.size for buffer in step.results)
    match step.equation.primitive.name:
        case "scan":
            # The stacked results are there from the beginning; a pass has slices, old and new.
            fixed, carried = params["num_consts"], params["num_carry"]
            stacked = sum(buffer.size for buffer in step.results[carried:])
            lent = dying & {buffer for buffer in step.operands[fixed : fixed + carried] if buffer}
            return stacked + _pass(params["jaxpr"].jaxpr, fixed, gathered), lent
        case "while":
            body = params["body_jaxpr"].jaxpr
            return max(made, _pass(body, params["body_nconsts"], gathered)), set()
        case "cond":
            branches = [
                _pass(one.jaxpr, len(one.jaxpr.invars), gathered) for one in params["branches"]
            ]
            return max(made, *branches), set()
    return made, set()


def _pass(body: Jaxpr, fixed: int, gathered: bool) -> int:
    """The peak of a loop's body, of whose inputs the first `fixed` are the caller's."""
    inputs = [0] * fixed + [_bytes(var.aval) for var in body.invars[fixed:]]
    return _peak(body, inputs, gathered)


def _flat(jaxpr: Jaxpr, inputs: Sequence[int], gathered: bool) -> tuple[list[_Step], list[_Buffer]]:
    """The steps of a jaxpr with all that it calls written out and views seen through.

    Returns:
      The steps, and the buffer of each output.
    """
    steps: list[_Step] = []

    def write_out(jaxpr: Jaxpr, given: Sequence[_Buffer | None]) -> list[_Buffer | None]:
        named: dict[Any, _Buffer | None] = dict(zip(jaxpr.invars, given, strict=True))

        def buffers(atoms: Sequence[Any]) -> list[_Buffer | None]:
            return [None if isinstance(atom, Literal) else named.get(atom) for atom in atoms]

        for equation in jaxpr.eqns:
            operands = buffers(equation.invars)
            inner = _called(equation)
            if inner is not None:
                results = write_out(inner, operands)
            elif _is_view(equation, gathered):
                results = operands[:1] or [None]
            else:
                results = [_Buffer(_bytes(v.aval), _name(v.aval)) for v in equation.outvars]
                steps.append(_Step(equation, operands, results))
            named.update(zip(equation.outvars, results, strict=True))
        return buffers(jaxpr.outvars)

    found = write_out(jaxpr, [_Buffer(size) for size in inputs])
    return steps, [_Buffer(0) if buffer is None else buffer for buffer in found]


def _is_view(equation: JaxprEqn, gathered: bool) -> bool:
    if equation.primitive.name == "sharding_constraint":
        return not (gathered and equation.params["sharding"].spec == PartitionSpec())
    return equation.primitive.name in VIEWS


def _prompts(config: StageConfig, share: int) -> Any:
    """Of one image there are no halves, of which one has points and the other boxes."""
    both = config.prompts == "points_and_boxes"
    return "boxes" if both and share == 1 else config.prompts


def _called(equation: JaxprEqn) -> Jaxpr | None:
    """What the equation calls on its operands as they are, such as a function under `jit`."""
    for value in equation.params.values():
        inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        # Of a reduction or a scatter it is an operation on single elements.
        if isinstance(inner, Jaxpr) and (_shapes(inner.invars), _shapes(inner.outvars)) == (
            _shapes(equation.invars),
            _shapes(equation.outvars),
        ):
            return inner
    return None


def _shapes(atoms: Sequence[Any]) -> list[tuple[int, ...]]:
    return [atom.aval.shape for atom in atoms]


def _name(aval: Any) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def _bytes(leaf: Any) -> int:
    """Of an array, its shape, or its abstract value."""
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
