"""Comparing a full-size model with stored outputs of the PyTorch original, stage by stage.

`tests/golden/evf_sam/README.md` says what the files hold.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from convert import evf_sam as evf_sam_table
from convert.table import make_plan
from convert.to_model_dir import leaf_shapes
from data_pipelines import image_input, tokenizers
from data_pipelines.batch import Batch
from evf_sam_jax import losses, mask_geometry, model_dir
from evf_sam_jax.models import beit3, evf_sam
from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.predictor import EncodedImage, Predictor
from tests import golden_checkpoint

Golden = Mapping[str, np.ndarray]

PHRASES = (0, 1, 2)
CANVAS = (640, 640)


def read(number: int) -> np.ndarray:
    return image_input.read_image(golden_checkpoint.EVF_SAM / f"image_{number}.png")


def phrase(golden: Golden, number: int) -> list[int]:
    """Token ids of an expression without its padding (id 1)."""
    return [int(i) for i in golden["input_ids"][number] if i != 1]


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


def prompts_of(predictor: Predictor, encoded: EncodedImage, golden: Golden) -> np.ndarray:
    """Prompts [3,256] of the three expressions, in one padded batch."""
    ids, valid = tokenizers.pad_token_ids([phrase(golden, j) for j in PHRASES], 16)
    encode = jax.jit(evf_sam.encode_phrases, static_argnums=0)
    params = {key: predictor.params[key] for key in ("encoder", "projector")}
    return np.asarray(
        encode(predictor.config, params, encoded.encoder_image, ids[None], valid[None])
    )[0, :, 0]


def assert_tokens_and_prompts(
    predictor: Predictor, encoded: EncodedImage, golden: Golden, bar: float
) -> None:
    """BEiT-3's tokens of each expression alone, and the prompts of all of them together."""
    tokens = jax.jit(beit3.final_tokens, static_argnums=0)
    for j in PHRASES:
        ids = np.asarray(phrase(golden, j), np.int32)[None, None]
        vision, text = tokens(
            predictor.config.encoder,
            predictor.params["encoder"],
            encoded.encoder_image,
            ids,
            np.ones(ids.shape, bool),
        )
        assert_close(vision[0, 0], golden[f"beit3_cls_{j}"], bar, f"image [CLS] of phrase {j}")
        if j == 0:
            found = np.concatenate([vision[0], text[0]])[::16]
            assert_close(found, golden["beit3_tokens"], bar, "BEiT-3 tokens")
    for j, prompt in enumerate(prompts_of(predictor, encoded, golden)):
        assert_close(prompt, golden[f"prompt_{j}"], bar, f"prompt {j}, padded")


def assert_masks(
    predictor: Predictor, golden: Golden, logits_bar: float, pixels_bar: float
) -> None:
    """Masks of the first image, where the decoder gives one a prompt."""
    prediction = predictor.predict(read(0), text_ids=[phrase(golden, j) for j in PHRASES])
    for j in PHRASES:
        low_res = prediction.low_res_logits[j, ::2, ::2]
        assert_close(low_res, golden[f"low_res_masks_{j}"][0], logits_bar, f"logits {j}, low")
        assert_close(prediction.iou[j], golden[f"iou_{j}"][0], logits_bar, f"estimated IoU {j}")
        logits = prediction.mask_logits[j, ::4, ::4]
        assert_close(logits, golden[f"mask_logits_{j}"], logits_bar, f"logits {j}")
        expected = unpack(golden[f"mask_{j}"], 427, 640)
        assert_same_pixels(prediction.masks[j], expected, pixels_bar, f"mask {j}")


def assert_extra(
    predictor: Predictor,
    extra: Golden,
    what: str,
    number: int,
    logits_bar: float,
    pixels_bar: float,
) -> None:
    """The mask of the long phrase.

    Args:
      what: the outputs' name.
      number: of the image.
    """
    image = read(number)
    prediction = predictor.predict(image, text_ids=[extra["input_ids"].tolist()])
    step = 4 if number == 0 else 8
    logits = prediction.mask_logits[0, ::step, ::step]
    assert_close(logits, extra[f"{what}_mask_logits"], logits_bar, f"{what}: logits")
    expected = unpack(extra[f"{what}_mask"], *image.shape[:2])
    assert_same_pixels(prediction.masks[0], expected, pixels_bar, f"{what}: mask")


def training_batch(predictor: Predictor, golden: Golden) -> Batch:
    """Both images, with three expressions and one, on a canvas that is larger than either."""
    images, counts = [read(0), read(1)], (3, 1)
    frames, sizes = zip(*map(predictor.images.segmenter, images), strict=True)
    texts = [phrase(golden, j) for j in (0, 1, 2, 3, 3, 3)]
    ids, valid = (x.reshape(2, 3, -1) for x in tokenizers.pad_token_ids(texts, 14))
    mask, mask_valid = np.zeros((2, 3, *CANVAS), np.uint8), np.zeros((2, *CANVAS), bool)
    for i, (image, count) in enumerate(zip(images, counts, strict=True)):
        height, width = image.shape[:2]
        mask[i, :count, :height, :width] = unpack(golden[f"gt_{i}"], count, height, width)
        mask_valid[i, :height, :width] = True
    return Batch(
        sam_image=np.stack(frames),
        sam_size=np.asarray(sizes, np.int32),
        encoder_image=np.stack([predictor.images.encoder(image) for image in images]),
        text_ids=ids,
        text_valid=valid,
        phrase_valid=np.arange(3)[None] < np.asarray(counts)[:, None],
        mask=mask,
        mask_valid=mask_valid,
        original_size=np.asarray([image.shape[:2] for image in images], np.int32),
        example_id=np.arange(2, dtype=np.int32),
        example_valid=np.ones(2, bool),
        skipped_id=np.full(2, -1, np.int32),
    )


def assert_loss_and_gradients(
    predictor: Predictor, golden: Golden, trains: str, losses_bar: float = 1e-4
) -> None:
    """Losses, and the norm of every parameter's gradient.

    Args:
      trains: paths of what trains, a regular expression.
    """
    encoder = dataclasses.replace(predictor.config.encoder, remat=True)  # gigabytes less
    config = dataclasses.replace(predictor.config, encoder=encoder)
    batch = jax.tree.map(jnp.asarray, training_batch(predictor, golden))
    encode_image = jax.jit(evf_sam.encode_image, static_argnums=0)
    features = encode_image(
        config, {"segmenter": predictor.params["segmenter"]}, batch.sam_image, batch.sam_size
    )
    leaves = model_dir.path_leaves(predictor.params)
    trainable = {path: leaf for path, leaf in leaves.items() if re.fullmatch(trains, path)}
    frozen = {
        path: leaf
        for path, leaf in leaves.items()
        if path not in trainable and "image_encoder" not in path
    }

    def loss(trainable):
        params = model_dir.nest({**frozen, **trainable})
        text = evf_sam.encode_phrases(
            config, params, batch.encoder_image, batch.text_ids, batch.text_valid
        )
        prediction = evf_sam.decode(config, params, features, Prompts(text=text))
        logits = mask_geometry.resample_masks(
            prediction.low_res_logits[:, :, 0],
            batch.sam_size,
            batch.original_size,
            CANVAS,
            evf_sam.padded_frame(config),
        )
        bce, dice = losses.bce_and_dice(logits, batch.mask, batch.mask_valid, batch.phrase_valid)
        return bce + dice, (bce, dice)

    (total, (bce, dice)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    for name, found in (("loss", total), ("mask_bce_loss", bce), ("mask_dice_loss", dice)):
        relative = abs(float(found) / float(golden[name]) - 1)
        bar = f"(bar {losses_bar:.0e})"
        print(f"{name}: {float(found):.7f}, relative difference {relative:.1e} {bar}")
        assert relative <= losses_bar
    assert_gradients(config, gradients, golden)


def by_name(config: evf_sam.EvfSamConfig, leaves: Golden) -> dict[str, np.ndarray]:
    """Some leaves of the model ('/'-path -> array) as the original's tensors."""
    plan = make_plan(evf_sam_table.table(config), leaf_shapes(config.to_dict()))
    return {
        part.key: part.transform.to_torch(np.asarray(leaves[path])[part.index])
        for path in leaves
        for part in plan.parts[path]
    }


def assert_gradients(config: evf_sam.EvfSamConfig, gradients: Golden, golden: Golden) -> None:
    """The norms of all gradients, and some gradients themselves."""
    found_by_name = by_name(config, gradients)
    norms = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"], strict=True))
    everything = float(np.sqrt(sum(float(norm) ** 2 for norm in norms.values())))
    worst = 0.0
    for name, norm in norms.items():
        found = float(np.linalg.norm(found_by_name[name].astype(np.float64)))
        if norm == 0:
            assert found == 0, f"{name}: expected no gradient, found {found}"
            continue
        bar = 1e-3 * float(norm) + 1e-7 * everything
        worst = max(worst, abs(found - float(norm)) / bar)
        assert abs(found - float(norm)) <= bar, f"{name}: expected {norm}, found {found}"
    print(f"{len(norms)} gradient norms: worst difference {worst:.3f} of the bar")
    never = set(found_by_name) - set(norms)  # the IoU head, which no loss reaches
    assert all("iou_prediction_head" in name for name in never), never
    assert all(not found_by_name[name].any() for name in never)
    for key in (key for key in golden if key.startswith("grad:")):
        found = found_by_name[key.removeprefix("grad:")][::16, ::16]
        assert_close(found, golden[key], 1e-3 * float(np.abs(golden[key]).max()), key)
