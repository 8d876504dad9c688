"""Sets made up for tests of evaluation, and models whose masks are known without a model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.index import AnnotatedImage, Target, write_index
from data_pipelines.segmentations import encode_mask
from data_pipelines.shapes import SHAPES_TOKENIZER
from data_pipelines.source import IndexedSource, ReadingRules
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.count import EvaluatedModel
from evf_sam_jax.evaluation.splits import EvaluationSet
from tests.evf_sam_jax.tiny_experiment import MODEL

TOKENIZER = load_tokenizer(SHAPES_TOKENIZER)
WORDS = ("red", "green", "blue", "circle", "square", "left", "right", "large", "small", "the")


@dataclasses.dataclass(frozen=True)
class MadeTarget:
    """A phrase and the masks of the parts that it means; none: it means nothing."""

    phrase: str
    parts: tuple[np.ndarray, ...]
    category: str = ""


@dataclasses.dataclass(frozen=True)
class MadeImage:
    """An image and what is said about it; `pixels` None cannot be read."""

    height: int
    width: int
    targets: tuple[MadeTarget, ...]
    pixels: np.ndarray | None
    ignore: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Pixels that are no files."""

    images: Sequence[MadeImage]

    def read(self, index: int, file: str) -> np.ndarray:
        pixels = self.images[index].pixels
        if pixels is None:
            raise UserError(f"{file}: expected an image file, found something else")
        return pixels


def made_set(
    directory: Path, images: Sequence[MadeImage], name: str = "made/val", by_category: bool = False
) -> EvaluationSet:
    """The set of these images, through an index as any data set has it."""
    annotated = [
        AnnotatedImage(
            image_id=f"made/{i}",
            file=f"{i}.png",
            height=image.height,
            width=image.width,
            targets=tuple(
                Target(
                    f"{i}/{t}",
                    (target.phrase,),
                    tuple(encode_mask(part.astype(bool)) for part in target.parts),
                    target.category,
                )
                for t, target in enumerate(image.targets)
            ),
            ignore=b"" if image.ignore is None else encode_mask(image.ignore),
        )
        for i, image in enumerate(images)
    ]
    dataset, _, split = name.partition("/")
    index = write_index(directory / "index", annotated, {"name": dataset, "split": split})
    rules = ReadingRules(overlap="sum", text="lower", ignore_unlabelled=True)
    return EvaluationSet(name, IndexedSource(index, Memory(images), rules), by_category)


def random_phrase(rng: np.random.Generator, words: int) -> str:
    """Words that the tokenizer knows."""
    return " ".join(rng.choice(WORDS, words))


class MadeModel(EvaluatedModel):
    """A model without parameters.

    Attributes:
      encoded: how many images' steps have been encoded.
      stop_after: calls of `decode` after which it fails; None: it never does.
    """

    def __init__(self, fingerprint: str = "made", masks: bool = True, devices: int = 8):
        super().__init__(MODEL, {}, TOKENIZER, fingerprint, masks, jax.local_devices()[:devices])
        self.encoded = self.decoded = 0
        self.stop_after: int | None = None

    def encode(self, sam_image, sam_size):
        self.encoded += 1
        return self.put(sam_image)[0]

    def decode(self, features, encoder_image, text_ids, text_valid):
        self.decoded += 1
        if self.stop_after is not None and self.decoded > self.stop_after:
            raise RuntimeError("stopped by the test")
        logits = self.logits(features, *self.put(text_ids))
        return logits, jnp.full(logits.shape[:2], 0.5)

    def logits(self, sam_image, text_ids):
        raise NotImplementedError


class RandomModel(MadeModel):
    """Smooth random masks, a function of the image and the phrase alone."""

    def logits(self, sam_image, text_ids):
        return _random_logits(sam_image, text_ids)


@jax.jit
def _random_logits(sam_image, text_ids):
    low = MODEL.segmenter.low_res_size
    seeds = sam_image[:, 0, 0].astype(jnp.int32).sum(-1)[:, None] * 1009
    seeds += (text_ids * jnp.arange(1, text_ids.shape[-1] + 1)[None, None]).sum(-1)

    def draw(seed):
        key = jax.random.key(seed)
        coarse = jax.random.normal(key, (4, 4)) + jax.random.randint(key, (), -2, 3)
        return jax.image.resize(coarse, (low, low), "linear")

    return jax.vmap(jax.vmap(draw))(seeds)


class SeeingModel(MadeModel):
    """Predicts where the image is white, times a factor: -1 inverts, 0 finds nothing."""

    def __init__(self, factor: float, **arguments):
        super().__init__(**arguments)
        self._factor = factor

    def logits(self, sam_image, text_ids):
        cell = MODEL.segmenter.image_size // MODEL.segmenter.low_res_size
        white = jnp.where(sam_image[:, cell // 2 :: cell, cell // 2 :: cell, 0] > 127, 1.0, -1.0)
        shape = (*text_ids.shape[:2], *white.shape[1:])
        return self._factor * jnp.broadcast_to(white[:, None], shape)
