"""Random changes: pixels and masks move together, and nothing happens without asking."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_datasets import SIZES, SMALL

from unibiomed_jax.data.augment import AugmentConfig, augment
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.data.transforms import SampleBuilder
from unibiomed_jax.errors import InputError

STILL = AugmentConfig(rotation=0, zoom=1, shift=0, light=0)


def disc(size=(80, 60), centre=(50, 20), radius=12):
    rows, columns = np.mgrid[: size[1], : size[0]]
    mask = (rows - centre[1]) ** 2 + (columns - centre[0]) ** 2 < radius**2
    return Image.fromarray(np.repeat(np.where(mask, 200, 40)[..., None], 3, 2).astype(np.uint8)), mask


def test_no_change_is_the_identity():
    image, mask = disc()
    frames, masks = augment([image], mask[None, None], STILL, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(frames[0]), np.asarray(image))
    np.testing.assert_array_equal(masks[0, 0], mask)


def test_masks_follow_the_pixels_of_every_frame():
    image, mask = disc()
    second, other = disc(centre=(30, 40))
    for seed in range(20):
        config = AugmentConfig(rotation=40, zoom=1.5, shift=0.2, light=0)
        frames, masks = augment(
            [image, second], np.stack([mask, other])[None], config, np.random.default_rng(seed)
        )
        for frame, moved in zip(frames, masks[0], strict=True):
            seen = np.asarray(frame)[..., 0] > 120
            assert (seen != moved).mean() < 0.01 and moved.any()
        assert frames[0].size == image.size


def test_what_comes_in_is_mirrored_in_pixels_and_masks():
    image, mask = disc(centre=(2, 30))
    config = replace(STILL, shift=0.3)
    frames, masks = augment([image], mask[None, None], config, np.random.default_rng(1))
    np.testing.assert_array_equal(np.asarray(frames[0])[..., 0] > 120, masks[0, 0])


@pytest.mark.parametrize(("direction", "axis"), [("horizontal", 1), ("vertical", 0)])
def test_half_of_the_samples_are_mirrored_where_that_is_allowed(direction, axis):
    image, mask = disc()
    mirrored = 0
    for seed in range(40):
        config = replace(STILL, mirror=(direction,))
        frames, masks = augment([image], mask[None, None], config, np.random.default_rng(seed))
        turned = bool((masks[0, 0] != mask).any())
        expected = np.flip(mask, axis) if turned else mask
        np.testing.assert_array_equal(masks[0, 0], expected)
        np.testing.assert_array_equal(np.asarray(frames[0])[..., 0] > 120, expected)
        mirrored += turned
    assert 10 <= mirrored <= 30


def test_a_dataset_may_have_changes_of_its_own(targets, byte_tokenizer):
    still = SampleBuilder(replace(SMALL, augment=STILL), SIZES, byte_tokenizer, 0)
    mirror = replace(STILL, mirror=("horizontal",))

    def pictures(**choices):
        (record, *_) = read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets), **choices))
        return {still(record, np.random.default_rng(seed)).sam_pixels.tobytes() for seed in range(40)}

    assert len(pictures()) == 1
    assert len(pictures(augment=mirror)) == 2
    assert len(pictures(augment=replace(mirror, mirror=("horizontal", "vertical")))) == 4


def test_records_of_every_kind_know_their_own_changes(mixture):
    for dataset in mixture:
        for changes in (None, STILL):
            records = read_dataset(replace(dataset, augment=changes))
            assert {record.augment for record in records} == {changes}, dataset.kind


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"zoom": 0}, "augment.zoom=0 is impossible; give a number above 0."),
        ({"rotation": -1}, "augment.rotation=-1 is impossible; give 0 or more."),
        ({"shift": -1}, "augment.shift=-1 is impossible; give 0 or more."),
        ({"light": float("nan")}, "augment.light=nan is impossible; give 0 or more."),
        ({"colour": -0.1}, "augment.colour=-0.1 is impossible; give 0 or more."),
    ],
)
def test_an_impossible_limit_is_refused(limit, message):
    with pytest.raises(InputError) as error:
        AugmentConfig(**limit)
    assert str(error.value) == message


@pytest.mark.parametrize("mirror", [("sideways",), "horizontal"])
def test_an_unknown_direction_is_refused(mirror):
    with pytest.raises(InputError, match="mirror = .*horizontal and vertical"):
        AugmentConfig(mirror=mirror)


def test_light_changes_grey_values_only():
    image, mask = disc()
    frames, masks = augment([image], mask[None, None], replace(STILL, light=0.3), np.random.default_rng(0))
    values = np.unique(np.asarray(frames[0]))
    assert len(values) == 2 and values.tolist() != [40, 200]
    np.testing.assert_array_equal(masks[0, 0], mask)


def test_colour_changes_every_channel_by_itself():
    image, mask = disc()
    config = replace(STILL, colour=0.3)
    frames, masks = augment([image, image], np.stack([mask, mask])[None], config, np.random.default_rng(0))
    ratios = np.asarray(frames[0])[mask].mean(0) / 200
    assert len(set(ratios.round(2))) == 3 and (np.abs(np.log(ratios)) < 0.31).all()
    np.testing.assert_array_equal(np.asarray(frames[0]), np.asarray(frames[1]))  # all frames alike
    np.testing.assert_array_equal(masks[0, 0], mask)


def test_samples_change_only_where_the_configuration_says_so(targets, byte_tokenizer):
    (record, *_) = read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets)))
    plain = SampleBuilder(SMALL, SIZES, byte_tokenizer, 0)
    changed = SampleBuilder(replace(SMALL, augment=AugmentConfig()), SIZES, byte_tokenizer, 0)
    first, second = (plain(record, np.random.default_rng(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(first.sam_pixels, second.sam_pixels)
    third, fourth = (changed(record, np.random.default_rng(seed)) for seed in (0, 1))
    assert (third.sam_pixels != fourth.sam_pixels).any() and (third.masks != fourth.masks).any()
