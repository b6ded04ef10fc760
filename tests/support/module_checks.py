"""What the checks of a module against torch share that needs no torch: weights, gradients, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measured import note


def paths(tree):
    """The leaves of a pure dictionary (or of a module's state), keyed by their dotted path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {".".join(str(getattr(entry, "key", entry)) for entry in path): leaf for path, leaf in leaves}


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
    """call(module, inputs), and the gradients of sum(result * cotangent) by parameter path and by input.

    The result may be a tree of arrays; `cotangent` is one of the same structure.
    """
    graphdef, state = nnx.split(module)

    def loss(state, inputs):
        result = call(nnx.merge(graphdef, state), inputs)
        return sum(jax.tree.leaves(jax.tree.map(lambda x, c: jnp.sum(x * c), result, cotangent))), result

    (_, result), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, inputs)
    return result, paths(nnx.to_pure_dict(grads[0])), grads[1]


def gradient_error(ours, theirs, path):
    """The relative error of the gradient at `path`; a bias of keys is measured on the scale of its layer.

    It shifts all scores of a query alike, so that its gradient may be zero but for rounding.
    """
    scale = np.abs(theirs[path]).max()
    if path.endswith("k_proj.bias"):
        scale = max(scale, np.abs(theirs[path.removesuffix("bias") + "kernel"]).max())
    return np.abs(np.asarray(ours[path]) - theirs[path]).max() / max(scale, 1e-30)


def assert_gradients_close(ours, theirs, tolerance, touched):
    """Compare gradients by path. Below `touched` (a prefix or several) something must be there to compare."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    for path in theirs:
        error = gradient_error(ours, theirs, path)
        note(error, tolerance)
        assert error <= tolerance, f"{path}: relative error {error:.2e} above {tolerance:.0e}"
    moved = {path for path, expected in theirs.items() if np.abs(expected).max() > 0}
    assert all(any(path.startswith(prefix) for path in moved) for prefix in touched)
    assert all(path.startswith(tuple(touched)) for path in moved), moved


def decode(model, embeds, lengths, steps, slots):
    """Hidden states by prefill and cached steps that are fed with the tokens after the prompt of each row.

    `embeds` are the embedded tokens of the whole sequences, `lengths` how many of them are the prompts.
    """
    lengths = jnp.asarray(lengths)
    bucket = int(lengths.max())
    in_prompt = jnp.arange(bucket) < lengths[:, None]
    prompts = jnp.where(in_prompt[..., None], embeds[:, :bucket], 1.0)  # behind a prompt may be anything
    cache = model.init_cache(len(embeds), slots)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, cache):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.prefill(prompts, lengths, cache)
        hiddens = jnp.zeros((steps + 1, *hidden.shape), hidden.dtype).at[0].set(hidden)

        def step(t, carry):
            hiddens, cache = carry
            token = jnp.take_along_axis(embeds, (lengths + t)[:, None, None], axis=1)
            hidden, cache = model.decode_step(token, lengths + t, cache)
            return hiddens.at[t + 1].set(hidden), cache

        return jax.lax.fori_loop(0, steps, step, (hiddens, cache))[0]

    return np.asarray(run(state, cache)).swapaxes(0, 1)
