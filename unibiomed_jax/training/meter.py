"""How fast a run goes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np

from unibiomed_jax.data.pipeline import Batch
from unibiomed_jax.training import flops
from unibiomed_jax.training.config import TrainConfig


class Meter:
    """Speed since the last report, validation and saving not counted."""

    def __init__(self, config: TrainConfig, trainable: Sequence[str], devices: int):
        self.config, self.trainable = config, trainable
        peak = flops.peak_flops(jax.devices()[0])
        self.peak = None if peak is None else peak * devices
        self.restart()

    def restart(self) -> None:
        self.started, self.images, self.tokens, self.work = time.perf_counter(), 0, 0, 0.0

    def add(self, batches: Sequence[Batch]) -> None:
        hosts = jax.process_count()
        for batch in batches:
            # A volume is as many images as it has slices.
            shown = np.maximum(batch.arrays["frame_valid"].sum(axis=1), 1)
            self.images += hosts * int(shown[[bool(name) for name in batch.names]].sum())
            self.tokens += hosts * int(batch.arrays["token_valid"].sum())
            work = flops.forward_work(self.config.model, batch.arrays, self.config.lora.rank)
            self.work += hosts * flops.step_flops(work, self.trainable)

    def rates(self) -> dict[str, float]:
        """Images, tokens and operations a second, and the share of the devices' peak if that is known."""
        seconds = time.perf_counter() - self.started
        rates = {
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
            "teraflops": self.work / seconds / 1e12,
        }
        if self.peak is not None:
            rates["mfu"] = self.work / seconds / self.peak
        self.restart()
        return rates
