"""A plan counts what shapes and equations say, as XLA does, and comes from the command as typed."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from evf_sam_jax.activation_memory import activation_bytes, peak_bytes, saved_bytes
from evf_sam_jax.errors import UserError
from evf_sam_jax.plan import (
    Device,
    StagePlan,
    batch_shapes,
    parameter_counts,
    plan_elsewhere,
    state_bytes,
)
from evf_sam_jax.plan_command import plan_text
from evf_sam_jax.sharding import MeshConfig, bytes_per_device, make_mesh
from evf_sam_jax.stage import Stage, make_stage
from evf_sam_jax.tpu_topology import tpu_devices
from evf_sam_jax.training_data import batch_spec
from tests.evf_sam_jax import tiny_config, tiny_experiment
from tests.evf_sam_jax.test_main import command
from tests.evf_sam_jax.tiny_experiment import EXPERIMENT, PRETRAIN, REFERRING

N = 100
FLOAT = 4


def vector(n: int = N) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((n,), jnp.float32)


def peak(function, *args, results: int = 0) -> int:
    return peak_bytes(jax.make_jaxpr(function)(*args), results=results)


@functools.cache
def stage(zero_stage: int, fsdp: int = 4) -> Stage:
    """The tiny experiment on eight devices."""
    config = dataclasses.replace(REFERRING, batch_size=8, ema_decay=0.9)
    evaluation = dataclasses.replace(EXPERIMENT.evaluation, batch_size=8)
    mesh = MeshConfig(fsdp=fsdp, zero_stage=zero_stage, min_size=64)
    experiment = dataclasses.replace(EXPERIMENT, mesh=mesh, stages=(config,), evaluation=evaluation)
    return make_stage(experiment, config, make_mesh(mesh))


def test_what_the_backward_pass_needs_is_counted_without_inputs():
    def loss(w, x):
        return jnp.sum(jnp.sin(w * x)), None  # keeps cos(w x), and x, which is an input

    assert saved_bytes(loss, vector(), vector()) == {f"float32[{N}]": FLOAT * N}


def test_what_is_recomputed_is_not_kept():
    def loss(w, x):
        return jnp.sum(jax.checkpoint(lambda w: jnp.sin(jnp.sin(w * x)))(w)), None

    assert saved_bytes(loss, vector(), vector()).total() == 0


def test_results_live_until_they_are_last_used():
    assert peak(jnp.sin, vector()) == FLOAT * N
    # The second is made while the first is there; then the third while the second is.
    assert peak(lambda x: jnp.sin(jnp.cos(jnp.tan(x))), vector()) == 2 * FLOAT * N
    # The first is there until the end.
    assert peak(lambda x: (y := jnp.tan(x)) * jnp.sin(jnp.cos(y)), vector()) == 3 * FLOAT * N


def test_views_take_nothing_and_keep_what_they_show():
    assert peak(lambda x: x.reshape(N // 4, 4) + 1.0, vector()) == FLOAT * N

    def function(x):
        view = jnp.tan(x).reshape(N // 4, 4)
        return jnp.sin(jnp.cos(x)).reshape(N // 4, 4) + view

    assert peak(function, vector()) == 3 * FLOAT * N


def test_functions_within_count_as_if_written_out():
    def function(x):
        return jax.jit(lambda y: jnp.sin(jnp.cos(y)))(jnp.tan(x))

    assert peak(function, vector()) == 2 * FLOAT * N


def test_a_loop_has_its_results_and_one_pass_at_a_time():
    def function(x):
        def body(carry, _):
            return carry + 1.0, jnp.sin(jnp.cos(carry))

        return jax.lax.scan(body, x, length=5)[1]

    # Five results; of a pass the next carry, and with it first the old one and the cosine, then
    # the cosine and the sine.
    assert peak(function, vector()) == (5 + 3) * FLOAT * N


def test_results_that_the_caller_has_room_for_do_not_count():
    assert peak(jax.jit(lambda x: (jnp.sin(x), jnp.cos(x))), vector(), results=1) == FLOAT * N


def test_adams_moments_are_split_over_fsdp():
    planned = stage(2)
    trained = 2 * FLOAT * sum(leaf.size for leaf in jax.tree.leaves(planned.shapes.trainable))
    found = state_bytes(planned)["optimizer state"]
    assert trained / 4 <= found < 1.05 * trained / 4


def test_stages_of_zero_split_what_they_shall():
    def split(zero_stage: int) -> dict[str, float]:
        """Kind -> its share of what one device alone has."""
        planned = stage(zero_stage)
        gradients = bytes_per_device(planned.shapes.trainable, planned.placement.gradients)
        found = {**state_bytes(planned), "gradients": gradients}
        alone = state_bytes(stage(1, fsdp=1))
        alone["gradients"] = alone["parameters, trained"]
        return {kind: round(size / alone[kind], 1) for kind, size in found.items()}

    quarter = 0.3  # 0.25, with small leaves whole
    moments = {"optimizer state": quarter, "moving average": quarter}
    whole = {"parameters, trained": 1.0, "parameters, frozen": 1.0}
    parted = dict.fromkeys(whole, quarter)
    assert split(1) == {**whole, **moments, "gradients": 1.0}
    assert split(2) == {**whole, **moments, "gradients": quarter}
    assert split(3) == {**parted, **moments, "gradients": quarter}


def test_gathered_parameters_take_memory_in_the_third_stage_only():
    def activations(zero_stage: int) -> int:
        planned = stage(zero_stage)
        shapes = planned.shapes
        experiment, config = planned.experiment, planned.config
        batch = batch_shapes(batch_spec(experiment, config, 1, shrink=True))
        return activation_bytes(experiment, config, shapes.trainable, shapes.frozen, batch)[1]

    assert activations(1) == activations(2) < activations(3)


def test_batches_have_the_shapes_of_the_run_itself():
    for config in (PRETRAIN, REFERRING):
        expected = batch_spec(EXPERIMENT, config, config.batch_size, shrink=True)
        real = tiny_experiment.batch(prompts=config.prompts != "text")
        found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch_shapes(expected))
        assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), real)


def test_parameters_are_counted_by_module():
    shapes = stage(2).shapes
    counts = parameter_counts(shapes.trainable, shapes.frozen)
    total = sum(leaf.size for leaf in jax.tree.leaves((shapes.trainable, shapes.frozen)))
    assert sum(map(sum, counts.values())) == total
    assert counts["projector"][1] == counts["segmenter/image_encoder"][0] == 0


PLAN = StagePlan(
    name="referring",
    steps=100,
    mesh=(2, 4),
    zero_stage=2,
    images=16,
    accumulate=2,
    share=1,
    phrases=3,
    text_length=16,
    canvas=(64, 64),
    parameters={"encoder": (10, 0), "projector": (1, 2)},
    state={"parameters, trained": 20 * 10**9, "optimizer state": 5 * 10**9},
    gradients=10**9,
    batch=10**9,
    activations=5 * 10**9,
    saved=4 * 10**9,
    largest_saved={"float32[5]": 20},
    encoding=None,
    flops=16 * 362 * 10**12,
    collectives={"all-reduce": (3, 10**6)},
    device_kind="cpu",
    arguments=1,
    temporaries=2,
    compile_seconds=3.0,
)


def test_memory_is_compared_with_a_margin():
    # 20 + 5, twice 1 of gradients, thrice 1 of batches, and 5.
    assert PLAN.total == 35 * 10**9
    assert "fits: 35 GB, where a margin of 10% leaves 36 GB of 40 GB" in plan_text(
        PLAN, Device(8, 40e9)
    )
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in plan_text(PLAN, Device(8, 40e9))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in plan_text(PLAN, Device(8, 48e9))
    assert "does not fit: 35 GB" in plan_text(PLAN, Device(8, 38e9))


def test_times_come_from_the_peak_of_known_devices():
    text = plan_text(PLAN, Device(8, 48e9, "NVIDIA L40S"))
    assert (
        "at least 2 s a step" in text
        and "an estimate at 40% of the peak, not measured: 5 s" in text
    )
    assert "the peak of 'abacus' is not known" in plan_text(PLAN, Device(8, None, "abacus"))


def test_for_tpus_their_compiler_is_believed():
    tpu = dataclasses.replace(
        PLAN, device_kind="TPU v5 lite", arguments=6 * 10**9, temporaries=10**9
    )
    text = plan_text(tpu, Device(memory=16e9, topology="v5e:2x4"))
    # 6 + 1, and two batches of 1 that are on their way.
    assert "fits: 9 GB by TPU's compiler" in text and "XLA_PYTHON" not in text
    assert "compiled for v5e:2x4 of TPU v5 lite" in text
    assert "at the peak of TPU v5 lite of 197e12" in text and "bfloat16 counts as" not in text
    assert "fits, since the compiler refuses what does not: 9 GB" in plan_text(
        tpu, Device(topology="v5e:2x4")
    )
    refused = dataclasses.replace(tpu, refused="RESOURCE_EXHAUSTED: 33 G of 16 G", collectives={})
    assert "does not fit: RESOURCE_EXHAUSTED" in plan_text(refused, Device(topology="v5e:2x4"))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({}, "--devices: expected how many there will be, found 0"),
        ({"memory": 0.0}, "--device_memory_gb: expected a positive number, found 0"),
        (
            {"topology": "v5e:2x4"},
            "--devices: expected none beside --tpu_topology, which says how many there are, "
            "found 8",
        ),
        (
            {"slices": 2},
            "--tpu_slices: expected 1 or more slices of a --tpu_topology, found 2",
        ),
    ],
)
def test_devices_that_cannot_be_are_named(described: dict, message: str):
    with pytest.raises(UserError) as error:
        Device(**({"count": 8, **described} if described else {}))
    assert str(error.value) == message


def test_a_mistake_of_the_config_is_one_sentence():
    values = tiny_config.get_config()
    values.mesh.fsdp = 4
    with pytest.raises(UserError) as error:
        plan_elsewhere(values.to_dict(), Device(2))
    assert str(error.value) == "mesh.fsdp: expected at most the 2 devices, found 4"


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (jax[tpu])"
)


@pytest.mark.slow
@needs_libtpu
def test_on_tpus_gradients_are_reduce_scattered_from_the_second_stage_on():
    def plan(zero_stage: int) -> StagePlan:
        values = tiny_config.get_config()
        values.mesh = {"fsdp": 4, "zero_stage": zero_stage, "min_size": 64}
        return plan_elsewhere(values.to_dict(), Device(topology="v5e:2x4"))[-1]

    stages = {zero_stage: plan(zero_stage) for zero_stage in (1, 2, 3)}
    gradients = sum(leaf.size * FLOAT for leaf in jax.tree.leaves(stage(2).shapes.trainable))
    for found in stages.values():
        assert found.device_kind == "TPU v5 lite" and found.mesh == (2, 4) and not found.refused
    assert "reduce-scatter" not in stages[1].collectives
    assert stages[1].collectives["all-reduce"][1] == pytest.approx(gradients, rel=0.1)
    for zero_stage in (2, 3):
        # Of the smallest, the compiler gathers what they are products of instead.
        assert stages[zero_stage].collectives["reduce-scatter"][1] > 0.6 * gradients
        # What is left: the parts that groups of devices add up, and what is not split.
        assert stages[zero_stage].collectives["all-reduce"][1] < 0.5 * gradients


@pytest.mark.slow
@needs_libtpu
def test_groups_of_devices_stay_within_a_slice():
    values = tiny_config.get_config()
    values.mesh.fsdp = 8
    values.stages.referring.batch_size = values.evaluation.batch_size = 16
    plan = plan_elsewhere(values.to_dict(), Device(topology="v5e:2x4", slices=2))[-1]
    assert plan.mesh == (2, 8)
    values.mesh.fsdp = 16
    with pytest.raises(UserError, match="mesh.data: expected a multiple of 2 slices, found 1"):
        plan_elsewhere(values.to_dict(), Device(topology="v5e:2x4", slices=2))


@pytest.mark.slow
@needs_libtpu
def test_a_slice_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="--tpu_topology: expected a slice .* found 'v5e:3x5'"):
        plan_elsewhere(tiny_config.get_config().to_dict(), Device(topology="v5e:3x5"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_plan_says_what_is_missing():
    with pytest.raises(UserError, match="--tpu_topology: expected libtpu"):
        tpu_devices("v5e:2x4")


@pytest.mark.slow
def test_the_command_says_all_that_and_agrees_with_the_compiler():
    result = command(
        "--config=tests/evf_sam_jax/tiny_config.py",
        "--config.mesh.fsdp=4",
        "--mode=plan",
        "--devices=8",
        "--device_memory_gb=1",
        "--device_kind=NVIDIA L40S",
    )
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout
    assert "mesh 2x4 (data x fsdp), ZeRO stage 2; 8 images a step, 1 at a time" in text

    planned = stage(2)
    config = planned.config
    batch = batch_shapes(batch_spec(planned.experiment, config, config.batch_size, shrink=True))
    assert f"model FLOPs: {planned.flops(batch):.4g} a step" in text
    for name in ("optimizer state", "gradients", "3 batches, in use or on their way"):
        assert re.search(rf"{name} +[\d.]+  shapes", text)
    assert re.search(r"all-reduce +\d+ x, together", text)
    assert "fits: " in text and "at least " in text and "not measured" in text

    def megabytes(name: str, source: str) -> float:
        found = re.search(rf"{name} +([\d.]+)  {source}", text)
        assert found, (name, source, text)
        return float(found[1])

    compiled = megabytes("gradients and activations", "compiled for 8 virtual CPU devices")
    counted = megabytes("gradients", "shapes") + megabytes("activations at their peak", "jaxpr")
    assert counted == pytest.approx(compiled, rel=0.4)
    state = planned.shapes.trainable, planned.shapes.frozen
    whole = sum(leaf.size * FLOAT for leaf in jax.tree.leaves(state))
    assert megabytes("state and one batch", "compiled") * 1e6 > whole
