"""Eight users at once, some of whom send nonsense: the right answers, and memory that stays."""

import base64
import concurrent.futures
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import segmentations
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax.serving.served_model import TEXTS, png, write_served_model
from tests.evf_sam_jax.serving.server_process import Server, server_process
from tests.evf_sam_jax.tiny_model import picture

pytest.importorskip("fastapi", reason='serving is not installed: pip install ".[serve]"')
pytest.importorskip("httpx", reason='serving is not installed: pip install ".[serve]"')

import httpx

from benchmarks.serve import bomb_png

pytestmark = pytest.mark.slow
CLIENTS, REQUESTS, MALFORMED = 8, 200, 10
IMAGES = [picture(120, 160, seed=i) for i in range(6)]
POINT = {"points": [[[30, 40]]], "point_labels": [[1]]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("models") / "served")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with server_process(model, "--nopage", "--max_requests=8") as server:
        yield server


def nonsense() -> list[tuple[int, str, dict[str, Any]]]:
    """Status, beginning of the sentence, request."""
    image = png(IMAGES[0])
    encoded = base64.b64encode(image).decode()
    hundred_megabytes = bytes(100_000_000)
    return [
        (415, "expected application/json or", {"content": image}),
        (400, "texts: expected a list", {"json": {"image": encoded, "texts": 3}}),
        (413, "expected a request of at most", {"files": {"image": hundred_megabytes}}),
        (400, "image: expected at most", {"files": {"image": bomb_png()}, "data": {"texts": "a"}}),
        (400, "texts: expected at most 16", {"json": {"image": encoded, "texts": ["a"] * 10_000}}),
        (400, "image: expected a", {"json": {"image": "/etc/passwd", "texts": ["a"]}}),
        (400, "image: expected an", {"files": {"image": (None, "/etc/passwd")}}),
        (400, "unknown field 'path'", {"json": {"image": encoded, "path": "/etc/passwd"}}),
        (400, "expected a form", {"files": {"image": image}, "data": {"texts": ["a"] * 10_000}}),
        (400, "boxes: expected", {"json": {"image": encoded, "boxes": [[0, 0, 1e9, 1]]}}),
    ]


def test_two_hundred_requests_of_eight_clients(server: Server, model: Path):
    predictor = Predictor.load(model)
    expected = {
        (i, text): predictor.predict(image, texts=[text]).masks[0]
        for i, image in enumerate(IMAGES)
        for text in TEXTS
    }
    by_point = [predictor.predict(image, **POINT).masks[0] for image in IMAGES]

    def right(client: Any, i: int, text: str | None) -> None:
        fields = POINT if text is None else {"texts": [text]}
        image = base64.b64encode(png(IMAGES[i])).decode()
        answer = client.post("/predict", json={"image": image, **fields})
        assert answer.status_code == 200, answer.text
        [prompt] = answer.json()["prompts"]
        counts = prompt["masks"][0]["segmentation"]["counts"].encode()
        found = segmentations.decode_parts([counts], *IMAGES[i].shape[:2])
        wanted = by_point[i] if text is None else expected[i, text]
        # Rounding depends on the sizes of batches, and may move a pixel of an edge.
        assert (found != wanted).sum() <= 2

    def wrong(client: Any, status: int, sentence: str, request: dict[str, Any]) -> None:
        answer = client.post("/predict", **request)
        assert answer.status_code == status
        assert answer.json()["error"].startswith(sentence)

    # Texts more often than a point alone, each with every image.
    questions = itertools.cycle(itertools.product(range(len(IMAGES)), (*TEXTS, None)))
    tasks: list[tuple[Callable[..., None], tuple]] = [
        (right, next(questions)) for _ in range(REQUESTS - MALFORMED)
    ]
    tasks += [(wrong, request) for request in nonsense()]
    random.Random(0).shuffle(tasks)

    def run_all() -> None:
        with (
            httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client,
            concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool,
        ):
            futures = [pool.submit(task, client, *arguments) for task, arguments in tasks]
            for future in futures:
                future.result()

    run_all()
    after_first = server.resident_megabytes()
    for _ in range(3):
        run_all()
    # What 600 more requests leave, of which 6 were of 100 MB, and 6 were bombs of 10 GB.
    assert server.resident_megabytes() - after_first < 32
    assert np.ptp([mask.sum() for mask in expected.values()]) > 100, "the questions differ"
