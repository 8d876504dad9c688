"""The endpoints: what is right is answered as the model answers it, what is wrong by a sentence."""

import base64
import concurrent.futures
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import segmentations
from evf_sam_jax import model_dir
from evf_sam_jax.predictor import Predictor
from tests.evf_sam_jax.serving.served_model import (
    TEXTS,
    Watched,
    png,
    served,
    served_params,
)
from tests.evf_sam_jax.tiny_model import CONFIG, TOKENIZER, picture

pytest.importorskip("fastapi", reason='serving is not installed: pip install ".[serve]"')
pytest.importorskip("httpx", reason='serving is not installed: pip install ".[serve]"')

import httpx

from benchmarks.serve import bomb_png
from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.serve import make_application
from evf_sam_jax.serving import body_limit
from evf_sam_jax.serving.app import describe
from evf_sam_jax.serving.asked import Asked, Limits
from evf_sam_jax.serving.batcher import Batcher, Batching, Found, FoundMask

IMAGE = picture(40, 60, seed=1)
LIMITS = Limits(upload_bytes=200_000, pixels=1_000_000, prompts=8, characters=100)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    tokenizer = load_tokenizer(TOKENIZER, CONFIG.encoder.max_text_tokens)
    return Predictor(CONFIG, model_dir.nest(served_params()), tokenizer)


@pytest.fixture(scope="module")
def watched(predictor: Predictor) -> Watched:
    return Watched(predictor)


@pytest.fixture(scope="module")
def batcher(watched: Watched) -> Iterator[Batcher]:
    with Batcher(watched, Batching(requests=4)) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def client(batcher: Batcher) -> Iterator[Any]:
    with (
        served(make_application(batcher, LIMITS, "tiny", page=False)) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        yield client


def post_form(client, image: bytes = png(IMAGE), name: str = "a.png", **fields: Any):
    return client.post("/predict", files={"image": (name, image)}, data=fields)


def post_json(client, image: bytes = png(IMAGE), **fields: Any):
    return client.post("/predict", json={"image": base64.b64encode(image).decode(), **fields})


def masks_of(answer) -> np.ndarray:
    """The first mask of each prompt."""
    assert answer.status_code == 200, answer.text
    content = answer.json()
    return np.stack(
        [
            segmentations.decode_parts(
                [prompt["masks"][0]["segmentation"]["counts"].encode()], *content["size"]
            ).astype(bool)
            for prompt in content["prompts"]
        ]
    )


def assert_alike(found: np.ndarray, expected: np.ndarray):
    """But for a pixel at an edge, which rounding in batches of other sizes may move."""
    assert found.shape == expected.shape
    assert (found != expected).sum(axis=(1, 2)).max() <= 1


def test_a_form_and_json_answer_as_the_model(client, predictor: Predictor):
    expected = predictor.predict(IMAGE, texts=TEXTS)
    for post in (post_form, post_json):
        answer = post(client, texts=list(TEXTS))
        assert_alike(masks_of(answer), expected.masks)
        prompts = answer.json()["prompts"]
        assert [prompt["text"] for prompt in prompts] == list(TEXTS)
        masks = [prompt["masks"][0] for prompt in prompts]
        assert [mask["area"] for mask in masks] == masks_of(answer).sum((1, 2)).tolist()
        np.testing.assert_allclose(
            [mask["predicted_iou"] for mask in masks], expected.iou, atol=1e-4
        )
        assert [mask["no_target"] for mask in masks] == expected.no_target.tolist()
        assert set(masks[0]) == {"segmentation", "area", "predicted_iou", "no_target"}


def test_points_and_boxes_with_alternatives_and_png(client, predictor: Predictor):
    geometry = {
        "points": [[[10, 20], [30, 5]]],
        "point_labels": [[1, 0]],
        "boxes": [[5, 5, 50, 30]],
    }
    expected = predictor.predict(IMAGE, **geometry, multimask=True)
    by_json = post_json(client, **geometry, multimask=True, png=True).json()
    as_text = {name: json.dumps(value) for name, value in geometry.items()}
    by_form = post_form(client, **as_text, multimask="true", png="true").json()
    assert by_json == by_form
    [prompt] = by_json["prompts"]
    assert prompt["text"] is None
    for mask, pixels in zip(prompt["masks"], expected.masks[0], strict=True):
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"]))))
        assert set(np.unique(found)) <= {0, 255}
        assert_alike(found[None] > 0, pixels[None])


def test_one_mask_as_png(client, predictor: Predictor):
    files = {"image": ("a.png", png(IMAGE))}
    headers = {"Accept": "image/png"}
    answer = client.post("/predict", files=files, data={"texts": TEXTS[0]}, headers=headers)
    assert answer.headers["content-type"] == "image/png"
    found = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert_alike(found[None] > 0, predictor.predict(IMAGE, texts=TEXTS[:1]).masks)
    answer = client.post("/predict", files=files, data={"texts": TEXTS[:2]}, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "Accept: image/png: expected a request for one mask, found one for 2",
    )


def test_an_iou_that_is_no_number_is_null():
    mask = FoundMask(segmentations.encode_mask(np.ones((2, 3), bool)), 6, float("nan"), False)
    described = describe(Found((2, 3), ((mask,),)), Asked(b""))
    assert described["prompts"][0]["masks"][0]["predicted_iou"] is None
    json.dumps(described, allow_nan=False)


def test_categories_have_their_prefix(client, predictor: Predictor):
    answer = post_json(client, texts=["circle"], semantic=True)
    assert answer.json()["prompts"][0]["text"] == "[semantic] circle"
    expected = predictor.predict(IMAGE, texts=["[semantic] circle"])
    assert_alike(masks_of(answer), expected.masks)


def test_attention_is_the_models(client, predictor: Predictor):
    files = {"image": ("a.png", png(IMAGE))}
    answer = client.post("/attention", files=files, data={"texts": TEXTS[0]})
    heat = predictor.attention_map(IMAGE, TEXTS[0])
    found = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_array_equal(found, np.round(heat * (255 / float(heat.max()))))
    answer = client.post("/attention", files=files, data={"texts": TEXTS[:2]})
    assert answer.json() == {"error": "texts: expected one phrase, found 2"}


def test_health_tells_the_limits(client):
    assert client.get("/health").json() == {
        "status": "ok",
        "model": "tiny",
        "requests_in_work": 0,
        "limits": {
            "requests": 4,
            "upload_bytes": 200_000,
            "pixels": 1_000_000,
            "prompts": 8,
            "characters": 100,
        },
    }


NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
ROUND = {"texts": ["round"]}
BAD_JSON: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "expected texts, text_ids, points, boxes or mask_logits, found none of them"),
    "image by path": ({"image": "/etc/passwd", **ROUND}, "image: expected a file in base64"),
    "image by path that is base64": ({"image": "/etc/abc", **ROUND}, "image: expected an image"),
    "image by url": ({"image": "http://127.0.0.1/a.png", **ROUND}, "image: expected a file in"),
    "image as a list": ({"image": [1, 2], **ROUND}, "image: expected a file in base64, found a li"),
    "empty image": ({"image": "", **ROUND}, "image: expected an image file, found an empty one"),
    "unknown field": ({"image_path": "/etc/passwd", **ROUND}, "unknown field 'image_path', expect"),
    "phrase alone": ({"texts": "round"}, "texts: expected a list, found text"),
    "phrase as number": ({"texts": [3]}, "texts: expected phrases, found a number"),
    "empty phrase": ({"texts": [" "]}, "texts: expected phrases, found an empty one"),
    "half a surrogate": ({"texts": ["red \ud800"]}, "the phrase 'red \\ud800' is no Unicode text"),
    "long phrase": ({"texts": ["a" * 101]}, "texts: expected phrases of at most 100 characters"),
    "many phrases": ({"texts": ["a"] * 10_000}, "texts: expected at most 8, found 10000"),
    "many values": ({"texts": ["a"] * 30_000}, "expected at most 20000 values in a request"),
    "ids as text": ({"text_ids": ["0 5 2"]}, "text_ids: expected a list of integers a phrase"),
    "ids outside": ({"text_ids": [[0, 10**9, 2]]}, "expected token ids from 0 to"),
    "both kinds": ({**ROUND, "text_ids": [[0, 2]]}, "expected phrases either as texts or as token"),
    "flag as text": ({**ROUND, "png": "yes"}, "png: expected true or false, found text"),
    "box outside": ({"boxes": [[0, 0, 61, 9]]}, "boxes: expected x0 < x1 and y0 < y1 inside"),
    "box of words": ({"boxes": [["a", "b", "c", "d"]]}, "boxes: expected an array of numbers"),
    "number as text": ({"boxes": [["0", 0, 9, 9]]}, "boxes: expected an array of numbers, found t"),
    "number as flag": (
        {"points": [[[6, 0]]], "point_labels": [[True]]},
        "point_labels: expected an array of numbers, found true or false in it",
    ),
    "no number": (
        {"points": [[[6, None]]], "point_labels": [[1]]},
        "points: expected an array of numbers, found nothing in it",
    ),
    "point outside": ({"points": [[[60, 0]]], "point_labels": [[1]]}, "points: expected pixels"),
    "points alone": ({"points": [[[6, 0]]]}, "expected points and point_labels together"),
    "deep box": ({"boxes": [[[[[[0]]]]]]}, "boxes: expected numbers [any, 4], found shape"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused_in_a_sentence(client, case: str):
    fields, sentence = BAD_JSON[case]
    image = base64.b64encode(png(IMAGE)).decode()
    # Escaped: httpx itself refuses what is no Unicode.
    body = json.dumps({"image": image, **fields}).encode("ascii")
    answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(sentence)


BAD_BODIES: dict[str, tuple[bytes, str, int, str]] = {
    "no JSON": (b"{", "application/json", 400, "expected a JSON object, found something else"),
    "a list": (b"[1]", "application/json", 400, "expected a JSON object, found a list"),
    "deep": (b"[" * 15_000, "application/json", 400, "expected a JSON object, found something"),
    "NaN": (
        json.dumps(
            {"image": base64.b64encode(png(IMAGE)).decode(), "boxes": [[0, 0, float("nan"), 9]]}
        ).encode(),
        "application/json",
        400,
        "boxes: expected finite numbers, found nan in prompt 0",
    ),
    "an image alone": (png(IMAGE), "image/png", 415, "expected application/json or multipart/form"),
    "no type": (b"x", "", 415, "expected application/json or multipart/form-data"),
    "no boundary": (b"x", "multipart/form-data", 400, "expected a form with one file, found"),
    "no form": (b"x" * 99, "multipart/form-data; boundary=q", 400, "expected a form with one file"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_bad_body_is_refused_in_a_sentence(client, case: str):
    body, kind, status, sentence = BAD_BODIES[case]
    answer = client.post("/predict", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"][: len(sentence)]) == (status, sentence)


BAD_FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"data": ROUND}, "expected application/json or multipart/form-data"),
    "image as text": ({"files": {"image": (None, "/etc/passwd")}}, "image: expected an image file"),
    "two images": ({"files": [("image", b"a"), ("image", b"b")]}, "expected a form with one file"),
    "no picture": ({"files": {"image": b"text"}}, "image: expected an image file, found something"),
    "cut off": ({"files": {"image": png(NOISE)[:5000]}}, "image: expected a whole image, found"),
    "bomb": ({"files": {"image": bomb_png()}}, "image: expected at most 1,000,000 pixels, found"),
    "too many bytes": ({"files": {"image": png(NOISE)}}, "image: expected at most 200,000 bytes"),
    "list as text": (
        {"files": {"image": png(IMAGE)}, "data": {"boxes": "here"}},
        "boxes: expected lists of numbers as JSON, found something else",
    ),
    "flag twice": (
        {"files": {"image": png(IMAGE)}, "data": {"png": ["true", "true"]}},
        "'png': expected it once, found 2 of it",
    ),
    "phrases as a file": (
        {"files": {"texts": b"a"}},
        "image: expected an image file, found none",
    ),
    "boxes as a file": ({"files": {"boxes": b"a"}}, "'boxes': expected text, found a file"),
    "10,000 phrases": (
        {"files": {"image": png(IMAGE)}, "data": {"texts": ["a"] * 10_000}},
        "expected a form with one file, found: Too many fields",
    ),
}


@pytest.mark.parametrize("case", BAD_FORMS)
def test_a_bad_form_is_refused_in_a_sentence(client, case: str):
    request, sentence = BAD_FORMS[case]
    answer = client.post("/predict", **({"data": ROUND} | request))
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"].startswith(sentence), answer.json()


def test_a_name_is_no_path(client, predictor: Predictor):
    answer = post_form(client, name="../../../etc/passwd", texts="../../etc/passwd")
    assert_alike(masks_of(answer), predictor.predict(IMAGE, texts=["../../etc/passwd"]).masks)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_refused_while_it_comes(client, chunked: bool):
    body: Any = bytes(30_000_000)
    if chunked:  # without a stated length
        body = (bytes(1_000_000) for _ in range(30))
    headers = {"Content-Type": "application/json"}
    answer = client.post("/predict", content=body, headers=headers)
    found = "more" if chunked else "30,000,000"
    limit = f"{LIMITS.body_bytes:,}"
    assert answer.status_code == 413
    assert answer.json() == {"error": f"expected a request of at most {limit} bytes, found {found}"}


def test_a_body_that_does_not_come_is_given_up(client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body_limit, "READING_SECONDS", 0.2)
    waited = threading.Event()

    def body() -> Iterator[bytes]:
        yield b"{"
        waited.wait(timeout=1)
        yield b"}"

    answer = client.post("/predict", content=body(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 408
    assert answer.json()["error"].startswith("expected a whole request within 0.2 seconds")


def test_other_paths_and_methods_are_refused(client):
    for method, path, status in (
        ("GET", "/predict", 405),
        ("GET", "/file=/etc/passwd", 404),
        ("GET", "/docs", 404),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert isinstance(answer.json()["error"], str)


def test_a_full_queue_says_when_to_come_back(client, watched: Watched):
    watched.go.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post_form, client, texts=text) for text in TEXTS]
        while client.get("/health").json()["requests_in_work"] < 4:
            pass
        answer = post_form(client, texts="one more")
        watched.go.set()
    assert [task.result().status_code for task in waiting] == [200] * 4
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["error"] == (
        "expected at most 4 requests at a time, found more: try again in a second"
    )


def test_a_failure_of_the_model_is_a_500_without_its_words(client, watched: Watched):
    watched.failure = RuntimeError("secret")
    answer = post_form(client, texts="round")
    watched.failure = None
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed at this; its log says how"}
    assert post_form(client, texts="round").status_code == 200
