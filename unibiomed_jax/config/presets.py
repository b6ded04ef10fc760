"""Sizes of the models that are known by name.

A released checkpoint states the sizes of its language model and its vision tower, but not those of SAM2;
conversion recognises SAM2 by comparing tensor shapes with the variants listed here.
"""

from __future__ import annotations

from unibiomed_jax.config.model import HieraConfig, LanguageConfig, ModelConfig, Sam2Config

# SAM 2.0 as released (Ravi et al. 2024, arXiv 2408.00714), and the miniature that the golden cases use.
SAM2_VARIANTS: dict[str, Sam2Config] = {
    "tiny": Sam2Config(
        hiera=HieraConfig(
            embed_dim=96,
            num_heads=1,
            stages=(1, 2, 7, 2),
            global_attention_blocks=(5, 7, 9),
            window_spec=(8, 4, 14, 7),
        )
    ),
    "small": Sam2Config(
        hiera=HieraConfig(
            embed_dim=96,
            num_heads=1,
            stages=(1, 2, 11, 2),
            global_attention_blocks=(7, 10, 13),
            window_spec=(8, 4, 14, 7),
        )
    ),
    "base_plus": Sam2Config(
        hiera=HieraConfig(
            embed_dim=112,
            num_heads=2,
            stages=(2, 3, 16, 3),
            global_attention_blocks=(12, 16, 20),
            window_spec=(8, 4, 14, 7),
            position_grid=(14, 14),
        )
    ),
    "large": Sam2Config(),
    "micro": Sam2Config(
        image_size=256,
        hiera=HieraConfig(embed_dim=16, num_heads=1, stages=(1, 2, 3, 1), global_attention_blocks=(4,)),
        d_model=32,
        decoder_heads=4,
        decoder_mlp_dim=64,
        memory_dim=8,
        memory_layers=2,
        memory_mlp_dim=64,
    ),
}

# Qwen2.5 language models of the Sa2VA family, all beside InternViT-300M.
LANGUAGE_MODELS: dict[str, LanguageConfig] = {
    "qwen2.5-0.5b": LanguageConfig(),
    "qwen2.5-1.5b": LanguageConfig(hidden_size=1536, num_layers=28, num_heads=12, mlp_dim=8960),
    "qwen2.5-3b": LanguageConfig(hidden_size=2048, num_layers=36, num_heads=16, mlp_dim=11_008),
    "qwen2.5-7b": LanguageConfig(
        hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_dim=18_944
    ),
    "qwen2.5-14b": LanguageConfig(
        hidden_size=5120, num_layers=48, num_heads=40, num_kv_heads=8, mlp_dim=13_824
    ),
}

# Whole models: UniBiomed, and the wider members of the family that its code also runs.
MODELS: dict[str, ModelConfig] = {
    "unibiomed": ModelConfig(),
    **{name: ModelConfig(language=language) for name, language in LANGUAGE_MODELS.items()},
}
