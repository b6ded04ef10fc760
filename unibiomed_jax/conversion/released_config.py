"""The config.json of a released checkpoint, read strictly and written back.

Whatever would change the arithmetic and is not implemented here is refused with the reason. Fields that the
original inference code ignores (tile limits, thumbnail, `rope_scaling`) are ignored here too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unibiomed_jax.config.fields import from_dict, to_dict
from unibiomed_jax.config.model import LanguageConfig, ModelConfig, Sam2Config, VisionConfig
from unibiomed_jax.config.preprocessing import PREPROCESSING, Preprocessing
from unibiomed_jax.config.presets import SAM2_VARIANTS
from unibiomed_jax.conversion.tables import sam2
from unibiomed_jax.errors import InputError

# Conversation templates whose text this package writes.
TEMPLATES = ("phi3_chat",)
_TEMPLATE_REMEDY = f"only {', '.join(TEMPLATES)} is available"
_REQUIRED = object()
# Where a release that was written here says how slices looked; the original code passes over it.
_PREPROCESSING = "preprocessing"


class _Section:
    """A table of config.json that names itself in errors."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise InputError(f"{where} must be a table of fields; restore the config.json of the release.")
        self.values, self.where = values, where

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise InputError(
                    f"{self.where} lacks {name!r}, without which the model's shape is unknown; restore the "
                    "config.json of the release."
                )
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{self.where}: {name!r} must be of type {kind.__name__}, not {value!r}.")
        if kind in (int, float) and value < 0:
            raise InputError(f"{self.where}: {name!r} must not be negative, it is {value!r}.")
        return value

    def expect(self, name: str, allowed: tuple, reason: str, default: Any = _REQUIRED) -> Any:
        """The value of a field of which only some values are implemented."""
        value = self.values.get(name, default)
        if value is _REQUIRED:
            raise InputError(f"{self.where} lacks {name!r}; restore the config.json of the release.")
        if value not in allowed:
            raise InputError(f"{self.where}: {name!r} is {value!r}, which is not supported: {reason}.")
        return value


def model_config(values: dict, sam2: Sam2Config, where: str = "config.json") -> ModelConfig:
    """Read a released config.json, of UniBiomed (Sa2VA) or of InternVL2.5.

    Args:
        values: the parsed file.
        sam2: the sizes of SAM2, which the file does not state.
        where: what errors call the file.

    Raises:
        InputError: a field is missing, has a wrong type, or asks for something that is not implemented.
    """
    top = _Section(values, where)
    top.expect(
        "model_type", ("sa2va_chat", "internvl_chat"), "only UniBiomed, Sa2VA and InternVL2.5 layouts are"
    )
    top.expect("select_layer", (-1,), "the projector reads the last layer of the vision tower", -1)
    for name in ("use_backbone_lora", "use_llm_lora"):
        top.expect(name, (0, None, False), "merge the adapters into the checkpoint first", 0)
    vision = _vision(_Section(values.get("vision_config"), f"{where}: vision_config"))
    tile = top.get("force_image_size", int, vision.image_size)
    if tile != vision.image_size:
        raise InputError(
            f"{where}: force_image_size {tile} differs from vision_config.image_size {vision.image_size}; a "
            "position table of another size than the tile is not supported."
        )
    ratio = top.get("downsample_ratio", float)
    side = round(1 / ratio) if ratio else 0
    if not side or 1 / side != ratio or vision.grid % side:
        raise InputError(
            f"{where}: 'downsample_ratio' is {ratio}, which is not supported: it must be 1/n with n dividing "
            f"the {vision.grid} patches of a tile's side."
        )
    template = top.get("template", str).replace("-", "_")
    if top.values["model_type"] == "sa2va_chat" and template not in TEMPLATES:
        raise InputError(f"{where}: 'template' is {template!r}, which is not supported: {_TEMPLATE_REMEDY}.")
    seen = values.get(_PREPROCESSING)
    if seen is None:
        preprocessing = PREPROCESSING["released"]
    else:
        preprocessing = from_dict(Preprocessing, seen, f"{where}: {_PREPROCESSING}")
    return ModelConfig(
        vision=vision,
        language=_language(_Section(values.get("llm_config"), f"{where}: llm_config")),
        sam2=sam2,
        downsample_ratio=ratio,
        ps_version=top.expect("ps_version", ("v1", "v2"), "the known pixel shuffles are v1 and v2", "v1"),
        template=template if template in TEMPLATES else TEMPLATES[0],
        preprocessing=preprocessing,
    )


def _vision(section: _Section) -> VisionConfig:
    section.expect("model_type", ("intern_vit_6b",), "the vision tower must be an InternViT", "intern_vit_6b")
    section.expect("norm_type", ("layer_norm",), "InternViT with RMS norm is not implemented", "rms_norm")
    section.expect("qk_normalization", (False,), "InternViT with normalised queries and keys is not", True)
    section.expect("hidden_act", ("gelu",), "the feed-forward layers use the exact GELU", "gelu")
    section.expect("num_channels", (3,), "tiles are RGB", 3)
    config = VisionConfig(
        hidden_size=section.get("hidden_size", int),
        num_layers=section.get("num_hidden_layers", int),
        num_heads=section.get("num_attention_heads", int),
        mlp_dim=section.get("intermediate_size", int),
        patch_size=section.get("patch_size", int),
        image_size=section.get("image_size", int),
        qkv_bias=section.get("qkv_bias", bool),
        layer_norm_eps=section.get("layer_norm_eps", float, 1e-6),
        drop_path_rate=section.get("drop_path_rate", float, 0.0),
    )
    _divides(section, config.num_heads, config.hidden_size, "num_attention_heads", "hidden_size")
    _divides(section, config.patch_size, config.image_size, "patch_size", "image_size")
    return config


def _language(section: _Section) -> LanguageConfig:
    names = section.values.get("architectures") or ["none"]
    if section.values.get("model_type", "qwen2") != "qwen2" or names[0] != "Qwen2ForCausalLM":
        raise InputError(
            f"{section.where}: the language model is {names[0]} ({section.values.get('model_type')}), which "
            "is not supported: only Qwen2 and Qwen2.5 (Qwen2ForCausalLM) are; InternLM2, Phi-3, Llama and "
            "Qwen3 members of the family are not."
        )
    section.expect("hidden_act", ("silu",), "the gated feed-forward layers use SiLU", "silu")
    section.expect("use_sliding_window", (False, None), "sliding-window attention is not implemented", False)
    rope = section.values.get("rope_parameters") or {}
    theta = _Section({**section.values, **rope}, section.where).get("rope_theta", float)
    config = LanguageConfig(
        vocab_size=section.get("vocab_size", int),
        hidden_size=section.get("hidden_size", int),
        num_layers=section.get("num_hidden_layers", int),
        num_heads=section.get("num_attention_heads", int),
        num_kv_heads=section.get("num_key_value_heads", int),
        mlp_dim=section.get("intermediate_size", int),
        rope_theta=theta,
        rms_norm_eps=section.get("rms_norm_eps", float),
        tie_word_embeddings=section.get("tie_word_embeddings", bool, False),
        max_position_embeddings=section.get("max_position_embeddings", int, 32_768),
    )
    _divides(section, config.num_heads, config.hidden_size, "num_attention_heads", "hidden_size")
    _divides(section, config.num_kv_heads, config.num_heads, "num_key_value_heads", "num_attention_heads")
    head_dim = section.get("head_dim", int, config.head_dim)
    if head_dim != config.head_dim:
        raise InputError(
            f"{section.where}: 'head_dim' {head_dim} is not hidden_size / num_attention_heads = "
            f"{config.head_dim}, which is not supported."
        )
    return config


def _divides(section: _Section, part: int, whole: int, part_name: str, whole_name: str) -> None:
    if not part or whole % part:
        raise InputError(f"{section.where}: {part_name!r} {part} does not divide {whole_name!r} {whole}.")


def release_config(config: ModelConfig, original: dict | None = None) -> dict:
    """The config.json that the original code reads for `config`.

    `original` is the file the model came from: it is returned untouched where it still describes the model,
    otherwise its other fields (generation defaults and the like) are kept.
    """
    if original and _describes(original, config):
        return original
    original = original or {}
    vision, language = config.vision, config.language
    values = {
        "architectures": ["Sa2VAChatModel"],
        "model_type": "sa2va_chat",
        "auto_map": {
            "AutoConfig": "configuration_sa2va_chat.Sa2VAChatConfig",
            "AutoModel": "modeling_sa2va_chat.Sa2VAChatModel",
            "AutoModelForCausalLM": "modeling_sa2va_chat.Sa2VAChatModel",
        },
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size,
        "hidden_size": language.hidden_size,
        "max_dynamic_patch": config.max_tiles,
        "min_dynamic_patch": config.min_tiles,
        "pad2square": False,
        _PREPROCESSING: to_dict(config.preprocessing),
        "ps_version": config.ps_version,
        "select_layer": -1,
        "template": config.template,
        "tie_word_embeddings": language.tie_word_embeddings,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": config.use_thumbnail,
    }
    vision_values = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.mlp_dim,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "qkv_bias": vision.qkv_bias,
        "layer_norm_eps": vision.layer_norm_eps,
        "drop_path_rate": vision.drop_path_rate,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "num_channels": 3,
        "qk_normalization": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    language_values = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "intermediate_size": language.mlp_dim,
        "rope_theta": language.rope_theta,
        "rms_norm_eps": language.rms_norm_eps,
        "tie_word_embeddings": language.tie_word_embeddings,
        "max_position_embeddings": language.max_position_embeddings,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_dropout": 0.0,
    }
    return {
        **original,
        **values,
        "vision_config": {**original.get("vision_config", {}), **vision_values},
        "llm_config": {**original.get("llm_config", {}), **language_values},
    }


def _describes(original: dict, config: ModelConfig) -> bool:
    """Whether a released config.json still says what `config` says, as far as such a file can."""
    if original.get("model_type") != "sa2va_chat":
        return False
    read = model_config(original, config.sam2)
    unsaid = {name: getattr(config, name) for name in ("max_tiles", "min_tiles", "use_thumbnail")}
    language = replace(read.language, vocab_multiple=config.language.vocab_multiple)
    return replace(read, language=language, **unsaid) == config


def unsaid(config: ModelConfig) -> list[str]:
    """What a released checkpoint has no words for, setting by setting; the original code has one value.

    SAM2's sizes are known by its tensors (`presets.SAM2_VARIANTS`), and the limits of tiles are in the code.
    """
    usual = ModelConfig()
    lost = [
        f"{name} is {getattr(config, name)} and would be {getattr(usual, name)}"
        for name in ("min_tiles", "max_tiles", "use_thumbnail")
        if getattr(config, name) != getattr(usual, name)
    ]
    shapes = abstract_shapes(config.sam2)
    variant = next((known for known in SAM2_VARIANTS.values() if abstract_shapes(known) == shapes), None)
    if variant is None:
        return [*lost, "SAM2 has sizes of no release"]
    lost += [
        f"sam2.{name} is {value} and would be {getattr(variant, name)}"
        for name, value in vars(config.sam2).items()
        if value != getattr(variant, name)
    ]
    return lost


def abstract_shapes(config: Sam2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of SAM2."""
    return {name: row.shape for row in sam2.rows(config) for name in row.names}
