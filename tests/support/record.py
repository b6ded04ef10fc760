"""Write what torch computes of every module into tests/recorded, for machines without torch.

python tests/support/record.py
"""

import functools

import numpy as np
import torch
from internvl_torch import (
    internvit_leaves,
    projector_leaves,
    qwen2_leaves,
    text_hidden_fcs_leaves,
    torch_internvl,
    torch_text_hidden_fcs,
)
from recorded_modules import (
    LANGUAGE,
    LANGUAGE_TIED,
    SAM2,
    VISION,
    VISION_WITHOUT_BIAS,
    Recording,
    rounded,
    write,
)
from sam2_torch import (
    meta_sam2,
    our_gradients,
    sam2_leaves,
    sine_positions,
    torch_best,
    torch_decode,
    torch_memory_attention,
)
from torch_weights import arrays, gradients, set_weights

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.conversion.oracles.language import torch_language, torch_vision
from unibiomed_jax.models.sam2 import ImageFeatures

MODEL = ModelConfig(VISION, LANGUAGE, SAM2)
GRID, DIM, MEMORY_DIM = SAM2.grid, SAM2.d_model, SAM2.memory_dim
MATRIX = "sam_prompt_encoder.positional_encoding_gaussian_matrix"


def noise(rng, *shape):
    return rounded(rng.standard_normal(shape))


def with_noise(module, rng):
    """The module with noise for weights that bfloat16 holds, from numpy: equal everywhere. In float64."""
    set_weights(module, lambda shape: torch.tensor(rng.standard_normal(tuple(shape))))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    return module.double()


def record(rng, run, inputs, weights, weight_gradients, constants=()):
    """Call run(**inputs), which answers tensors by name, and differentiate it.

    `weights` are all parameters by our paths, and `weight_gradients` returns their gradients once they exist.
    Parameters without any are left out, but for the `constants`.
    """
    tensors = {
        name: torch.tensor(x, dtype=torch.float64, requires_grad=True)
        if x.dtype == np.float32
        else torch.tensor(x)
        for name, x in inputs.items()
    }
    outputs = run(**tensors)
    # The mean over each output keeps large and small ones on one scale.
    cotangents = {name: rounded(noise(rng, *x.shape) / x.numel()) for name, x in outputs.items()}
    sum((x * torch.tensor(cotangents[name])).sum() for name, x in outputs.items()).backward()
    moved = {path: grad for path, grad in weight_gradients().items() if grad.any()}
    return Recording(
        weights={path: x for path, x in weights.items() if path in moved or path in constants},
        inputs=inputs,
        outputs=arrays(outputs),
        cotangents=cotangents,
        weight_gradients=moved,
        input_gradients=arrays({name: x.grad for name, x in tensors.items() if x.requires_grad}),
    )


def internvit(config):
    rng = np.random.default_rng(0)
    theirs = with_noise(torch_vision(config), rng)
    return record(
        rng,
        lambda pixels: {"hidden": theirs(pixels.movedim(-1, 1)).last_hidden_state},
        {"pixels": noise(rng, 2, config.image_size, config.image_size, 3)},
        internvit_leaves(arrays(theirs.state_dict()), config),
        lambda: internvit_leaves(gradients(theirs), config),
    )


def projector():
    rng = np.random.default_rng(1)
    model = torch_internvl(MODEL).model
    theirs = with_noise(model.multi_modal_projector, rng)
    return record(
        rng,
        lambda patches: {"tokens": theirs(model.pixel_shuffle(patches, 0.5))},
        # Small, so that the epsilon of the norm shows.
        {"patches": noise(rng, 2, VISION.grid, VISION.grid, VISION.hidden_size) / 16},
        projector_leaves(arrays(theirs.state_dict()), MODEL),
        lambda: projector_leaves(gradients(theirs), MODEL),
    )


def text_hidden_fcs():
    rng = np.random.default_rng(2)
    theirs = with_noise(torch_text_hidden_fcs(MODEL), rng)
    return record(
        rng,
        lambda hidden: {"prompts": theirs(hidden)},
        {"hidden": noise(rng, 3, LANGUAGE.hidden_size)},
        text_hidden_fcs_leaves(arrays(theirs.state_dict()), MODEL),
        lambda: text_hidden_fcs_leaves(gradients(theirs), MODEL),
    )


def qwen2(config):
    rng = np.random.default_rng(3)
    theirs = with_noise(torch_language(config), rng)

    def run(ids, visual):
        embeds = theirs.model.embed_tokens(ids) + visual
        output = theirs(inputs_embeds=embeds, output_hidden_states=True)
        return {"hidden": output.hidden_states[-1], "logits": output.logits}

    return record(
        rng,
        run,
        {
            "ids": rng.integers(0, config.vocab_size, (3, 12)),
            "visual": noise(rng, 3, 12, config.hidden_size),
        },
        # The padded rows hold values that would win.
        qwen2_leaves(arrays(theirs.state_dict()), config, padding=1e3),
        lambda: qwen2_leaves(gradients(theirs), config, padding=0),
    )


def sam2(rng):
    """Meta's model and its weights by our paths."""
    meta = with_noise(meta_sam2(SAM2), rng)
    pe_layer = meta.sam_prompt_encoder.pe_layer.float()  # its grid is float32
    matrix = pe_layer.positional_encoding_gaussian_matrix
    matrix.copy_(torch.tensor(noise(rng, *matrix.shape)))
    return meta, sam2_leaves(arrays(meta.state_dict()), SAM2)


def image_encoder():
    rng = np.random.default_rng(4)
    meta, weights = sam2(rng)

    def run(pixels):
        levels = meta.image_encoder(pixels.movedim(-1, 1))["backbone_fpn"]
        decoder = meta.sam_mask_decoder
        features = ImageFeatures(decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1]), levels[2])
        return {name: x.movedim(1, -1) for name, x in features._asdict().items()}

    inputs = {"pixels": noise(rng, 2, SAM2.image_size, SAM2.image_size, 3)}
    return record(rng, run, inputs, weights, lambda: our_gradients(meta, SAM2))


def mask_decoder():
    rng = np.random.default_rng(10)  # the first that passes the two assertions below
    meta, weights = sam2(rng)

    def run(language, **features):
        features = ImageFeatures(**{name: x.movedim(-1, 1) for name, x in features.items()})
        multimasks, ious, tokens, scores = torch_decode(meta, features, language)
        assert (scores > 0).any() and (scores < 0).any(), "the example must show both kinds of objects"
        assert len(ious.argmax(-1).unique()) > 1, "the example must choose different masks"
        mask_tokens = torch_best(ious, tokens)
        return {
            "masks": torch_best(ious, multimasks),
            "multimasks": multimasks,
            "ious": ious,
            "object_scores": scores[..., 0],
            "mask_tokens": mask_tokens,
            "pointers": torch.where(scores > 0, meta.obj_ptr_proj(mask_tokens), meta.no_obj_ptr),
        }

    inputs = {
        "s0": noise(rng, 2, 4 * GRID, 4 * GRID, DIM // 8),
        "s1": noise(rng, 2, 2 * GRID, 2 * GRID, DIM // 4),
        "image": noise(rng, 2, GRID, GRID, DIM),
        "language": 8 * noise(rng, 2, 3, DIM),
    }
    return record(rng, run, inputs, weights, lambda: our_gradients(meta, SAM2), constants=(MATRIX,))


def memory_encoder():
    rng = np.random.default_rng(5)
    meta, weights = sam2(rng)

    def run(image, masks):
        images, objects = masks.shape[:2]
        per_object = image.movedim(-1, 1).repeat_interleave(objects, 0)
        prompt = (20 * masks.sigmoid() - 10).flatten(0, 1)[:, None]
        memory = meta.memory_encoder(per_object, prompt, skip_mask_sigmoid=True)["vision_features"]
        return {"memory": memory.movedim(1, -1).unflatten(0, (images, objects))}

    inputs = {
        "image": noise(rng, 2, GRID, GRID, DIM),
        "masks": rounded(3 * noise(rng, 2, 2, SAM2.image_size, SAM2.image_size)),
    }
    return record(rng, run, inputs, weights, lambda: our_gradients(meta, SAM2))


def memory_attention():
    rng = np.random.default_rng(6)
    meta, weights = sam2(rng)
    position, place = sine_positions(meta, GRID)

    def run(image, frames, time, frames_valid, pointers, pointers_valid):
        objects = len(pointers)
        conditioned = torch_memory_attention(
            meta.memory_attention,
            image.reshape(-1, 1, DIM).expand(-1, objects, -1),
            position.expand(-1, objects, -1),
            [frame.transpose(0, 1) for frame in frames[frames_valid]],
            list(time[frames_valid]),
            place,
            pointers[:, pointers_valid].reshape(objects, -1, DIM).unbind(1),
        )
        return {"conditioned": conditioned.transpose(0, 1).reshape(objects, GRID, GRID, DIM)}

    tokens = DIM // MEMORY_DIM
    inputs = {
        "image": noise(rng, GRID, GRID, DIM),
        "frames": noise(rng, 4, 2, GRID * GRID, MEMORY_DIM),
        "time": noise(rng, 4, MEMORY_DIM),
        "frames_valid": np.array([True, False, True, True]),
        "pointers": noise(rng, 2, 3 * tokens, MEMORY_DIM),
        "pointers_valid": np.repeat([True, True, False], tokens),
    }
    return record(rng, run, inputs, weights, lambda: our_gradients(meta, SAM2))


RECORDERS = {
    "internvit": functools.partial(internvit, VISION),
    "internvit_without_qkv_bias": functools.partial(internvit, VISION_WITHOUT_BIAS),
    "projector": projector,
    "text_hidden_fcs": text_hidden_fcs,
    "qwen2": functools.partial(qwen2, LANGUAGE),
    "qwen2_tied": functools.partial(qwen2, LANGUAGE_TIED),
    "image_encoder": image_encoder,
    "mask_decoder": mask_decoder,
    "memory_encoder": memory_encoder,
    "memory_attention": memory_attention,
}


def main():
    for name, recorder in RECORDERS.items():
        path = write(name, recorder())
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
