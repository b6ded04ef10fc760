"""Overlay pictures: what is drawn where, and what is left alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.masks.overlay import PALETTE, outline, overlay


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (100, 100, 100))


def disc(width: int, height: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def has_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixels.astype(int) - colour).max(-1) <= 6).any())


def test_region_is_tinted_outlined_and_the_rest_untouched():
    mask = disc(800, 600, 300, 200, 80)
    result = overlay(grey(800, 600), [mask], ["liver"])
    pixels = np.asarray(result)
    assert result.width == 800 and result.height > 600
    colour = np.array(PALETTE[0])
    np.testing.assert_allclose(pixels[200, 300], 100 + 0.25 * (colour - 100), atol=1)
    assert has_colour(pixels[200:201, 375:385], PALETTE[0])
    outside = ~disc(800, 600, 300, 200, 90)
    assert (pixels[:600][outside] == 100).all()


def test_outline_follows_the_border():
    mask = np.zeros((768, 768), bool)
    mask[:, :384] = True
    pixels = np.asarray(overlay(grey(768, 768), [mask], ["left"]))[384].astype(int)
    line = np.flatnonzero(np.abs(pixels - PALETTE[0]).max(-1) < 20)
    assert line.mean() == pytest.approx(383.5, abs=0.6)
    # No line along the edge of the image.
    np.testing.assert_array_equal(pixels[0], pixels[100])


def test_equal_labels_share_a_colour_and_a_legend_entry():
    masks = [disc(768, 768, x, 300, 60) for x in (150, 400, 650)]
    same = np.asarray(overlay(grey(768, 768), masks, ["node", "node", "tumor"]))
    for centre, colour in zip((150, 400, 650), (PALETTE[0], PALETTE[0], PALETTE[1]), strict=True):
        assert has_colour(same[300:301, centre + 55 : centre + 65], colour)
    legend = same[768:]
    assert (
        has_colour(legend, PALETTE[0])
        and has_colour(legend, PALETTE[1])
        and not has_colour(legend, PALETTE[2])
    )


def test_small_region_stays_visible_on_a_large_one_given_later():
    small, large = disc(768, 768, 384, 384, 20), disc(768, 768, 384, 384, 200)
    pixels = np.asarray(overlay(grey(768, 768), [small, large], ["small", "large"]))
    assert has_colour(pixels[384:385, 400:408], PALETTE[0])


def test_empty_mask_is_listed_as_hollow():
    pixels = np.asarray(overlay(grey(768, 768), [np.zeros((768, 768))], ["effusion"]))
    assert (pixels[:768] == 100).all()
    legend = pixels[768:]
    swatch = np.argwhere(np.abs(legend.astype(int) - PALETTE[0]).max(-1) <= 6)
    (top, left), (bottom, right) = swatch.min(0), swatch.max(0)
    assert not has_colour(legend[(top + bottom) // 2, (left + right) // 2][None, None], PALETTE[0])


def test_more_labels_than_colours_are_numbered():
    count = len(PALETTE) + 2
    masks = [disc(900, 900, 50 + 90 * i, 450, 35) for i in range(count)]
    few = np.asarray(overlay(grey(900, 900), masks[:7], [f"part {i}" for i in range(7)]))
    many = np.asarray(overlay(grey(900, 900), masks, [f"part {i}" for i in range(count)]))
    assert not (few[440:460, 40:60] > 230).all(-1).any()
    for i in range(count):
        assert (many[440:460, 40 + 90 * i : 60 + 90 * i] > 230).all(-1).any()


@pytest.mark.parametrize(
    ("size", "picture"),
    [
        ((100, 50), (768, 384)),
        ((1000, 800), (1000, 800)),
        ((4096, 1024), (2048, 512)),
        ((20, 800), (480, 800)),
    ],
)
def test_size_of_the_picture(size, picture):
    mask = np.zeros(size[::-1], bool)
    mask[size[1] // 2, size[0] // 2] = True
    result = overlay(grey(*size), [mask], ["spot"])
    assert result.width == picture[0]
    bare = overlay(grey(*size), [], [])
    assert picture[1] < bare.height < result.height
    assert result.height - bare.height <= 66 and bare.height - picture[1] <= 135  # a label; the notice
    assert np.asarray(result)[: picture[1]].std() > 0


@pytest.mark.parametrize("size", [(20, 800), (800, 600), (4096, 1024)])
def test_the_notice_is_under_every_picture(size, monkeypatch):
    """Also without a mask, and as a whole also under the narrowest picture."""
    with_notice = overlay(grey(*size), [], [])
    monkeypatch.setattr("unibiomed_jax.masks.overlay.NOTICE", " ")
    without = overlay(grey(*size), [], [])
    height = round(size[1] * np.clip(max(size), 768, 2048) / max(size))
    assert with_notice.size == without.size and with_notice.height > height
    rows, columns = np.nonzero((np.asarray(with_notice) != np.asarray(without)).any(-1))
    assert rows.min() >= height and rows.max() < with_notice.height - 5
    assert len(np.unique(columns)) > 200 and columns.max() < with_notice.width - 5


@given(st.integers(1, 900), st.integers(1, 900), st.data())
@settings(max_examples=30)
def test_a_single_pixel_leaves_a_trace(width, height, data):
    mask = np.zeros((height, width), bool)
    mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = True
    plain = np.asarray(overlay(grey(width, height), [np.zeros_like(mask)], ["spot"]))
    drawn = np.asarray(overlay(grey(width, height), [mask], ["spot"]))
    rows = round(height * max(768, width, height) / max(width, height))
    assert (plain[:rows] != drawn[:rows]).any()


@given(st.text(max_size=300) | st.just("finding " * 2000))
@settings(max_examples=30)
def test_any_label_can_be_drawn(label):
    result = overlay(grey(300, 200), [np.ones((200, 300))], [label])
    assert result.width == 768
    assert result.height - overlay(grey(300, 200), [], []).height <= 3 * 24  # lines of label


def test_unusable_masks():
    with pytest.raises(
        InputError, match=r"Mask 1 has the shape \(5, 4\) but the image has 4 rows and 5 columns"
    ):
        overlay(grey(5, 4), [np.ones((4, 5)), np.ones((5, 4))], ["a", "b"])
    with pytest.raises(InputError, match="There are 1 masks but 2 labels"):
        overlay(grey(5, 4), [np.ones((4, 5))], ["a", "b"])


def test_an_outline_is_the_picture_above_the_legend():
    masks = [disc(800, 600, 300, 200, 80), disc(800, 600, 600, 400, 50), np.zeros((600, 800), bool)]
    pixels = np.asarray(overlay(grey(800, 600), masks, ["liver", "spleen", "kidney"]))
    assert (np.asarray(outline(grey(800, 600), masks)) == pixels[:600]).all()
