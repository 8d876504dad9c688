"""A training step that reads the segmenter's features beside one that computes them.

    source benchmarks/keep_memory.sh
    python -m benchmarks.cached_step --phrases 3
    python -m benchmarks.cached_step --phrases 1

BEiT-3-L and SAM ViT-H of random weights in float32, on images and phrases of the embedded data set:
by turns with images and with the features that were computed of them before, both in memory: what
the host does for a batch is no part of either. Masks are of 128 x 128 pixels. Of BEiT-3's layers
the backward pass recomputes what is cheap (`remat="dots"`), which on a CPU costs less than to write
and read it. The update, which both share, is timed by `training_loop`. Beside the ratio of times is
that of operations, as `evf_sam_jax.flops` counts them: without what is recomputed.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import optax

from benchmarks import environment
from benchmarks.alternation import print_comparison
from configs.refcoco import get_config
from data_pipelines.assemble import BatchSpec, Slot, assemble
from data_pipelines.batch import Batch, CachedFeatures
from data_pipelines.buckets import Buckets
from data_pipelines.shapes import SHAPES_TOKENIZER, ShapesSource
from data_pipelines.source import Entry
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.experiment import DatasetsConfig, ExperimentConfig, experiment_from_dict
from evf_sam_jax.flops import step_flops, without_remat
from evf_sam_jax.initialize import initial_params
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.models.evf_sam import encode_image, with_dtype
from evf_sam_jax.train_state import create_state, split_params
from evf_sam_jax.train_step import make_gradients, make_loss

CANVAS = (128, 128)  # the size of the data set's images


def experiment(remat: bool | str = "dots") -> ExperimentConfig:
    """The paper's recipe in float32, an image at a time through the segmenter's encoder."""
    config = experiment_from_dict(get_config("foundations=none,data=none").to_dict())
    model = with_dtype(config.model, "float32")
    model = dataclasses.replace(
        model,
        encoder=dataclasses.replace(model.encoder, remat=remat),
        segmenter=dataclasses.replace(model.segmenter, encoder_chunk=1),
    )
    return dataclasses.replace(config, model=model)


def read_batch(config: ExperimentConfig, images: int, phrases: int) -> Batch:
    """The first images of the embedded data set, with so many phrases each."""
    source, tokenizer = ShapesSource("train"), load_tokenizer(SHAPES_TOKENIZER)
    examples = [source.read(i, range(phrases)) for i in range(images)]
    height, width = CANVAS
    entries = [Entry(height, width, example.phrases) for example in examples]
    assert isinstance(config.data, DatasetsConfig), "the recipe has buckets"
    buckets = Buckets(config.data.text_lengths, (CANVAS,))
    spec = BatchSpec(images, phrases, 0, images=tower_images(config.model), canvas=CANVAS)
    spec = buckets.choose(spec, entries, tokenizer)
    return assemble([Slot(example) for example in examples], spec, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--phrases", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--keep",
        action="store_true",
        help="what the backward pass needs of BEiT-3's layers is kept, not computed again",
    )
    options = parser.parse_args()
    config = experiment(remat=False if options.keep else "dots")
    steps = Steps(config, read_batch(config, options.images, options.phrases))
    compare(steps, options.repeats)
    print(f"\nthe process held {environment.peak_memory()} at most")


class Steps:
    """The recipe's step on a batch as it is, and on one with its images' features.

    Attributes:
      given: the batch, on the device.
      cached: the same with features in place of the segmenter's images.
      state: parameters as they were drawn, without an optimizer's state.
      gradients: (state, batch) -> gradients and sums, compiled.
    """

    def __init__(self, config: ExperimentConfig, batch: Batch):
        self.config, self.stage = config, config.stages[0]
        trainable, frozen = split_params(initial_params(config), self.stage.trainable)
        self.given = jax.device_put(batch)
        assert self.given.sam_image is not None
        features = jax.jit(encode_image, static_argnums=0)(
            config.model, frozen, self.given.sam_image, self.given.sam_size
        )
        stored = CachedFeatures((features.embedding, *features.high_res))
        self.cached = dataclasses.replace(self.given, sam_image=None, image_features=stored)
        self.state = create_state(trainable, frozen, optax.identity())
        self.gradients = jax.jit(make_gradients(config.model, "text", self.stage.loss))

    def run(self, batch: Batch) -> float:
        """Computes the loss and its gradients, and returns the loss."""
        _, sums = jax.block_until_ready(self.gradients(self.state, batch))
        return float(sums["loss"])

    def flops(self, batch: Batch) -> int:
        loss = make_loss(without_remat(self.config.model), "text", self.stage.loss)
        phrases = jnp.ones((), jnp.float32)
        state = self.state
        return step_flops(loss, state.trainable, state.frozen, batch, phrases, has_aux=True)


def compare(steps: Steps, repeats: int) -> None:
    """Times forward and backward pass by turns."""
    given, cached = steps.given, steps.cached
    print(f"losses {steps.run(given):.7f} and {steps.run(cached):.7f}")
    computed, read = steps.flops(given), steps.flops(cached)
    print(
        f"operations of a step: {computed / 1e12:.2f}e12 and {read / 1e12:.2f}e12, "
        f"ratio {computed / read:.2f}"
    )
    images, phrases, length = given.text_ids.shape
    print_comparison(
        f"{images} images of {phrases} phrases of {length} tokens, forward and backward pass",
        {"features read": lambda: steps.run(cached), "features computed": lambda: steps.run(given)},
        repeats,
        operations={"features read": read, "features computed": computed},
    )


if __name__ == "__main__":
    main()
