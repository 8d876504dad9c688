"""From images and prompts to masks: `Predictor`, a model with its compiled functions.

    predictor = Predictor.load("MODEL_DIR")
    prediction = predictor.predict(image, texts=["the cat on the left", "its tail"])

An image is encoded once for all its prompts, and prompts of several images are decoded together.
Everything that is compiled has a shape that depends on the model or on a bucket of images, prompts,
tokens or points, none on the size of an image: the output is computed in tiles.

Reference: hustvl/EVF-SAM at 9935dc5, `inference.py`; facebookresearch/segment-anything at dca509f,
`predictor.py`.

Differences: text, points, boxes and a mask can be combined in one prompt, as SAM's prompt encoder
combines them, the text token last. EVF-SAM was trained on text alone.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from PIL import Image

from data_pipelines import tokenizers
from evf_sam_jax import mask_geometry, model_dir, model_inputs
from evf_sam_jax.errors import UserError
from evf_sam_jax.models import evf_sam, quantized
from evf_sam_jax.models.families import attention_of, families_with_attention
from evf_sam_jax.models.interfaces import (
    ImageFeatures,
    Prompts,
    SegmenterConfig,
)
from evf_sam_jax.prompts import OUTSIDE, Frame, Prompt, make_prompts, stack_geometry

# A model is compiled once for each number of images, of prompts and of tokens it meets; these bound
# how often. More than the largest bucket are computed in several goes, so memory stays bounded.
# What fills up a bucket is computed for nothing, so it is little of prompts (5 are 4 + 1, and 7 an
# 8), and nothing of images, which are dear (7 are 4 + 2 + 1).
IMAGE_BUCKETS = (1, 2, 4, 8)
PHRASE_BUCKETS = (1, 2, 4, 8, 16)
MOST_FILLING = 0.2  # of a bucket of prompts
TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024)

Item = TypeVar("Item")

TILE = 512  # side of the tiles that the output is computed in, in pixels

# Fewer positive pixels than these mean that the phrase refers to nothing in the image.
NO_TARGET_PIXELS = 50


@dataclasses.dataclass(frozen=True)
class InputImage:
    """An image as the two towers take it, on the host.

    Attributes:
      sam_image: the segmenter's frame.
      encoder_image: the multimodal encoder's input.
      frame: how the image lies in the segmenter's frame.
    """

    sam_image: UInt8[np.ndarray, "s s 3"]
    encoder_image: Float32[np.ndarray, "h w _"]
    frame: Frame


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """What is computed of an image once, whatever the prompts.

    Attributes:
      features: the segmenter's.
      encoder_image: the multimodal encoder's input.
      sam_size: height and width of the content of the segmenter's frame.
      frame: how the image lies in it.
    """

    features: ImageFeatures
    encoder_image: Float[Array, "1 h w _"]
    sam_size: Int[Array, "1 2"]
    frame: Frame

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.frame.size


@dataclasses.dataclass(frozen=True)
class Job:
    """What `Predictor.predict` takes, for `predict_batch`; see there for the arguments.

    An image that several jobs share is encoded once where they share the object.
    """

    image: np.ndarray | InputImage | EncodedImage
    texts: Sequence[str] | None = None
    text_ids: Sequence[Sequence[int]] | None = None
    _: dataclasses.KW_ONLY
    points: Any = None
    point_labels: Any = None
    boxes: Any = None
    mask_logits: Any = None
    multimask: bool = False
    no_target_pixels: int = NO_TARGET_PIXELS


@dataclasses.dataclass(frozen=True)
class PreparedJob:
    """A job whose every value has been checked, with its image resized; `Predictor.prepare`."""

    image: InputImage | EncodedImage
    prompts: tuple[Prompt, ...]
    multimask: bool
    no_target_pixels: int


@dataclasses.dataclass(frozen=True)
class DecodedJob:
    """Masks of a job as the decoder gives them; `Predictor.finish` brings them to the image.

    Attributes:
      image: of the job.
      low_res_logits: on a grid over the segmenter's frame; m = 1, or 3 with `multimask`.
      iou: the decoder's own estimate of each mask's IoU.
    """

    image: EncodedImage
    low_res_logits: Float32[np.ndarray, "k m l l"]
    iou: Float32[np.ndarray, "k m"]
    multimask: bool
    no_target_pixels: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Masks of k prompts of one image.

    `*k` is k, or with `multimask` k and 3: the alternatives of each prompt in the decoder's order,
    of which `iou` says which the model prefers.

    Attributes:
      mask_logits: at the size of the image; positive inside.
      masks: `mask_logits` > 0.
      iou: each mask's IoU as SAM's own head estimates it. EVF-SAM does not train that head, so it
        judges the mask as a shape, not whether it is what the phrase means.
      low_res_logits: as the decoder gives them, on a grid over the segmenter's frame; what
        `mask_logits` of another prediction of this image takes.
      no_target_pixels: see `no_target`.
    """

    mask_logits: Float32[np.ndarray, "*k h w"]
    masks: Bool[np.ndarray, "*k h w"]
    iou: Float32[np.ndarray, "*k"]
    low_res_logits: Float32[np.ndarray, "*k l l"]
    no_target_pixels: int = NO_TARGET_PIXELS

    @property
    def no_target(self) -> Bool[np.ndarray, "*k"]:
        """Whether a mask has fewer positive pixels than `no_target_pixels`: nothing was found."""
        return np.asarray(self.masks.sum(axis=(-2, -1)) < self.no_target_pixels)


# How a compiled function is called with its arguments: `_run`, or `_compile` ahead of time.
Call = Callable[..., Any]


def _run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def _compile(function: jax.stages.Wrapped, *arguments: Any, **options: Any) -> Any:
    """Compiles for a later call with arguments of these shapes; returns zeros for its results."""
    traced = function.trace(*arguments, **options)
    results = traced.lower().compile().out_tree
    zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in traced.jaxpr.out_avals]
    return jax.device_put(jax.tree.unflatten(results, zeros))


class Predictor:
    """A model ready to predict, with its compiled functions.

    Attributes:
      config: sizes, and the dtype of activations and matrix products.
      params: the model's parameters, on the device.
      tokenizer: turns phrases into token ids; None: only token ids can be given.
      images: how both towers take an image.
    """

    def __init__(
        self,
        config: evf_sam.EvfSamConfig,
        params: evf_sam.Params,
        tokenizer: tokenizers.Tokenizer | None = None,
        antialias: bool = True,
    ):
        """Args:
        antialias: as of `model_inputs.tower_images`.
        """
        self.config = config
        self.images = model_inputs.tower_images(config, antialias)
        self.params = jax.device_put(params)
        self.tokenizer = tokenizer
        # Of parameters only, and a part of decoding a prompt that can be seen.
        self._positions = _dense_positions(config, {"segmenter": self.params["segmenter"]})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        dtype: str = "float32",
        antialias: bool = True,
        int8: str = "",
    ) -> "Predictor":
        """Loads a model directory.

        Args:
          path: written by `python -m convert` or at the end of a training.
          dtype: "float32" for the original's numbers, "bfloat16" for speed and half the memory.
          antialias: as of `model_inputs.tower_images`.
          int8: "weights" for linear layers in a quarter of float32's memory,
            "weights_and_activations" for products of 8-bit integers too, see
            `models/quantized.py`; "" for neither.

        Raises:
          UserError: no model directory, one of another version, one without the whole model, a
            dtype that is neither, or an `int8` that there is not.
        """
        _check_dtype(dtype)
        if int8:
            quantized.check_choice(int8)
        manifest = model_dir.read_manifest(path)
        model_dir.check_whole(path, manifest)
        config = evf_sam.with_dtype(evf_sam.EvfSamConfig.from_dict(manifest.config), dtype)
        tokenizer = None
        if manifest.has_tokenizer:
            # Whoever asks shall know that the end would not be read.
            tokenizer = model_inputs.load_tokenizer(path, config, truncates=False)
        if not int8:
            return cls(config, _load_params(path, config, dtype), tokenizer, antialias)
        small, quantize = quantized.quantizer(config, int8)
        params = _load_params(path, config, dtype, store=quantize)
        return cls(small, params, tokenizer, antialias)

    @classmethod
    def load_segmenter(cls, path: str | os.PathLike, dtype: str = "float32") -> "Predictor":
        """Loads the segmenter of a model directory, for points, boxes and masks alone.

        `params` has no other part, and phrases are refused. In `config`, the multimodal encoder is
        a placeholder, whose image costs next to nothing.

        Args:
          path: of a whole model, or of a foundation segmenter (`python -m convert sam2`).
          dtype: as of `load`.

        Raises:
          UserError: as `load`, but that nothing more than the segmenter need be there.
        """
        _check_dtype(dtype)
        manifest = model_dir.read_manifest(path)
        if "segmenter" not in manifest.config:
            raise UserError(f"{path}: expected a model with a segmenter, found one without")
        own = {key: value for key, value in manifest.config.items() if key != "encoder"}
        config = evf_sam.EvfSamConfig.from_dict(evf_sam.EvfSamConfig.tiny().to_dict() | own)
        config = evf_sam.with_dtype(config, dtype)
        return cls(config, _load_params(path, config, dtype, only="segmenter/"))

    def predict(
        self,
        image: np.ndarray | InputImage | EncodedImage,
        texts: Sequence[str] | None = None,
        text_ids: Sequence[Sequence[int]] | None = None,
        *,
        points: Any = None,
        point_labels: Any = None,
        boxes: Any = None,
        mask_logits: Any = None,
        multimask: bool = False,
        no_target_pixels: int = NO_TARGET_PIXELS,
    ) -> Prediction:
        """Returns the masks of k prompts of an image, each of everything that is given.

        Coordinates are pixels of the image, from its top left; x to the right, y down.

        Args:
          image: RGB, as `image_input.read_image` gives it, uint8 [h, w, 3]; or what `encode` made
            of it, which spares encoding it again.
          texts: k phrases; or
          text_ids: k phrases as token ids, `<s>` and `</s>` included.
          points: [k, n, 2], (x, y).
          point_labels: [k, n], 1 inside the object, 0 outside, -1 no point, to fill up rows.
          boxes: [k, 4], (x0, y0, x1, y1).
          mask_logits: [k, l, l], `low_res_logits` of an earlier prediction.
          multimask: three alternatives a prompt. SAM was trained to give them where one point may
            mean several things; EVF-SAM only ever uses the one mask.
          no_target_pixels: a mask of fewer positive pixels says that there is no such thing.

        Raises:
          UserError: no prompt, or different numbers of phrases, points, boxes and masks; both
            `texts` and `text_ids`; an empty or too long a phrase; texts without a tokenizer; ids
            outside the vocabulary; coordinates that are outside the image or no numbers; an image
            without pixels.
        """
        job = Job(
            image,
            texts,
            text_ids,
            points=points,
            point_labels=point_labels,
            boxes=boxes,
            mask_logits=mask_logits,
            multimask=multimask,
            no_target_pixels=no_target_pixels,
        )
        return next(self.predict_batch([job]))

    def predict_batch(self, jobs: Iterable[Job | PreparedJob]) -> Iterator[Prediction]:
        """Yields the prediction of each job, computing those of a few images together.

        Jobs are taken as they are needed, and one job's masks are held at the size of its image.

        Raises:
          UserError: as `predict`, when the job's turn comes; `prepare` jobs to know before.
        """
        for group in _by_images(jobs, IMAGE_BUCKETS[-1]):
            for decoded in self.decode(group):
                yield self.finish(decoded)

    def prepare(self, job: Job) -> PreparedJob:
        """Checks a job and resizes its image, on the host; errors as for `predict`."""
        image = job.image
        if isinstance(image, np.ndarray):
            image = self.prepare_image(image)
        ids = None
        if job.texts is not None or job.text_ids is not None:
            ids = self.token_ids(job.texts, job.text_ids)
        prompts = make_prompts(
            image.frame, ids, job.points, job.point_labels, job.boxes, job.mask_logits
        )
        _check_kinds(prompts, self.config.segmenter)
        return PreparedJob(image, prompts, job.multimask, job.no_target_pixels)

    def prepare_image(self, image: np.ndarray) -> InputImage:
        """Resizes an image for both towers; UserError unless it is uint8 [height, width, 3]."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise UserError(
                "expected an image of uint8 pixels [height, width, 3], "
                f"found {image.dtype} {list(image.shape)}"
            )
        size = image.shape[0], image.shape[1]
        sam_image, content = self.images.segmenter(image)
        low_res = self.config.segmenter.low_res_size
        frame = Frame(size, content, self.images.prompt_frame(*size), low_res)
        return InputImage(sam_image, self.images.encoder(image), frame)

    def token_ids(
        self, texts: Sequence[str] | None = None, text_ids: Sequence[Sequence[int]] | None = None
    ) -> list[list[int]]:
        """Returns checked token ids of each phrase; arguments and errors as for `predict`."""
        self._require_encoder()
        if (texts is None) == (text_ids is None):
            raise UserError("expected phrases either as texts or as token ids")
        if texts is not None:
            if self.tokenizer is None:
                raise UserError(
                    "the model directory has no tokenizer files: "
                    'expected token ids instead of text (--text_ids "0 5 2")'
                )
            text_ids = [self.tokenizer.encode(text) for text in texts]
        assert text_ids is not None
        if len(text_ids) == 0:
            raise UserError("expected at least one phrase, found none")
        for ids in text_ids:
            _check_ids(ids, self.config)
        return [list(map(int, ids)) for ids in text_ids]

    def encode(self, image: np.ndarray | InputImage) -> EncodedImage:
        """Computes what all prompts of an image share; the slow part of a prediction."""
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[np.ndarray | InputImage]) -> list[EncodedImage]:
        """Encodes several images, as many at a time as a bucket holds."""
        ready = [x if isinstance(x, InputImage) else self.prepare_image(x) for x in images]
        chunks = _in_buckets(ready, IMAGE_BUCKETS, most_filling=0.0)
        return [encoded for chunk in chunks for encoded in self._encode_rows(chunk)]

    def decode(self, jobs: Iterable[Job | PreparedJob]) -> list[DecodedJob]:
        """Encodes the images of jobs and decodes their prompts, together where they are alike.

        All is held at once, at the decoder's resolution; `predict_batch` bounds that.
        """
        prepared = self._prepare_all(jobs)
        distinct = {id(job.image): job.image for job in prepared}
        encoded = {key: x for key, x in distinct.items() if isinstance(x, EncodedImage)}
        inputs = {key: x for key, x in distinct.items() if isinstance(x, InputImage)}
        encoded |= dict(zip(inputs, self.encode_batch(list(inputs.values())), strict=True))

        groups: dict[Any, list[tuple[int, int]]] = {}  # of (job, prompt)
        for number, job in enumerate(prepared):
            for i, prompt in enumerate(job.prompts):
                groups.setdefault((job.multimask, prompt.kinds), []).append((number, i))
        masks: list[list[Any]] = [[None] * len(job.prompts) for job in prepared]
        for (multimask, _), rows in groups.items():
            for chunk in _in_buckets(rows, PHRASE_BUCKETS, MOST_FILLING):
                images = [encoded[id(prepared[number].image)] for number, _ in chunk]
                found = self._decode_rows(
                    images, [prepared[number].prompts[i] for number, i in chunk], multimask
                )
                logits, iou = (np.asarray(x) for x in found)
                for row, (number, i) in enumerate(chunk):
                    masks[number][i] = logits[row, 0], iou[row, 0]
        return [
            DecodedJob(
                encoded[id(job.image)],
                np.stack([logits for logits, _ in of_job]),
                np.stack([iou for _, iou in of_job]),
                job.multimask,
                job.no_target_pixels,
            )
            for job, of_job in zip(prepared, masks, strict=True)
        ]

    def _prepare_all(self, jobs: Iterable[Job | PreparedJob]) -> list[PreparedJob]:
        """Prepares what is not, each image once."""
        jobs = list(jobs)  # keeps the images alive, and so their ids apart
        images: dict[int, InputImage] = {}
        prepared = []
        for job in jobs:
            if isinstance(job, Job):
                if isinstance(job.image, np.ndarray):
                    key = id(job.image)
                    if key not in images:
                        images[key] = self.prepare_image(job.image)
                    job = dataclasses.replace(job, image=images[key])
                job = self.prepare(job)
            prepared.append(job)
        return prepared

    def finish(self, decoded: DecodedJob) -> Prediction:
        """Brings the masks of a job to the size of its image."""
        logits, iou = decoded.low_res_logits, decoded.iou
        if not decoded.multimask:
            logits, iou = logits[:, 0], iou[:, 0]
        mask_logits = np.empty((*iou.shape, *decoded.image.size), np.float32)
        for index in np.ndindex(iou.shape):
            mask_logits[index] = self.upsample(decoded.image, logits[index])
        return Prediction(mask_logits, mask_logits > 0, iou, logits, decoded.no_target_pixels)

    def upsample(
        self, encoded: EncodedImage, low_res_logits: Float32[np.ndarray, "l l"]
    ) -> Float32[np.ndarray, "h w"]:
        """Returns one mask's logits at the size of the image, computed tile by tile."""
        frame = evf_sam.padded_frame(self.config)
        height, width = encoded.size
        size = np.asarray([encoded.size], np.int32)
        logits = jax.device_put(low_res_logits[None, None])
        result = np.empty((height, width), np.float32)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                origin = np.asarray([top, left], np.int32)
                tile = _resample_tile(frame, logits, encoded.sam_size, size, origin)
                tile = np.asarray(tile)[0, 0]
                result[top : top + TILE, left : left + TILE] = tile[: height - top, : width - left]
        return result

    def attention_map(
        self, image: np.ndarray | InputImage | EncodedImage, text: str | Sequence[int]
    ) -> Float32[np.ndarray, "h w"]:
        """Returns where the model's image [CLS] looks for a phrase, at the size of the image.

        In the multimodal encoder's last layer, its attention to the patches, summed over heads
        (paper Figure 5), stretched bilinearly. Over the patches it sums to less than the number of
        heads; the rest is attention to the [CLS] itself and to the text.

        Args:
          text: a phrase, or its token ids.

        Raises:
          UserError: as `predict`; or the encoder sees no image.
        """
        encoder = self.config.encoder
        if attention_of(encoder) is None:
            able = " or ".join(families_with_attention())
            raise UserError(f"attention_map: expected {able} as encoder, found {encoder.family}")
        if encoder.fusion == "text":
            raise UserError("attention_map: expected an encoder that sees the image, found text")
        [ids] = self.token_ids(*(([text], None) if isinstance(text, str) else (None, [text])))
        if isinstance(image, np.ndarray):
            image = self.prepare_image(image)
        encoder_image = image.encoder_image
        if isinstance(image, InputImage):
            encoder_image = image.encoder_image[None]
        padded = (x[:, None] for x in self._pad([ids]))
        patches = _attention(
            self.config, {"encoder": self.params["encoder"]}, encoder_image, *padded
        )
        height, width = image.frame.size
        picture = Image.fromarray(np.asarray(patches, np.float32)[0, 0])
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))

    def warm_up(
        self,
        images: int = 1,
        prompts: int = 1,
        tokens: int = TOKEN_BUCKETS[0],
        points: bool = False,
        multimask: bool = False,
    ) -> None:
        """Compiles what predictions of phrases need, so that the first one need not wait for it.

        Nothing of it is run but the smallest program, so no image is encoded.

        Args:
          images: the most images encoded at a time.
          prompts: the most prompts decoded at a time.
          tokens: of the longest phrase.
          points: also a point or a box, alone and with a phrase; more points are compiled for when
            they are first asked.
          multimask: also several masks a prompt.
        """
        blank = self.prepare_image(np.zeros((1, 1, 3), np.uint8))
        for count in _buckets_up_to(images, IMAGE_BUCKETS):
            encoded = self._encode_rows([blank] * count, _compile)[0]
        box = np.asarray([0, 0, 1, 1], np.float32)
        no_points = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
        for length in _buckets_up_to(tokens, TOKEN_BUCKETS):
            ids = (0,) * min(length, self.config.encoder.max_text_tokens)
            asked = [Prompt(ids, *no_points, None, None)]
            if points:
                asked += [Prompt(x, *no_points, box, None) for x in (ids, None)]
            for prompt in asked:
                for several in {False, multimask}:
                    for count in _buckets_up_to(prompts, PHRASE_BUCKETS):
                        logits, _ = self._decode_rows(
                            [encoded] * count, [prompt] * count, several, _compile
                        )
        self.upsample(encoded, np.asarray(logits)[0, 0, 0])

    def _encode_rows(self, images: Sequence[InputImage], call: Call = _run) -> list[EncodedImage]:
        """Encodes the images of a bucket together."""
        sizes = np.asarray([image.frame.content for image in images], np.int32)
        features = call(
            _encode_images,
            self.config,
            {"segmenter": self.params["segmenter"]},
            np.stack([image.sam_image for image in images]),
            sizes,
        )
        return [
            EncodedImage(
                features=ImageFeatures(embedding, tuple(high_res)),
                encoder_image=jax.device_put(image.encoder_image[None]),
                sam_size=jax.device_put(sizes[i : i + 1]),
                frame=image.frame,
            )
            for i, (image, (embedding, *high_res)) in enumerate(zip(images, features, strict=True))
        ]

    def _decode_rows(
        self,
        images: Sequence[EncodedImage],
        prompts: Sequence[Prompt],
        multimask: bool,
        call: Call = _run,
    ) -> tuple[Float[Array, "r 1 m l l"], Float[Array, "r 1 m"]]:
        """Decodes prompts of the same kinds, each of its image; a bucket's rest repeats one.

        Returns:
          Logits at the decoder's resolution, and the decoder's own estimate of each mask's IoU.
        """
        missing = _bucket(len(prompts), PHRASE_BUCKETS) - len(prompts)
        images = [*images, *[images[0]] * missing]
        prompts = [*prompts, *[prompts[0]] * missing]
        with_text, with_geometry, with_mask = prompts[0].kinds
        asked: dict[str, Any] = {}
        if with_text:
            asked["text"] = self._text_of(images, [prompt.ids or () for prompt in prompts], call)
        if with_geometry:
            geometry = stack_geometry(prompts)
            asked["points"] = geometry.points[:, None]
            asked["point_labels"] = geometry.labels[:, None]
            asked["boxes"] = geometry.boxes[:, None]
            text_tokens = asked["text"].shape[2] if with_text else 0
            text = np.ones((len(prompts), text_tokens), bool)
            asked["token_valid"] = np.concatenate([geometry.valid, text], axis=1)[:, None]
        if with_mask:
            masks = [prompt.mask for prompt in prompts if prompt.mask is not None]
            asked["mask"] = np.stack(masks)[:, None]
        return call(
            _decode,
            self.config,
            {"segmenter": self.params["segmenter"]},
            self._positions,
            [(image.features.embedding, *image.features.high_res) for image in images],
            jax.device_put(asked),
            multimask=multimask,
        )

    def _text_of(
        self, images: Sequence[EncodedImage], ids: Sequence[Sequence[int]], call: Call
    ) -> Float[Array, "r 1 t c"]:
        self._require_encoder()
        text_ids, text_valid = self._pad(ids)
        return call(
            _encode_phrases,
            self.config,
            {key: self.params[key] for key in ("encoder", "projector")},
            [image.encoder_image for image in images],
            text_ids[:, None],
            text_valid[:, None],
        )

    def _require_encoder(self) -> None:
        if "encoder" not in self.params:
            raise UserError("expected points, boxes or masks for a segmenter alone, found phrases")

    def _pad(
        self, ids: Sequence[Sequence[int]]
    ) -> tuple[Int[np.ndarray, "r l"], Bool[np.ndarray, "r l"]]:
        tokens = _bucket(max(map(len, ids)), TOKEN_BUCKETS)
        return tokenizers.pad_token_ids(ids, min(tokens, self.config.encoder.max_text_tokens))


# Compiled once a process for each config and bucket, whichever predictor asks. What they take and
# return are arrays in lists and dictionaries, in which a program to be compiled has only shapes.
_compiled = functools.partial(jax.jit, static_argnames="config")

_attention = _compiled(evf_sam.image_cls_attention)
_dense_positions = _compiled(evf_sam.dense_positions)


@_compiled
def _encode_images(
    config: evf_sam.EvfSamConfig,
    params: evf_sam.Params,
    sam_images: UInt8[Array, "b s s 3"],
    sizes: Int[Array, "b 2"],
) -> list[list[Array]]:
    """The features of each image, arrays of its own, so that any of them go together."""
    features = evf_sam.encode_image(config, params, sam_images, sizes)
    arrays = [jnp.split(x, len(sam_images)) for x in (features.embedding, *features.high_res)]
    return [list(of_image) for of_image in zip(*arrays, strict=True)]


@_compiled
def _encode_phrases(
    config: evf_sam.EvfSamConfig,
    params: evf_sam.Params,
    encoder_images: list[Float[Array, "1 h w _"]],
    text_ids: Int[Array, "r 1 l"],
    text_valid: Bool[Array, "r 1 l"],
) -> Float[Array, "r 1 t c"]:
    images = jnp.concatenate(encoder_images)
    return evf_sam.encode_phrases(config, params, images, text_ids, text_valid)


@functools.partial(jax.jit, static_argnames=("config", "multimask"))
def _decode(
    config: evf_sam.EvfSamConfig,
    params: evf_sam.Params,
    positions: Float[Array, "g g c"],
    features: list[tuple[Array, ...]],
    prompts: dict[str, Array],
    multimask: bool,
) -> tuple[Array, Array]:
    embedding, *high_res = (jnp.concatenate(rows) for rows in zip(*features, strict=True))
    stacked = ImageFeatures(embedding, tuple(high_res))
    asked = Prompts(**prompts)
    found = evf_sam.decode(config, params, stacked, asked, multimask, positions=positions)
    return found.low_res_logits, found.iou


def resample_tile(
    frame: int | None,
    low_res_logits: Float[Array, "1 1 l l"],
    sam_size: Int[Array, "1 2"],
    size: Int[Array, "1 2"],
    origin: Int[Array, "2"],
) -> Float[Array, "1 1 h w"]:
    """A mask's logits in the `TILE` x `TILE` pixels of the image that begin at `origin`."""
    return mask_geometry.resample_masks(
        low_res_logits, sam_size, size, canvas=(TILE, TILE), frame=frame, origin=origin
    )


_resample_tile = jax.jit(resample_tile, static_argnames="frame")


def _by_images(jobs: Iterable[Job | PreparedJob], limit: int) -> Iterator[list[Job | PreparedJob]]:
    """Consecutive jobs of at most `limit` images, which jobs may share."""
    group: list[Job | PreparedJob] = []
    images: set[int] = set()
    for job in jobs:
        if len(images | {id(job.image)}) > limit:
            yield group
            group, images = [], set()
        group.append(job)
        images.add(id(job.image))
    if group:
        yield group


def _buckets_up_to(number: int, buckets: tuple[int, ...]) -> list[int]:
    return [b for b in buckets if b <= _bucket(number, buckets)]


def _in_buckets(
    items: Sequence[Item], buckets: tuple[int, ...], most_filling: float
) -> Iterator[Sequence[Item]]:
    """Cuts a sequence into parts that fill a bucket each, but for up to `most_filling` of it."""
    start = 0
    while left := len(items) - start:
        larger = _bucket(left, buckets)
        fits = left >= (1 - most_filling) * larger and larger in buckets
        count = left if fits else max(bucket for bucket in buckets if bucket <= left)
        yield items[start : start + count]
        start += count


def _bucket(number: int, buckets: tuple[int, ...]) -> int:
    return next((bucket for bucket in buckets if number <= bucket), number)


def check_parameters(path: str | os.PathLike, config: evf_sam.EvfSamConfig, only: str = "") -> None:
    """Raises UserError unless the directory's parameters are those of its config.

    Args:
      only: what the paths of those that count begin with.
    """
    expected = model_dir.path_leaves(evf_sam.param_shapes(config))
    found = model_dir.describe(path)
    for name in sorted(filter(lambda name: name.startswith(only), expected.keys() | found.keys())):
        shapes = [getattr(leaves.get(name), "shape", None) for leaves in (expected, found)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: parameter {name}: expected {_shape_words(shapes[0])} by the "
                f"config, found {_shape_words(shapes[1])}"
            )


def _load_params(
    path: str | os.PathLike,
    config: evf_sam.EvfSamConfig,
    dtype: str,
    only: str = "",
    store: Callable[[str, jax.Array], Any] = lambda _, leaf: leaf,
) -> evf_sam.Params:
    """The parameters, on the device, whose paths begin with `only`; those of products in `dtype`.

    Args:
      store: makes of each, of its path and array, what is kept.

    Raises:
      UserError: they are not those of the config.
    """
    check_parameters(path, config, only)

    def place(name: str, leaf: np.ndarray) -> Any:
        return store(name, jax.device_put(leaf.astype(evf_sam.param_dtype(name, dtype))))

    return model_dir.load_params(path, only="^" + only, place=place)


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype: expected float32 or bfloat16, found {dtype!r}")


def _shape_words(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"shape {shape}"


def _check_kinds(prompts: Sequence[Prompt], segmenter: SegmenterConfig) -> None:
    """Raises UserError if a prompt has what the segmenter has no notion of."""
    if not segmenter.mask_prompts and any(prompt.mask is not None for prompt in prompts):
        raise UserError(f"mask_logits: expected none, as {segmenter.family} takes none; found some")
    if not segmenter.outside_points and any(OUTSIDE in prompt.labels for prompt in prompts):
        raise UserError(
            f"point_labels: expected 1 (inside), the only ones of {segmenter.family}; found 0"
        )


def _check_ids(ids: Sequence[int], config: evf_sam.EvfSamConfig) -> None:
    longest, vocabulary = config.encoder.max_text_tokens, config.encoder.vocab_size
    if len(ids) == 0:
        raise UserError("expected token ids for each phrase, found a phrase without any")
    if len(ids) > longest:
        raise UserError(f"expected at most {longest} tokens a phrase, found {len(ids)}")
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise UserError(f"expected token ids from 0 to {vocabulary - 1}, found {outside[0]}")
