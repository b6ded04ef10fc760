"""SAM2 in torch, as transformers has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
import transformers

from unibiomed_jax.config.model import Sam2Config
from unibiomed_jax.conversion.oracles.common import Arrays, TorchWeights, nchw, random, run
from unibiomed_jax.conversion.tables.sam2 import PREFIX
from unibiomed_jax.models.memory import Memory
from unibiomed_jax.models.sam2 import ImageFeatures

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


def sam2(config, weights: TorchWeights, module) -> Iterator[tuple]:
    sizes = config.sam2
    model = torch_sam2(sizes, weights.below(PREFIX))
    size, grid, d, channels = sizes.image_size, sizes.grid, sizes.d_model, sizes.memory_dim
    pixels = random(4, 1, size, size, 3)
    names = ("stride 4", "stride 8", "stride 16")

    def image_encoder() -> Arrays:
        levels = model.get_image_features(nchw(pixels), return_dict=True).fpn_hidden_states
        return {name: x.transpose(0, 1).numpy() for name, x in zip(names, levels, strict=True)}

    def our_encoder(m, pixels):
        return dict(zip(names, m.encode_image(pixels), strict=True))

    yield "sam2.image_encoder", image_encoder, run(module, our_encoder, pixels)

    features = ImageFeatures(
        random(5, 1, 4 * grid, 4 * grid, d // 8),
        random(6, 1, 2 * grid, 2 * grid, d // 4),
        random(7, 1, grid, grid, d),
    )
    language = random(8, 1, 2, d)
    mask_decoder = _torch_decoder(model, features, language)
    yield "sam2.sam_mask_decoder", mask_decoder, run(module, _our_decoder, features, language)

    masks = 3 * random(9, 1, 1, size, size)

    def memory_encoder() -> Arrays:
        prompt = 20 * torch.tensor(masks).sigmoid() - 10
        return {"memory": model.memory_encoder(nchw(features.image), prompt)[0].permute(0, 2, 3, 1).numpy()}

    def our_memory_encoder(m, image, masks):
        return {"memory": m.memory_encoder(image, masks)}

    yield (
        "sam2.memory_encoder",
        memory_encoder,
        run(module, our_memory_encoder, features.image, masks),
    )

    memory = Memory(
        frames=random(10, 2, 1, grid * grid, channels),
        time=random(11, 2, channels),
        frames_valid=np.array([True, True]),
        pointers=random(12, 1, d // channels, channels),
        pointers_valid=np.ones(d // channels, bool),
    )

    def our_memory_attention(m, image, memory):
        return {"conditioned features": m.memory_attention(image, memory)}

    yield (
        "sam2.memory_attention",
        _torch_memory_attention(model, features.image, memory),
        run(module, our_memory_attention, features.image[0], memory),
    )


def torch_sam2(config: Sam2Config, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
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
    def theirs() -> Arrays:
        objects = language.shape[1]
        points = torch.zeros(1, objects, 1, 2), -torch.ones(1, objects, 1, dtype=torch.int32)
        sparse, dense = model.prompt_encoder(*points, None, None)
        masks, ious, tokens, scores = model.mask_decoder(
            image_embeddings=nchw(features.image) + model.no_memory_embedding.reshape(1, -1, 1, 1),
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=torch.cat([sparse, torch.tensor(language)[:, :, None]], 2),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[nchw(features.s0), nchw(features.s1)],
        )
        best = ious.argmax(-1)
        chosen = tokens[torch.arange(1)[:, None], torch.arange(objects)[None], best]
        pointers = torch.where(scores > 0, model.object_pointer_proj(chosen), model.no_object_pointer)
        found = {"masks": masks, "IoUs": ious, "object scores": scores[..., 0], "object pointers": pointers}
        return {name: value.numpy() for name, value in found.items()}

    return theirs


def _our_decoder(m, features: ImageFeatures, language) -> dict:
    found = m.decode(features, language)
    return {
        "masks": found.multimasks,
        "IoUs": found.ious,
        "object scores": found.object_scores,
        "object pointers": m.object_pointer(found),
    }


def _torch_memory_attention(model, image: np.ndarray, memory: Memory) -> Callable[[], Arrays]:
    def theirs() -> Arrays:
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

    return theirs
