"""A job gives the same results wherever it runs and however often it is stopped; what it writes."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pycocotools.mask
import pytest

from data_pipelines.shapes import SHAPES_TOKENIZER
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.config import EvaluationJob, job_from_dict
from evf_sam_jax.evaluation.job import evaluate, evaluate_sets
from evf_sam_jax.evaluation.rows import read_rows, read_shards
from evf_sam_jax.model_dir import Manifest, path_leaves, write_model_dir
from evf_sam_jax.models.evf_sam import param_shapes
from tests.evf_sam_jax.evaluation.made_set import (
    MODEL,
    MadeImage,
    MadeTarget,
    RandomModel,
    made_set,
    random_phrase,
)
from tests.evf_sam_jax.test_resume import ENVIRONMENT, free_port, no_longer_than_this
from tests.test_architecture import ROOT

IMAGES = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory of the tiny model with random parameters."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    manifest = Manifest(variant="tiny", config=MODEL.to_dict())
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.normal(size=shape).astype(np.float32)
        if path.endswith("kernel"):
            return values * np.float32(3 / np.sqrt(shape[-2]))
        if path.endswith("scale"):
            return 1 + values / 10
        # Without biases, what a mask is depends on the image and the phrase.
        return 0 * values if path.endswith("bias") else values

    shapes = path_leaves(param_shapes(MODEL))
    params = {path: draw(path, leaf.shape) for path, leaf in shapes.items()}
    write_model_dir(directory, params, manifest, SHAPES_TOKENIZER)
    return str(directory)


def job(model: str = "made", **changes) -> EvaluationJob:
    """A job on the embedded data set, of images that a device takes one at a time."""
    values = {"images": IMAGES, "batch_size": 1, "bootstrap_samples": 20, "shard_phrases": 1}
    return EvaluationJob(**{"model": model, "split": "shapes/val", **values, **changes})


def command(config: EvaluationJob, workdir: Path, compiled: Path, *arguments: str) -> list[str]:
    """The command that does a job."""
    default = {field.name: field.default for field in dataclasses.fields(EvaluationJob)}
    given = [f"{k}={v}" for k, v in vars(config).items() if v != default[k]]
    return [
        *(sys.executable, "-m", "evf_sam_jax.main", "--mode=evaluate", f"--workdir={workdir}"),
        f"--config=configs/evaluate.py:{','.join(given)}",
        f"--compilation_cache={compiled}",
        *arguments,
    ]


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts a command; what it prints goes to a file, as no one reads a pipe here."""
    with log.open("w") as out:
        environment = {**os.environ, **ENVIRONMENT, **environment}
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )


def results_of(workdir: Path) -> bytes:
    return (workdir / "results.json").read_bytes()


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a job that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("evaluations") / "whole"
    evaluate(job(model), workdir)
    sizes = np.array(read_rows(workdir)["predicted_pixels"])
    assert len(np.unique(sizes)) > 2 * IMAGES  # it depends on images and phrases
    return workdir


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_devices_counts_the_same_pixels(
    devices: int, model: str, whole: Path, tmp_path: Path
):
    config = job(model, devices=devices, shard_phrases=1000, images=24)
    evaluate(config, tmp_path / "evaluation")
    rows = read_rows(tmp_path / "evaluation").to_pylist()
    assert rows == read_rows(whole).to_pylist()[: len(rows)] and len(rows) == 3 * 24


@pytest.mark.slow  # compiles the model for another size of batch
def test_another_size_of_batch_moves_hardly_a_pixel(model: str, whole: Path, tmp_path: Path):
    evaluate(job(model, batch_size=3, devices=2), tmp_path / "evaluation")
    different = pixels = 0
    pairs = zip(
        *(read_rows(one).to_pylist() for one in (tmp_path / "evaluation", whole)), strict=True
    )
    for found, expected in pairs:
        size = [found["height"], found["width"]]
        masks = [
            pycocotools.mask.decode({"size": size, "counts": row["prediction_rle"].encode()})
            for row in (found, expected)
        ]
        different += int((masks[0] != masks[1]).sum())
        pixels += masks[0].size
    assert different <= 1e-5 * pixels


def test_a_job_that_was_killed_goes_on_to_the_same_results(
    model: str, whole: Path, compiled: Path, tmp_path: Path
):
    workdir = tmp_path / "evaluation"
    arguments = command(job(model), workdir, compiled)
    killed = start(arguments, tmp_path / "killed.log")
    with no_longer_than_this(killed):
        # After one shard or several, wherever it is then.
        wanted = random.randint(1, 6)
        while len(list(workdir.glob("predictions/*.parquet"))) < wanted:
            assert killed.poll() is None, (tmp_path / "killed.log").read_text()
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert not (workdir / "results.json").exists()
    assert 0 < len(read_shards(workdir).groups) < IMAGES
    evaluate(job(model), workdir)
    assert results_of(workdir) == results_of(whole)
    assert read_rows(workdir).equals(read_rows(whole))


@pytest.mark.slow  # three starts of the command
def test_two_processes_share_the_images_and_give_the_same_results(
    model: str, whole: Path, compiled: Path, tmp_path: Path
):
    workdir, port = tmp_path / "evaluation", free_port()
    config = job(model)

    def process(index: int, log: Path) -> subprocess.Popen:
        flags = (f"--coordinator=127.0.0.1:{port}", "--process_count=2", f"--process_index={index}")
        arguments = command(config, workdir, compiled, *flags)
        return start(arguments, log, JAX_NUM_CPU_DEVICES="2")

    logs = [tmp_path / f"{index}.log" for index in range(2)]
    processes = [process(index, log) for index, log in enumerate(logs)]
    with no_longer_than_this(*processes):
        for one, log in zip(processes, logs, strict=True):
            assert one.wait(timeout=300) == 0, log.read_text()
    assert results_of(workdir) == results_of(whole)
    first = {file.name.split("-")[0] for file in (workdir / "predictions").iterdir()}
    assert first == {"00000", "00001"}


def made_images(count: int) -> list[MadeImage]:
    """Images of several shapes, with up to 20 phrases; the third cannot be read."""
    rng = np.random.default_rng(3)
    images = []
    for i in range(count):
        height, width = 8 + 30 * (i % 4), 20 + 30 * (i % 3)
        mask = np.zeros((height, width), bool)
        mask[: height // 2] = True
        targets = tuple(
            MadeTarget(random_phrase(rng, 1 + i % 3), (mask,) if k % 3 else (), ("top", "")[k % 2])
            for k in range(4 + 3 * i % 17)
        )
        pixels = None if i == 2 else np.full((height, width, 3), 10 * i, np.uint8)
        images.append(MadeImage(height, width, targets, pixels))
    return images


def test_wherever_a_job_stops_it_goes_on_to_the_same_results(tmp_path: Path):
    sets = [made_set(tmp_path, made_images(12))]
    model = RandomModel(devices=2)
    config = job(batch_size=2, phrases=4)
    expected = evaluate_sets(config, sets, model, tmp_path / "whole")
    workdir = tmp_path / "stopped"
    stops = 0
    for stop_after in (0, 1, 2, 3, 1, 2, 100):
        model.decoded, model.stop_after = 0, stop_after
        with contextlib.suppress(RuntimeError):
            found = evaluate_sets(config, sets, model, workdir)
            break
        stops += 1
    assert stops > 2 and found == expected
    assert results_of(workdir) == results_of(tmp_path / "whole")
    assert (workdir / "results.md").read_text() == (tmp_path / "whole" / "results.md").read_text()
    # What cannot be read is named, and is no part of the score.
    (left_out,) = found["left_out"]
    assert left_out["image_index"] == 2 and "made/2" in left_out["name"]
    assert found["sets"]["made/val"]["images"] == 11
    # A job that has ended gives its results again and computes nothing.
    model.decoded, model.stop_after = 0, 0
    assert evaluate_sets(config, sets, model, workdir) == expected


def test_an_image_that_is_there_again_is_evaluated_on_a_restart(tmp_path: Path):
    images = made_images(12)
    pixels = np.full((images[2].height, images[2].width, 3), 20, np.uint8)
    present = [*images[:2], dataclasses.replace(images[2], pixels=pixels), *images[3:]]
    model = RandomModel(devices=2)
    config = job(batch_size=2, phrases=4)
    whole = [made_set(tmp_path / "whole_data", present)]
    expected = evaluate_sets(config, whole, model, tmp_path / "whole")
    workdir = tmp_path / "evaluation"
    without = evaluate_sets(config, [made_set(tmp_path / "data", images)], model, workdir)
    assert len(without["left_out"]) == 1 and not expected["left_out"]
    # The group of the image is computed again, and it alone.
    model.encoded = 0
    assert evaluate_sets(config, whole, model, workdir) == expected and model.encoded == 1
    assert results_of(workdir) == results_of(tmp_path / "whole")
    assert read_rows(workdir).equals(read_rows(tmp_path / "whole"))


def test_masks_are_written_in_the_format_of_coco_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sets = [made_set(tmp_path, made_images(2))]
    evaluate_sets(job(coco_json=True), sets, RandomModel(devices=1), tmp_path / "evaluation")
    assert re.search("\n2/2 images, [0-9.]+ images/s, 0:00 left\n", capsys.readouterr().out)
    entries = json.loads((tmp_path / "evaluation" / "predictions.json").read_text())
    rows = read_rows(tmp_path / "evaluation").to_pylist()
    assert len(entries) == len(rows) > 2
    for entry, row in zip(entries, rows, strict=True):
        assert (entry["image_id"], entry["phrase"]) == (row["image_id"], row["phrase"])
        assert entry["score"] == row["predicted_iou"] == 0.5
        assert pycocotools.mask.area(entry["segmentation"]) == row["predicted_pixels"]
        # "" is the first of the categories.
        assert entry["category_id"] == {"": 1, "top": 2}[row["category"]]
    # The COCO tools score them: as truth, they are right.
    truth = pycocotools.coco.COCO()
    sizes = {row["image_id"]: {"height": row["height"], "width": row["width"]} for row in rows}
    dataset: Any = {
        "images": [{"id": name, **size} for name, size in sizes.items()],
        "categories": [{"id": 1, "name": ""}, {"id": 2, "name": "top"}],
        "annotations": [
            {**entry, "id": i, "iscrowd": 0, "area": row["predicted_pixels"]}
            for i, (entry, row) in enumerate(zip(entries, rows, strict=True), 1)
            if row["predicted_pixels"]
        ],
    }
    truth.dataset = dataset
    truth.createIndex()
    found = truth.loadRes(str(tmp_path / "evaluation" / "predictions.json"))
    assert len(found.getAnnIds()) == len(entries)
    scores = pycocotools.cocoeval.COCOeval(truth, found, "segm")
    scores.evaluate()
    matched = [one["dtMatches"][-1] for one in scores.evalImgs if one and one["aRng"][0] == 0]
    assert sum((one > 0).sum() for one in matched) >= len(truth.getAnnIds())


def test_a_score_that_is_no_number_is_null(tmp_path: Path):
    class WithoutEstimate(RandomModel):
        def decode(self, *arguments):
            logits, iou = super().decode(*arguments)
            return logits, iou * np.nan

    sets = [made_set(tmp_path, made_images(1))]
    evaluate_sets(job(coco_json=True), sets, WithoutEstimate(devices=1), tmp_path / "evaluation")
    text = (tmp_path / "evaluation" / "predictions.json").read_text()
    assert "NaN" not in text and {entry["score"] for entry in json.loads(text)} == {None}


def test_rows_without_masks_count_the_same(tmp_path: Path):
    sets = [made_set(tmp_path, made_images(2))]
    rows = []
    for masks in (True, False):
        model = RandomModel(devices=1, masks=masks)
        evaluate_sets(job(masks=masks), sets, model, tmp_path / str(masks))
        rows.append(read_rows(tmp_path / str(masks)))
    assert set(rows[1]["prediction_rle"].to_pylist()) == {""}
    assert rows[0].drop("prediction_rle").equals(rows[1].drop("prediction_rle"))


@pytest.fixture
def begun(tmp_path: Path):
    """A set, a function that evaluates it, and the directory where that has been done."""
    sets = [made_set(tmp_path, [MadeImage(4, 4, (MadeTarget("it", ()),), None)])]
    workdir = tmp_path / "evaluation"
    workdir.mkdir()

    def run(fingerprint: str = "made", **changes):
        return evaluate_sets(job(**changes), sets, RandomModel(fingerprint, devices=1), workdir)

    # Its one image cannot be read, which is said when all has been tried.
    with pytest.raises(UserError, match="made/val: expected phrases that can be evaluated, found"):
        run()
    return run, workdir


def test_results_of_another_model_are_left_alone(begun):
    run, workdir = begun
    with pytest.raises(UserError) as raised:
        run(fingerprint="other", model="runs/other")
    assert str(raised.value) == (
        f"--workdir {workdir}: expected results of the model runs/other (other), found those of "
        "another one, made (made)"
    )


def test_another_evaluation_needs_another_directory(begun):
    run, workdir = begun
    with pytest.raises(UserError, match="with batch_size = 1, found 2; another one needs another"):
        run(batch_size=2)
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match="or that of an evaluation, found 'data.json'"):
        run()


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path):
    directory = tmp_path / "model"
    write_model_dir(directory, {"a": np.ones(1)}, Manifest("tiny", MODEL.to_dict()))
    with pytest.raises(UserError) as raised:
        evaluate(job(str(directory), images=1), tmp_path / "evaluation")
    assert str(raised.value) == f"{directory}: expected a model with a tokenizer, found one without"
    assert not (tmp_path / "evaluation").exists()


def test_a_directory_that_is_no_model_is_named(begun, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        evaluate(job(str(tmp_path / "nowhere"), images=1), tmp_path / "other")
    with pytest.raises(UserError, match="a training run, found a run of another kind"):
        evaluate(job(str(begun[1]), images=1), tmp_path / "other")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "config.model: expected a model directory, found nothing"),
        ({"split": "shapes/x"}, "config.split: expected one of shapes/val, shapes/test, found"),
        ({"batch_size": 0}, "config.batch_size: expected 1 or more, found 0"),
        ({"images": -1}, "config.images: expected 0 or more, found -1"),
        ({"images": 1.5}, "config.images: expected a whole number, found 1.5"),
        ({"masks": "no"}, "config.masks: expected true or false, found 'no'"),
        ({"dtype": "int8"}, "config.dtype: expected float32 or bfloat16, found 'int8'"),
        ({"paper": "sam"}, "config.paper: expected auto or evf-sam or .* found 'sam'"),
        ({"masks": False, "coco_json": True}, "config.coco_json: expected false without"),
        ({"size": 3}, "config: unknown key 'size', expected one of model, split, "),
    ],
)
def test_what_cannot_be_evaluated_is_refused(values: dict, message: str):
    with pytest.raises(UserError, match=message):
        job_from_dict({"model": "m", "split": "shapes/val", **values})
    with pytest.raises(UserError, match="config: the key 'split' is missing"):
        job_from_dict({"model": "m"})
