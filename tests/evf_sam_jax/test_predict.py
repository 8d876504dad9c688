"""Prediction is the model without buckets and tiles, compiles for no image, refuses bad input."""

import functools
import io
import json
import pathlib
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_input
from evf_sam_jax import mask_geometry, model_dir, predict, visualize
from evf_sam_jax.errors import UserError
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.predict import predict_file, write_prediction
from evf_sam_jax.predictor import Predictor

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = ROOT / "data_pipelines" / "shapes_tokenizer"
COMPILATION = "/jax/core/compile/backend_compile_duration"

CONFIG = evf_sam.EvfSamConfig.tiny()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model directory whose random parameters all matter, with the shapes' tokenizer."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.normal(size=shape).astype(np.float32)
        if path.endswith("kernel"):
            return values / np.float32(np.sqrt(shape[-2]))
        return 1 + values / 10 if path.endswith("scale") else values

    shapes = model_dir.path_leaves(evf_sam.param_shapes(CONFIG))
    params = {path: draw(path, leaf.shape) for path, leaf in shapes.items()}
    path = tmp_path_factory.mktemp("models") / "tiny"
    manifest = model_dir.Manifest(variant="tiny", config=CONFIG.to_dict())
    model_dir.write_model_dir(path, params, manifest, TOKENIZER)
    return path


@pytest.fixture(scope="module")
def predictor(directory: pathlib.Path) -> Predictor:
    return Predictor.load(directory)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, smooth enough to survive a resize."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@jax.jit
def exact(
    params: dict,
    sam_image: jax.Array,
    sam_size: jax.Array,
    encoder_image: jax.Array,
    ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Low-resolution logits [1, 1, l, l] and IoU of one phrase, unpadded."""
    features = evf_sam.encode_image(CONFIG, params, sam_image, sam_size)
    text = evf_sam.encode_phrases(CONFIG, params, encoder_image, ids, jnp.ones(ids.shape, bool))
    prediction = evf_sam.decode(CONFIG, params, features, Prompts(text=text))
    return prediction.low_res_logits[:, :, 0], prediction.iou[0, 0, 0]


@pytest.mark.parametrize("size", [(37, 53), (600, 1100), (513, 1), (1, 1)])
def test_tiles_and_buckets_change_nothing(predictor: Predictor, size: tuple[int, int]):
    image = picture(*size)
    text_ids = [[0, 5, 9, 2], [0, *range(4, 24), 2], [0, 7, 7, 2]]
    prediction = predictor.predict(image, text_ids=text_ids)
    assert prediction.mask_logits.shape == prediction.masks.shape == (3, *size)
    sam_image, sam_size = image_input.sam_input(image, CONFIG.segmenter.image_size)
    encoder_image = image_input.encoder_input(image, CONFIG.encoder.image_size)
    sam_sizes, sizes = jnp.array([sam_size]), jnp.array([size])
    inputs = jnp.array(sam_image[None]), sam_sizes, jnp.array(encoder_image[None])
    for number, ids in enumerate(text_ids):
        low_res_logits, iou = exact(predictor.params, *inputs, jnp.array([[ids]]))
        logits = mask_geometry.resample_masks(
            low_res_logits, sam_sizes, sizes, canvas=size, frame=CONFIG.segmenter.image_size
        )
        close = functools.partial(np.testing.assert_allclose, atol=2e-5)
        close(prediction.mask_logits[number], logits[0, 0])
        close(prediction.low_res_logits[number], low_res_logits[0, 0])
        close(prediction.iou[number], iou)
    np.testing.assert_array_equal(prediction.masks, prediction.mask_logits > 0)
    assert np.ptp(prediction.low_res_logits, axis=0).max() > 1e-3, "the phrases must matter"


def test_texts_are_their_token_ids(predictor: Predictor):
    assert predictor.tokenizer is not None
    texts = ["the red circle", "the small blue square left of it" * 2, "the largest"]
    by_texts = predictor.predict(picture(40, 30), texts=texts)
    ids = [predictor.tokenizer.encode(text) for text in texts]
    by_ids = predictor.predict(picture(40, 30), text_ids=ids)
    np.testing.assert_array_equal(by_texts.mask_logits, by_ids.mask_logits)


def test_more_phrases_than_a_bucket_holds(predictor: Predictor):
    text_ids = [[0, *range(4 + i, 24 + i), 2] for i in range(19)]
    together = predictor.predict(picture(20, 30), text_ids=text_ids)
    assert together.mask_logits.shape == (19, 20, 30)
    for number in (0, 15, 16, 18):
        alone = predictor.predict(picture(20, 30), text_ids=[text_ids[number]])
        np.testing.assert_allclose(together.mask_logits[number], alone.mask_logits[0], atol=2e-5)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one with every program that XLA compiles."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILATION:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_each_phrase_bucket_is_compiled_once_and_no_image_size_is(
    predictor: Predictor, compilations: list[str]
):
    fresh = Predictor(CONFIG, predictor.params)
    compilations.clear()

    def compiled(size: tuple[int, int], *lengths: int) -> int:
        before = len(compilations)
        fresh.predict(picture(*size), text_ids=[[5] * length for length in lengths])
        return len(compilations) - before

    assert compiled((30, 40), 3) == 4, "image encoder, phrase encoder, decoder, tile"
    assert compiled((31, 40), 5) == 0
    assert compiled((900, 1300), 16) == 0
    assert compiled((5, 2000), 2) == 0
    assert compiled((30, 40), 17) == 1, "more tokens: the phrase encoder"
    assert compiled((77, 40), 20, 3, 4) == 2, "more phrases: phrase encoder and decoder"
    assert compiled((78, 50), 3, 30, 4, 5) == 0


def test_bfloat16_is_near_float32_and_keeps_norms_and_positions_exact(
    directory: pathlib.Path, predictor: Predictor
):
    half = Predictor.load(directory, dtype="bfloat16")
    dtypes = {name: leaf.dtype for name, leaf in model_dir.path_leaves(half.params).items()}
    assert dtypes["projector/out/kernel"] == dtypes["encoder/text_embed/embedding"] == jnp.bfloat16
    assert dtypes["segmenter/image_encoder/patch_embed/proj/kernel"] == jnp.bfloat16
    assert dtypes["segmenter/image_encoder/neck/conv2/kernel"] == jnp.float32
    gaussian = "segmenter/prompt_encoder/pe_layer/positional_encoding_gaussian_matrix"
    assert dtypes[gaussian] == dtypes["encoder/layer_norm/vision/scale"] == jnp.float32
    exact = predictor.predict(picture(50, 60), text_ids=[[5] * 20]).low_res_logits
    rounded = half.predict(picture(50, 60), text_ids=[[5] * 20]).low_res_logits
    error = np.abs(exact - rounded).max()
    assert 0 < error < 0.1 * np.abs(exact).max()


def write(path: pathlib.Path, params: dict, manifest: model_dir.Manifest) -> pathlib.Path:
    model_dir.write_model_dir(path, params, manifest)
    return path


def edited(directory: pathlib.Path, path: pathlib.Path, **changes: object) -> pathlib.Path:
    """A copy of a model directory with other values in its manifest."""
    shutil.copytree(directory, path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))
    return path


def test_a_directory_of_half_precision_weights_gives_a_float32_model(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), model_dir.load_params(directory)
    )
    path = write(tmp_path / "half", params, model_dir.read_manifest(directory))
    assert {x.dtype for x in jax.tree.leaves(Predictor.load(path).params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "expected texts, text_ids, points, boxes or mask_logits, found none"),
        ({"texts": ["a"], "text_ids": [[5]]}, "either as texts or as token ids"),
        ({"texts": []}, "at least one phrase"),
        ({"texts": ["a circle", "  "]}, "is empty"),
        ({"text_ids": [[0, 2], []]}, "a phrase without any"),
        ({"text_ids": [[0, CONFIG.encoder.vocab_size]]}, f"found {CONFIG.encoder.vocab_size}"),
        ({"text_ids": [[-1]]}, "found -1"),
        ({"text_ids": [[5] * CONFIG.encoder.max_text_positions]}, "tokens a phrase"),
    ],
)
def test_phrases_that_cannot_be_used(predictor: Predictor, arguments: dict, words: str):
    with pytest.raises(UserError, match=words):
        predictor.predict(picture(8, 8), **arguments)


def test_an_image_without_pixels(predictor: Predictor):
    with pytest.raises(
        UserError, match=r"uint8 pixels \[height, width, 3\], found uint8 \[0, 5, 3\]"
    ):
        predictor.predict(np.zeros((0, 5, 3), np.uint8), text_ids=[[5]])


def test_an_unknown_dtype(directory: pathlib.Path):
    with pytest.raises(UserError, match="expected float32 or bfloat16, found 'float16'"):
        Predictor.load(directory, dtype="float16")


def test_a_directory_without_a_tower(directory: pathlib.Path, tmp_path: pathlib.Path):
    config = {"segmenter": CONFIG.to_dict()["segmenter"]}
    path = edited(directory, tmp_path / "sam", config=config)
    with pytest.raises(
        UserError, match="expected a whole EVF-SAM model, found one without encoder"
    ):
        Predictor.load(path)


def test_a_directory_whose_parameters_are_not_its_configs(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    config = CONFIG.to_dict()
    config["encoder"]["vocab_size"] += 1
    path = edited(directory, tmp_path / "model", config=config)
    with pytest.raises(
        UserError, match=r"embedding: expected shape \(129, 64\).*found shape \(128, 64\)"
    ):
        Predictor.load(path)


# Files: what the command does, called in this process.


def image_file(path: pathlib.Path, height: int = 40, width: int = 60) -> pathlib.Path:
    Image.fromarray(picture(height, width)).save(path)
    return path


def test_pictures_and_lines_of_each_phrase(predictor: Predictor, tmp_path: pathlib.Path):
    texts = ["the red circle", "../../etc/passwd\n\x1b[2J", "圆", "the red circle"]
    ids = predictor.token_ids(texts)
    lines = list(write_prediction(predictor, picture(40, 60), texts, ids, tmp_path))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "0_the_red_circle.png",
        "1_etc_passwd_2j.png",
        "2_phrase.png",
        "3_the_red_circle.png",
        "overlay.png",
    ]
    expected = predictor.predict(picture(40, 60), texts=texts)
    colors = list(visualize.COLORS)
    overlay = picture(40, 60)
    for number, line in enumerate(lines):
        mask = expected.masks[number]
        with Image.open(tmp_path / files[number]) as file:
            np.testing.assert_array_equal(np.asarray(file), mask * np.uint8(255))
        assert line.startswith(repr(texts[number])) and line.isprintable()
        assert f" {mask.sum()} pixels ({mask.mean():.1%})" in line
        assert f"IoU {expected.iou[number]:.3f}, {colors[number]}, {files[number]}" in line
        overlay = visualize.overlay(overlay, mask, visualize.COLORS[colors[number]])
    with Image.open(tmp_path / "overlay.png") as file:
        np.testing.assert_array_equal(np.asarray(file), overlay)


def billion_pixels() -> bytes:
    """The beginning of a PNG whose header says 40,000 x 30,000."""
    file = io.BytesIO()
    Image.new("1", (40_000, 1)).save(file, "PNG")
    header = bytearray(file.getvalue())
    header[20:24] = (30_000).to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    return bytes(header)


Case = Callable[[pathlib.Path, pathlib.Path], dict]

# What each gives in place of good arguments, and words of the sentence that answers.
BAD_INPUT: dict[str, tuple[Case, str]] = {
    "no such image": (lambda d, t: {"image": t / "none.png"}, "none.png: expected an image file"),
    "not an image": (lambda d, t: {"image": filled(t / "a.png", b"text")}, "expected an image"),
    "empty image": (lambda d, t: {"image": filled(t / "a.png", b"")}, "found an empty one"),
    "billion pixels": (
        lambda d, t: {"image": filled(t / "a.png", billion_pixels())},
        "pixels, found",
    ),
    "empty phrase": (lambda d, t: {"texts": [" "]}, "is empty"),
    "no phrase": (lambda d, t: {"texts": []}, "--text or by --text_ids, found neither"),
    "texts and ids": (lambda d, t: {"id_lines": ["5"]}, "--text or by --text_ids, found both"),
    "ids that are words": (
        lambda d, t: {"texts": [], "id_lines": ["0 five 2"]},
        "--text_ids: expected numbers",
    ),
    "no tokenizer": (
        lambda d, t: {"model": edited(d, t / "model", has_tokenizer=False)},
        "no tokenizer files: expected token ids instead",
    ),
    "no such model": (lambda d, t: {"model": t / "none"}, "none does not exist"),
    "not a model": (lambda d, t: {"model": t}, "no manifest.json"),
    "model of another version": (
        lambda d, t: {"model": edited(d, t / "model", format_version=99)},
        "expected format_version 1, found 99",
    ),
    "output exists": (lambda d, t: {"out": d}, "--out: expected a path where nothing is yet"),
    "output cannot be written": (
        lambda d, t: {"out": filled(t / "file", b"x") / "out"},
        "--out: cannot make",
    ),
}


def filled(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    directory: pathlib.Path, tmp_path: pathlib.Path, case: str
):
    make, words = BAD_INPUT[case]
    arguments = {
        "model": directory,
        "image": image_file(tmp_path / "image.png"),
        "texts": ["the red circle"],
        "id_lines": [],
        "out": tmp_path / "results" / "out",
    } | make(directory, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        predict_file(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_meanwhile(directory: pathlib.Path, tmp_path: pathlib.Path):
    image = image_file(tmp_path / "image.png")
    # A limit on the size of files is the nearest to a full disk that every machine has.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "import runpy; runpy.run_module('evf_sam_jax.predict', run_name='__main__')"
    )
    arguments = [f"--model={directory}", f"--image={image}", "--text=it", f"--out={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"error: --out: cannot write {tmp_path}/out: File too large\n"
    assert sorted(tmp_path.iterdir()) == [image]


# The command itself, as a process.


def command(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "evf_sam_jax.predict", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_predicts_a_turned_photograph_upright(
    directory: pathlib.Path, tmp_path: pathlib.Path
):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees
    Image.fromarray(picture(40, 60)).save(tmp_path / "photo.jpg", exif=exif)
    flags = ["--text", "the red circle", "--text", "the square, on the left"]
    paths = ["--model", directory, "--image", tmp_path / "photo.jpg", "--out", tmp_path / "out"]
    result = command(*paths, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert "'the red circle': " in result.stdout and "the square, on the left" in result.stdout
    files = sorted((tmp_path / "out").iterdir())
    names = ["0_the_red_circle.png", "1_the_square_on_the_left.png", "overlay.png"]
    assert [file.name for file in files] == names
    for path in files:
        with Image.open(path) as file:
            assert file.size == (40, 60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "none", "--image", "none", "--text", "a"], "--out: expected a path"),
        (["--model", "none", "stray"], "expected flags only, found 'stray'"),
        (
            ["--image", "none", "--out", "o", "--model", "m", "--text", "a"],
            "none: expected an image",
        ),
        (["--dtype", "float16"], "--dtype=float16"),
    ],
)
def test_the_command_answers_a_mistake_in_one_line(arguments: list[str], words: str):
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert result.stderr.count("\n") == 1


def test_importing_predict_defines_no_flags():
    assert not hasattr(predict.flags.FLAGS, "text_ids")
