"""What the benchmarks count, against numbers known from elsewhere."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from unibiomed_jax.config import ModelConfig
from unibiomed_jax.inference.precision import BFLOAT16, CPU

FILE = Path(__file__).parents[1] / "benchmarks" / "cost.py"
SPEC = importlib.util.spec_from_file_location("cost", FILE)
cost = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cost)


def test_arithmetic_of_every_stage():
    """Counted by a tracer of the reference's operations, in GFLOP."""
    config = ModelConfig()
    for work, expected in (
        (cost.encode_tile(config), 725.9),
        (cost.prefill(config, 1900), 1515),
        (cost.encode_image(config), 1823),
        (cost.decode_masks(config, 1), 3.66),
    ):
        assert work["float32"] / 1e9 == pytest.approx(expected, rel=1e-3)


def test_formats_follow_the_precision():
    mixed = cost.encode_image(dataclasses.replace(ModelConfig(), precision=CPU))
    assert sum(mixed.values()) == cost.encode_image(ModelConfig())["float32"]
    assert set(mixed) == {"float32", "bfloat16"}
    half = dataclasses.replace(ModelConfig(), precision=BFLOAT16)
    assert set(cost.prefill(half, 281)) == {"bfloat16"}
    assert cost.cache_bytes(half, 1) == 12_288
    assert cost.cache_bytes(ModelConfig(), 1) == 2 * 12_288
