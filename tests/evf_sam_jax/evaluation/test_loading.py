"""Which checkpoint of a run is evaluated, and what is said where there is none."""

import json
from pathlib import Path

import numpy as np
import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.loading import load_model
from evf_sam_jax.model_dir import Manifest, write_model_dir
from tests.evf_sam_jax.test_checkpoints import make_state, save
from tests.evf_sam_jax.tiny_experiment import MODEL


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of its one stage, of which none has been measured."""
    save(tmp_path / "run", [make_state(3), make_state(5)])
    values = {"stages": [{"name": "stage"}], "model": {}, "data": {}, "init": {}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    return tmp_path / "run"


@pytest.mark.parametrize("checkpoint", ["4", "last", ""])
def test_a_checkpoint_that_is_not_there_names_those_that_are(checkpoint: str, run: Path):
    with pytest.raises(UserError) as raised:
        load_model(str(run), checkpoint)
    assert str(raised.value) == (
        f"config.checkpoint: expected newest, best or a step of {run}/checkpoints/stage (3, 5), "
        f"found {checkpoint!r}"
    )


@pytest.mark.parametrize("checkpoint", ["best", "3", ""])
def test_a_model_directory_has_no_checkpoints(checkpoint: str, tmp_path: Path):
    directory = tmp_path / "model"
    write_model_dir(directory, {"a": np.ones(1)}, Manifest("tiny", MODEL.to_dict()))
    with pytest.raises(UserError) as raised:
        load_model(str(directory), checkpoint)
    assert str(raised.value) == (
        f"config.checkpoint: expected newest for a model directory such as {directory}, which has "
        f"one model, found {checkpoint!r}"
    )


def test_the_best_must_have_been_measured(run: Path):
    with pytest.raises(UserError, match="has been measured on held-out images, found best"):
        load_model(str(run), "best")


def test_a_run_without_checkpoints_is_named(run: Path):
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(UserError, match="run: expected a run with checkpoints, found none"):
        load_model(str(run))


@pytest.mark.parametrize("content", ["", "[1]", '{"stages": []}'])
def test_a_directory_of_another_kind_is_named(content: str, run: Path):
    (run / "config.json").write_text(content)
    with pytest.raises(UserError, match="^[^\n]*run[^\n]*: expected [^\n]*, found [^\n]*$"):
        load_model(str(run))
