"""The whole predictor against what the PyTorch reference computed (tests/golden), from the image file on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import (
    CASES,
    NEW_TOKENS,
    OBJECTS,
    assert_masks_equal,
    golden_mask,
    load,
    request,
    written_out,
)
from measured import assert_close, relative_error
from PIL import Image
from places import MICRO

from unibiomed_jax import InputError, Request, UniBiomed
from unibiomed_jax.config.precision import BFLOAT16, FAST, FLOAT32
from unibiomed_jax.conversion.from_torch import read_released
from unibiomed_jax.inference import network
from unibiomed_jax.inference.answer import Answer
from unibiomed_jax.inference.generate import Limits, ground
from unibiomed_jax.inputs.tiles import sam_image
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.models.ops import normalize
from unibiomed_jax.models.unibiomed import visual_source
from unibiomed_jax.parameters import flatten, unflatten

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_same_words_and_masks_as_the_reference(model, image, case, results):
    golden = load(case)
    asked = request(model, image, case, golden)
    answer = model.predict_batch([asked], max_new_tokens=NEW_TOKENS)[0]
    ((ids, _),) = results["said"]
    assert ids == [golden["generated_ids"].tolist()]
    assert answer.text == str(golden["prediction"])
    assert written_out(answer).startswith(str(golden["input_text"]))
    assert_masks_equal(answer, golden)
    for number, segment in enumerate(answer.segments):
        # The reference goes through all frames for one object after the other.
        count = len(answer.records)
        frames = slice(number * count, (number + 1) * count)
        decoded = results["segment"] + results["segment_frames"]
        assert len(decoded) == 1
        if case == "video8":
            low = decoded[0].masks[:count, number]
        else:
            low = decoded[0].masks[0, number][None]
        assert_close(low, golden["sam_lowres"][frames, 0, 0], 1e-4)
        assert_close(np.atleast_1d(segment.iou), golden["sam_ious"][frames].reshape(-1, 3).max(-1), 1e-4)
        assert_close(np.atleast_1d(segment.object_score), golden["sam_obj_score"][frames].reshape(-1), 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_prompt_embeddings_and_logits(model, image, case):
    """The language model's input, its states and its logits step by step, with the cache and without it."""
    golden = load(case)
    asked = request(model, image, case, golden)
    if asked.image is not None and isinstance(asked.image, Image.Image):
        asked = Request(asked.prompt, model.open(asked.image), asked.regions, asked.boxes, asked.history)
    prompt = model.prompt_of(asked)
    assert prompt.ids == golden["input_ids"].tolist()
    said = golden["generated_ids"].tolist()
    steps, tokens = (golden[name].astype(int).tolist() for name in ("forced_steps", "forced_ids"))
    forced = dict(zip(steps, tokens, strict=True))
    asked = Request(asked.prompt, asked.image, asked.regions, asked.boxes, asked.history, forced)
    if asked.image is not None:
        pixels = np.asarray(normalize(asked.image.tiles))
        np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2), golden["pixel_values"])
        model._encode_visual([asked.image])
        assert_close(asked.image.visual.reshape(golden["vit_embeds"].shape), golden["vit_embeds"], 1e-5)
    answering = model._start([asked], len(said), None, None)
    *_, ids = model._looks(answering, len(said))
    assert ids[0] == said
    states = np.asarray(answering.state.hidden)[0, : len(said) - 1]
    assert_close(states, golden["last_hidden_tail"][1:], 1e-4)
    network = nnx.merge(model.graphdef, model.params)
    objects = np.flatnonzero(np.array(said[:-1]) == model.tokenizer.seg_id)
    assert len(objects) == int(golden["n_masks"])
    if len(objects):
        assert_close(states[objects], golden["seg_hidden"], 1e-4)
        assert_close(network.prompt_vectors(states[objects]), golden["seg_embed"], 1e-4)

    whole = np.array([prompt.ids + said[:-1]], np.int32)
    visual = np.zeros((1, 1, states.shape[-1]), np.float32)
    if asked.image is not None:
        visual = asked.image.visual[prompt.rows][None]
    embeds = network.embed_prompt(whole, visual, visual_source(whole, model.tokenizer.image_context_id))
    assert_close(embeds[:, : len(prompt.ids)], golden["inputs_embeds"], 1e-5)
    states = network.language_model(embeds)[0, len(prompt.ids) - 1 :]
    assert_close(states, golden["last_hidden_tail"], 1e-4)
    logits = np.asarray(network.language_model.logits(states))
    assert_close(logits[0], golden["first_logits"], 1e-4)
    assert_close(np.sort(logits)[:, :-6:-1], golden["step_top5_logits"], 1e-4)
    named = np.take_along_axis(logits, golden["step_top5_ids"].astype(int), -1)
    assert_close(named, golden["step_top5_logits"], 1e-4)


def test_batch_of_different_requests_answers_as_one_by_one(model, image):
    cases = ["image_abdomen", "text_only", "video8", "region_abdomen", "image_noseg"]
    golden = {case: load(case) for case in cases}
    answers = model.predict_batch(
        [request(model, image, case, golden[case]) for case in cases], max_new_tokens=NEW_TOKENS
    )
    for case, answer in zip(cases, answers, strict=True):
        assert answer.text == str(golden[case]["prediction"])
        assert_masks_equal(answer, golden[case])


def test_the_fast_precision_of_a_cpu_keeps_words_and_masks(image):
    model = UniBiomed.from_pretrained(MICRO, precision=FAST)
    for case in CASES:
        golden = load(case)
        answer = model.predict_batch([request(model, image, case, golden)], max_new_tokens=NEW_TOKENS)[0]
        assert answer.text == str(golden["prediction"])
        for number, segment in enumerate(answer.segments):
            expected = golden_mask(golden, number)
            mask = segment.mask.reshape(expected.shape)
            assert (mask & expected).sum() / (mask | expected).sum() >= 0.999


def test_bfloat16_everywhere_stays_near_the_reference(image, watch_calls):
    """The policy of GPUs and TPUs. Words are forced: those of a random model hang on the last bits."""
    model = UniBiomed.from_pretrained(MICRO, precision=BFLOAT16)
    results = watch_calls(model)
    for case in CASES:
        golden = load(case)
        forced = dict(enumerate(golden["generated_ids"].tolist()))
        asked = dataclasses.replace(request(model, image, case, golden), forced=forced)
        answer = model.predict_batch([asked], max_new_tokens=len(forced))[0]
        expected = golden["last_hidden_tail"][1:]
        _, (states,) = results["said"][-1]
        difference = np.abs(np.asarray(states[: len(expected)], np.float32) - expected)
        # Eight bits: 0.4 % an operation. Not zero, or the policy would be float32.
        assert 1e-3 < difference.mean() / np.abs(expected).mean() < 0.02
        assert len(answer.segments) == int(golden["n_masks"])
        for number, segment in enumerate(answer.segments):
            expected = golden_mask(golden, number)
            mask = segment.mask.reshape(expected.shape)
            assert (mask & expected).sum() / (mask | expected).sum() > 0.99


def test_a_checkpoint_stored_in_bfloat16_says_on_a_cpu_what_float32_weights_say(image, monkeypatch):
    """The language model of a release is stored in bfloat16, and a CPU multiplies it in parts."""
    monkeypatch.setattr(network, "bfloat16_units", lambda: "matrix")
    loaded = read_released(MICRO)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params["language_model"])
    models = []
    for language in (rounded, jax.tree.map(lambda x: x.astype(jnp.float32), rounded)):
        params = {**loaded.params, "language_model": language}
        models.append(UniBiomed(loaded.config, params, Tokenizer.from_folder(MICRO), precision=FAST))
    for case in CASES:
        golden = load(case)
        parts, whole = (
            model.predict_batch([request(model, image, case, golden)], max_new_tokens=NEW_TOKENS)[0]
            for model in models
        )
        assert parts.text == whole.text and len(parts.segments) == len(whole.segments)
        for found, expected in zip(parts.segments, whole.segments, strict=True):
            assert (found.mask & expected.mask).sum() / (found.mask | expected.mask).sum() >= 0.999


def test_nothing_compiles_again_once_warm(model, image):
    """Per bucket of image count, text length and objects, whatever is in it and whatever came in between."""

    def ask(*widths: int, words: int = 0, segments: int = 1) -> None:
        forced = {1 + 2 * i: model.tokenizer.seg_id for i in range(segments)}
        prompt = "<image>Describe this image." + " liver" * words
        asked = [Request(prompt, model.open(image.crop((0, 0, w, 400))), forced=forced) for w in widths]
        for answer in model.predict_batch(asked, max_new_tokens=NEW_TOKENS):
            assert len(answer.segments) >= segments

    def ask_otherwise(first: int) -> None:
        """About a region, without an image, and about a volume."""
        forced = {1: model.tokenizer.seg_id}
        frames = [image.crop((x, 0, x + 300, 400)) for x in range(first, first + 3)]
        for asked in (
            Request("<image>What is region1?", frames[0], boxes=[(first, 20, 200, 300)], forced=forced),
            Request("What is a CT scan?"),
            Request("<image>Please segment the liver.", model.open_volume(frames), forced=forced),
        ):
            model.predict_batch([asked], max_new_tokens=NEW_TOKENS)

    ask(410)
    ask(410, words=60)
    ask(410, segments=3)
    ask(410, 409, 408, 407)
    ask_otherwise(0)
    before = model.stages.programs()
    ask_otherwise(20)
    for width in (409, 405, 402):  # the same tile grid; other pixels, other sizes
        ask(width)
    ask(403, words=58)
    ask(404, segments=4)
    ask(410, 402, 403)
    assert model.stages.programs() == before


def test_object_score_hides_masks_only_when_asked(model, image):
    """Of the model, which sees the object, and of one that says of every object that it is absent."""
    loaded = read_released(MICRO)
    parameters = flatten(loaded.params)
    last_layer = "sam2.sam_mask_decoder.pred_obj_score_head.layers.2"
    parameters[f"{last_layer}.kernel"] = np.zeros_like(parameters[f"{last_layer}.kernel"])
    parameters[f"{last_layer}.bias"] = np.full_like(parameters[f"{last_layer}.bias"], -10)
    absent = UniBiomed(loaded.config, unflatten(parameters), Tokenizer.from_folder(MICRO), precision=FLOAT32)
    asked = request(model, image, "image_abdomen", load("image_abdomen"))
    for asker, present in ((model, True), (absent, False)):
        shown, hidden = (
            asker.predict_batch([asked], max_new_tokens=NEW_TOKENS, hide_absent=hide)[0].segments[0]
            for hide in (False, True)
        )
        assert (shown.object_score > 0) == (hidden.object_score > 0) == present
        assert shown.mask.any()
        assert np.array_equal(hidden.mask, shown.mask & present)
        assert np.array_equal(hidden.mask, hidden.logits > 0)


def test_second_turn_reuses_the_encoded_image(model, image):
    opened = model.open(image)
    first = model.predict(opened, "<image>Describe this image.", max_new_tokens=4)
    visual = opened.visual
    second = model.predict(opened, "And the liver?", history=first, max_new_tokens=4)
    assert opened.visual is visual
    assert first.image == opened.identity
    assert second.transcript.startswith(first.transcript)
    again = model.predict(image, "And the liver?", history=first, max_new_tokens=4)
    assert again.text == second.text


def test_a_box_is_the_region_it_encloses(model, image, results):
    region = np.zeros((410, 410))
    region[82:184, 123:246] = 1
    question = "<image>What is the region1 in the picture?"
    for boxes, regions in (([(123, 82, 246, 184)], ()), ((), [region]), ([(0, 0, 100, 100)], ())):
        model.predict(image, question, boxes=boxes, regions=regions, max_new_tokens=NEW_TOKENS)
    # Words of a random model hardly change; its states do.
    boxed, masked, elsewhere = (hidden for _, (hidden,) in results["said"])
    assert np.array_equal(boxed, masked) and not np.allclose(boxed, elsewhere, atol=1e-3)


def test_an_image_is_encoded_once_for_all_masks_of_all_turns(model, image, results):
    opened = model.open(image)
    seg = model.tokenizer.seg_id
    five = Request("<image>Describe this image.", opened, forced={2 * step: seg for step in range(1, 6)})
    (first,) = model.predict_batch([five], max_new_tokens=12)
    assert len(first.segments) == 5
    tiles = len(results["encode_tiles"])
    more = Request("And the liver?", opened, history=first, forced={0: seg})
    (second,) = model.predict_batch([more], max_new_tokens=4)
    assert second.segments
    calls = [len(results[name]) for name in ("encode_tiles", "encode_image", "segment")]
    assert calls == [tiles, 1, 2]


def test_a_history_of_another_image_is_refused(model, image):
    """Their tokens are as many, so that only the pixels tell them apart."""
    frames = [np.full((30, 40), grey, np.uint8) for grey in (10, 20, 30)]
    for opened, same, other in (
        (model.open(image), model.open(image), model.open(image.rotate(180))),
        (model.open(np.zeros((30, 40))), model.open(np.zeros((30, 40))), model.open(np.zeros((40, 30)))),
        (model.open_volume(frames), model.open_volume(frames), model.open_volume(frames[::-1])),
    ):
        said = model.prompt_of(Request("<image>Describe this image.", opened)).text + "Fine.<|end|>"
        history = Answer("", "Fine.<|end|>", (), opened.records, said, {}, image=opened.identity)
        assert model.prompt_of(Request("Why?", same, history=history)).text.startswith(said)
        with pytest.raises(InputError, match="history is about another image .*; give that image again"):
            model.prompt_of(Request("Why?", other, history=history))


@pytest.mark.parametrize("case", CASES)
def test_one_compiled_call_says_and_segments_what_the_reference_does(model, image, case, results):
    golden = load(case)
    asked = request(model, image, case, golden)
    (answer,) = model.ground([asked], max_new_tokens=NEW_TOKENS, objects=OBJECTS)
    assert {name: len(calls) for name, calls in results.items() if calls} == {"ground": 1}
    (result,) = results["ground"]
    said = golden["generated_ids"].tolist()
    assert result.ids[0, : len(said)].tolist() == said
    # A row that does not end is cut at `max_new_tokens`.
    assert int(result.count[0]) == len(said) if len(said) < NEW_TOKENS else result.count[0] >= NEW_TOKENS
    assert answer.text == str(golden["prediction"])
    assert written_out(answer).startswith(str(golden["input_text"]))
    assert_masks_equal(answer, golden)
    (staged,) = model.predict_batch([asked], max_new_tokens=NEW_TOKENS)
    same = ("prompt", "text", "transcript", "records", "visual_tokens", "image", "notice")
    assert all(getattr(answer, name) == getattr(staged, name) for name in same)
    for number, (segment, other) in enumerate(zip(answer.segments, staged.segments, strict=True)):
        count = len(answer.records)
        frames = slice(number * count, (number + 1) * count)
        low = result.masks.masks[0, :count, number]
        assert_close(result.hidden[0, number], golden["seg_hidden"][number], 1e-4)
        assert_close(low, golden["sam_lowres"][frames, 0, 0], 1e-4)
        assert_close(np.atleast_1d(segment.iou), golden["sam_ious"][frames].reshape(-1, 3).max(-1), 1e-4)
        assert_close(np.atleast_1d(segment.object_score), golden["sam_obj_score"][frames].reshape(-1), 1e-4)
        assert segment.phrase == other.phrase
        for name in ("logits", "iou", "object_score"):
            assert relative_error(getattr(segment, name), getattr(other, name)) < 1e-5, name


def test_the_whole_model_as_one_jitted_function(model, image):
    """Two copies of the golden image as a batch: ids, states and masks of the reference from one call."""
    golden = load("image_abdomen")
    asked = request(model, image, "image_abdomen", golden)
    opened = model.open(asked.image)
    prompt = model.prompt_of(Request(asked.prompt, opened))
    new = len(golden["generated_ids"]) + 1
    ids = np.tile(np.asarray(prompt.ids, np.int32), (2, 1))
    forced = np.full((2, new), -1, np.int32)
    for step, token in asked.forced.items():
        forced[:, step] = token
    names = model.tokenizer

    @jax.jit
    def run(params, *inputs):
        whole = nnx.merge(model.graphdef, params)
        return ground(whole, *inputs, objects=2, end_id=names.eos_id, seg_id=names.seg_id)

    result = run(
        model.params,
        np.stack([opened.tiles] * 2),
        ids,
        np.asarray(visual_source(ids, names.image_context_id)),
        np.full(2, len(prompt.ids), np.int32),
        np.stack([sam_image(opened.frames[0], model.config.sam2.image_size)[None]] * 2),
        forced,
        Limits(np.full(2, new, np.int32), np.full(2, 2, np.int32)),
    )
    assert np.asarray(result.valid).tolist() == [[True, False]] * 2
    for row in range(2):
        assert result.ids[row, : new - 1].tolist() == golden["generated_ids"].tolist()
        assert_close(result.hidden[row, 0], golden["seg_hidden"][0], 1e-4)
        low = golden["sam_lowres"].reshape(result.masks.masks.shape[3:])
        assert_close(result.masks.masks[row, 0, 0], low, 1e-4)
