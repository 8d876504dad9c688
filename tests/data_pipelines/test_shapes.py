"""Shapes: every phrase names one object, the masks are exact, and luck scores low."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import sentencepiece

from data_pipelines.assemble import Example
from data_pipelines.shapes import (
    COLOURS,
    DEFAULT_CONFIG,
    SHAPES,
    SHAPES_TOKENIZER,
    SPLITS,
    Scene,
    ShapesConfig,
    ShapesSource,
    draw_scene,
    paint,
    render,
)
from data_pipelines.shapes_baselines import (
    best_phrase_blind_ciou,
    random_object_ciou,
    shuffled_phrases_ciou,
)
from data_pipelines.tokenizers import UNK_ID, load_tokenizer
from data_pipelines.train_shapes_tokenizer import grammar_words, train
from evf_sam_jax.errors import UserError

IMAGES = 100
WORDS = {"small": 0, "little": 0, "large": 1, "big": 1}
WORDS |= {word: 2 + i for i, word in enumerate(COLOURS)}
WORDS |= {word: 7 + i for i, word in enumerate(SHAPES)}
MOST = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
LINKS = {
    "to the left of": (0, -1),
    "left of": (0, -1),
    "to the right of": (0, 1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
    "under": (1, 1),
}


def described(words: str, scene: Scene) -> set[int]:
    """The shapes that have every attribute among the words."""
    size, colour, shape = scene.kind.T
    has = np.stack([size == 0, size == 1, *(colour == i for i in range(5))])
    has = np.concatenate([has, np.stack([shape == i for i in range(4)])])
    wanted = [WORDS[word] for word in words.split() if word in WORDS]
    return set(np.flatnonzero(has[wanted].all(0)).tolist())


def read_phrase(phrase: str, scene: Scene) -> set[int]:
    """What a plain reader marks, from the words alone and without the drawing code's rules."""
    for link, (axis, sign) in LINKS.items():
        if f" {link} " in phrase:
            subject, reference = phrase.split(f" {link} ")
            (other,) = described(reference, scene)
            beyond = (scene.centre[:, axis] - scene.centre[other, axis]) * sign > 0
            return {i for i in described(subject, scene) if beyond[i]}
    subject, place = (re.split(" (?:at|in|on) the ", phrase) + [""])[:2]
    found = described(subject, scene)
    for word, (axis, sign) in MOST.items():
        if word in subject:
            return {max(found, key=lambda i: scene.centre[i, axis] * sign)}
    half = scene.centre > np.array([scene.width, scene.height]) / 2
    for word, (axis, beyond) in {"left": (0, 0), "right": (0, 1), "top": (1, 0)}.items():
        if word in place.split():
            found = {i for i in found if half[i, axis] == beyond}
    if "bottom" in place.split():
        found = {i for i in found if half[i, 1]}
    return found


def drawn(index: int, config: ShapesConfig | None = None):
    """The scene of a training example with its phrases, targets and expressions."""
    config = ShapesConfig() if config is None else config
    scene, expressions, targets, rng = draw_scene(config, index)
    _, masks = paint(scene, rng)
    return scene, expressions, targets, masks, [render(e, rng) for e in expressions]


@pytest.fixture(scope="module")
def scenes() -> list[tuple]:
    return [drawn(index) for index in range(IMAGES)]


def test_an_example_is_a_function_of_seed_and_index():
    first, again = ShapesSource("train")[7], ShapesSource("train")[7]
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert first.phrases == again.phrases
    other = ShapesSource("train", ShapesConfig(seed=1))[7]
    assert first.image.shape != other.image.shape or (first.image != other.image).any()


def test_splits_share_no_example():
    ids = [{ShapesSource(split).example_id(i) for i in (0, -1)} for split in SPLITS]
    assert len(set.union(*ids)) == 6
    ranges = sorted(SPLITS.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_every_phrase_names_its_target_and_nothing_else(scenes: list[tuple]):
    for scene, _, targets, _, phrases in scenes:
        for target, phrase in zip(targets, phrases, strict=True):
            assert read_phrase(phrase, scene) == {target}, phrase


def test_the_reader_of_this_test_can_be_ambiguous(scenes: list[tuple]):
    scene = dataclasses.replace(scenes[0][0], kind=np.zeros_like(scenes[0][0].kind))
    assert len(read_phrase("the small red circle", scene)) == len(scene.kind)


def test_phrases_of_an_image_are_about_different_objects(scenes: list[tuple]):
    assert all(len(set(targets)) == DEFAULT_CONFIG.phrases for _, _, targets, _, _ in scenes)


def test_a_clause_is_there_because_it_is_needed(scenes: list[tuple]):
    for scene, expressions, *_ in scenes:
        for expression in expressions:
            alone = expression.description.matches(scene).sum() == 1
            assert alone == (expression.clause == "attribute")


def test_all_kinds_of_phrases_come_up(scenes: list[tuple]):
    clauses = [e.clause for _, expressions, *_ in scenes for e in expressions]
    share = {clause: clauses.count(clause) / len(clauses) for clause in set(clauses)}
    assert share["relation"] >= 0.2
    assert share["attribute"] >= 0.2
    assert share["most"] >= 0.05 and share["side"] >= 0.05 and share["corner"] >= 0.05


def test_masks_are_the_pixels_of_the_named_colour():
    for index in range(30):
        example = ShapesSource("train")[index]
        for phrase, mask in zip(example.phrases, example.masks, strict=True):
            inside = example.image[mask == 1].astype(int)
            target = re.split(" (?:to|left|right|above|below|under|on|at|in) ", phrase)[0]
            named = [word for word in target.split() if word in COLOURS]
            if named:
                assert np.abs(inside.mean(0) - COLOURS[named[0]]).max() < 20
            # One colour and mild noise: a pixel of the background would stand out.
            assert inside.std(0).max() < 8


def test_masks_do_not_overlap_and_are_large_enough(scenes: list[tuple]):
    for *_, masks, _ in scenes:
        assert masks.sum(0).max() == 1
        for mask in masks:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert min(np.ptp(rows), np.ptp(columns)) + 1 >= 11
            assert mask.sum() >= 60


def test_images_differ_in_size_and_aspect_ratio(scenes: list[tuple]):
    sizes = {(scene.height, scene.width) for scene, *_ in scenes}
    assert len(sizes) > IMAGES / 2
    assert min(min(size) for size in sizes) >= 96 and max(max(size) for size in sizes) <= 128
    assert min(h / w for h, w in sizes) < 0.8 and max(h / w for h, w in sizes) > 1.25


def test_the_tokenizer_knows_every_word():
    tokenizer = load_tokenizer(SHAPES_TOKENIZER)
    for index in range(IMAGES):
        for phrase in ShapesSource("val")[index].phrases:
            ids = tokenizer.encode(phrase)
            assert len(ids) == len(phrase.split()) + 2 <= 16
            assert UNK_ID not in ids


def test_the_tokenizer_spells_other_words_and_folds_case():
    tokenizer = load_tokenizer(SHAPES_TOKENIZER)
    assert UNK_ID not in tokenizer.encode("the zebra with a quick fox jumps vividly")
    assert tokenizer.encode("The RED Circle") == tokenizer.encode("the red circle")


def test_the_shipped_tokenizer_is_the_trained_one():
    shipped = (SHAPES_TOKENIZER / "sentencepiece.bpe.model").read_bytes()
    pieces = []
    for model in (train(grammar_words()), shipped):
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces.append({processor.id_to_piece(i) for i in range(processor.get_piece_size())})
    assert pieces[0] == pieces[1]


def test_unknown_split_and_impossible_settings():
    with pytest.raises(UserError, match="split 'dev' of shapes: expected one of train, val, test"):
        ShapesSource("dev")
    with pytest.raises(UserError, match="length of shapes/val: expected 1 to 10000, found 10001"):
        ShapesSource("val", length=10_001)
    with pytest.raises(UserError, match="phrases of shapes: expected at most 3"):
        ShapesSource("train", ShapesConfig(objects=(3, 5), phrases=4))
    with pytest.raises(UserError, match="do not fit images of 50 to 60 pixels"):
        _ = ShapesSource("train", ShapesConfig(sides=(50, 60), objects=(12, 12)))[0]


def test_a_family_of_weight_zero_is_not_drawn():
    config = ShapesConfig(weights=(1.0, 0.0, 0.0, 0.0))
    clauses = {e.clause for index in range(20) for e in drawn(index, config)[1]}
    assert clauses == {"attribute"}


def brute_force_ciou(examples: list[Example]) -> float:
    """The best over every choice of pixels in every image, by trying all of them."""
    best = 0.0
    shape = examples[0].masks.shape[1:]
    choices = [np.array(bits, bool).reshape(shape) for bits in itertools.product((0, 1), repeat=4)]
    for masks in itertools.product(choices, repeat=len(examples)):
        pairs = [
            (chosen, target)
            for chosen, example in zip(masks, examples, strict=True)
            for target in example.masks.astype(bool)
        ]
        intersection = sum((a & b).sum() for a, b in pairs)
        best = max(best, intersection / sum((a | b).sum() for a, b in pairs))
    return best


def test_the_phrase_blind_bound_is_the_best_of_all_masks():
    rng = np.random.default_rng(0)
    for _ in range(10):
        examples = [
            Example(i, np.zeros((2, 2, 3), np.uint8), ("a",) * k, masks)
            for i, k in enumerate((2, 3))
            for masks in [rng.integers(0, 2, (k, 2, 2), np.uint8) | np.eye(2, dtype=np.uint8)]
        ]
        np.testing.assert_allclose(best_phrase_blind_ciou(examples), brute_force_ciou(examples))


def test_luck_scores_low():
    source = ShapesSource("val", length=40)
    assert best_phrase_blind_ciou(source[i] for i in range(40)) <= 0.40
    assert random_object_ciou(source, 40) <= 0.20
    assert shuffled_phrases_ciou(source, 40) <= 0.20
