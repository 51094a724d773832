"""Boxes drawn on an image: where they say, in their class's colour, the best on top."""

import numpy as np
from PIL import Image, ImageColor

from engine.pictures import COLOURS, draw_boxes

NAMES = ("cell", "platelet")


def test_a_box_is_drawn_in_its_colour_and_the_image_is_kept() -> None:
    image = Image.new("RGB", (200, 150))
    drawn = draw_boxes(image, np.array([[20.0, 60, 50, 40, 0.5, 1]]), NAMES)
    colour = ImageColor.getrgb(COLOURS[1])
    assert [drawn.getpixel(at) for at in ((20, 80), (70, 80), (45, 60), (45, 100))] == [colour] * 4
    assert drawn.getpixel((45, 80)) == (0, 0, 0)
    assert drawn.getpixel((190, 10)) == (0, 0, 0)
    assert image.getcolors() == [(200 * 150, (0, 0, 0))]


def test_the_best_box_is_on_top_and_its_name_stands_above() -> None:
    boxes = np.array([[20.0, 60, 50, 40, 0.9, 0], [20.0, 60, 50, 40, 0.5, 1]])
    drawn = draw_boxes(Image.new("RGB", (200, 150)), boxes, NAMES)
    assert drawn.getpixel((20, 80)) == ImageColor.getrgb(COLOURS[0])
    above = np.asarray(drawn.crop((20, 40, 90, 59)))
    assert (above == ImageColor.getrgb(COLOURS[0])).all(2).any()
    assert (above > 200).all(2).any()  # letters


def test_names_stay_inside_the_image() -> None:
    bare = draw_boxes(Image.new("RGB", (60, 60)), np.array([[50.0, 0, 9, 59, np.nan, 1]]), NAMES)
    scored = draw_boxes(Image.new("RGB", (60, 60)), np.array([[50.0, 0, 9, 59, 0.25, 1]]), NAMES)
    filled = [(np.asarray(one) == ImageColor.getrgb(COLOURS[1])).all(2).sum() for one in (bare, scored)]
    assert filled[1] > filled[0] > 9 * 2 + 59 * 2
    assert (np.asarray(bare)[:14, :50] == ImageColor.getrgb(COLOURS[1])).all(2).any()


def test_no_boxes_is_a_copy() -> None:
    image = Image.new("RGB", (8, 8), "red")
    drawn = draw_boxes(image, np.zeros((0, 6), np.float32), NAMES)
    assert drawn is not image
    assert drawn.tobytes() == image.tobytes()
