"""How far masks change when a model's linear layers have 8 bits, on the embedded data set.

    python -m benchmarks.int8_agreement --model runs/shapes/model

Masks of held-out images by the same model in float32, with kernels of int8, and with kernels and
their inputs of int8: each against float32's, and against the truth.
"""

import argparse
import itertools

import numpy as np

from benchmarks import environment
from data_pipelines.shapes import ShapesSource
from evf_sam_jax.models.quantized import CHOICES
from evf_sam_jax.predictor import Job, Predictor


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each two masks; 1 where both are empty. [k, h, w] -> [k]"""
    union = (a | b).sum((-2, -1))
    return np.where(union > 0, (a & b).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--images", type=int, default=128)
    options = parser.parse_args()
    source = ShapesSource("val")
    examples = [source.read(i, range(source.phrase_count(i))) for i in range(options.images)]
    masks = {}
    for int8 in ("", *CHOICES):
        predictor = Predictor.load(options.model, dtype=options.dtype, int8=int8)
        jobs = (Job(example.image, example.phrases) for example in examples)
        masks[int8] = [found.masks for found in predictor.predict_batch(jobs)]
    print(environment.describe("qwix"))
    phrases = sum(len(example.phrases) for example in examples)
    print(f"{options.dtype}, {options.images} images, {phrases} phrases\n")
    print("| in 8 bits | equal pixels | mean IoU with all in floats | smallest | cIoU with truth |")
    print("|---|---|---|---|---|")
    for int8, found in masks.items():
        pairs = list(zip(found, masks[""], strict=True))
        equal = np.mean(list(itertools.chain(*((a == b).mean((-2, -1)) for a, b in pairs))))
        ious = np.concatenate([iou(a, b) for a, b in pairs])
        truth = [(a, e.masks.astype(bool)) for a, e in zip(found, examples, strict=True)]
        ciou = sum((a & b).sum() for a, b in truth) / sum((a | b).sum() for a, b in truth)
        name = int8.replace("_", " ") or "nothing"
        print(f"| {name} | {equal:.3%} | {ious.mean():.4f} | {ious.min():.4f} | {ciou:.4f} |")


if __name__ == "__main__":
    main()
