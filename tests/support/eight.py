"""A process with eight CPU devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from places import ROOT, TESTS


def report(script: str, *arguments: str) -> dict:
    """What a script of this folder prints as its last line, a line of JSON."""
    flags = (
        "--xla_force_host_platform_device_count=8",
        # It may let two devices wait for each other, each in another collective.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, str(TESTS / "support" / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
