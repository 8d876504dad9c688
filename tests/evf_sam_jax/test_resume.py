"""A run that was stopped, killed or moved to another mesh ends as if nothing had happened."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax import model_dir
from evf_sam_jax.checkpoints import Checkpoints
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.config import EvaluationJob
from evf_sam_jax.experiment import (
    CheckpointConfig,
    DatasetConfig,
    DatasetsConfig,
    ExperimentConfig,
)
from evf_sam_jax.model_dir import iterate_params
from evf_sam_jax.optimizer import OptimizerConfig
from evf_sam_jax.preemption import EXIT_CODE, Preempted
from evf_sam_jax.replay import replay
from evf_sam_jax.run_log import RunLog, make_workdir, resume_workdir
from evf_sam_jax.sharding import MeshConfig, make_mesh, put_batch
from evf_sam_jax.stage import make_stage
from evf_sam_jax.train import train
from evf_sam_jax.training_data import open_data
from tests.data_pipelines.astronaut import write_astronaut
from tests.evf_sam_jax import tiny_config
from tests.evf_sam_jax.tiny_experiment import EXPERIMENT, PRETRAIN
from tests.test_architecture import ROOT

STEPS = tiny_config.get_config().stages.referring.steps
# On top of tests/evf_sam_jax/tiny_config.py, here and in the commands.
VALUES = {"checkpoints.every": 1, "mesh.data": 1}
# What tests/conftest.py sets for this process, so that the commands compute the same programs.
ENVIRONMENT = {
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def experiment(**changes: Any) -> ExperimentConfig:
    """The experiment of `VALUES`, with other fields."""
    return dataclasses.replace(tiny_config.experiment(VALUES), **changes)


def command(workdir: Path, compiled: Path, *arguments: str, **values: Any) -> list[str]:
    """The command that trains `experiment()`, with other values."""
    return [
        sys.executable,
        "-m",
        "evf_sam_jax.main",
        "--config=tests/evf_sam_jax/tiny_config.py",
        f"--workdir={workdir}",
        f"--compilation_cache={compiled}",
        *(f"--config.{key}={value}" for key, value in {**VALUES, **values}.items()),
        *arguments,
    ]


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts a command; what it prints goes to LOG.out and LOG.err, as no one reads a pipe here."""
    with (
        log.with_suffix(".out").open("w") as out,
        log.with_suffix(".err").open("w") as err,
    ):
        return subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def printed(log: Path) -> tuple[str, str]:
    return log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text()


def await_sight(process: subprocess.Popen[str], seen: Callable[[], bool]) -> bool:
    """Waits until something is there; False if the process has ended before."""
    while not seen():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


@contextlib.contextmanager
def no_longer_than_this(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """No process outlives the test, nor do the workers of one, whatever becomes of it."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # no one is left of its group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def records(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path, stage: str = "referring") -> list[float]:
    """The loss of each step; every step is there once, and in order."""
    found = [record for record in records(workdir) if f"{stage}/loss" in record]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record[f"{stage}/loss"] for record in found]


def scores(workdir: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> what held-out images said, each once."""
    found = [
        ((record["step"], name), value)
        for record in records(workdir)
        for name, value in record.items()
        if "/val_" in name
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    return dict(iterate_params(workdir / "model"))


def assert_same_run(workdir: Path, other: Path) -> None:
    """Both have the same numbers and parameters, to the last bit."""
    assert losses(workdir) == losses(other)
    assert scores(workdir) == scores(other)
    found, expected = parameters(workdir), parameters(other)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(
            found[path].reshape(-1).view(np.uint8), leaf.reshape(-1).view(np.uint8), err_msg=path
        )


def checkpoint_steps(workdir: Path, stage: str = "referring") -> list[int]:
    names = [path.name for path in (workdir / "checkpoints" / stage).iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def half_checkpoints(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints" / "referring").glob("*.orbax-checkpoint-tmp*"))


class Screen(io.StringIO):
    """What a run prints; at a certain line the run is told to stop, as a scheduler does it."""

    def __init__(self, stop_at: str | None = None):
        super().__init__()
        self._stop_at = stop_at

    def write(self, text: str) -> int:
        if self._stop_at is not None and self._stop_at in text:
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def run(config: ExperimentConfig, workdir: Path, stop_at: str | None = None) -> str:
    """Trains here, until a line is printed or to the end; returns what was printed."""
    with contextlib.redirect_stdout(Screen(stop_at)) as screen:
        if stop_at is None:
            train(config, workdir)
        else:
            with pytest.raises(Preempted):
                train(config, workdir)
    return screen.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing has interrupted, on one device."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run(experiment(), workdir)
    assert len(losses(workdir)) == STEPS
    return workdir


# Killed and told to stop.


@dataclasses.dataclass
class Part:
    """One start of a command: how it ended, what it printed, which checkpoints it left."""

    status: int
    out: str
    err: str
    checkpoints: list[int]


@pytest.fixture(scope="module")
def interrupted(
    whole: Path, compiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Part]]:
    """A command that was killed while it wrote a checkpoint, then told to stop, then left alone."""
    folder = tmp_path_factory.mktemp("interrupted")
    workdir = folder / "run"

    def writing() -> bool:
        return any(not path.name.startswith("0.") for path in half_checkpoints(workdir))

    def begun() -> bool:
        return "mesh 1x1" in (folder / "1.out").read_text()

    parts = []
    for number, (seen, sign) in enumerate(
        [(writing, signal.SIGKILL), (begun, signal.SIGTERM), (lambda: True, None)]
    ):
        log = folder / str(number)
        process = start(command(workdir, compiled), log)
        with no_longer_than_this(process):
            assert await_sight(process, seen), printed(log)
            if sign is not None:
                process.send_signal(sign)
            status = process.wait()
        parts.append(Part(status, *printed(log), checkpoint_steps(workdir)))
    return workdir, parts


@pytest.mark.slow
def test_a_run_killed_while_it_wrote_a_checkpoint_ends_to_the_same_bits(
    interrupted: tuple[Path, list[Part]], whole: Path
):
    workdir, (killed, _, last) = interrupted
    assert killed.status == -signal.SIGKILL
    assert last.status == 0, last.err
    assert_same_run(workdir, whole)
    assert half_checkpoints(workdir) == []


@pytest.mark.slow
def test_a_command_that_is_told_to_stop_saves_its_last_step_and_says_so(
    interrupted: tuple[Path, list[Part]],
):
    _, (killed, told, last) = interrupted
    assert told.status == EXIT_CODE == 143
    assert told.err == ""
    (step,) = re.findall(rf"referring (\d)/{STEPS}: told to stop, the state is saved\n$", told.out)
    begun = killed.checkpoints[-1]  # the newest one that was whole
    assert int(step) == begun + 1 == told.checkpoints[-1]
    assert f"referring {step}/{STEPS}: loss" in told.out
    assert f"referring: going on after step {step}\n" in last.out


def test_a_run_that_is_told_to_stop_goes_on_to_the_same_bits(whole: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    said = run(experiment(), workdir, stop_at=f"referring 2/{STEPS}: loss")
    assert re.search(rf"referring \d/{STEPS}: told to stop, the state is saved\n", said)
    stopped = checkpoint_steps(workdir)[-1]
    assert 0 < stopped < STEPS
    assert f"referring: going on after step {stopped}\n" in run(experiment(), workdir)
    assert_same_run(workdir, whole)


def test_a_finished_run_says_so_and_stays_as_it_is(whole: Path):
    def content() -> dict[Path, bytes]:
        # Of the events, a new file begins, which holds nothing.
        files = [path for path in whole.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in files if "tfevents" not in path.name}

    before = content()
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        assert train(experiment(), whole) is None
    assert f"finished before: {whole / 'model'}" in screen.getvalue()
    assert content() == before


@pytest.mark.slow
def test_killed_at_twenty_random_moments_a_run_ends_to_the_same_bits(
    compiled: Path, tmp_path: Path
):
    values = {
        "stages.referring.steps": 150,
        "stages.referring.batch_size": 2,
        "evaluation.every": 7,
        "evaluation.images": 2,
        "evaluation.batch_size": 2,
    }
    begin = time.monotonic()
    log = tmp_path / "whole"
    process = start(command(tmp_path / "whole", compiled, **values), log)
    with no_longer_than_this(process):
        assert await_sight(process, lambda: bool(half_checkpoints(tmp_path / "whole")))
        startup = time.monotonic() - begin
        assert process.wait() == 0, printed(log)
    # A program that another process has compiled says the same as one compiled here.
    process = start(command(tmp_path / "alone", Path(), "--compilation_cache=", **values), log)
    with no_longer_than_this(process):
        assert process.wait() == 0, printed(log)
    assert_same_run(tmp_path / "alone", tmp_path / "whole")

    workdir, chance = tmp_path / "run", random.Random(0)
    halves, reached = 0, []
    for number in range(20):
        log = tmp_path / str(number)
        process = start(command(workdir, compiled, **values), log)

        def seen(kind: int = number % 3, log: Path = log) -> bool:
            if kind == 0:  # a checkpoint that is being written: not what the last kill has left
                return "mesh 1x1" in printed(log)[0] and bool(half_checkpoints(workdir))
            return kind == 1 or "loss" in printed(log)[0]

        delay = chance.uniform(0, (0.1, 1.2 * startup, 3.0)[number % 3])
        with no_longer_than_this(process):
            assert await_sight(process, seen), printed(log)
            time.sleep(delay)
            assert process.poll() is None, f"the run ended before it was killed: {printed(log)}"
            process.kill()
        assert "damaged" not in printed(log)[0]
        halves += bool(half_checkpoints(workdir))
        reached.append((checkpoint_steps(workdir) or [None])[-1])
    print(f"newest checkpoints {reached}; {halves} times one was half written")
    assert halves > 0
    process = start(command(workdir, compiled, **values), tmp_path / "last")
    with no_longer_than_this(process):
        assert process.wait() == 0, printed(tmp_path / "last")
    assert_same_run(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_between_two_stages_loses_nothing(tmp_path: Path):
    run(EXPERIMENT, tmp_path / "whole")
    workdir = tmp_path / "run"
    # What a kill leaves while the first checkpoint of the second stage is written.
    shutil.copytree(tmp_path / "whole", workdir)
    shutil.rmtree(workdir / "model")
    (workdir / "panel.png").unlink()
    shutil.rmtree(workdir / "checkpoints" / "referring")
    (workdir / "checkpoints" / "referring" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    run(EXPERIMENT, workdir)
    for stage in ("pretrain", "referring"):
        assert losses(workdir, stage) == losses(tmp_path / "whole", stage)
    assert_same_run(workdir, tmp_path / "whole")


# Another mesh, and several processes.


def assert_close_run(workdir: Path, other: Path, tolerance: float) -> None:
    found, expected = np.array(losses(workdir)), np.array(losses(other))
    print(f"largest relative difference of a loss: {np.abs(found / expected - 1).max():.2g}")
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.slow
def test_a_run_goes_on_with_eight_then_two_then_one_device(whole: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    eight = MeshConfig(data=1, fsdp=8, zero_stage=3, min_size=64)
    two = dataclasses.replace(eight, fsdp=2, zero_stage=2)
    run(experiment(mesh=eight), workdir, stop_at=f"referring 1/{STEPS}: loss")
    assert checkpoint_steps(workdir)[-1] == 2
    second = run(experiment(mesh=two), workdir, stop_at=f"referring 3/{STEPS}: loss")
    assert checkpoint_steps(workdir)[-1] == 4
    last = run(experiment(), workdir)
    for out, fsdp in ((second, 2), (last, 1)):
        assert f"going on with another mesh: mesh.fsdp: 8 before, {fsdp} now\n" in out
        assert "going on with another mesh: mesh.zero_stage: 3 before, 2 now\n" in out
        assert "mesh.data" not in out
    assert_close_run(workdir, whole, 1e-5)


@pytest.fixture(scope="module")
def two_processes(
    compiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Part]]:
    """A run of two processes with four devices each, of which the second was told to stop."""
    folder = tmp_path_factory.mktemp("two_processes")
    workdir = folder / "run"
    joining = f"--coordinator=127.0.0.1:{free_port()}", "--process_count=2"
    logs = [folder / str(index) for index in (0, 1)]
    processes = [
        start(
            command(workdir, compiled, *joining, f"--process_index={index}", **{"mesh.data": 0}),
            log,
            JAX_NUM_CPU_DEVICES="4",
        )
        for index, log in enumerate(logs)
    ]
    with no_longer_than_this(*processes):
        assert await_sight(
            processes[0], lambda: f"referring 1/{STEPS}: loss" in printed(logs[0])[0]
        ), [printed(log) for log in logs]
        processes[1].send_signal(signal.SIGTERM)
        statuses = [process.wait() for process in processes]
    return workdir, [
        Part(status, *printed(log), checkpoint_steps(workdir))
        for status, log in zip(statuses, logs, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_stop_together_when_one_is_told_to(two_processes: tuple[Path, list[Part]]):
    _, (first, second) = two_processes
    assert (first.status, second.status) == (143, 143), (first.err, second.err)
    for part in (first, second):
        assert "Traceback" not in part.err and "error" not in part.err
    (step,) = re.findall(rf"referring (\d)/{STEPS}: told to stop, the state is saved\n", first.out)
    assert first.checkpoints[-1] == int(step)


@pytest.mark.slow
def test_of_two_processes_the_first_alone_speaks(two_processes: tuple[Path, list[Part]]):
    _, (first, second) = two_processes
    assert "loss" in first.out and "loss" not in second.out and "mesh" not in second.out


@pytest.mark.slow
def test_what_two_processes_began_one_of_one_device_ends(
    two_processes: tuple[Path, list[Part]], whole: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    shutil.copytree(two_processes[0], workdir)
    before = losses(workdir)
    out = run(experiment(), workdir)
    assert "going on with another mesh: mesh.data: 0 before, 1 now\n" in out
    assert f"referring: going on after step {len(before)}\n" in out
    assert losses(workdir)[: len(before)] == before
    assert_close_run(workdir, whole, 1e-4)


# Two processes that only read: the rows of a batch that each of them makes.
ROWS = """
import json, sys
import jax
import numpy as np
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax import processes
from evf_sam_jax.sharding import make_mesh, process_rows
from evf_sam_jax.stage import make_stage
from evf_sam_jax.training_data import open_data
from tests.evf_sam_jax.tiny_config import experiment

coordinator, index = sys.argv[1], int(sys.argv[2])
with processes.joined(processes.find_cluster(coordinator, 2, index, {}), 60):
    config = experiment({})
    stage = make_stage(config, config.stages[0], make_mesh(config.mesh))
    data, tokenizer = open_data(config), load_tokenizer(SHAPES_TOKENIZER)
    mine = stage.batches(data, tokenizer)[1]
    whole = stage.batches(data, tokenizer, whole=True)[1]
    rows = process_rows(stage.mesh, stage.config.batch_size)
    same = all(
        np.array_equal(value, getattr(whole, name)[rows])
        for name, value in vars(mine).items() if value is not None
    )
    result = [rows, np.asarray(mine.example_id).tolist(), np.asarray(whole.example_id).tolist()]
    print(json.dumps([*result, same]))
"""


def test_each_process_reads_its_own_rows_only(tmp_path: Path):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        start(
            [sys.executable, "-c", ROWS, address, str(index)],
            tmp_path / str(index),
            JAX_NUM_CPU_DEVICES="2",
        )
        for index in (0, 1)
    ]
    found = []
    for index, process in enumerate(processes):
        with no_longer_than_this(process):
            assert process.wait() == 0, printed(tmp_path / str(index))
        rows, mine, batch, same = json.loads(printed(tmp_path / str(index))[0].splitlines()[-1])
        assert mine == [batch[row] for row in rows] and len(mine) == len(batch) // 2
        assert same
        found.append(rows)
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7]]


# What is no run to go on with.


def other(key: str, value: Any) -> ExperimentConfig:
    """The experiment with another value at a dotted key."""
    return tiny_config.experiment({**VALUES, key: value})


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("seed", 1, "seed = 0, found 1"),
        ("model.segmenter.depth", 4, "model.segmenter.depth = 2, found 4"),
        ("data.shapes.seed", 3, "data.shapes.seed = 0, found 3"),
        ("data.text_length", 18, "data.text_length = 16, found 18"),
        ("stages.referring.steps", 9, "stages.0.steps = 5, found 9"),
        ("stages.referring.batch_size", 16, "stages.0.batch_size = 8, found 16"),
        ("stages.referring.accumulate", 2, "stages.0.accumulate = 1, found 2"),
        (
            "stages.referring.optimizer.learning_rate",
            0.5,
            "stages.0.optimizer.learning_rate = 0.002, found 0.5",
        ),
        ("evaluation.images", 16, "evaluation.images = 8, found 16"),
        ("evaluation.split", "test", "evaluation.split = 'val', found 'test'"),
    ],
)
def test_another_value_is_named(key: str, value: Any, named: str, tmp_path: Path):
    make_workdir(tmp_path, experiment(), {"data.train.0": "1"})
    # Its data sets may differ as well, as a consequence.
    with pytest.raises(UserError) as raised:
        resume_workdir(tmp_path, other(key, value), {"data.train.0": "2"})
    assert str(raised.value) == (
        f"--workdir {tmp_path}: expected the run that is there, with {named}; another run needs "
        "another directory"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("log_every", 50),
        ("profile_every", 20),
        ("checkpoints.every", 100),
        ("checkpoints.keep", 9),
        ("evaluation.every", 2),
        ("evaluation.batch_size", 4),
        ("data.workers", 2),
        ("data.threads", 3),
    ],
)
def test_what_changes_no_number_may_change(key: str, value: Any, tmp_path: Path):
    make_workdir(tmp_path, experiment(), {"data.train.0": "1"})
    assert resume_workdir(tmp_path, other(key, value), {"data.train.0": "1"}) == []


def test_a_run_from_before_features_were_cached_goes_on_without_them(tmp_path: Path):
    make_workdir(tmp_path, experiment(), {})
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    del before["data"]["features"], before["feature_cache"]
    path.write_text(json.dumps(before))
    assert resume_workdir(tmp_path, experiment(), {}) == []
    with pytest.raises(UserError, match="data.features = None, found 'FEATURES'"):
        resume_workdir(tmp_path, other("data.features", "FEATURES"), {})


def test_another_mesh_may_go_on_and_is_said(tmp_path: Path):
    make_workdir(tmp_path, experiment(), {})
    changed = experiment(mesh=MeshConfig(data=0, fsdp=4, min_size=64))
    assert resume_workdir(tmp_path, changed, {}) == [
        "another mesh: mesh.data: 1 before, 0 now",
        "another mesh: mesh.fsdp: 1 before, 4 now",
    ]


def test_another_data_set_and_other_annotations_are_named(tmp_path: Path):
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            write_astronaut(tmp_path / name, split)

    def config(name: str) -> ExperimentConfig:
        train, val = (
            DatasetConfig(name="own_jsonl", root=str(tmp_path / name), split=split)
            for split in ("train", "val")
        )
        return experiment(data=DatasetsConfig(train=(train,), held_out=(val,)))

    workdir = tmp_path / "run"
    make_workdir(workdir, config("data"), open_data(config("data")).fingerprints())
    assert resume_workdir(workdir, config("data"), open_data(config("data")).fingerprints()) == []
    with pytest.raises(UserError, match=r"with data\.train\.0\.root = .*/data', found .*/other'"):
        resume_workdir(workdir, config("other"), open_data(config("other")).fingerprints())

    # One phrase is another one.
    file = tmp_path / "data" / "train.jsonl"
    first, *rest = file.read_text().splitlines()
    annotation = json.loads(first)
    annotation["phrase"] = "somebody else"
    file.write_text("\n".join([json.dumps(annotation), *rest]) + "\n")
    with pytest.raises(UserError) as raised:
        resume_workdir(workdir, config("data"), open_data(config("data")).fingerprints())
    assert str(raised.value) == (
        f"--workdir {workdir}: expected the data that the run began with, found other "
        "in data.train.0"
    )


def test_the_directory_of_an_evaluation_is_none_of_a_training(tmp_path: Path):
    evaluation = EvaluationJob("runs/a/model", "shapes/val")
    make_workdir(tmp_path, evaluation)
    with pytest.raises(UserError) as raised:
        resume_workdir(tmp_path, experiment(), {})
    assert str(raised.value) == (
        f"--workdir {tmp_path}: expected a training run, found a run of another kind"
    )


@pytest.mark.parametrize("content", ["", '{"seed": 0, "mod', "[1, 2]"])
def test_a_damaged_config_is_one_sentence(content: str, tmp_path: Path):
    make_workdir(tmp_path, experiment(), {})
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        UserError, match="^--workdir [^\n]*: expected a (training )?run, found [^\n]*$"
    ):
        resume_workdir(tmp_path, experiment(), {})


def test_damaged_data_fingerprints_are_one_sentence(tmp_path: Path):
    make_workdir(tmp_path, experiment(), {})
    (tmp_path / "data.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"expected a run, found it damaged: data\.json$"):
        resume_workdir(tmp_path, experiment(), {})


@pytest.mark.parametrize("left", [[], ["data.json"], ["data.json", "config.json.partial"]])
def test_a_directory_that_a_kill_left_before_the_run_began_is_new(left: list[str], tmp_path: Path):
    for name in left:
        (tmp_path / name).write_text('{"see')
    make_workdir(tmp_path, experiment(), {})
    assert resume_workdir(tmp_path, experiment(), {}) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "data.json"]


def test_too_little_space_is_said_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        model_dir.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000)
    )
    with pytest.raises(UserError, match="run/model needs 0.0 GB, and its disk has 0.0 GB free"):
        train(experiment(), tmp_path / "run")
    # Otherwise the next start would go on with the run, and not look at the disk.
    assert not (tmp_path / "run").exists()


def test_a_stage_without_steps_is_one_sentence():
    with pytest.raises(
        UserError, match=r"^stages\.referring\.steps: expected a positive .* found 0"
    ):
        other("stages.referring.steps", 0)


# The log of a run that goes on.


# A log that cannot be written again, as when the process is killed on the way.
FORGET = """
import io, resource, sys
from pathlib import Path
from evf_sam_jax.run_log import RunLog
with RunLog(Path(sys.argv[1]), io.StringIO()) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        log.forget_after(["stage"], 40)
    except OSError:
        print("full")
"""


def test_the_log_is_rewritten_whole_or_not_at_all(tmp_path: Path):
    with RunLog(tmp_path) as log:
        for step in range(1, 51):
            log.scalars(step, {"stage/loss": 1.0 / step})
    before = records(tmp_path)
    arguments = [sys.executable, "-c", FORGET, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "full\n", done.stderr
    assert records(tmp_path) == before


# A loss that is no number.


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, Path, str]:
    """An experiment that cannot end well, its directory, and what it was stopped with."""
    optimizer = OptimizerConfig(learning_rate=1e30, schedule="constant", warmup_steps=0)
    stage = dataclasses.replace(experiment().stages[0], optimizer=optimizer)
    # No checkpoint but the first: the host is ahead of the device when the loss is no number.
    config = experiment(stages=(stage,), checkpoints=CheckpointConfig(every=100))
    workdir = tmp_path_factory.mktemp("failed") / "run"
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(UserError) as raised:
        train(config, workdir)
    return config, workdir, str(raised.value)


def test_a_loss_that_is_no_number_stops_the_run_with_one_sentence(
    failed: tuple[ExperimentConfig, Path, str],
):
    _, workdir, message = failed
    record = json.loads((workdir / "failure" / "failure.json").read_text())
    assert message == (
        f"{record['what']}; state and batch are in {workdir / 'failure'}, for --mode replay"
    )
    assert re.match(r"referring/\w+ at step \d: expected a finite number, found ", message)
    assert record["stage"] == "referring" and record["step"] == len(losses(workdir)) + 1
    assert not (workdir / "model").exists()
    assert checkpoint_steps(workdir) == [0]


def test_the_failure_is_kept_as_it_was_before_the_step(
    failed: tuple[ExperimentConfig, Path, str],
):
    config, workdir, _ = failed
    step = json.loads((workdir / "failure" / "failure.json").read_text())["step"]
    mesh = make_mesh(config.mesh)
    stage = make_stage(config, config.stages[0], mesh)
    data, tokenizer = open_data(config), load_tokenizer(SHAPES_TOKENIZER)
    batches = stage.batches(data, tokenizer)
    with jax.set_mesh(mesh):
        with Checkpoints(epath.Path(workdir), "referring", config.checkpoints) as checkpoints:
            expected = checkpoints.restore(stage.shapes, print)
        for number in range(step - 1):
            expected, metrics = stage.step()(expected, put_batch(mesh, batches[number], 8))
            assert np.isfinite(metrics.loss)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(workdir / "failure" / "state", stage.shapes)
    assert int(found.step) == step - 1
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other_one in pairs:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other_one))
    with np.load(workdir / "failure" / "batch-0.npz") as content:
        assert content["rows"].tolist() == list(range(8))
        for name, value in vars(batches[step - 1]).items():
            if value is not None:
                np.testing.assert_array_equal(content[name], value)


def test_a_replay_finds_what_was_not_finite(
    failed: tuple[ExperimentConfig, Path, str], capsys: pytest.CaptureFixture[str]
):
    config, workdir, message = failed
    assert not replay(config, epath.Path(workdir))
    out = capsys.readouterr().out
    assert out.startswith(message.split(";")[0])
    for title in ("as it ran", "in float32"):
        assert f"{title}: loss nan" in out
    found = re.findall(r"gradients that are not finite: (\d+) of (\d+)", out)
    assert len(found) == 2 and all(int(some) > 0 for some, _ in found)
    assert "parameters that are not finite: none" in out


def test_without_a_failure_there_is_nothing_to_replay(whole: Path):
    with pytest.raises(UserError, match=r"^--workdir .*: expected a run that failed, found none$"):
        replay(experiment(), epath.Path(whole))


def test_a_damaged_failure_is_one_sentence(
    failed: tuple[ExperimentConfig, Path, str], tmp_path: Path
):
    config, workdir, _ = failed
    folder = tmp_path / "failure"

    def sentence() -> str:
        with pytest.raises(UserError) as raised:
            replay(config, epath.Path(tmp_path))
        return str(raised.value)

    shutil.copytree(workdir / "failure", folder)
    record = (folder / "failure.json").read_text()
    for damage in (record[:10], "[]", "{}"):
        (folder / "failure.json").write_text(damage)
        assert sentence().startswith(f"{folder}/failure.json: expected ")
    (folder / "failure.json").write_text(record)

    shutil.rmtree(folder / "state")
    assert sentence().startswith(f"{folder}/state: expected the training state of this config")
    batch = (folder / "batch-0.npz").read_bytes()
    (folder / "batch-0.npz").write_bytes(batch[: len(batch) // 2])
    assert sentence().startswith(f"{folder}/batch-0.npz: expected rows of a batch, found ")
    (folder / "batch-0.npz").unlink()
    assert sentence() == f"{folder}/batch-*.npz: expected the 8 rows of the batch, found 0"


def test_a_replay_of_another_experiment_is_one_sentence(
    failed: tuple[ExperimentConfig, Path, str],
):
    _, workdir, _ = failed
    with pytest.raises(UserError, match="expected the stage referring of the failed run, found"):
        replay(experiment(stages=(PRETRAIN,)), epath.Path(workdir))
