"""Scores of a set do not depend on how it is batched, and padding never counts."""

import dataclasses
import functools

import numpy as np

from data_pipelines.assemble import Example
from evf_sam_jax.evaluation.held_out import evaluate, make_count_step, prediction_panel
from evf_sam_jax.initialize import initial_params
from evf_sam_jax.metrics import IouSums
from evf_sam_jax.predictor import Prediction, Predictor
from tests.evf_sam_jax.tiny_experiment import EXPERIMENT, MODEL, batch


@functools.cache
def count_step():
    return make_count_step(MODEL, "text")


@functools.cache
def params():
    return initial_params(EXPERIMENT)


def test_padding_rows_do_not_count():
    given = batch(prompts=False)
    valid = np.array([[True, True, False], [True, True, True]])
    padded = dataclasses.replace(given, phrase_valid=valid, example_valid=np.array([True, False]))
    intersection, union, counted = map(np.asarray, count_step()(params(), given))
    assert counted.all() and (union > 0).all()
    sums = evaluate(count_step(), params(), [given, padded, given])
    assert sums.masks == 2 * 6 + 2
    assert sums.intersection == 2 * intersection.sum() + intersection[0, :2].sum()
    assert sums.union == 2 * union.sum() + union[0, :2].sum()


def test_no_batches_have_no_masks():
    assert evaluate(count_step(), params(), []) == IouSums()


def test_a_panel_has_a_row_an_example():
    class Reader(Predictor):
        """Predicts nothing, whatever the phrase, and needs no model for it."""

        def __init__(self):
            pass

        def predict(self, image, texts=None, text_ids=None):
            empty = np.zeros((len(texts), *image.shape[:2]), bool)
            k = len(texts)
            logits = np.zeros(empty.shape, np.float32)
            return Prediction(logits, empty, np.zeros(k, np.float32), np.zeros((k, 4, 4), "f4"))

    image, masks = np.zeros((40, 60, 3), np.uint8), np.ones((2, 40, 60), np.uint8)
    example = Example(0, image, ("one", "two"), masks)
    one, two = (prediction_panel(Reader(), [example] * n) for n in (1, 2))
    assert one.shape[1] == two.shape[1] > 5 * 60  # the image, then target and prediction of each
    assert two.shape[0] > one.shape[0] + 40
