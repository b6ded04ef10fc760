"""Where the reference stops generating: as the host sees it, and as much of it as ids tell a device."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN

from unibiomed_jax.inference.generate import Decoding, StopText, _ended
from unibiomed_jax.inference.stopping import find_stop, stop_text
from unibiomed_jax.inputs.prompt import STOP_TEXT
from unibiomed_jax.inputs.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


def reference_stop(tokenizer: Tokenizer, ids: list[int]) -> int | None:
    """Decode every prefix, as the original implementation does."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end]).replace("\r", "").replace("\n", "")
        if ids[end - 1] == tokenizer.eos_id or text.endswith(STOP_TEXT):
            return end
    return None


PIECES = [
    "<|end|>",
    "<|e",
    "nd|>",
    "<|",
    "end",
    "|>",
    "\n",
    "\r\n",
    ".",
    " ",
    "é",
    "肺",
    "[SEG]",
    "<|end|",
    ">\n\n",
    "🫁",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.integers(1, 5))
@settings(max_examples=300)
def test_stop_equals_decoding_every_prefix(byte_tokenizer, qwen2, pieces, block):
    for tokenizer in (byte_tokenizer, qwen2):
        ids = [token for piece in pieces for token in tokenizer.encode(piece)]
        expected = reference_stop(tokenizer, ids)
        assert find_stop(tokenizer, ids) == expected
        # The same, block by block, as generation does.
        found = None
        for start in range(0, len(ids), block):
            found = find_stop(tokenizer, ids[: start + block], start)
            if found is not None:
                break
        assert found == expected


@given(st.lists(st.integers(0, 291), max_size=40))
@settings(max_examples=100)
def test_stop_on_any_bytes(byte_tokenizer, ids):
    assert find_stop(byte_tokenizer, ids) == reference_stop(byte_tokenizer, ids)


def test_stop_through_newlines(byte_tokenizer):
    ids = byte_tokenizer.encode("<|e\n\n\n\n\n\n\n\n\n\n\n\nnd|\r>")
    assert find_stop(byte_tokenizer, ids) == len(ids)
    assert find_stop(byte_tokenizer, ids[:-1]) is None


def test_stop_of_the_recorded_answers(byte_tokenizer):
    stops = {}
    for case in ("image_abdomen", "image_noseg", "region_abdomen", "video8", "text_only"):
        said = np.load(GOLDEN / "micro" / f"{case}.npz")["generated_ids"]
        stops[case] = find_stop(byte_tokenizer, said)
    assert stops.pop("image_abdomen") == 21
    assert set(stops.values()) == {None}


# ------------------------------------------------------------------------------------------------------------
# what a device can tell


@pytest.fixture(scope="session")
def stops(byte_tokenizer, qwen2) -> list[tuple[Tokenizer, StopText]]:
    # An embedding may have more rows than the tokenizer has ids.
    return [
        (tokenizer, stop_text(tokenizer, tokenizer.vocab_size + 5)) for tokenizer in (byte_tokenizer, qwen2)
    ]


ROOM = 64


@jax.jit
def ends_of(ids, step, stop, end_id):
    """Whether a row ends with each of its tokens, and whether with its newest."""
    state = Decoding(None, None, ids, None, step, None, None, None)
    return (
        _ended(state, end_id, stop, every_step=True)[0],
        _ended(state, end_id, stop)[0, 0],
    )


def device_stop(tokenizer: Tokenizer, stop: StopText, ids: list[int]) -> int | None:
    """`find_stop` as a device sees it."""
    ids = ids[:ROOM]
    padded = jnp.zeros((1, ROOM), jnp.int32).at[0, : len(ids)].set(np.array(ids, np.int32))
    ended, newest = ends_of(padded, len(ids), stop, tokenizer.eos_id)
    assert ended[len(ids) - 1] == newest
    ends = np.flatnonzero(ended[: len(ids)])
    return int(ends[0]) + 1 if len(ends) else None


@given(pieces=st.lists(st.sampled_from([*PIECES, "<|im_end|>", "<"]), min_size=1, max_size=12))
@settings(max_examples=200)
def test_a_device_never_stops_where_the_reference_goes_on(stops, pieces):
    for tokenizer, stop in stops:
        ids = [token for piece in pieces for token in tokenizer.encode(piece)][:ROOM]
        end = device_stop(tokenizer, stop, ids)
        assert end is None or find_stop(tokenizer, ids[:end]) is not None


@given(
    # After a space the usual vocabulary has "<|" in one token.
    words=st.text('abz 019.,:;)]!?"\n<é肺', max_size=20).filter(lambda words: not words.endswith(" ")),
    after=st.sampled_from(["", "\n", " more", "<|end|>"]),
)
@settings(max_examples=200)
def test_a_device_stops_where_the_reference_does_after_ordinary_words(stops, words, after):
    for tokenizer, stop in stops:
        said = tokenizer.encode(words + STOP_TEXT)
        end = device_stop(tokenizer, stop, said + tokenizer.encode(after))
        assert end == find_stop(tokenizer, said) == len(said)


def test_a_device_stops_at_the_end_token(stops):
    for tokenizer, stop in stops:
        ids = [*tokenizer.encode("Fine."), tokenizer.eos_id, *tokenizer.encode("more")]
        assert device_stop(tokenizer, stop, ids) == find_stop(tokenizer, ids)
        assert device_stop(tokenizer, None, ids) == find_stop(tokenizer, ids)
        assert device_stop(tokenizer, None, tokenizer.encode(STOP_TEXT)) is None


def test_words_may_come_before_the_stop_text_in_its_first_token(qwen2):
    stop = stop_text(qwen2, qwen2.vocab_size)
    assert stop.rest.tolist() == [91, 408, 91, 29]  # | end | >
    assert stop.begins[[27, 15757]].all()  # < and .<
    assert not stop.begins[[91, 29, qwen2.seg_id, qwen2.image_context_id]].any()
    for token in np.flatnonzero(stop.begins):
        assert qwen2.decode([token]).endswith("<")


def test_of_a_stop_text_that_is_one_token_a_device_knows_nothing(byte_tokenizer):
    """Every device stop would be a guess: the text that ends so may be another token's."""
    whole = copy.copy(byte_tokenizer)
    whole.backend = tokenizers.Tokenizer.from_str(byte_tokenizer.backend.to_str())
    whole.backend.add_tokens([STOP_TEXT])
    whole._encoder = whole.backend
    ids = whole.encode("A" + STOP_TEXT)
    assert len(ids) == 2
    stop = stop_text(whole, whole.vocab_size + 1)
    assert not stop.begins.any()
    assert device_stop(whole, stop, ids) is None and find_stop(whole, ids) == 2
