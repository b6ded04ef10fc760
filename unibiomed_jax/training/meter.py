"""How fast a run goes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from unibiomed_jax.data.pipeline import Batch
from unibiomed_jax.training import flops
from unibiomed_jax.training.config import TrainConfig


class Meter:
    """Speed since the last report, validation and saving not counted."""

    def __init__(self, config: TrainConfig, trainable: Sequence[str], devices: int, readers: int = 1):
        """`readers`: how many processes read the same rows of a batch."""
        self.config, self.trainable, self.readers = config, trainable, readers
        peak = flops.peak_flops(jax.devices()[0])
        self.peak = None if peak is None else peak * devices
        self.restart()

    def restart(self) -> None:
        self.started, self.images, self.tokens, self.work = time.perf_counter(), 0, 0, 0.0

    def add(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            # A volume is as many images as it has slices.
            shown = np.maximum(batch.arrays["frame_valid"].sum(axis=1), 1)
            self.images += int(shown[[bool(name) for name in batch.names]].sum())
            self.tokens += int(batch.arrays["token_valid"].sum())
            work = flops.forward_work(self.config.model, batch.arrays, self.config.lora.rank)
            self.work += flops.step_flops(work, self.trainable)

    def rates(self) -> dict[str, float]:
        """Images, tokens and operations a second, and the share of the devices' peak if that is known.

        Of all processes together, which all ask.
        """
        seconds = time.perf_counter() - self.started
        counted = np.array([self.images, self.tokens, self.work])
        if jax.process_count() > 1:
            counted = process_allgather(counted).sum(0) / self.readers
        images, tokens, work = (counted / seconds).tolist()
        rates = {"images_per_second": images, "tokens_per_second": tokens, "teraflops": work / 1e12}
        if self.peak is not None:
            rates["mfu"] = work / self.peak
        self.restart()
        return rates
