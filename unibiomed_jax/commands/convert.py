"""`unibiomed convert`: PyTorch checkpoints in and out, and whether two of them are the same."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time

import numpy as np
from rich.console import Console

from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.conversion import from_torch as importing
from unibiomed_jax.conversion import to_torch as exporting
from unibiomed_jax.conversion import verify as verifying
from unibiomed_jax.conversion.options import FromTorchOptions, ToTorchOptions, VerifyOptions


def from_torch(options: FromTorchOptions) -> int:
    """Run `unibiomed convert from-torch`."""
    start = time.perf_counter()
    source = importing.open_source(options)
    digest = importing.convert(source, options.dst, overwrite=options.overwrite)
    shapes = [tensor.shape for tensor in source.tensors.values()]
    numbers = sum(int(np.prod(shape)) for shape in shapes)
    print(
        f"Converted {len(shapes):,} tensors, {numbers:,} numbers, {_speed(importing.size(source), start)}.\n"
        f"Weights {digest[:16]} are in {options.dst}."
    )
    for part in source.from_base:
        print(
            f"{options.src} holds nothing of {part}*, which training changes: it is that of {options.base}."
        )
    return DONE


def to_torch(options: ToTorchOptions) -> int:
    """Run `unibiomed convert to-torch`."""
    start = time.perf_counter()
    settings = {"adapter": options.adapter, "lossy": options.lossy, "overwrite": options.overwrite}
    plan = exporting.convert(options.src, options.dst, **settings)
    size = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in plan.values())
    print(f"Wrote {len(plan):,} tensors, {_speed(size, start)}, to {options.dst}.")
    if files := exporting.missing_code(options.dst):
        print(f"The original code needs {', '.join(files)} beside the weights; copy them from the release.")
    return DONE


def verify(options: VerifyOptions) -> int:
    """Run `unibiomed convert verify`; FAILED_IN_PART if anything differs."""
    console = Console(width=max(100, Console().width))
    a, b = verifying.Opened(options.a), verifying.Opened(options.b)
    differences = list(verifying.compare(a, b))
    console.print(verifying.weights_table(differences))
    first = next((found.first for found in differences if found.first), None)
    if first:
        console.print(f"First divergence: {first}", highlight=False, markup=False)
    first_output = None
    if a.released != b.released and not options.weights_only:
        first_output = _compare_outputs(*((a, b) if a.released else (b, a)), console)
    return FAILED_IN_PART if first or first_output else DONE


def _compare_outputs(released, converted, console: Console):
    """Print what PyTorch's modules and ours compute; the first output that differs, or None."""
    if importlib.util.find_spec("torch") is None:
        console.print("Outputs are not compared: pip install 'unibiomed-jax[parity]' for that.", markup=False)
        return None
    from unibiomed_jax.conversion import oracles  # needs PyTorch

    outputs = list(oracles.compare(released, converted))
    console.print(oracles.outputs_table(outputs))
    first_output = next((found for found in outputs if not found.agrees), None)
    if first_output is not None:
        console.print(f"First divergence: the output of {first_output.module}", markup=False)
    return first_output


def _speed(size: int, start: float) -> str:
    """Bytes, seconds since `start`, and the largest memory of this process, in words."""
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (
        f"{size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s), peak memory "
        f"{peak / 1e9:.2f} GB"
    )
