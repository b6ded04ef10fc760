"""Where the reference stops generating: when the text ends with the stop string, which the host can see."""

from collections.abc import Sequence

import numpy as np

from unibiomed_jax.inference.generate import StopText
from unibiomed_jax.inputs.prompt import STOP_TEXT
from unibiomed_jax.inputs.tokenizer import Tokenizer


def find_stop(tokenizer: Tokenizer, ids: Sequence[int], start: int = 0) -> int | None:
    """How many of the generated ids the reference would have generated, or None if it would go on.

    It stops after the id that is eos_id, or that makes the whole decoded text, without carriage returns and
    newlines, end with `<|end|>`. Only a tail is decoded: bytes before it cannot change what the text ends
    with, since `<|end|>` is ASCII.

    Args:
        tokenizer: the model's.
        ids: generated so far.
        start: ids[:start] are known not to stop, so that a loop of blocks looks at each id once.
    """
    for end in range(start + 1, len(ids) + 1):
        if ids[end - 1] == tokenizer.eos_id:
            return end
        width = len(STOP_TEXT)
        while True:
            tail = tokenizer.decode(ids[max(0, end - width) : end]).replace("\r", "").replace("\n", "")
            if len(tail) >= len(STOP_TEXT) or width >= end:
                break
            width *= 2
        if tail.endswith(STOP_TEXT):
            return end
    return None


def end_of(tokenizer: Tokenizer, ids: Sequence[int], tokens: int, segs: int, looked: int = 0) -> int | None:
    """Where an answer ends: where the reference stops, or at a limit; None where it goes on.

    Args:
        tokenizer: the model's.
        ids: generated so far.
        tokens: that may be said.
        segs: [SEG] after which the answer ends, with the token that the state at the last of them chose.
        looked: ids[:looked] are known to go on.
    """
    ends = [find_stop(tokenizer, ids, looked)]
    if len(ids) >= tokens:
        ends.append(tokens)
    places = [step for step, token in enumerate(ids) if token == tokenizer.seg_id]
    if len(places) >= segs and places[segs - 1] + 2 <= len(ids):
        ends.append(places[segs - 1] + 2)
    return min((end for end in ends if end is not None), default=None)


def stop_text(tokenizer: Tokenizer, vocab_size: int) -> StopText:
    """What of `find_stop` can be told from ids alone: the usual cut of `<|end|>` into tokens.

    The first token may have other text before its "<", as in ".<".
    """
    first, *rest = tokenizer.encode(STOP_TEXT)
    names = (tokenizer.backend.id_to_token(token) or "" for token in range(vocab_size))
    alike = np.fromiter((name.endswith(STOP_TEXT[0]) for name in names), bool, vocab_size)
    # If the tokenizer does not split off '<', the device recognises nothing.
    begins = alike & (tokenizer.decode([first]) == STOP_TEXT[0])
    return StopText(begins, np.array(rest, np.int32))
