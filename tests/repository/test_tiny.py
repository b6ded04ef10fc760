"""The model that comes with the repository answers, and its masks lie where the dataset's lie."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import ROOT, SAMPLE_DATA, TINY

from unibiomed_jax import UniBiomed, checkpoint
from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.masks.measures import dice_score
from unibiomed_jax.parameters import flatten
from unibiomed_jax.training.experiment import load_experiment
from unibiomed_jax.training.start import find_tokenizer

pytestmark = pytest.mark.slow

RUNS = ROOT / "configs" / "unibiomed_tiny"


@pytest.fixture(scope="module")
def model():
    return UniBiomed.from_pretrained(TINY)


def test_it_is_small():
    parameters = flatten(checkpoint.load(TINY).params)
    assert sum(value.size for value in parameters.values()) < 8e6
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 20e6


def test_every_run_goes_on_from_the_result_of_the_one_before():
    files = sorted(RUNS.glob("[0-9]_*.py"))
    runs = [load_experiment(str(file)) for file in files]
    assert len(runs) == 5 and runs[0].initial is None
    assert [Path(run.folder).name for run in runs] == [file.stem for file in files]
    for before, run in itertools.pairwise(runs):
        assert run.initial == f"{before.folder}/model"
    assert len({run.folder for run in runs}) == len(runs)
    assert runs[-1].model == checkpoint.read_config(TINY)


def test_its_runs_and_it_read_with_one_tokenizer():
    """That of the checkpoint may have been saved anew, in another form."""
    own = Tokenizer.from_folder(TINY / "tokenizer").backend.to_str()
    for file in RUNS.glob("[0-9]_*.py"):
        folder = find_tokenizer(load_experiment(str(file)))
        assert folder == RUNS / "tokenizer"
        assert Tokenizer.from_folder(folder).backend.to_str() == own


def test_its_config_says_sizes_and_nothing_else():
    """How it computes is chosen where it is loaded."""
    assert json.loads((TINY / "config.json").read_text()) == json.loads(
        json.dumps(to_dict(checkpoint.read_config(TINY)))
    )


def test_it_finds_what_it_was_trained_to_find_in_an_image_it_never_saw(model):
    image = model.open(SAMPLE_DATA / "hc18_fetal_head/test/1044.jpg")
    answer = model.predict(
        image, "<image>\nCan you segment the fetal head in fetal ultrasound?", max_new_tokens=32
    )
    with Image.open(SAMPLE_DATA / "hc18_fetal_head/test_mask/1044_fetal+head.png") as file:
        truth = np.asarray(file) > 0
    (segment,) = answer.segments
    assert segment.phrase == "fetal head in fetal ultrasound"
    # The whole image would give less than 0.5.
    assert truth.mean() < 0.33 and dice_score(segment.mask, truth) > 0.7


def test_its_mask_depends_on_what_was_asked_for(model):
    image = model.open(SAMPLE_DATA / "cxr_montgomery/test/montgomery_2.jpg")
    masks = [
        model.predict(image, f"<image>\nPlease segment {target}.", max_new_tokens=32).segments[0].mask
        for target in ("left lung in chest X-ray", "right lung in chest X-ray")
    ]
    assert (masks[0] & masks[1]).sum() < 0.5 * (masks[0] | masks[1]).sum()


def test_it_follows_a_target_through_a_volume(model):
    slices = sorted((SAMPLE_DATA / "sarcoma_ct/STS_008_ct").glob("*.png"))
    volume = model.open_volume(slices, conditioning=[3, 6, 9])
    answer = model.predict(volume, "<image>Please segment soft tissue sarcoma in body CT.", max_new_tokens=32)
    (segment,) = answer.segments
    truth = []
    for path in sorted((SAMPLE_DATA / "sarcoma_ct/mask/STS_008_ct").glob("*.png")):
        with Image.open(path) as file:
            truth.append(np.asarray(file) > 0)
    assert segment.mask.shape == np.shape(truth) and np.isfinite(segment.logits).all()
    followed = [i for i in range(len(slices)) if i not in (3, 6, 9) and truth[i].any()]
    dice = dice_score(np.concatenate(segment.mask[followed]), np.concatenate([truth[i] for i in followed]))
    # The whole slices would give less than 0.1.
    assert np.mean(truth) < 0.05 and dice > 0.25
