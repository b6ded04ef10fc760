"""Batches from datasets: Grain reads ahead in threads or worker processes; the order is the plan's."""

import hashlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np

from unibiomed_jax.config.fields import ONE_OR_MORE, SHARE, ZERO_OR_MORE, require_limits
from unibiomed_jax.data.files import check_files
from unibiomed_jax.data.mixture import Mixture, read_mixture
from unibiomed_jax.data.packed import PackedRecords
from unibiomed_jax.data.plan import BLANK, BatchPlan, BucketConfig, Shape, record_shapes
from unibiomed_jax.data.records import DatasetConfig
from unibiomed_jax.data.transforms import IGNORE, Sample, SampleBuilder, SampleConfig, SampleSizes
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Samples of a shape that are tried for one row of a batch before it stays blank.
_MAX_ATTEMPTS = 10
_ENDLESS = 1 << 48


@dataclass(frozen=True)
class PipelineConfig:
    """Everything that decides which batches come, and how they are read.

    Raises:
        InputError: a number outside its limit.
    """

    # The mixture.
    datasets: tuple[DatasetConfig, ...]
    # Choices about samples, the prompts among them.
    sample: SampleConfig = field(default_factory=SampleConfig)
    # Rows of a batch, all hosts together.
    batch_size: Annotated[int, ONE_OR_MORE] = 4
    # Shapes of batches.
    buckets: BucketConfig = field(default_factory=BucketConfig)
    # Order of samples and every random choice about them.
    seed: Annotated[int, ZERO_OR_MORE] = 42
    # Processes that read; 0 reads in threads of this process.
    workers: Annotated[int, ZERO_OR_MORE] = 0
    # Threads that read, in each process.
    threads: Annotated[int, ONE_OR_MORE] = 2
    # Batches read ahead, by each process.
    prefetch: Annotated[int, ONE_OR_MORE] = 2
    # A record that cannot be read is named and counted; in training another of its shape takes its place. If
    # none can be read, and in validation, the row stays blank, which counts in no loss. The run stops when
    # more than this share of the records, or all of them, are like that.
    max_unreadable: Annotated[float, SHARE] = 0.01

    def __post_init__(self):
        require_limits(self)


@dataclass(frozen=True)
class Batch:
    """Arrays for the device, and what stays on the host."""

    # pixel_values (rows, tiles, side, side, 3) bytes; tile_valid (rows, tiles)
    # input_ids, labels (rows, tokens); token_valid (rows, tokens)
    # sam_pixels (rows, frames, size, size, 3) bytes; frame_valid (rows, frames)
    # masks (rows, objects, frames, mask, mask) bytes 0 or 1; object_valid (rows, objects)
    arrays: dict[str, np.ndarray]
    # Name of the sample in every row; empty for a blank row.
    names: tuple[str, ...]
    # Number of the batch from 0, through all epochs.
    step: int


class Pipeline:
    """An iterable over batches.

    Batch t is a function of configuration, seed and t alone: not of the number of workers, threads or hosts
    (host h of n gets the h-th n-th of the rows).
    """

    def __init__(
        self,
        config: PipelineConfig,
        sizes: SampleSizes,
        tokenizer: Tokenizer,
        *,
        training: bool = True,
        host: int = 0,
        hosts: int = 1,
    ):
        """Read the tables, look at every file's name and size (of packed ones, at the shards), lay the plan.

        Args:
            config: which batches.
            sizes: of their arrays.
            tokenizer: the model's.
            training: shuffled and without end, with random changes; otherwise every sample once, unchanged,
                the last rows of a shape blank.
            host, hosts: which share of the rows is read here.

        Raises:
            InputError: anything wrong with a dataset that shows without decoding pixels, a text that would
                lose a [SEG], or a batch size that the hosts cannot share.
        """
        if config.batch_size % hosts:
            raise InputError(
                f"batch_size={config.batch_size} cannot be shared by {hosts} hosts; use a multiple."
            )
        if not training:  # nothing is changed at random
            datasets = tuple(replace(dataset, augment=None) for dataset in config.datasets)
            config = replace(config, datasets=datasets, sample=replace(config.sample, augment=None))
        self.config, self.sizes, self.training = config, sizes, training
        self.mixture = read_mixture(config.datasets)
        loose = (part for part in self.mixture.records.parts if not isinstance(part, PackedRecords))
        check_files(list(itertools.chain.from_iterable(loose)))
        builder = SampleBuilder(config.sample, sizes, tokenizer, config.seed)
        self.plan = BatchPlan(
            self.mixture,
            record_shapes(self.mixture, builder, config.buckets),
            config.batch_size,
            config.seed,
            shuffle=training,
            repeat=training,
        )
        content = (
            f"{self.plan.fingerprint} {config.sample} {sizes} {config.seed} {tokenizer.backend.to_str()}"
        )
        # Equal for pipelines of the same batches, as far as tables, choices and tokenizer tell: where the
        # folders lie does not count, and pixels are not looked at.
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self._source = _BatchSource(config, training, self.mixture, self.plan, builder, host, hosts)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.batches_per_epoch

    def read(self, step: int) -> Batch:
        """Batch `step`, read here and now; unreadable samples are replaced in silence."""
        return _unpack(self._source[step])

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


class BatchIterator(Iterator[Batch]):
    """Goes through the batches from step 0, or from where `set_state` puts it."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.step = 0
        # Name and reason of every record that could not be read so far.
        self.unreadable: dict[str, str] = {}
        self._reader = None

    def __next__(self) -> Batch:
        """Raises InputError when more records than allowed, or all of them, turned out unreadable."""
        if not self.pipeline.training and self.step >= self.pipeline.steps_per_epoch:
            raise StopIteration
        if self._reader is None:
            self._reader = _start_reader(self.pipeline.config, self.pipeline._source, self.step)
        element = next(self._reader)
        self._note(element["unreadable"])
        self.step += 1
        return _unpack(element)

    def get_state(self) -> dict:
        """What `set_state` needs to go on with the next batch, as plain JSON values."""
        return {
            "step": self.step,
            "pipeline": self.pipeline.fingerprint,
            "unreadable": dict(self.unreadable),
        }

    def set_state(self, state: dict) -> None:
        """Go on where `get_state` was called.

        Raises:
            InputError: the state is of other data, or of another tokenizer, seed or batch size.
        """
        if state.get("pipeline") != self.pipeline.fingerprint:
            raise InputError(
                "The data position in the checkpoint belongs to other datasets, prompts, tokenizer, seed or "
                "batch size; resume with the configuration it was saved with, or start a new run."
            )
        self.close()
        self.step, self.unreadable = state["step"], dict(state["unreadable"])

    def close(self) -> None:
        """Stop reading ahead (worker processes end)."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _note(self, failures: list[tuple[str, str]]) -> None:
        for name, reason in failures:
            if name not in self.unreadable:
                logger.warning("Skipped %s: %s", name, reason)
            self.unreadable[name] = reason
        records, share = len(self.pipeline.mixture.records), self.pipeline.config.max_unreadable
        if len(self.unreadable) > min(share * records, records - 1):
            name, reason = next(iter(self.unreadable.items()))
            raise InputError(
                f"{len(self.unreadable)} of {records} records cannot be read, too many for "
                f"max_unreadable={share:g}; repair the dataset (`unibiomed data validate`). The first is "
                f"{name}: {reason}"
            )


@dataclass
class _BatchSource:
    """Random access to batches, in the form that Grain takes (and sends to its workers)."""

    config: PipelineConfig
    training: bool
    mixture: Mixture
    plan: BatchPlan
    builder: SampleBuilder
    host: int
    hosts: int
    first: int = 0

    def __len__(self) -> int:
        return (_ENDLESS if self.training else self.plan.batches_per_epoch) - self.first

    def __getitem__(self, index: int) -> dict:
        step = int(index) + self.first
        rows = self.plan.rows(step)
        share = self.config.batch_size // self.hosts
        samples: list[Sample | None] = []
        failures: list[tuple[str, str]] = []
        for row in range(self.host * share, (self.host + 1) * share):
            number = int(rows.samples[row])
            samples.append(None if number == BLANK else self._read(number, step, row, failures))
        arrays = collate(samples, rows.shape, self.builder.sizes)
        names = tuple("" if sample is None else sample.name for sample in samples)
        return {"arrays": arrays, "names": names, "step": step, "unreadable": failures}

    def _read(self, number: int, step: int, row: int, failures: list[tuple[str, str]]) -> Sample | None:
        for attempt in range(_MAX_ATTEMPTS if self.training else 1):
            record = self.mixture.records[self.mixture.order[number]]
            rng = np.random.default_rng([self.config.seed, step, row, attempt])
            try:
                return self.builder(record, rng)
            except (OSError, InputError) as error:
                failures.append((record.name, str(error)))
            number = self.plan.substitute(step, row, attempt)
        return None


def _start_worker(_index: int, _count: int) -> None:
    """In a worker process: end when the process it reads for says so or is gone, also if that was killed.

    Nothing else ends it once it has started: signals to the whole process group (Ctrl-C, a scheduler's
    SIGTERM) are left to that process, which still needs batches until it has saved its state.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end():
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def collate(samples: list[Sample | None], shape: Shape, sizes: SampleSizes) -> dict[str, np.ndarray]:
    """Samples as rows of arrays of one static shape; what a sample does not fill is zero and marked invalid.

    Token slots hold id 0 and label -100 there. A blank row keeps its first token valid, so that attention has
    something to look at.
    """
    rows = len(samples)
    tile, sam, mask = sizes.tile_size, sizes.sam_size, sizes.mask_size
    arrays = {
        "pixel_values": np.zeros((rows, shape.tiles, tile, tile, 3), np.uint8),
        "tile_valid": np.zeros((rows, shape.tiles), bool),
        "input_ids": np.zeros((rows, shape.tokens), np.int32),
        "labels": np.full((rows, shape.tokens), IGNORE, np.int32),
        "token_valid": np.zeros((rows, shape.tokens), bool),
        "sam_pixels": np.zeros((rows, shape.frames, sam, sam, 3), np.uint8),
        "frame_valid": np.zeros((rows, shape.frames), bool),
        "masks": np.zeros((rows, shape.objects, shape.frames, mask, mask), np.uint8),
        "object_valid": np.zeros((rows, shape.objects), bool),
    }
    for row, sample in enumerate(samples):
        if sample is None:
            arrays["token_valid"][row, 0] = True
            continue
        tiles, tokens = len(sample.pixel_values), len(sample.input_ids)
        objects, frames = sample.masks.shape[:2]
        arrays["pixel_values"][row, :tiles] = sample.pixel_values
        arrays["tile_valid"][row, :tiles] = True
        arrays["input_ids"][row, :tokens] = sample.input_ids
        arrays["labels"][row, :tokens] = sample.labels
        arrays["token_valid"][row, :tokens] = True
        arrays["sam_pixels"][row, :frames] = sample.sam_pixels
        arrays["frame_valid"][row, :frames] = True
        arrays["masks"][row, :objects, :frames] = sample.masks
        arrays["object_valid"][row, :objects] = True
    return arrays


def _start_reader(config: PipelineConfig, source: _BatchSource, first: int):
    """A Grain iterator over the batches from `first` on."""
    import grain  # brings JAX along, which the tools that make and check datasets do without

    source = _BatchSource(**{**vars(source), "first": first})
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if config.workers:
        from absl import flags

        # Grain's workers read absl's flags, which are parsed only under absl.app.run.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.prefetch),
            worker_init_fn=_start_worker,
        )
    return iter(dataset)


def _unpack(element: dict) -> Batch:
    # A copy frees the shared memory in which a worker handed the array over.
    arrays = {
        key: value if type(value) is np.ndarray else np.array(value)
        for key, value in element["arrays"].items()
    }
    return Batch(arrays, element["names"], element["step"])
