"""The one compiled call under every strategy, on eight devices (sharded_ground.py)."""

from __future__ import annotations

import jax
import pytest
from eight import report
from places import MICRO

from unibiomed_jax import UniBiomed
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import FSDP, STRATEGIES

pytestmark = pytest.mark.scale


@pytest.fixture(scope="module")
def found() -> dict:
    return report("sharded_ground.py")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_says_and_draws_what_the_reference_does(found, strategy):
    """The process fails at a word or a mask that differs."""
    assert found[strategy]["devices"] == [8]
    stored = strategy in ("fsdp", "hsdp", "fsdp_tensor", "sequence")
    assert found[strategy]["share"] < 0.3 if stored else found[strategy]["share"] > 0.5


def test_one_device_may_be_named(image):
    model = UniBiomed.from_pretrained(MICRO, layout=Layout.over(jax.devices()[:1], FSDP))
    assert model.predict(image, "<image>Describe this image.", max_new_tokens=3).text
