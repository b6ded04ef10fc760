"""The bridge from the language model to SAM2 against torch with random weights."""

import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import LanguageConfig, ModelConfig, Sam2Config
from unibiomed_jax.models.unibiomed import TextHiddenFcs

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from internvl_torch import text_hidden_fcs_leaves, torch_text_hidden_fcs  # noqa: E402
from measured import assert_all_close, assert_close  # noqa: E402
from module_checks import load, value_and_gradients  # noqa: E402
from torch_weights import arrays, gradients, randomise  # noqa: E402

MODEL = ModelConfig(language=LanguageConfig(hidden_size=56), sam2=Sam2Config(d_model=32))


def test_output_and_gradients_equal_torch():
    theirs = randomise(torch_text_hidden_fcs(MODEL), 0)
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((2, 3, 56)).astype(np.float32)
    cotangent = rng.standard_normal((2, 3, 32)).astype(np.float32)
    torch_hidden = torch.tensor(hidden, requires_grad=True)
    expected = theirs(torch_hidden)
    (expected * torch.tensor(cotangent)).sum().backward()

    ours = TextHiddenFcs(56, 32, rngs=nnx.Rngs(0))
    load(ours, text_hidden_fcs_leaves(arrays(theirs.state_dict()), MODEL))
    result, grads, hidden_grad = value_and_gradients(ours, lambda model, x: model(x), hidden, cotangent)
    assert_close(result, expected, 1e-5)
    assert_close(hidden_grad, torch_hidden.grad, 1e-5)
    assert_all_close(grads, text_hidden_fcs_leaves(gradients(theirs), MODEL), 1e-5)
