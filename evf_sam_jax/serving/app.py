"""The HTTP endpoints of a model, and the page before them.

    POST /predict     masks as COCO run lengths, or one as PNG
    POST /attention   where the model looks for a phrase, as PNG
    GET /health       whether it works, and its limits

Whatever is wrong with a request is a 4xx and `{"error": "one sentence"}`.
"""

import asyncio
import dataclasses
import hashlib
import io
import math
import os
from base64 import b64encode
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from fastapi import FastAPI
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from data_pipelines import image_input, segmentations
from evf_sam_jax.errors import UserError
from evf_sam_jax.predictor import EncodedImage, InputImage, Job, PreparedJob
from evf_sam_jax.serving import asked
from evf_sam_jax.serving.asked import Asked, Limits
from evf_sam_jax.serving.batcher import Admission, Batcher, BusyError, Found, FoundMask
from evf_sam_jax.serving.body_limit import BodyLimit

# Images are decoded and resized, and answers written, by these many threads at most.
THREADS = min(4, os.cpu_count() or 1)


def make_api(batcher: Batcher, limits: Limits, name: str) -> FastAPI:
    """Returns the endpoints, to which a page can be mounted; `guarded` makes them fit to serve.

    Args:
      name: of the model, as /health tells it.
    """
    # The documentation pages would load scripts of others.
    api = FastAPI(title="EVF-SAM", docs_url=None, redoc_url=None, openapi_url=None)
    desk = _Desk(batcher, limits)

    @api.post("/predict")
    async def predict(request: Request) -> Response:
        return await desk.admitted(request, desk.predict)

    @api.post("/attention")
    async def attention(request: Request) -> Response:
        return await desk.admitted(request, desk.attention)

    @api.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": name,
            "requests_in_work": batcher.in_work,
            "limits": {"requests": batcher.batching.requests, **dataclasses.asdict(limits)},
        }

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    return api


def guarded(api: ASGIApp, limits: Limits) -> ASGIApp:
    """Returns the application to serve: no body beyond the limits reaches what is in it."""
    return BodyLimit(api, limits.body_bytes)


class _Desk:
    """Reads requests, waits for the device, writes answers."""

    def __init__(self, batcher: Batcher, limits: Limits):
        self.batcher = batcher
        self.limits = limits
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="desk")

    async def admitted(
        self, request: Request, answer: Callable[[Request, Admission], Awaitable[Response]]
    ) -> Response:
        """Answers a request while it is one of not too many, or says why not."""
        try:
            with self.batcher.admit() as admission:
                return await answer(request, admission)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        except ClientDisconnect:  # nobody reads this
            raise HTTPException(400, "expected a whole request, found its beginning") from None
        except BusyError:
            many = self.batcher.batching.requests
            raise HTTPException(
                429,
                f"expected at most {many} requests at a time, found more: try again in a second",
                headers={"Retry-After": "1"},
            ) from None
        except HTTPException:
            raise
        except Exception as error:
            logging.exception("%s failed", request.url.path)
            raise HTTPException(500, "the server failed at this; its log says how") from error

    async def predict(self, request: Request, admission: Admission) -> Response:
        wanted = _accepted(request)
        question = await self._read(request)
        digest, job = await self._in_thread(self._prepare, question, admission)
        found = await asyncio.wrap_future(admission.masks(digest, job))
        if wanted == "image/png":
            if sum(map(len, found.prompts)) != 1:
                raise UserError(
                    "Accept: image/png: expected a request for one mask, "
                    f"found one for {sum(map(len, found.prompts))}"
                )
            content = await self._in_thread(mask_png, found.prompts[0][0], found.size)
            return Response(content, media_type="image/png")
        return await self._in_thread(lambda: JSONResponse(describe(found, question)))

    async def attention(self, request: Request, admission: Admission) -> Response:
        question = await self._read(request)
        phrases = question.texts or question.text_ids or ()
        if len(phrases) != 1:
            raise UserError(f"texts: expected one phrase, found {len(phrases)}")
        [ids] = await self._in_thread(
            self.batcher.predictor.token_ids, question.texts, question.text_ids
        )
        _, image = await self._in_thread(self._image, question, admission)
        heat = await asyncio.wrap_future(admission.attention(image, ids))
        return Response(await self._in_thread(heat_png, heat), media_type="image/png")

    async def _read(self, request: Request) -> Asked:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            body = await request.body()
            return await self._in_thread(asked.from_json, body, self.limits)
        if kind != "multipart/form-data":
            raise HTTPException(
                415, "expected application/json or multipart/form-data, found another content type"
            )
        parser = MultiPartParser(
            request.headers,
            request.stream(),
            max_files=1,
            max_fields=asked.MAX_FIELDS,
            max_part_size=asked.ROOM_FOR_FIELDS,
        )
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise UserError(f"expected a form with one file, found: {error}") from None
        except KeyError:
            raise UserError("expected a form with one file, found: no boundary") from None
        try:
            return await asked.from_form(form, self.limits)
        finally:
            await form.close()

    def _image(
        self, question: Asked, admission: Admission
    ) -> tuple[str, InputImage | EncodedImage]:
        """A name for the image by its content, and the image, decoded if it is not known."""
        digest = hashlib.sha256(question.image).hexdigest()
        if (known := admission.known_image(digest)) is not None:
            return digest, known
        pixels = image_input.decode_image(question.image, "image", self.limits.pixels)
        return digest, self.batcher.predictor.prepare_image(pixels)

    def _prepare(self, question: Asked, admission: Admission) -> tuple[str, PreparedJob]:
        digest, image = self._image(question, admission)
        job = Job(
            image,
            question.texts,
            question.text_ids,
            points=question.points,
            point_labels=question.point_labels,
            boxes=question.boxes,
            multimask=question.multimask,
        )
        return digest, self.batcher.predictor.prepare(job)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)


def describe(found: Found, question: Asked) -> dict[str, Any]:
    """The answer of /predict as JSON."""

    def described(mask: FoundMask) -> dict[str, Any]:
        content = {
            "segmentation": {"size": list(found.size), "counts": mask.counts.decode("ascii")},
            "area": mask.area,
            # JSON has no NaN.
            "predicted_iou": mask.predicted_iou if math.isfinite(mask.predicted_iou) else None,
            "no_target": mask.no_target,
        }
        if question.png:
            content["png"] = b64encode(mask_png(mask, found.size)).decode("ascii")
        return content

    texts = question.texts or (None,) * len(found.prompts)
    return {
        "size": list(found.size),
        "prompts": [
            {"text": text, "masks": list(map(described, masks))}
            for text, masks in zip(texts, found.prompts, strict=True)
        ],
    }


def mask_png(mask: FoundMask, size: tuple[int, int]) -> bytes:
    """A mask as PNG: 255 inside, 0 outside."""
    return _png(segmentations.decode_parts([mask.counts], *size) * np.uint8(255))


def heat_png(heat: np.ndarray) -> bytes:
    """Attention as grey PNG, the most as 255."""
    most = float(heat.max())
    return _png(np.round(heat * (255 / most if most > 0 else 0.0)).astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _accepted(request: Request) -> str:
    return "image/png" if "image/png" in request.headers.get("accept", "") else "application/json"
