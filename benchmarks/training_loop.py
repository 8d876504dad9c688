"""A training step on features that were computed before, beside a loop over the PyTorch originals.

    bash tests/install_parity.sh && source benchmarks/keep_memory.sh
    python -m benchmarks.training_loop --phrases 3

BEiT-3-L and SAM ViT-H in float32 on the CPU, forward and backward pass of the same images, phrases
and masks: `segment-anything`'s and torchscale's modules put together and trained as hustvl/EVF-SAM
describes it, which encodes every image anew, and our step on stored features. PyTorch's takes an
image with its phrases at a time, whose gradients add up. Each is measured in child processes of its
own, by turns. The update, clipping and AdamW, is timed apart. Operations are those of our model,
with features read, and for PyTorch with features computed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
import torch

from benchmarks import environment, roofline
from benchmarks.alternation import print_times
from benchmarks.cached_step import Steps, experiment, read_batch
from benchmarks.original import Original
from data_pipelines.batch import Batch
from evf_sam_jax.losses import DICE_EPSILON, DICE_SCALE
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.optimizer import learning_rate_schedule, make_optimizer
from evf_sam_jax.train_state import create_state
from evf_sam_jax.train_step import make_update

STEPS = 3  # and as many updates, of a child process, after what is not timed


def measure(step: Callable[[], object]) -> list[float]:
    """Seconds of each of some steps, or updates."""
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def ours(batch: Batch) -> dict[str, list[float]]:
    steps = Steps(experiment(), batch)
    steps.run(steps.cached)  # compiles
    found = measure(lambda: steps.run(steps.cached))
    operations = [float(steps.flops(each)) for each in (steps.cached, steps.given)]
    return {"step": found, "operations": operations, "update": update_seconds(steps)}


def update_seconds(steps: Steps) -> list[float]:
    """Seconds of updates, the rest of a step; uses up the state of `steps`."""
    gradients, sums = steps.gradients(steps.state, steps.cached)
    # What is frozen passes through an update, and would only take memory.
    trainable = steps.state.trainable
    steps.state = create_state({}, {}, optax.identity())
    settings = steps.stage.optimizer
    optimizer = make_optimizer(settings, 100, trainable)
    rate = learning_rate_schedule(settings, 100)
    update = jax.jit(make_update(optimizer, rate), donate_argnums=0)
    state = create_state(trainable, {}, optimizer)
    del trainable
    seconds = []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(update(state, gradients, sums))
        seconds.append(time.perf_counter() - begin)
        assert np.isfinite(float(metrics.grad_norm))
    return seconds[1:]  # the first compiles


def row(batch: Batch, i: int) -> Batch:
    """An image of a batch with its phrases."""
    return jax.tree.map(lambda leaf: leaf[i], batch)


def add_gradients(original: Original, batch: Batch) -> float:
    """Adds gradients image by image, and returns the mean loss: BCE and dice of all phrases.

    As the losses of the original (`model/evf_sam.py:11-54`).
    """
    images = len(batch.sam_size)
    total = 0.0
    for i in range(images):
        loss = loss_of(original, row(batch, i)) / images
        loss.backward()
        total += float(loss.detach())
    return total


def loss_of(original: Original, image: Batch) -> torch.Tensor:
    """Of the phrases of an image: a row of a batch."""
    (height, width), (sam_height, sam_width) = image.original_size, image.sam_size
    logits = original(
        image.sam_image,
        (int(sam_height), int(sam_width)),
        image.encoder_image,
        image.text_ids,
        image.text_valid,
        (int(height), int(width)),
    ).flatten(1)
    target = torch.from_numpy(image.mask[:, :height, :width]).float().flatten(1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    probability = logits.sigmoid()
    overlap = 2 * (probability / DICE_SCALE * target).sum(-1) + DICE_EPSILON
    both = (probability / DICE_SCALE).sum(-1) + (target / DICE_SCALE).sum(-1) + DICE_EPSILON
    return bce + (1 - overlap / both).mean()


def theirs(batch: Batch) -> dict[str, list[float]]:
    model = experiment().model
    assert isinstance(model.encoder, Beit3Config) and isinstance(model.segmenter, SamConfig)
    original = Original(model.encoder, model.segmenter)

    def step() -> float:
        original.zero_grad()
        return add_gradients(original, batch)

    loss_of(original, row(batch, 0)).backward()  # one image warms up: nothing is compiled
    found = measure(step)
    settings = experiment().stages[0].optimizer
    trained = [x for x in original.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )

    def update() -> None:
        assert settings.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()

    update()  # makes the moments
    return {"step": found, "update": measure(update)}


CHILDREN = {"evf_sam_jax": ours, "PyTorch": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--phrases", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        batch = read_batch(experiment(), options.images, options.phrases)
        print(json.dumps(CHILDREN[options.child](batch)))
        return
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"step": [], "update": []} for name in CHILDREN
    }
    operations: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, found in seconds.items():
            measured = in_a_process(name, options)
            if counted := measured.pop("operations", None):
                operations = dict(zip(CHILDREN, counted, strict=True))
            for what, those in measured.items():
                found[what] += those
    roof = roofline.measure("float32")
    print(environment.describe("segment-anything", "torchscale"))
    print(f"float32: {roof}")
    print(
        f"{options.images} images of {options.phrases} phrases, {options.rounds} processes each\n"
    )
    print("forward and backward pass:\n")
    print_times({name: found["step"] for name, found in seconds.items()}, operations, roof)
    print("\nthe update apart:\n")
    print_times({name: found["update"] for name, found in seconds.items()})


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.training_loop", "--child", name]
    command += ["--images", str(options.images), "--phrases", str(options.phrases)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


if __name__ == "__main__":
    main()
