"""Resizing masks on the host against torch."""

import numpy as np
import pytest

from unibiomed_jax.masks.resize import resize_logits, upscale_masks

torch = pytest.importorskip("torch")


def torch_resize(x, size):
    x = torch.nn.functional.interpolate(torch.tensor(x), size=size, mode="bilinear", align_corners=False)
    return x.numpy()


@pytest.mark.parametrize("size", [(256, 256), (31, 200), (200, 31), (64, 80), (7, 3), (1, 1), (640, 481)])
def test_resize_equals_torch(size):
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 80)).astype(np.float32)
    assert np.abs(resize_logits(x, size) - torch_resize(x, size)).max() < 1e-6


def test_masks_are_enlarged_in_two_steps():
    x = np.random.default_rng(1).standard_normal((1, 2, 64, 64)).astype(np.float32)
    result = upscale_masks(x, (410, 333), 256)
    assert np.abs(result - torch_resize(torch_resize(x, (256, 256)), (410, 333))).max() < 1e-6
    assert np.abs(result - torch_resize(x, (410, 333))).max() > 0.1, "one step would differ"
