"""Models whose linear layers have 8 bits: which those are, and what they compute."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evf_sam_jax import model_dir
from evf_sam_jax.errors import UserError
from evf_sam_jax.models import evf_sam, quantized
from evf_sam_jax.models.clip import ClipConfig
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.evf_sam import MATRICES
from evf_sam_jax.models.sam2.config import Sam2Config
from evf_sam_jax.models.vilt import ViltConfig
from tests.evf_sam_jax.tiny_experiment import MODEL


@functools.cache
def leaves() -> dict[str, jax.Array]:
    """By path; no bias is zero."""
    params = evf_sam.init_params(MODEL, jax.random.key(0))
    return {path: leaf + 0.01 for path, leaf in model_dir.path_leaves(params).items()}


def quantize(
    model: evf_sam.EvfSamConfig, params: evf_sam.Params, int8: str
) -> tuple[evf_sam.EvfSamConfig, evf_sam.Params]:
    config, store = quantized.quantizer(model, int8)
    flat = model_dir.path_leaves(params)
    return config, model_dir.nest({path: store(path, leaf) for path, leaf in flat.items()})


def params_of_model() -> evf_sam.Params:
    return model_dir.nest(leaves())


def outputs(config: evf_sam.EvfSamConfig, params: evf_sam.Params) -> list[np.ndarray]:
    """The embedding of an image, and the prompts of two phrases, one of them padded."""
    rng = np.random.default_rng(0)
    side, small = config.segmenter.image_size, config.encoder.image_size
    frame = jnp.asarray(rng.integers(0, 256, (1, side, side, 3)), jnp.uint8)
    features = jax.jit(evf_sam.encode_image, static_argnums=0)(
        config, params, frame, jnp.full((1, 2), side)
    )
    image = jnp.asarray(rng.normal(size=(1, small, small, 3)), jnp.float32)
    if config.encoder.family == "vilt":  # whose images say where they are
        image = jnp.concatenate([image, jnp.ones_like(image[..., :1])], axis=-1)
    valid = jnp.asarray([[[True] * 5, [True] * 3 + [False] * 2]])
    ids = jnp.where(valid, jnp.asarray(rng.integers(4, 100, (1, 2, 5)), jnp.int32), 1)
    prompts = jax.jit(evf_sam.encode_phrases, static_argnums=0)(config, params, image, ids, valid)
    return [np.asarray(features.embedding, np.float32), np.asarray(prompts, np.float32)]


def rounded(path: str, leaf: jax.Array) -> jax.Array:
    """A kernel on the grid of 256 values that each of its columns has to itself."""
    is_matrix = re.fullmatch(MATRICES, path) and path.endswith("kernel")
    if not is_matrix or re.search("(patch|vision)_embed/", path):  # which are convolutions
        return leaf
    kernel = np.asarray(leaf)
    scale = np.abs(kernel).max(axis=-2, keepdims=True) / 127.5
    return jnp.asarray(np.clip(np.round(kernel / scale), -128, 127) * scale)


def test_weights_in_8_bits_are_the_model_with_rounded_kernels():
    config, params = quantize(MODEL, params_of_model(), "weights")
    near = model_dir.nest({path: rounded(path, leaf) for path, leaf in leaves().items()})
    for found, expected, exact in zip(
        outputs(config, params),
        outputs(MODEL, near),
        outputs(MODEL, params_of_model()),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(exact).max(), rtol=0)
        assert np.abs(found - exact).max() > 1e-3 * np.abs(exact).max()  # it is rounded at all


def test_kernels_of_linear_layers_have_8_bits_and_nothing_else():
    _, params = quantize(MODEL, params_of_model(), "weights")
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/array/qvalue")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.dtype == jnp.int8
    }
    expected = {path for path, leaf in leaves().items() if rounded(path, leaf) is not leaf}
    assert found == expected


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_inputs_in_8_bits_are_near(dtype: str):
    model = evf_sam.with_dtype(MODEL, dtype)
    config, params = quantize(model, params_of_model(), "weights_and_activations")
    for found, exact in zip(
        outputs(config, params), outputs(MODEL, params_of_model()), strict=True
    ):
        error = np.abs(found - exact).max() / np.abs(exact).max()
        assert 1e-4 < error < 0.06


def test_the_segmenter_alone_can_be_quantised():
    config, params = quantize(MODEL, {"segmenter": params_of_model()["segmenter"]}, "weights")
    assert set(params) == {"segmenter"}
    assert "int8" in str(jax.eval_shape(lambda: params))
    assert config.segmenter == MODEL.segmenter


def test_where_the_image_cls_looks_is_found_in_8_bits_too():
    config, params = quantize(MODEL, params_of_model(), "weights")
    side = MODEL.encoder.image_size
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, side, side, 3)), jnp.float32)
    ids = jnp.full((1, 1, 3), 5)
    near = model_dir.nest({path: rounded(path, leaf) for path, leaf in leaves().items()})
    found, expected = (
        evf_sam.image_cls_attention(model, given, image, ids, ids > 0)
        for model, given in ((config, params), (MODEL, near))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


TOWERS = {
    "sam2": {"segmenter": dataclasses.replace(Sam2Config.tiny(), dtype="float32")},
    "efficient_sam": {"segmenter": EfficientSamConfig.tiny()},
    "clip": {"encoder": ClipConfig.tiny()},
    "vilt": {"encoder": ViltConfig.tiny()},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TOWERS)
def test_towers_of_other_families_can_be_quantised(family: str):
    model = evf_sam.with_dtype(dataclasses.replace(MODEL, **TOWERS[family]), "float32")
    params = evf_sam.init_params(model, jax.random.key(1))
    config, small = quantize(model, params, "weights")
    for found, exact in zip(outputs(config, small), outputs(model, params), strict=True):
        assert np.abs(found - exact).max() < 0.03 * np.abs(exact).max()


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError) as error:
        quantized.quantizer(MODEL, "w4")
    assert str(error.value) == "int8: expected weights or weights_and_activations, found 'w4'"
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="int8: expected qwix, found none"):
        quantized.quantizer(MODEL, "weights")
