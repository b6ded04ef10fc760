"""The modules whose results in torch lie in tests/recorded: how ours are built and called, and the format.

A file NAME.npz holds the six fields of `Recording`, each array as FIELD/KEY. What enters torch was rounded to
bfloat16 beforehand and is stored as its 16 bits; what torch answered is float32.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from ml_dtypes import bfloat16
from places import TESTS

from unibiomed_jax.config.model import HieraConfig, LanguageConfig, Sam2Config, VisionConfig
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.models.internvit import InternVisionModel
from unibiomed_jax.models.memory import Memory
from unibiomed_jax.models.projector import Projector, pixel_shuffle
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.models.sam2 import ImageFeatures, Sam2
from unibiomed_jax.models.unibiomed import TextHiddenFcs

FOLDER = TESTS / "recorded"

# Epsilons that show: on random activations the usual ones are below the tolerance.
VISION = VisionConfig(
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    mlp_dim=40,
    patch_size=4,
    image_size=16,
    layer_norm_eps=1e-3,
)
VISION_WITHOUT_BIAS = dataclasses.replace(VISION, qkv_bias=False)
LANGUAGE = LanguageConfig(
    vocab_size=19,
    hidden_size=56,
    num_layers=2,
    num_heads=14,
    num_kv_heads=2,
    mlp_dim=24,
    rope_theta=1e4,
    rms_norm_eps=1e-3,
    vocab_multiple=8,
)
LANGUAGE_TIED = dataclasses.replace(LANGUAGE, tie_word_embeddings=True)
# The grids are 24, 12, 6 and 3: windows of 4 and 2 need padding in the two coarse stages, the others do not.
SAM2 = Sam2Config(
    image_size=96,
    hiera=HieraConfig(
        embed_dim=4,
        num_heads=1,
        stages=(1, 2, 4, 1),
        global_attention_blocks=(4,),
        window_spec=(8, 4, 4, 2),
    ),
    d_model=16,
    decoder_heads=2,
    decoder_mlp_dim=24,
    memory_dim=8,
    memory_layers=2,
    memory_mlp_dim=20,
)

Arrays = dict[str, np.ndarray]


class Recording(NamedTuple):
    """A call in torch, in our layout and under our parameter paths."""

    # Only the parameters that the call reads.
    weights: Arrays
    inputs: Arrays
    outputs: Arrays
    # The loss whose gradients follow is the sum of outputs * cotangents.
    cotangents: Arrays
    weight_gradients: Arrays
    input_gradients: Arrays


# What enters torch.
ROUNDED = ("weights", "inputs", "cotangents")


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest numbers that bfloat16 holds, as float32."""
    return x.astype(bfloat16).astype(np.float32)


def write(name: str, recording: Recording) -> Path:
    arrays = {}
    for field, values in recording._asdict().items():
        for key, value in values.items():
            if field in ROUNDED and value.dtype == np.float32:
                assert (rounded(value) == value).all(), f"{field}/{key} must fit into bfloat16"
                value = value.astype(bfloat16).view(np.uint16)
            arrays[f"{field}/{key}"] = value
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    return path


def read(name: str) -> Recording:
    fields = {field: {} for field in Recording._fields}
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        for path, value in arrays.items():
            field, key = path.split("/")
            if value.dtype == np.uint16:
                value = value.view(bfloat16).astype(np.float32)
            fields[field][key] = value
    return Recording(**fields)


class RecordedModule(NamedTuple):
    build: Callable[[], nnx.Module]
    # (module, inputs) -> outputs, by the names in the recording.
    call: Callable[..., dict]


def internvit(model, inputs, remat="none"):
    return {"hidden": model(inputs["pixels"], remat=remat)}


def projector(model, inputs):
    return {"tokens": model(pixel_shuffle(inputs["patches"]))}


def text_hidden_fcs(model, inputs):
    return {"prompts": model(inputs["hidden"])}


def qwen2(model, inputs, remat="none"):
    hidden = model(model.embed(inputs["ids"]) + inputs["visual"], remat=remat)
    return {"hidden": hidden, "logits": model.logits(hidden)}


def image_encoder(model, inputs):
    return model.encode_image(inputs["pixels"], remat="full")._asdict()


def mask_decoder(model, inputs):
    decoding = model.decode(ImageFeatures(inputs["s0"], inputs["s1"], inputs["image"]), inputs["language"])
    return {**decoding._asdict(), "pointers": model.object_pointer(decoding)}


def memory_encoder(model, inputs):
    return {"memory": model.memory_encoder(inputs["image"], inputs["masks"])}


def memory_attention(model, inputs):
    memory = Memory(*(inputs[field] for field in Memory._fields))
    return {"conditioned": model.memory_attention(inputs["image"], memory)}


def sam2():
    return Sam2(SAM2, Precision(), rngs=nnx.Rngs(0))


MODULES = {
    "internvit": RecordedModule(lambda: InternVisionModel(VISION, rngs=nnx.Rngs(0)), internvit),
    "internvit_without_qkv_bias": RecordedModule(
        lambda: InternVisionModel(VISION_WITHOUT_BIAS, rngs=nnx.Rngs(0)), internvit
    ),
    "projector": RecordedModule(
        lambda: Projector(4 * VISION.hidden_size, LANGUAGE.hidden_size, rngs=nnx.Rngs(0)), projector
    ),
    "text_hidden_fcs": RecordedModule(
        lambda: TextHiddenFcs(LANGUAGE.hidden_size, SAM2.d_model, rngs=nnx.Rngs(0)), text_hidden_fcs
    ),
    "qwen2": RecordedModule(lambda: Qwen2(LANGUAGE, rngs=nnx.Rngs(0)), qwen2),
    "qwen2_tied": RecordedModule(lambda: Qwen2(LANGUAGE_TIED, rngs=nnx.Rngs(0)), qwen2),
    "image_encoder": RecordedModule(sam2, image_encoder),
    "mask_decoder": RecordedModule(sam2, mask_decoder),
    "memory_encoder": RecordedModule(sam2, memory_encoder),
    "memory_attention": RecordedModule(sam2, memory_attention),
}
