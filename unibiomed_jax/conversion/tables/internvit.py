"""InternViT: names of the released checkpoint beside ours."""

from unibiomed_jax.config.model import VisionConfig
from unibiomed_jax.conversion.rows import CONV, FIRST_DROPPED, FIRST_TWO_DROPPED, SAME, Row, linear, norm


def rows(config: VisionConfig) -> list[Row]:
    """All leaves below `vision_model`; the blocks are stacked."""
    width, hidden, patch = config.hidden_size, config.mlp_dim, config.patch_size
    blocks = tuple(range(config.num_layers))
    below, block = "vision_model.embeddings", "vision_model.encoder.layers.{i}"
    ours = "vision_model.layers"
    return [
        Row(f"{below}.class_embedding", "vision_model.class_embedding", (1, 1, width), FIRST_TWO_DROPPED),
        Row(
            f"{below}.position_embedding",
            "vision_model.position_embedding",
            (1, 1 + config.grid**2, width),
            FIRST_DROPPED,
        ),
        Row(
            f"{below}.patch_embedding.weight",
            "vision_model.patch_embedding.kernel",
            (width, 3, patch, patch),
            CONV,
        ),
        Row(f"{below}.patch_embedding.bias", "vision_model.patch_embedding.bias", (width,)),
        *norm(f"{block}.norm1", f"{ours}.norm1", width, stack=blocks),
        *linear(
            f"{block}.attn.qkv", f"{ours}.attn.qkv", 3 * width, width, bias=config.qkv_bias, stack=blocks
        ),
        *linear(f"{block}.attn.proj", f"{ours}.attn.proj", width, width, stack=blocks),
        Row(f"{block}.ls1", f"{ours}.ls1", (width,), SAME, blocks),
        *norm(f"{block}.norm2", f"{ours}.norm2", width, stack=blocks),
        *linear(f"{block}.mlp.fc1", f"{ours}.mlp.fc1", hidden, width, stack=blocks),
        *linear(f"{block}.mlp.fc2", f"{ours}.mlp.fc2", width, hidden, stack=blocks),
        Row(f"{block}.ls2", f"{ours}.ls2", (width,), SAME, blocks),
    ]
