"""Qwen2.5 and its low-rank adapters: names of the released checkpoint beside ours."""

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.conversion.rows import LINEAR, SAME, Row, linear

TORCH_EMBEDDING = "language_model.model.embed_tokens.weight"
TORCH_HEAD = "language_model.lm_head.weight"


def projections(config: LanguageConfig) -> dict[str, tuple[int, int, bool]]:
    """The linear layers of a block, which are also the ones that adapters update: (out, in, has a bias)."""
    width, hidden = config.hidden_size, config.mlp_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (queries, width, True),
        "self_attn.k_proj": (keys, width, True),
        "self_attn.v_proj": (keys, width, True),
        "self_attn.o_proj": (width, queries, False),
        "mlp.gate_proj": (hidden, width, False),
        "mlp.up_proj": (hidden, width, False),
        "mlp.down_proj": (width, hidden, False),
    }


def rows(config: LanguageConfig) -> list[Row]:
    """All leaves below `language_model`; the blocks are stacked, and a tied head is the embedding itself."""
    blocks = tuple(range(config.num_layers))
    block, ours = "language_model.model.layers.{i}", "language_model.layers"
    width, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    padded = config.padded_vocab_size
    result = [
        Row(TORCH_EMBEDDING, "language_model.embed_tokens", table, SAME, None, padded),
        Row("language_model.model.norm.weight", "language_model.norm.scale", (width,)),
    ]
    if not config.tie_word_embeddings:
        result.append(Row(TORCH_HEAD, "language_model.lm_head.kernel", table, LINEAR, None, padded))
    for name, (out, into, bias) in projections(config).items():
        result += linear(f"{block}.{name}", f"{ours}.{name}", out, into, bias=bias, stack=blocks)
    for name in ("input_layernorm", "post_attention_layernorm"):
        result.append(Row(f"{block}.{name}.weight", f"{ours}.{name}.scale", (width,), SAME, blocks))
    return result


def lora_rows(config: LanguageConfig, rank: int) -> list[Row]:
    """The adapters of every projection of every block, kept apart from the kernels they update."""
    blocks = tuple(range(config.num_layers))
    result = []
    for name, (out, into, _) in projections(config).items():
        block, ours = f"language_model.model.layers.{{i}}.{name}", f"language_model.layers.{name}.lora"
        result.append(Row(f"{block}.lora_A.weight", f"{ours}.a", (rank, into), LINEAR, blocks))
        result.append(Row(f"{block}.lora_B.weight", f"{ours}.b", (out, rank), LINEAR, blocks))
    return result
