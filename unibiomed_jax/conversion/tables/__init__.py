"""What every tensor of a released checkpoint is called, its shape, and where it lives in our tree."""

import math

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.conversion.rows import Row
from unibiomed_jax.conversion.tables import heads, internvit, qwen2, sam2


def model_rows(config: ModelConfig) -> list[Row]:
    """One row for every leaf of the model's parameter tree, part by part."""
    bridges = heads.rows(config)
    return [
        *internvit.rows(config.vision),
        *(row for row in bridges if row.path.startswith("mlp1.")),
        *qwen2.rows(config.language),
        *(row for row in bridges if row.path.startswith("text_hidden_fcs.")),
        *sam2.rows(config.sam2),
    ]


def by_component(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows grouped by the first name of their path, the part of the model they belong to."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.path.partition(".")[0], []).append(row)
    return groups


def largest_first(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Parts and their rows, largest first, so that large ones can be worked on beside large ones."""
    return sorted(
        by_component(rows).items(), key=lambda part: -sum(math.prod(row.leaf_shape) for row in part[1])
    )
