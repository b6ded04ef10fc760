"""How slices looked in training belongs to a checkpoint: its configuration says it, there and back."""

import dataclasses
import json

import pytest
from places import MICRO, TINY

from unibiomed_jax import InputError, checkpoint
from unibiomed_jax.config.fields import from_dict, to_dict
from unibiomed_jax.config.preprocessing import PREPROCESSING, Preprocessing
from unibiomed_jax.conversion import from_torch, loading, sources, to_torch
from unibiomed_jax.training.experiment import load_experiment


@pytest.mark.parametrize("preset", PREPROCESSING.values(), ids=PREPROCESSING)
def test_it_is_read_as_it_was_written(preset):
    values = json.loads(json.dumps(to_dict(preset)))
    assert from_dict(Preprocessing, values) == preset and hash(from_dict(Preprocessing, values)) == hash(
        preset
    )
    names = [window.name for window in preset.ct_windows]
    assert len(set(names)) == len(names) and preset.name in PREPROCESSING


def test_a_mistake_in_it_names_its_place():
    values = json.loads(json.dumps(to_dict(PREPROCESSING["released"])))
    values["ct_windows"][1]["low"] = "air"
    with pytest.raises(InputError, match=r"ct_windows\.1\.low must be of type float, not 'air'"):
        from_dict(Preprocessing, values)
    values["ct_windows"][1] |= {"low": -1000, "hi": 3}
    with pytest.raises(InputError, match=r"Unknown field 'hi' in .*ct_windows\.1: did you mean 'high'"):
        from_dict(Preprocessing, values)


def test_checkpoints_keep_it_through_conversion_both_ways(tmp_path):
    from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    config = tmp_path / "converted" / "config.json"
    values = json.loads(config.read_text())
    assert checkpoint.read_config(tmp_path / "converted").preprocessing == PREPROCESSING["released"]
    # As it came: the release says nothing of it, and is given back untouched.
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert "preprocessing" not in json.loads((tmp_path / "back" / "config.json").read_text())
    own = dataclasses.replace(PREPROCESSING["tiny"], name="ours", percentiles=(1.0, 99.0))
    config.write_text(json.dumps(values | {"preprocessing": to_dict(own)}))
    to_torch.convert(tmp_path / "converted", tmp_path / "ours")
    assert loading.config_of(tmp_path / "ours").preprocessing == own
    from_torch.convert(sources.released(tmp_path / "ours"), tmp_path / "again")
    assert loading.config_of(tmp_path / "again").preprocessing == own


def test_a_checkpoint_that_says_nothing_saw_what_the_released_weights_saw(tmp_path):
    values = json.loads((TINY / "config.json").read_text())
    assert values.pop("preprocessing")["name"] == "tiny"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert checkpoint.read_config(tmp_path).preprocessing == PREPROCESSING["released"]
    assert checkpoint.read_config(TINY).preprocessing == PREPROCESSING["tiny"]


def test_training_may_state_another():
    option = "--model.preprocessing.ct-windows.0.low=-5"
    config = load_experiment("configs/unibiomed_tiny/1_base.py", [option])
    assert config.model.preprocessing.ct_windows[0].low == -5
    assert config.model.preprocessing.name == "tiny"
