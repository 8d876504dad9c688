"""The released model's sizes, stage by stage, against stored outputs of the PyTorch original.

Takes some 25 minutes, 11 GB of disk and 13 GB of memory. `EVF_SAM_GOLDEN_MODEL=DIR` uses a model
directory that was converted from the golden checkpoint before, with a tokenizer, instead of making
one.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert import __main__ as convert_command
from data_pipelines import image_input
from evf_sam_jax import export, model_dir
from evf_sam_jax.export_loader import ExportedModel
from evf_sam_jax.models.released import RELEASED
from evf_sam_jax.models.sam import image_encoder
from evf_sam_jax.predict import write_masks
from evf_sam_jax.predictor import Job, Predictor
from tests import golden_checkpoint
from tests.evf_sam_jax import golden_outputs
from tests.evf_sam_jax.golden_outputs import (
    PHRASES,
    assert_close,
    assert_same_pixels,
    phrase,
    read,
    unpack,
)
from tests.evf_sam_jax.tiny_model import TOKENIZER

pytestmark = pytest.mark.slow

GOLDEN = np.load(golden_checkpoint.EVF_SAM / "evf_sam.npz")
EXTRA = np.load(golden_checkpoint.EVF_SAM / "evf_sam_extra.npz")
TRAINS = r"encoder/.*|projector/.*|segmenter/(mask_decoder/.*|prompt_encoder/no_mask_embed)"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "EVF_SAM_GOLDEN_MODEL" in os.environ:
        return Path(os.environ["EVF_SAM_GOLDEN_MODEL"])
    folder = tmp_path_factory.mktemp("full_size")
    shutil.copytree(TOKENIZER, folder / "source")
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


def test_encoder_tokens_and_prompts(predictor: Predictor, encoded) -> None:
    golden_outputs.assert_tokens_and_prompts(predictor, encoded, GOLDEN, 1e-3)


def test_masks(predictor: Predictor) -> None:
    golden_outputs.assert_masks(predictor, GOLDEN, logits_bar=2e-3, pixels_bar=0.9999)


def test_large_image_and_long_phrase(predictor: Predictor) -> None:
    golden_outputs.assert_extra(predictor, EXTRA, "large", 2, logits_bar=2e-3, pixels_bar=0.9999)


def test_a_real_photograph(predictor: Predictor, tmp_path: Path) -> None:
    """All of the command but loading the model a second time."""
    import skimage

    photograph = Path(skimage.__file__).parent / "data" / "astronaut.png"
    image = image_input.read_image(photograph)
    assert image.shape == (512, 512, 3)
    ids = [phrase(GOLDEN, 0), phrase(GOLDEN, 1)]
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
    golden_outputs.assert_loss_and_gradients(predictor, GOLDEN, TRAINS)


def test_bfloat16(directory: Path, predictor: Predictor) -> None:
    """Within what PyTorch's own bfloat16 reaches on these weights."""
    predictor.params = None  # one copy of the weights at a time
    half = Predictor.load(directory, dtype="bfloat16")
    encoded = half.encode(read(0))
    golden = np.stack([GOLDEN[f"prompt_{j}"] for j in PHRASES])
    closest = min(np.linalg.norm(golden[i] - golden[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    error = np.linalg.norm(golden_outputs.prompts_of(half, encoded, GOLDEN) - golden, axis=-1).max()
    print(f"prompt error {error:.4f}, smallest distance between golden prompts {closest:.4f}")
    assert error <= closest / 4
    golden_outputs.assert_masks(half, GOLDEN, logits_bar=0.05, pixels_bar=0.995)
    golden_outputs.assert_extra(half, EXTRA, "large", 2, logits_bar=0.05, pixels_bar=0.995)


def test_an_export(directory: Path, tmp_path: Path) -> None:
    """After the test above, which leaves no other copy of the weights."""
    export.export_model(directory, tmp_path / "export")
    model = ExportedModel.load(tmp_path / "export")
    (tmp_path / "export" / "weights.safetensors").unlink()
    prediction = model.predict_ids(read(0), [phrase(GOLDEN, j) for j in PHRASES])
    for j in PHRASES:
        logits = prediction.mask_logits[j, ::4, ::4]
        assert_close(logits, GOLDEN[f"mask_logits_{j}"], 2e-3, f"logits {j}, exported")
        golden = unpack(GOLDEN[f"mask_{j}"], 427, 640)
        assert_same_pixels(prediction.masks[j], golden, 0.9999, f"mask {j}, exported")


def test_config_names_the_released_model(directory: Path) -> None:
    manifest = model_dir.read_manifest(directory)
    assert manifest.variant == "evf-sam"
    assert json.dumps(manifest.config) == json.dumps(RELEASED["evf-sam"].to_dict())
    assert manifest.parameter_counts["total"] == 1_315_104_304
