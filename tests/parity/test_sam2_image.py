"""SAM2's image side against torch: encoder, prompt, mask decoder and object pointer, with random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from unibiomed_jax.config.precision import Precision
from unibiomed_jax.models.sam2 import ImageFeatures

torch = pytest.importorskip("torch")
pytest.importorskip("sam2.modeling")

from measured import assert_close  # noqa: E402
from module_checks import assert_gradients_close, value_and_gradients  # noqa: E402
from sam2_torch import (  # noqa: E402
    CONFIG,
    compiled,
    huggingface_sam2,
    meta_sam2,
    nchw,
    nhwc,
    our_gradients,
    our_sam2,
    random,
    torch_best,
    torch_decode,
)

IMAGES, OBJECTS = 2, 3
# The first whose mask decoder shows both kinds of objects and chooses different masks.
SEED = 3
GRID, DIM = CONFIG.grid, CONFIG.d_model


@pytest.fixture(scope="module")
def meta():
    return meta_sam2(seed=SEED)


@pytest.fixture(scope="module")
def huggingface(meta):
    return huggingface_sam2(meta)


@pytest.fixture(scope="module")
def ours(meta):
    return our_sam2(meta)


def random_pixels():
    return random((IMAGES, CONFIG.image_size, CONFIG.image_size, 3), 1)


def random_features():
    return ImageFeatures(
        random((IMAGES, 4 * GRID, 4 * GRID, DIM // 8), 2),
        random((IMAGES, 2 * GRID, 2 * GRID, DIM // 4), 3),
        random((IMAGES, GRID, GRID, DIM), 4),
    )


def test_image_encoder_and_gradients_equal_torch(meta, huggingface, ours):
    pixels = random_pixels()
    cotangent = ImageFeatures(*(random(x.shape, 5) for x in random_features()))
    meta.zero_grad()
    torch_pixels = nchw(pixels, requires_grad=True)
    levels = meta.image_encoder(torch_pixels)["backbone_fpn"]
    decoder = meta.sam_mask_decoder
    expected = [decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1]), levels[2]]
    sum((x * nchw(c)).sum() for x, c in zip(expected, cotangent, strict=True)).backward()

    def call(model, pixels):
        features = model.encode_image(pixels, remat="full")
        return jnp.concatenate([x.ravel() for x in features])

    flat = np.concatenate([c.ravel() for c in cotangent])
    result, grads, pixel_grad = value_and_gradients(ours, call, pixels, flat)
    assert_close(result, np.concatenate([nhwc(x).ravel() for x in expected]), 1e-5)
    assert_close(pixel_grad, nhwc(torch_pixels.grad), 1e-5)
    prefixes = ("image_encoder.", "sam_mask_decoder.conv_s")
    assert_gradients_close(grads, our_gradients(meta), 1e-5, prefixes)

    with torch.no_grad():
        outputs = huggingface.get_image_features(nchw(pixels), return_dict=True)
    again = [x.permute(1, 0, 2).flatten() for x in outputs.fpn_hidden_states]
    assert_close(result, torch.cat(again), 1e-5)


def huggingface_decode(model, features, language):
    """transformers' decoder, all images and objects at once."""
    points = torch.zeros(IMAGES, OBJECTS, 1, 2), -torch.ones(IMAGES, OBJECTS, 1, dtype=torch.int32)
    with torch.no_grad():
        sparse, dense = model.prompt_encoder(*points, None, None)
        position = model.get_image_wide_positional_embeddings().expand(IMAGES, -1, -1, -1)
        masks, ious, tokens, scores = model.mask_decoder(
            image_embeddings=nchw(features.image) + model.no_memory_embedding.reshape(1, -1, 1, 1),
            image_positional_embeddings=position,
            sparse_prompt_embeddings=torch.cat([sparse, torch.tensor(language)[:, :, None]], 2),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[nchw(features.s0), nchw(features.s1)],
        )
        pointers = model.object_pointer_proj(torch_best(ious, tokens))
    pointers = torch.where(scores > 0, pointers, model.no_object_pointer)
    return torch_best(ious, masks), masks, ious, scores[..., 0], pointers


def test_mask_decoder_and_gradients_equal_torch(meta, huggingface, ours):
    features, language = random_features(), 8 * random((IMAGES, OBJECTS, DIM), 6)
    torch_features = ImageFeatures(*(nchw(x, requires_grad=True) for x in features))
    torch_language = torch.tensor(language, dtype=torch.float64, requires_grad=True)
    meta.zero_grad()
    masks, ious, tokens, scores = torch_decode(meta, torch_features, torch_language)
    pointers = meta.obj_ptr_proj(torch_best(ious, tokens))
    pointers = torch.where(scores > 0, pointers, meta.no_obj_ptr)
    expected = torch_best(ious, masks), masks, ious, scores[..., 0], pointers
    assert (scores > 0).any() and (scores < 0).any(), "the example must show both kinds of objects"
    assert len(set(ious.argmax(-1).flatten().tolist())) > 1, "the example must choose different masks"
    # The mean keeps the sums over masks and over scores on one scale.
    cotangents = [random(x.shape, 7 + i) / x.numel() for i, x in enumerate(expected)]
    sum(
        (x * torch.tensor(c, dtype=torch.float64)).sum() for x, c in zip(expected, cotangents, strict=True)
    ).backward()

    def call(model, inputs):
        features, language = inputs
        decoding = model.decode(features, language)
        return decoding[:4] + (model.object_pointer(decoding),)

    flat_cotangent = np.concatenate([c.ravel() for c in cotangents])
    result, grads, input_grads = value_and_gradients(
        ours,
        lambda model, inputs: jnp.concatenate([x.ravel() for x in call(model, inputs)]),
        (features, language),
        flat_cotangent,
    )
    assert_close(result, np.concatenate([x.detach().numpy().ravel() for x in expected]), 1e-5)
    decoded = compiled(ours, lambda model, *inputs: call(model, inputs))(features, language)
    names = ("masks", "multimasks", "ious", "object scores", "pointers")
    for name, mine, theirs in zip(names, decoded, expected, strict=True):
        assert_close(mine, theirs, 1e-5, name)
    for name, mine, theirs in zip(
        names, decoded, huggingface_decode(huggingface, features, language), strict=True
    ):
        assert_close(mine, theirs, 1e-5, f"{name} of transformers")
    for name, mine, theirs in zip(ImageFeatures._fields, input_grads[0], torch_features, strict=True):
        assert_close(mine, nhwc(theirs.grad), 1e-5, name)
    assert_close(input_grads[1], torch_language.grad, 1e-5, "language")
    touched = (
        "sam_mask_decoder.",
        "sam_prompt_encoder.no",
        "obj_ptr_proj.",
        "no_obj_ptr",
        "no_mem_embed",
    )
    assert_gradients_close(grads, our_gradients(meta), 1e-5, touched)


def test_dense_position_equals_torch_in_both_precisions(meta, ours):
    pe_layer = meta.sam_prompt_encoder.pe_layer
    exact = pe_layer((64, 64)).reshape(DIM, -1).T
    assert_close(ours.sam_prompt_encoder.dense_position(64, False), exact, 1e-5)

    matrix = pe_layer.positional_encoding_gaussian_matrix
    centres = (torch.arange(64) + 0.5) / 64
    xy = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 2).bfloat16()
    angles = 2 * np.pi * ((2 * xy - 1) @ matrix.bfloat16())
    rounded = torch.cat([angles.sin(), angles.cos()], -1)
    assert rounded.dtype == torch.bfloat16
    ours_rounded = compiled(ours, lambda model: model.sam_prompt_encoder.dense_position(64, True))()
    assert (np.asarray(ours_rounded) == rounded.float().numpy()).mean() > 0.999
    assert_close(ours_rounded, rounded, 2**-7)
    assert np.abs(np.asarray(ours_rounded) - exact.numpy()).max() > 0.02, "rounding must show"


def test_bfloat16_is_as_near_to_float32_as_torch(ours):
    features, language = random_features(), 8 * random((IMAGES, OBJECTS, DIM), 6)
    meta = meta_sam2(seed=SEED).float()
    rounding = our_sam2(meta, precision=Precision(sam2_decoder="bfloat16"))
    exact, rounded = (compiled(m, lambda m, *x: m.decode(*x))(features, language) for m in (ours, rounding))
    torch_features = ImageFeatures(*(nchw(x).float() for x in features))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        masks, ious, _, _ = torch_decode(meta, torch_features, torch.tensor(language))
    assert all(x.dtype == jnp.float32 for x in rounded)
    pairs = (rounded.multimasks, masks, exact.multimasks), (rounded.ious, ious, exact.ious)
    for mine, theirs, truth in pairs:
        error = np.abs(np.asarray(mine) - truth).mean()
        assert 0 < error <= 1.2 * np.abs(theirs.float().numpy() - truth).mean()
