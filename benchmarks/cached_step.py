"""A training step that reads the segmenter's features beside one that computes them.

    python -m benchmarks.cached_step --phrases 3
    python -m benchmarks.cached_step --phrases 1

BEiT-3-L and SAM ViT-H of random weights in float32, on images and phrases of the embedded data set:
by turns with images and with the features that were computed of them before. An image with its
phrases goes through at a time, so that nothing has to be recomputed for want of memory, and
gradients add up. The optimizer's update, which both share, is timed apart. Beside the ratio of
times is that of operations, as `evf_sam_jax.flops` counts them.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from benchmarks.alternation import print_comparison
from configs.refcoco import get_config
from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch, CachedFeatures
from data_pipelines.shapes import SHAPES_TOKENIZER, ShapesSource
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.experiment import ExperimentConfig, experiment_from_dict
from evf_sam_jax.flops import step_flops, without_remat
from evf_sam_jax.initialize import initial_params
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.models.evf_sam import EvfSamConfig, encode_image, with_dtype
from evf_sam_jax.optimizer import make_optimizer
from evf_sam_jax.param_rules import Params
from evf_sam_jax.train_state import create_state, split_params
from evf_sam_jax.train_step import make_loss, make_train_step


def experiment() -> ExperimentConfig:
    """The paper's recipe in float32, an image at a time through the segmenter's encoder."""
    config = experiment_from_dict(get_config("foundations=none,data=none").to_dict())
    model = without_remat(with_dtype(config.model, "float32"))
    segmenter = dataclasses.replace(model.segmenter, encoder_chunk=1)
    return dataclasses.replace(config, model=dataclasses.replace(model, segmenter=segmenter))


def read_batch(model: EvfSamConfig, images: int, phrases: int) -> Batch:
    """The first images of the embedded data set, with so many phrases each."""
    spec = BatchSpec(images, phrases, text_length=32, images=tower_images(model), canvas=(128, 128))
    source = ShapesSource("train")
    slots = [Slot(source.read(i, range(phrases))) for i in range(images)]
    return assemble(slots, spec, load_tokenizer(SHAPES_TOKENIZER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--phrases", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = experiment()
    trainable = compare(config, options.images, options.phrases, options.repeats)
    print(f"\noptimizer: {update_seconds(config, trainable):.2f} s an update")


class Steps:
    """The recipe's step without its optimizer, on a batch as it is and with its images' features.

    Attributes:
      given: the batch, on the device.
      cached: the same with features in place of the segmenter's images.
      state: parameters as they were drawn.
    """

    def __init__(self, config: ExperimentConfig, batch: Batch):
        self.model, stage = config.model, config.stages[0]
        trainable, frozen = split_params(initial_params(config), stage.trainable)
        self.given = jax.device_put(batch)
        assert self.given.sam_image is not None
        features = jax.jit(encode_image, static_argnums=0)(
            self.model, frozen, self.given.sam_image, self.given.sam_size
        )
        stored = CachedFeatures((features.embedding, *features.high_res))
        self.cached = dataclasses.replace(self.given, sam_image=None, image_features=stored)
        self.weights = stage.loss
        none = optax.set_to_zero()
        self.state = create_state(trainable, frozen, none)
        step = make_train_step(
            self.model,
            "text",
            self.weights,
            none,
            optax.constant_schedule(0.0),
            accumulate=len(batch.sam_size),
        )
        self._step = jax.jit(step, donate_argnums=0)

    def run(self, batch: Batch) -> float:
        """Computes the loss and its gradients, and returns the loss."""
        self.state, metrics = jax.block_until_ready(self._step(self.state, batch))
        assert jnp.isfinite(metrics.grad_norm)
        return float(metrics.loss)

    def flops(self, batch: Batch) -> int:
        loss = make_loss(self.model, "text", self.weights)
        phrases = jnp.ones((), jnp.float32)
        state = self.state
        return step_flops(loss, state.trainable, state.frozen, batch, phrases, has_aux=True)


def compare(config: ExperimentConfig, images: int, phrases: int, repeats: int) -> Params:
    """Times forward and backward pass by turns; returns the trainable parameters."""
    steps = Steps(config, read_batch(config.model, images, phrases))
    given, cached = steps.given, steps.cached
    print(f"losses {steps.run(given):.7f} and {steps.run(cached):.7f}")
    computed, read = steps.flops(given), steps.flops(cached)
    print(
        f"operations of a step: {computed / 1e12:.2f}e12 and {read / 1e12:.2f}e12, "
        f"ratio {computed / read:.2f}"
    )
    print_comparison(
        f"{images} images of {phrases} phrases, forward and backward pass",
        {"features read": lambda: steps.run(cached), "features computed": lambda: steps.run(given)},
        repeats,
        operations={"features read": read, "features computed": computed},
    )
    return steps.state.trainable


def update_seconds(config: ExperimentConfig, trainable: Params) -> float:
    """The median of a few updates of AdamW, of gradients that are the parameters."""
    optimizer = make_optimizer(config.stages[0].optimizer, 100, trainable)
    update = jax.jit(optimizer.update, donate_argnums=1)
    state = jax.jit(optimizer.init)(trainable)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        updates, state = jax.block_until_ready(update(trainable, state, trainable))
        seconds.append(time.perf_counter() - begin)
        del updates
    return statistics.median(seconds[1:])  # the first compiles


if __name__ == "__main__":
    main()
