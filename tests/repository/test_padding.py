"""What docs/speed.md says of padding in the published mixture, under the buckets of its recipe."""

import dataclasses
import importlib
import re

import pytest
from places import ROOT

from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.training.experiment import load_experiment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def padding():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("padding")


def test_padding_costs_little_and_shapes_are_few(padding):
    config = load_experiment(str(padding.RECIPE))
    tokenizer, arithmetic = padding.qwen2_tokenizer(), padding.Arithmetic(config)
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for images, most_shapes in (("prepared", 6), ("mixed", 12)):
        rows = padding.simulate(config, tokenizer, arithmetic, images)
        share = padding.total(rows)
        assert 0 < share < 0.1
        assert len(rows) <= most_shapes
        assert all(row.needed[part] <= row.computed[part] for row in rows for part in padding.PARTS)
        said = rf"^\| {images}\b.* \| {len(rows)} \| {100 * share:.1f} % \|"
        assert re.search(said, text, re.MULTILINE), f"docs/speed.md: {len(rows)} shapes, {share:.1%}"

    # Were all texts filled up to one length, it would show.
    buckets = BucketConfig(tiles=config.data.buckets.tiles, text=(2048,))
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=buckets))
    assert padding.total(padding.simulate(long, tokenizer, arithmetic, "prepared")) > 0.1
