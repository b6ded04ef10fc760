"""Copy weights between torch modules and ours, and compare results: what all parity tests share."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from measured import assert_all_close, assert_close, relative_error  # noqa: F401 (for the tests)


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


def paths(tree):
    """The leaves of a pure dictionary (or of a module's state), keyed by their dotted path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {".".join(str(getattr(entry, "key", entry)) for entry in path): leaf for path, leaf in leaves}


def randomise(module, seed):
    """Random weights of a size at which every branch of a torch module matters; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "embed" not in name else 10
            parameter.copy_(noise * fan_in**-0.5 + (parameter.ndim == 1 and name.endswith("weight")))
    return module.eval()


def load(module, values):
    """Set every parameter of our module from `values` (dotted path to array); names and shapes must match."""
    state = nnx.to_pure_dict(nnx.state(module))
    expected = paths(state)
    assert set(values) == set(expected), set(values) ^ set(expected)
    for path, value in values.items():
        assert value.shape == expected[path].shape, (path, value.shape, expected[path].shape)
    leaves, treedef = jax.tree.flatten_with_path(state)
    names = [".".join(str(getattr(entry, "key", entry)) for entry in path) for path, _ in leaves]
    nnx.update(module, jax.tree.unflatten(treedef, [jnp.asarray(values[name]) for name in names]))
    return module


def value_and_gradients(module, call, inputs, cotangent):
    """call(module, inputs), and the gradients of sum(result * cotangent) by parameter path and by input."""
    graphdef, state = nnx.split(module)

    def loss(state, inputs):
        result = call(nnx.merge(graphdef, state), inputs)
        return jnp.sum(result * cotangent), result

    (_, result), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, inputs)
    return result, paths(nnx.to_pure_dict(grads[0])), grads[1]
