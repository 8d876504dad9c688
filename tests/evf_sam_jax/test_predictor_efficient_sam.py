"""Predicting with a segmenter that images are stretched for, and that knows fewer prompts."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.image_input import sam_input, stretched_input
from evf_sam_jax.errors import UserError
from evf_sam_jax.mask_geometry import resample_masks
from evf_sam_jax.models import evf_sam
from evf_sam_jax.models.efficient_sam.config import EfficientSamConfig
from evf_sam_jax.models.interfaces import Prompts
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax.tiny_model import CONFIG, picture, write_tiny_model

IMAGE = picture(20, 30)
SIZE = (20, 30)
POINTS = {"points": [[[3, 4], [27, 11]]], "point_labels": [[1, 1]]}
BOX = {"boxes": [[2, 3, 25, 18]]}
SIDE = EfficientSamConfig.tiny().image_size


def load(profile: str, path: Path) -> Predictor:
    config = dataclasses.replace(CONFIG, segmenter=EfficientSamConfig.tiny(), profile=profile)
    return Predictor.load(write_tiny_model(path / "tiny", config), dtype="float32")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load("current", tmp_path_factory.mktemp("current"))


def expected_logits(predictor: Predictor, prompts: Prompts) -> np.ndarray:
    """The masks [k, h, w] of prompts in the frame, by the model's own functions."""
    config, params = predictor.config, {"segmenter": predictor.params["segmenter"]}
    if config.profile == "legacy":
        pixels, size = sam_input(IMAGE, SIDE)
    else:
        pixels, size = stretched_input(IMAGE, SIDE), (SIDE, SIDE)
    sizes = jnp.asarray([size], jnp.int32)

    @jax.jit
    def masks(params, pixels, prompts):
        features = evf_sam.encode_image(config, params, pixels, sizes)
        return evf_sam.decode(config, params, features, prompts).low_res_logits[:, :, 0]

    low_res = masks(params, jnp.asarray(pixels[None]), prompts)
    return np.asarray(resample_masks(low_res, sizes, jnp.asarray([SIZE]), SIZE, None))[0]


@pytest.mark.parametrize(
    ("profile", "given"), [("current", POINTS | BOX), ("legacy", POINTS)], ids=evf_sam.PROFILES
)
def test_points_and_boxes_are_stretched_with_the_image(profile: str, given: dict, tmp_path: Path):
    predictor = load(profile, tmp_path)
    scale = np.asarray([SIDE / SIZE[1], SIDE / SIZE[0]])
    points = jnp.asarray(np.asarray(POINTS["points"]) * scale, jnp.float32)[None]
    boxes = jnp.asarray((np.reshape(BOX["boxes"], (2, 2)) * scale).reshape(1, 1, 4), jnp.float32)
    prompts = Prompts(
        points=points,
        point_labels=jnp.asarray(POINTS["point_labels"])[None],
        boxes=boxes if "boxes" in given else None,
    )
    found = predictor.predict(IMAGE, **given).mask_logits
    assert found.shape == (1, *SIZE)
    np.testing.assert_allclose(found, expected_logits(predictor, prompts), atol=1e-4)


def test_phrases_and_clicks_go_together(predictor: Predictor):
    apart = predictor.predict(IMAGE, texts=["red circle"])
    together = predictor.predict(IMAGE, texts=["red circle"], **POINTS)
    assert np.abs(apart.mask_logits - together.mask_logits).max() > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_logits": np.zeros((1, 32, 32))}, "mask_logits: expected none, as efficient_sam"),
        (
            {"points": [[[3, 4], [5, 6]]], "point_labels": [[1, 0]]},
            "point_labels: expected 1 .inside., the only ones of efficient_sam; found 0",
        ),
    ],
)
def test_prompts_that_it_does_not_know(predictor: Predictor, given: dict, message: str):
    with pytest.raises(UserError, match=message):
        predictor.predict(IMAGE, **given)
