"""The training batch of the reference: its losses, masks and the gradient of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import GOLDEN

from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.conversion.assemble import build_parts
from unibiomed_jax.conversion.sources import released
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import merge, split
from unibiomed_jax.training.config import LossConfig
from unibiomed_jax.training.forward import TokenIds, answer_batch, count_targets, loss_sums, mean_losses

pytestmark = pytest.mark.slow

MICRO = GOLDEN / "micro"
IDS = TokenIds(image=280, seg=287)
FIVE_COPIES = LossConfig(copies=5, token_chunk=64)


def nearest(mask: np.ndarray, side: int) -> np.ndarray:
    """torch's nearest-neighbour resize of an (H, W) mask."""
    rows, columns = (np.arange(side) * size // side for size in mask.shape)
    return mask[rows][:, columns]


def golden_batch(golden) -> dict[str, np.ndarray]:
    """The reference's lists as padded arrays."""
    tiles = golden["tiles_per_sample"]
    pixels = np.zeros((2, max(tiles), 112, 112, 3), np.float32)
    for i, own in enumerate(np.split(golden["pixel_values"].transpose(0, 2, 3, 1), np.cumsum(tiles)[:-1])):
        pixels[i, : len(own)] = own
    masks = np.zeros((2, 2, 1, 64, 64), np.uint8)
    for i in range(2):
        for k, mask in enumerate(golden[f"masks{i}"]):
            masks[i, k, 0] = nearest(mask, 64)
    return {
        "pixel_values": pixels,
        "input_ids": golden["input_ids"].astype(np.int32),
        "labels": golden["labels"].astype(np.int32),
        "sam_pixels": golden["g_pixel_values_u8"].transpose(0, 2, 3, 1)[:, None],
        "masks": masks,
        "object_valid": np.array([[True, True], [True, False]]),
        "frame_valid": np.ones((2, 1), bool),
    }


@pytest.fixture(scope="module")
def golden():
    return np.load(MICRO / "train_forward.npz", allow_pickle=True)


@pytest.fixture(scope="module")
def result(golden):
    """(losses, predicted masks, gradient tables by torch name) of the golden batch."""
    source = released(MICRO / "checkpoint")
    parameters = {
        f"{part}.{path}": jnp.asarray(leaf, jnp.float32)
        for part, leaves in build_parts(source.rows, source.tensors)
        for path, leaf in leaves.items()
    }
    model = nnx.eval_shape(lambda: UniBiomedModel(source.config, FLOAT32, rngs=nnx.Rngs(0)))
    graphdef, _ = split(model)
    batch, points = golden_batch(golden), jnp.asarray(golden["point_coords"])

    @jax.jit
    def run(parameters, batch):
        def loss(parameters):
            prediction = answer_batch(merge(graphdef, parameters), batch, IDS, token_chunk=64)
            sums = loss_sums(prediction, batch, FIVE_COPIES, jax.random.key(0), points)
            losses = mean_losses(sums, count_targets(batch, IDS, FIVE_COPIES), FIVE_COPIES)
            return losses["loss"], (losses, prediction.masks)

        return jax.grad(loss, has_aux=True)(parameters)

    grads, (losses, masks) = run(parameters, batch)
    grads = {name: tensor for row in source.rows for name, tensor in row.parts(np.array(grads[row.path]))}
    return losses, masks, grads


def test_the_three_losses(golden, result):
    losses, _, _ = result
    assert float(losses["loss_mask"]) == pytest.approx(float(golden["loss_mask"]), abs=1e-5)
    assert float(losses["loss_dice"]) == pytest.approx(float(golden["loss_dice"]), abs=1e-5)
    assert float(losses["loss_tokens"]) == pytest.approx(float(golden["llm_loss"]), abs=1e-5)


def test_the_predicted_masks(golden, result):
    """The reference repeats a sample's objects until there are five."""
    _, masks, _ = result
    for sample, objects in enumerate((2, 1)):
        for copy in range(5):
            expected = golden["pred_masks"][sample, copy]
            ours = masks[sample, copy % objects, 0]
            assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_norm_of_every_gradient(golden, result):
    _, _, grads = result
    names = [str(name) for name in golden["grad_names"]]
    assert len(names) == 297
    for name, expected in zip(names, golden["grad_norms"], strict=True):
        norm = np.linalg.norm(grads[name].astype(np.float64))
        if "sam_mask_decoder" in name and name.endswith("k_proj.bias"):
            # Softmax ignores a shift of all keys: what is left is rounding.
            assert max(norm, expected) < 1e-7, name
        else:
            assert abs(norm - expected) <= 1e-4 * expected, name


def test_gradients_element_by_element(golden, result):
    _, _, grads = result
    stored = [key for key in golden.files if key.startswith("grad:")]
    assert len(stored) == 5
    for key in stored:
        expected = golden[key]
        error = np.abs(grads[key.removeprefix("grad:")] - expected).max()
        assert error <= 1e-4 * np.abs(expected).max(), key


def test_parameters_no_loss_reaches_have_no_gradient(golden, result):
    _, _, grads = result
    reached = {str(name) for name in golden["grad_names"]}
    unreached = [name for name in grads if name not in reached]
    assert any("memory_attention" in name for name in unreached)
    assert not any(np.any(grads[name]) for name in unreached)
