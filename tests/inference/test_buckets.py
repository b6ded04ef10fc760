"""The few sizes that everything is rounded up to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibiomed_jax.inference.buckets import (
    chunks,
    frame_bucket,
    power_of_two,
    tile_bucket,
    token_bucket,
)

# Each with what it may at most add to a size, as a share of it, once sizes are large.
BUCKETS = [(power_of_two, 1.0), (token_bucket, 1 / 8), (frame_bucket, 1 / 4), (tile_bucket, 1.0)]


@pytest.mark.parametrize(("bucket", "share"), BUCKETS)
@given(size=st.integers(1, 40_000))
def test_a_bucket_holds_the_size_and_little_more(bucket, share, size):
    found = bucket(size)
    assert size <= found <= max(size * (1 + share), size + 32)
    assert bucket(found) == found
    assert bucket(size + 1) >= found


def test_sizes_are_those_that_are_documented():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert [token_bucket(n) for n in (1, 32, 33, 500, 512, 513, 1024, 1025)] == [
        32, 32, 64, 512, 512, 576, 1024, 1152,
    ]  # fmt: skip
    assert [frame_bucket(n) for n in (1, 8, 9, 64, 65, 128, 130)] == [8, 8, 16, 64, 80, 128, 160]
    # Grids of up to twelve tiles, with the whole image as one more.
    assert [tile_bucket(n) for n in range(14)] == [0, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13]


@given(rows=st.integers(1, 30), sizes=st.sampled_from([(1,), (8, 4, 2, 1), (3, 1)]))
def test_chunks_cover_everything_in_a_few_sizes(rows, sizes):
    parts = [list(range(rows))[chunk] for chunk in chunks(rows, sizes)]
    assert sum(parts, []) == list(range(rows))
    seen = [len(part) for part in parts]
    assert set(seen) <= set(sizes) and seen == sorted(seen, reverse=True)
