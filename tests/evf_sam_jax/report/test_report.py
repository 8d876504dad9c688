"""The page holds what the runs say, asks for nothing, runs nothing, and says what is not there."""

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.shapes import ShapesSource
from evf_sam_jax.errors import UserError
from evf_sam_jax.evaluation.rows import read_rows, write_rows
from evf_sam_jax.evaluation.splits import PAPER_SETS
from evf_sam_jax.report.__main__ import main
from evf_sam_jax.report.analysis import analyse, worst_and_best
from evf_sam_jax.report.build import build_report
from evf_sam_jax.report.evaluated_set import read_sets
from tests.evf_sam_jax.report.made_up_run import prediction_columns, row_of, write, write_run

ROOT = Path(__file__).parents[3]
ATTACK = "<script>alert(1)</script><img src=x onerror='alert(2)'> \u202e\x07\"&amp;"
VOID = {"meta", "link", "img", "br", "rect", "line"}
OPTIONAL_END = {"tr", "td", "th"}


class Page(HTMLParser):
    """What a page is made of: tags with attributes, and text; tags must close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | OPTIONAL_END:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag == "title" and self._open[-1] == "rect":
            self._open.pop()
        if tag not in VOID | OPTIONAL_END:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on shapes/val; the first has shapes/test too."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(folder / "one", ("val", "test"), images=30, skill=0.8, seed=1)
    return one, write_run(folder / "other", ("val",), images=30, skill=0.5, seed=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 36 phrases."""
    return write_run(tmp_path_factory.mktemp("small") / "small", images=12)


@pytest.fixture(scope="module")
def compared(runs: tuple[Path, Path]) -> str:
    return build_report(*runs)


def change(run: Path, out: Path, **columns) -> Path:
    """Copies a run with other values; `columns` are functions of (row, old value)."""
    rows = read_rows(run).to_pylist()
    for key, value in columns.items():
        for i, row in enumerate(rows):
            row[key] = value(i, row[key])
    out.mkdir()
    write_rows(out, pa.Table.from_pylist(rows, schema=read_rows(run).schema))
    (out / "results.json").write_text((run / "results.json").read_text())
    return out


def test_it_asks_for_nothing_and_runs_nothing(compared: str):
    page = Page(compared)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "form", "base")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href"):
                assert re.match(r"data:|#", value or ""), (tag, value)
    assert "url(" not in compared and "@import" not in compared
    assert len(compared.encode()) < 10_000_000


def test_links_lead_somewhere(compared: str):
    page = Page(compared)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert links <= ids and {"scores", "comparison", "worst", "best"} <= links


def test_it_has_the_scores_of_every_set(runs: tuple[Path, Path], compared: str):
    words = Page(compared).words
    for name, phrases in read_sets(runs[0]).items():
        assert name in words
        ciou = 100 * phrases.intersection.sum() / phrases.union.sum()
        assert f"{ciou:.1f}" in words
        scores = analyse(phrases).scores
        assert scores["P@0.5"].value == pytest.approx(np.mean(phrases.iou >= 0.5))
        assert scores["gIoU"].value == pytest.approx(phrases.iou.mean())
        per_image = [phrases.iou[phrases.image_index == i].mean() for i in range(30)]
        assert scores["mean IoU per image"].value == pytest.approx(np.mean(per_image))
        assert all(score.low <= score.value <= score.high for score in scores.values())


def test_a_tie_with_a_threshold_is_a_hit_as_in_the_results(small: Path):
    phrases = read_sets(small)["shapes/val"]
    half = np.arange(len(phrases)) % 2
    union = np.full(len(phrases), 100)
    tied = dataclasses.replace(phrases, intersection=70 - half, union=union)
    assert analyse(tied).scores["P@0.7"].value == np.mean(half == 0)
    tied = dataclasses.replace(phrases, intersection=50 - half, union=union)
    assert analyse(tied).scores["P@0.5"].value == np.mean(tied.found) == np.mean(half == 0)


def test_the_histogram_has_each_phrase_once(runs: tuple[Path, Path]):
    for phrases in read_sets(runs[0]).values():
        found = analyse(phrases)
        assert sum(found.histogram) == len(phrases)
        assert found.histogram[0] == np.sum(phrases.iou < 0.05)


def test_a_groups_difference_is_to_the_phrases_without(runs: tuple[Path, Path]):
    phrases = read_sets(runs[0])["shapes/val"]
    (large,) = [g for g in analyse(phrases).breakdowns["By words"] if g.label == "large"]
    has = np.array(["large" in phrase.split() for phrase in phrases.phrase])
    ciou = [phrases.intersection[m].sum() / phrases.union[m].sum() for m in (has, ~has)]
    assert large.phrases == has.sum()
    assert large.to_rest is not None
    assert (large.ciou.value, large.to_rest.value) == pytest.approx((ciou[0], ciou[0] - ciou[1]))


def test_no_target_is_scored_beside_a_model_that_always_finds_something(
    small: Path, tmp_path: Path
):
    phrases = read_sets(small)["shapes/val"]
    empty = np.arange(len(phrases)) % 3 == 0
    predicted = np.where(empty, np.arange(len(phrases)) % 2 * 49 + 1, 60)  # 1 or 50
    changed = dataclasses.replace(
        phrases,
        target_pixels=np.where(empty, 0, phrases.target_pixels),
        predicted_pixels=predicted,
    )
    scores = analyse(changed).scores
    assert scores["N-acc"].value == pytest.approx(0.5) and scores["T-acc"].value == 1
    run = change(small, tmp_path / "run", target_pixels=lambda i, old: old if i % 3 else 0)
    words = Page(build_report(run)).words
    assert "12 phrases name nothing" in words and "right about 66.7 % of all" in words


def test_worst_and_best_are_ordered_and_apart(runs: tuple[Path, Path]):
    sets = list(read_sets(runs[0]).values())
    worst, best = worst_and_best(sets, 50)
    ious = np.sort(np.concatenate([phrases.iou for phrases in sets]))
    assert [sets[i].iou[row] for i, row in worst] == ious[:50].tolist()
    assert [sets[i].iou[row] for i, row in best] == ious[::-1][:50].tolist()
    few_worst, few_best = worst_and_best(sets[:1], 80)
    assert not set(few_worst) & set(few_best) and len(few_worst) == len(sets[0]) // 2


def test_pictures_stand_beside_their_phrases(compared: str):
    page = Page(compared)
    alternatives = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert sum(text.startswith("target of") for text in alternatives) == page.count("figure")
    assert sum(text.startswith("other prediction of") for text in alternatives) > 10
    assert page.count("figure") >= 100


def test_flips_cross_one_half_either_way(runs: tuple[Path, Path]):
    one, other = (read_sets(run)["shapes/val"] for run in runs)
    comparison = analyse(one, other).comparison
    assert comparison is not None and comparison.gained and comparison.lost
    rows = np.arange(len(one))
    assert set(comparison.gained) == set(rows[(one.iou >= 0.5) & (other.iou < 0.5)])
    assert set(comparison.lost) == set(rows[(one.iou < 0.5) & (other.iou >= 0.5)])
    changes = np.abs(one.iou - other.iou)
    for flipped in (comparison.gained, comparison.lost):
        assert (np.diff(changes[list(flipped)]) <= 0).all()
    back = analyse(other, one).comparison
    assert back is not None
    assert (set(back.gained), set(back.lost)) == (set(comparison.lost), set(comparison.gained))
    for there, here in zip(comparison.differences, back.differences, strict=True):
        assert there.p == here.p
        assert there.difference.value == pytest.approx(-here.difference.value)
        assert there.difference.low == pytest.approx(-here.difference.high)


def test_the_comparison_is_said_in_words(compared: str):
    words = Page(compared).words
    assert "Only in one, so not compared: shapes/test." in words
    assert re.search(r"cIoU is [\d.]+ points higher than other\u2019s, a significant", words)


def test_a_run_against_itself_differs_in_nothing(small: Path):
    words = Page(build_report(small, small)).words
    assert "cIoU is the same as" in words and "0 phrases are found" in words


def test_untrusted_text_stays_text(small: Path, tmp_path: Path):
    def attack(i, old):
        return f"{ATTACK} {old}"

    run = change(small, tmp_path / "<b>run", phrase=attack, category=attack, image_id=attack)
    other = change(run, tmp_path / "o", iou=lambda i, old: 1.0 - old)
    text = build_report(run, other)
    page = Page(text)
    assert page.count("script") == 0 and page.count("img") == 0
    assert "<script" not in text and "<b>run" not in text and "\x07" not in text
    assert "\u202e" not in text
    assert "<script>alert(1)</script><img src=x onerror='alert(2)'> \ufffd\ufffd\"&amp;" in (
        page.words
    )


def test_a_phrase_without_end_is_cut(small: Path, tmp_path: Path):
    run = change(small, tmp_path / "run", phrase=lambda i, old: "long " * (1 if i else 10**5))
    assert len(build_report(run)) < 4_000_000


def test_data_that_changed_are_not_drawn(small: Path, tmp_path: Path):
    run = change(small, tmp_path / "run", phrase=lambda i, old: old if i % 2 else "another")
    page = Page(build_report(run))
    assert page.words.count("expected the image and phrase that were evaluated") == 18
    assert page.count("img") == 2 * 18


def test_without_masks_or_data_it_says_so(small: Path, tmp_path: Path):
    bare = write_run(tmp_path / "bare", images=4, masks=False)
    page = Page(build_report(bare))
    assert page.count("img") == 0 and page.count("figure") == 12
    assert "Without pictures: the run has kept no masks." in page.words
    gone = change(small, tmp_path / "gone", set=lambda i, old: "refcoco/val")
    page = Page(build_report(gone))
    assert page.count("img") == 0 and "Without pictures: the data cannot be read: " in page.words


def test_a_damaged_mask_is_named_at_its_phrase(small: Path, tmp_path: Path):
    run = change(small, tmp_path / "run", prediction_rle=lambda i, old: "\x7f<b>")
    page = Page(build_report(run))
    assert "the predicted mask cannot be drawn: expected" in page.words


def test_mistakes_are_one_sentence(small: Path, tmp_path: Path):
    one = other = small
    with pytest.raises(UserError, match="expected the directory of a finished evaluation"):
        build_report(tmp_path)
    renamed = change(other, tmp_path / "renamed", set=lambda i, old: "shapes/train")
    with pytest.raises(UserError, match="--against: expected a run with one of the sets of"):
        build_report(one, renamed)
    reworded = change(other, tmp_path / "reworded", phrase=lambda i, old: old + "!" * (i == 7))
    with pytest.raises(UserError, match=r"another phrase at image shapes/\d+, phrase 1: .*!'"):
        build_report(other, reworded)
    fewer = write_run(tmp_path / "fewer", images=4)
    with pytest.raises(UserError, match="expected the same phrases .* found 36 and 12"):
        build_report(other, fewer)
    for text in ("[]", '{"config": 3}'):
        (fewer / "results.json").write_text(text)
        with pytest.raises(UserError, match="results.json: expected an object with a config"):
            build_report(fewer)
    (fewer / "results.json").write_text("{")
    with pytest.raises(UserError, match="results.json: expected what the run wrote there"):
        build_report(fewer)
    (fewer / "results.json").unlink()
    for runs in ((fewer, None), (other, fewer)):
        with pytest.raises(UserError, match="of a finished evaluation, found no results.json"):
            build_report(*runs)


def test_the_made_up_counts_are_those_of_the_masks():
    target = np.zeros((4, 4), bool)
    target[:2] = True
    found = prediction_columns(target, np.roll(target, 1, 0))
    assert (found["intersection"], found["union"]) == (4, 12)


def test_the_command_writes_a_file(tmp_path: Path):
    run = write_run(tmp_path / "run", images=3)
    done = subprocess.run(
        [sys.executable, "-m", "evf_sam_jax.report", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run}/report.html (")
    assert "<h1>Evaluation run</h1>" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}", "--out", "{run}/nowhere/report.html"], "--out: cannot write "),
        ([], "the following arguments are required: RUN"),
        (["{run}/none"], "expected the directory of a finished evaluation"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str],
    message: str,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    typed = [argument.format(run=small) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["evf_sam_jax.report", *typed])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_groups_of_few_images_have_no_interval(small: Path):
    phrases = read_sets(small)["shapes/val"]
    category = ["rare", "rare", *["often"] * (len(phrases) - 2)]
    found = analyse(dataclasses.replace(phrases, category=category)).breakdowns["By category"]
    assert [group.label for group in found] == ["often", "rare"]
    assert np.isfinite([found[0].ciou.low, found[1].ciou.value]).all()
    assert np.isnan([found[1].ciou.low, found[1].ciou.high]).all()


def test_the_papers_figures_stand_beside_those_of_its_models(small: Path, tmp_path: Path):
    run = change(small, tmp_path / "run", set=lambda i, old: PAPER_SETS[i // 3 % 8])
    assert "paper\u2019s cIoU" not in Page(build_report(run)).words
    model = {"paper_variant": "evf-sam-multitask"}
    (run / "results.json").write_text(json.dumps({"config": {}, "model": model}))
    words = Page(build_report(run)).words
    # arXiv 2406.20076, Table 2: RefCOCO testA, and the average of the eight.
    assert "paper\u2019s cIoU" in words and "84.2" in words
    assert "average 79.0" in words


def test_it_counts_as_the_run_did(small: Path, tmp_path: Path):
    rows = read_rows(small).to_pylist()
    write(tmp_path / "run", rows, no_target_pixels=7, bootstrap_samples=77)
    words = Page(build_report(tmp_path / "run")).words
    assert "fewer than 7 pixels are predicted" in words and "percentiles of 77 bootstrap" in words
    assert "Model runs/made_up/model , 1 set, 12 images, 36 phrases." in words
    assert '"no_target_pixels": 7' in words


def test_what_changed_on_a_rerun_is_that_of_the_results(small: Path, tmp_path: Path):
    # `config.json` keeps what the evaluation began with.
    write(tmp_path / "run", read_rows(small).to_pylist(), no_target_pixels=9)
    (tmp_path / "run" / "config.json").write_text('{"no_target_pixels": 50}')
    words = Page(build_report(tmp_path / "run")).words
    assert "fewer than 9 pixels are predicted" in words and "than 50 pixels" not in words


def test_pictures_reach_as_far_as_the_run(tmp_path: Path):
    # Of the embedded data set there are as many images as were asked for.
    place = 2050
    example = ShapesSource("val", length=place + 1)[place]
    rows = [
        row_of("shapes/val", example.example_id, place, k, phrase, example.masks[k] > 0)
        | prediction_columns(example.masks[k] > 0, example.masks[k] > 0)
        for k, phrase in enumerate(example.phrases)
    ]
    write(tmp_path / "run", rows, images=place + 1)
    page = Page(build_report(tmp_path / "run"))
    assert page.count("img") == 2 * page.count("figure") > 0
