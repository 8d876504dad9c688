"""What a compiled program sends between devices: how many collectives, and of how many bytes."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Of element types whose name does not say how wide they are.
ELEMENT_BITS = {"pred": 8, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
# Attributes that name a computation, or several in braces.
_CALLED = re.compile(
    r"\b(?P<role>to_apply|calls|condition|body|called_computations"
    r"|true_computation|false_computation|branch_computations)="
    r"(?P<names>\{[^}]*\}|%?[\w.-]+)"
)
_BRANCHES = ("true_computation", "false_computation", "branch_computations")
_TRIP_COUNT = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# How TPU's compiler names what fuses an all-reduce with the cut that keeps one part of it.
_FUSED_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind.

    Attributes:
      count: how many a device takes part in.
      bytes: how many a device sends or receives in them, as `collective_bytes` counts.
    """

    count: int = 0
    bytes: int = 0

    def __add__(self, other: "Collective") -> "Collective":
        return Collective(self.count + other.count, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Collective":
        return Collective(self.count * times, self.bytes * times)


_Totals = Mapping[str, Collective]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """`name = result opcode(operands), attributes`; `rest` is what follows `opcode(`."""

    name: str
    result: str
    opcode: str
    rest: str


def collective_bytes(hlo_text: str) -> dict[str, Collective]:
    """Returns what one run of a compiled program sends, by the kind of collective.

    The bytes are those of the result of a collective on one device; of a reduce-scatter those of
    its operand, which is the larger one as an all-gather's result is. How many of them cross a link
    depends on the algorithm: in a ring of n devices each sends (n - 1) / n of them, and twice that
    in an all-reduce.

    An asynchronous collective counts where it starts. What is inside a loop counts as often as
    the compiler knows that the loop runs, or else as its condition says if that is `counter < n`,
    where the counter is taken to begin at 0, as JAX's do; and otherwise once. Of a conditional, the
    branch that sends the most bytes counts. A program compiled for CPUs sends what is bfloat16
    as float32, twice the bytes that an accelerator would.

    Args:
      hlo_text: `compiled.as_text()`: the program of one device.

    Returns:
      An entry for each of `KINDS`.

    Raises:
      ValueError: the text has no entry computation, so it is not a module's.
    """
    entry, computations = _parse(hlo_text)

    @functools.cache
    def total(name: str) -> _Totals:
        instructions = computations.get(name, [])
        types = {instruction.name: instruction.result for instruction in instructions}
        once = _each_channel_once(instructions, computations)
        sent = _sum(_sent(one, types, total, computations) for one in once)
        if name.startswith(_FUSED_SCATTER):
            return {**sent, "all-reduce": Collective(), "reduce-scatter": sent["all-reduce"]}
        return sent

    return dict(total(entry))


def _each_channel_once(
    instructions: Iterable[_Instruction], computations: Mapping[str, Sequence[_Instruction]]
) -> Iterator[_Instruction]:
    """Leaves out the fusions that go on with a collective of an earlier one.

    TPU's compiler spreads one collective over several fusions, so that it runs beside what they
    compute; each has it whole in its text, on the same channel.
    """
    seen: set[str] = set()
    for one in instructions:
        if one.opcode == "fusion":
            fused = [inner for _, name in _called(one) for inner in computations.get(name, [])]
            channels = {found[1] for inner in fused if (found := _CHANNEL.search(inner.rest))}
            if channels and channels <= seen:
                continue
            seen |= channels
        yield one


def _sum(totals: Iterable[_Totals]) -> _Totals:
    result: dict[str, Collective] = {kind: Collective() for kind in KINDS}
    for part in totals:
        result |= {kind: result[kind] + sent for kind, sent in part.items()}
    return result


def _sent(
    instruction: _Instruction,
    types: Mapping[str, str],
    total: Callable[[str], _Totals],
    computations: Mapping[str, Sequence[_Instruction]],
) -> _Totals:
    """What an instruction sends, or the computations that it calls, whose `total` is given."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if kind in KINDS:
        return {kind: Collective(1, _collective_bytes(instruction, kind, types))}
    # The later parts of an asynchronous call name the same computation as its start.
    if opcode.endswith(("-update", "-done")):
        return {}
    called = list(_called(instruction))
    branches = [total(name) for role, name in called if role in _BRANCHES]
    others = [total(name) for role, name in called if role not in _BRANCHES]
    dearest = max(branches, key=_all_bytes, default={})
    times = _trips(instruction, computations) if opcode == "while" else 1
    return {kind: sent * times for kind, sent in _sum([*others, dearest]).items()}


def _trips(loop: _Instruction, computations: Mapping[str, Sequence[_Instruction]]) -> int:
    """How often a `while` runs; 1 where its text does not say."""
    if known := _TRIP_COUNT.search(loop.rest):
        return int(known[1])
    condition = computations.get(dict(_called(loop))["condition"], [])
    *_, last = condition  # a computation's result is written last
    if last.opcode != "compare" or "direction=LT" not in last.rest:
        return 1
    operands, _ = _split_at_end(last.rest)
    bound = _elements(operands)[1].split()[-1].lstrip("%")
    constants = {one.name: one.rest for one in condition if one.opcode == "constant"}
    found = re.match(r"(\d+)\)", constants.get(bound, ""))
    return int(found[1]) if found else 1


def _all_bytes(totals: _Totals) -> int:
    return sum(sent.bytes for sent in totals.values())


def _collective_bytes(instruction: _Instruction, kind: str, types: Mapping[str, str]) -> int:
    if kind == "reduce-scatter":
        operands, _ = _split_at_end(instruction.rest)
        # An operand is a name, after its type where the text has types there.
        names = [operand.split()[-1].lstrip("%") for operand in _elements(operands)]
        return sum(_type_bytes(types[name]) for name in names)
    result = instruction.result
    # Started, these return (operands, results, ...), but an all-reduce its results alone.
    if instruction.opcode.endswith("-start") and kind != "all-reduce" and result.startswith("("):
        operands_and_results, _ = _split_at_end(result[1:])
        result = _elements(operands_and_results)[1]
    return _type_bytes(result)


def _type_bytes(array_or_tuple: str) -> int:
    """Bytes of all arrays of a type such as `(f32[8,4]{1,0}, u32[])`."""
    total = 0
    for array in _ARRAY.finditer(array_or_tuple):
        # A dimension of changing size, as in `<=8`, takes up the space of its bound.
        sizes = (int(size.lstrip("<=")) for size in array["sizes"].split(",") if size)
        total += math.ceil(math.prod(sizes) * _element_bits(array["dtype"]) / 8)
    return total


def _element_bits(dtype: str) -> int:
    if dtype in ELEMENT_BITS:
        return ELEMENT_BITS[dtype]
    digits = re.search(r"\d+", dtype)  # the first: `f8e4m3fn` has 8
    assert digits, f"an element type of unknown width: {dtype}"
    return int(digits[0])


def _called(instruction: _Instruction) -> Iterator[tuple[str, str]]:
    """Yields the computations that an instruction calls, each after the role it has there."""
    # Without strings: metadata may hold anything.
    for match in _CALLED.finditer(_STRING.sub("", instruction.rest)):
        for name in re.findall(r"[\w.-]+", match["names"]):
            yield match["role"], name


def _parse(hlo_text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """Returns the entry computation's name, and the instructions of each computation."""
    entry, computations, instructions = None, {}, []
    for line in hlo_text.splitlines():
        if computation := _COMPUTATION.match(line):
            instructions = computations[computation["name"]] = []
            entry = computation["name"] if computation["entry"] else entry
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(_parse_instruction(instruction["name"], instruction["rest"]))
    if entry is None:
        raise ValueError("the text of a compiled module has an ENTRY computation, this has none")
    return entry, computations


def _parse_instruction(name: str, rest: str) -> _Instruction:
    if rest.startswith("("):
        inside, rest = _split_at_end(rest[1:])
        result = f"({_COMMENT.sub('', inside)})"
    else:
        result, _, rest = rest.partition(" ")
    opcode, _, rest = rest.strip().partition("(")
    return _Instruction(name, result, opcode, rest)


def _split_at_end(text: str) -> tuple[str, str]:
    """Splits the text after an opening parenthesis at the one that closes it."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()], text[match.end() :]
    raise ValueError(f"a parenthesis is never closed: {text[:80]}")


def _elements(text: str) -> list[str]:
    """Splits at the commas that are in no brackets."""
    text = _COMMENT.sub("", text)
    elements, depth, start = [], 0, 0
    for match in re.finditer(r"[\[({,\])}]", text):
        if match[0] != ",":
            depth += 1 if match[0] in "[({" else -1
        elif depth == 0:
            elements.append(text[start : match.start()])
            start = match.end()
    return [*elements, text[start:]]
