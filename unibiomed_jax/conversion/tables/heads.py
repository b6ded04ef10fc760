"""The two small bridges: vision to language, and language to masks."""

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.conversion.rows import Row, linear, norm


def rows(config: ModelConfig) -> list[Row]:
    """All leaves below `mlp1` and `text_hidden_fcs`."""
    patches = round(1 / config.downsample_ratio) ** 2
    shuffled, width = config.vision.hidden_size * patches, config.language.hidden_size
    return [
        *norm("mlp1.0", "mlp1.norm", shuffled),
        *linear("mlp1.1", "mlp1.linear1", width, shuffled),
        *linear("mlp1.3", "mlp1.linear2", width, width),
        *linear("text_hidden_fcs.0", "text_hidden_fcs.linear1", width, width),
        *linear("text_hidden_fcs.2", "text_hidden_fcs.linear2", config.sam2.d_model, width),
    ]
