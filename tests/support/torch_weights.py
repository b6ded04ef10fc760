"""Random weights of torch modules, and their values under our names: what all parity tests share."""

import numpy as np
import torch


def arrays(tensors, prefix=""):
    """Tensors of a state dict (or gradients) below `prefix`, as float32 numpy arrays without the prefix."""
    return {
        name.removeprefix(prefix): tensor.detach().float().numpy()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def gradients(module, prefix=""):
    """The gradient of every parameter of a torch module, by name; a parameter without one counts as zero."""
    return arrays(
        {
            name: parameter.grad if parameter.grad is not None else parameter.detach() * 0
            for name, parameter in module.named_parameters()
        },
        prefix,
    )


def linear(source, name, target):
    """torch.nn.Linear `name` of `source` as the parameters of our Linear `target`."""
    ours = {f"{target}.kernel": source[f"{name}.weight"].T}
    if f"{name}.bias" in source:
        ours[f"{target}.bias"] = source[f"{name}.bias"]
    return ours


def conv(source, name, target):
    """torch.nn.Conv2d (OIHW) as our Conv2d (HWIO)."""
    return {
        f"{target}.kernel": source[f"{name}.weight"].transpose(2, 3, 1, 0),
        f"{target}.bias": source[f"{name}.bias"],
    }


def norm(source, name, target):
    """torch.nn.LayerNorm (or an RMS norm without bias) as our norm."""
    ours = {f"{target}.scale": source[f"{name}.weight"]}
    if f"{name}.bias" in source:
        ours[f"{target}.bias"] = source[f"{name}.bias"]
    return ours


def stack(layers, target):
    """Equal layers as one stack with a leading layer axis."""
    return {f"{target}.{path}": np.stack([layer[path] for layer in layers]) for path in layers[0]}


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
