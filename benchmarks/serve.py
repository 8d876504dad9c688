"""What a server takes for a request, under load with nonsense in it, and what batching brings.

    python -m benchmarks.serve [--model MODEL_DIR]

Without a model, one of random parameters whose image takes two cores some tenths of a second, as
much dearer than a phrase as in the released model. Three parts:

1. `python -m evf_sam_jax.serve` as a process: 8 clients send 200 requests in all, of which 5 % are
   malformed; latency of the valid ones, what was answered wrongly, and the server's memory.
2. Phrases of one image, each a request: together, and one after the other without any sharing.
3. Requests with different images: together, and one after the other.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import jax
import numpy as np
from PIL import Image

from benchmarks import environment
from benchmarks.alternation import print_comparison
from data_pipelines.segmentations import decode_parts
from data_pipelines.shapes import SHAPES_TOKENIZER
from evf_sam_jax import model_dir
from evf_sam_jax.models.beit3 import Beit3Config
from evf_sam_jax.models.evf_sam import EvfSamConfig, init_params
from evf_sam_jax.models.sam.config import SamConfig
from evf_sam_jax.predictor import Job, Predictor
from evf_sam_jax.serving.batcher import Batcher, Batching, Found

CLIENTS = 8
WORDS = ("the red circle", "the largest", "the square left of it", "the small blue one")


def model_config() -> EvfSamConfig:
    """SAM ViT-B at a quarter of its frame, and a BEiT-3 as much smaller than the released one."""
    segmenter = dataclasses.replace(SamConfig.vit_b(), image_size=256, dtype="float32")
    encoder = Beit3Config(
        width=384, heads=6, layers=6, mlp_width=1536, image_size=112, dtype="float32"
    )
    return EvfSamConfig(encoder, segmenter)


def write_model(path: Path) -> None:
    config = model_config()
    params = model_dir.path_leaves(init_params(config, jax.random.key(0)))
    leaves = {name: np.asarray(leaf) for name, leaf in params.items()}
    manifest = model_dir.Manifest(variant="benchmark", config=config.to_dict())
    model_dir.write_model_dir(path, leaves, manifest, SHAPES_TOKENIZER)


def pictures(count: int, seed: int) -> list[np.ndarray]:
    """Smooth noise of COCO's size."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(x).resize((640, 480))) for x in small]


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=90)
    return file.getvalue()


@contextlib.contextmanager
def server(model: str) -> Iterator[tuple[str, int]]:
    """The command, as a process; its address and process id."""
    command = [sys.executable, "-m", "evf_sam_jax.serve", "--model", model, "--port=0", "--nopage"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"at (http://\S+)", process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        try:
            yield found[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def bomb_png() -> bytes:
    """A small file whose header says 60,000 x 60,000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def malformed(image: bytes) -> list[dict]:
    """Requests that must get a 4xx: wrong types, 100 MB, a bomb, too many phrases, paths."""
    encoded = base64.b64encode(image).decode()
    return [
        {"content": image},
        {"files": {"image": bytes(100_000_000)}},
        {"files": {"image": bomb_png()}, "data": {"texts": "a"}},
        {"json": {"image": encoded, "texts": ["a"] * 10_000}},
        {"json": {"image": "/etc/passwd", "texts": ["a"]}},
        {"json": {"image": encoded, "texts": 3}},
    ]


def print_load(model: str, requests: int) -> None:
    """The first part; several masks of the load are compared with the predictor's own."""
    images = pictures(10, seed=0)
    files = list(map(jpeg, images))
    valid = [
        {"files": {"image": file}, "data": {"texts": text}}
        for file, text in itertools.product(files, WORDS)
    ]
    bad = list(itertools.islice(itertools.cycle(malformed(files[0])), requests // 20))
    good = list(itertools.islice(itertools.cycle(range(len(valid))), requests - len(bad)))
    tasks: list[tuple[int | None, dict]] = [(i, valid[i]) for i in good]
    tasks += [(None, request) for request in bad]
    random.Random(0).shuffle(tasks)
    answers: dict[int, list[dict]] = {}
    wrong = 0

    with server(model) as (url, pid), httpx.Client(base_url=url, timeout=600) as client:

        def run(task: tuple[int | None, dict]) -> tuple[int | None, httpx.Response, float]:
            start = time.perf_counter()
            answer = client.post("/predict", **task[1])
            return task[0], answer, time.perf_counter() - start

        memory = [_resident_megabytes(pid)]
        for _ in range(2):
            times = []
            start = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                for i, answer, seconds in pool.map(run, tasks):
                    if i is None:
                        wrong += not (400 <= answer.status_code < 500 and answer.json()["error"])
                    elif answer.status_code == 200:
                        answers.setdefault(i, []).append(answer.json())
                        times.append(seconds)
                    else:
                        wrong += 1
            wall = time.perf_counter() - start
            memory.append(_resident_megabytes(pid))

    predictor = Predictor.load(model)
    differing = 0
    for i, found in answers.items():
        file, text = divmod(i, len(WORDS))
        pixels = np.asarray(Image.open(io.BytesIO(files[file])))
        [mask] = predictor.predict(pixels, texts=[WORDS[text]]).masks
        for answer in found:
            counts = answer["prompts"][0]["masks"][0]["segmentation"]["counts"].encode()
            differing = max(differing, int((decode_parts([counts], *mask.shape) != mask).sum()))
    print(environment.describe("fastapi", "uvicorn"))
    print(f"{requests} requests of {CLIENTS} clients, {len(bad)} of them malformed, twice\n")
    print("| of the second time | |\n|---|---|")
    print(f"| requests a second | {requests / wall:.1f} |")
    print(f"| p50 of the valid, s | {np.percentile(times, 50):.2f} |")
    print(f"| p99 | {np.percentile(times, 99):.2f} |")
    print(f"| wrong answers, both times | {wrong} |")
    print(f"| pixels of a mask unlike the predictor's, at most | {differing} of 307,200 |")
    print("| MB: warm, after once, after twice | " + ", ".join(f"{x:.0f}" for x in memory) + " |\n")


def _resident_megabytes(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def print_batching(model: str, requests: int, repeats: int) -> None:
    """The second and the third part."""
    predictor = Predictor.load(model)
    longest = max(map(len, predictor.token_ids(WORDS)))
    predictor.warm_up(images=Batching().images, prompts=requests, tokens=longest)

    def ask(batcher: Batcher, image: np.ndarray, text: str) -> "concurrent.futures.Future[Found]":
        with batcher.admit() as admission:
            return admission.masks(str(id(image)), predictor.prepare(Job(image, [text])))

    shared = pictures(1, seed=1)
    different = pictures(requests, seed=2)
    texts = list(itertools.islice(itertools.cycle(WORDS), requests))

    # Each run has a batcher of its own, so that nothing is kept from an earlier one.
    def together(images: list[np.ndarray]) -> None:
        with Batcher(predictor, Batching(requests=requests)) as batcher:
            for answer in [ask(batcher, *job) for job in zip(images, texts, strict=True)]:
                answer.result()

    def by_turns(images: list[np.ndarray]) -> None:
        alone = Batching(requests=requests, images=1, prompts=1, linger=0.0, kept_images=0)
        with Batcher(predictor, alone) as batcher:
            for job in zip(images, texts, strict=True):
                ask(batcher, *job).result()

    for title, images in (
        (f"{requests} requests, a phrase each, of one image", shared * requests),
        (f"{requests} requests, a phrase each, of as many images", different),
    ):
        runs = {
            "together": lambda images=images: together(images),
            "one by one": lambda images=images: by_turns(images),
        }
        for run in runs.values():
            run()
        print_comparison(title, runs, repeats)
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=200, help="of the load; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=8, help="requests that come together")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or os.path.join(folder, "model")
        if not options.model:
            write_model(Path(model))
        if options.requests:
            print_load(model, options.requests)
        print_batching(model, options.batch, options.repeats)


if __name__ == "__main__":
    main()
