"""A training step on features that were computed before, beside a loop over the PyTorch originals.

    bash tests/install_parity.sh && python -m benchmarks.training_loop --phrases 3

BEiT-3-L and SAM ViT-H in float32 on the CPU, forward and backward pass of the same images, phrases
and masks: `segment-anything`'s and torchscale's modules put together and trained as hustvl/EVF-SAM
describes it, which encodes every image anew, and our step on stored features. Each is measured in
child processes of its own, by turns. The optimizer's update of both is AdamW, and timed apart.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import environment
from benchmarks.alternation import print_times
from benchmarks.cached_step import Steps, experiment, read_batch, update_seconds
from data_pipelines.batch import Batch
from evf_sam_jax.losses import DICE_EPSILON, DICE_SCALE
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.sam.config import SamConfig
from tests.parity import beit3_cases, sam_cases

STEPS = 2  # of a child process, after one that is not timed


def measure(step: Callable[[], object], update: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of steps, without the first, and of an update."""
    step()
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {"step": seconds, "update": [update()]}


def ours(batch: Batch) -> dict[str, list[float]]:
    config = experiment()
    steps = Steps(config, batch)
    return measure(lambda: steps.run(steps.cached), lambda: update_seconds(config, steps.trainable))


class Original(torch.nn.Module):
    """The originals' modules, as hustvl/EVF-SAM at 9935dc5 (`model/evf_sam.py`) joins them."""

    def __init__(self, encoder: Beit3Config, segmenter: SamConfig):
        super().__init__()
        self.encoder = beit3_cases.original(encoder)
        self.segmenter = sam_cases.original(segmenter)
        width = encoder.width
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, segmenter.out_channels),
        )
        self.segmenter.requires_grad_(False)
        self.segmenter.mask_decoder.requires_grad_(True)

    def loss(self, batch: Batch) -> torch.Tensor:
        """BCE and dice of all phrases, as the losses of the original (`model/evf_sam.py:11-54`)."""
        images, phrases = batch.text_ids.shape[:2]
        frames = torch.from_numpy(np.asarray(batch.sam_image)).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            embeddings = torch.cat(
                [self.segmenter.image_encoder(self.segmenter.preprocess(x[None])) for x in frames]
            )
        longest = int(batch.text_valid.sum(axis=-1).max())
        ids = torch.from_numpy(np.asarray(batch.text_ids)).flatten(0, 1)[:, :longest].long()
        padding = ~torch.from_numpy(np.asarray(batch.text_valid)).flatten(0, 1)[:, :longest]
        pixels = torch.from_numpy(np.asarray(batch.encoder_image)).permute(0, 3, 1, 2)
        found = self.encoder(
            visual_tokens=pixels.repeat_interleave(phrases, dim=0),
            textual_tokens=ids,
            text_padding_position=padding,
        )["encoder_out"]
        prompts = self.projector(found[:, :1])
        total = torch.zeros(())
        decoder, prompt_encoder = self.segmenter.mask_decoder, self.segmenter.prompt_encoder
        for i in range(images):
            of_image = prompts[i * phrases : (i + 1) * phrases]
            _, dense = prompt_encoder(points=None, boxes=None, masks=None)
            low_res, _ = decoder(
                image_embeddings=embeddings[i : i + 1],
                image_pe=prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=of_image,
                dense_prompt_embeddings=dense.expand(phrases, -1, -1, -1),
                multimask_output=False,
            )
            sam_size, size = batch.sam_size[i].tolist(), batch.original_size[i].tolist()
            logits = self.segmenter.postprocess_masks(low_res, sam_size, size)[:, 0]
            target = torch.from_numpy(np.asarray(batch.mask[i])).float()
            target = target[:, : size[0], : size[1]]
            bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
            probability = logits.sigmoid().flatten(1)
            target = target.flatten(1)
            overlap = 2 * (probability / DICE_SCALE * target).sum(-1) + DICE_EPSILON
            both = (probability / DICE_SCALE).sum(-1) + (target / DICE_SCALE).sum(-1) + DICE_EPSILON
            total = total + bce + (1 - overlap / both).mean()
        return total / images


def theirs(batch: Batch) -> dict[str, list[float]]:
    model = experiment().model
    assert isinstance(model.encoder, Beit3Config) and isinstance(model.segmenter, SamConfig)
    original = Original(model.encoder, model.segmenter)

    def step() -> float:
        original.zero_grad()
        loss = original.loss(batch)
        loss.backward()
        return float(loss.detach())

    def update() -> float:
        trained = [x for x in original.parameters() if x.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[1:])  # the first makes the moments

    return measure(step, update)


CHILDREN = {"evf_sam_jax": ours, "PyTorch": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--phrases", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        batch = read_batch(experiment().model, options.images, options.phrases)
        print(json.dumps(CHILDREN[options.child](batch)))
        return
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"step": [], "update": []} for name in CHILDREN
    }
    for _ in range(options.rounds):
        for name, found in seconds.items():
            for what, measured in in_a_process(name, options).items():
                found[what] += measured
    print(environment.describe("segment-anything", "torchscale"))
    print(
        f"{options.images} images of {options.phrases} phrases, {options.rounds} processes each\n"
    )
    for what, title in (("step", "forward and backward pass"), ("update", "the update apart")):
        print(f"{title}:\n")
        print_times({name: found[what] for name, found in seconds.items()})


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.training_loop", "--child", name]
    command += ["--images", str(options.images), "--phrases", str(options.phrases)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


if __name__ == "__main__":
    main()
