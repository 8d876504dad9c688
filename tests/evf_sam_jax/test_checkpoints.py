"""What is saved comes back bit for bit on any mesh, and what was damaged on disk is recognised."""

import dataclasses
import functools
import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evf_sam_jax.checkpoints import (
    Checkpoints,
    checksum,
    is_begun,
    list_checkpoints,
    read_averaged_params,
)
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import CheckpointConfig
from evf_sam_jax.param_rules import merge
from evf_sam_jax.train_state import TrainState, create_state
from tests.test_architecture import ROOT

# When Orbax gives up reading what is damaged, reads that it began earlier still end, in no order.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What those reads leave behind is complained of here, not in a test that comes later."""
    yield
    gc.collect()


# Leaves of each kind that a state has: split or not, of no axis, of two, four and one byte.
SIZES = {"matrix": (16, 8), "vector": (8,), "scalar": ()}
OPTIMIZER = optax.adam(1e-3)


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("fsdp",))


def on_mesh(tree: Any, devices: int) -> Any:
    """The tree on so many devices, split along the first axis where there is one to split."""

    def put(leaf: Any) -> jax.Array:
        split = np.ndim(leaf) > 0 and np.shape(leaf)[0] % devices == 0
        spec = PartitionSpec("fsdp") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh_of(devices), spec))

    return jax.tree.map(put, tree)


def make_state(step: int, devices: int = 1, ema: bool = True) -> TrainState:
    """A state whose leaves are drawn anew for each step, but for the frozen ones."""
    rng, same = np.random.default_rng(step), np.random.default_rng(99)

    def draw(leaf: Any) -> Any:
        return rng.normal(size=np.shape(leaf)).astype(leaf.dtype)

    trainable = {name: np.zeros(shape, np.float32) for name, shape in SIZES.items()}
    frozen = {
        "half": same.normal(size=(8, 4)).astype(jnp.bfloat16),
        "integers": same.integers(-100, 100, (8,), np.int32),
        "booleans": same.integers(0, 2, (8,)).astype(bool),
    }
    state = create_state(trainable, {}, OPTIMIZER, ema)
    state = jax.tree.map(draw, state)
    state = dataclasses.replace(state, step=np.int32(step), finite=np.bool_(True), frozen=frozen)
    return on_mesh(state, devices)


def shapes_of(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same(found: Any, expected: Any) -> None:
    """Equal in every bit, dtype and structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(
            np.asarray(one).view(np.uint8) if np.ndim(one) else np.asarray(one),
            np.asarray(other).view(np.uint8) if np.ndim(other) else np.asarray(other),
        )


def save(workdir: Path, states: list[TrainState], **config: Any) -> None:
    """Saves states as a run does."""
    with Checkpoints(epath.Path(workdir), "stage", CheckpointConfig(**config)) as checkpoints:
        checkpoints.save_frozen(states[0])
        for state in states:
            checkpoints.save(int(state.step), state)


def restore(workdir: Path, like: TrainState) -> tuple[TrainState | None, list[str]]:
    said: list[str] = []
    with Checkpoints(epath.Path(workdir), "stage", CheckpointConfig()) as checkpoints:
        return checkpoints.restore(shapes_of(like), said.append), said


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (8, 8), (8, 2), (2, 1), (1, 8)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(
    before: int, after: int, ema: bool, tmp_path: Path
):
    state = make_state(3, before, ema)
    save(tmp_path, [state])
    like = make_state(0, after, ema)
    found, said = restore(tmp_path, like)
    another = f"going on with another mesh: devices: {before} before, {after} now"
    assert found is not None and said == ([another] if before != after else [])
    assert_same(found, state)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path: Path):
    assert restore(tmp_path, make_state(0)) == (None, [])


def test_a_stage_is_begun_when_its_first_checkpoint_is_whole(tmp_path: Path):
    workdir, half = epath.Path(tmp_path), folder(tmp_path, 0).with_name("0.orbax-checkpoint-tmp")
    assert not is_begun(workdir, "stage")
    half.mkdir(parents=True)  # a kill came here
    assert not is_begun(workdir, "stage")
    save(tmp_path, [make_state(0)])
    assert is_begun(workdir, "stage")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_state_may_be_overwritten_as_soon_as_it_is_handed_over(
    asynchronous: bool, tmp_path: Path
):
    overwrite = jax.jit(
        functools.partial(jax.tree.map, lambda leaf: jnp.zeros_like(leaf)), donate_argnums=0
    )
    expected = make_state(1)
    config = CheckpointConfig(asynchronous=asynchronous)
    with Checkpoints(epath.Path(tmp_path), "stage", config) as checkpoints:
        state = make_state(1)
        checkpoints.save_frozen(state)
        checkpoints.save(1, state)
        zeros = overwrite(dataclasses.replace(state, frozen={}))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros.trainable))
    found, said = restore(tmp_path, expected)
    assert said == []
    assert_same(found, expected)


def test_the_newest_and_the_best_ones_stay(tmp_path: Path):
    scores = {1: 0.2, 3: 0.9, 5: 0.5, 6: 0.4, 8: 0.8}
    config = CheckpointConfig(keep=2, keep_best=2)
    kept = []
    with Checkpoints(epath.Path(tmp_path), "stage", config) as checkpoints:
        for step in range(10):
            checkpoints.save(step, make_state(step), scores.get(step))
            checkpoints.wait()
            kept.append(checkpoints.steps)
    assert kept[2] == [1, 2]
    assert kept[6] == [3, 5, 6]
    assert kept[7] == [3, 5, 6, 7]
    assert kept[9] == [3, 8, 9]
    # A run that goes on knows the scores of those that are there.
    with Checkpoints(epath.Path(tmp_path), "stage", config) as checkpoints:
        checkpoints.save(10, make_state(10), 0.1)
        checkpoints.save(11, make_state(11))
        checkpoints.save(12, make_state(12))
        checkpoints.wait()
        assert checkpoints.steps == [3, 8, 11, 12]


def test_without_best_ones_only_the_newest_stay(tmp_path: Path):
    with Checkpoints(
        epath.Path(tmp_path), "stage", CheckpointConfig(keep=3, keep_best=0)
    ) as checkpoints:
        for step in range(5):
            checkpoints.save(step, make_state(step), 1.0 - step / 10)
        checkpoints.wait()
        assert checkpoints.steps == [2, 3, 4]


def test_a_step_that_is_saved_twice_is_written_once(tmp_path: Path):
    with Checkpoints(epath.Path(tmp_path), "stage", CheckpointConfig()) as checkpoints:
        checkpoints.save_frozen(make_state(1))
        checkpoints.save_frozen(make_state(1))
        checkpoints.save(1, make_state(1))
        checkpoints.save(1, make_state(1), 0.5)
        checkpoints.wait()
        checkpoints.save(1, make_state(1))
        assert checkpoints.steps == [1]
    assert_same(restore(tmp_path, make_state(1))[0], make_state(1))


# Checksums.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_the_checksum_sees_every_single_bit(dtype: str):
    values = np.random.default_rng(0).integers(0, 2, (2, 3))
    leaf = np.asarray(values.astype(dtype) if dtype != "bfloat16" else values.astype(jnp.bfloat16))
    before = checksum({"leaf": jnp.asarray(leaf)})
    assert checksum({"leaf": jnp.asarray(leaf.copy())}) == before
    raw = leaf.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize])
    bits = 1 if dtype == "bool" else 8 * leaf.dtype.itemsize
    for index in np.ndindex(leaf.shape):
        for bit in range(bits):
            damaged = raw.copy()
            damaged[index] ^= np.array(1 << bit, raw.dtype)
            assert checksum({"leaf": jnp.asarray(damaged.view(leaf.dtype))}) != before


def with_changes(leaf: np.ndarray, **changes: float) -> np.ndarray:
    changed = leaf.copy()
    for place, value in changes.items():
        changed.flat[int(place[1:])] = value
    return changed


@pytest.mark.parametrize("distance", [1, 2, 16, 512, 4096])
def test_the_checksum_sees_two_elements_change_places(distance: int):
    # Floats such as 1 and 2 differ in high bits only, where a product with a place that is a
    # multiple of a power of two has nothing left.
    leaf = np.zeros((16, 512), np.float32)
    for one, other in ((1.0, 2.0), (0.0, 1.0), (1.0, -1.0)):
        before = with_changes(leaf, _0=one, **{f"_{distance}": other})
        after = with_changes(leaf, _0=other, **{f"_{distance}": one})
        assert checksum(jnp.asarray(before)) != checksum(jnp.asarray(after))


def test_the_checksum_sees_two_signs_change():
    leaf = np.ones(8, np.float32)
    assert checksum(jnp.asarray(leaf)) != checksum(jnp.asarray(with_changes(leaf, _1=-1, _2=-1)))


def test_the_checksum_sees_rows_and_leaves_change_places():
    matrix = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    numbers = [checksum(jnp.asarray(one)) for one in (matrix, matrix[::-1], matrix.T)]
    a, b = jnp.asarray(matrix[0]), jnp.asarray(matrix[1])
    numbers += [checksum({"a": a, "b": b}), checksum({"a": b, "b": a})]
    assert len(set(numbers)) == len(numbers)


def test_the_checksum_is_the_same_on_every_mesh():
    one, two, eight = (make_state(5, devices) for devices in (1, 2, 8))
    assert checksum(one) == checksum(two) == checksum(eight)
    assert checksum(one) != checksum(make_state(6))


# Damage.


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the states of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    save(workdir, [make_state(1), make_state(2)])
    return workdir


def folder(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / "stage" / str(step)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_no_damaged_file_goes_unnoticed(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path
):
    files = [
        file.relative_to(saved)
        for file in sorted(folder(saved, 2).rglob("*"))
        if file.is_file() and file.stat().st_size
    ]
    assert len(files) > 10
    passed_over = set()
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        damage(workdir / file)
        found, said = restore(workdir, make_state(0))
        assert found is not None
        # What is no part of the state may be damaged; then nothing is amiss.
        assert_same(found, make_state(int(found.step)))
        if int(found.step) == 1:
            assert len(said) == 1
            assert said[0].startswith(f"{folder(workdir, 2)} is damaged and passed over: ")
            assert "\n" not in said[0]
            passed_over.add(file)
        else:
            assert (int(found.step), said) == (2, [])
    print(f"{len(passed_over)} of {len(files)} files matter")
    data = {file for file in files if "d" in file.parts and file.parts[-2] == "d"}
    assert data and data & passed_over


@pytest.mark.parametrize("item", ["trainable", "opt_state", "ema", "meta"])
def test_a_checkpoint_without_one_of_its_items_is_passed_over(
    item: str, saved: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    shutil.rmtree(folder(workdir, 2) / item)
    found, said = restore(workdir, make_state(0))
    assert_same(found, make_state(1))
    assert len(said) == 1
    assert said[0].startswith(f"{folder(workdir, 2)} is damaged and passed over: ")


def damage_all(directory: Path, damage: Callable[[Path], None]) -> None:
    for file in directory.rglob("d/*"):
        damage(file)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_where_all_are_damaged_one_sentence_says_so(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for step in (1, 2):
        damage_all(folder(workdir, step), damage)
    with pytest.raises(UserError) as raised:
        restore(workdir, make_state(0))
    directory = workdir / "checkpoints" / "stage"
    assert str(raised.value) == (
        f"{directory}: expected a checkpoint that is whole, found 2 damaged; without this "
        "directory the stage begins anew"
    )


def remove_folder(directory: Path) -> None:
    shutil.rmtree(directory)


def flip_a_value(directory: Path) -> None:
    """Other values, written as whole files: what a disk that lies gives back."""
    remove_folder(directory)
    state = make_state(0)
    other = {**state.frozen, "integers": state.frozen["integers"].at[0].add(1)}
    workdir = directory.parents[1]
    with Checkpoints(epath.Path(workdir), "stage", CheckpointConfig()) as checkpoints:
        checkpoints.save_frozen(dataclasses.replace(state, frozen=other))


@pytest.mark.parametrize(
    "damage",
    [
        functools.partial(damage_all, damage=flip),
        functools.partial(damage_all, damage=truncate),
        remove_folder,
        flip_a_value,
    ],
    ids=["flipped", "truncated", "removed", "another value"],
)
def test_damaged_frozen_parameters_are_one_sentence(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    frozen = workdir / "checkpoints" / "stage-frozen"
    damage(frozen)
    with pytest.raises(UserError) as raised:
        restore(workdir, make_state(0))
    assert str(raised.value).startswith(
        f"{frozen}: expected the frozen parameters of the stage, found them damaged: "
    )
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ema", [True, False])
def test_parameters_alone_come_back_as_training_evaluates_them(ema: bool, tmp_path: Path):
    state = make_state(1, devices=8, ema=ema)
    save(tmp_path, [state])
    found = read_averaged_params(epath.Path(tmp_path), "stage", 1)
    expected = merge(state.ema if ema else state.trainable, state.frozen)
    assert_same(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected))


def test_checkpoints_are_listed_with_their_scores(tmp_path: Path):
    workdir = epath.Path(tmp_path)
    with Checkpoints(workdir, "stage", CheckpointConfig(keep=3)) as checkpoints:
        for step, ciou in ((1, None), (3, 0.25), (20, 0.125)):
            checkpoints.save(step, make_state(step), ciou)
    assert list_checkpoints(workdir, "stage") == {1: None, 3: 0.25, 20: 0.125}


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damaged_parameters_are_named(damage: Callable[[Path], None], saved: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    damage_all(folder(workdir, 2), damage)
    with pytest.raises(UserError) as raised:
        read_averaged_params(epath.Path(workdir), "stage", 2)
    assert str(raised.value).startswith(
        f"{folder(workdir, 2) / 'ema'}: expected parameters that are whole, found them damaged: "
    )


def test_a_step_that_was_passed_over_is_written_again(saved: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    truncate_all = functools.partial(damage_all, damage=truncate)
    truncate_all(folder(workdir, 2))
    like = shapes_of(make_state(0))
    with Checkpoints(epath.Path(workdir), "stage", CheckpointConfig()) as checkpoints:
        found = checkpoints.restore(like, lambda _: None)
        assert found is not None and int(found.step) == 1
        checkpoints.save(2, make_state(2))
    found, said = restore(workdir, make_state(0))
    assert said == []
    assert_same(found, make_state(2))


def test_half_a_checkpoint_is_ignored_and_removed(saved: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    half = folder(workdir, 2).with_name("3.orbax-checkpoint-tmp")
    shutil.copytree(folder(workdir, 2) / "trainable", half / "trainable.orbax-checkpoint-tmp")
    found, said = restore(workdir, make_state(0))
    assert said == []
    assert_same(found, make_state(2))
    assert not half.exists()


def test_half_of_the_frozen_parameters_is_written_again(saved: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    frozen = workdir / "checkpoints" / "stage-frozen"
    frozen.rename(frozen.with_name("stage-frozen.orbax-checkpoint-tmp"))
    with Checkpoints(epath.Path(workdir), "stage", CheckpointConfig()) as checkpoints:
        checkpoints.save_frozen(make_state(0))
    assert_same(restore(workdir, make_state(0))[0], make_state(2))


# A command that saves more than a file may hold here, as on a full disk.
FULL_DISK = """
import resource, sys
from etils import epath
import jax
import jax.numpy as jnp
from evf_sam_jax.checkpoints import Checkpoints
from evf_sam_jax.errors import run_command
from evf_sam_jax.experiment import CheckpointConfig
from evf_sam_jax.param_rules import merge
from evf_sam_jax.train_state import TrainState

def main(workdir, case):
    small = {"leaf": jnp.ones(8)}
    large = {"leaf": jax.random.normal(jax.random.key(0), (500_000,))}  # does not compress
    trainable, frozen = (small, large) if case == "frozen" else (large, small)
    state = TrainState(jnp.int32(0), jnp.bool_(True), trainable, frozen, small)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    config = CheckpointConfig(asynchronous=case != "synchronous")
    with Checkpoints(epath.Path(workdir), "stage", config) as checkpoints:
        checkpoints.save_frozen(state)
        checkpoints.save(0, state)
        if case == "awaited":
            checkpoints.wait()

run_command(main, *sys.argv[1:])
"""


@pytest.mark.parametrize("case", ["awaited", "at the end", "synchronous", "frozen"])
def test_a_full_disk_is_one_sentence(case: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "run"), case],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    directory = tmp_path / "run" / "checkpoints"
    where = directory / ("stage-frozen" if case == "frozen" else "stage")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {where} cannot be written: ")
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert not folder(tmp_path / "run", 0).exists()
