"""Any mesh and any stage of ZeRO train alike; state is split as the rules say, and nothing else."""

import dataclasses
import functools
import math
import re
import types
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.collectives import collective_bytes
from evf_sam_jax.errors import UserError
from evf_sam_jax.initialize import initial_params
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.models import attention
from evf_sam_jax.sharding import (
    LARGE,
    MeshConfig,
    bytes_per_device,
    check_batch_size,
    check_placement,
    make_mesh,
    mesh_shape,
    optimizer_leaves,
    param_shardings,
    placement_table,
    process_rows,
    put_batch,
)
from evf_sam_jax.stage import Stage, make_stage
from evf_sam_jax.train_state import TrainState, create_state, split_params
from evf_sam_jax.train_step import make_train_step
from tests.evf_sam_jax.tiny_experiment import (
    CANVAS,
    EXPERIMENT,
    MODEL,
    REFERRING,
    TEXT_LENGTH,
    example,
)

STEPS, IMAGES = 20, 8
STAGE = dataclasses.replace(REFERRING, steps=STEPS, batch_size=IMAGES)


@functools.cache
def batch() -> Batch:
    """Eight images with one, two or three phrases."""
    spec = BatchSpec(
        batch_size=IMAGES,
        phrases=3,
        text_length=TEXT_LENGTH,
        images=tower_images(MODEL),
        canvas=CANVAS,
    )
    slots = []
    for i in range(IMAGES):
        whole, phrases = example(i, 90 + 3 * i, 120 - 2 * i), 1 + i % 3
        some = dataclasses.replace(
            whole, phrases=whole.phrases[:phrases], masks=whole.masks[:phrases]
        )
        slots.append(Slot(some))
    return assemble(slots, spec, load_tokenizer(SHAPES_TOKENIZER))


@functools.cache
def params():
    """On the host, since a step is given its state for good."""
    return jax.tree.map(np.array, initial_params(EXPERIMENT))


def stage_on(data: int, fsdp: int, zero_stage: int, **changes) -> Stage:
    # Nothing is too small to be split here.
    mesh_config = MeshConfig(data=data, fsdp=fsdp, zero_stage=zero_stage, min_size=64)
    chunk = changes.pop("encoder_chunk", None)
    segmenter = dataclasses.replace(MODEL.segmenter, encoder_chunk=chunk)
    experiment = dataclasses.replace(
        EXPERIMENT,
        mesh=mesh_config,
        model=dataclasses.replace(MODEL, segmenter=segmenter),
        evaluation=dataclasses.replace(EXPERIMENT.evaluation, batch_size=IMAGES),
    )
    return make_stage(experiment, dataclasses.replace(STAGE, **changes), make_mesh(mesh_config))


def compiled(stage: Stage):
    with jax.set_mesh(stage.mesh):
        shapes = put_batch(stage.mesh, batch(), IMAGES)
        return stage.step().lower(stage.shapes, shapes).compile()


def begin(stage: Stage) -> TrainState:
    trainable, frozen = split_params(params(), stage.config.trainable)
    state = create_state(trainable, frozen, stage.optimizer)
    return jax.device_put(jax.tree.map(np.array, state), stage.placement.state)


def run(stage: Stage, steps: int = STEPS) -> tuple[list[Any], TrainState, str]:
    step, state = compiled(stage), begin(stage)
    on_devices = put_batch(stage.mesh, batch(), IMAGES)
    metrics = []
    for _ in range(steps):
        state, one = step(state, on_devices)
        metrics.append(types.SimpleNamespace(**jax.device_get(vars(one))))
    check_placement(state, stage.placement)
    return metrics, state, step.as_text()


@functools.cache
def on_one_device() -> list[Any]:
    return run(stage_on(1, 1, 1))[0]


def assert_same(found: list[Any], expected: list[Any], rtol: float) -> None:
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [getattr(one, name) for one in found],
            [getattr(one, name) for one in expected],
            rtol=rtol,
            err_msg=name,
        )


@functools.cache
def on_mesh(data: int, fsdp: int, zero: int) -> tuple[list[Any], TrainState, str]:
    return run(stage_on(data, fsdp, zero))


MESHES = [(1, 8), (2, 4), (8, 1)]
FAST = {(2, 4, 2)}  # the others take minutes
COMBINATIONS = [
    pytest.param(*mesh, zero, marks=() if (*mesh, zero) in FAST else pytest.mark.slow)
    for mesh in MESHES
    for zero in (1, 2, 3)
]


@pytest.mark.parametrize(("data", "fsdp", "zero"), COMBINATIONS)
def test_eight_devices_train_as_one(data: int, fsdp: int, zero: int):
    metrics, state, text = on_mesh(data, fsdp, zero)
    assert_same(metrics, on_one_device(), rtol=1e-4)
    assert metrics[-1].loss < 0.7 * metrics[0].loss
    # Each gradient is reduced once; where it ends split, over `fsdp` first, and over `data` only
    # the part that a device keeps.
    collectives = collective_bytes(text)
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
    unused = sum(leaf.nbytes for leaf in unreached(state))
    reduced = collectives["all-reduce"].bytes + collectives["reduce-scatter"].bytes
    share = 1 + (1 / fsdp if zero >= 2 and min(data, fsdp) > 1 else 0)
    np.testing.assert_allclose(reduced, share * (gradients - unused), rtol=0.05)
    # Activations stay where they are; a norm's scale may change hands.
    exchanged = collectives["all-to-all"].bytes + collectives["collective-permute"].bytes
    assert exchanged <= 0.01 * gradients


def unreached(state: TrainState) -> list[jax.Array]:
    """Trainable leaves that the loss does not depend on: their gradients are zeros, not sums."""
    moments = optimizer_leaves(state, state.trainable)[1]  # squares of gradients
    return [leaf for leaf in moments.values() if not np.asarray(leaf).any()]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_stage_splits_what_it_says(zero: int):
    stage = stage_on(2, 4, zero)
    path = "encoder/layers/ffn/text/fc1/kernel"  # [2, 64, 128]
    split, whole = PartitionSpec(None, None, "fsdp"), PartitionSpec()
    state = stage.placement.state
    assert path_leaves(state.trainable)[path].spec == (split if zero == 3 else whole)
    assert path_leaves(stage.placement.gradients)[path].spec == (split if zero >= 2 else whole)
    frozen = "segmenter/image_encoder/groups/global/mlp/lin1/kernel"
    assert (path_leaves(state.frozen)[frozen].spec == whole) == (zero < 3)
    first, second = optimizer_leaves(state, state.trainable)
    assert first[path].spec == second[path].spec == split


def test_the_optimizer_takes_its_share_of_memory_on_each_device():
    for fsdp in (2, 4, 8):
        stage = stage_on(8 // fsdp, fsdp, 2)
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(begin(stage).opt_state))
        share = bytes_per_device(stage.shapes.opt_state, stage.placement.state.opt_state)
        np.testing.assert_allclose(share, total / fsdp, rtol=0.05)


@pytest.mark.slow
def test_on_cpu_stages_1_and_2_are_the_same_program_up_to_who_keeps_which_gradient():
    # A CPU has no reduce-scatter: gradients are reduced whole and cut up. Where they are kept
    # split, nothing more is sent.
    first, second = (collective_bytes(on_mesh(1, 8, zero)[2]) for zero in (1, 2))
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        np.testing.assert_allclose(first[kind].bytes, second[kind].bytes, rtol=0.01)


def test_parts_of_a_batch_add_up_to_its_gradient():
    """With updates that are the gradients themselves."""

    def gradients(accumulate: int):
        optimizer = optax.identity()
        trainable, frozen = split_params(params(), STAGE.trainable)
        state = create_state(trainable, frozen, optimizer)
        step = make_train_step(
            MODEL, "text", STAGE.loss, optimizer, lambda _: 0.0, accumulate=accumulate
        )
        after, metrics = jax.jit(step)(state, batch())
        moved = jax.tree.map(lambda a, b: np.asarray(a) - b, after.trainable, trainable)
        return path_leaves(moved), metrics

    (whole, one), (parts, four) = gradients(1), gradients(4)
    np.testing.assert_allclose(four.grad_norm, one.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(four.loss, one.loss, rtol=1e-6)
    assert four.intersection == one.intersection and four.union == one.union
    norm = math.sqrt(sum((leaf**2).sum() for leaf in whole.values()))
    for path, leaf in whole.items():
        assert np.linalg.norm(parts[path] - leaf) <= 1e-5 * norm, path


@pytest.mark.slow
def test_parts_chunks_and_tiles_are_taken_on_every_device(monkeypatch: pytest.MonkeyPatch):
    """Accumulation, an encoder that takes one image at a time on each of two devices, and attention
    in tiles, as images of the released size have it."""
    monkeypatch.setattr(attention, "SMALL_SCORES", 16)
    monkeypatch.setattr(attention, "TILE_SCORES", {"cpu": 64, "gpu": 64})
    stage = stage_on(1, 2, 2, accumulate=2, encoder_chunk=1)
    assert stage.model.segmenter.encoder_chunk == 2
    metrics, state, text = run(stage, steps=3)
    assert_same(metrics, on_one_device()[:3], rtol=1e-5)
    # Nothing of the batch moves: what is gathered is the parameters, once.
    collectives = collective_bytes(text)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
    assert collectives["all-gather"].bytes < 1.01 * trained
    assert collectives["all-to-all"].count == collectives["collective-permute"].count == 0


def test_a_step_that_is_not_finite_changes_nothing_nor_does_any_after_it():
    stage = stage_on(1, 1, 1)
    step, state = compiled(stage), begin(stage)
    before = jax.tree.map(np.array, state)
    on_devices = put_batch(stage.mesh, batch(), IMAGES)
    broken = dataclasses.replace(
        on_devices, encoder_image=on_devices.encoder_image.at[3, 5, 5, 1].set(np.nan)
    )
    for given in (broken, on_devices):
        state, metrics = step(state, given)
        assert not state.finite
    assert np.isfinite(metrics.loss)
    after = dataclasses.replace(state, finite=before.finite)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_every_device_holds_its_rows_of_the_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert process_rows(mesh, 16) == list(range(16))
    rows = np.arange(16)[:, None] * np.ones(3, int)
    placed = put_batch(mesh, {"rows": rows}, 16)["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def test_the_table_says_what_each_rule_places():
    stage = stage_on(2, 4, 3)
    table = placement_table(stage.experiment.mesh, stage.shapes, stage.placement).splitlines()
    assert table[0].startswith("mesh 2x4 (data x fsdp), ZeRO stage 3")
    count = sum(leaf.size for leaf in jax.tree.leaves(params()))
    assert table[-1].startswith("total") and f"{count:,}" in table[-1]


def test_meshes():
    assert mesh_shape(MeshConfig(data=0, fsdp=4), 8) == (2, 4)
    assert make_mesh(MeshConfig(data=2, fsdp=2)).size == 4  # the first of eight devices
    with pytest.raises(UserError, match="mesh.fsdp: expected at most the 8 devices, found 16"):
        make_mesh(MeshConfig(fsdp=16))
    with pytest.raises(UserError, match="data x fsdp to be the 8 devices, found 2 x 3"):
        mesh_shape(MeshConfig(data=2, fsdp=3), 8)
    with pytest.raises(UserError, match="batch_size: expected a multiple of 8 devices, found 12"):
        check_batch_size(make_mesh(MeshConfig()), "batch_size", 12)
    with pytest.raises(UserError, match="multiple of 8 devices x 2 parts, found 8"):
        check_batch_size(make_mesh(MeshConfig()), "batch_size", 8, accumulate=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_stage": 4}, "mesh.zero_stage: expected 1, 2 or 3, found 4"),
        ({"fsdp": 0}, "mesh.fsdp: expected 1 or more, found 0"),
        ({"data": -1}, "mesh.data: expected 0 or more, found -1"),
        (
            {"rules": ((".*", "tensor"),)},
            "mesh.rules: expected pairs of a regex and fsdp or replicated, found ('.*', 'tensor')",
        ),
    ],
)
def test_values_that_no_mesh_has(values: dict, message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        MeshConfig(**values)


def test_rules_cover_all_and_large_parameters_are_split():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    shapes = {"a": jax.ShapeDtypeStruct((LARGE + 1,), "float32")}
    with pytest.raises(UserError, match="expected a to have a side that is a multiple of fsdp = 8"):
        param_shardings(MeshConfig(fsdp=8), mesh, shapes, True)
    kept = MeshConfig(fsdp=8, rules=((".*", "replicated"),))
    assert param_shardings(kept, mesh, shapes, True)["a"].spec == PartitionSpec()
    with pytest.raises(UserError, match="mesh.rules: no rule covers the parameter a"):
        param_shardings(MeshConfig(rules=(("b", "fsdp"),)), mesh, shapes, True)


@dataclasses.dataclass(frozen=True)
class Device:
    """What slices look like to jax; there is no pod to ask."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "other"
    device_kind: str = "none of this name"


def test_slices_of_a_pod_hold_whole_groups():
    devices = [Device(i, i // 4, i // 4) for i in range(8)]
    with pytest.raises(UserError, match="mesh.data: expected a multiple of 2 slices, found 1"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)
    grid = make_mesh(MeshConfig(data=2, fsdp=4), devices).devices
    assert [{device.slice_index for device in row} for row in grid] == [{0}, {1}]
