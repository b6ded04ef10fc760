"""Speed as the log reports it, with a clock, a peak and an amount of work that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from small import STEP, random_batch

from unibiomed_jax.training import meter as module
from unibiomed_jax.training.meter import Meter


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The clock shows 10 s at the start, 14 s at the first report and 15 s at the second."""
    clock = iter((10.0, 14.0, 14.0, 15.0, 15.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(module.flops, "peak_flops", lambda device: 5e9)
    monkeypatch.setattr(module.flops, "step_flops", lambda work, trainable: 3e9 * len(trainable))


def batch():
    """A volume of three slices, an image, a text alone, and a blank row; seven tokens each."""
    arrays = random_batch(0, size=4, frames=3)
    arrays["tile_valid"] = np.ones((4, 2), bool)
    arrays["token_valid"] = np.arange(12) < np.array([[7], [7], [7], [0]])
    arrays["frame_valid"] = np.arange(3) < np.array([[3], [1], [0], [0]])
    return SimpleNamespace(arrays=arrays, names=("volume", "image", "text", ""))


def test_the_share_of_the_peak_is_work_by_time_by_devices():
    meter = Meter(STEP, ["mlp1.kernel", "sam2.kernel"], devices=2)
    meter.add([batch()])
    meter.add([batch()])
    assert meter.rates() == {
        "images_per_second": 2 * (3 + 1 + 1) / 4,
        "tokens_per_second": 2 * 3 * 7 / 4,
        "teraflops": 2 * 6e9 / 4 / 1e12,
        "mfu": 2 * 6e9 / 4 / (2 * 5e9),
    }
    assert set(meter.rates().values()) == {0}, "a report starts from nothing"


def test_without_a_known_peak_there_is_no_share_of_it(monkeypatch):
    monkeypatch.setattr(module.flops, "peak_flops", lambda device: None)
    meter = Meter(STEP, ["mlp1.kernel"], devices=1)
    meter.add([batch()])
    assert set(meter.rates()) == {"images_per_second", "tokens_per_second", "teraflops"}
