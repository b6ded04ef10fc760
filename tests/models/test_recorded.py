"""Every module against what torch computed (tests/recorded): outputs and gradients, without torch."""

import numpy as np
import pytest
from flax import nnx
from measured import assert_all_close, assert_close
from module_checks import assert_gradients_close, decode, load, paths, value_and_gradients
from recorded_modules import FOLDER, MODULES, read

from unibiomed_jax.models.layers import unstack_layers

pytestmark = pytest.mark.slow


def recorded_model(name, recording):
    """Our module with the recorded weights; all others are NaN, since torch did without them."""
    model = nnx.eval_shape(MODULES[name].build)
    shapes = {path: leaf.shape for path, leaf in paths(nnx.to_pure_dict(nnx.state(model))).items()}
    unread = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    return load(model, unread | recording.weights)


@pytest.mark.parametrize(
    ("name", "remat"), [*((name, None) for name in MODULES), ("internvit", "full"), ("qwen2", "full")]
)
def test_outputs_and_gradients_equal_torch(name, remat):
    recording, options = read(name), {"remat": remat} if remat else {}
    floats = {key: x for key, x in recording.inputs.items() if x.dtype == np.float32}

    def call(model, floats):
        return MODULES[name].call(model, recording.inputs | floats, **options)

    model = recorded_model(name, recording)
    outputs, grads, input_grads = value_and_gradients(model, call, floats, recording.cotangents)
    assert_all_close(outputs, recording.outputs, 1e-5)
    assert_all_close(input_grads, recording.input_gradients, 1e-5)
    expected = {path: np.zeros(grad.shape, np.float32) for path, grad in grads.items()}
    expected |= recording.weight_gradients
    assert_gradients_close(grads, expected, 1e-5, touched=tuple(recording.weight_gradients))


@pytest.mark.parametrize("layout", ["stack", "list"])
def test_cached_decoding_equals_torch(layout):
    recording = read("qwen2")
    model = recorded_model("qwen2", recording)
    if layout == "list":
        model.layers = unstack_layers(model.layers)
    embeds = model.embed(recording.inputs["ids"]) + recording.inputs["visual"]
    lengths, steps = [6, 4, 1], 5
    hiddens = decode(model, embeds, lengths, steps, slots=11)
    for row, length in enumerate(lengths):
        expected = recording.outputs["hidden"][row, length - 1 : length + steps]
        assert_close(hiddens[row], expected, 1e-5)


def test_every_file_is_read():
    assert {file.stem for file in FOLDER.iterdir()} == set(MODULES)
