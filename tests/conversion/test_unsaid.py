"""Settings for which the released layout has no place: refused before anything is written."""

import json

import pytest
from places import MICRO

from unibiomed_jax import InputError, checkpoint
from unibiomed_jax.conversion import from_torch, sources, to_torch
from unibiomed_jax.conversion.released_config import unsaid


@pytest.fixture
def converted(tmp_path):
    from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    return tmp_path / "converted"


def with_settings(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return checkpoint.read_config(folder)


CHANGES = {
    "max_tiles is 5 and would be 12": lambda config: config.update(max_tiles=5),
    "min_tiles is 2 and would be 1": lambda config: config.update(min_tiles=2),
    "use_thumbnail is False and would be True": lambda config: config.update(use_thumbnail=False),
    "sam2.image_size is 512 and would be 256": lambda config: config["sam2"].update(image_size=512),
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_a_setting_that_would_be_lost_is_refused(sentence, converted, tmp_path):
    assert unsaid(with_settings(converted, CHANGES[sentence])) == [sentence]
    with pytest.raises(InputError, match=f"what the released layout cannot say: {sentence}.*--lossy"):
        to_torch.convert(converted, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_every_setting_is_named(converted):
    def change(config):
        for one in CHANGES.values():
            one(config)

    assert sorted(unsaid(with_settings(converted, change))) == sorted(CHANGES)


def test_the_weights_are_written_where_that_is_asked_for(converted, tmp_path):
    with_settings(converted, CHANGES["max_tiles is 5 and would be 12"])
    to_torch.convert(converted, tmp_path / "back", lossy=True)
    assert sources.released(tmp_path / "back").config.max_tiles == 12


def test_a_release_loses_nothing(converted, tmp_path):
    assert unsaid(checkpoint.read_config(converted)) == []
    to_torch.convert(converted, tmp_path / "back")
    assert sources.released(tmp_path / "back").config == checkpoint.read_config(converted)
