"""Questions about studies: which slices are shown, and that masks come back to the pixels they belong to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from places import GOLDEN

from unibiomed_jax import Request, UniBiomed
from unibiomed_jax.studies.study import Geometry, Study

QUESTION = "Please segment the liver in abdomen CT."
# Slices of another size than the model's, not square, and as a scanner stores them.
SLICES, ROWS, COLUMNS = 7, 40, 52


@pytest.fixture(scope="module")
def study() -> Study:
    with Image.open(GOLDEN / "images" / "CT_abdomen.png") as image:
        picture = np.asarray(image.convert("L").resize((COLUMNS, ROWS)), np.float32)
    values = np.stack([np.roll(picture, shift, axis=1) for shift in range(SLICES)]) - 100
    origins = np.array([[0.0, 0.0, 4.0 * index] for index in range(SLICES)])
    geometry = Geometry(origins, np.array([0.8, 0, 0]), np.array([0, 0.9, 0]))
    return Study(values, "CT", "HU", geometry, "study-x", "series-x", body_part="ABDOMEN")


@pytest.fixture(scope="module")
def talking(model) -> UniBiomed:
    """The micro checkpoint, which says one [SEG] whatever it is asked."""
    said = model.tokenizer.encode("It is [SEG]. ok")
    opened = model._opened

    def dictated(requests):
        forced = dict(enumerate(said))
        return [dataclasses.replace(request, forced=forced) for request in opened(requests)]

    model._opened = dictated
    yield model
    del model._opened


@pytest.fixture(scope="module")
def answer(talking, study):
    return talking.ask_study(study, QUESTION, conditioning=[4, 2], max_new_tokens=8)


def test_it_follows_as_an_opened_volume_is_followed(talking, answer, study):
    """Another path to the same: slices turned and padded by hand, all in one program."""
    grey = np.floor(np.clip((study.values + 150) / 400, 0, 1) * 255 + 1e-4).astype(np.uint8)
    # Voxel order of right-anterior-superior: rows run to the right, columns to the back.
    shown = [np.pad(slice_[::-1, ::-1].T, ((0, 0), (6, 6))) for slice_ in grey]
    volume = talking.open_volume([Image.fromarray(pixels) for pixels in shown], conditioning=[2, 4])
    expected = talking.predict_batch([Request(f"<image>{QUESTION}", volume)], max_new_tokens=8)[0]
    (segment,), (other,) = answer.segments, expected.segments
    assert answer.text == expected.text and answer.conditioning.slices == (2, 4)
    mask = np.stack([np.pad(m, 0)[:, 6:-6].T[::-1, ::-1] for m in other.mask])
    assert 0 < segment.mask.mean() < 1
    unsure = np.stack([m[:, 6:-6].T[::-1, ::-1] for m in np.abs(other.logits)]) < 1e-3
    assert np.array_equal(segment.mask | unsure, mask | unsure)
    assert np.allclose(segment.object_scores, other.object_score, atol=1e-3)
    assert np.allclose(segment.ious, other.iou, atol=1e-3)
