"""Numbers reach the disk, also where a run is started again, and where the disk is a bucket."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from evf_sam_jax import run_log, train
from evf_sam_jax.errors import UserError
from evf_sam_jax.run_log import RunLog, SkippedLog


def steps(directory: Path) -> list[int]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def write(directory: Path, first: int, last: int, silent: bool = False) -> str:
    text = io.StringIO()
    with RunLog(directory, progress=text, silent=silent) as log:
        for step in range(first, last + 1):
            log.scalars(step, {"referring/loss": 1.0 / step})
        log.line("done")
    return text.getvalue()


def test_a_run_that_goes_on_forgets_what_it_will_do_again(tmp_path: Path):
    with RunLog(tmp_path, progress=io.StringIO()) as log:
        log.scalars(9, {"pretrain/loss": 1.0})
    write(tmp_path, 1, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "after/loss": 1.0}\n')
        file.write('{"step": 6, "ti')  # the line that a kill cut off
    with RunLog(tmp_path, progress=io.StringIO()) as log:
        log.forget_after(["referring", "after"], 3)
        log.scalars(4, {"referring/loss": 0.5})
    assert steps(tmp_path) == [9, 1, 2, 3, 4]


def test_examples_are_skipped_once_though_a_run_goes_on(tmp_path: Path):
    skipped = np.array([-1, 7], np.int32)

    def skip(log: RunLog, steps: Iterable[int]) -> SkippedLog:
        found = SkippedLog(
            log, "referring", lambda index: f"image {index}", lambda _: "no file", max_skipped=3
        )
        for step in steps:
            found.add(step, skipped)
        found.add_held_out(4, "image 9")
        return found

    with RunLog(tmp_path, progress=io.StringIO()) as log:
        skip(log, [1, 2, 4])
    with RunLog(tmp_path, progress=io.StringIO()) as log:
        log.forget_after(["referring"], 2)
        going_on = skip(log, [3])
        said = "at most data.max_skipped = 3 examples .* image 7: no file"
        with pytest.raises(UserError, match=said):
            going_on.add(4, skipped)
    lines = list(map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines()))
    assert {line.get("reason") for line in lines if "held_out" not in line} == {"no file"}
    assert [(line["step"], line["example"]) for line in lines] == [
        (1, "image 7"),
        (2, "image 7"),
        (3, "image 7"),
        (4, "image 9"),
        (4, "image 7"),
    ]


def test_of_several_processes_one_writes(tmp_path: Path):
    assert write(tmp_path, 1, 2, silent=True) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder in a bucket's place: the same code runs, but for the network."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    for module in (run_log, train):
        monkeypatch.setattr(module, "is_remote", lambda path: str(path).startswith(str(folder)))
    return folder


def test_a_bucket_gets_copies_and_gives_them_back(bucket: Path):
    assert write(bucket, 1, 3) == "done\n"
    assert steps(bucket) == [1, 2, 3]
    assert list(bucket.glob("events.out.tfevents.*"))
    write(bucket, 4, 5)
    assert steps(bucket) == [1, 2, 3, 4, 5]


def test_a_directory_in_a_bucket_is_written_beside_and_copied(bucket: Path):
    with train._local_directory(epath.Path(bucket / "model")) as local:
        (local / "params").mkdir(parents=True)
        (local / "params" / "leaf").write_text("1")
        (local / "manifest.json").write_text("{}")
        assert not (bucket / "model").exists()
    assert (bucket / "model" / "params" / "leaf").read_text() == "1"
    assert (bucket / "model" / "manifest.json").exists()
