"""Overlays change the mask and nothing else; panels keep every picture and make room for words."""

import numpy as np
import pytest

from evf_sam_jax.visualize import COLORS, Cell, outline, overlay, panel

GREY = np.full((6, 8, 3), 100, np.uint8)


def test_overlay_blends_the_color_inside_the_mask_only():
    mask = np.zeros((6, 8), bool)
    mask[1:3, 2:5] = True
    result = overlay(GREY, mask, (200, 0, 50), alpha=0.25)
    assert (result[mask] == (125, 75, 88)).all()  # 0.75 * 100 + 0.25 * color, rounded to even
    assert (result[~mask] == 100).all()
    assert (GREY == 100).all()


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, (100, 100, 100)), (1.0, (255, 0, 7))])
def test_alpha_goes_from_the_image_to_the_color(alpha: float, expected: tuple[int, int, int]):
    result = overlay(GREY, np.ones((6, 8), bool), (255, 0, 7), alpha)
    assert (result == expected).all()


def test_an_outline_is_the_rim_of_the_mask():
    mask = np.zeros((6, 8), bool)
    mask[:, 1:7] = True  # its top and bottom are those of the image
    result = (outline(GREY, mask, (255, 0, 7), width=2) == (255, 0, 7)).all(-1)
    inner = np.zeros((6, 8), bool)
    inner[2:4, 3:5] = True
    np.testing.assert_array_equal(result, mask & ~inner)
    assert (GREY == 100).all()


def test_the_colors_differ():
    assert len(set(COLORS.values())) == len(COLORS) >= 6


def find(picture: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the pixels of one color, which fill their box."""
    rows, columns = np.nonzero((picture == color).all(-1))
    top, left = rows.min(), columns.min()
    height, width = rows.max() - top + 1, columns.max() - left + 1
    assert len(rows) == height * width
    return top, left, height, width


def colored(height: int, width: int, color: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


def test_panel_keeps_pictures_whole_and_in_place():
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    picture = panel(
        [
            [Cell(colored(20, 30, red), "one"), Cell(colored(10, 40, green))],
            [Cell(colored(15, 10, blue), "the third")],
        ]
    )
    red_at, green_at, blue_at = (find(picture, color) for color in (red, green, blue))
    assert (red_at[2:], green_at[2:], blue_at[2:]) == ((20, 30), (10, 40), (15, 10))
    assert red_at[0] == green_at[0] and red_at[1] == blue_at[1]
    assert green_at[1] >= red_at[1] + 30
    assert blue_at[0] > red_at[0] + 20 + 8  # words stand between


def test_captions_are_black_words_below_their_picture_and_within_its_column():
    with_words = panel([[Cell(GREY.repeat(20, 1), "a caption that is far too long for one line")]])
    words = np.argwhere((with_words < 100).all(-1))
    assert len(words) and words[:, 0].min() >= 6
    short = panel([[Cell(GREY.repeat(20, 1), "a")]])
    assert with_words.shape[0] > short.shape[0] and with_words.shape[1] == short.shape[1]


def test_one_word_wider_than_its_column_is_cut_off():
    a, b = colored(5, 20, (255, 0, 0)), colored(5, 20, (0, 255, 0))
    picture = panel([[Cell(a, "W" * 50), Cell(b)]])
    assert (picture[:, find(picture, (0, 255, 0))[1] :] != 0).any(-1).all()


def test_rows_without_cells_take_no_room_for_pictures():
    assert panel([[Cell(GREY)], []]).shape[1] == panel([[Cell(GREY)]]).shape[1]
