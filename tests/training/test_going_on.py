"""Going on with a run whose configuration has changed since."""

import dataclasses
import json

import pytest
from small import STEP

from unibiomed_jax import InputError
from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.snapshot import Restored
from unibiomed_jax.training.start import going_on


def changed(config: TrainConfig, **optim) -> TrainConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim))


CONFIG = changed(dataclasses.replace(STEP, folder="run"), steps=10, accumulate=2)


def restored(step: int, config: TrainConfig = CONFIG) -> Restored:
    return Restored({}, {}, step, json.loads(json.dumps(to_dict(config))))


@pytest.mark.parametrize("step", [1, 10])
def test_the_same_configuration_goes_on_without_a_word_of_change(step):
    assert going_on(restored(step), CONFIG) == f"Going on after update {step} of 10."


def test_fewer_steps_than_done_are_refused():
    with pytest.raises(InputError, match=r"run has done 11 updates, more than --optim\.steps=10; raise it"):
        going_on(restored(11), CONFIG)


def test_another_accumulation_is_refused():
    with pytest.raises(InputError, match=r"update of 2 batches, and --optim\.accumulate=4 would change"):
        going_on(restored(3), changed(CONFIG, accumulate=4))


def test_what_has_changed_is_said():
    said = going_on(restored(3), changed(CONFIG, steps=20, lr=0.5))
    assert said.startswith("Going on after update 3 of 20. Changed since then: ")
    assert "optim.steps 10 -> 20" in said and f"optim.lr {CONFIG.optim.lr} -> 0.5" in said
    assert said.count("->") == 2


def test_a_run_saved_before_a_setting_was_there_goes_on():
    before = restored(3)
    del before.config["optim"]["accumulate"]
    assert going_on(before, CONFIG) == "Going on after update 3 of 10."
