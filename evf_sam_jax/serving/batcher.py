"""A queue of bounded length before the one thread that owns the device.

Requests of several users are computed together: those of one image share its encoding, whether
they wait together or come later, and different images go through the model as one batch.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from jaxtyping import Float32

from data_pipelines import segmentations
from evf_sam_jax.predictor import DecodedJob, EncodedImage, InputImage, Predictor, PreparedJob


class BusyError(Exception):
    """As many requests are in work as may be."""


@dataclasses.dataclass(frozen=True)
class FoundMask:
    """A mask of a prompt, small enough to keep many of them.

    Attributes:
      counts: COCO's compressed run lengths.
      area: positive pixels.
      predicted_iou: by SAM's own head, which EVF-SAM does not train.
      no_target: whether the area is so small that nothing was found.
    """

    counts: bytes
    area: int
    predicted_iou: float
    no_target: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found in an image.

    Attributes:
      size: its height and width.
      prompts: for each prompt its mask, or its three alternatives.
    """

    size: tuple[int, int]
    prompts: tuple[tuple[FoundMask, ...], ...]


@dataclasses.dataclass(frozen=True)
class Batching:
    """How requests are brought together.

    Attributes:
      requests: the most that are in work, from the reading of a request to its answer.
      images: the most different images of a batch.
      prompts: the most prompts of a batch, but for a single request that has more.
      linger: seconds that an idle device waits for more requests after the first.
      kept_images: of how many images the encoding is kept, the latest used.
    """

    requests: int = 32
    images: int = 4
    prompts: int = 32
    linger: float = 0.005
    kept_images: int = 16


@dataclasses.dataclass(frozen=True)
class _MasksWork:
    digest: str
    job: PreparedJob
    answer: "Future[Found]"


@dataclasses.dataclass(frozen=True)
class _AttentionWork:
    image: InputImage | EncodedImage
    ids: tuple[int, ...]
    answer: "Future[Float32[np.ndarray, 'h w']]"


class Batcher:
    """Computes what requests ask for, in batches, in a thread of its own.

    Attributes:
      predictor: the model; its device work is for this thread alone.
      batching: see there.
    """

    def __init__(self, predictor: Predictor, batching: Batching):
        self.predictor = predictor
        self.batching = batching
        self._in_work = 0
        self._waiting: collections.deque[_MasksWork | _AttentionWork] = collections.deque()
        self._kept: collections.OrderedDict[str, EncodedImage] = collections.OrderedDict()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def in_work(self) -> int:
        """How many requests are being read, waited for or answered."""
        return self._in_work

    @contextlib.contextmanager
    def admit(self) -> Iterator["Admission"]:
        """What a request holds from before it is read until it is answered.

        Raises:
          BusyError: too many requests hold it.
        """
        with self._changed:
            if self._closed or self._in_work >= self.batching.requests:
                raise BusyError
            self._in_work += 1
        try:
            yield Admission(self)
        finally:
            with self._changed:
                self._in_work -= 1

    def close(self) -> None:
        """Admits no more, and returns when what waits has been computed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, work: _MasksWork | _AttentionWork) -> None:
        with self._changed:
            if self._closed:
                raise BusyError
            self._waiting.append(work)
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next_batch():
            batch = [work for work in batch if work.answer.set_running_or_notify_cancel()]
            try:
                self._compute(batch)
            except Exception as error:  # whoever waits is told; the next batch may be well
                for work in batch:
                    if not work.answer.done():
                        work.answer.set_exception(error)
            del batch  # an idle server holds no request

    def _next_batch(self) -> list[_MasksWork | _AttentionWork]:
        """Waits for work and takes what goes together, in the order it came; empty: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            until = time.monotonic() + self.batching.linger
            while True:
                count, full = self._fitting()
                left = until - time.monotonic()
                if full or self._closed or left <= 0 or not self._changed.wait(left):
                    return [self._waiting.popleft() for _ in range(count)]

    def _fitting(self) -> tuple[int, bool]:
        """How many of the first that wait make a batch, and whether no more would fit."""
        images: set[str] = set()
        prompts = 0
        for count, work in enumerate(self._waiting):
            if isinstance(work, _AttentionWork):
                return max(count, 1), True
            images.add(work.digest)
            prompts += len(work.job.prompts)
            too_many = len(images) > self.batching.images or prompts > self.batching.prompts
            if count and too_many:
                return count, True
        full = len(images) >= self.batching.images or prompts >= self.batching.prompts
        return len(self._waiting), full

    def _compute(self, batch: Sequence[_MasksWork | _AttentionWork]) -> None:
        masks = [work for work in batch if isinstance(work, _MasksWork)]
        images: dict[str, InputImage | EncodedImage] = {}
        for work in masks:
            images.setdefault(work.digest, self._kept_image(work.digest) or work.job.image)
        jobs = [dataclasses.replace(work.job, image=images[work.digest]) for work in masks]
        for work, decoded in zip(masks, self.predictor.decode(jobs), strict=True):
            self._keep(work.digest, decoded.image)
            work.answer.set_result(self._found(decoded))
        for work in batch:
            if isinstance(work, _AttentionWork):
                work.answer.set_result(self.predictor.attention_map(work.image, work.ids))

    def _found(self, decoded: DecodedJob) -> Found:
        """Brings masks to the size of their image, one at a time."""

        def mask(logits: Float32[np.ndarray, "l l"], iou: np.float32) -> FoundMask:
            pixels = self.predictor.upsample(decoded.image, logits) > 0
            area = int(pixels.sum())
            return FoundMask(
                segmentations.encode_mask(pixels), area, float(iou), area < decoded.no_target_pixels
            )

        prompts = zip(decoded.low_res_logits, decoded.iou, strict=True)
        return Found(
            decoded.image.size,
            tuple(tuple(map(mask, logits, iou)) for logits, iou in prompts),
        )

    def _kept_image(self, digest: str) -> EncodedImage | None:
        with self._changed:
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return self._kept.get(digest)

    def _keep(self, digest: str, image: EncodedImage) -> None:
        with self._changed:
            self._kept[digest] = image
            self._kept.move_to_end(digest)
            while len(self._kept) > self.batching.kept_images:
                self._kept.popitem(last=False)


@dataclasses.dataclass(frozen=True)
class Admission:
    """The right to ask the device for something; `Batcher.admit`."""

    _batcher: Batcher

    def known_image(self, digest: str) -> EncodedImage | None:
        """What is kept of an image, so that it need not be decoded again."""
        return self._batcher._kept_image(digest)

    def masks(self, digest: str, job: PreparedJob) -> "Future[Found]":
        """Asks for the masks of a job, whose image is known by `digest`."""
        work = _MasksWork(digest, job, Future())
        self._batcher._submit(work)
        return work.answer

    def attention(
        self, image: InputImage | EncodedImage, ids: Sequence[int]
    ) -> "Future[Float32[np.ndarray, 'h w']]":
        """Asks where the model looks for a phrase; `Predictor.attention_map`."""
        work = _AttentionWork(image, tuple(ids), Future())
        self._batcher._submit(work)
        return work.answer
