"""Collectives counted in the text of programs compiled for eight devices, and written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from evf_sam_jax.collectives import KINDS, Collective, collective_bytes

DEVICES = 8
ROWS = jax.ShapeDtypeStruct((DEVICES * 16, 8), jnp.float32)
ROW_BYTES = 16 * 8 * 4  # of one device's part of them


@functools.cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:DEVICES]), ("d",), axis_types=(AxisType.Auto,))


def sent(function, *args) -> dict[str, Collective]:
    """What `function` sends when each device calls it with its rows of each argument."""
    mapped = jax.shard_map(
        function, mesh=mesh(), in_specs=P("d"), out_specs=P("d"), check_vma=False
    )
    totals = collective_bytes(jax.jit(mapped).lower(*args).compile().as_text())
    assert set(totals) == set(KINDS)
    return {kind: total for kind, total in totals.items() if total.count}


def test_each_kind_counts_once():
    def function(x):
        gathered = jax.lax.all_gather(x, "d", tiled=True)
        scattered = jax.lax.psum_scatter(2.0 * gathered, "d", tiled=True)
        exchanged = jax.lax.all_to_all(scattered, "d", 0, 0, tiled=True)
        shifted = jax.lax.ppermute(exchanged, "d", [(i, (i + 1) % 8) for i in range(8)])
        return jax.lax.psum(3.0 * shifted, "d")

    assert sent(function, ROWS) == {
        "all-gather": Collective(1, DEVICES * ROW_BYTES),
        "reduce-scatter": Collective(1, DEVICES * ROW_BYTES),
        "all-to-all": Collective(1, ROW_BYTES),
        "collective-permute": Collective(1, ROW_BYTES),
        "all-reduce": Collective(1, ROW_BYTES),
    }


def test_bytes_are_those_of_the_element_type():
    bytes_ = jax.ShapeDtypeStruct((DEVICES, 4), jnp.uint8)
    total = sent(lambda x: jax.lax.all_gather(x, "d", tiled=True), bytes_)
    assert total == {"all-gather": Collective(1, DEVICES * 4)}


def test_a_collective_of_several_arrays_is_their_sum():
    small = jax.ShapeDtypeStruct((DEVICES, 3), jnp.float32)
    total = sent(lambda *xs: jax.lax.psum(xs, "d"), ROWS, small)["all-reduce"]
    assert total.bytes == ROW_BYTES + 3 * 4


def test_a_loop_counts_as_often_as_it_runs():
    def body(x, _):
        return jnp.sin(jax.lax.psum(x, "d")), None

    def function(x):
        return jax.lax.scan(body, x, None, length=23)[0]

    assert sent(function, ROWS) == {"all-reduce": Collective(23, 23 * ROW_BYTES)}


def test_loops_in_loops_multiply():
    def inner(x, _):
        return jnp.sin(jax.lax.psum(x, "d")), None

    def outer(x, _):
        x = jax.lax.scan(inner, x, None, length=5)[0]
        return jax.lax.ppermute(x, "d", [(0, 1), (1, 0)]), None

    def function(x):
        return jax.lax.scan(outer, x, None, length=7)[0]

    assert sent(function, ROWS) == {
        "all-reduce": Collective(35, 35 * ROW_BYTES),
        "collective-permute": Collective(7, 7 * ROW_BYTES),
    }


def test_a_loop_of_unknown_length_counts_once():
    def function(x):
        return jax.lax.while_loop(
            lambda x: x[0, 0] < 1.0, lambda x: jnp.sin(jax.lax.psum(x, "d")), x
        )

    assert sent(function, ROWS) == {"all-reduce": Collective(1, ROW_BYTES)}


def test_of_a_conditional_the_dearest_branch_counts():
    def dear(x):
        return jax.lax.psum(jnp.sin(jax.lax.psum(x, "d")), "d")

    def cheap(x):
        return jax.lax.ppermute(x, "d", [(0, 1), (1, 0)])

    def function(x, choice):
        return jax.lax.cond(choice[0] > 0, dear, cheap, x)

    choice = jax.ShapeDtypeStruct((DEVICES,), jnp.int32)
    assert sent(function, ROWS, choice) == {"all-reduce": Collective(2, 2 * ROW_BYTES)}


def test_what_the_partitioner_inserts_counts_too():
    """Gradients of a replicated weight on sharded rows are added up once."""

    def loss(weight, x):
        return jnp.sum(jnp.sin(x @ weight))

    replicated, rows = NamedSharding(mesh(), P()), NamedSharding(mesh(), P("d"))
    step = jax.jit(jax.grad(loss), in_shardings=(replicated, rows), out_shardings=replicated)
    compiled = step.lower(jax.ShapeDtypeStruct((8, 6), jnp.float32), ROWS).compile()
    total = collective_bytes(compiled.as_text())
    assert total["all-reduce"] == Collective(1, 8 * 6 * 4)
    assert sum(found.count for found in total.values()) == 1


def test_a_program_of_one_device_sends_nothing():
    text = jax.jit(jnp.sin).lower(ROWS).compile().as_text()
    assert text is not None
    assert collective_bytes(text) == dict.fromkeys(KINDS, Collective())


# As compilers for accelerators write it, which a CPU never does.
ASYNCHRONOUS = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[16]{0})->f32[16]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[4,2]) -> bf16[4,2] {
  %p = bf16[4,2]{1,0} parameter(0)
  ROOT %exchange = bf16[4,2]{1,0} all-to-all(%p), replica_groups={{0,1}}, dimensions={0}
}, execution_thread="parallel"

ENTRY %main (x: f32[16], y: bf16[4,2]) -> f32[16] {
  %x = f32[16]{0:T(256)} parameter(0), metadata={op_name="calls=%wrapped"}
  %y = bf16[4,2]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %reduce = f32[16]{0:T(256)} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  %reduced = f32[16]{0:T(256)} all-reduce-done(%reduce)
  %both = (f32[16]{0}, /*index=1*/bf16[4,2]{1,0}) all-reduce-start(%x, %y), to_apply=%add
  %gather = (f32[16]{0:T(256)}, f32[32]{0:T(256)}) all-gather-start(%reduced), dimensions={0}
  %gathered = f32[32]{0:T(256)} all-gather-done(%gather)
  %two = ((f32[16]{0}, bf16[4,2]{1,0}), (f32[32]{0}, bf16[8,2]{1,0})) all-gather-start(%x, %y)
  %scatter = ((f32[32]{0}), f32[16]{0}) reduce-scatter-start(f32[32]{0} %gathered), to_apply=%add
  %scattering = ((f32[32]{0}), f32[16]{0}) reduce-scatter-update(%scatter)
  %scattered = f32[16]{0} reduce-scatter-done(%scattering)
  %send = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%scattered)
  %received = f32[16]{0} collective-permute-done(%send)
  %start = ((bf16[4,2]{1,0}), bf16[4,2]{1,0}, s32[]) async-start(%y), calls=%wrapped
  %done = bf16[4,2]{1,0} async-done(%start), calls=%wrapped
  ROOT %copy = f32[16]{0} copy(%received)
}
"""


def test_asynchronous_collectives_count_where_they_start():
    assert collective_bytes(ASYNCHRONOUS) == {
        "all-reduce": Collective(2, 64 + (64 + 16)),
        "all-gather": Collective(2, 128 + (128 + 32)),
        "reduce-scatter": Collective(1, 128),
        "collective-permute": Collective(1, 64),
        "all-to-all": Collective(1, 16),
    }


# As TPU's compiler writes a loop, whose count it does not say, its reduce-scatter, and a gather
# that goes on beside other work.
OF_TPU = """HloModule loop

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1.clone (input: f32[8,4]) -> f32[2,4] {
  %input = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-reduce = f32[8,4]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%all-reduce, %zero, %zero), dynamic_slice_sizes={2,4}
}

%async.1 (begun: f32[2,4]) -> f32[8,4] {
  %begun = f32[2,4]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[8,4]{1,0} all-gather(%begun), channel_id=7, dimensions={0}
}

%async.2 (ended: f32[2,4]) -> f32[8,4] {
  %ended = f32[2,4]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,4]{1,0} all-gather(%ended), channel_id=7, dimensions={0}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %scattered = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %gathering = f32[8,4]{1,0} fusion(%scattered), kind=kCustom, calls=%async.1
  %gathered = f32[8,4]{1,0} fusion(%scattered), kind=kCustom, calls=%async.2
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %next = (s32[]{:T(128)}, f32[8,4]{1,0}) tuple(%i, %gathered)
}

%condition (q: (s32[], f32[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(23)
  %q = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (start: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %start = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_tpus_loops_and_fused_reduce_scatters_are_read():
    found = collective_bytes(OF_TPU)
    assert found["reduce-scatter"] == found["all-gather"] == Collective(23, 23 * 8 * 4 * 4)
    assert found["all-reduce"] == Collective()
    unknown = collective_bytes(OF_TPU.replace("direction=LT", "direction=NE"))
    assert unknown["all-gather"] == Collective(1, 8 * 4 * 4)


@pytest.mark.parametrize(
    "array, size",
    [
        ("pred[3]", 3),
        ("f8e4m3fn[8]", 8),
        ("s4[3]", 2),
        ("c64[2]", 16),
        ("f32[]", 4),
        ("s8[<=5]", 5),
    ],
)
def test_element_types_have_their_width(array: str, size: int):
    text = f"ENTRY %main (p: {array}) -> {array} {{\n  ROOT %r = {array} all-reduce(%p)\n}}\n"
    assert collective_bytes(text)["all-reduce"] == Collective(1, size)


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collective_bytes("%r = f32[2] all-reduce(%p)")
