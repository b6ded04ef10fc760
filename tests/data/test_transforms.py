"""Records to arrays: pixels, masks, the box of the region task, drawn slices."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_datasets import SIZES, SMALL, coco_table, save_picture, save_square, write_table

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.data.transforms import SampleBuilder, SampleSizes, draw_box, load_mask
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tiles import image_tiles, sam_image
from unibiomed_jax.masks.resize import resize_nearest


def build(kind, root, tokenizer, index=0, seed=0, **choices):
    records = read_dataset(DatasetConfig(kind, str(root), **choices))
    return SampleBuilder(SMALL, SIZES, tokenizer, 0)(records[index], np.random.default_rng(seed))


def test_sizes_follow_the_model():
    sizes = SampleSizes.of(ModelConfig())
    assert (sizes.tile_size, sizes.tokens_per_tile, sizes.sam_size, sizes.mask_size) == (448, 256, 1024, 256)
    assert (sizes.min_tiles, sizes.max_tiles, sizes.use_thumbnail) == (1, 12, True)
    other = SampleSizes.of(ModelConfig(min_tiles=2, max_tiles=6, use_thumbnail=False))
    assert (other.min_tiles, other.max_tiles, other.use_thumbnail) == (2, 6, False)


def test_pixels_are_those_of_the_predictor(targets, byte_tokenizer):
    sample = build(Kind.SEGMENTATION, targets, byte_tokenizer)
    image = Image.open(targets / "train" / "0.png")
    expected, _ = image_tiles(image, tile_size=28, max_tiles=4)
    assert len(sample.pixel_values) == 3 and sample.pixel_values.dtype == np.uint8
    np.testing.assert_array_equal(sample.pixel_values, expected)
    np.testing.assert_array_equal(sample.sam_pixels[0], sam_image(image, 64))
    assert sample.masks.shape == (1, 1, 16, 16)
    # Columns 0..11 of 60 and rows 0..11 of 30 are inside.
    columns, rows = np.arange(16) * 60 // 16 < 12, np.arange(16) * 30 // 16 < 12
    np.testing.assert_array_equal(sample.masks[0, 0], rows[:, None] & columns)


def test_one_sample_of_every_other_kind(targets, volumes, findings, captions, byte_tokenizer):
    sequence = build(Kind.SEQUENCE, volumes, byte_tokenizer, slices=3)
    assert sequence.pixel_values.shape == (3, 28, 28, 3) and sequence.sam_pixels.shape == (3, 64, 64, 3)
    assert sequence.masks.shape == (1, 3, 16, 16) and sequence.masks.any((0, 2, 3)).all()
    assert (sequence.input_ids == byte_tokenizer.image_context_id).sum() == 3 * 4
    two = build(Kind.REPORT, findings, byte_tokenizer, index=2)
    assert two.masks.shape == (2, 1, 16, 16) and (two.input_ids == byte_tokenizer.seg_id).sum() == 2
    assert (two.masks[0] != two.masks[1]).any()
    none = build(Kind.VQA, findings, byte_tokenizer, index=1)
    assert not none.masks.any() and (none.input_ids == byte_tokenizer.seg_id).sum() == 1
    for kind, root in ((Kind.CAPTION, captions), (Kind.REGION, targets)):
        text_only = build(kind, root, byte_tokenizer)
        assert text_only.pixel_values.shape == (1, 28, 28, 3)
        assert text_only.sam_pixels.shape == (0, 64, 64, 3) and text_only.masks.shape == (0, 0, 16, 16)
        assert byte_tokenizer.seg_id not in text_only.input_ids


def test_slices_are_sorted_and_repeat_only_when_there_are_too_few(volumes, byte_tokenizer):
    (record,) = read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes), slices=3))
    corners = {}
    for number, path in enumerate(record.masks[0]):
        corners[resize_nearest(load_mask(path, (60, 30), "m"), 16).tobytes()] = number

    def drawn(count, seed):
        sample = SampleBuilder(SMALL, SIZES, byte_tokenizer, 0)(
            replace(record, slices=count), np.random.default_rng(seed)
        )
        return [corners[mask.tobytes()] for mask in sample.masks[0]]

    # The recorded masks move by one pixel a slice, so some fall together at this size: compare what is left.
    few = [drawn(3, seed) for seed in range(30)]
    assert all(numbers == sorted(numbers) for numbers in few)
    assert len({tuple(numbers) for numbers in few}) > 10
    assert all(len(drawn(12, seed)) == 12 for seed in range(3))


def test_region_shows_the_box_and_segmentation_does_not(targets, byte_tokenizer):
    def greens(kind):
        tiles = build(kind, targets, byte_tokenizer).pixel_values[-1].astype(int)
        return ((tiles[..., 1] > 230) & (tiles[..., 0] < 60) & (tiles[..., 2] < 60)).sum()

    assert greens(Kind.REGION) > 20 > greens(Kind.SEGMENTATION)


# What cv2.rectangle(image, (5, 6), (13, 13), (0, 255, 0), 2) drew (OpenCV 5.0.0), rows 4..15, columns 3..15.
BOX = """
.............
..#########..
.###########.
.###########.
.###.....###.
.###.....###.
.###.....###.
.###.....###.
.###########.
.###########.
..#########..
.............
""".split()


def test_box_is_opencvs_rectangle():
    mask = np.zeros((24, 24), bool)
    mask[6:13, 5:13] = True
    drawn = draw_box(np.zeros((24, 24, 3), np.uint8), mask, np.random.default_rng(0))
    assert not drawn[..., [0, 2]].any()
    rows = ["".join("#" if value == 255 else "." for value in row) for row in drawn[4:16, 3:16, 1]]
    assert rows == BOX and drawn[..., 1].sum() == 255 * sum(row.count("#") for row in BOX)


def test_box_at_the_border_of_the_image():
    mask = np.zeros((24, 24), bool)
    mask[2:, 2:] = True
    green = draw_box(np.zeros((24, 24, 3), np.uint8), mask, np.random.default_rng(0))[..., 1] > 0
    assert green[1, 2:].all() and green[2:, 1].all() and not green[1, 1] and not green[4:23, 4:23].any()


def test_box_prefers_large_regions_and_draws_among_them():
    mask = np.zeros((100, 100), bool)
    mask[5:20, 5:20] = True  # 225 pixels
    mask[40:70, 40:70] = True
    mask[50:55, 50:55] = False  # a hole with an island is no region of its own
    mask[52, 52] = True
    mask[75:99, 5:30] = True

    def boxes(mask):
        empty = np.zeros((*mask.shape, 3), np.uint8)
        drawn = {draw_box(empty, mask, np.random.default_rng(seed)).tobytes() for seed in range(20)}
        return len(drawn)

    assert boxes(mask) == 2
    mask[40:] = False
    assert boxes(mask) == 1  # only the small one is left
    pixels = np.zeros((10, 10, 3), np.uint8)
    assert draw_box(pixels, np.zeros((10, 10), bool), np.random.default_rng(0)) is pixels


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 8, 16, 64]))
@settings(max_examples=60)
def test_nearest_resize_reads_the_floor_of_the_scaled_index(height, width, side):
    values = np.random.default_rng(height * 71 + width).random((height, width)) > 0.5
    expected = values[np.arange(side) * height // side][:, np.arange(side) * width // side]
    np.testing.assert_array_equal(resize_nearest(values, side), expected.astype(np.uint8))


def test_masks_in_any_mode_and_the_ones_that_are_refused(tmp_path):
    values = np.zeros((30, 40), np.uint8)
    values[3:9, 4:11] = 7
    colour = np.stack([np.zeros_like(values), values, values], -1)
    images = {
        "l": Image.fromarray(values),
        "rgb": Image.fromarray(colour),
        "one": Image.fromarray(values > 0),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(load_mask(str(tmp_path / f"{name}.png"), (40, 30), "m"), values > 0)
    assert not load_mask("", (40, 30), "m").any()
    with pytest.raises(InputError, match=r"mask .*l\.png of sample is 40x30 pixels but its image 30x40"):
        load_mask(str(tmp_path / "l.png"), (30, 40), "sample")
    Image.fromarray(np.stack([values, 255 - values, values], -1)).save(tmp_path / "two.png")
    with pytest.raises(InputError, match=r"two\.png of sample cannot be read: .* several values but no 0"):
        load_mask(str(tmp_path / "two.png"), (40, 30), "sample")  # which colour is outside?
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"mask .*bad\.png of sample cannot be read"):
        load_mask(str(tmp_path / "bad.png"), (40, 30), "sample")


def test_an_image_of_another_size_than_the_table_says_is_refused(targets, byte_tokenizer):
    table = targets / "train.json"
    write_table(table, coco_table(5, width=60, height=30))
    assert len(build(Kind.SEGMENTATION, targets, byte_tokenizer).pixel_values) == 3
    write_table(table, coco_table(5, width=30, height=60))
    message = r"0\.png of liver/segmentation:train/0_liver\.png is 60x30 .* its table says 30x60; correct"
    with pytest.raises(InputError, match=message):
        build(Kind.SEGMENTATION, targets, byte_tokenizer)


def test_slices_of_different_sizes_are_refused(volumes, byte_tokenizer):
    for number in range(4, 9):
        save_picture(volumes / "v1" / f"v1-{number:03d}.png", size=(20, 20))
        save_square(volumes / "mask" / "v1" / f"v1-{number:03d}_lung+tumor.png", size=(20, 20))
    with pytest.raises(InputError, match="20x20"):
        build(Kind.SEQUENCE, volumes, byte_tokenizer, slices=12)
