"""Random weights of torch modules, and their values as our leaves by way of the conversion tables."""

import numpy as np
import torch

from unibiomed_jax.conversion.assemble import build_leaf, check_complete


def arrays(tensors):
    """Tensors of a state dict (or gradients) as float32 numpy arrays."""
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}


def gradients(module):
    """The gradient of every parameter of a torch module, by name; a parameter without one counts as zero."""
    return arrays(
        {
            name: parameter.grad if parameter.grad is not None else parameter.detach() * 0
            for name, parameter in module.named_parameters()
        }
    )


def released(values, names):
    """Values of a torch module under released names.

    `names` tells what the module calls each released tensor: several names where it cuts it along its first
    axis.
    """
    values = dict(values)
    result = {name: np.concatenate([values.pop(part) for part in parts]) for name, parts in names.items()}
    assert not values, f"no released tensor holds {sorted(values)}"
    return result


def leaves(rows, tensors, padding=0.0):
    """Tensors (weights or gradients) under released names as our leaves, by their path below the part.

    As in a conversion nothing may be missing, left over or of another shape. Where a conversion pads a
    vocabulary with zeros, `padding` stands.
    """
    check_complete(rows, tensors, "The torch module")
    result = {}
    for row in rows:
        leaf = build_leaf(row, tensors)
        if row.padded:
            row.padding(leaf)[...] += padding
        result[row.path.partition(".")[2]] = leaf
    return result


def randomise(module, seed):
    """Random weights of a size at which every branch of a torch module matters; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    return set_weights(module, lambda shape: torch.randn(shape, generator=generator))


def set_weights(module, normal):
    """Set every parameter of a torch module to noise of its shape by `normal`, scaled by its kind."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = normal(parameter.shape)
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "embed" not in name else 10
            parameter.copy_(noise * fan_in**-0.5 + (parameter.ndim == 1 and name.endswith("weight")))
    return module.eval()
