"""The command, as typed: a run of seconds, and one sentence for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOT


def command(*arguments: str, cache: Path | str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evf_sam_jax.main", f"--compilation_cache={cache}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_run_trains_and_ends_with_a_model(tmp_path: Path, compiled: Path):
    result = command(
        "--config=tests/evf_sam_jax/tiny_config.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.mesh.data=1",
        cache=compiled,
    )
    assert result.returncode == 0, result.stderr
    for name in ("referring 1/5: loss", "referring 5/5: held out cIoU", "Total:"):
        assert name in result.stdout
    assert (tmp_path / "run" / "model" / "manifest.json").exists()


@pytest.mark.slow
def test_a_recipe_trains_both_stages_and_ends_with_a_model(tmp_path: Path):
    result = command(
        "--config=configs/shapes.py:fusion=late",
        f"--workdir={tmp_path / 'run'}",
        "--config.stages.pretrain.steps=1",
        "--config.stages.referring.steps=1",
        "--config.evaluation.images=2",
        "--config.evaluation.batch_size=2",
        "--config.evaluation.panel_images=1",
        "--config.model.segmenter.depth=2",
        "--config.model.encoder.layers=2",
    )
    assert result.returncode == 0, result.stderr
    for name in ("pretrain 1/1: loss", "referring 1/1: held out cIoU", "Total:"):
        assert name in result.stdout
    assert (tmp_path / "run" / "model" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/shapes.py:fuson=late"], "unknown config argument 'fuson', expected"),
        (["--config=configs/shapes.py:fusion=x"], "'fusion': expected early or late or text"),
        (["--config=configs/shapes.py", "--config.bogus=1"], "the config has no key 'bogus'"),
        (
            ["--config=configs/shapes.py", "--config.stages.refering.steps=5"],
            "the config has no key 'refering' Did you mean \"referring\"",
        ),
        (
            ["--config=configs/shapes.py", "--config.model.encoder.layrs=5"],
            "the config has no key 'layrs' Did you mean \"layers\"",
        ),
        (
            ["--config=configs/shapes.py", "--config.model.encoder.fusion=erly"],
            "encoder.fusion: expected early or late or text, found 'erly'",
        ),
        (["--config=README.md"], "--config: expected a Python file, found "),
        (["--config=evf_sam_jax/errors.py"], "--config: expected a file with get_config"),
        (["--config=configs/shapes.py", "--config.seed=x"], "flag --config.seed=x: invalid"),
        (["--config=configs/none.py"], "--config: expected a config file, found none"),
        ([], "--config: expected a file such as configs/shapes.py, found nothing"),
        (["--config=configs/shapes.py", "--workdir="], "--workdir: expected a directory"),
        (["--config=configs/shapes.py", "--mode=serve"], "flag --mode=serve: value should be"),
        (["--config=configs/shapes.py", "word"], "expected flags only, found 'word'"),
        (["--config=configs/evaluate.py:model=none", "--mode=evaluate"], "none does not exist"),
        (["--config=configs/evaluate.py"], "config: unknown key"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str, tmp_path: Path):
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    result = command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "run").exists()
