"""What every strategy holds, computes and moves, side by side, on the devices there are.

    python benchmarks/sharding.py            # the devices of this machine
    python benchmarks/sharding.py --cpus 8   # so many devices made of one CPU: bytes and FLOPs alone

One update of a small model (all parts, few layers) is compiled for each strategy; on accelerators it is
timed, too. What collectives move is what a device receives; one in a loop counts once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from collections import Counter

ITEM = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([0-9,]*)\]")


def moved(text: str) -> Counter:
    """MiB of every kind of collective in the text of a compiled program."""
    total: Counter = Counter()
    for result, kind in COLLECTIVE.findall(text):
        for dtype, dims in SHAPE.findall(result):
            size = ITEM.get(dtype, 4)
            for number in filter(None, dims.split(",")):
                size *= int(number)
            total[kind] += size / 2**20
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cpus", type=int, help="make so many devices of this machine's CPU")
    parser.add_argument("--samples", type=int, default=1, help="samples a device")
    parser.add_argument(
        "--strategies", nargs="*", help="of unibiomed_jax/sharding/strategies.py; default: all"
    )
    options = parser.parse_args()
    if options.cpus:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={options.cpus} "
            # It may let two devices wait for each other, each in another collective.
            "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        )

    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from unibiomed_jax.config.model import HieraConfig, LanguageConfig, ModelConfig, Sam2Config, VisionConfig
    from unibiomed_jax.sharding.layout import Layout, spread
    from unibiomed_jax.sharding.strategies import STRATEGIES, mesh_axes_of
    from unibiomed_jax.training.config import LoraConfig, LossConfig, TrainConfig
    from unibiomed_jax.training.footprint import device_bytes
    from unibiomed_jax.training.forward import TokenIds
    from unibiomed_jax.training.initialise import structure
    from unibiomed_jax.training.start import abstract_state
    from unibiomed_jax.training.step import TrainStep

    model = ModelConfig(
        vision=VisionConfig(hidden_size=256, num_layers=4, num_heads=4, mlp_dim=1024, image_size=112),
        language=LanguageConfig(
            vocab_size=8192, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=2, mlp_dim=2048
        ),
        sam2=Sam2Config(
            image_size=256,
            hiera=HieraConfig(embed_dim=48, num_heads=1, stages=(1, 2, 4, 1), global_attention_blocks=()),
            d_model=128,
            memory_layers=2,
        ),
    )
    config = TrainConfig(model=model, lora=LoraConfig(rank=32), loss=LossConfig(num_points=1024))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=1))
    graphdef, shapes = structure(config)
    count, side = jax.device_count(), 256
    samples = options.samples * count
    ids = np.zeros((samples, 256), np.int32)
    ids[:, :16], ids[:, 100] = 8000, 8001
    batch = {
        "pixel_values": np.zeros((samples, 1, 112, 112, 3), np.uint8),
        "input_ids": ids,
        "labels": ids,
        "sam_pixels": np.zeros((samples, 1, side, side, 3), np.uint8),
        "masks": np.zeros((samples, 1, 1, side // 4, side // 4), np.uint8),
        "object_valid": np.ones((samples, 1), bool),
        "frame_valid": np.ones((samples, 1), bool),
    }
    timed = jax.default_backend() != "cpu"
    table = Table(title=f"One update of {samples} samples on {count} {jax.devices()[0].device_kind}")
    for column in ("strategy", "mesh", "state MiB", "frozen MiB", "temporary MiB", "GFLOP", "moves MiB", "s"):
        table.add_column(column, justify="left" if column in ("strategy", "mesh") else "right")
    for name in options.strategies or STRATEGIES:
        mesh = spread(mesh_axes_of(STRATEGIES[name]), count)
        layout = Layout.over(None, STRATEGIES[name], model, mesh)
        abstract = abstract_state(config, shapes, layout)
        step = TrainStep(graphdef, config, TokenIds(8000, 8001), layout).whole
        arrays = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=layout.batch) for k, v in batch.items()}
        program = step.lower(abstract["train"], abstract["frozen"], arrays).compile()
        seconds = ""
        if timed:
            zeros = jax.tree.map(
                lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract
            )
            state, frozen = zeros["train"], zeros["frozen"]
            placed, times = layout.place_batch(batch), []
            for _ in range(6):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(program(state, frozen, placed))
                times.append(time.perf_counter() - start)
            seconds = f"{min(times):.3f}"

        kinds = moved(program.as_text())
        table.add_row(
            name,
            ",".join(f"{axis}={size}" for axis, size in mesh.items()),
            f"{device_bytes(abstract['train']) / 2**20:.1f}",
            f"{device_bytes(abstract['frozen']) / 2**20:.1f}",
            f"{program.memory_analysis().temp_size_in_bytes / 2**20:.1f}",
            f"{program.cost_analysis()['flops'] / 1e9:.1f}",
            ", ".join(f"{kind} {size:.1f}" for kind, size in sorted(kinds.items())) or "-",
            seconds,
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
