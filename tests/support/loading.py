"""A process of a job that loads checkpoints in shares, one after the other: `python loading.py FOLDER ...`.

Says for each the MiB by which the process grew at its peak, those of its share and those of the largest
parameter, or why it cannot be loaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from unibiomed_jax import checkpoint, distributed
from unibiomed_jax.errors import InputError
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import FSDP


def memory(field: str) -> float:
    """MiB of this process that the kernel calls so."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) / 2**10


def load(folder: str) -> list[float] | str:
    layout = Layout.over(None, FSDP, checkpoint.read_config(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    try:
        leaves = jax.tree.leaves(checkpoint.load(folder, sharding=layout.parameter).params)
    except InputError as error:
        return str(error)
    grew = memory("VmHWM") - before
    share = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return [grew, share / 2**20, max(leaf.nbytes for leaf in leaves) / 2**20]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    place = vars(parser.parse_intermixed_args())
    folders = place.pop("folders")
    distributed.join(distributed.Processes(**place))
    print(json.dumps([load(folder) for folder in folders]))
    distributed.finish()


if __name__ == "__main__":
    main()
