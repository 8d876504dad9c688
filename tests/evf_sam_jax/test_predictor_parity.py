"""Prompts of all kinds, on an image as it is, give what `SamPredictor` gives with the text token.

The text token, which Segment Anything does not know, is appended to its sparse embeddings, as
hustvl/EVF-SAM does.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from convert import sam as sam_table
from evf_sam_jax import model_dir
from evf_sam_jax.models import evf_sam
from evf_sam_jax.predictor import Job, Predictor
from tests.evf_sam_jax.tiny_model import picture, random_params
from tests.parity import originals, sam_cases
from tests.parity.weights import our_params

BAR = 1e-4
SEGMENTER = sam_cases.CONFIGS["small_b"]
CONFIG = dataclasses.replace(evf_sam.EvfSamConfig.tiny(), segmenter=SEGMENTER)

IMAGE = picture(97, 151)
TEXT_IDS = [0, 5, 9, 2]
POINTS, LABELS = [[30.5, 40], [150, 96], [0, 0]], [1, 0, 1]
BOX = [10, 5.25, 151, 90]
LOW = SEGMENTER.low_res_size
MASK = np.random.default_rng(3).normal(size=(LOW, LOW)).astype(np.float32)

CASES = ["text", "points", "box", "mask", "text points", "text box", "text points box"]
CASES += ["points box", "text points box mask"]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    params = model_dir.nest(random_params(CONFIG))
    segmenter = our_params(sam_table.table(SEGMENTER), sam_cases.section(SEGMENTER))
    return Predictor(CONFIG, params | segmenter)


def our_job(case: str, multimask: bool) -> Job:
    kinds = case.split()
    return Job(
        IMAGE,
        text_ids=[TEXT_IDS] if "text" in kinds else None,
        points=[POINTS] if "points" in kinds else None,
        point_labels=[LABELS] if "points" in kinds else None,
        boxes=[BOX] if "box" in kinds else None,
        mask_logits=MASK[None] if "mask" in kinds else None,
        multimask=multimask,
    )


@pytest.fixture(scope="module")
def original(predictor: Predictor):
    """(case, multimask) -> logits at the size of the image [m, h, w], IoU [m], low-res logits."""
    import torch

    model = sam_cases.original(SEGMENTER)
    sam = originals.segment_anything().SamPredictor(model)
    encoder_image = predictor.prepare_image(IMAGE).encoder_image[None]
    ids = np.asarray([[TEXT_IDS]])
    text = evf_sam.encode_phrases(
        CONFIG, predictor.params, *map(jnp.asarray, (encoder_image, ids, np.ones(ids.shape, bool)))
    )
    token = torch.from_numpy(np.array(text)[0])
    appended: list[bool] = []

    def append_text(module, arguments, found):
        sparse, dense = found
        return (torch.cat([sparse, token], dim=1) if appended[-1] else sparse), dense

    model.prompt_encoder.register_forward_hook(append_text)

    def ask(case: str, multimask: bool):
        kinds = case.split()
        appended.append("text" in kinds)
        return sam.predict(
            point_coords=np.asarray(POINTS) if "points" in kinds else None,
            point_labels=np.asarray(LABELS) if "points" in kinds else None,
            box=np.asarray(BOX) if "box" in kinds else None,
            mask_input=MASK[None] if "mask" in kinds else None,
            multimask_output=multimask,
            return_logits=True,
        )

    with torch.inference_mode():
        sam.set_image(IMAGE)
        return {(case, m): ask(case, m) for case in CASES for m in (False, True)}


@pytest.mark.torch
def test_every_combination_equals_segment_anything(predictor: Predictor, original: dict):
    jobs = [our_job(case, multimask) for case, multimask in original]
    for (case, multimask), found in zip(original, predictor.predict_batch(jobs), strict=True):
        logits, iou, low_res_logits = original[case, multimask]
        for ours, theirs, what in (
            (found.mask_logits, logits, "logits"),
            (found.iou, iou, "IoU"),
            (found.low_res_logits, low_res_logits, "low-resolution logits"),
        ):
            ours = ours.reshape(theirs.shape)
            assert np.abs(ours - theirs).max() <= BAR, f"{case}, {multimask}: {what}"
    values = np.stack([logits[0] for (_, m), (logits, _, _) in original.items() if not m])
    assert np.ptp(values, axis=0).max() > 1e-2, "what is asked must matter"
