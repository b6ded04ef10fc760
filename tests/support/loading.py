"""A process of two that load a checkpoint together: `python loading.py CHECKPOINT SMALL PORT RANK`.

Prints the MiB that it grew by at its peak, those of its share and of the largest parameter.
"""

from __future__ import annotations

import json
import resource
import sys

import jax

from unibiomed_jax.config.model import HieraConfig, LanguageConfig, ModelConfig, Sam2Config, VisionConfig

# Mostly two tables of 64 MiB and a stack of 24: enough that what a process has anyway does not matter.
MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=64, num_layers=1, num_heads=2, mlp_dim=64, image_size=28),
    language=LanguageConfig(
        vocab_size=16384, hidden_size=1024, num_layers=2, num_heads=8, num_kv_heads=2, mlp_dim=2048
    ),
    sam2=Sam2Config(
        image_size=64,
        hiera=HieraConfig(embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), global_attention_blocks=()),
        d_model=16,
        decoder_heads=2,
        decoder_mlp_dim=32,
        memory_dim=8,
        memory_layers=1,
        memory_mlp_dim=16,
    ),
)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(path: str, small: str, port: str, rank: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    from unibiomed_jax import checkpoint
    from unibiomed_jax.sharding.layout import Layout
    from unibiomed_jax.sharding.strategies import FSDP

    checkpoint.load(small, sharding=Layout.over(None, FSDP).parameter)  # imports what loading needs
    before = peak()
    params = checkpoint.load(path, sharding=Layout.over(None, FSDP, MODEL).parameter).params
    grew, leaves = peak() - before, jax.tree.leaves(params)
    share = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    print(json.dumps([grew, share / 2**20, max(leaf.nbytes for leaf in leaves) / 2**20]))


if __name__ == "__main__":
    main(*sys.argv[1:])
