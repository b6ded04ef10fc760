"""What the modules of two checkpoints compute: PyTorch's (of transformers) beside ours, on one random input.

Every module gets its own input, so that one that differs does not hide those after it. All in float32.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from rich.table import Table
from torch.nn import functional as F

from convert.reading import Tensor
from convert.tables import by_component, model_rows
from convert.tables.sam2 import PREFIX
from unibiomed_jax import checkpoint
from unibiomed_jax.config import LanguageConfig, Precision, Sam2Config, VisionConfig
from unibiomed_jax.models.memory import Memory
from unibiomed_jax.models.sam2 import ImageFeatures
from unibiomed_jax.models.unibiomed import UniBiomedModel

# Largest error, relative to the largest number of the output, that rounding in another order explains.
TOLERANCE = 1e-4
PROMPT_TOKENS = 24
TILES = 1

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Output:
    """How far one output of one module is apart."""

    module: str
    output: str
    shape: tuple[int, ...]
    # Largest absolute difference over the largest absolute value of PyTorch's.
    error: float

    @property
    def agrees(self) -> bool:
        return self.error <= TOLERANCE


def outputs_table(outputs: list[Output]) -> Table:
    table = Table(title=f"Outputs, PyTorch's against ours (relative error, at most {TOLERANCE:.0e})")
    for title in ("module", "output", "shape", "error", ""):
        table.add_column(title, justify="right" if title == "error" else "left", no_wrap=True)
    for found in outputs:
        verdict = "[green]agrees" if found.agrees else "[red]differs"
        shape = "x".join(map(str, found.shape))
        table.add_row(found.module, found.output, shape, f"{found.error:.1e}", verdict)
    return table


def compare(released: Any, converted: Any) -> Iterator[Output]:
    """Run every module of a released checkpoint in PyTorch and of a converted one here.

    Args:
        released, converted: `convert.verify.Opened` of each kind, of models of the same shape.
    """
    config = dataclasses.replace(converted.config, precision=Precision())
    abstract = nnx.eval_shape(lambda: UniBiomedModel(config, rngs=nnx.Rngs(0)))
    for part, rows in by_component(model_rows(config)).items():
        graphdef, state = nnx.split(getattr(abstract, part))
        leaves = converted.part(part, rows)
        values = {path.partition(".")[2]: np.asarray(v, np.float32) for path, v in leaves.items()}
        nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, checkpoint.unflatten(values)))
        del leaves, values
        module = nnx.merge(graphdef, state)
        for name, theirs, ours in CHECKS[part](config, TorchWeights(released.source.tensors), module):
            with torch.no_grad():
                expected = theirs()
            found = ours()
            for output, values in expected.items():
                yield Output(name, output, values.shape, _error(found[output], values))


def _error(ours: Any, theirs: np.ndarray) -> float:
    ours = np.asarray(ours, np.float32).reshape(theirs.shape)
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


class TorchWeights:
    """Released tensors as float32 torch tensors."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.tensors[name].read(), np.float32))

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): self[name] for name in self.tensors if name.startswith(prefix)}


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _run(module: nnx.Module, call: Callable, *inputs: Any) -> Callable[[], Any]:
    """call(module, *inputs), compiled, with exact float32 products on every device."""

    def run():
        graphdef, state = nnx.split(module)
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda state, *inputs: call(nnx.merge(graphdef, state), *inputs))(state, *inputs)

    return run


# ------------------------------------------------------------------------------------------------------------
# Vision and language


def _vision(config, weights: TorchWeights, module) -> Iterator[tuple]:
    pixels = _random(0, TILES, config.vision.image_size, config.vision.image_size, 3)
    model = _torch_vision(config.vision, weights)

    def theirs() -> Arrays:
        return {"last hidden state": model(_nchw(pixels)).last_hidden_state.numpy()}

    yield "vision_model", theirs, _run(module, lambda m, x: {"last hidden state": m(x)}, pixels)


def _torch_vision(config: VisionConfig, weights: TorchWeights) -> torch.nn.Module:
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
    renames = (
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
    state = {}
    for name, value in weights.below("vision_model.").items():
        for old, new in renames:
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = third
        else:
            state[name] = value
    model.load_state_dict(state)
    return model.eval()


def _projector(config, weights: TorchWeights, module) -> Iterator[tuple]:
    x = _random(1, TILES, config.tokens_per_tile, weights.tensors["mlp1.0.weight"].shape[0])
    w = weights.below("mlp1.")

    def theirs() -> Arrays:
        y = F.layer_norm(torch.tensor(x), x.shape[-1:], w["0.weight"], w["0.bias"], 1e-5)
        y = F.gelu(F.linear(y, w["1.weight"], w["1.bias"]))
        return {"tokens": F.linear(y, w["3.weight"], w["3.bias"]).numpy()}

    yield "mlp1", theirs, _run(module, lambda m, x: {"tokens": m(x)}, x)


def _language(config, weights: TorchWeights, module) -> Iterator[tuple]:
    ids = np.random.default_rng(2).integers(0, config.language.vocab_size, (1, PROMPT_TOKENS))
    model = _torch_language(config.language, weights)

    def theirs() -> Arrays:
        found = model(torch.tensor(ids), output_hidden_states=True)
        return {"last hidden state": found.hidden_states[-1].numpy(), "logits": found.logits.numpy()}

    def call(m, ids):
        hidden = m(m.embed(ids))
        return {"last hidden state": hidden, "logits": m.logits(hidden)}

    yield "language_model", theirs, _run(module, call, ids)


def _torch_language(config: LanguageConfig, weights: TorchWeights) -> torch.nn.Module:
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
    state = weights.below("language_model.")
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def _bridge(config, weights: TorchWeights, module) -> Iterator[tuple]:
    x = _random(3, 2, config.language.hidden_size)
    w = weights.below("text_hidden_fcs.")

    def theirs() -> Arrays:
        y = F.relu(F.linear(torch.tensor(x), w["0.weight"], w["0.bias"]))
        return {"prompt vectors": F.linear(y, w["2.weight"], w["2.bias"]).numpy()}

    yield "text_hidden_fcs", theirs, _run(module, lambda m, x: {"prompt vectors": m(x)}, x)


# ------------------------------------------------------------------------------------------------------------
# SAM2

# Released names of SAM2 as transformers calls them; every pattern is applied in turn.
SAM2_NAMES = (
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.2\.", r"\1.proj_out."),
    (r"^image_encoder\.trunk\.patch_embed\.proj", "vision_encoder.backbone.patch_embed.projection"),
    (r"^image_encoder\.trunk", "vision_encoder.backbone"),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv", r"vision_encoder.neck.convs.\1"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"mask_downscaling\.0", "mask_embed.conv1"),
    (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"),
    (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"),
    (r"^sam_(prompt_encoder|mask_decoder)", r"\1"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"mask_downsampler\.encoder\.12\.", "mask_downsampler.final_conv."),
    (r"pix_feat_proj", "feature_projection"),
    (r"^memory_encoder\.out_proj", "memory_encoder.projection"),
    (r"fuser\.", "memory_fuser."),
    (r"dwconv", "depthwise_conv"),
    (r"pwconv", "pointwise_conv"),
    (r"g_weight", "scale"),
    (r"(attn|_token|_image)\.out_proj", r"\1.o_proj"),
    (r"\.norm(\d?)\.", r".layer_norm\1."),
    (r"^obj_ptr_proj", "object_pointer_proj"),
    (r"^maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed", "no_memory_embedding"),
    (r"^no_mem_pos_enc", "no_memory_positional_encoding"),
    (r"^no_obj_ptr", "no_object_pointer"),
)


def _sam2(config, weights: TorchWeights, module) -> Iterator[tuple]:
    sam2 = config.sam2
    model = _torch_sam2(sam2, weights.below(PREFIX))
    size, grid, d, channels = sam2.image_size, sam2.grid, sam2.d_model, sam2.memory_dim
    pixels = _random(4, 1, size, size, 3)
    names = ("stride 4", "stride 8", "stride 16")

    def image_encoder() -> Arrays:
        levels = model.get_image_features(_nchw(pixels), return_dict=True).fpn_hidden_states
        return {name: x.transpose(0, 1).numpy() for name, x in zip(names, levels, strict=True)}

    def our_encoder(m, pixels):
        return dict(zip(names, m.encode_image(pixels), strict=True))

    yield "sam2.image_encoder", image_encoder, _run(module, our_encoder, pixels)

    features = ImageFeatures(
        _random(5, 1, 4 * grid, 4 * grid, d // 8),
        _random(6, 1, 2 * grid, 2 * grid, d // 4),
        _random(7, 1, grid, grid, d),
    )
    language = _random(8, 1, 2, d)
    mask_decoder = _torch_decoder(model, features, language)
    yield "sam2.sam_mask_decoder", mask_decoder, _run(module, _our_decoder, features, language)

    masks = 3 * _random(9, 1, 1, size, size)

    def memory_encoder() -> Arrays:
        prompt = 20 * torch.tensor(masks).sigmoid() - 10
        return {"memory": model.memory_encoder(_nchw(features.image), prompt)[0].permute(0, 2, 3, 1).numpy()}

    def our_memory_encoder(m, image, masks):
        return {"memory": m.memory_encoder(image, masks)}

    yield (
        "sam2.memory_encoder",
        memory_encoder,
        _run(module, our_memory_encoder, features.image, masks),
    )

    memory = Memory(
        frames=_random(10, 2, 1, grid * grid, channels),
        time=_random(11, 2, channels),
        frames_valid=np.array([True, True]),
        pointers=_random(12, 1, d // channels, channels),
        pointers_valid=np.ones(d // channels, bool),
    )

    def our_memory_attention(m, image, memory):
        return {"conditioned features": m.memory_attention(image, memory)}

    yield (
        "sam2.memory_attention",
        _torch_memory_attention(model, features.image, memory),
        _run(module, our_memory_attention, features.image[0], memory),
    )


def _torch_sam2(config: Sam2Config, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' SAM2 with released weights, set to the mathematics of SAM 2.0."""
    hiera, d, grid = config.hiera, config.d_model, config.grid
    backbone = dict(
        model_type="sam2_hiera_det_model",
        hidden_size=hiera.embed_dim,
        num_attention_heads=hiera.num_heads,
        image_size=[config.image_size] * 2,
        window_positional_embedding_background_size=list(hiera.position_grid),
        blocks_per_stage=list(hiera.stages),
        embed_dim_per_stage=list(hiera.stage_dims),
        num_attention_heads_per_stage=[hiera.num_heads * 2**stage for stage in range(4)],
        window_size_per_stage=list(hiera.window_spec),
        global_attention_blocks=list(hiera.global_attention_blocks),
    )
    vision = dict(
        model_type="sam2_vision_model",
        backbone_config=backbone,
        backbone_channel_list=list(reversed(hiera.stage_dims)),
        backbone_feature_sizes=[[grid * scale] * 2 for scale in (4, 2, 1)],
        fpn_hidden_size=d,
    )
    decoder = dict(
        hidden_size=d,
        mlp_dim=config.decoder_mlp_dim,
        num_attention_heads=config.decoder_heads,
        iou_head_hidden_dim=d,
    )
    model = transformers.Sam2VideoModel(
        transformers.Sam2VideoConfig(
            vision_config=vision,
            prompt_encoder_config=dict(hidden_size=d, image_size=config.image_size),
            mask_decoder_config=decoder,
            image_size=config.image_size,
            enable_occlusion_spatial_embedding=False,
            enable_temporal_pos_encoding_for_object_pointers=False,
            memory_attention_hidden_size=d,
            memory_attention_num_layers=config.memory_layers,
            memory_attention_feed_forward_hidden_size=config.memory_mlp_dim,
            memory_attention_rope_feat_sizes=[grid, grid],
            memory_encoder_hidden_size=d,
            memory_encoder_output_channels=config.memory_dim,
            mask_downsampler_embed_dim=d,
            memory_fuser_embed_dim=d,
            memory_fuser_intermediate_dim=4 * d,
        )
    )
    for layer in model.memory_attention.layers:  # its width is fixed to 64 there
        for name in ("k_proj", "v_proj"):
            setattr(layer.cross_attn_image, name, torch.nn.Linear(config.memory_dim, d))
    state = {_transformers_name(name): value for name, value in weights.items()}
    points = [state.pop(f"prompt_encoder.point_embeddings.{i}.weight") for i in range(4)]
    state["prompt_encoder.point_embed.weight"] = torch.cat(points)
    matrix = "positional_embedding"
    state[f"shared_image_embedding.{matrix}"] = state[f"prompt_encoder.shared_embedding.{matrix}"]
    model.load_state_dict(state)
    return model.eval()


def _transformers_name(name: str) -> str:
    # The sequential downsampler counts convolution, norm and activation.
    found = re.match(r"memory_encoder\.mask_downsampler\.encoder\.(\d+)\.(.*)", name)
    if found and int(found[1]) < 12:
        layer, kind = divmod(int(found[1]), 3)
        return f"memory_encoder.mask_downsampler.layers.{layer}.{('conv', 'layer_norm')[kind]}.{found[2]}"
    for pattern, replacement in SAM2_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _torch_decoder(model, features: ImageFeatures, language: np.ndarray) -> Callable[[], Arrays]:
    def run() -> Arrays:
        objects = language.shape[1]
        points = torch.zeros(1, objects, 1, 2), -torch.ones(1, objects, 1, dtype=torch.int32)
        sparse, dense = model.prompt_encoder(*points, None, None)
        masks, ious, tokens, scores = model.mask_decoder(
            image_embeddings=_nchw(features.image) + model.no_memory_embedding.reshape(1, -1, 1, 1),
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=torch.cat([sparse, torch.tensor(language)[:, :, None]], 2),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[_nchw(features.s0), _nchw(features.s1)],
        )
        best = ious.argmax(-1)
        chosen = tokens[torch.arange(1)[:, None], torch.arange(objects)[None], best]
        pointers = torch.where(scores > 0, model.object_pointer_proj(chosen), model.no_object_pointer)
        found = {"masks": masks, "IoUs": ious, "object scores": scores[..., 0], "object pointers": pointers}
        return {name: value.numpy() for name, value in found.items()}

    return run


def _our_decoder(m, features: ImageFeatures, language) -> dict:
    found = m.decode(features, language)
    return {
        "masks": found.multimasks,
        "IoUs": found.ious,
        "object scores": found.object_scores,
        "object pointers": m.object_pointer(found),
    }


def _torch_memory_attention(model, image: np.ndarray, memory: Memory) -> Callable[[], Arrays]:
    def run() -> Arrays:
        grid, d, channels = image.shape[1], image.shape[-1], memory.time.shape[-1]
        tokens = memory.pointers.shape[1]
        shape = torch.Size((1, d, grid, grid))
        position = model.vision_encoder.neck.position_encoding(shape, "cpu", torch.float32)
        place = model.memory_encoder.position_encoding(
            torch.Size((1, channels, grid, grid)), "cpu", torch.float32
        )
        place = place.flatten(2).permute(2, 0, 1)
        keys = [torch.tensor(frame).transpose(0, 1) for frame in memory.frames]
        positions = [place + torch.tensor(time) for time in memory.time]
        keys.append(torch.tensor(memory.pointers).transpose(0, 1))
        positions.append(torch.zeros(tokens, 1, channels))
        found = model.memory_attention(
            torch.tensor(image).reshape(grid * grid, 1, d),
            torch.cat(keys),
            position.flatten(2).permute(2, 0, 1),
            torch.cat(positions),
            tokens,
        )
        return {"conditioned features": found.reshape(1, grid, grid, d).numpy()}

    return run


def _nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


CHECKS = {
    "vision_model": _vision,
    "mlp1": _projector,
    "language_model": _language,
    "text_hidden_fcs": _bridge,
    "sam2": _sam2,
}
