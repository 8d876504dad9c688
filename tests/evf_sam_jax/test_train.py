"""A run leaves behind what it promises, says the same twice, and stops where it must."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shapes import ShapesSource
from evf_sam_jax import run_log
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.config import EvaluationJob
from evf_sam_jax.evaluation.job import evaluate
from evf_sam_jax.evaluation.loading import load_model
from evf_sam_jax.initialize import initial_params
from evf_sam_jax.metrics import IouSums
from evf_sam_jax.model_dir import path_leaves
from evf_sam_jax.predictor import Predictor
from evf_sam_jax.train import train
from tests.evf_sam_jax.tiny_config import experiment
from tests.evf_sam_jax.tiny_experiment import PRETRAIN

# What tests/evf_sam_jax/test_resume.py trains, which finds it compiled, after a stage of clicks.
# Held out are three images, although they are measured eight at a time.
CONFIGURED = experiment({"mesh.data": 1})
TWO_STAGES = dataclasses.replace(
    CONFIGURED,
    stages=(PRETRAIN, *CONFIGURED.stages),
    evaluation=dataclasses.replace(CONFIGURED.evaluation, images=3),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IouSums]:
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    with contextlib.chdir(workdir.parent):  # as it is typed: a path from where one is
        return workdir, train(TWO_STAGES, workdir.name)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_number_is_written(run: tuple[Path, IouSums]):
    workdir, sums = run
    found = records(workdir)
    for stage, steps in (("pretrain", 2), ("referring", 5)):
        training = [record for record in found if f"{stage}/loss" in record]
        assert [record["step"] for record in training] == list(range(1, steps + 1))
        for name in ("bce", "dice", "ciou", "grad_norm", "learning_rate"):
            assert all(np.isfinite(record[f"{stage}/{name}"]) for record in training)
        # The first step compiles, and is no measure.
        measured = ["images_per_second" in str(record) for record in training]
        assert measured == [False] + [True] * (steps - 1)
        assert sum(f"{stage}/val_giou" in record for record in found) == 1
    last = next(record for record in found if "referring/val_ciou" in record)
    assert last["referring/val_ciou"] == sums.ciou
    assert sums.masks == 3 * TWO_STAGES.data.shapes.phrases
    assert list(workdir.glob("events.out.tfevents.*"))


def test_the_panel_is_a_picture(run: tuple[Path, IouSums]):
    with Image.open(run[0] / "panel.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 90


def test_the_model_directory_predicts_and_scores_what_the_run_measured(run, tmp_path: Path):
    workdir, sums = run
    example = ShapesSource("val")[0]
    prediction = Predictor.load(workdir / "model").predict(example.image, texts=["red circle"])
    assert prediction.masks.shape == (1, *example.image.shape[:2])
    config = EvaluationJob(str(workdir / "model"), "shapes/val", images=3, batch_size=2, devices=1)
    results = evaluate(config, tmp_path / "evaluation")
    score = results["sets"]["shapes/val"]["as_original"]
    assert score["ciou"]["value"] == sums.ciou
    np.testing.assert_allclose(score["giou"]["value"], sums.giou, rtol=1e-12)


def test_the_newest_checkpoint_is_the_model_that_the_run_ends_with(run: tuple[Path, IouSums]):
    workdir = run[0]
    finished = load_model(str(workdir / "model")).fingerprint
    for checkpoint in ("newest", "best", "5"):
        assert load_model(str(workdir), checkpoint).fingerprint == finished
    assert load_model(str(workdir), "0").fingerprint != finished
    with pytest.raises(UserError, match="config.checkpoint: expected newest, best or a step of"):
        load_model(str(workdir), "7")


def test_frozen_parameters_leave_the_run_as_they_came(run: tuple[Path, IouSums]):
    after = path_leaves(Predictor.load(run[0] / "model").params)
    before = path_leaves(initial_params(TWO_STAGES))
    (frozen,) = [path for path in before if path.endswith("positional_encoding_gaussian_matrix")]
    np.testing.assert_array_equal(after[frozen], before[frozen])


@pytest.mark.slow  # tests/evf_sam_jax/test_resume.py has runs with the same bits
def test_a_run_is_a_function_of_its_seed(run: tuple[Path, IouSums], tmp_path: Path):
    train(TWO_STAGES, tmp_path / "again")
    losses = [
        [v for record in records(workdir) for k, v in record.items() if k.endswith("/loss")]
        for workdir in (run[0], tmp_path / "again")
    ]
    assert losses[0] == losses[1]


def test_the_directory_of_another_run_is_left_alone(run: tuple[Path, IouSums], tmp_path: Path):
    other = dataclasses.replace(TWO_STAGES, seed=7)
    with pytest.raises(UserError, match="expected the run that is there, with seed = 0, found 7"):
        train(other, run[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="directory, or that of a run, found 'notes.txt'"):
        train(TWO_STAGES, tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir .*file/run cannot be written"):
        train(TWO_STAGES, tmp_path / "file" / "run")


@pytest.mark.parametrize(("seconds", "text"), [(5.0, "0:05"), (62.4, "1:02"), (3605.0, "1:00:05")])
def test_times_are_read_as_clocks(seconds: float, text: str):
    assert run_log.clock(seconds) == text
