"""SAM2 in torch, twice: Meta's `sam2` package and transformers, small and with the same random weights."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import HieraConfig, Sam2Config
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.conversion.tables.sam2 import PREFIX, rows
from unibiomed_jax.models.sam2 import Sam2

torch = pytest.importorskip("torch")

from module_checks import load  # noqa: E402
from torch_weights import arrays, gradients, randomise  # noqa: E402

# At 96 pixels the grids are 24, 12, 6 and 3: the windows of the two coarse stages need padding.
CONFIG = Sam2Config(
    image_size=96,
    hiera=HieraConfig(embed_dim=8, num_heads=1, stages=(1, 2, 4, 1), global_attention_blocks=(4,)),
    d_model=32,
    decoder_heads=4,
    decoder_mlp_dim=48,
    memory_dim=8,
    memory_layers=2,
    memory_mlp_dim=40,
    max_object_pointers=8,
)


def meta_sam2(config=CONFIG, seed=0):
    """The `sam2` package's model as its 2.0 configuration builds it, computing in float64.

    In float32 its own rounding now and then changes which cell a max-pool picks, and with it the gradients.
    """
    pytest.importorskip("sam2.modeling")
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.transformer import RoPEAttention, TwoWayTransformer
    from sam2.modeling.sam2_base import SAM2Base

    hiera, dim, grid = config.hiera, config.d_model, (config.grid, config.grid)
    trunk = Hiera(
        embed_dim=hiera.embed_dim,
        num_heads=hiera.num_heads,
        stages=hiera.stages,
        global_att_blocks=hiera.global_attention_blocks,
        window_pos_embed_bkg_spatial_size=hiera.position_grid,
        window_spec=hiera.window_spec,
    )
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(dim),
        d_model=dim,
        backbone_channel_list=list(reversed(hiera.stage_dims)),
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    attention = dict(embedding_dim=dim, num_heads=1, downsample_rate=1, dropout=0.1, feat_sizes=grid)
    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=RoPEAttention(rope_k_repeat=True, kv_in_dim=config.memory_dim, **attention),
        d_model=dim,
        dim_feedforward=config.memory_mlp_dim,
        dropout=0.1,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**attention),
    )
    memory_encoder = MemoryEncoder(
        out_dim=config.memory_dim,
        in_dim=dim,
        mask_downsampler=MaskDownSampler(dim, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(dim), num_layers=2),
        position_encoding=PositionEmbeddingSine(config.memory_dim),
    )
    model = SAM2Base(
        image_encoder=ImageEncoder(trunk, neck, scalp=1),
        memory_attention=MemoryAttention(dim, True, layer, config.memory_layers),
        memory_encoder=memory_encoder,
        image_size=config.image_size,
        use_high_res_features_in_sam=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=False,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        use_mlp_for_obj_ptr_proj=True,
    )
    model.sam_mask_decoder = MaskDecoder(
        transformer_dim=dim,
        transformer=TwoWayTransformer(2, dim, config.decoder_heads, config.decoder_mlp_dim),
        iou_head_hidden_dim=dim,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
    )
    model = randomise(model, seed).double()
    model.sam_prompt_encoder.pe_layer.float()  # its grid is float32
    return model


def released_names(tensors):
    """A state dict (or gradients) of Meta's model under the names of a released checkpoint."""
    return {name.replace(".gamma", ".g_weight"): tensor for name, tensor in tensors.items()}


def our_values(values, config=CONFIG):
    """Values under released names as ours: dotted path of `Sam2` to array."""
    ours = {}
    for row in rows(config):
        parts = [row.layout.forward(values[name.removeprefix(PREFIX)]) for name in row.names]
        ours[row.path.removeprefix("sam2.")] = np.stack(parts) if row.stack is not None else parts[0]
    return ours


def our_sam2(model, config=CONFIG, precision=None):
    """`Sam2` with the weights of Meta's model."""
    values = arrays(released_names(model.state_dict()))
    ours = nnx.eval_shape(lambda: Sam2(config, precision or Precision(), rngs=nnx.Rngs(0)))
    return load(ours, our_values(values, config))


def compiled(model, call):
    """call(model, *inputs) as a jitted function of the inputs."""
    graphdef, state = nnx.split(model)
    function = jax.jit(lambda state, *inputs: call(nnx.merge(graphdef, state), *inputs))
    return lambda *inputs: function(state, *inputs)


def our_gradients(model, config=CONFIG):
    """The gradients of Meta's model as ours; the Gaussian matrix is a buffer there and has none."""
    grads = released_names(gradients(model))
    matrix = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    grads[matrix] = np.zeros((2, config.d_model // 2), np.float32)
    return our_values(grads, config)


def huggingface_sam2(state, config=CONFIG):
    """transformers' model with weights under released names, set to the mathematics of SAM 2.0."""
    transformers = pytest.importorskip("transformers")
    hiera, dim, grid = config.hiera, config.d_model, config.grid
    vision = dict(
        backbone_config=dict(
            model_type="sam2_hiera_det_model",
            hidden_size=hiera.embed_dim,
            num_attention_heads=hiera.num_heads,
            image_size=[config.image_size] * 2,
            window_positional_embedding_background_size=list(hiera.position_grid),
            blocks_per_stage=list(hiera.stages),
            embed_dim_per_stage=list(hiera.stage_dims),
            num_attention_heads_per_stage=[hiera.num_heads * 2**i for i in range(4)],
            window_size_per_stage=list(hiera.window_spec),
            global_attention_blocks=list(hiera.global_attention_blocks),
        ),
        backbone_channel_list=list(reversed(hiera.stage_dims)),
        backbone_feature_sizes=[[grid * scale] * 2 for scale in (4, 2, 1)],
        fpn_hidden_size=dim,
    )
    model = transformers.Sam2VideoModel(
        transformers.Sam2VideoConfig(
            vision_config=dict(model_type="sam2_vision_model", **vision),
            prompt_encoder_config=dict(hidden_size=dim, image_size=config.image_size),
            mask_decoder_config=dict(
                hidden_size=dim,
                mlp_dim=config.decoder_mlp_dim,
                num_attention_heads=config.decoder_heads,
                iou_head_hidden_dim=dim,
            ),
            image_size=config.image_size,
            enable_occlusion_spatial_embedding=False,
            enable_temporal_pos_encoding_for_object_pointers=False,
            memory_attention_hidden_size=dim,
            memory_attention_num_layers=config.memory_layers,
            memory_attention_feed_forward_hidden_size=config.memory_mlp_dim,
            memory_attention_rope_feat_sizes=[grid, grid],
            memory_encoder_hidden_size=dim,
            memory_encoder_output_channels=config.memory_dim,
            mask_downsampler_embed_dim=dim,
            memory_fuser_embed_dim=dim,
            memory_fuser_intermediate_dim=4 * dim,
        )
    )
    for layer in model.memory_attention.layers:  # transformers fixes the memory's channels to 64
        for name in ("k_proj", "v_proj"):
            setattr(layer.cross_attn_image, name, torch.nn.Linear(config.memory_dim, dim))
    renamed = {huggingface_name(name): tensor for name, tensor in state.items()}
    points = [renamed.pop(f"prompt_encoder.point_embed.{i}.weight") for i in range(4)]
    renamed["prompt_encoder.point_embed.weight"] = torch.cat(points)
    matrix = "positional_embedding"
    renamed[f"shared_image_embedding.{matrix}"] = renamed[f"prompt_encoder.shared_embedding.{matrix}"]
    model.load_state_dict(renamed, strict=True)
    return model.eval().double()


def huggingface_name(name):
    """The released name of a SAM2 tensor as transformers calls it."""
    for pattern, replacement in HUGGINGFACE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


HUGGINGFACE_NAMES = (
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.2\.", r"\1.proj_out."),
    (r"^image_encoder\.trunk\.patch_embed\.proj", "vision_encoder.backbone.patch_embed.projection"),
    (r"^image_encoder\.trunk", "vision_encoder.backbone"),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv", r"vision_encoder.neck.convs.\1"),
    (r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
     "prompt_encoder.shared_embedding.positional_embedding"),
    (r"point_embeddings", "point_embed"),
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
    *((rf"mask_downsampler\.encoder\.{3 * k}\.", f"mask_downsampler.layers.{k}.conv.") for k in range(4)),
    *((rf"mask_downsampler\.encoder\.{3 * k + 1}\.", f"mask_downsampler.layers.{k}.layer_norm.")
      for k in range(4)),
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
)  # fmt: skip


def nchw(x, requires_grad=False):
    """Our NHWC array as a float64 torch NCHW tensor."""
    return torch.tensor(np.moveaxis(np.asarray(x, np.float64), -1, -3), requires_grad=requires_grad)


def nhwc(x):
    """A torch NCHW tensor as an NHWC array."""
    return np.moveaxis(x.detach().numpy(), -3, -1)


def random(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
