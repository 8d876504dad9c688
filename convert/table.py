"""What a conversion is: a table of rules that reads both ways and leaves nothing over.

A rule pairs a template of PyTorch names with a template of '/'-paths and a named transform:

    Rule("encoder.layers.{layer}.self_attn.{proj}.{branch}.weight",
         "encoder/layers/self_attn/{proj}/{branch}/kernel", LINEAR)

A field in braces runs over the values the table gives it: a string goes into the path, a tuple of
integers says where in a stacked leaf (one whose layers are scanned) the tensor belongs. Templates
instead of regular expressions, because a template can be enumerated: the table knows every name
that a checkpoint must have, so that a missing one can be named, and the way back to PyTorch is the
same table read from the right, not a second one.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from convert.checkpoint_files import SourceTensor
from evf_sam_jax.errors import UserError

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_HALVES = {"float16", "bfloat16"}
_LISTED = 5  # names of one kind of mistake that an error spells out


@dataclasses.dataclass(frozen=True)
class Transform:
    """A named change of layout and its inverse; both give views, values never change."""

    name: str
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


AS_IS = Transform("as is", lambda x: x, lambda x: x)
LINEAR = Transform("[out,in] <-> [in,out]", lambda x: x.T, lambda x: x.T)
CONV = Transform(
    "OIHW <-> HWIO", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
# PyTorch keeps transposed convolutions as [in,out,h,w]; kernel == stride, so nothing is flipped.
CONV_TRANSPOSE = Transform(
    "IOHW <-> HWIO", lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1)
)
DROP_LEADING_ONE = Transform("[1,...] <-> [...]", lambda x: x[0], lambda x: x[None])


@dataclasses.dataclass(frozen=True)
class Rule:
    """PyTorch names (a template) <-> paths (a template), and how the layout changes."""

    source: str
    target: str
    transform: Transform = AS_IS


@dataclasses.dataclass(frozen=True)
class Ignored:
    """PyTorch names (a regular expression, whole) that the model has no use for, and why.

    They are kept aside in the model directory, so that they can go back.
    """

    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A family's rules, the values of their fields, and what it ignores."""

    rules: tuple[Rule, ...]
    fields: Mapping[str, Mapping[str, str | tuple[int, ...]]]
    ignored: tuple[Ignored, ...] = ()

    def prefixed(self, prefix: str) -> "Table":
        """The same table for PyTorch names that begin with `prefix`."""
        return Table(
            tuple(dataclasses.replace(rule, source=prefix + rule.source) for rule in self.rules),
            self.fields,
            tuple(
                dataclasses.replace(one, source=re.escape(prefix) + one.source)
                for one in self.ignored
            ),
        )


def joined(*tables: Table) -> Table:
    """One table of several, whose field names must differ."""
    names = [name for table in tables for name in table.fields]
    if len(set(names)) < len(names):
        raise ValueError(f"tables share the name of a field: {sorted(names)}")
    return Table(
        tuple(rule for table in tables for rule in table.rules),
        {name: values for table in tables for name, values in table.fields.items()},
        tuple(one for table in tables for one in table.ignored),
    )


def weight_and_bias(source: str, target: str, transform: Transform) -> tuple[Rule, Rule]:
    """The two rules of a linear layer or convolution."""
    return (
        Rule(f"{source}.weight", f"{target}/kernel", transform),
        Rule(f"{source}.bias", f"{target}/bias"),
    )


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """The two rules of a LayerNorm."""
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


@dataclasses.dataclass(frozen=True)
class Part:
    """One PyTorch tensor of a leaf: where in the stack it lies (() for a leaf that is no stack)."""

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    transform: Transform


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table applied to a model: for each leaf its shape and the PyTorch tensors it is made of."""

    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Sequence[Part]]
    ignored: tuple[Ignored, ...]

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every PyTorch name that the model needs, with its shape."""
        return {part.key: part.shape for parts in self.parts.values() for part in parts}


def make_plan(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Applies `table` to the model whose leaves have these shapes (path -> shape).

    Raises:
      ValueError: the table does not fill each element of each leaf exactly once, or uses a name
        twice. This is a mistake in the table or the model, never in a checkpoint.
    """
    parts: dict[str, list[Part]] = {}
    used: set[str] = set()
    for key, path, index, transform in _entries(table):
        if key in used:
            raise ValueError(f"two rules use {key}")
        if path not in shapes:
            raise ValueError(f"the rule for {key} fills {path}, which the model does not have")
        used.add(key)
        shape = _torch_shape(transform, shapes[path][len(index) :])
        parts.setdefault(path, []).append(Part(key, index, shape, transform))
    for path, shape in shapes.items():
        _check_filled(path, shape, parts.get(path, []))
    return Plan(dict(shapes), parts, table.ignored)


def _entries(table: Table):
    """Yields (PyTorch name, path, index in the stack, transform) for every value of every field."""
    for rule in table.rules:
        names = list(dict.fromkeys(re.findall(r"{(\w+)}", rule.source)))
        for values in itertools.product(*(table.fields[name].items() for name in names)):
            key = rule.source.format(
                **{n: torch for n, (torch, _) in zip(names, values, strict=True)}
            )
            path = rule.target.format(**{n: jax for n, (_, jax) in zip(names, values, strict=True)})
            index = tuple(i for _, jax in values if isinstance(jax, tuple) for i in jax)
            yield key, path, index, rule.transform


def _torch_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape before `to_jax`, found on a view of one element that takes no memory."""
    return transform.to_torch(np.broadcast_to(np.zeros(()), shape)).shape


def _check_filled(path: str, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
    found = sorted(part.index for part in parts)
    depth = len(found[0]) if found else 0
    if found != list(np.ndindex(*shape[:depth])):
        raise ValueError(f"{path} {shape} is not filled exactly once: {found}")


def check_source(plan: Plan, tensors: Mapping[str, SourceTensor], where: str) -> dict[str, str]:
    """Checks that a checkpoint has every tensor the model needs, in its shape, and no other.

    Args:
      plan: what the model needs.
      tensors: what the checkpoint has.
      where: the checkpoint's name for the error.

    Returns:
      The ignored PyTorch names that the checkpoint has, each with its reason.

    Raises:
      UserError: with everything that is wrong, all at once.
    """
    expected = plan.source_shapes()
    missing = [key for key in expected if key not in tensors]
    ignored: dict[str, str] = {}
    surplus = []
    for key in sorted(set(tensors) - set(expected)):
        reasons = [one.reason for one in plan.ignored if re.fullmatch(one.source, key)]
        if reasons:
            ignored[key] = reasons[0]
        else:
            surplus.append(key)
    present = {key: shape for key, shape in expected.items() if key in tensors}
    wrong_shape = [
        f"{key} (expected {list(shape)}, found {list(tensors[key].shape)})"
        for key, shape in present.items()
        if tensors[key].shape != shape
    ]
    wrong_dtype = [
        f"{key} (expected {' or '.join(_FLOATS)}, found {tensors[key].dtype})"
        for key in present
        if tensors[key].dtype.name not in _FLOATS
    ]
    problems = [
        _list(problem, names)
        for problem, names in (
            ("missing", missing),
            ("not known to the model", surplus),
            ("of the wrong shape", wrong_shape),
            ("of the wrong dtype", wrong_dtype),
        )
        if names
    ]
    if problems:
        raise UserError(f"{where} does not fit the model: " + "; ".join(problems))
    return ignored


def _list(problem: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    plural = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {plural} {problem}: {', '.join(names[:_LISTED])}{more}"


def leaf_dtype(parts: Sequence[Part], tensors: Mapping[str, SourceTensor]) -> np.dtype:
    """The narrowest dtype that holds every part of a leaf exactly: a stack can have been mixed."""
    return functools.reduce(common_dtype, (tensors[part.key].dtype for part in parts))


def common_dtype(a: np.dtype, b: np.dtype) -> np.dtype:
    """The narrowest dtype that holds both exactly; NumPy knows none for float16 and bfloat16."""
    return np.dtype(np.float32) if {a.name, b.name} == _HALVES else np.promote_types(a, b)


def build_leaf(
    plan: Plan, path: str, tensors: Mapping[str, SourceTensor], dtype: np.dtype | None = None
) -> np.ndarray:
    """Gathers one leaf from its parts, in the source's dtype or cast to `dtype`."""
    parts = plan.parts[path]
    leaf = np.empty(plan.shapes[path], dtype or leaf_dtype(parts, tensors))
    for part in parts:
        leaf[part.index] = part.transform.to_jax(tensors[part.key].load())
    return leaf
