"""An output directory appears whole or not at all."""

import os
import pathlib

import pytest

from evf_sam_jax.errors import UserError
from evf_sam_jax.output_directory import new_directory


def test_it_appears_at_the_end_with_its_parents_and_usual_permissions(tmp_path: pathlib.Path):
    path = tmp_path / "a" / "b" / "out"
    with new_directory(path) as directory:
        (directory / "file").write_text("x")
        assert not path.exists()
    assert (path / "file").read_text() == "x"
    usual = tmp_path / "usual"
    usual.mkdir()
    assert path.stat().st_mode == usual.stat().st_mode
    assert [p.name for p in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: pathlib.Path, failure: type[BaseException]):
    with pytest.raises(failure), new_directory(tmp_path / "a" / "out") as directory:
        (directory / "file").write_text("x")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_parents_that_were_there(tmp_path: pathlib.Path):
    with pytest.raises(ValueError), new_directory(tmp_path / "out"):
        raise ValueError
    assert tmp_path.exists()


@pytest.mark.parametrize("kind", ["file", "empty directory", "broken link"])
def test_what_exists_is_refused_and_kept(tmp_path: pathlib.Path, kind: str):
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--out: expected a path where nothing is yet"):
        with new_directory(path, name="--out"):
            raise AssertionError("must not be reached")
    assert os.path.lexists(path) and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--out: cannot make .*file/out"):
        with new_directory(tmp_path / "file" / "out", name="--out"):
            raise AssertionError("must not be reached")
    assert (tmp_path / "file").read_text() == "x"
