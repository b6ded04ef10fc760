"""Which samples make up which batch: a pure function of seed and step, and the same on every host."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Int32, Int64

from unibiomed_jax.config.fields import SIZES, require_limits
from unibiomed_jax.data.files import image_size
from unibiomed_jax.data.mixture import Mixture
from unibiomed_jax.data.packed import PackedRecords
from unibiomed_jax.data.records import Kind, Record
from unibiomed_jax.data.transforms import SampleBuilder
from unibiomed_jax.errors import InputError

# Stands in a batch for a row without a sample.
BLANK = -1


@dataclass(frozen=True, order=True)
class Shape:
    """The static sizes of a batch beside its number of rows."""

    # SAM frames and object slots; none in batches of text-only samples.
    frames: int
    objects: int
    # Tile slots.
    tiles: int
    # Token slots.
    tokens: int


@dataclass(frozen=True)
class BucketConfig:
    """Sizes to which samples are rounded up, so that few shapes occur; samples of one shape share batches.

    Raises:
        InputError: no size of a kind, or one below 1.
    """

    # Tiles of an image. A sequence has exactly one tile a frame.
    tiles: Annotated[tuple[int, ...], SIZES] = (1, 5, 10, 13)
    # Tokens beside those of the tiles; longer samples get max_tokens.
    text: Annotated[tuple[int, ...], SIZES] = (128, 512, 2048)
    # Objects of a sample.
    objects: Annotated[tuple[int, ...], SIZES] = (1, 2, 4, 8)

    def __post_init__(self):
        require_limits(self, "buckets.")


@dataclass(frozen=True)
class RecordShapes:
    """The shape of every record of a mixture, in a few bytes each."""

    # Every shape that occurs, in their order.
    shapes: list[Shape]
    # Of every record, which of them it has.
    numbers: Int32[np.ndarray, " records"]

    @classmethod
    def of(cls, rows: Int64[np.ndarray, "records 4"]) -> "RecordShapes":
        """From the sizes of every record, in the order of Shape's fields."""
        width = rows.max(0, initial=0) + 1
        keys = functools.reduce(lambda key, field: key * width[field] + rows[:, field], range(4), 0)
        _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
        return cls([Shape(*row) for row in rows[first].tolist()], numbers.astype(np.int32))


@dataclass(frozen=True)
class Rows:
    """One batch: its shape and, row by row, which sample of the mixture; BLANK for none."""

    shape: Shape
    samples: np.ndarray


class BatchPlan:
    """The batches of every epoch.

    Samples are grouped by shape. Every epoch shuffles each group, cuts it into batches and shuffles the
    batches; without `shuffle` all epochs have one mixed order. The last batch of a group is filled with
    samples of the group (`repeat`) or left partly blank. No sample is left out.
    """

    def __init__(
        self,
        mixture: Mixture,
        shapes: RecordShapes,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        repeat: bool = True,
    ):
        """Lay the plan.

        Args:
            mixture: what to plan.
            shapes: of every record of the mixture.
            batch_size: rows of a batch, all hosts together.
            seed: of the order.
            shuffle: False: the same order in every epoch, whatever the seed; its beginning is a fair sample
                of the whole: the samples of a shape are mixed once, the first batch of every shape comes
                first, and the others are spread evenly.
            repeat: fill the last batch of a shape with repeated samples instead of blank rows.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is no batch; use at least 1.")
        self.batch_size, self.seed, self.shuffle, self.repeat = batch_size, seed, shuffle, repeat
        self.shapes = shapes.shapes
        group = shapes.numbers[mixture.order]
        self.groups = [np.flatnonzero(group == number) for number in range(len(self.shapes))]
        self.batches_per_epoch = sum(-(-len(members) // batch_size) for members in self.groups)
        choices = repr((self.shapes, batch_size, seed, shuffle, repeat, mixture.fingerprint))
        digest = hashlib.sha256(choices.encode())
        for numbers in (mixture.order, group):
            digest.update(numbers.astype("<i8").tobytes())
        # Another one for other records, another shape of any of them, or other arguments.
        self.fingerprint = digest.hexdigest()
        self._layout = functools.lru_cache(maxsize=2)(self._lay_out)

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "_layout"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._layout = functools.lru_cache(maxsize=2)(self._lay_out)

    def rows(self, step: int) -> Rows:
        """The batch of a step, counted from 0 through all epochs."""
        epoch, position = divmod(step, self.batches_per_epoch)
        groups, samples = self._layout(epoch)
        return Rows(self.shapes[groups[position]], samples[position])

    def substitute(self, step: int, row: int, attempt: int) -> int:
        """A sample of the same shape (maybe the same one) to try where that of `row` cannot be read."""
        shape = self.rows(step).shape
        members = self.groups[self.shapes.index(shape)]
        return int(members[scramble(np.array([attempt]), self.seed, step, row)[0] % np.uint64(len(members))])

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Group number and samples of every batch of an epoch."""
        groups, batches = [], []
        for number, members in enumerate(self.groups):
            key = (self.seed, epoch, number) if self.shuffle else (number,)
            members = members[permutation(len(members), *key)]
            missing = -len(members) % self.batch_size
            fill = np.resize(members, missing) if self.repeat else np.full(missing, BLANK)
            batches.append(np.concatenate([members, fill]).reshape(-1, self.batch_size))
            groups += [number] * len(batches[-1])
        if self.shuffle:
            order = permutation(self.batches_per_epoch, self.seed, epoch, len(self.groups))
        else:  # the first batch of every shape at 0, the others evenly up to 1
            place = np.concatenate([np.arange(len(batch)) / len(batch) for batch in batches])
            order = np.argsort(place, kind="stable")
        return np.array(groups)[order], np.concatenate(batches)[order]


def record_shapes(mixture: Mixture, builder: SampleBuilder, buckets: BucketConfig) -> RecordShapes:
    """The shape of every record: tiles, frames, objects, longest text, each rounded up to its bucket.

    Needs image sizes, from the tables or else from file headers.

    Raises:
        InputError: more tiles or objects than the largest bucket, or a text that would lose a [SEG].
    """
    return RecordShapes.of(
        np.concatenate([_shapes(records, builder, buckets) for records in mixture.records.parts])
    )


def _shapes(
    records: Sequence[Record], builder: SampleBuilder, buckets: BucketConfig
) -> Int64[np.ndarray, "records 4"]:
    """Of records of one kind: the sizes of their shapes, in the order of Shape's fields."""
    first = records[0]
    kind, slices, frames = first.kind, first.slices, first.frames
    per_tile, limit = builder.sizes.tokens_per_tile, builder.config.max_tokens
    packed = isinstance(records, PackedRecords)
    if slices:
        tiles = slots = np.full(len(records), slices)
    else:
        sizes = records.sizes if packed else np.array([image_size(record) for record in records])
        tiles = _tiles(sizes, kind, builder)
        slots = _bucket(tiles, buckets.tiles, "tiles", records)
    text = builder.text_lengths(records)
    for number in np.flatnonzero(text + tiles * per_tile > limit):
        builder.require_fit(records[number], int(tiles[number]))
    text = np.minimum(text, limit - tiles * per_tile)
    rooms = np.array([*sorted(buckets.text), limit])  # what no bucket holds has all there is
    tokens = np.minimum(slots * per_tile + rooms[np.searchsorted(rooms[:-1], text)], limit)
    objects = np.zeros(len(records), int)
    if frames:
        counts = records.objects if packed else np.array([len(record.masks) for record in records])
        objects = _bucket(counts, buckets.objects, "objects", records)
    return np.stack([np.full(len(records), frames), objects, slots, tokens], 1)


def _tiles(sizes: np.ndarray, kind: Kind, builder: SampleBuilder) -> np.ndarray:
    """Tiles of images of these sizes, (records, 2); most are of a few sizes."""
    keys, numbers = np.unique(sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1], return_inverse=True)
    return np.array([builder.tiles(kind, (key >> 32, key & 0xFFFFFFFF)) for key in keys.tolist()])[numbers]


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on nothing but `key`, NumPy's version included."""
    return np.argsort(scramble(np.arange(count), *key), kind="stable")


def scramble(values: np.ndarray, *key: int) -> np.ndarray:
    """64-bit hashes of integers under a key (SplitMix64, once per word of the key)."""
    state = values.astype(np.uint64)
    for word in (*key, 0):
        state = state + np.uint64(0x9E3779B97F4A7C15 * (word + 1) % 2**64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _bucket(counts: np.ndarray, buckets: tuple[int, ...], what: str, records: Sequence[Record]) -> np.ndarray:
    """The smallest bucket that holds each count."""
    buckets = np.sort(buckets)
    if (too_many := np.flatnonzero(counts > buckets[-1])).size:
        first = int(too_many[0])
        raise InputError(
            f"{records[first].name} has {counts[first]} {what} but the largest bucket is {buckets[-1]}; add "
            "a larger one."
        )
    return buckets[np.searchsorted(buckets, counts)]
