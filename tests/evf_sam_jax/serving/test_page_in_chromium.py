"""The page as a person uses it: upload, phrases, clicks, a box; masks, attention, downloads."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import segmentations
from evf_sam_jax.predictor import Predictor
from tests.chromium import chromium
from tests.evf_sam_jax.serving.served_model import TEXTS, png, write_served_model
from tests.evf_sam_jax.serving.server_process import Server, server_process
from tests.evf_sam_jax.tiny_model import picture

pytest.importorskip("gradio", reason='serving is not installed: pip install ".[serve]"')
pytest.importorskip("httpx", reason='serving is not installed: pip install ".[serve]"')

import httpx

pytestmark = pytest.mark.slow
HEIGHT, WIDTH = 300, 400  # shown pixel for pixel
PHOTO = picture(HEIGHT, WIDTH, seed=1)
PIXEL = """([x, y]) => [...document.getElementById('evf-canvas').getContext('2d')
    .getImageData(x, y, 1, 1).data.slice(0, 3)]"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("models") / "served")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with server_process(model, "--nowarm_up") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


class Visit:
    """A page, with what it asked for and complained of."""

    def __init__(self, context, url: str):
        self.page = context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._complain)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#evf-choose", state="visible")
        self.page.wait_for_timeout(1000)  # until its events are connected

    def _complain(self, message) -> None:
        if "willReadFrequently" not in message.text:  # about what a test reads of the canvas
            self.complaints.append(message.text)

    def upload(self, content: bytes, name: str = "photo.png") -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.page.set_input_files("#evf-file", file)

    def phrases(self, *texts: str) -> None:
        self.page.fill("#evf-phrases textarea", "\n".join(texts))

    def mode(self, name: str) -> None:
        self.page.get_by_label(name, exact=True).check()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A pixel of the picture, on the screen."""
        shown = self.page.locator("#evf-canvas").bounding_box()
        return shown["x"] + (x + 0.5) * shown["width"] / WIDTH, (
            shown["y"] + (y + 0.5) * shown["height"] / HEIGHT
        )

    def segment(self) -> list[str]:
        """Asks, and returns what the legend says."""
        self.page.click("#evf-segment")
        self.page.wait_for_selector("#evf-legend li, #evf-status.evf-wrong", timeout=60_000)
        assert self.page.locator("#evf-status.evf-wrong").count() == 0, self.page.inner_text(
            "#evf-status"
        )
        return self.page.locator("#evf-legend li").all_inner_texts()

    def download(self, selector: str) -> bytes:
        with self.page.expect_download() as waiting:
            self.page.locator(selector).click()
        return Path(waiting.value.path()).read_bytes()


def test_phrases_clicks_and_a_box_to_files(browser, server: Server, model: Path):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visit = Visit(context, server.url)
    visit.upload(png(PHOTO))
    visit.phrases(TEXTS[0], "", f"  {TEXTS[2]} ")
    visit.page.mouse.click(*visit.at(100, 50))
    visit.mode("Point outside")
    visit.page.mouse.click(*visit.at(300, 200))
    visit.page.mouse.click(*visit.at(20, 30))
    visit.page.mouse.click(*visit.at(21, 30))  # takes the last one away
    visit.mode("Box")
    visit.page.mouse.move(*visit.at(349.5, 249.5))
    visit.page.mouse.down()
    visit.page.mouse.move(*visit.at(200, 100))
    visit.page.mouse.move(*visit.at(39.5, 19.5))
    visit.page.mouse.up()
    assert visit.page.inner_text("#evf-clicks") == "2 points; box 40, 20, 350, 250"
    before = visit.page.evaluate(PIXEL, [1, 1]), visit.page.evaluate(PIXEL, [200, 150])
    legend = visit.segment()

    expected = Predictor.load(model).predict(
        PHOTO,
        texts=[TEXTS[0], TEXTS[2]],
        points=[[[100, 50], [300, 200]]] * 2,
        point_labels=[[1, 0]] * 2,
        boxes=[[40, 20, 350, 250]] * 2,
    )
    assert [entry.splitlines()[0] for entry in legend] == [TEXTS[0], TEXTS[2]]
    assert f"IoU {expected.iou[1]:.2f}" in legend[1]
    content = json.loads(visit.download("#evf-rle"))
    for i, mask in enumerate(expected.masks):
        counts = content["prompts"][i]["masks"][0]["segmentation"]["counts"].encode()
        by_rle = segmentations.decode_parts([counts], HEIGHT, WIDTH) > 0
        file = visit.download(f"#evf-legend li:nth-child({i + 1}) a")
        by_png = np.asarray(Image.open(io.BytesIO(file)))
        np.testing.assert_array_equal(by_png, by_rle * np.uint8(255))
        assert (by_rle != mask).sum() <= 2
    assert f"{content['prompts'][1]['masks'][0]['area']:,} pixels" in legend[1]
    visit.page.mouse.move(0, 0)  # an entry of the legend that is pointed at shows its mask alone
    for (x, y), was in zip(((1, 1), (200, 150)), before, strict=True):
        painted = visit.page.evaluate(PIXEL, [x, y]) != was
        assert painted == expected.masks[:, y, x].any()

    visit.page.get_by_role("tab", name="Attention").click()
    visit.page.click("#evf-attend")
    visit.page.wait_for_selector("#evf-heat:not([hidden])", timeout=120_000)
    heat = np.asarray(Image.open(io.BytesIO(visit.download("#evf-heat-png"))))
    wanted = Predictor.load(model).attention_map(PHOTO, TEXTS[0])
    np.testing.assert_allclose(heat, wanted * (255 / wanted.max()), atol=1)

    visit.page.click("#evf-clear")
    assert visit.page.inner_text("#evf-clicks") == ""
    assert visit.complaints == []
    hosts = {url.split("/")[2] for url in visit.requests if url.startswith("http")}
    assert hosts == {server.url.removeprefix("http://")}, "nothing is asked of others"
    context.close()


def test_points_alone_with_alternatives(browser, server: Server, model: Path):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visit = Visit(context, server.url)
    visit.upload(png(PHOTO))
    visit.page.mouse.click(*visit.at(100, 50))
    visit.page.get_by_label("Three alternatives").check()
    legend = visit.segment()
    assert [entry.splitlines()[0] for entry in legend] == [
        f"the clicks, alternative {i} of 3" for i in (1, 2, 3)
    ]
    expected = Predictor.load(model).predict(
        PHOTO, points=[[[100, 50]]], point_labels=[[1]], multimask=True
    )
    for i in range(3):
        file = visit.download(f"#evf-legend li:nth-child({i + 1}) a")
        found = np.asarray(Image.open(io.BytesIO(file))) > 0
        assert (found != expected.masks[0, i]).sum() <= 2
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_cut_off(browser, server: Server, scheme: str, width: int):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    visit = Visit(context, server.url)
    visit.upload(png(PHOTO))
    visit.phrases("circle" * 4, "<img src=x onerror=alert(1)>")
    legend = visit.segment()
    assert legend[1].splitlines()[0] == "<img src=x onerror=alert(1)>", "shown, not obeyed"
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.complaints == []
    context.close()


def test_mistakes_get_a_sentence(browser, server: Server):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visit = Visit(context, server.url)

    def said(sentence: str) -> None:
        status = visit.page.locator("#evf-status.evf-wrong")
        status.get_by_text(sentence).wait_for(timeout=60_000)

    visit.page.click("#evf-segment")
    said("First choose a picture.")
    visit.upload(b"no picture")
    said("The browser cannot show this file")
    visit.upload(png(PHOTO))
    visit.page.click("#evf-segment")
    said("Type a phrase, click a point, or draw a box.")
    visit.phrases(*["a"] * 17)
    visit.page.click("#evf-segment")
    said("texts: expected at most 16, found 17")
    context.close()


def test_of_gradio_only_the_page_is_reachable(server: Server):
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for method, path in (
            ("GET", "/gradio_api/file=/etc/passwd"),
            ("GET", "/gradio_api/file/etc/passwd"),
            ("GET", "/file=/etc/passwd"),
            ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
            ("GET", "/gradio_api/info"),
            ("GET", "/gradio_api/queue/data"),
            ("GET", "/monitoring"),
            ("GET", "/docs"),
            ("GET", "/openapi.json"),
            ("POST", "/"),
            ("POST", "/gradio_api/upload"),
            ("POST", "/gradio_api/queue/join"),
            ("POST", "/gradio_api/component_server"),
            ("POST", "/gradio_api/vibe-edit"),
        ):
            answer = client.request(method, path)
            assert (answer.status_code, answer.json()) == (404, {"error": "no such page"}), path
        assert client.get("/predict").json() == {"error": "expected POST, found GET"}
        for path in ("/assets/..%2f..%2f..%2fetc/passwd", "/static/%2e%2e/%2e%2e/blocks.py"):
            assert client.get(path).status_code in (403, 404)
