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
    """What each process says of a small model, a large one, one with a wrong number, and three of its own.

    Of the first of these the third process has a copy with a wrong number, of the second the last process one
    that lacks a file, of the third the third process one that lacks the manifest.
    """
    rng, base = np.random.default_rng(0), tmp_path_factory.mktemp("checkpoints")
    for name, model in (("small", SMALL), ("large", LARGE)):
        shapes = {path: leaf.shape for path, leaf in abstract_params(model).items()}
        params = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
        checkpoint.save(base / name, model, unflatten(params), MICRO)
    damaged, lacking, empty = (
        shutil.copytree(base / "small", base / name) for name in ("damaged", "lacking", "empty")
    )
    path = largest_file(damaged / "params" / "mlp1")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    largest_file(lacking / "params" / "language_model").unlink()
    (empty / "manifest.json").unlink()
    here = [str(base / "small")] * 3
    own = [here, here, [str(damaged), here[0], str(empty)], [here[0], str(lacking), here[0]]]
    given = [str(base / name) for name in ("small", "large", "damaged")]
    script = str(TESTS / "support" / "loading.py")
    lines = run([script, *given], environment(base), processes=4, own=own)
    return [json.loads(line[line.index("[") : line.rindex("]") + 1]) for line in lines]


def test_no_process_holds_more_than_its_share_and_one_parameter(said):
    for _, (grew, share, largest), *_ in said:
        assert 95 < largest < 97 and 23 < share < 26
        assert grew < share + largest + 8  # of which blocks take some


def test_what_one_process_cannot_read_is_an_error_on_all(said):
    for number, (_, _, damaged, own, lacking, empty) in enumerate(said):
        for sentence in (damaged, own):
            assert "damaged: mlp1." in sentence and " is damaged or was changed after it was " in sentence
        assert own.startswith("On process 2: ") == (number != 2)
        assert "lacking/params/language_model cannot be read (" in lacking and "expected at least" in lacking
        assert lacking.startswith("On process 3: ") == (number != 3)
        assert "(manifest.json is missing)" in empty and empty.startswith("On process 2: ") == (number != 2)
