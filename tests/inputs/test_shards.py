"""Files in shards: every byte comes back by its range, and damage is named."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.shards import StoredFile, write_shard

BLOCK = 1 << 16


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A shard of records of every length around a block's, and what they hold."""
    rng = np.random.default_rng(0)
    lengths = [0, 1, 5, *rng.integers(0, 3 * BLOCK, 60), 0]
    lengths += [BLOCK - rest for rest in (0, 1, 23, 24, 25, 64, 65)] * 3
    contents = [rng.bytes(int(length)) for length in lengths]
    path = tmp_path_factory.mktemp("shards") / "files.arrayrecord"
    return path, write_shard(path, contents).tolist(), contents


def test_every_record_is_read_by_its_range(shard):
    path, places, contents = shard
    assert [StoredFile("a", str(path), *place).read_bytes() for place in places] == contents


def test_other_programs_read_the_shards(shard):
    path, _, contents = shard
    assert ArrayRecordReader(str(path)).read_all() == contents


def test_damage_is_named(shard, tmp_path):
    path, places, contents = shard
    number = max(range(len(contents)), key=lambda number: len(contents[number]))
    start, length, checksum = places[number]
    data = bytearray(path.read_bytes())
    copy = tmp_path / "copy.arrayrecord"
    stored = StoredFile("data/a.png", str(copy), start, length, checksum)
    with pytest.raises(InputError, match=r"copy\.arrayrecord is missing; copy it again"):
        stored.read_bytes()
    copy.write_bytes(data[: start + 100])
    with pytest.raises(InputError, match=r"copy\.arrayrecord ends within data/a\.png; copy it again"):
        stored.read_bytes()
    data[start] ^= 1
    copy.write_bytes(data)
    with pytest.raises(InputError, match=r"checksum of data/a\.png in the shard .* is wrong"):
        stored.read_bytes()
