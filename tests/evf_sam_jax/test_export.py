"""An export predicts what the model predicts, without the package; bad input is one sentence."""

import json
import pathlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.export
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from data_pipelines.image_input import read_image
from data_pipelines.tower_images import TowerImages
from evf_sam_jax import export, export_loader, model_dir
from evf_sam_jax.errors import UserError
from evf_sam_jax.export_loader import ExportedModel, Prediction
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.models import attention
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax.tiny_model import CONFIG, edited, picture, write_tiny_model

ROOT = pathlib.Path(__file__).parents[2]
PLATFORMS = ("cpu", "cuda", "tpu")
NEEDED = ("jax", "numpy", "flatbuffers", "pillow", "sentencepiece", "safetensors")

# Images and phrases: several phrases of several lengths, and an image of several tiles.
SIZES = ((37, 53), (30, 1100))
PHRASES = (
    ["the red circle", "the small blue square left of it " * 2, "the largest"],
    ["the red circle"],
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Of a seed whose masks are neither empty nor full."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=10)


@pytest.fixture(scope="module")
def exported(directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("exports") / "tiny"
    export.export_model(directory, path, PLATFORMS)
    return path


# Everything but Python's own modules, jax's dependencies and what the loader may need is not there.
ALONE = """
import importlib.machinery
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter

ALLOWED = {"jax", "jaxlib", "ml_dtypes", "opt_einsum", "scipy", "numpy", "flatbuffers", "PIL",
           "sentencepiece", "_sentencepiece", "safetensors", "evf_sam_export"}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.split(".")[0]
        known = ALLOWED | sys.stdlib_module_names
        if top in known or top.startswith("_sysconfigdata"):
            return super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
directory, results = sys.argv[1:]
sys.path.insert(0, directory)

import json
import numpy as np
from evf_sam_export import ExportedModel, image_input

model = ExportedModel.load(directory)
arrays = {}
for number, (image, phrases) in enumerate(json.load(sys.stdin)):
    prediction = model.predict(image_input.read_image(image), phrases)
    arrays[f"logits{number}"] = prediction.mask_logits
    arrays[f"masks{number}"] = prediction.masks
    arrays[f"iou{number}"] = prediction.iou
np.savez(results, **arrays)
for name in ("flax", "orbax", "torch", "jaxtyping", "evf_sam_jax", "data_pipelines"):
    assert name not in sys.modules, name
"""


def test_the_loader_alone_predicts_what_the_model_predicts(
    directory: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path
):
    # Three phrases are decoded as two and one, as seventeen would be as sixteen and one.
    path = edited(exported, tmp_path / "export", phrase_buckets=[1, 2])
    jobs = []
    for number, (size, phrases) in enumerate(zip(SIZES, PHRASES, strict=True)):
        Image.fromarray(picture(*size, seed=number)).save(tmp_path / f"{number}.png")
        jobs.append((str(tmp_path / f"{number}.png"), phrases))
    result = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), str(tmp_path / "found.npz")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    predictor = Predictor.load(directory)
    with np.load(tmp_path / "found.npz") as found:
        found_of_phrases = found["logits0"]
        for number, (image, phrases) in enumerate(jobs):
            expected = predictor.predict(read_image(image), texts=phrases)
            logits, masks, iou = (found[f"{name}{number}"] for name in ("logits", "masks", "iou"))
            np.testing.assert_allclose(logits, expected.mask_logits, rtol=0, atol=1e-5)
            np.testing.assert_allclose(iou, expected.iou, rtol=0, atol=1e-5)
            decided = abs(expected.mask_logits) > 1e-5
            np.testing.assert_array_equal(masks[decided], expected.masks[decided])
            assert 0 < masks.mean() < 1
    assert np.ptp(found_of_phrases, axis=0).max() > 1e-3, "the phrases must matter"


def test_one_artefact_serves_all_platforms(exported: pathlib.Path):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["platforms"] == list(PLATFORMS)
    for name in ("encode_image", "decode_phrases", "resample_tile"):
        file = exported / manifest["functions"][name]["file"]
        assert jax.export.deserialize(bytearray(file.read_bytes())).platforms == PLATFORMS


def test_weights_are_the_models(directory: pathlib.Path, exported: pathlib.Path):
    weights = safetensors.numpy.load_file(exported / "weights.safetensors")
    expected = dict(model_dir.iterate_params(directory))
    assert weights.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(weights[path], leaf)


def test_the_manifest_says_how_images_are_prepared(exported: pathlib.Path):
    manifest = json.loads((exported / "manifest.json").read_text())
    segmenter, encoder = (manifest["preprocessing"][key] for key in ("segmenter", "encoder"))
    said = TowerImages(
        frame=segmenter["frame"],
        fit=segmenter["fit"],
        encoder_size=encoder["size"],
        encoder_kind=encoder["kind"],
    )
    assert said == tower_images(CONFIG)
    assert manifest["parameter_counts"]["total"] > 0


def test_weights_have_the_dtypes_that_the_artefacts_take(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    export.export_model(directory, tmp_path / "half", ["cpu"], dtype="bfloat16")
    half = ExportedModel.load(tmp_path / "half")
    assert half.weights["projector/out/kernel"].dtype == ml_dtypes.bfloat16
    assert half.weights["segmenter/image_encoder/neck/conv2/kernel"].dtype == np.float32
    for name, entry in half.manifest["functions"].items():
        content = bytearray((tmp_path / "half" / entry["file"]).read_bytes())
        (taken, *_), _ = jax.tree.unflatten(
            (artefact := jax.export.deserialize(content)).in_tree, artefact.in_avals
        )
        assert bool(taken) == (name != "resample_tile")
        for path, leaf in taken.items():
            weight = half.weights[path]
            assert (leaf.shape, leaf.dtype) == (weight.shape, weight.dtype), path


def test_attention_has_the_tiles_of_where_it_runs(monkeypatch: pytest.MonkeyPatch):
    """As the text of a program shows it: tiles are loops beside those over the layers."""
    monkeypatch.setattr(attention, "SMALL_SCORES", 0)
    monkeypatch.setattr(attention, "TILE_SCORES", {"cpu": 64 * 8, "gpu": 2**28, "tpu": 2**28})

    def loops(*platforms: str) -> int:
        function = export.model_functions(CONFIG, platforms)["encode_image"]
        return export.lower(function, CONFIG, platforms).mlir_module().count("stablehlo.while")

    on_cpu, elsewhere = loops("cpu"), loops("cuda", "tpu")
    assert on_cpu > elsewhere
    assert loops("cpu", "cuda", "tpu") == on_cpu + elsewhere


@pytest.mark.slow
def test_bfloat16_is_the_model_in_bfloat16(directory: pathlib.Path, tmp_path: pathlib.Path):
    export.export_model(directory, tmp_path / "half", ["cpu"], dtype="bfloat16")
    image, phrases = picture(20, 30), ["the red circle"]
    expected = Predictor.load(directory, dtype="bfloat16").predict(image, texts=phrases)
    found = ExportedModel.load(tmp_path / "half").predict(image, phrases)
    # The export computes in one program what Predictor does in two; each rounds where it likes.
    np.testing.assert_allclose(found.mask_logits, expected.mask_logits, atol=1e-3)


# Mistakes.

Case = Callable[[pathlib.Path, pathlib.Path], dict]


def wider(directory: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """A copy whose config says a larger vocabulary than its parameters have."""
    config = CONFIG.to_dict()
    config["encoder"]["vocab_size"] += 1
    return edited(directory, path, config=config)


BAD_EXPORTS: dict[str, tuple[Case, str]] = {
    "unknown platform": (
        lambda d, t: {"platforms": ["cpu", "gpu"]},
        "--platforms: expected some of cpu, cuda, rocm, tpu, found 'gpu'",
    ),
    "no platform": (lambda d, t: {"platforms": []}, "found none"),
    "a platform twice": (lambda d, t: {"platforms": ["cpu", "cpu"]}, "each once, found cpu,cpu"),
    "unknown dtype": (lambda d, t: {"dtype": "float16"}, "float32 or bfloat16, found 'float16'"),
    "output exists": (lambda d, t: {"out": d}, "--out: expected a path where nothing is yet"),
    "no such model": (lambda d, t: {"model": t / "none"}, "none does not exist"),
    "model of another version": (
        lambda d, t: {"model": edited(d, t / "model", format_version=99)},
        "expected format_version 1, found 99",
    ),
    "no tokenizer": (
        lambda d, t: {"model": edited(d, t / "model", has_tokenizer=False)},
        "expected a model directory with tokenizer files, found none",
    ),
    "one tower": (
        lambda d, t: {
            "model": edited(d, t / "model", config={"segmenter": CONFIG.to_dict()["segmenter"]})
        },
        "expected a whole EVF-SAM model, found one without encoder",
    ),
    "parameters of another config": (
        lambda d, t: {"model": wider(d, t / "model")},
        "expected shape (129, 64) by the config, found shape (128, 64)",
    ),
}


@pytest.mark.parametrize("case", BAD_EXPORTS)
def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(
    directory: pathlib.Path, tmp_path: pathlib.Path, case: str
):
    make, words = BAD_EXPORTS[case]
    arguments = {"model": directory, "out": tmp_path / "a" / "out"} | make(directory, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        export.export_model(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_flatbuffers_is_missing(
    directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)  # what Python takes for not installed
    with pytest.raises(UserError, match=r'flatbuffers, found none: pip install "evf-sam-jax\[exp'):
        export.export_model(directory, tmp_path / "out")


def damaged(exported: pathlib.Path, path: pathlib.Path, name: str) -> pathlib.Path:
    """A copy with one file cut short."""
    shutil.copytree(exported, path)
    (path / name).write_bytes((path / name).read_bytes()[:100])
    return path


def without(exported: pathlib.Path, path: pathlib.Path, name: str) -> pathlib.Path:
    shutil.copytree(exported, path)
    (path / name).unlink()
    return path


BAD_LOADS: dict[str, tuple[Callable[[pathlib.Path, pathlib.Path], pathlib.Path], str]] = {
    "not an export": (lambda e, t: t, "manifest.json cannot be read: No such file"),
    "another version": (
        lambda e, t: edited(e, t / "e", export_version=99),
        "expected export_version 2, found 99",
    ),
    "manifest without functions": (
        lambda e, t: edited(e, t / "e", functions={}),
        "manifest.json: functions/encode_image is missing or damaged: export again",
    ),
    "manifest with an odd preprocessing": (
        lambda e, t: edited(e, t / "e", preprocessing=[]),
        "manifest.json: preprocessing/segmenter/frame is missing or damaged",
    ),
    "manifest with odd buckets": (
        lambda e, t: edited(e, t / "e", phrase_buckets=["4"]),
        "manifest.json: phrase_buckets is missing or damaged",
    ),
    "broken manifest": (
        lambda e, t: damaged(e, t / "e", "manifest.json"),
        "expected JSON, found something else",
    ),
    "broken artefact": (
        lambda e, t: damaged(e, t / "e", "encode_image.jax_export"),
        f"encode_image.jax_export: jax {jax.__version__} cannot open it",
    ),
    "missing artefact": (
        lambda e, t: without(e, t / "e", "resample_tile.jax_export"),
        "resample_tile.jax_export cannot be read: No such file",
    ),
    "broken weights": (
        lambda e, t: damaged(e, t / "e", "weights.safetensors"),
        "expected a whole .safetensors file",
    ),
    "missing weights": (
        lambda e, t: without(e, t / "e", "weights.safetensors"),
        "expected a whole .safetensors file",
    ),
}


@pytest.mark.parametrize("case", BAD_LOADS)
def test_what_cannot_be_loaded_is_one_sentence(
    exported: pathlib.Path, tmp_path: pathlib.Path, case: str
):
    make, words = BAD_LOADS[case]
    with pytest.raises(UserError) as error:
        ExportedModel.load(make(exported, tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_export_for_other_platforms(directory: pathlib.Path, tmp_path: pathlib.Path):
    export.export_model(directory, tmp_path / "e", ["tpu"])
    with pytest.raises(UserError, match="expected an export for cpu, found one for tpu only"):
        ExportedModel.load(tmp_path / "e")


def test_phrases_and_images_that_cannot_be_used(exported: pathlib.Path):
    model = ExportedModel.load(exported)
    for phrases, words in (
        ([], "at least one phrase, found none"),
        ("the circle", "a list of phrases, found one text"),
        (["the circle", " "], "is empty"),
        (["circle " * 2000], "tokens, expected at most"),
    ):
        with pytest.raises(UserError, match=words):
            model.predict(picture(8, 8), phrases)
    with pytest.raises(UserError, match=r"found uint8 \[0, 5, 3\]"):
        model.predict(np.zeros((0, 5, 3), np.uint8), ["the circle"])


# The commands.


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_says_a_mistake_in_one_line(directory: pathlib.Path, tmp_path: pathlib.Path):
    result = command(
        "-m", "evf_sam_jax.export", "--model", directory, "--platforms", "cpu,gpu",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --platforms") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--image": "none.png"}, "none.png: expected an image file, found nothing there"),
        ({"--text": " "}, "the phrase ' ' is empty"),
        ({"--out": "image.png"}, "--out: expected a path where nothing is yet"),
        ({"--out": "image.png/masks"}, "--out: cannot write"),
    ],
)
def test_the_export_says_a_mistake_in_one_line(
    exported: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    words: str,
):
    class Untrained(ExportedModel):
        """Compiles nothing: what is tested comes before or after."""

        def predict_ids(self, image: np.ndarray, ids: list[list[int]]) -> Prediction:
            logits = np.zeros((len(ids), *image.shape[:2]), np.float32)
            return Prediction(logits, logits > 0, logits[:, 0, 0])

    monkeypatch.setattr(export_loader, "ExportedModel", Untrained)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(8, 8)).save("image.png")
    options = {"--image": "image.png", "--text": "the circle", "--out": "masks"} | changes
    with pytest.raises(SystemExit) as exit:
        export_loader.main(exported, [word for pair in options.items() for word in pair])
    printed = capsys.readouterr()
    assert (exit.value.code, printed.out) == (2, "")
    assert printed.err.startswith("error: ") and words in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.slow
def test_the_command_and_the_export_in_a_bare_environment(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    """Installs the six packages from the index, and nothing else."""
    model = shutil.copytree(directory, tmp_path / "tiny")
    result = command("-m", "evf_sam_jax.export", "--model", model, "--platforms", "cpu,cuda,tpu")
    assert result.returncode == 0, result.stderr
    exported = tmp_path / "tiny_export"
    assert f"written to {exported}: float32, for cpu, cuda, tpu" in result.stdout
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    pinned = [f"{name}=={version(name)}" for name in NEEDED]
    subprocess.run([python, "-m", "pip", "install", "-q", *pinned], check=True)
    image = tmp_path / "image.png"
    Image.fromarray(picture(37, 53)).save(image)
    result = subprocess.run(
        [python, exported, "--image", image, "--out", tmp_path / "masks"]
        + [argument for phrase in PHRASES[0] for argument in ("--text", phrase)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    expected = Predictor.load(model).predict(picture(37, 53), texts=PHRASES[0])
    lines = result.stdout.splitlines()
    assert len(lines) == len(PHRASES[0])
    for number, mask in enumerate(expected.masks):
        assert f" {mask.sum()} pixels " in lines[number]
        with Image.open(tmp_path / "masks" / f"{number}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), mask * np.uint8(255))
    again = subprocess.run(
        [python, exported, "--image", image, "--text", "a", "--out", tmp_path / "masks"],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and again.stderr.startswith("error: --out: expected a path where")
