"""The pure functions against their definitions, written out in numpy, and against stored values of torch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from unibiomed_jax.config.model import PIXEL_MEAN, PIXEL_STD
from unibiomed_jax.models import ops

BYTES = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)


def torchvision_normalise(pixels):
    """ToTensor and Normalize: three steps in float32, each of them rounded."""
    mean, std = np.array(PIXEL_MEAN, np.float32), np.array(PIXEL_STD, np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def test_every_byte_of_every_channel_is_normalised_to_the_bit():
    compiled = jax.jit(ops.normalize)
    for shape in ((256, 3), (2, 8, 16, 3)):
        pixels = BYTES.reshape(shape)
        for result in (compiled(pixels), ops.normalize(pixels)):
            assert result.dtype == np.float32
            np.testing.assert_array_equal(result, torchvision_normalise(pixels))


def test_normalisation_is_imagenets():
    white = ops.normalize(np.full((1, 1, 3), 255, np.uint8))
    np.testing.assert_allclose(
        white[0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6
    )


def test_other_devices_compute_what_a_cpu_looks_up():
    """Both ways, run here: a compiler may multiply by reciprocals, a rounding off each."""
    traced = jax.make_jaxpr(ops.normalize)(BYTES)
    (choice,) = (equation for equation in traced.eqns if "branches" in equation.params)
    results = [
        np.asarray(jax.jit(jaxpr_as_fun(branch))(*traced.consts, BYTES)[0])
        for branch in choice.params["branches"]
    ]
    assert len(results) == 2
    for result in results:
        np.testing.assert_allclose(result, torchvision_normalise(BYTES), rtol=0, atol=1e-6)
    lowered = {
        platform: jax.jit(ops.normalize).trace(BYTES).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    looked_up = {platform: "stablehlo.gather" in text for platform, text in lowered.items()}
    assert looked_up == {"cpu": True, "cuda": False, "tpu": False}


def test_floats_are_normalised_already():
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(ops.normalize)(x), x)


def test_gelu_is_exact():
    # x * Phi(x)
    x = np.array([-3.0, -1.0, -0.25, 0.0, 0.5, 2.0], np.float32)
    expected = [-0.00404969, -0.15865526, -0.10032343, 0.0, 0.34573123, 1.9544997]
    np.testing.assert_allclose(ops.gelu(x), expected, atol=1e-7)
    assert ops.gelu(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_rope_turns_pairs_by_their_angle():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2, 7, 40]])
    result = ops.apply_rope(jnp.asarray(x), *ops.rope_table(positions, 6, 1e4))
    angles = positions[0, :, None, None] * 1e4 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)
    np.testing.assert_allclose(result, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_rope_computes_its_angles_in_float32():
    cos, _ = ops.rope_table(jnp.array([[5003]]), 4, 1e6)
    np.testing.assert_allclose(cos[0, 0], np.cos([5003, 5.003, 5003, 5.003]), atol=1e-6)
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    assert ops.apply_rope(x, cos, cos).dtype == jnp.bfloat16


def test_bicubic_equals_torch():
    # torch.nn.functional.interpolate([0, 1, 4, 9, 16], mode="bicubic", align_corners=False) along one axis.
    x = np.array([0, 1, 4, 9, 16], np.float32)
    larger = [-0.1008, 0.1481, 0.7106, 2.0041, 4.0, 6.3388, 9.9726, 14.0741, 16.7058]  # to 9 values
    smaller = [0.1481, 4.0, 14.0741]  # to 3 values
    np.testing.assert_allclose(ops.bicubic_matrix(5, 9) @ x, larger, atol=1e-4)
    np.testing.assert_allclose(ops.bicubic_matrix(5, 3) @ x, smaller, atol=1e-4)
    table = np.random.default_rng(0).standard_normal((5, 7, 2)).astype(np.float32)
    by_axis = np.einsum("ij,jkc->ikc", ops.bicubic_matrix(5, 9), table)
    by_axis = np.einsum("lk,ikc->ilc", ops.bicubic_matrix(7, 3), by_axis)
    np.testing.assert_allclose(ops.resize_bicubic(table, (9, 3)), by_axis, atol=1e-6)
    assert ops.resize_bicubic(table, (5, 7)) is table


def test_bilinear_neither_antialiases_nor_extrapolates():
    x = np.array([0.0, 10, 20, 30], np.float32).reshape(1, 4, 1)
    assert ops.resize_bilinear(x, (1, 8)).ravel().tolist() == [0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30]
    assert ops.resize_bilinear(x, (1, 2)).ravel().tolist() == [5, 25]
    impulse = np.eye(9, dtype=np.float32)[4].reshape(1, 9, 1)
    assert ops.resize_bilinear(impulse, (1, 3)).ravel().tolist() == [0, 1, 0]
