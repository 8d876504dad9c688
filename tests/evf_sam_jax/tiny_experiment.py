"""An experiment of seconds: the embedded data set, the model for tests, a few steps."""

import dataclasses

import numpy as np

from data_pipelines.assemble import BatchSpec, Example, Slot, assemble
from data_pipelines.batch import Batch
from data_pipelines.shapes import DEFAULT_CONFIG, SHAPES_TOKENIZER
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.experiment import (
    EvaluationConfig,
    ExperimentConfig,
    InitConfig,
    ShapesDataConfig,
    StageConfig,
)
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.models.evf_sam import EvfSamConfig
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.optimizer import OptimizerConfig
from evf_sam_jax.sharding import MeshConfig
from evf_sam_jax.train_step import LossWeights

# Half of what a step compiles are the decoder's layers and the updates of their parameters.
SEGMENTER = dataclasses.replace(
    SamConfig.tiny(), depth=2, patch_size=16, window_size=2, decoder_depth=1
)
MODEL = dataclasses.replace(EvfSamConfig.tiny(), segmenter=SEGMENTER)
TEXT_LENGTH, CANVAS = 16, (128, 128)

PRETRAIN = StageConfig(
    name="pretrain",
    prompts="points_and_boxes",
    steps=2,
    batch_size=2,
    trainable=(
        (".*/positional_encoding_gaussian_matrix", False),
        ("segmenter/.*", True),
        (".*", False),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant", warmup_steps=10),
)
REFERRING = dataclasses.replace(
    PRETRAIN,
    name="referring",
    prompts="text",
    trainable=(
        ("(encoder|projector)/.*", True),
        ("segmenter/mask_decoder/.*", True),
        (".*", False),
    ),
    loss=LossWeights(bce=2.0, dice=0.5),
)
EXPERIMENT = ExperimentConfig(
    seed=0,
    model=MODEL,
    data=ShapesDataConfig(shapes=DEFAULT_CONFIG, text_length=TEXT_LENGTH, canvas=CANVAS),
    stages=(PRETRAIN, REFERRING),
    evaluation=EvaluationConfig(images=3, batch_size=2, every=100, panel_images=1),
    init=InitConfig(
        scale=(
            ("encoder/(text|vision)_positions/.*", 0.2),
            ("encoder/text_embed/.*", 5.0),
            ("projector/out/kernel", 4.0),
            (".*", 1.0),
        )
    ),
    mesh=MeshConfig(data=1),
    log_every=1,
)


# Drawn here, so that numbers of the model do not depend on how the data set draws its scenes.
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 215)}


def example(example_id: int, height: int, width: int) -> Example:
    """Three squares in a row on grey, each with its phrase."""
    image = np.full((height, width, 3), 120, np.uint8)
    masks = np.zeros((len(COLOURS), height, width), np.uint8)
    for i, colour in enumerate(COLOURS.values()):
        top, left = 10 + 15 * ((i + example_id) % 3), 4 + i * (width // 3)
        area = slice(top, top + 26), slice(left, left + 24)
        image[area], masks[i][area] = colour, 1
    return Example(example_id, image, tuple(f"the {name} square" for name in COLOURS), masks)


def batch(prompts: bool, model: EvfSamConfig = MODEL) -> Batch:
    """Two images of different sizes."""
    spec = BatchSpec(
        batch_size=2,
        phrases=len(COLOURS),
        text_length=TEXT_LENGTH,
        images=tower_images(model),
        canvas=CANVAS,
        prompts=prompts,
    )
    slots = [Slot(example(0, 90, 120)), Slot(example(1, 128, 100))]
    return assemble(slots, spec, load_tokenizer(SHAPES_TOKENIZER))
