"""Requests that wait together are computed together, and each gets what it would get alone."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from data_pipelines import segmentations
from evf_sam_jax import model_dir
from evf_sam_jax.predictor import Job, Predictor
from tests.evf_sam_jax.serving.served_model import TEXTS, Watched, served_params
from tests.evf_sam_jax.tiny_model import CONFIG, TOKENIZER, picture

pytest.importorskip("starlette", reason='serving is not installed: pip install ".[serve]"')

from data_pipelines.tokenizers import load_tokenizer
from evf_sam_jax.serving.batcher import Batcher, Batching, BusyError, Found

IMAGES = [picture(40, 60, seed=i) for i in range(5)]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    tokenizer = load_tokenizer(TOKENIZER, CONFIG.encoder.max_text_tokens)
    return Predictor(CONFIG, model_dir.nest(served_params()), tokenizer)


@pytest.fixture
def watched(predictor: Predictor) -> Watched:
    return Watched(predictor)


@pytest.fixture
def make_batcher(watched: Watched) -> Iterator[Callable[..., Batcher]]:
    made = []

    def make(**batching: float) -> Batcher:
        made.append(Batcher(watched, Batching(**batching)))
        return made[-1]

    yield make
    watched.go.set()
    for batcher in made:
        batcher.close()


def ask(batcher: Batcher, image: int, *texts: str):
    """Submits phrases of an image without waiting for the answer."""
    with batcher.admit() as admission:
        known = admission.known_image(str(image))
        job = batcher.predictor.prepare(Job(known or IMAGES[image], texts))
        return admission.masks(str(image), job)


def assert_as_alone(found: Found, predictor: Predictor, image: int, *texts: str):
    alone = predictor.predict(IMAGES[image], texts=texts)
    assert found.size == (40, 60)
    assert len(found.prompts) == len(texts)
    for (mask,), expected, iou in zip(found.prompts, alone.masks, alone.iou, strict=True):
        pixels = segmentations.decode_parts([mask.counts], 40, 60)
        # Rounding depends on the sizes of batches, and may move a pixel of an edge.
        assert (pixels != expected).sum() <= 1
        assert mask.area == pixels.sum()
        assert mask.predicted_iou == pytest.approx(iou, abs=1e-4)


def test_the_phrases_and_images_matter(predictor: Predictor):
    masks = [predictor.predict(image, texts=TEXTS).masks for image in IMAGES[:2]]
    assert min((masks[0][0] != masks[0][i]).sum() for i in range(1, 4)) > 10
    assert (masks[0] != masks[1]).sum() > 50


def test_phrases_of_an_image_wait_together_and_encode_it_once(make_batcher, watched, predictor):
    batcher = make_batcher(linger=5.0, prompts=4)
    answers = [ask(batcher, 0, text) for text in TEXTS]
    for answer, text in zip(answers, TEXTS, strict=True):
        assert_as_alone(answer.result(), predictor, 0, text)
    assert watched.batches == [4]
    assert watched.encoded == [1]
    assert_as_alone(ask(batcher, 0, "another").result(), predictor, 0, "another")
    assert watched.encoded == [1], "the encoding is kept"


def test_different_images_are_one_batch_up_to_a_number(make_batcher, watched, predictor):
    watched.go.clear()
    batcher = make_batcher(images=2, linger=0.0)
    first = ask(batcher, 4, TEXTS[0])
    while batcher._waiting:  # until the device has the first, and is held
        time.sleep(0.01)
    asked = [(0, TEXTS[:1]), (1, TEXTS[:1]), (0, TEXTS[2:3]), (2, TEXTS[:1])]
    answers = [ask(batcher, image, *texts) for image, texts in asked]
    watched.go.set()
    assert_as_alone(first.result(), predictor, 4, TEXTS[0])
    for answer, (image, texts) in zip(answers, asked, strict=True):
        assert_as_alone(answer.result(), predictor, image, *texts)
    assert watched.batches == [1, 3, 1]
    assert watched.encoded == [1, 2, 1]


def test_only_the_latest_images_are_kept(make_batcher, watched):
    batcher = make_batcher(kept_images=2, linger=0.0)
    for image in (0, 1, 0, 2, 0, 1):
        ask(batcher, image, TEXTS[0]).result()
    assert watched.encoded == [1, 1, 1, 1], "0, 1, 2, and 1 again"


def test_too_many_are_not_admitted(make_batcher):
    batcher = make_batcher(requests=2)
    with batcher.admit(), batcher.admit():
        assert batcher.in_work == 2
        with pytest.raises(BusyError), batcher.admit():
            pass
    with batcher.admit():
        assert batcher.in_work == 1


def test_a_failure_is_told_and_the_next_is_well(make_batcher, watched, predictor):
    batcher = make_batcher(linger=0.0)
    watched.failure = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(batcher, 0, TEXTS[0]).result()
    watched.failure = None
    assert_as_alone(ask(batcher, 0, TEXTS[0]).result(), predictor, 0, TEXTS[0])


def test_closing_answers_what_waits_and_admits_no_more(make_batcher, watched, predictor):
    batcher = make_batcher(linger=60.0)
    waiting = ask(batcher, 0, TEXTS[0])
    batcher.close()
    assert_as_alone(waiting.result(timeout=0), predictor, 0, TEXTS[0])
    with pytest.raises(BusyError), batcher.admit():
        pass


def test_attention_takes_its_turn(make_batcher, predictor):
    batcher = make_batcher(linger=0.0)
    [ids] = predictor.token_ids(texts=[TEXTS[0]])
    with batcher.admit() as admission:
        before = ask(batcher, 1, TEXTS[0])
        heat = admission.attention(predictor.prepare_image(IMAGES[0]), ids).result()
        assert before.done()
    np.testing.assert_array_equal(heat, predictor.attention_map(IMAGES[0], TEXTS[0]))
