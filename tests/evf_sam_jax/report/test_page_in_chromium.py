"""The page as a browser shows it: nothing asked for, nothing cut off, every picture there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evf_sam_jax.report.build import build_report
from tests.chromium import chromium
from tests.evf_sam_jax.report.made_up_run import write_run

pytestmark = pytest.mark.slow
BROKEN = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
# What reaches beyond the window and cannot be scrolled to within its own box.
CUT_OFF = """[...document.querySelectorAll('body *')].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')).length"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(folder / "one", ("val", "test"), images=60, skill=0.8, seed=1)
    other = write_run(folder / "another_with_a_name_without_any_break", images=60, seed=2)
    (folder / "report.html").write_text(build_report(one, other))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_looks_right(browser, page_file: Path, scheme: str, width: int):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("document.images.length") > 200
    assert page.evaluate(BROKEN) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == 0
    lightness = sum(map(int, page.evaluate(BACKGROUND)[4:-1].split(",")))
    assert lightness > 700 if scheme == "light" else lightness < 100
    context.close()


def test_it_prints(browser, page_file: Path):
    context = browser.new_context()
    page = context.new_page()
    page.goto(page_file.as_uri())
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF") and len(paper) > 100_000
    context.close()
