"""InternViT, the projector, Qwen2 and text_hidden_fcs in torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from unibiomed_jax.config.model import LanguageConfig, VisionConfig
from unibiomed_jax.conversion.oracles.common import Arrays, TorchWeights, nchw, random, run

PROMPT_TOKENS = 24
TILES = 1
# Released names of InternViT as transformers calls them; each is replaced in turn.
VISION_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    (".attn.proj.", ".attention.projection_layer."),
)


def vision(config, weights: TorchWeights, module) -> Iterator[tuple]:
    pixels = random(0, TILES, config.vision.image_size, config.vision.image_size, 3)
    model = torch_vision(config.vision)
    state = {}
    for name, value in weights.below("vision_model.").items():
        names = vision_names(name)
        state |= zip(names, value.chunk(len(names)), strict=True)
    model.load_state_dict(state)

    def theirs() -> Arrays:
        return {"last hidden state": model(nchw(pixels)).last_hidden_state.numpy()}

    yield "vision_model", theirs, run(module, lambda m, x: {"last hidden state": m(x)}, pixels)


def torch_vision(config: VisionConfig) -> transformers.InternVLVisionModel:
    """transformers' InternViT with new weights."""
    model = transformers.InternVLVisionModel(
        transformers.InternVLVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            patch_size=[config.patch_size] * 2,
            image_size=[config.image_size] * 2,
            attention_bias=config.qkv_bias,
            layer_norm_eps=config.layer_norm_eps,
        )
    )
    return model.eval()


def vision_names(name: str) -> tuple[str, ...]:
    """What transformers calls a released tensor below `vision_model`; three names if it cuts it in three."""
    for old, new in VISION_NAMES:
        name = name.replace(old, new)
    if ".attn.qkv." in name:
        return tuple(name.replace(".attn.qkv.", f".attention.{letter}_proj.") for letter in "qkv")
    return (name,)


def projector(config, weights: TorchWeights, module) -> Iterator[tuple]:
    x = random(1, TILES, config.tokens_per_tile, weights.tensors["mlp1.0.weight"].shape[0])
    w = weights.below("mlp1.")

    def theirs() -> Arrays:
        y = F.layer_norm(torch.tensor(x), x.shape[-1:], w["0.weight"], w["0.bias"], 1e-5)
        y = F.gelu(F.linear(y, w["1.weight"], w["1.bias"]))
        return {"tokens": F.linear(y, w["3.weight"], w["3.bias"]).numpy()}

    yield "mlp1", theirs, run(module, lambda m, x: {"tokens": m(x)}, x)


def language(config, weights: TorchWeights, module) -> Iterator[tuple]:
    ids = np.random.default_rng(2).integers(0, config.language.vocab_size, (1, PROMPT_TOKENS))
    model = torch_language(config.language)
    state = weights.below("language_model.")
    if config.language.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)

    def theirs() -> Arrays:
        found = model(torch.tensor(ids), output_hidden_states=True)
        return {"last hidden state": found.hidden_states[-1].numpy(), "logits": found.logits.numpy()}

    def call(m, ids):
        hidden = m(m.embed(ids))
        return {"last hidden state": hidden, "logits": m.logits(hidden)}

    yield "language_model", theirs, run(module, call, ids)


def torch_language(config: LanguageConfig) -> transformers.Qwen2ForCausalLM:
    """transformers' Qwen2 with new weights."""
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.mlp_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    return model.eval()


def bridge(config, weights: TorchWeights, module) -> Iterator[tuple]:
    x = random(3, 2, config.language.hidden_size)
    w = weights.below("text_hidden_fcs.")

    def theirs() -> Arrays:
        y = F.relu(F.linear(torch.tensor(x), w["0.weight"], w["0.bias"]))
        return {"prompt vectors": F.linear(y, w["2.weight"], w["2.bias"]).numpy()}

    yield "text_hidden_fcs", theirs, run(module, lambda m, x: {"prompt vectors": m(x)}, x)
