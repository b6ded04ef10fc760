"""Run in a process with eight CPU devices by test_splash.py; prints its findings as one line of JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.models.attention import xla_attention
from unibiomed_jax.models.splash import splash_attention
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import STRATEGIES

AXES = ("batch", "language.tokens", "language.heads")
# Strategy -> its mesh. Of eight heads that share four of the keys' two are on a device, or one, which then
# needs keys of its own.
MESHES = {
    "sequence": {"fsdp": 4, "sequence": 2},
    "tensor": {"tensor": 8},
}


def main():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 256, heads, 16)), jnp.float32) for heads in (8, 4, 4))
    found = {}
    for name, mesh in MESHES.items():
        layout = Layout.over(None, STRATEGIES[name], ModelConfig(), mesh)

        def run(q, k, v, layout=layout):
            options = {"causal": True, "key_valid": None, "layout": layout, "axes": AXES, "interpret": True}
            return splash_attention(q, k, v, **options)

        expected = jax.jit(lambda *x: xla_attention(*x, causal=True))(q, k, v)
        found[name] = float(jnp.abs(layout.jit(run)(q, k, v) - expected).max())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
