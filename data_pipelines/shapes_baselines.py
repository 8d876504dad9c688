"""What cIoU the shapes give to a model that does not read, so that a score can be told from luck.

cIoU is the sum of the intersections over the sum of the unions, of all phrases of a split.
"""

from collections.abc import Iterable

import numpy as np

from data_pipelines.assemble import Example
from data_pipelines.shapes import ShapesSource, draw_scene, paint


def best_phrase_blind_ciou(examples: Iterable[Example]) -> float:
    """The highest cIoU of one mask an image, over all masks, chosen knowing every target.

    It is a maximum of sum(I) / sum(U), found exactly by Dinkelbach's iteration: for a guess r of
    the maximum, sum(I) - r sum(U) is a sum over pixels. A pixel that c of an image's k targets
    cover adds c to I if it is chosen, and k to U instead of c. So choose it if c > r (k - c), take
    the ratio of that choice for the next guess, and stop where it no longer grows.
    """
    pixels: dict[tuple[int, int], int] = {}  # how many pixels are covered by c of k targets
    for example in examples:
        cover = example.masks.sum(0, dtype=np.int64)
        for c, count in enumerate(np.bincount(cover.reshape(-1))):
            key = (c, len(example.masks))
            pixels[key] = pixels.get(key, 0) + int(count)
    ratio, last = 0.0, -1.0
    while ratio > last:
        last = ratio
        chosen = {(c, k) for c, k in pixels if c > ratio * (k - c)}
        intersection = sum(pixels[key] * key[0] for key in chosen)
        union = sum(n * (key[1] if key in chosen else key[0]) for key, n in pixels.items())
        ratio = intersection / union
    return ratio


def random_object_ciou(source: ShapesSource, length: int) -> float:
    """The cIoU of picking one of the image's shapes for each phrase: its outline exactly, blindly.

    Intersections and unions are averaged over the picks, not sampled.
    """
    intersections = unions = 0.0
    for index in range(length):
        _, _, targets, areas = _scene_areas(source, index)
        n = len(areas)
        for target in targets:
            intersections += areas[target] / n
            unions += (areas[target] * (n - 1) + areas.sum()) / n
    return intersections / unions


def shuffled_phrases_ciou(source: ShapesSource, length: int) -> float:
    """The cIoU of a perfect reader who is handed the phrases of the next image.

    It marks all shapes that the phrase clearly fits, or nothing.
    """
    intersections = unions = 0.0
    for index in range(length):
        scene, _, targets, areas = _scene_areas(source, index)
        _, phrases, _, _ = _scene_areas(source, (index + 1) % length)
        for target, phrase in zip(targets, phrases, strict=True):
            marked = phrase.matches(scene, strict=True)
            intersections += areas[target] * marked[target]
            unions += areas[marked].sum() + areas[target] * (not marked[target])
    return intersections / unions


def _scene_areas(source: ShapesSource, index: int):
    """The scene, its expressions and their targets, and the visible pixels of every shape."""
    scene, expressions, targets, rng = draw_scene(source.config, source.example_id(index))
    _, masks = paint(scene, rng)
    return scene, expressions, targets, masks.sum((1, 2), dtype=np.int64)
