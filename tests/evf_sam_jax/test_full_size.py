"""The released model's sizes, stage by stage, against stored outputs of the PyTorch original.

Takes some 25 minutes, 11 GB of disk and 13 GB of memory. `EVF_SAM_GOLDEN_MODEL=DIR` uses a model
directory that was converted from the golden checkpoint before, instead of making one.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import __main__ as convert_command
from convert import evf_sam as evf_sam_table
from convert.table import make_plan
from data_pipelines import image_input, tokenizers
from evf_sam_jax import export, losses, mask_geometry, model_dir
from evf_sam_jax.export_loader import ExportedModel
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.models.sam import image_encoder
from evf_sam_jax.predict import write_masks
from evf_sam_jax.predictor import Job, Predictor
from tests import golden_checkpoint

pytestmark = pytest.mark.slow

GOLDEN = np.load(golden_checkpoint.EVF_SAM / "evf_sam.npz")
EXTRA = np.load(golden_checkpoint.EVF_SAM / "evf_sam_extra.npz")
PHRASES = (0, 1, 2)


def read(number: int) -> np.ndarray:
    return image_input.read_image(golden_checkpoint.EVF_SAM / f"image_{number}.png")


def phrase(number: int) -> list[int]:
    """Token ids of an expression without its padding (id 1)."""
    return [int(i) for i in GOLDEN["input_ids"][number] if i != 1]


def unpack(bits: np.ndarray, *shape: int) -> np.ndarray:
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)


def assert_close(found, expected, bar: float, what: str) -> None:
    worst = float(np.abs(np.asarray(found, np.float32) - expected).max())
    print(f"{what}: max abs difference {worst:.2e} (bar {bar:.0e})")
    assert worst <= bar, what


def assert_same_pixels(found: np.ndarray, expected: np.ndarray, bar: float, what: str) -> None:
    same = float((found == expected).mean())
    print(f"{what}: {100 * same:.4f} % of the pixels equal (bar {100 * bar:.2f} %)")
    assert same >= bar, what


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "EVF_SAM_GOLDEN_MODEL" in os.environ:
        return Path(os.environ["EVF_SAM_GOLDEN_MODEL"])
    folder = tmp_path_factory.mktemp("full_size")
    (folder / "source").mkdir()
    golden_checkpoint.write_evf_sam(folder / "source")
    convert_command.main(["evf-sam", str(folder / "source"), str(folder / "model")])
    for file in (folder / "source").iterdir():
        file.unlink()
    return folder / "model"


@pytest.fixture(scope="module")
def predictor(directory: Path) -> Iterator[Predictor]:
    yield Predictor.load(directory, dtype="float32")


@pytest.fixture(scope="module")
def encoded(predictor: Predictor):
    return predictor.encode(read(0))


def assert_sam_input(image: np.ndarray, golden: np.ndarray, what: str) -> None:
    pixels, size = image_input.sam_input(image)
    found = image_encoder.normalize_and_pad(
        jnp.asarray(pixels[None]), jnp.asarray([size], jnp.int32)
    )
    assert_close(found[0, ::32, ::32].transpose(2, 0, 1), golden, 1e-5, what)


def test_inputs() -> None:
    for number in (0, 1):
        assert_sam_input(read(number), GOLDEN[f"sam_input_{number}"], f"SAM input {number}")
    found = image_input.encoder_input(read(0))[::8, ::8].transpose(2, 0, 1)
    assert_close(found, GOLDEN["evf_input_0"], 1e-5, "BEiT-3 input")


def test_inputs_of_a_large_image() -> None:
    assert_sam_input(read(2), EXTRA["large_sam_input"], "SAM input of the large image")
    found = image_input.encoder_input(read(2))[::8, ::8].transpose(2, 0, 1)
    assert_close(found, EXTRA["large_evf_input"], 1e-5, "BEiT-3 input of the large image")


def test_image_embedding(encoded) -> None:
    found = encoded.features.embedding[0, ::8, ::8].transpose(2, 0, 1)
    assert_close(found, GOLDEN["image_embedding"], 1e-3, "image embedding")


def prompts_of(predictor: Predictor, encoded) -> np.ndarray:
    """Prompts [3,256] of the three expressions, in one padded batch."""
    ids, valid = tokenizers.pad_token_ids([phrase(j) for j in PHRASES], 16)
    encode = jax.jit(evf_sam.encode_phrases, static_argnums=0)
    params = {key: predictor.params[key] for key in ("encoder", "projector")}
    return np.asarray(
        encode(predictor.config, params, encoded.encoder_image, ids[None], valid[None])
    )[0, :, 0]


def test_encoder_tokens_and_prompts(predictor: Predictor, encoded) -> None:
    tokens = jax.jit(evf_sam.encoder_tokens, static_argnums=0)
    for j in PHRASES:
        ids = np.asarray(phrase(j), np.int32)[None, None]
        vision, text = tokens(
            predictor.config,
            {"encoder": predictor.params["encoder"]},
            encoded.encoder_image,
            ids,
            np.ones(ids.shape, bool),
        )
        assert_close(vision[0, 0], GOLDEN[f"beit3_cls_{j}"], 1e-3, f"image [CLS] of phrase {j}")
        if j == 0:
            found = np.concatenate([vision[0], text[0]])[::16]
            assert_close(found, GOLDEN["beit3_tokens"], 1e-3, "BEiT-3 tokens")
    for j, prompt in enumerate(prompts_of(predictor, encoded)):
        assert_close(prompt, GOLDEN[f"prompt_{j}"], 1e-3, f"prompt {j}, padded")


def assert_masks(predictor: Predictor, logits_bar: float, pixels_bar: float) -> None:
    prediction = predictor.predict(read(0), text_ids=[phrase(j) for j in PHRASES])
    for j in PHRASES:
        low_res = prediction.low_res_logits[j, ::2, ::2]
        assert_close(low_res, GOLDEN[f"low_res_masks_{j}"][0], logits_bar, f"logits {j}, low")
        assert_close(prediction.iou[j], GOLDEN[f"iou_{j}"][0], logits_bar, f"estimated IoU {j}")
        logits = prediction.mask_logits[j, ::4, ::4]
        assert_close(logits, GOLDEN[f"mask_logits_{j}"], logits_bar, f"logits {j}")
        golden = unpack(GOLDEN[f"mask_{j}"], 427, 640)
        assert_same_pixels(prediction.masks[j], golden, pixels_bar, f"mask {j}")


def assert_large_image(predictor: Predictor, logits_bar: float, pixels_bar: float) -> None:
    prediction = predictor.predict(read(2), text_ids=[EXTRA["input_ids"].tolist()])
    logits = prediction.mask_logits[0, ::8, ::8]
    assert_close(logits, EXTRA["large_mask_logits"], logits_bar, "logits of the large image")
    golden = unpack(EXTRA["large_mask"], 1300, 1900)
    assert_same_pixels(prediction.masks[0], golden, pixels_bar, "mask of the large image")


def test_masks(predictor: Predictor) -> None:
    assert_masks(predictor, logits_bar=2e-3, pixels_bar=0.9999)


def test_large_image_and_long_phrase(predictor: Predictor) -> None:
    assert_large_image(predictor, logits_bar=2e-3, pixels_bar=0.9999)


def test_a_real_photograph(predictor: Predictor, tmp_path: Path) -> None:
    """All of the command but loading the model a second time."""
    import skimage

    photograph = Path(skimage.__file__).parent / "data" / "astronaut.png"
    image = image_input.read_image(photograph)
    assert image.shape == (512, 512, 3)
    ids = [phrase(0), phrase(1)]
    encoded = predictor.encode(image)
    [decoded] = predictor.decode([Job(encoded, text_ids=ids)])
    masks = write_masks(predictor, decoded, image, ["one", "two"], tmp_path)
    assert len([print(mask.line) for mask in masks]) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0_one.png", "1_two.png", "overlay.png"]
    mask = image_input.read_image(tmp_path / "0_one.png")[..., 0] == 255
    logits = predictor.upsample(encoded, decoded.low_res_logits[0, 0])
    np.testing.assert_array_equal(mask, logits > 0)
    assert 0 < mask.mean() < 1


def test_loss_and_gradients(predictor: Predictor) -> None:
    """Both images in one batch; BEiT-3, projector, mask decoder and `no_mask_embed` train."""
    config = predictor.config
    images = [read(0), read(1)]
    frames, sizes = zip(*map(image_input.sam_input, images), strict=True)
    encode_image = jax.jit(evf_sam.encode_image, static_argnums=0)
    features = encode_image(
        config,
        {"segmenter": predictor.params["segmenter"]},
        np.stack(frames),
        np.asarray(sizes, np.int32),
    )
    ids, valid = (
        jnp.asarray(x.reshape(2, 3, -1))
        for x in tokenizers.pad_token_ids([phrase(j) for j in (0, 1, 2, 3, 3, 3)], 14)
    )
    phrase_valid = np.asarray([[True, True, True], [True, False, False]])
    mask = np.zeros((2, 3, 640, 640), np.uint8)
    mask_valid = np.zeros((2, 640, 640), bool)
    for i, (image, count) in enumerate(zip(images, (3, 1), strict=True)):
        height, width = image.shape[:2]
        mask[i, :count, :height, :width] = unpack(GOLDEN[f"gt_{i}"], count, height, width)
        mask_valid[i, :height, :width] = True

    trains = r"encoder/.*|projector/.*|segmenter/(mask_decoder/.*|prompt_encoder/no_mask_embed)"
    leaves = model_dir.path_leaves(predictor.params)
    trainable = {path: leaf for path, leaf in leaves.items() if re.fullmatch(trains, path)}
    frozen = {
        path: leaf
        for path, leaf in leaves.items()
        if path not in trainable and "image_encoder" not in path
    }
    encoder_images = jnp.asarray(np.stack([image_input.encoder_input(image) for image in images]))

    def loss(trainable):
        params = model_dir.nest({**frozen, **trainable})
        text = evf_sam.encode_phrases(config, params, encoder_images, ids, valid)
        prediction = evf_sam.decode(config, params, features, Prompts(text=text))
        logits = mask_geometry.resample_masks(
            prediction.low_res_logits[:, :, 0],
            jnp.asarray(sizes, jnp.int32),
            jnp.asarray([image.shape[:2] for image in images], jnp.int32),
            (640, 640),
            config.segmenter.image_size,
        )
        bce, dice = losses.bce_and_dice(
            logits, jnp.asarray(mask), jnp.asarray(mask_valid), jnp.asarray(phrase_valid)
        )
        return bce + dice, (bce, dice)

    (total, (bce, dice)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    for name, found in (("loss", total), ("mask_bce_loss", bce), ("mask_dice_loss", dice)):
        relative = abs(float(found) / float(GOLDEN[name]) - 1)
        print(f"{name}: {float(found):.7f}, relative difference {relative:.1e} (bar 1e-4)")
        assert relative <= 1e-4

    shapes = {
        path: leaf.shape
        for path, leaf in model_dir.path_leaves(evf_sam.param_shapes(config)).items()
    }
    plan = make_plan(evf_sam_table.table(config), shapes)
    by_name = {
        part.key: part.transform.to_torch(np.asarray(gradients[path])[part.index])
        for path in gradients
        for part in plan.parts[path]
    }
    golden = dict(zip(GOLDEN["grad_names"].tolist(), GOLDEN["grad_norms"], strict=True))
    everything = float(np.sqrt(sum(float(norm) ** 2 for norm in golden.values())))
    worst = 0.0
    for name, norm in golden.items():
        found = float(np.linalg.norm(by_name[name].astype(np.float64)))
        if norm == 0:
            assert found == 0, f"{name}: expected no gradient, found {found}"
            continue
        bar = 1e-3 * float(norm) + 1e-7 * everything
        worst = max(worst, abs(found - float(norm)) / bar)
        assert abs(found - float(norm)) <= bar, f"{name}: expected {norm}, found {found}"
    print(f"{len(golden)} gradient norms: worst difference {worst:.3f} of the bar")
    never = set(by_name) - set(golden)  # the IoU head, which no loss reaches
    assert all("iou_prediction_head" in name for name in never), never
    assert all(not by_name[name].any() for name in never)
    for key in (key for key in GOLDEN.files if key.startswith("grad:")):
        found = by_name[key.removeprefix("grad:")][::16, ::16]
        assert_close(found, GOLDEN[key], 1e-3 * float(np.abs(GOLDEN[key]).max()), key)


def test_bfloat16(directory: Path, predictor: Predictor) -> None:
    """Within what PyTorch's own bfloat16 reaches on these weights."""
    predictor.params = None  # one copy of the weights at a time
    half = Predictor.load(directory, dtype="bfloat16")
    encoded = half.encode(read(0))
    golden = np.stack([GOLDEN[f"prompt_{j}"] for j in PHRASES])
    closest = min(np.linalg.norm(golden[i] - golden[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    error = np.linalg.norm(prompts_of(half, encoded) - golden, axis=-1).max()
    print(f"prompt error {error:.4f}, smallest distance between golden prompts {closest:.4f}")
    assert error <= closest / 4
    assert_masks(half, logits_bar=0.05, pixels_bar=0.995)
    assert_large_image(half, logits_bar=0.05, pixels_bar=0.995)


def test_an_export(directory: Path, tmp_path: Path) -> None:
    """After the test above, which leaves no other copy of the weights."""
    export.export_model(directory, tmp_path / "export")
    model = ExportedModel.load(tmp_path / "export")
    (tmp_path / "export" / "weights.safetensors").unlink()
    prediction = model.predict_ids(read(0), [phrase(j) for j in PHRASES])
    for j in PHRASES:
        logits = prediction.mask_logits[j, ::4, ::4]
        assert_close(logits, GOLDEN[f"mask_logits_{j}"], 2e-3, f"logits {j}, exported")
        golden = unpack(GOLDEN[f"mask_{j}"], 427, 640)
        assert_same_pixels(prediction.masks[j], golden, 0.9999, f"mask {j}, exported")


def test_config_names_the_released_model(directory: Path) -> None:
    manifest = model_dir.read_manifest(directory)
    assert manifest.variant == "evf-sam"
    assert json.dumps(manifest.config) == json.dumps(evf_sam.EvfSamConfig.evf_sam().to_dict())
    assert manifest.parameter_counts["total"] == 1_315_104_304
