"""Questions about studies: which slices are shown, and that masks come back to the pixels they belong to."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from places import GOLDEN
from talking import dictate

from unibiomed_jax import InputError, Request, UniBiomed
from unibiomed_jax.config.preprocessing import PREPROCESSING
from unibiomed_jax.inference import study_asking, study_following
from unibiomed_jax.inference.kept import Kept
from unibiomed_jax.inference.study_first_pass import agreement_of, choose_slices
from unibiomed_jax.inference.study_question import StudyQuestion, request_of
from unibiomed_jax.inference.study_run import FOLLOWED
from unibiomed_jax.masks.parts import keep_parts
from unibiomed_jax.models.sam2 import TrackState
from unibiomed_jax.studies.grey import to_grey
from unibiomed_jax.studies.measures import measure
from unibiomed_jax.studies.study import Geometry, Study
from unibiomed_jax.studies.views import View, find_view
from unibiomed_jax.studies.windows import Window

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
    dictate(model)
    yield model
    del model._opened


@pytest.fixture(scope="module")
def answer(talking, study):
    return talking.ask_study(study, QUESTION, conditioning=[4, 2], max_new_tokens=8)


@pytest.mark.slow
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


def test_slices_are_chosen_where_the_target_surely_is_and_spread_over_it():
    presence = [0.1, 0.9, 0.9, 0.8, 0.9, 0.9, 0.95, 0.9, 0.2]
    agreement = [0.0, 0.5, 0.9, 0.9, 0.9, 0.9, 0.8, 0.5, 0.9]
    assert choose_slices(presence, agreement, 3) == (2, 4, 6)
    assert choose_slices(presence, agreement, 1) == (2,)
    assert choose_slices([0, 0, 0.7, 0], [0, 0, 0, 0], 3) == (2,), "marked in a single slice"
    assert choose_slices([0.0] * 4, [0.0] * 4, 2) == (0, 2)


def test_agreement_is_the_dice_with_both_neighbours():
    masks = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    found = agreement_of([np.packbits(mask) for mask in masks])
    assert found == pytest.approx([2 / 3, (2 / 3 + 0) / 2, 0])
    assert agreement_of([np.packbits(masks[0])]) == [1]


@pytest.mark.slow
def test_every_slice_by_itself_is_what_predict_says_of_it(talking, study):
    """A planted mark comes back to its pixel, through the window, the turning and the borders."""
    alone = talking.ask_study(study, QUESTION, conditioning="each", max_new_tokens=8, batch_size=1)
    (segment,) = alone.segments
    grey = np.floor(np.clip((study.values[3] + 150) / 400, 0, 1) * 255 + 1e-4).astype(np.uint8)
    shown = Image.fromarray(np.pad(grey[::-1, ::-1].T, ((0, 0), (6, 6))))
    expected = talking.predict(shown, f"<image>\n{QUESTION}", max_new_tokens=8).segments[0]
    unsure = (np.abs(expected.logits) < 1e-3)[:, 6:-6].T[::-1, ::-1]
    assert np.array_equal(segment.mask[3] | unsure, expected.mask[:, 6:-6].T[::-1, ::-1] | unsure)
    assert alone.conditioning.slices == tuple(range(SLICES)) and len(segment.object_scores) == SLICES


@pytest.mark.parametrize("preset", ["released", "tiny"])
def test_a_planted_mark_comes_back_to_its_pixel(study, preset):
    """Whatever a network would mark on its view lies on the stored pixel that shows it."""
    preprocessing = PREPROCESSING[preset]
    view = find_view(study, preprocessing)
    values = np.full_like(study.values, -1000)
    values[2, 11, 37] = 1000
    grey = to_grey(
        dataclasses.replace(study, values=values),
        Window(-150, 250, "stated"),
        truncate=preprocessing.truncate,
        index=2,
    )
    shown = view.show(grey) > 200
    assert shown.sum() == 1 and shown.shape == view.shape
    assert np.argwhere(view.restore(shown)).tolist() == [[11, 37]]
    study_asking.require_inverse(view)


def test_a_view_that_cannot_be_undone_is_refused():
    class Shifted(View):
        def restore(self, mask):
            return np.roll(super().restore(mask), 1, axis=0)

    with pytest.raises(InputError, match="cannot be undone"):
        study_asking.require_inverse(Shifted(4, 6))


@pytest.mark.slow
def test_what_was_done_is_not_done_again(talking, study, tmp_path, monkeypatch):
    """A run that ends at any moment, and one that goes on from there, say the same as one in one go."""
    monkeypatch.setattr(study_following, "KEEP_EVERY", 0.0)
    ask = {"max_new_tokens": 8, "batch_size": 1}
    whole = talking.ask_study(study, QUESTION, **ask)
    told: list[tuple[str, int, int]] = []

    class Killed(BaseException):
        pass

    def until(stage: str, done: int):
        def progress(*now):
            told.append(now)
            if now[:2] == (stage, done):
                raise Killed

        return progress

    state = tmp_path / "state"
    for stage, done in (("first pass", 4), ("following", 3), ("following", 5)):
        with pytest.raises(Killed):
            talking.ask_study(study, QUESTION, **ask, state=state, progress=until(stage, done))
    before = len(told)
    (state / "slice_00001.npz").unlink(missing_ok=True)
    again = talking.ask_study(study, QUESTION, **ask, state=state, progress=lambda *now: told.append(now))
    assert ("first pass", 0, SLICES) not in told[3:], "the second run begins with slice 4"
    assert [now[1] for now in told[before:] if now[0] == "following"][0] == 5
    for one, other in zip(whole.segments, again.segments, strict=True):
        assert np.array_equal(one.mask, other.mask) and one.object_scores == other.object_scores
    assert again.conditioning == whole.conditioning and whole.conditioning.choice == "auto"
    assert len(whole.conditioning.presence) == len(whole.conditioning.agreement) == SLICES
    # Another question finds nothing of it.
    with pytest.raises(Killed):
        talking.ask_study(study, "And the spleen?", **ask, state=state, progress=until("first pass", 0))


@pytest.mark.slow
def test_parts_of_masks_are_left_out_when_asked_for(talking, answer, study):
    ask = {"conditioning": [4, 2], "max_new_tokens": 8, "parts": 1}
    whole = answer.segments[0]
    assert keep_parts(whole.mask)[0] is whole.mask and whole.measures.volume_ml < 50
    all_of_it = talking.ask_study(study, QUESTION, **ask)
    assert np.array_equal(all_of_it.segments[0].mask, keep_parts(whole.mask, largest=1)[0])
    assert all_of_it.cleaning[0] == "the 1 largest connected parts were kept"
    nothing = talking.ask_study(study, QUESTION, **ask, smallest_ml=50.0)
    assert not nothing.segments[0].mask.any() and nothing.segments[0].measures.slices is None
    assert nothing.cleaning[1:] == ("parts below 50 ml were left out", "parts left out: 1")


def test_parts_by_size():
    mask = np.zeros((3, 8, 8), bool)
    mask[0, :2, :2], mask[1, 2, 2], mask[2, 5:, 5:], mask[0, 7, 7] = True, True, True, True
    assert keep_parts(mask, smallest=2)[1] == 1
    kept, left_out = keep_parts(mask, largest=1)
    assert left_out == 2 and kept.sum() == 9 and kept[2].sum() == 9
    assert keep_parts(np.zeros((2, 2), bool), largest=1)[1] == 0


def test_measures_of_a_known_box(study):
    mask = np.zeros(study.values.shape, bool)
    mask[2:5, 10:20, 30:36] = True
    mask[3, 0, 0] = True
    found = measure(study, mask)
    assert found.pixels == 181 and found.slices == (3, 5) and found.diameter_slice in (3, 4, 5)
    assert found.volume_ml == pytest.approx(181 * 4 * 0.9 * 0.8 / 1000)
    assert found.diameter_mm == pytest.approx(np.hypot(10 * 0.9, 6 * 0.8), abs=1e-3)
    nothing = measure(study, np.zeros_like(mask))
    assert nothing.slices is None and nothing.diameter_mm is None and nothing.volume_ml == 0


def test_the_words_of_the_site_come_from_the_window(talking, study):
    def words(prompt: str, **changes):
        found = request_of(talking, dataclasses.replace(study, **changes), prompt, StudyQuestion())
        return found["prompt"]

    assert words("Please segment lungs in {site}.", body_part="CHEST") == "Please segment lungs in lung CT."
    assert words("What is there?") == "What is there?"
    with pytest.raises(InputError, match="No words belong to the window.*write the site"):
        words("Please segment vessels in {site}.", modality="MR", unit="")


def test_the_request_tells_what_the_slices_were_shown_as(talking, study, monkeypatch):
    """Another window, orientation or padding is another request, whatever the options say."""
    studies = [
        study,
        dataclasses.replace(study, body_part="CHEST"),
        dataclasses.replace(study, own_windows=(Window(0, 50, "the file's own"),)),
        dataclasses.replace(study, own_windows=(Window(0, 50, "the file's own", "sigmoid"),)),
        *(
            dataclasses.replace(study, own_windows=(Window(0, 50, "the file's own", table=table),))
            for table in np.eye(2, dtype=np.float32)
        ),
    ]
    questions = [StudyQuestion()] * 2 + [StudyQuestion(window="own", conditioning=(np.int64(1), 2))] * 4
    found = [request_of(talking, *pair) for pair in zip(studies, [QUESTION] * 6, questions, strict=True)]
    changed = {"ct_orientation": "radiological"}, {"pad_to_square": False}, {"truncate": False}
    config = talking.config
    for change in changed:
        preprocessing = dataclasses.replace(config.preprocessing, **change)
        monkeypatch.setattr(talking, "config", dataclasses.replace(config, preprocessing=preprocessing))
        found.append(request_of(talking, study, QUESTION, StudyQuestion()))
    assert len({json.dumps(request) for request in found}) == 9
    assert all(json.loads(json.dumps(request)) == request for request in found)


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"body_part": ""}, {}, "Nothing says which window .*'abdomen', 'lung'"),
        ({}, {"window": "bone"}, "no window 'bone'"),
        ({}, {"window": (5.0, 5.0)}, "impossible; give low before high"),
        ({}, {"conditioning": "second"}, "no conditioning 'second'; give auto, first, each"),
        ({}, {"conditioning": [99]}, "must lie between 0 and 6"),
        ({}, {"parts": 0}, "parts is 0; keep at least one"),
        ({}, {"smallest_ml": 0.0}, "give a volume above 0"),
        ({"geometry": None}, {"smallest_ml": 1.0}, "leave smallest_ml out"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(talking, study, changes, options, sentence):
    with pytest.raises(InputError, match=sentence) as refused:
        talking.ask_study(dataclasses.replace(study, **changes), QUESTION, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("conditioning", "sentence"), [([1], "must lie between 0 and 0"), ("second", "no conditioning 'second'")]
)
def test_a_single_slice_is_no_other(talking, study, conditioning, sentence):
    single = dataclasses.replace(study, values=study.values[:1], geometry=None)
    with pytest.raises(InputError, match=sentence):
        talking.ask_study(single, QUESTION, conditioning=conditioning)


def test_what_is_kept_is_whole_or_not_there(tmp_path):
    """Cut off anywhere, or with a byte changed, it is given as it was or not at all."""
    kept, arrays = Kept(tmp_path / "state", {"a": 1}), {"a": np.arange(3), "b": np.array("words")}
    kept.put("x", **arrays)
    file = tmp_path / "state" / "x.npz"
    whole = file.read_bytes()
    changed = [bytearray(whole) for _ in whole]
    for number, data in enumerate(changed):
        data[number] ^= 0xFF
    for data in [*changed, *(whole[:length] for length in range(0, len(whole), 7))]:
        file.write_bytes(data)
        found = kept.get("x")
        assert found is None or all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_following_begins_anew_where_a_slice_of_what_was_done_is_lost(tmp_path):
    kept = Kept(tmp_path / "state", {"a": 1})
    blank = TrackState(*(np.zeros(2, np.float32) for _ in TrackState._fields))
    for index in (2, 0, 1):
        kept.put(FOLLOWED.format(index), masks=np.ones(2))
    leaves = {name: np.ones(2, np.float32).view(np.uint8) for name in TrackState._fields}
    kept.put("track", done=np.array(2), **leaves)
    (tmp_path / "state" / "slice_00001.npz").write_bytes(b"")  # done after the state was kept
    done, track = study_following._restored(kept, blank, [2, 0, 1])
    assert done == 2 and track.frames.tolist() == [1, 1]
    (tmp_path / "state" / "slice_00000.npz").write_bytes(b"")
    assert study_following._restored(kept, blank, [2, 0, 1]) == (0, blank)


@pytest.mark.parametrize("name", ["request.json", ".unibiomed-half-done.json"])
def test_a_folder_with_files_of_others_is_never_emptied(tmp_path, name):
    (tmp_path / name).write_text("{}")
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        Kept(tmp_path, {"a": 1})
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_what_is_half_done_of_another_request_makes_room(tmp_path):
    Kept(tmp_path / "state", {"a": 1}).put("x", a=np.arange(3))
    (tmp_path / "state" / ".x.npz.0123abcd").write_bytes(b"killed while it was written")
    assert Kept(tmp_path / "state", {"a": 1}).get("x") is not None
    assert Kept(tmp_path / "state", {"a": 2}).get("x") is None


@pytest.mark.slow
def test_a_folder_of_something_else_is_left_alone(talking, study, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        talking.ask_study(study, QUESTION, state=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
