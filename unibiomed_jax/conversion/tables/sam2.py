"""SAM2: names of the released checkpoint beside ours."""

from unibiomed_jax.config.model import HieraConfig, Sam2Config
from unibiomed_jax.conversion.rows import (
    CONV_TRANSPOSE,
    FIRST_DROPPED,
    FIRST_TWO_DROPPED,
    MIDDLE_TWO_DROPPED,
    POSITION,
    SAME,
    Row,
    conv,
    linear,
    norm,
)

PREFIX = "grounding_encoder.sam2_model."
# Channels of the memory encoder's mask downsampler, whatever the width of the model.
MASK_CHANNELS = (1, 4, 16, 64, 256)
# Masks the decoder proposes: one for a clear prompt and three for an ambiguous one.
NUM_MASKS = 4


def rows(config: Sam2Config) -> list[Row]:
    """All leaves below `sam2`."""
    d = config.d_model
    parts = [
        Row("maskmem_tpos_enc", "maskmem_tpos_enc", (config.num_memories, 1, 1, config.memory_dim),
            MIDDLE_TWO_DROPPED),
        Row("no_mem_embed", "no_mem_embed", (1, 1, d), FIRST_TWO_DROPPED),
        Row("no_mem_pos_enc", "no_mem_pos_enc", (1, 1, d), FIRST_TWO_DROPPED),
        Row("no_obj_ptr", "no_obj_ptr", (1, d), FIRST_DROPPED),
        *conv("mask_downsample", "mask_downsample", (1, 1, 4, 4)),
        *_mlp("obj_ptr_proj", "obj_ptr_proj", (d, d, d, d)),
        *_trunk(config.hiera),
        *_neck(config),
        *_prompt_encoder(d),
        *_mask_decoder(config),
        *_memory_attention(config),
        *_memory_encoder(config),
    ]  # fmt: skip
    return [row.renamed(PREFIX, "sam2.") for row in parts]


def _mlp(torch: str, path: str, dims: tuple[int, ...], stack: tuple[int, ...] | None = None) -> list[Row]:
    return [
        row
        for k, (into, out) in enumerate(zip(dims[:-1], dims[1:], strict=True))
        for row in linear(f"{torch}.layers.{k}", f"{path}.layers.{k}", out, into, stack=stack)
    ]


def _trunk(config: HieraConfig) -> list[Row]:
    """Block i of the checkpoint is block i - first of the run of equal blocks that it belongs to."""
    trunk, dim, window = "image_encoder.trunk", config.embed_dim, config.window_spec[0]
    result = [
        *conv(f"{trunk}.patch_embed.proj", f"{trunk}.patch_embed", (dim, 3, 7, 7)),
        Row(f"{trunk}.pos_embed", f"{trunk}.pos_embed", (1, dim, *config.position_grid), POSITION),
        Row(f"{trunk}.pos_embed_window", f"{trunk}.pos_embed_window", (1, dim, window, window), POSITION),
    ]
    for k, run in enumerate(config.runs()):
        block, ours, out = f"{trunk}.blocks.{{i}}", f"{trunk}.runs.{k}", run.dim_out
        stack = tuple(range(run.first, run.first + run.count))
        result += [
            *norm(f"{block}.norm1", f"{ours}.norm1", run.dim_in, stack=stack),
            *linear(f"{block}.attn.qkv", f"{ours}.attn.qkv", 3 * out, run.dim_in, stack=stack),
            *linear(f"{block}.attn.proj", f"{ours}.attn.proj", out, out, stack=stack),
            *norm(f"{block}.norm2", f"{ours}.norm2", out, stack=stack),
            *linear(f"{block}.mlp.layers.0", f"{ours}.mlp.fc1", 4 * out, out, stack=stack),
            *linear(f"{block}.mlp.layers.1", f"{ours}.mlp.fc2", out, 4 * out, stack=stack),
        ]
        if run.dim_in != run.dim_out:
            result += linear(f"{block}.proj", f"{ours}.proj", out, run.dim_in, stack=stack)
    return result


def _neck(config: Sam2Config) -> list[Row]:
    neck = "image_encoder.neck"
    return [
        row
        for k, dim in enumerate(reversed(config.hiera.stage_dims))
        for row in conv(f"{neck}.convs.{k}.conv", f"{neck}.{k}", (config.d_model, dim, 1, 1))
    ]


def _prompt_encoder(d: int) -> list[Row]:
    encoder, gaussian = "sam_prompt_encoder", "positional_encoding_gaussian_matrix"
    torch, ours = f"{encoder}.mask_downscaling", f"{encoder}.mask_downscaling"
    return [
        Row(f"{encoder}.pe_layer.{gaussian}", f"{encoder}.{gaussian}", (2, d // 2)),
        Row(
            f"{encoder}.point_embeddings.{{i}}.weight",
            f"{encoder}.point_embeddings",
            (1, d),
            FIRST_DROPPED,
            (0, 1, 2, 3),
        ),
        Row(f"{encoder}.not_a_point_embed.weight", f"{encoder}.not_a_point_embed", (1, d), FIRST_DROPPED),
        Row(f"{encoder}.no_mask_embed.weight", f"{encoder}.no_mask_embed", (1, d), FIRST_DROPPED),
        *conv(f"{torch}.0", f"{ours}.conv1", (4, 1, 2, 2)),
        *norm(f"{torch}.1", f"{ours}.norm1", 4),
        *conv(f"{torch}.3", f"{ours}.conv2", (16, 4, 2, 2)),
        *norm(f"{torch}.4", f"{ours}.norm2", 16),
        *conv(f"{torch}.6", f"{ours}.conv3", (d, 16, 1, 1)),
    ]


def _attention(
    torch: str, path: str, d: int, inner: int, keys: int, stack: tuple[int, ...] | None = None
) -> list[Row]:
    return [
        *linear(f"{torch}.q_proj", f"{path}.q_proj", inner, d, stack=stack),
        *linear(f"{torch}.k_proj", f"{path}.k_proj", inner, keys, stack=stack),
        *linear(f"{torch}.v_proj", f"{path}.v_proj", inner, keys, stack=stack),
        *linear(f"{torch}.out_proj", f"{path}.out_proj", d, inner, stack=stack),
    ]


def _mask_decoder(config: Sam2Config) -> list[Row]:
    decoder, d = "sam_mask_decoder", config.d_model
    transformer, half = f"{decoder}.transformer", d // 2
    result = [
        Row(f"{decoder}.iou_token.weight", f"{decoder}.iou_token", (1, d)),
        Row(f"{decoder}.obj_score_token.weight", f"{decoder}.obj_score_token", (1, d)),
        Row(f"{decoder}.mask_tokens.weight", f"{decoder}.mask_tokens", (NUM_MASKS, d)),
    ]
    for k in range(2):
        layer = f"{transformer}.layers.{k}"
        result += _attention(f"{layer}.self_attn", f"{layer}.self_attn", d, d, d)
        for name in ("cross_attn_token_to_image", "cross_attn_image_to_token"):
            result += _attention(f"{layer}.{name}", f"{layer}.{name}", d, half, d)
        result += _mlp(f"{layer}.mlp", f"{layer}.mlp", (d, config.decoder_mlp_dim, d))
        for n in range(1, 5):
            result += norm(f"{layer}.norm{n}", f"{layer}.norm{n}", d)
    final = f"{transformer}.final_attn_token_to_image"
    result += _attention(final, final, d, half, d)
    result += norm(f"{transformer}.norm_final_attn", f"{transformer}.norm_final_attn", d)
    for k, into, out in ((0, d, d // 4), (3, d // 4, d // 8)):
        torch, ours = f"{decoder}.output_upscaling.{k}", f"{decoder}.upscale_conv{1 if k == 0 else 2}"
        result.append(Row(f"{torch}.weight", f"{ours}.kernel", (into, out, 2, 2), CONV_TRANSPOSE))
        result.append(Row(f"{torch}.bias", f"{ours}.bias", (out,)))
    result += norm(f"{decoder}.output_upscaling.1", f"{decoder}.upscale_norm", d // 4)
    result += conv(f"{decoder}.conv_s0", f"{decoder}.conv_s0", (d // 8, d, 1, 1))
    result += conv(f"{decoder}.conv_s1", f"{decoder}.conv_s1", (d // 4, d, 1, 1))
    hyper = f"{decoder}.output_hypernetworks_mlps"
    result += _mlp(f"{hyper}.{{i}}", hyper, (d, d, d, d // 8), stack=tuple(range(NUM_MASKS)))
    for name, out in (("iou_prediction_head", NUM_MASKS), ("pred_obj_score_head", 1)):
        result += _mlp(f"{decoder}.{name}", f"{decoder}.{name}", (d, d, d, out))
    return result


def _memory_attention(config: Sam2Config) -> list[Row]:
    d, hidden, stack = config.d_model, config.memory_mlp_dim, tuple(range(config.memory_layers))
    layer, ours = "memory_attention.layers.{i}", "memory_attention.layers"
    return [
        *_attention(f"{layer}.self_attn", f"{ours}.self_attn", d, d, d, stack),
        *_attention(f"{layer}.cross_attn_image", f"{ours}.cross_attn_image", d, d, config.memory_dim, stack),
        *linear(f"{layer}.linear1", f"{ours}.linear1", hidden, d, stack=stack),
        *linear(f"{layer}.linear2", f"{ours}.linear2", d, hidden, stack=stack),
        *(row for n in (1, 2, 3) for row in norm(f"{layer}.norm{n}", f"{ours}.norm{n}", d, stack=stack)),
        *norm("memory_attention.norm", "memory_attention.norm", d),
    ]


def _memory_encoder(config: Sam2Config) -> list[Row]:
    """The sequential downsampler counts convolution, norm and activation: convolution k is entry 3k."""
    d, encoder = config.d_model, "memory_encoder"
    torch, ours = f"{encoder}.mask_downsampler.encoder", f"{encoder}.mask_downsampler"
    result = []
    for k, (into, out) in enumerate(zip(MASK_CHANNELS[:-1], MASK_CHANNELS[1:], strict=True)):
        result += conv(f"{torch}.{3 * k}", f"{ours}.convs.{k}", (out, into, 3, 3))
        result += norm(f"{torch}.{3 * k + 1}", f"{ours}.norms.{k}", out)
    fuser, fused, two = f"{encoder}.fuser.layers.{{i}}", f"{encoder}.fuser.layers", (0, 1)
    return [
        *result,
        *conv(f"{torch}.12", f"{ours}.conv_out", (d, MASK_CHANNELS[-1], 1, 1)),
        *conv(f"{encoder}.pix_feat_proj", f"{encoder}.pix_feat_proj", (d, d, 1, 1)),
        *conv(f"{encoder}.out_proj", f"{encoder}.out_proj", (config.memory_dim, d, 1, 1)),
        Row(f"{fuser}.g_weight", f"{fused}.g_weight", (d,), SAME, two),
        *conv(f"{fuser}.dwconv", f"{fused}.dwconv", (d, 1, 7, 7), stack=two),
        *norm(f"{fuser}.norm", f"{fused}.norm", d, stack=two),
        *linear(f"{fuser}.pwconv1", f"{fused}.pwconv1", 4 * d, d, stack=two),
        *linear(f"{fuser}.pwconv2", f"{fused}.pwconv2", d, 4 * d, stack=two),
    ]
