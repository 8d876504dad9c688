"""A tiny model that marks other pixels for other phrases, and a server of it in a thread."""

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from evf_sam_jax import model_dir
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax.tiny_model import CONFIG, TOKENIZER, random_params

TEXTS = ("the red circle", "the largest", "the small blue square left of it", "the yellow one")


def served_params() -> dict[str, np.ndarray]:
    """Of which the phrases' part is made large, so that it reaches the masks."""
    params = random_params(seed=3)
    return {
        path: leaf * np.float32(10)
        if path.startswith("projector/") and path.endswith("kernel")
        else leaf
        for path, leaf in params.items()
    }


def write_served_model(path: Path) -> Path:
    """Writes the model directory."""
    manifest = model_dir.Manifest(variant="tiny", config=CONFIG.to_dict())
    model_dir.write_model_dir(path, served_params(), manifest, TOKENIZER)
    return path


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


class Watched(Predictor):
    """A predictor that can be held before it decodes, made to fail, and counts what it encodes."""

    def __init__(self, predictor: Predictor):
        super().__init__(predictor.config, predictor.params, predictor.tokenizer)
        self.go = threading.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.batches: list[int] = []  # prompts of each call of decode
        self.encoded: list[int] = []  # images of each call of encode_batch

    def decode(self, jobs):
        self.go.wait(timeout=60)
        jobs = list(jobs)
        self.batches.append(sum(len(job.prompts) for job in jobs))
        if self.failure is not None:
            raise self.failure
        return super().decode(jobs)

    def encode_batch(self, images):
        if len(images):
            self.encoded.append(len(images))
        return super().encode_batch(images)


@contextlib.contextmanager
def served(application) -> Iterator[str]:
    """Serves an application in a thread; gives its address."""
    import uvicorn

    config = uvicorn.Config(application, port=0, log_level="error", lifespan="on", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    [listener] = server.servers[0].sockets
    try:
        yield "http://{}:{}".format(*listener.getsockname()[:2])
    finally:
        server.should_exit = True
        thread.join()
