"""What `unibiomed export` writes runs without this package and says what the reference says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from golden_cases import NEW_TOKENS, OBJECTS, load, request
from measured import relative_error
from places import MICRO

from unibiomed_jax.commands.export import ExportOptions, export
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.batching import frame_arrays, prompt_arrays, tile_arrays

pytestmark = pytest.mark.slow

# A process in which this package cannot be imported; it answers by one program, and by its stages.
RUN = """
import sys
sys.modules["unibiomed_jax"] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
from load import load

programs, about = load()
inputs = dict(np.load(sys.argv[2]))
whole = programs["ground"](inputs)
tiles, image = inputs.pop("tiles"), inputs.pop("image")
state = programs["prefill"](inputs | programs["encode_tiles"]({"tiles": tiles}))
state = programs["advance"](state | {"done": np.zeros(1, bool), "limit": np.int32(inputs["forced"].shape[1])})
said = np.asarray(state["ids"][0])
places = np.resize(np.flatnonzero(said == about["seg"]), whole["hidden"].shape[1])
hidden = {"hidden": state["hidden"][:, places]}
decoded = programs["segment"](programs["encode_image"]({"image": image}) | hidden)
twice = programs["encode_tiles"]({"tiles": np.concatenate([tiles, tiles])})["visual"]
np.savez(
    sys.argv[3],
    staged_ids=state["ids"],
    staged_masks=decoded["masks"],
    rows=twice.shape[0],
    **{name: np.asarray(value) for name, value in whole.items()},
)
"""


@pytest.fixture(scope="module")
def answered(model, image, tmp_path_factory):
    """What the exported programs say to the question of a golden case."""
    folder = tmp_path_factory.mktemp("export")
    golden = load("image_abdomen")
    asked = request(model, image, "image_abdomen", golden)
    asked = dataclasses.replace(asked, image=model.open(image))
    prompt = model.prompt_of(asked)
    ids, source, lengths, forced, limits = prompt_arrays(
        model.config, model.tokenizer, [asked], [prompt], NEW_TOKENS
    )
    tiles, (frames, _) = tile_arrays(model.config, [asked], 1), frame_arrays(model.config.sam2, [asked])
    options = ExportOptions(
        MICRO,
        folder / "out",
        "cpu",
        tiles=tiles.shape[1],
        tokens=ids.shape[1],
        new_tokens=forced.shape[1],
        objects=OBJECTS,
    )
    assert export(options) == 0
    inputs = {"ids": ids, "source": source, "lengths": lengths, "forced": forced, "tiles": tiles}
    inputs |= {"image": frames[:, 0], "limit_tokens": limits.tokens, "limit_segs": limits.segs}
    np.savez(folder / "inputs.npz", **inputs)
    command = [sys.executable, "-c", RUN, str(folder / "out"), str(folder / "inputs.npz")]
    result = subprocess.run(
        [*command, str(folder / "said.npz")], capture_output=True, text=True, check=False, cwd=folder
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "out", dict(np.load(folder / "said.npz")), golden


def test_programs_say_the_golden_ids_and_masks_without_this_package(answered):
    _, said, golden = answered
    expected = golden["generated_ids"]
    np.testing.assert_array_equal(said["ids"][0, : int(said["count"][0])], expected)
    assert said["valid"].sum() == int(golden["n_masks"]) == 1
    logits, reference = said["masks"][0, 0, 0], golden["sam_lowres"][0, 0, 0]
    assert relative_error(logits, reference) < 1e-4
    differs = (logits > 0) != (reference > 0)
    assert not differs.any() or np.abs(reference[differs]).max() < 1e-3


def test_stages_say_what_the_whole_says(answered):
    _, said, _ = answered
    count = int(said["count"][0])
    np.testing.assert_array_equal(said["staged_ids"][0, :count], said["ids"][0, :count])
    valid = said["valid"][0]
    np.testing.assert_allclose(
        said["staged_masks"][0][valid], said["masks"][0, 0][valid], rtol=1e-4, atol=1e-4
    )
    assert said["rows"] == 2  # a batch that was not exported


def test_the_folder_says_what_lies_in_it(answered):
    folder, _, _ = answered
    about = json.loads((folder / "manifest.json").read_text())
    assert about["target"] == "cpu" and set(about["programs"]) == {
        *("ground", "encode_tiles", "prefill", "advance", "encode_image", "segment")
    }
    assert about["programs"]["encode_tiles"]["tiles"][:2] == ["uint8", "batch"]
    assert about["programs"]["ground"]["tiles"][:2] == ["uint8", "1"]
    loader = (folder / "load.py").read_text()
    code = [line for line in loader.splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert len(code) <= 10 and "unibiomed_jax" not in "\n".join(code)
    assert (folder / "tokenizer").is_dir() and not list(folder.parent.glob(".*partial"))


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(InputError, match="is there already; choose another folder"):
        export(ExportOptions(MICRO, tmp_path, "cpu"))
    with pytest.raises(InputError, match=r"more than the model's context, \d+; lower --tokens"):
        export(ExportOptions(MICRO, tmp_path / "new", "tpu", tokens=10**6))
    with pytest.raises(InputError, match=r"--batch=0 is impossible"):
        export(ExportOptions(MICRO, tmp_path / "new", "cpu", batch=0))


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_programs_for_chips_that_are_not_here(target, tmp_path):
    sizes = {"tiles": 1, "tokens": 64, "new_tokens": 16}
    assert export(ExportOptions(MICRO, tmp_path / "out", target, precision="bfloat16", **sizes)) == 0
    about = json.loads((tmp_path / "out/manifest.json").read_text())
    texts = {}
    for name in about["programs"]:
        program = jax.export.deserialize((tmp_path / f"out/{name}.stablehlo").read_bytes())
        assert program.platforms == (target,)
        texts[name] = program.mlir_module()
    assert not any("cudnn" in text for text in texts.values())
    kernels = {name for name, text in texts.items() if "tpu_custom_call" in text}
    assert kernels >= ({"ground", "encode_image"} if target == "tpu" else set())
