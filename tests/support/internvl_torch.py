"""InternVL and text_hidden_fcs in torch, and the values of their modules as our leaves."""

import torch
import transformers
from micro_checkpoint import lazy
from torch_weights import leaves, released

from unibiomed_jax.conversion.assemble import check_tied_head
from unibiomed_jax.conversion.oracles.language import torch_language, torch_vision, vision_names
from unibiomed_jax.conversion.tables import by_component, heads, internvit, qwen2

# The layers of the projector, which the release numbers, in transformers.
PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def torch_internvl(config):
    """A whole InternVL, for its projector and pixel shuffle."""
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config=torch_vision(config.vision).config,
            text_config=torch_language(config.language).config,
            image_token_id=3,
            tie_word_embeddings=False,
        )
    )


def torch_text_hidden_fcs(config):
    """The layers of `text_hidden_fcs`, as the reference has them."""
    width = config.language.hidden_size
    return torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, config.sam2.d_model)
    )


def internvit_leaves(values, config):
    """Values (weights or gradients) of transformers' InternVLVisionModel as those of InternVisionModel."""
    rows = internvit.rows(config)
    names = {name: vision_names(name.removeprefix("vision_model.")) for row in rows for name in row.names}
    return leaves(rows, lazy(released(values, names)))


def projector_leaves(values, config):
    """Values of transformers' InternVLMultiModalProjector as those of Projector."""
    names = {
        f"mlp1.{number}.{kind}": (f"{layer}.{kind}",)
        for number, layer in PROJECTOR.items()
        for kind in ("weight", "bias")
    }
    return leaves(by_component(heads.rows(config))["mlp1"], lazy(released(values, names)))


def qwen2_leaves(values, config, *, padding):
    """Values of transformers' Qwen2ForCausalLM as those of Qwen2, the padded rows filled with `padding`."""
    tensors = lazy({f"language_model.{name}": value for name, value in values.items()})
    check_tied_head(tensors, config.tie_word_embeddings, "The torch module")
    return leaves(qwen2.rows(config), tensors, padding)


def text_hidden_fcs_leaves(values, config):
    """Values of `torch_text_hidden_fcs` as those of TextHiddenFcs."""
    rows = by_component(heads.rows(config))["text_hidden_fcs"]
    return leaves(rows, lazy({f"text_hidden_fcs.{name}": value for name, value in values.items()}))
