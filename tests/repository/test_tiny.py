"""The model that comes with the repository answers, and its masks lie where the dataset's lie."""

import itertools

import numpy as np
import pytest
from PIL import Image
from places import ROOT

from unibiomed_jax import UniBiomed, checkpoint
from unibiomed_jax.masks.measures import dice_score
from unibiomed_jax.parameters import flatten
from unibiomed_jax.training.experiment import load_experiment

FOLDER = ROOT / "checkpoints" / "unibiomed-tiny"
DATA = ROOT / "sample_data"


@pytest.fixture(scope="module")
def model():
    return UniBiomed.from_pretrained(FOLDER)


def test_it_is_small():
    parameters = flatten(checkpoint.load(FOLDER).params)
    assert sum(value.size for value in parameters.values()) < 8e6
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 20e6


def test_every_run_goes_on_from_the_result_of_the_one_before():
    runs = [
        load_experiment(str(ROOT / "configs" / name))
        for name in ("tiny.py", "tiny_continued.py", "tiny_large.py", "tiny_fine.py", "tiny_volumes.py")
    ]
    for before, run in itertools.pairwise(runs):
        assert run.initial == f"{before.folder}/model"
    assert len({run.folder for run in runs}) == len(runs)
    assert runs[-1].model == checkpoint.read_config(FOLDER)


def test_it_finds_what_it_was_trained_to_find_in_an_image_it_never_saw(model):
    image = model.open(DATA / "hc18_fetal_head/test/1044.jpg")
    answer = model.predict(
        image, "<image>\nCan you segment the fetal head in fetal ultrasound?", max_new_tokens=32
    )
    with Image.open(DATA / "hc18_fetal_head/test_mask/1044_fetal+head.png") as file:
        truth = np.asarray(file) > 0
    (segment,) = answer.segments
    assert segment.phrase == "fetal head in fetal ultrasound"
    # The whole image would give less than 0.5.
    assert truth.mean() < 0.33 and dice_score(segment.mask, truth) > 0.7


def test_its_mask_depends_on_what_was_asked_for(model):
    image = model.open(DATA / "cxr_montgomery/test/montgomery_2.jpg")
    masks = [
        model.predict(image, f"<image>\nPlease segment {target}.", max_new_tokens=32).segments[0].mask
        for target in ("left lung in chest X-ray", "right lung in chest X-ray")
    ]
    assert (masks[0] & masks[1]).sum() < 0.5 * (masks[0] | masks[1]).sum()


def test_it_follows_a_target_through_a_volume(model):
    slices = sorted((DATA / "sarcoma_ct/STS_008_ct").glob("*.png"))
    volume = model.open_volume(slices, conditioning=[3, 6, 9])
    answer = model.predict(volume, "<image>Please segment soft tissue sarcoma in body CT.", max_new_tokens=32)
    (segment,) = answer.segments
    truth = []
    for path in sorted((DATA / "sarcoma_ct/mask/STS_008_ct").glob("*.png")):
        with Image.open(path) as file:
            truth.append(np.asarray(file) > 0)
    assert segment.mask.shape == np.shape(truth) and np.isfinite(segment.logits).all()
    followed = [i for i in range(len(slices)) if i not in (3, 6, 9) and truth[i].any()]
    dice = dice_score(np.concatenate(segment.mask[followed]), np.concatenate([truth[i] for i in followed]))
    # The whole slices would give less than 0.1.
    assert np.mean(truth) < 0.05 and dice > 0.25
