"""Run-length encodings of masks: the reference's, and whatever a file may hold instead."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from unibiomed_jax.errors import InputError
from unibiomed_jax.masks.run_length import decode, encode


@given(arrays(bool, array_shapes(min_dims=2, max_dims=3, max_side=12)))
def test_masks_and_volumes_come_back(mask):
    found = decode(encode(mask), "x")
    assert found.dtype == bool and np.array_equal(found, mask)


@given(arrays(bool, st.tuples(st.integers(1, 90), st.integers(1, 90))))
def test_decoded_as_by_pycocotools(mask):
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = encoded["counts"].decode()
    assert np.array_equal(decode({"size": encoded["size"], "counts": counts}, "x"), coco.decode(encoded))


@given(st.text(st.characters(min_codepoint=1, max_codepoint=200), max_size=12))
def test_any_counts_are_a_mask_or_refused(counts):
    try:
        assert decode({"size": [3, 4], "counts": counts}, "x").shape == (3, 4)
    except InputError as error:
        assert "x holds a mask" in str(error)


@pytest.mark.parametrize(
    "value", [None, [], {}, {"size": [2], "counts": "4"}, {"size": [2, 2], "counts": 4}, {"size": [0, 0]}]
)
def test_other_values_are_refused(value):
    with pytest.raises(InputError, match="no COCO run-length encoding"):
        decode(value, "x")


def test_slices_of_several_sizes_are_refused():
    with pytest.raises(InputError, match="slices of several sizes"):
        decode([encode(np.zeros((2, 3), bool)), encode(np.zeros((3, 2), bool))], "x")
