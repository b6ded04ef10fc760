"""The same computation through the torch modules of transformers: the worker that `versus_torch.py` drives.

Random weights at the same sizes; attention is torch's scaled_dot_product_attention throughout. On a CPU the
weights are float32, and a call computes in float32 or under bfloat16 autocast; on a GPU all is bfloat16. Two
ways of going about it:

- "once": SAM2 encodes the image once and decodes all `[SEG]` in one call; scores of the vocabulary are
  computed for the last token of the prompt only;
- "reference": as the reference implementation, SAM2 encodes the image again for every `[SEG]` and decodes
  each for itself; scores of the vocabulary are computed for every token of the prompt.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Sam2Config,
    Sam2Model,
)
from worker import Stopwatch, serve


def make_vision(sizes) -> nn.Module:
    return InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.mlp_dim,
            patch_size=[sizes.patch_size] * 2,
            image_size=[sizes.image_size] * 2,
            attention_bias=sizes.qkv_bias,
            use_mean_pooling=True,  # no norm after the last block
        )
    )


def make_language(sizes) -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            intermediate_size=sizes.mlp_dim,
            tie_word_embeddings=sizes.tie_word_embeddings,
        )
    )


def make_sam2(sizes, derived) -> nn.Module:
    hiera, dim = sizes.hiera, sizes.d_model
    backbone = dict(
        model_type="sam2_hiera_det_model",
        hidden_size=hiera.embed_dim,
        num_attention_heads=hiera.num_heads,
        image_size=[sizes.image_size] * 2,
        window_positional_embedding_background_size=hiera.position_grid,
        blocks_per_stage=hiera.stages,
        embed_dim_per_stage=derived.stage_dims,
        num_attention_heads_per_stage=[hiera.num_heads * 2**i for i in range(4)],
        window_size_per_stage=hiera.window_spec,
        global_attention_blocks=hiera.global_attention_blocks,
    )
    vision = dict(
        model_type="sam2_vision_model",
        backbone_config=backbone,
        backbone_channel_list=derived.stage_dims[::-1],
        backbone_feature_sizes=[[derived.grid * scale] * 2 for scale in (4, 2, 1)],
        fpn_hidden_size=dim,
    )
    decoder = dict(
        hidden_size=dim,
        mlp_dim=sizes.decoder_mlp_dim,
        num_attention_heads=sizes.decoder_heads,
        iou_head_hidden_dim=dim,
    )
    prompt = dict(hidden_size=dim, image_size=sizes.image_size)
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return Sam2Model(config)


class Model(nn.Module):
    """All parts of UniBiomed, joined as in the reference."""

    def __init__(self, config, derived):
        super().__init__()
        width, language, dim = config.vision.hidden_size, config.language.hidden_size, config.sam2.d_model
        self.fold = round(1 / config.downsample_ratio)
        folded = width * self.fold**2
        self.vision = make_vision(config.vision)
        self.projector = nn.Sequential(
            nn.LayerNorm(folded), nn.Linear(folded, language), nn.GELU(), nn.Linear(language, language)
        )
        self.language = make_language(config.language)
        self.bridge = nn.Sequential(nn.Linear(language, language), nn.ReLU(), nn.Linear(language, dim))
        self.sam2 = make_sam2(config.sam2, derived)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """(tiles, 3, side, side) to (tiles * tokens, width of the language model)."""
        hidden = self.vision(tiles).last_hidden_state[:, 1:]
        count, patches, width = hidden.shape
        side, fold = int(patches**0.5) // self.fold, self.fold
        hidden = hidden.reshape(count, side, fold, side, fold, width).transpose(2, 3)
        return self.projector(hidden.reshape(count * side * side, -1))

    def read(self, embeds: Tensor, cache, all_scores: bool = False) -> tuple[Tensor, object, int]:
        """Last hidden state after the final norm, the cache, and the preferred next token."""
        out = self.language.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        last = out.last_hidden_state[:, -1:]
        scores = self.language.lm_head(out.last_hidden_state if all_scores else last).float()
        # The host looks at every token to see whether the answer ends, as transformers' generate does.
        return last[:, 0], out.past_key_values, int(scores[:, -1].argmax(-1))

    def encode_image(self, pixels: Tensor) -> list[Tensor]:
        """SAM2's features of images (batch, 3, side, side), finest first."""
        *fine, coarse = self.sam2.get_image_features(pixels).fpn_hidden_states
        maps = [*fine, coarse + self.sam2.no_memory_embedding]
        sizes = self.sam2.backbone_feature_sizes
        return [x.permute(1, 2, 0).unflatten(2, size) for x, size in zip(maps, sizes, strict=True)]

    def decode_masks(self, features: list[Tensor], states: Tensor) -> Tensor:
        """Masks of highest predicted IoU: states (batch, objects, width) to (batch, objects, 4g, 4g)."""
        sam2, language = self.sam2, self.bridge(states)[:, :, None]
        # Two tokens that stand for the point which is not given, then the prompt.
        sparse = torch.cat([torch.zeros_like(language).repeat(1, 1, 2, 1), language], 2)
        dense = sam2.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(features[-1])
        masks, ious, _, _ = sam2.mask_decoder(
            image_embeddings=features[-1],
            image_positional_embeddings=sam2.get_image_wide_positional_embeddings().expand_as(features[-1]),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=features[:-1],
        )
        return masks.take_along_dim(ious.argmax(-1)[..., None, None, None], 2)[:, :, 0]


def make_model(setup: dict, device: str) -> tuple[Model, SimpleNamespace]:
    """The model in float32, and its configuration: `setup` is what the JAX worker said of its own."""
    config, derived = (
        json.loads(json.dumps(setup[name]), object_hook=lambda fields: SimpleNamespace(**fields))
        for name in ("config", "derived")
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Model(config, derived), config


def find_device() -> tuple[str, str]:
    """Where torch computes, on a CPU with all cores; and its versions and device in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    on_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if on_gpu else f"cpu, {cores} threads"
    name = f"torch {torch.__version__}, transformers {transformers.__version__}, {card}"
    return "cuda" if on_gpu else "cpu", name


def prepare(setup: dict):
    """Make the model at the sizes of the JAX worker; `setup` is what that one said, and `new_tokens`."""
    device, name = find_device()
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model, config = make_model(setup, device)
    model.eval().to(dtype)
    with torch.device(device):
        tiles = torch.randn(
            setup["tiles"], 3, config.vision.image_size, config.vision.image_size, dtype=dtype
        )
        pixels = torch.randn(1, 3, config.sam2.image_size, config.sam2.image_size, dtype=dtype)
        ids = torch.randint(0, 1000, (1, setup["prompt_tokens"]))
    size = config.sam2.image_size

    def answer(case: dict) -> dict:
        half = not on_gpu and case["precision"] == "bfloat16"
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            return call(case)

    def call(case: dict) -> dict:
        again, watch = (
            case["way"] == "reference",
            Stopwatch(torch.cuda.synchronize if on_gpu else lambda: None),
        )
        embed = model.language.get_input_embeddings()
        with watch.stage("encode tiles"):
            visual = model.encode_tiles(tiles)
        with watch.stage("prefill"):
            embeds = embed(ids)
            embeds[:, 4 : 4 + len(visual)] = visual.to(embeds.dtype)
            _, cache, token = model.read(embeds, None, all_scores=again)
        states = []
        with watch.stage("decode"):
            for _ in range(setup["new_tokens"] - 1):
                state, cache, token = model.read(embed(torch.tensor([[token]], device=device)), cache)
                states.append(state)
        chosen = torch.stack([states[step] for step in setup["seg_steps"][str(case["segments"])]], 1)
        masks, features = [], None
        for part in chosen.split(1 if again else chosen.shape[1], 1):
            if again or features is None:
                with watch.stage("encode image"):
                    features = model.encode_image(pixels)
            with watch.stage("decode masks"):
                masks.append(model.decode_masks(features, part))
        with watch.stage("resize masks"):
            logits = F.interpolate(torch.cat(masks, 1).float(), (size, size), mode="bilinear")
            logits = F.interpolate(logits, setup["image"][::-1], mode="bilinear")
            assert (logits > 0).cpu().shape[1] == case["segments"]
        return {**watch.seconds, "whole call": sum(watch.seconds.values())}

    return {"name": name, "device": device}, answer


if __name__ == "__main__":
    serve(prepare)
