"""SAM2 in torch, twice: Meta's `sam2` package and transformers, small and with the same random weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import HieraConfig, Sam2Config
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.conversion.sources import release_name
from unibiomed_jax.conversion.tables.sam2 import PREFIX, rows
from unibiomed_jax.models.sam2 import Sam2

torch = pytest.importorskip("torch")

from micro_checkpoint import lazy  # noqa: E402
from module_checks import load  # noqa: E402
from torch_weights import arrays, gradients, leaves, randomise  # noqa: E402

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
    pe_layer = model.sam_prompt_encoder.pe_layer.float()  # its grid is float32
    # A buffer, which torch draws anew in every process.
    matrix = pe_layer.positional_encoding_gaussian_matrix
    matrix.copy_(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def sam2_leaves(values, config=CONFIG):
    """Values (weights or gradients) of Meta's model as those of `Sam2`."""
    return leaves(rows(config), lazy({PREFIX + release_name(name): value for name, value in values.items()}))


def our_sam2(model, config=CONFIG, precision=None):
    """`Sam2` with the weights of Meta's model."""
    ours = nnx.eval_shape(lambda: Sam2(config, precision or Precision(), rngs=nnx.Rngs(0)))
    return load(ours, sam2_leaves(arrays(model.state_dict()), config))


def compiled(model, call):
    """call(model, *inputs) as a jitted function of the inputs."""
    graphdef, state = nnx.split(model)
    function = jax.jit(lambda state, *inputs: call(nnx.merge(graphdef, state), *inputs))
    return lambda *inputs: function(state, *inputs)


def our_gradients(model, config=CONFIG):
    """The gradients of Meta's model as ours; the Gaussian matrix is a buffer there and has none."""
    matrix = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    return sam2_leaves(gradients(model) | {matrix: np.zeros((2, config.d_model // 2), np.float32)}, config)


def huggingface_sam2(model, config=CONFIG):
    """transformers' model with the weights of Meta's."""
    pytest.importorskip("transformers")
    from unibiomed_jax.conversion.oracles.sam2 import torch_sam2

    return torch_sam2(config, {release_name(name): x for name, x in model.state_dict().items()}).double()


def torch_sparse_prompt(model, language):
    """What the reference feeds: one dummy point, padded by a second one, then the language vector."""
    points = torch.zeros(len(language), 1, 2), -torch.ones(len(language), 1, dtype=torch.int32)
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=None)
    return torch.cat([sparse, language[:, None]], 1), dense


def torch_decode(model, features, language):
    """Meta's decoder, one image after the other."""
    outputs = []
    for i, vectors in enumerate(language):
        sparse, dense = torch_sparse_prompt(model, vectors)
        outputs.append(
            model.sam_mask_decoder(
                image_embeddings=features.image[i : i + 1] + model.no_mem_embed.reshape(1, -1, 1, 1),
                image_pe=model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
                repeat_image=True,
                high_res_features=[features.s0[i : i + 1], features.s1[i : i + 1]],
            )
        )
    return [torch.stack(x) for x in zip(*outputs, strict=True)]


def torch_best(ious, values):
    """The entry of the highest predicted IoU."""
    best = ious.argmax(-1)
    images, objects = (torch.arange(count) for count in best.shape)
    return values[images[:, None], objects[None], best]


def torch_memory_attention(attention, image, position, frames, times, place, pointers):
    """Meta's or transformers' module on lists of memories (N, objects, c) and pointers (objects, d)."""
    channels = frames[0].shape[-1]
    tokens = [chunk for pointer in pointers for chunk in pointer.unflatten(1, (-1, channels)).unbind(1)]
    keys = torch.cat([*frames, torch.stack(tokens)])
    positions = [place[:, None].expand_as(frame) + time for frame, time in zip(frames, times, strict=True)]
    positions = torch.cat([*positions, torch.zeros(len(tokens), *keys.shape[1:], dtype=keys.dtype)])
    return attention(image, keys, position, positions, len(tokens))


def sine_positions(meta, grid):
    """(N, 1, d_model) of the feature map and (N, memory_dim) of a memory, as Meta's modules give them."""
    image = meta.image_encoder.neck.position_encoding(torch.zeros(1, 1, grid, grid))
    memory = meta.memory_encoder.position_encoding(torch.zeros(1, 1, grid, grid))
    return image.flatten(2).permute(2, 0, 1).double(), memory[0].flatten(1).T.double()


def nchw(x, requires_grad=False):
    """Our NHWC array as a float64 torch NCHW tensor."""
    return torch.tensor(np.moveaxis(np.asarray(x, np.float64), -1, -3), requires_grad=requires_grad)


def nhwc(x):
    """A torch NCHW tensor as an NHWC array."""
    return np.moveaxis(x.detach().numpy(), -3, -1)


def random(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
