"""Cached features train as the images do, and those of another segmenter are refused."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from data_pipelines.batch import Batch
from data_pipelines.buckets import Buckets
from data_pipelines.features import FeatureStore, keys_name
from data_pipelines.mixture import Mixture
from data_pipelines.own_data import DATASETS
from data_pipelines.record_files import Shard
from data_pipelines.shapes import SHAPES_TOKENIZER, ShapesSource
from data_pipelines.source import IndexedSource, LooseFiles
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax import feature_cache
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import ExperimentConfig, FeatureCacheConfig, StageConfig
from evf_sam_jax.feature_cache import (
    check_features,
    check_fingerprint,
    distinct_images,
    features_fingerprint,
    write_features,
)
from evf_sam_jax.initialize import initial_params
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.param_rules import Params
from evf_sam_jax.preemption import PreemptionNotice
from evf_sam_jax.run_log import RunLog, make_workdir, resume_workdir
from evf_sam_jax.sharding import MeshConfig, make_mesh
from evf_sam_jax.stage import make_stage
from evf_sam_jax.train import make_stages, run_stage
from evf_sam_jax.train_step import make_loss
from evf_sam_jax.training_data import TrainingData
from tests.data_pipelines.astronaut import write_astronaut
from tests.data_pipelines.tiny_dataset import TinyDataset
from tests.evf_sam_jax.test_processes import ROOT, flag_arguments, free_port
from tests.evf_sam_jax.test_resume import losses as losses_of_run
from tests.evf_sam_jax.tiny_experiment import EXPERIMENT, MODEL, REFERRING

IMAGES = 5
TOKENIZER = load_tokenizer(SHAPES_TOKENIZER)
STAGE = dataclasses.replace(REFERRING, name="referring", steps=3)
SAM = dataclasses.replace(
    EXPERIMENT, stages=(STAGE,), feature_cache=FeatureCacheConfig("float32", 8, 3)
)
# Its decoder is trained, with what the original counts to it.
TRAINS_SKIPS = dataclasses.replace(
    STAGE,
    trainable=(("segmenter/image_encoder/neck/conv_s[01]/.*", True), *STAGE.trainable),
)
SAM2 = dataclasses.replace(
    SAM,
    model=dataclasses.replace(
        MODEL, segmenter=dataclasses.replace(Sam2Config.tiny(), decoder_depth=1)
    ),
    stages=(TRAINS_SKIPS,),
)


def with_dtype(config: ExperimentConfig, dtype: str) -> ExperimentConfig:
    return dataclasses.replace(
        config, feature_cache=dataclasses.replace(config.feature_cache, dtype=dtype)
    )


def params(config: ExperimentConfig) -> Params:
    return params_of(config.model)


@functools.cache
def params_of(model: EvfSamConfig) -> Params:
    return initial_params(dataclasses.replace(EXPERIMENT, model=model))


def mixture(images: int = IMAGES) -> Mixture:
    return Mixture((ShapesSource("train", EXPERIMENT.data.shapes, images),), (1.0,))


def data(store: FeatureStore | None = None, images: int = IMAGES) -> TrainingData:
    held_out = ShapesSource("val", EXPERIMENT.data.shapes, 1)
    return TrainingData(mixture(images), held_out, EXPERIMENT.data.shapes.phrases, None, store)


@pytest.fixture(scope="module")
def sam_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("features") / "sam"
    write_features(SAM, mixture(), directory)
    return directory


def first_batches(config: ExperimentConfig, store: FeatureStore | None) -> list[Batch]:
    stage = make_stage(config, config.stages[0], make_mesh(config.mesh, jax.devices()[:1]))
    return list(stage.batches(data(store), TOKENIZER))


def losses(config: ExperimentConfig, batches: list[Batch]) -> np.ndarray:
    loss = jax.jit(make_loss(config.model, "text", config.stages[0].loss))
    phrases = jnp.float32(4)
    return np.array([loss(params(config), {}, one, phrases)[0] for one in batches])


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance"),
    [(SAM, "float32", 1e-6), (SAM, "bfloat16", 1e-3), (SAM, "int8", 1e-2), (SAM2, "float32", 1e-6)],
    ids=["sam, float32", "sam, bfloat16", "sam, int8", "sam2, float32"],
)
def test_losses_are_those_of_the_images(
    config: ExperimentConfig, dtype: str, tolerance: float, tmp_path: Path
):
    config = with_dtype(config, dtype)
    manifest = write_features(config, mixture(), tmp_path / "features")
    assert manifest.images == IMAGES and manifest.layout.dtype == dtype
    assert manifest.layout.finished == (config.model == SAM.model)  # SAM-2's skips are trained
    images = first_batches(config, None)
    cached = first_batches(config, FeatureStore(tmp_path / "features"))
    for one, other in zip(images, cached, strict=True):
        assert other.sam_image is None and other.image_features is not None
        same = [
            jax.tree.map(np.array_equal, *pair)
            for pair in zip(
                *(
                    jax.tree.leaves(dataclasses.replace(x, sam_image=None, image_features=None))
                    for x in (one, other)
                ),
                strict=True,
            )
        ]
        assert all(same)
    expected = losses(config, images)
    assert len(expected) == 3 and np.ptp(expected) > 0
    np.testing.assert_allclose(losses(config, cached), expected, rtol=tolerance)


def test_eight_devices_write_what_one_does(sam_features: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    write_features(SAM, mixture(), tmp_path / "one")
    image = mixture().read(0, ()).image
    for one, eight in zip(
        FeatureStore(tmp_path / "one").read(image),
        FeatureStore(sam_features).read(image),
        strict=True,
    ):
        np.testing.assert_allclose(one, eight, atol=1e-5)


def train_on(store: FeatureStore | None, devices: int, workdir: Path) -> None:
    """Trains a stage into `workdir`."""
    workdir.mkdir(exist_ok=True)
    config = dataclasses.replace(SAM, mesh=MeshConfig(data=devices))
    [stage] = make_stages(config, make_mesh(config.mesh, jax.devices()[:devices]))
    with RunLog(workdir, silent=jax.process_index() > 0) as log, PreemptionNotice() as notice:
        run_stage(stage, data(store), None, TOKENIZER, log, epath.Path(workdir), notice)


# One of several processes that write a directory together, then train on it.
PROGRAM = """
from pathlib import Path

from data_pipelines.features import FeatureStore
from evf_sam_jax import processes
from evf_sam_jax.errors import run_app
from evf_sam_jax.feature_cache import write_features
from tests.evf_sam_jax.test_feature_cache import SAM, mixture, train_on

def main(argv):
    with processes.joined_by_flags():
        write_features(SAM, mixture(4), argv[1])  # a file of each process
        write_features(SAM, mixture(), argv[1])  # looks up what is there
        train_on(FeatureStore(argv[1]), 2, Path(argv[2]))

processes.define_flags()
run_app(main)
"""


@pytest.mark.slow
def test_two_processes_write_and_read_what_one_does(sam_features: Path, tmp_path: Path):
    port = free_port()
    together = tmp_path / "together"
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    paths = str(together), str(tmp_path / "run")
    commands = [
        [sys.executable, "-c", PROGRAM, *flag_arguments(port, 2, index, 120), *paths]
        for index in (0, 1)
    ]
    running = [subprocess.Popen(command, cwd=ROOT, env=environ) for command in commands]
    assert [process.wait() for process in running] == [0, 0]
    one, two = FeatureStore(sam_features), FeatureStore(together)
    assert two.manifest.fingerprint == one.manifest.fingerprint
    assert sorted(shard.records for shard in two.manifest.shards) == [1, 1, 3]
    for row in range(IMAGES):
        image = mixture().read(row, ()).image
        for found, expected in zip(two.read(image), one.read(image), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    train_on(None, 1, tmp_path / "alone")
    expected = losses_of_run(tmp_path / "alone")
    assert len(expected) == STAGE.steps
    np.testing.assert_allclose(losses_of_run(tmp_path / "run"), expected, rtol=1e-5)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = feature_cache.write_shard
    done: list[Shard] = []

    def stopped_at_the_second(*arguments) -> Shard:
        if done:
            raise KeyboardInterrupt
        done.append(written(*arguments))
        return done[0]

    monkeypatch.setattr(feature_cache, "write_shard", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_features(SAM, mixture(), tmp_path / "features")
    with pytest.raises(UserError, match="expected a finished directory of features"):
        FeatureStore(tmp_path / "features")
    first = tmp_path / "features" / done[0].file
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(feature_cache, "write_shard", written)
    manifest = write_features(SAM, mixture(), tmp_path / "features")
    assert manifest.images == IMAGES and first.stat().st_mtime_ns == before
    store = FeatureStore(tmp_path / "features")
    for row in range(IMAGES):
        store.read(mixture().read(row, ()).image)


def test_more_images_are_added_to_a_directory(tmp_path: Path):
    written = write_features(SAM, mixture(3), tmp_path / "features")
    (before,) = (tmp_path / "features" / shard.file for shard in written.shards)
    when = before.stat().st_mtime_ns
    manifest = write_features(SAM, mixture(6), tmp_path / "features")
    assert manifest.images == 6
    assert before.stat().st_mtime_ns == when
    files = {path.name for path in (tmp_path / "features").iterdir()}
    shards = {shard.file for shard in manifest.shards}
    assert {name for name in files if name.endswith(".array_record")} == shards
    assert {name for name in files if name.endswith(".npy")} == set(map(keys_name, shards))
    assert len(files) == 1 + 3 * len(shards)  # each has its fingerprint beside it


def test_features_of_other_mixtures_stay_and_are_used_again(
    sam_features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    directory = tmp_path / "features"
    shutil.copytree(sam_features, directory)
    files = {path: path.stat().st_mtime_ns for path in directory.glob("*.array_record")}
    tiny = TinyDataset(2)
    tiny.write(tmp_path)
    source = tiny.dataset().source(tmp_path, "train")
    before = Mixture((source, *mixture(IMAGES - 1).sources), (1.0, 1.0))
    manifest = write_features(SAM, before, directory)  # two more, and one less
    assert manifest.images == IMAGES + 2
    assert {path: path.stat().st_mtime_ns for path in files} == files
    store = FeatureStore(directory)
    for some in (before, mixture()):
        for row in range(len(some)):
            store.read(some.read(row, ()).image)
    said = capsys.readouterr().out
    assert f"{IMAGES + 1} images, " in said and "\n2 of them have none there: " in said


def first_shard(directory: Path) -> Path:
    return directory / FeatureStore(directory).manifest.shards[0].file


def flip_a_bit(directory: Path) -> None:
    path = first_shard(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a record": flip_a_bit,
    "a file": lambda directory: first_shard(directory).unlink(),
    "keys": lambda directory: (directory / keys_name(first_shard(directory).name)).unlink(),
    "manifest": lambda directory: (directory / "manifest.json").unlink(),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_the_command_mends_what_is_damaged(what: str, sam_features: Path, tmp_path: Path):
    directory = tmp_path / "features"
    shutil.copytree(sam_features, directory)
    DAMAGES[what](directory)
    write_features(SAM, mixture(), directory)
    found, expected = FeatureStore(directory), FeatureStore(sam_features)
    for row in range(IMAGES):
        image = mixture().read(row, ()).image
        for one, other in zip(found.read(image), expected.read(image), strict=True):
            np.testing.assert_array_equal(one, other)


def test_pictures_that_have_changed_are_computed_anew(sam_features: Path, tmp_path: Path):
    directory = tmp_path / "features"
    shutil.copytree(sam_features, directory)
    other = dataclasses.replace(EXPERIMENT.data.shapes, seed=7)  # the same names, other pictures
    changed = Mixture((ShapesSource("train", other, IMAGES),), (1.0,))
    write_features(SAM, changed, directory)
    FeatureStore(directory).read(changed.read(0, ()).image)


def test_a_directory_of_something_else_is_left_as_it_is(tmp_path: Path):
    for name in ("model-00001-of-00002.safetensors", "train-00000-of-00002.array_record"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="--workdir: expected a new directory, or one of features"):
        write_features(SAM, mixture(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_features_that_are_not_finite_are_not_stored(tmp_path: Path):
    broken = dataclasses.replace(
        SAM, init=dataclasses.replace(SAM.init, scale=(("segmenter/.*", float("inf")), (".*", 1.0)))
    )
    with pytest.raises(UserError, match="shapes, example 0: expected finite features"):
        write_features(broken, mixture(), tmp_path / "features")
    assert not list((tmp_path / "features").iterdir())


def test_a_directory_without_any_features_is_refused(tmp_path: Path):
    tiny = TinyDataset(2)
    tiny.write(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no picture")
    source = tiny.dataset().source(tmp_path, "train")
    write_features(SAM, Mixture((source,), (1.0,)), tmp_path / "features")
    with pytest.raises(UserError, match="expected features of images, found none of any"):
        FeatureStore(tmp_path / "features")


def test_each_picture_is_computed_once(tmp_path: Path):
    tiny = TinyDataset(4)
    tiny.write(tmp_path)
    sources = [
        tiny.dataset(name).source(tmp_path, split) for name, split in (("a", "train"), ("b", "val"))
    ]
    both = Mixture(tuple(sources), (1.0, 1.0))
    twice = [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert distinct_images(both) == twice
    shapes = mixture(2).sources[0]
    assert distinct_images(Mixture((*sources, shapes), (1.0, 1.0, 1.0))) == [*twice, (8,), (9,)]


def test_a_copy_is_taken_where_the_first_cannot_be_read(tmp_path: Path):
    tiny, sources = TinyDataset(2), []
    for name in ("a", "b"):
        tiny.write(tmp_path / name)
        sources.append(tiny.dataset(name).source(tmp_path / name, "train"))
    (tmp_path / "a" / "images" / "00001.png").write_bytes(b"no picture")
    both = Mixture(tuple(sources), (1.0, 1.0))
    assert write_features(SAM, both, tmp_path / "features").images == 2
    FeatureStore(tmp_path / "features").read(both.read(3, ()).image)
    assert write_features(SAM, both, tmp_path / "features").images == 2  # looked up alike


def test_pictures_of_two_folders_are_two_although_their_files_are_named_alike(tmp_path: Path):
    sources = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_astronaut(tmp_path / name, "train")
        sources.append(DATASETS[0].source(tmp_path / name, "train"))
    assert distinct_images(Mixture(tuple(sources), (1.0, 1.0))) == [(0,), (1,)]


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tiny = TinyDataset(4)
    tiny.write(tmp_path)
    image = tmp_path / "images" / "00001.png"
    content = image.read_bytes()
    image.write_bytes(b"no picture")
    source = tiny.dataset().source(tmp_path, "train")
    assert isinstance(source, IndexedSource) and isinstance(source.store, LooseFiles)
    manifest = write_features(SAM, Mixture((source,), (1.0,)), tmp_path / "features")
    assert manifest.images == 3
    [(row, reason)] = [pair for shard in manifest.shards for pair in shard.left_out]
    assert row == 1 and "00001.png" in reason
    image.write_bytes(content)  # it can be read again
    assert write_features(SAM, Mixture((source,), (1.0,)), tmp_path / "features").images == 4


def test_an_image_without_features_is_skipped_and_counted(
    sam_features: Path, caplog: pytest.LogCaptureFixture
):
    stage = make_stage(SAM, dataclasses.replace(STAGE, steps=8), make_mesh(SAM.mesh))
    more = data(FeatureStore(sam_features), IMAGES + 2)
    with caplog.at_level("WARNING"):
        check_features(SAM, more)  # most have them
    assert f"2 of {IMAGES + 2} images that were looked up have none" in caplog.text
    batches = list(stage.batches(more, TOKENIZER))
    skipped = {int(one) for batch in batches for one in batch.skipped_id if one >= 0}
    assert skipped == {IMAGES, IMAGES + 1}
    assert "expected features of these pixels, found none" in more.why_unread(TOKENIZER, IMAGES)
    assert more.why_unread(TOKENIZER, 0) == ""
    assert not any(np.isin(batch.example_id, list(skipped)).any() for batch in batches)


def test_an_example_may_be_left_out_because_of_a_phrase():
    given = dataclasses.replace(data(), buckets=Buckets((2,)))
    said = "expected phrases of at most 2 tokens, found a longer one"
    assert given.why_unread(TOKENIZER, 0) == said


def test_features_of_other_images_are_refused(sam_features: Path):
    other = dataclasses.replace(EXPERIMENT.data.shapes, seed=7)
    elsewhere = Mixture((ShapesSource("train", other, 8),), (1.0,))
    given = dataclasses.replace(data(FeatureStore(sam_features)), mixture=elsewhere)
    with pytest.raises(UserError, match="data.features: expected features of shapes, example 0"):
        check_features(SAM, given)


def test_features_of_other_shapes_are_refused(sam_features: Path):
    with pytest.raises(UserError, match="expected arrays of .* an image, found .* in"):
        check_features(SAM2, data(FeatureStore(sam_features)))


def test_finished_features_are_refused_where_what_finishes_them_is_trained(tmp_path: Path):
    frozen = dataclasses.replace(SAM2, stages=(STAGE,))
    manifest = write_features(frozen, mixture(), tmp_path / "features")
    assert manifest.layout.finished
    given = data(FeatureStore(tmp_path / "features"))
    check_features(frozen, given)
    with pytest.raises(UserError, match="expected features that end before what a stage trains"):
        check_features(SAM2, given)


def trained_encoder(stage: StageConfig) -> StageConfig:
    return dataclasses.replace(
        stage, trainable=(("segmenter/image_encoder/.*", True), *stage.trainable)
    )


def test_an_encoder_that_is_trained_cannot_be_cached(sam_features: Path, tmp_path: Path):
    config = dataclasses.replace(SAM, stages=(trained_encoder(STAGE),))
    said = "features can be cached of an image encoder that no stage trains; found segmenter/image_"
    with pytest.raises(UserError, match=said):
        write_features(config, mixture(), tmp_path / "features")
    with pytest.raises(UserError, match=said):
        check_features(config, data(FeatureStore(sam_features)))


def test_features_of_other_parameters_are_refused(sam_features: Path):
    store = FeatureStore(sam_features)
    check_fingerprint(SAM, store, params(SAM))
    changed = jax.tree.map(lambda leaf: leaf, params(SAM))
    bias = changed["segmenter"]["image_encoder"]["neck"]["norm2"]["bias"]
    changed["segmenter"]["image_encoder"]["neck"]["norm2"]["bias"] = bias.at[3].add(1e-6)
    with pytest.raises(UserError, match="data.features: expected features of this run's segmenter"):
        check_fingerprint(SAM, store, changed)


def test_a_run_is_told_features_of_another_dtype_from_its_own(sam_features: Path, tmp_path: Path):
    write_features(with_dtype(SAM, "int8"), mixture(), tmp_path / "features")
    one, other = (data(FeatureStore(path)) for path in (sam_features, tmp_path / "features"))
    different = one.fingerprints().items() ^ other.fingerprints().items()
    assert {name for name, _ in different} == {"data.features"}
    assert "data.features" not in data().fingerprints()


def test_a_run_goes_on_with_features_of_more_images_and_says_so(sam_features: Path, tmp_path: Path):
    shutil.copytree(sam_features, tmp_path / "features")
    before = data(FeatureStore(tmp_path / "features")).fingerprints()
    make_workdir(tmp_path / "run", SAM, before)
    assert resume_workdir(tmp_path / "run", SAM, before) == []
    write_features(SAM, mixture(IMAGES + 1), tmp_path / "features")
    now = data(FeatureStore(tmp_path / "features")).fingerprints()
    file = tmp_path / "run" / "data.json"
    with pytest.raises(UserError, match="found other in data.held_out"):
        resume_workdir(tmp_path / "run", SAM, now | {"data.held_out": "another"})
    assert json.loads(file.read_text()) == before  # what is refused changes nothing
    assert resume_workdir(tmp_path / "run", SAM, now) == ["features of other images than before"]
    assert resume_workdir(tmp_path / "run", SAM, now) == []  # it is said once
    earlier = json.loads(file.read_text())
    del earlier["data.features.images"]
    file.write_text(json.dumps(earlier))
    assert resume_workdir(tmp_path / "run", SAM, now) == []


def test_the_fingerprint_changes_with_all_that_features_depend_on():
    found = {features_fingerprint(SAM.model, params(SAM), True)}

    def expect_another(model, given: Params, finished: bool = True) -> None:
        before = len(found)
        found.add(features_fingerprint(model, given, finished))
        assert len(found) == before + 1

    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params(SAM))
    expect_another(SAM.model, half)
    segmenter = dataclasses.replace(SAM.model.segmenter, dtype="bfloat16")
    expect_another(dataclasses.replace(SAM.model, segmenter=segmenter), params(SAM))
    expect_another(SAM2.model, params(SAM2))
    expect_another(SAM2.model, params(SAM2), finished=False)
    expect_another(dataclasses.replace(SAM2.model, profile="legacy"), params(SAM2))
    same = dataclasses.replace(SAM.model.segmenter, remat=True, encoder_chunk=1)
    assert (
        features_fingerprint(dataclasses.replace(SAM.model, segmenter=same), params(SAM), True)
        in found
    )


def test_the_fingerprint_sees_values_change_places():
    swapped = jax.tree.map(lambda leaf: leaf, params(SAM))
    encoder = swapped["segmenter"]["image_encoder"]
    kernel = encoder["patch_embed"]["proj"]["kernel"]
    encoder["patch_embed"]["proj"]["kernel"] = kernel[::-1]
    before, after = (features_fingerprint(SAM.model, one, True) for one in (params(SAM), swapped))
    assert before != after


@pytest.mark.parametrize("whole", [True, False], ids=["finished", "stopped"])
def test_another_directory_is_not_written_over(whole: bool, sam_features: Path, tmp_path: Path):
    directory = tmp_path / "features"
    shutil.copytree(sam_features, directory)
    if not whole:
        (directory / "manifest.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    with pytest.raises(UserError, match="expected nothing, or features of the same segmenter"):
        write_features(with_dtype(SAM, "int8"), mixture(), directory)
    assert before == {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_a_disk_without_room_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=re.escape("features-* needs")):
        write_features(SAM, mixture(), tmp_path / "features")


def test_only_the_encoder_is_read_for_it():
    found = initial_params(SAM, only="segmenter/image_encoder/")
    assert list(found) == ["segmenter"] and list(found["segmenter"]) == ["image_encoder"]
    expected = params(SAM)["segmenter"]["image_encoder"]
    assert jax.tree.all(jax.tree.map(np.array_equal, found["segmenter"]["image_encoder"], expected))
