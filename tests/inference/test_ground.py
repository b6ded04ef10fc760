"""What answering by one compiled call promises beside the answers of the reference (see test_golden.py)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from golden_cases import NEW_TOKENS, OBJECTS, assert_masks_equal, load, request
from measured import relative_error
from places import MICRO

from unibiomed_jax import Answer, InputError, Request, UniBiomed
from unibiomed_jax.conversion.from_torch import read_released
from unibiomed_jax.parameters import flatten, unflatten

pytestmark = pytest.mark.slow

# Their prompts and their tiles have room in the same shapes, as a batch they leave one of four rows over.
IMAGES = ["image_abdomen", "region_abdomen", "image_noseg"]


def dictate(model: UniBiomed, asked: Request, said: str) -> Request:
    """The request, to be answered so as far as these words go."""
    return dataclasses.replace(asked, forced=dict(enumerate(model.tokenizer.encode(said))))


@pytest.fixture(scope="module")
def asked(model, image) -> Request:
    return request(model, image, "image_abdomen", load("image_abdomen"))


def ground(model: UniBiomed, *requests: Request, **options) -> list[Answer]:
    return model.ground(requests, **{"max_new_tokens": NEW_TOKENS, "objects": OBJECTS, **options})


def test_a_batch_answers_as_one_by_one(model, image, results):
    golden = [load(case) for case in IMAGES]
    asked = [request(model, image, *pair) for pair in zip(IMAGES, golden, strict=True)]
    answers = ground(model, *asked)
    assert {name: len(calls) for name, calls in results.items() if calls} == {"ground": 1}
    for answer, expected in zip(answers, golden, strict=True):
        assert answer.text == str(expected["prediction"])
        assert_masks_equal(answer, expected)


def test_volumes_of_one_length_are_a_batch(model, image, results):
    golden = load("video8")
    recorded = request(model, image, "video8", golden)
    turned = [frame.rotate(180) for frame in recorded.image.frames]
    other = dataclasses.replace(recorded, image=model.open_volume(turned, conditioning=[6, 3]))
    first, second = ground(model, recorded, other)
    assert {name: len(calls) for name, calls in results.items() if calls} == {"ground": 1}
    assert first.text == str(golden["prediction"])
    assert_masks_equal(first, golden)
    (alone,) = model.predict_batch([other], max_new_tokens=NEW_TOKENS)
    assert second.text == alone.text
    for segment, expected in zip(second.segments, alone.segments, strict=True):
        assert segment.mask.shape == (8, 240, 320)
        assert relative_error(segment.logits, expected.logits) < 1e-5
        assert relative_error(segment.iou, expected.iou) < 1e-5


@pytest.mark.parametrize("count", [1, 3])
def test_the_loop_ends_when_every_row_has_said_the_stop_text(model, image, results, count):
    """Nothing is said after it; a row that is there to fill the batch up does not keep the others waiting."""
    spoken = [".<|end|>", "[SEG].<|end|>", "A<|end|>"][:count]
    asked = [request(model, image, case, load(case)) for case in IMAGES]
    asked = [dictate(model, *pair) for pair in zip(asked, spoken, strict=False)]
    answers = ground(model, *asked)
    assert [answer.text for answer in answers] == spoken
    assert [len(answer.segments) for answer in answers] == [0, 1, 0][:count]
    (result,) = results["ground"]
    lengths = [len(model.tokenizer.encode(text)) for text in spoken]
    assert result.count[:count].tolist() == lengths
    assert (result.count[count:] == 1).all()
    assert max(lengths) <= NEW_TOKENS // 2
    assert result.ids[:, max(lengths) - 1].any() and not result.ids[:, max(lengths) :].any()


def test_a_stop_text_in_unusual_tokens_is_cut_by_the_host(model, asked, results):
    """The reference ignores line ends when it looks for it; ids alone do not tell."""
    said = "A.<|e\nnd|\r>"
    dictated = dictate(model, asked, said + "[SEG][SEG][SEG]")
    (answer,) = ground(model, dictated)
    assert answer.text == said and answer.transcript.endswith(said) and not answer.segments
    assert results["ground"][0].count[0] > len(model.tokenizer.encode(said)), "a device cannot see it"
    (staged,) = model.predict_batch([dictated], max_new_tokens=NEW_TOKENS)
    assert (staged.text, staged.transcript) == (answer.text, answer.transcript)


def test_a_second_call_of_the_same_shapes_compiles_nothing(model, image, asked):
    ground(model, asked)
    before = model.stages.programs()
    assert before > 0
    other = image.rotate(90).crop((0, 0, 409, 405))
    ground(model, dictate(model, dataclasses.replace(asked, image=other), "[SEG] and [SEG]."))
    ground(model, dataclasses.replace(asked, prompt=asked.prompt + " Why?"), max_new_tokens=NEW_TOKENS - 1)
    assert model.stages.programs() == before
    ground(model, dataclasses.replace(asked, image=None, prompt="Hello"), objects=1)
    assert model.stages.programs() == before + 1


def test_an_answer_is_as_long_as_asked_for(model, asked):
    (long,), (short,) = ground(model, asked), ground(model, asked, max_new_tokens=5)
    assert model.tokenizer.decode(load("image_abdomen")["generated_ids"][:5]).strip() == short.text
    assert len(long.segments) == 1 and not short.segments, "[SEG] is the eighth token"


def test_object_score_hides_masks_only_when_asked(model, asked, monkeypatch):
    parameters = flatten(read_released(MICRO).params)
    last_layer = "sam2.sam_mask_decoder.pred_obj_score_head.layers.2"
    parameters[f"{last_layer}.kernel"] = np.zeros_like(parameters[f"{last_layer}.kernel"])
    parameters[f"{last_layer}.bias"] = np.full_like(parameters[f"{last_layer}.bias"], -10)
    absent = UniBiomed(model.config, unflatten(parameters), model.tokenizer, precision=model.precision)
    for params, present in ((model.params, True), (absent.params, False)):
        monkeypatch.setattr(model, "params", params)
        shown, hidden = (ground(model, asked, hide_absent=hide)[0].segments[0] for hide in (False, True))
        assert (shown.object_score > 0) == (hidden.object_score > 0) == present
        assert shown.mask.any()
        assert np.array_equal(hidden.mask, shown.mask & present)


def test_more_masks_than_there_is_room_for_are_one_sentence(model, asked):
    three = "[SEG] and [SEG] and [SEG]."
    with pytest.raises(InputError, match="has 3 masks but objects=2 .*; raise it to 3") as refused:
        ground(model, dictate(model, asked, three))
    assert "\n" not in str(refused.value)
    # Words alone have no masks, however often they say [SEG].
    words = dictate(model, Request("What is a CT scan?"), three)
    (answer,) = ground(model, words)
    assert answer.text.startswith(three) and not answer.segments


def test_what_does_not_fit_into_one_call_is_one_sentence(model, image, asked, results):
    frames = [image.crop((0, 0, 50, 40))] * 3
    short, long = (Request("<image>Segment it.", model.open_volume(frames[:count])) for count in (2, 3))
    words = Request("What is a CT scan?")
    kinds = "images, or volumes, or words alone; ask about each kind by itself"
    for requests, options, reason in (
        ([asked, words], {}, kinds),
        ([words, asked], {}, kinds),
        ([asked, long], {}, kinds),
        ([words, long, asked], {}, kinds),
        ([short, long], {}, "need equally many slices"),
        ([asked], {"objects": 0}, "objects is 0; an answer needs room for at least one mask"),
        ([asked], {"max_new_tokens": 0}, "max_new_tokens is 0; at least one token"),
        ([dataclasses.replace(asked, prompt="Where?")], {}, "has no <image>"),
    ):
        with pytest.raises(InputError, match=reason) as refused:
            ground(model, *requests, **options)
        assert "\n" not in str(refused.value)
    assert ground(model) == []
    assert not any(results.values())


def test_a_history_with_other_regions_is_refused(model, image, results):
    """Also where there are as many of them, as long as they are of another size."""
    opened = model.open(image)
    small, wide, large = (0, 0, 110, 110), (0, 0, 410, 110), (0, 0, 410, 410)
    first = Request("<image>What is region1, what is region2?", opened, boxes=[small, wide])
    prompt = model.prompt_of(first)
    transcript = prompt.text + "Fine.<|end|>"
    history = Answer(
        first.prompt, "Fine.<|end|>", (), opened.records, transcript, {},
        image=opened.identity, visual_tokens=prompt.visual_tokens,
    )  # fmt: skip
    later = Request("Why?", opened, boxes=first.boxes, history=history)
    assert model.prompt_of(later).text.startswith(transcript)
    for boxes, reason in (
        ([small, large], "about other regions .*; give the regions of its first question again"),
        ([wide, small], "about other regions .*; give the regions of its first question again"),
        ([small], "holds 3 images, frames and regions but 2 are given"),
        ([], "holds 3 images, frames and regions but 1 are given"),
    ):
        changed = dataclasses.replace(later, boxes=boxes)
        for ask in (model.ground, model.predict_batch):
            with pytest.raises(InputError, match=reason):
                ask([changed])
    assert not any(results.values())
