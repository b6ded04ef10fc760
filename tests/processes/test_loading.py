"""Checkpoints that four processes load in shares: what each holds meanwhile, and what one cannot read."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from job import environment, run
from micro_checkpoint import MICRO, SMALL
from places import TESTS

from unibiomed_jax import checkpoint
from unibiomed_jax.parameters import abstract_params, unflatten

pytestmark = pytest.mark.scale

# Of a table of words with 96 MiB, and next to nothing else.
WORDS = (96 << 20) // 4 // SMALL.language.hidden_size
LARGE = dataclasses.replace(
    SMALL, language=dataclasses.replace(SMALL.language, vocab_size=WORDS, tie_word_embeddings=True)
)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process says of a small model, a large one, one with a wrong number, and one of its own.

    That of the last process lacks a file.
    """
    rng, base = np.random.default_rng(0), tmp_path_factory.mktemp("checkpoints")
    for name, model in (("small", SMALL), ("large", LARGE)):
        shapes = {path: leaf.shape for path, leaf in abstract_params(model).items()}
        params = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
        checkpoint.save(base / name, model, unflatten(params), MICRO)
    damaged, lacking = (shutil.copytree(base / "small", base / name) for name in ("damaged", "lacking"))
    path = largest_file(damaged / "params" / "mlp1")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    largest_file(lacking / "params" / "language_model").unlink()
    own = [[str(base / name)] for name in ("small", "small", "small", "lacking")]
    given = [str(base / name) for name in ("small", "large", "damaged")]
    script = str(TESTS / "support" / "loading.py")
    lines = run([script, *given], environment(base), processes=4, own=own)
    return [json.loads(line[line.index("[") : line.rindex("]") + 1]) for line in lines]


def test_no_process_holds_more_than_its_share_and_one_parameter(said):
    for _, (grew, share, largest), *_ in said:
        assert 95 < largest < 97 and 23 < share < 26
        assert grew < share + largest + 8  # of which blocks take some


def test_what_one_process_cannot_read_is_an_error_on_all(said):
    for number, (*_, damaged, own) in enumerate(said):
        assert "damaged: mlp1." in damaged and " is damaged or was changed after it was written; " in damaged
        assert "lacking/params/language_model cannot be read (" in own
        assert own.startswith("On process 3: ") == (number != 3)
