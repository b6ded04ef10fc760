"""The model that a command asks, loaded as its options say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from unibiomed_jax.config.precision import PrecisionName, find_precision
from unibiomed_jax.files import shown

if TYPE_CHECKING:
    from unibiomed_jax.inference.predictor import UniBiomed


def load_model(
    checkpoint: str | Path,
    console: Console,
    *,
    precision: PrecisionName,
    strategy: str | None = None,
    mesh: str | None = None,
) -> UniBiomed:
    """A model, divided over all devices of this process if a strategy is named.

    Raises:
        InputError: the checkpoint cannot be used, or strategy and mesh do not fit the devices.
    """
    import jax  # which starts only when it is needed

    from unibiomed_jax.conversion import loading
    from unibiomed_jax.inference.predictor import UniBiomed
    from unibiomed_jax.sharding.layout import Layout, parse_mesh
    from unibiomed_jax.sharding.strategies import find_strategy

    layout = None
    if strategy is not None:
        sizes = None if mesh is None else parse_mesh(mesh)
        layout = Layout.over(jax.local_devices(), find_strategy(strategy), mesh=sizes)
    loading.fetch(checkpoint)  # with a progress bar of its own, which the spinner would garble
    with console.status(f"Loading {escape(shown(checkpoint))}"):
        return UniBiomed.from_pretrained(
            checkpoint, precision=find_precision(precision, layout and layout.platform), layout=layout
        )
