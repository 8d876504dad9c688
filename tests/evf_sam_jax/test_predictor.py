"""Prediction is the model without buckets and tiles, whatever is asked; bad input is refused."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from data_pipelines import image_input
from evf_sam_jax import mask_geometry, model_dir
from evf_sam_jax.errors import UserError
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.interfaces import ImageFeatures, Prompts
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.predictor import Job, Prediction, Predictor
from tests.evf_sam_jax.tiny_model import (
    CONFIG,
    edited,
    picture,
    random_params,
    write_tiny_model,
    write_tiny_segmenter,
)

COMPILATION = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def predictor(directory: Path) -> Predictor:
    return Predictor.load(directory)


compiled_once = functools.partial(jax.jit, compiler_options=evf_sam.RUNS_ONCE)
encode_image = compiled_once(evf_sam.encode_image, static_argnums=0)
encode_phrases = compiled_once(evf_sam.encode_phrases, static_argnums=0)


@compiled_once
def exact(
    params: dict, features: ImageFeatures, encoder_image: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Low-resolution logits [1, 1, l, l] and IoU of one phrase, unpadded."""
    text = evf_sam.encode_phrases(CONFIG, params, encoder_image, ids, jnp.ones(ids.shape, bool))
    prediction = evf_sam.decode(CONFIG, params, features, Prompts(text=text))
    return prediction.low_res_logits[:, :, 0], prediction.iou[0, 0, 0]


@pytest.mark.parametrize("size", [(37, 53), (600, 1100), (513, 1), (1, 1)])
def test_tiles_and_buckets_change_nothing(predictor: Predictor, size: tuple[int, int]):
    image = picture(*size)
    text_ids = [[0, 5, 9, 2], [0, *range(4, 24), 2], [0, 7, 7, 2], [0, 8, 7, 2]]
    prediction = predictor.predict(image, text_ids=text_ids)
    assert prediction.mask_logits.shape == prediction.masks.shape == (4, *size)
    sam_image, sam_size = image_input.sam_input(image, CONFIG.segmenter.image_size)
    encoder_image = image_input.encoder_input(image, CONFIG.encoder.image_size)
    sam_sizes, sizes = jnp.array([sam_size]), jnp.array([size])
    features = encode_image(CONFIG, predictor.params, sam_image[None], sam_sizes)
    for number, ids in enumerate(text_ids):
        low_res_logits, iou = exact(
            predictor.params, features, jnp.array(encoder_image[None]), jnp.array([[ids]])
        )
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
    texts = ["the red circle", "the small blue square left of it" * 2, "the largest", "it"]
    by_texts = predictor.predict(picture(40, 30), texts=texts)
    ids = [predictor.tokenizer.encode(text) for text in texts]
    by_ids = predictor.predict(picture(40, 30), text_ids=ids)
    np.testing.assert_array_equal(by_texts.mask_logits, by_ids.mask_logits)


def test_more_phrases_than_a_bucket_holds(predictor: Predictor):
    text_ids = [[0, *range(4 + i, 14 + i), 2] for i in range(17)]
    together = predictor.predict(picture(20, 30), text_ids=text_ids)
    assert together.mask_logits.shape == (17, 20, 30)
    for number in (0, 15, 16):
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


def test_each_bucket_is_compiled_once_and_no_image_size_is(compilations: list[str]):
    # A frame that no other test has, so that nothing is compiled already.
    segmenter = dataclasses.replace(CONFIG.segmenter, image_size=80, depth=2, decoder_depth=1)
    encoder = dataclasses.replace(CONFIG.encoder, layers=2)
    config = dataclasses.replace(CONFIG, segmenter=segmenter, encoder=encoder)
    fresh = Predictor(config, model_dir.nest(random_params(config)))
    compilations.clear()

    def compiled(size: tuple[int, int], *lengths: int, **more: object) -> int:
        before = len(compilations)
        text_ids = [[5] * length for length in lengths] or None
        fresh.predict(picture(*size), text_ids=text_ids, **more)
        return len(compilations) - before

    fresh.warm_up()
    assert len(compilations) == 4, "image encoder, phrase encoder, decoder, tile"
    assert compiled((31, 40), 5) == 0
    assert compiled((900, 1300), 16) == 0
    assert compiled((5, 2000), 2) == 0
    assert compiled((30, 40), 17) == 1, "more tokens: the phrase encoder"
    assert compiled((77, 40), 20, 3, 4, 5) == 2, "more phrases: phrase encoder and decoder"
    assert compiled((78, 50), 3, 30, 4, 5) == 0
    assert compiled((77, 40), 3, 3, 4, 5, 20) == 1, "four phrases of few tokens, and one of more"
    assert compiled((20, 30), boxes=[[1, 2, 3, 4]]) == 1, "boxes: a decoder of their own"
    point = {"points": [[[9, 9]]], "point_labels": [[1]]}
    assert compiled((20, 40), **point) == 0, "a point takes no more places than a box"
    points = {"points": [[[9, 9], [3, 3], [2, 1]]], "point_labels": [[1, 0, 0]]}
    assert compiled((20, 30), **points) == 1, "three points, and the one that is no box"
    points = {"points": [[[9, 9], [3, 3]]], "point_labels": [[1, 0]], "boxes": [[1, 2, 3, 4]]}
    assert compiled((20, 40), **points) == 0
    image, other = picture(20, 30), picture(30, 20)
    before = len(compilations)
    list(fresh.predict_batch([Job(image, text_ids=[[5]]), Job(other, text_ids=[[6]] * 3)]))
    assert len(compilations) - before == 1, "two images: the image encoder"


def test_bfloat16_is_near_float32_and_keeps_norms_and_positions_exact(
    directory: Path, predictor: Predictor
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


def write(path: Path, params: dict, manifest: model_dir.Manifest) -> Path:
    model_dir.write_model_dir(path, params, manifest)
    return path


def test_a_directory_of_half_precision_weights_gives_a_float32_model(
    directory: Path, tmp_path: Path
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


IMAGE = picture(40, 60)
POINTS = {"points": [[[10, 20], [59.5, 0]]], "point_labels": [[1, 0]]}
BOX = {"boxes": [[5, 6.5, 60, 40]]}
LOW = CONFIG.segmenter.low_res_size
MASK = {"mask_logits": np.random.default_rng(1).normal(size=(1, LOW, LOW)).astype(np.float32)}
ASKED: dict[str, dict] = {
    "text and points": {"text_ids": [[0, 5, 9, 2]], **POINTS},
    "box": BOX,
    "points and box": POINTS | BOX,
    "everything": {"text_ids": [[0, 5, 9, 2]], **POINTS, **BOX, **MASK, "multimask": True},
}


@compiled_once
def decode_each(params: dict, features: ImageFeatures, asked: dict[str, Prompts]) -> dict:
    """The masks of each of `asked`, of exactly the tokens that it needs."""
    return {
        name: evf_sam.decode(CONFIG, params, features, prompts, "multimask" in ASKED[name])
        for name, prompts in asked.items()
    }


@pytest.fixture(scope="module")
def expected(predictor: Predictor) -> dict:
    """What the model gives for `ASKED`, with coordinates brought to the frame by hand."""
    sam_image, (height, width) = image_input.sam_input(IMAGE, CONFIG.segmenter.image_size)
    encoder_image = image_input.encoder_input(IMAGE, CONFIG.encoder.image_size)
    features = encode_image(CONFIG, predictor.params, sam_image[None], jnp.array([[height, width]]))
    ids = jnp.asarray([[[0, 5, 9, 2]]])
    text = encode_phrases(
        CONFIG, predictor.params, encoder_image[None], ids, jnp.ones(ids.shape, bool)
    )
    scale = np.asarray([width / IMAGE.shape[1], height / IMAGE.shape[0]])
    asked: dict[str, Prompts] = {}
    for name, given in ASKED.items():
        prompt = {"text": text} if "text_ids" in given else {}
        if "points" in given:
            prompt["points"] = np.float32(np.asarray(given["points"]) * scale)[None]
            prompt["point_labels"] = np.asarray(given["point_labels"], np.int32)[None]
        if "boxes" in given:
            box = np.asarray(given["boxes"]) * np.concatenate([scale, scale])[None]
            prompt["boxes"] = np.float32(box)[None]
        if "mask_logits" in given:
            prompt["mask"] = given["mask_logits"][None]
        asked[name] = Prompts(**jax.device_put(prompt))
    return decode_each(predictor.params, features, asked)


close = functools.partial(np.testing.assert_allclose, atol=2e-5)


def test_prompts_of_all_kinds_in_one_batch_are_what_each_is_alone(
    predictor: Predictor, expected: dict
):
    predictions = list(predictor.predict_batch([Job(IMAGE, **given) for given in ASKED.values()]))
    for name, prediction in zip(ASKED, predictions, strict=True):
        shape = (1, 3) if name == "everything" else (1,)
        assert prediction.masks.shape == (*shape, 40, 60), name
        assert prediction.iou.shape == prediction.no_target.shape == shape
        logits = prediction.low_res_logits.reshape(1, -1, LOW, LOW)
        close(logits, expected[name].low_res_logits[0])
        close(prediction.iou.reshape(1, -1), expected[name].iou[0])
    largest = np.stack([prediction.low_res_logits for prediction in predictions[:3]])
    assert np.ptp(largest, axis=0).max() > 1e-3, "what is asked must matter"


def test_prompts_of_one_image_may_differ_in_points(predictor: Predictor, expected: dict):
    nowhere = [np.nan, 1e9]
    prediction = predictor.predict(
        IMAGE,
        points=[[[10, 20], [59.5, 0]], [nowhere, nowhere]],
        point_labels=[[1, 0], [-1, -1]],
        boxes=BOX["boxes"] * 2,
    )
    for number, name in enumerate(("points and box", "box")):
        close(prediction.low_res_logits[number], expected[name].low_res_logits[0, 0, 0])


def test_images_of_a_batch_do_not_mix(predictor: Predictor):
    images = [picture(20 + 7 * i, 50 - 3 * i, seed=i) for i in range(3)]
    phrases = [[[0, 4 + i, 9, 2]] * (1 + 12 * (i % 2)) for i in range(3)]
    jobs = [Job(image, text_ids=ids) for image, ids in zip(images, phrases, strict=True)]
    for job, together in zip(jobs, predictor.predict_batch(jobs), strict=True):
        alone = predictor.predict(job.image, text_ids=job.text_ids)
        assert together.mask_logits.shape == alone.mask_logits.shape
        close(together.mask_logits, alone.mask_logits)


def test_jobs_share_the_encoding_of_an_image(predictor: Predictor):
    asked = POINTS | BOX
    jobs = [Job(IMAGE, text_ids=[[5]]), Job(IMAGE, **asked), Job(IMAGE.copy(), **asked)]
    first, second, other = predictor.decode(jobs)
    assert first.image is second.image and other.image is not first.image
    close(other.low_res_logits, second.low_res_logits)
    again = predictor.predict(first.image, text_ids=[[5]])
    close(again.low_res_logits, first.low_res_logits[:, 0])


def test_no_target_counts_positive_pixels(predictor: Predictor):
    masks = np.zeros((2, 3, 10, 20), bool)
    masks[0, 0, :5, :10] = masks[1, 2, :7, :7] = True
    logits, iou = np.where(masks, 1.0, -1.0).astype(np.float32), np.zeros((2, 3), np.float32)
    prediction = Prediction(logits, masks, iou, low_res_logits=logits[..., :10])
    expected = [[False, True, True], [True, True, True]]
    np.testing.assert_array_equal(prediction.no_target, expected)
    found = predictor.predict(IMAGE, text_ids=[[0, 5, 2]], no_target_pixels=40 * 60 + 1)
    assert found.no_target.tolist() == [True]
    found = predictor.predict(IMAGE, text_ids=[[0, 5, 2]], no_target_pixels=0)
    assert found.no_target.tolist() == [False]


@pytest.mark.parametrize("size", [(40, 60), (3, 500), (1, 1)])
def test_an_attention_map_lies_on_the_image(predictor: Predictor, size: tuple[int, int]):
    image = picture(*size)
    attention = predictor.attention_map(image, [0, 5, 9, 2])
    assert attention.shape == size and attention.dtype == np.float32
    assert 0 < attention.min() <= attention.max() < CONFIG.encoder.heads
    if min(size) > 8:
        other = predictor.attention_map(predictor.encode(image), [0, 6, 2])
        assert np.abs(attention - other).max() > 1e-4, "the phrase must matter"


def test_an_attention_map_is_the_patches_stretched(predictor: Predictor):
    side = CONFIG.encoder.image_size // CONFIG.encoder.patch_size
    encoder_image = image_input.encoder_input(IMAGE, CONFIG.encoder.image_size)[None]
    ids = jnp.asarray([[[0, 5, 9, 2]]])
    attend = compiled_once(evf_sam.image_cls_attention, static_argnums=0)
    patches = attend(CONFIG, predictor.params, encoder_image, ids, jnp.ones(ids.shape, bool))
    patches = np.asarray(patches)[0, 0]
    attention = predictor.attention_map(IMAGE, [0, 5, 9, 2])
    # Where a pixel's centre is a patch's centre, nothing is interpolated.
    rows = [int((i + 0.5) * 40 / side) for i in range(side)]
    columns = [int((i + 0.5) * 60 / side) for i in range(side)]
    found = np.asarray([[attention[y, x] for x in columns] for y in rows])
    assert np.abs(found - patches).max() < 0.2 * np.ptp(patches)
    assert np.unravel_index(found.argmax(), found.shape) == np.unravel_index(
        patches.argmax(), patches.shape
    )


def test_an_encoder_without_an_image_attends_to_none(predictor: Predictor):
    encoder = dataclasses.replace(CONFIG.encoder, fusion="text", readout="text_cls")
    blind = Predictor(dataclasses.replace(CONFIG, encoder=encoder), predictor.params)
    with pytest.raises(UserError, match="expected an encoder that sees the image"):
        blind.attention_map(IMAGE, [5])


BAD_PROMPTS: dict[str, tuple[dict, str]] = {
    "labels alone": ({"point_labels": [[1]]}, "found point_labels alone"),
    "points alone": ({"points": [[[1, 1]]]}, "found points alone"),
    "one point unwrapped": (
        {"points": [1, 2], "point_labels": [1]},
        r"points: expected numbers \[any, any, 2\], found shape \[2\]",
    ),
    "ragged points": (
        {"points": [[[1, 2]], [[1, 2], [3, 4]]], "point_labels": [[1], [1]]},
        "points: expected an array of numbers",
    ),
    "words": ({"boxes": [["a", "b", "c", "d"]]}, "boxes: expected an array of numbers"),
    "NaN": (
        {"points": [[[1, float("nan")]]], "point_labels": [[1]]},
        "points: expected finite numbers, found nan in prompt 0",
    ),
    "infinite box": ({"boxes": [[0, 0, np.inf, 1]]}, "boxes: expected finite numbers, found inf"),
    "point outside": (
        {"points": [[[1, 1]], [[60, 3]]], "point_labels": [[1], [1]]},
        r"points: expected pixels of an image of 60 x 40, found \(60, 3\) in prompt 1",
    ),
    "box outside": (
        {"boxes": [[0, 0, 61, 3]]},
        r"boxes: expected x0 < x1 .* an image of 60 x 40, found \(0, 0, 61, 3\) in prompt 0",
    ),
    "box inside out": ({"boxes": [[9, 0, 3, 3]]}, r"found \(9, 0, 3, 3\)"),
    "unknown label": ({"points": [[[1, 1]]], "point_labels": [[2]]}, "point_labels: .* found 2"),
    "labels of other points": (
        {"points": [[[1, 1]]], "point_labels": [[1, 1]]},
        "expected a label a point",
    ),
    "too many points": (
        {"points": [[[1, 1]] * 32], "point_labels": [[1] * 32]},
        "at most 31 a prompt, found 32",
    ),
    "other numbers": (
        {"text_ids": [[5], [6]], "boxes": [[0, 0, 1, 1]]},
        "expected as many of each kind, found 2 phrases, 1 boxes",
    ),
    "nothing in a prompt": (
        {"points": [[[1, 1]], [[1, 1]]], "point_labels": [[1], [-1]]},
        "found none in prompt 1",
    ),
    "no box": ({"boxes": np.zeros((0, 4))}, "expected at least one prompt, found none"),
    "mask of another size": ({"mask_logits": np.zeros((1, 3, 3))}, "mask_logits: expected numbers"),
    "mask of NaN": (
        {"mask_logits": np.full((1, LOW, LOW), np.nan)},
        "mask_logits: expected finite numbers, found nan",
    ),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_prompts_that_cannot_be_used(predictor: Predictor, case: str):
    arguments, words = BAD_PROMPTS[case]
    with pytest.raises(UserError, match=words):
        predictor.predict(IMAGE, **arguments)


def test_text_for_a_model_without_a_tokenizer(predictor: Predictor):
    mute = Predictor(CONFIG, predictor.params)
    with pytest.raises(UserError, match="no tokenizer files: expected token ids instead"):
        mute.predict(IMAGE, texts=["the circle"])


def test_an_image_without_pixels(predictor: Predictor):
    with pytest.raises(
        UserError, match=r"uint8 pixels \[height, width, 3\], found uint8 \[0, 5, 3\]"
    ):
        predictor.predict(np.zeros((0, 5, 3), np.uint8), text_ids=[[5]])


def test_an_unknown_dtype(directory: Path):
    with pytest.raises(UserError, match="expected float32 or bfloat16, found 'float16'"):
        Predictor.load(directory, dtype="float16")


def test_a_directory_without_a_tower(directory: Path, tmp_path: Path):
    config = {"segmenter": CONFIG.to_dict()["segmenter"]}
    path = edited(directory, tmp_path / "sam", config=config)
    with pytest.raises(
        UserError, match="expected a whole EVF-SAM model, found one without encoder"
    ):
        Predictor.load(path)


def test_a_segmenter_alone_takes_all_prompts_but_phrases(tmp_path: Path):
    config = dataclasses.replace(CONFIG, segmenter=Sam2Config.tiny())
    alone = Predictor.load_segmenter(write_tiny_segmenter(tmp_path / "alone", config.segmenter))
    whole = Predictor.load(write_tiny_model(tmp_path / "whole", config))
    assert alone.params.keys() == {"segmenter"}
    low = config.segmenter.low_res_size
    mask = np.random.default_rng(1).normal(size=(1, low, low)).astype(np.float32)
    for asked in (BOX, POINTS, POINTS | BOX | {"mask_logits": mask, "multimask": True}):
        found, expected = (one.predict(IMAGE, **asked) for one in (alone, whole))
        np.testing.assert_array_equal(found.mask_logits, expected.mask_logits)
    side = config.segmenter.image_size
    sam_image = image_input.stretched_input(IMAGE, side)
    features = encode_image(config, alone.params, sam_image[None], jnp.array([[side, side]]))
    boxes = np.float32(np.asarray(BOX["boxes"]) * ([side / 60, side / 40] * 2))[None]
    exact = compiled_once(evf_sam.decode, static_argnums=0)
    direct = exact(config, alone.params, features, Prompts(boxes=jnp.asarray(boxes)))
    found = alone.predict(IMAGE, **BOX).low_res_logits  # of up to 17; other tokens are filled up
    close(found, direct.low_res_logits[0, :, 0], rtol=1e-5, atol=5e-5)
    phrases = "expected points, boxes or masks for a segmenter alone, found phrases"
    for ask in (
        lambda: alone.predict(IMAGE, texts=["it"]),
        lambda: alone.predict(IMAGE, text_ids=[[5]], **BOX),
        lambda: alone.attention_map(IMAGE, [5]),
        alone.warm_up,
    ):
        with pytest.raises(UserError, match=phrases):
            ask()


def test_of_a_whole_model_the_segmenter_alone_can_be_loaded(tmp_path: Path):
    config = dataclasses.replace(CONFIG, segmenter=Sam2Config.tiny(), profile="legacy")
    path = write_tiny_model(tmp_path / "whole", config)
    alone = Predictor.load_segmenter(path, dtype="bfloat16")
    assert alone.params.keys() == {"segmenter"} and alone.config.profile == "legacy"
    expected = Predictor.load(path, dtype="bfloat16").predict(IMAGE, **BOX)
    np.testing.assert_array_equal(alone.predict(IMAGE, **BOX).mask_logits, expected.mask_logits)


def test_a_directory_without_a_segmenter(directory: Path, tmp_path: Path):
    config = {"encoder": CONFIG.to_dict()["encoder"]}
    path = edited(directory, tmp_path / "beit3", config=config)
    with pytest.raises(UserError, match="expected a model with a segmenter, found one without"):
        Predictor.load_segmenter(path)


def test_a_segmenter_whose_parameters_are_not_its_configs(tmp_path: Path):
    path = write_tiny_segmenter(tmp_path / "alone", CONFIG.segmenter)
    config = {"segmenter": CONFIG.to_dict()["segmenter"] | {"mask_channels": 8}}
    other = edited(path, tmp_path / "other", config=config)
    with pytest.raises(UserError, match="parameter segmenter/prompt_encoder/.* by the config"):
        Predictor.load_segmenter(other)


def test_a_directory_whose_parameters_are_not_its_configs(directory: Path, tmp_path: Path):
    config = CONFIG.to_dict()
    config["encoder"]["vocab_size"] += 1
    path = edited(directory, tmp_path / "model", config=config)
    with pytest.raises(
        UserError, match=r"embedding: expected shape \(129, 64\).*found shape \(128, 64\)"
    ):
        Predictor.load(path)
