"""The kinds of checkpoint that conversion starts from, each as named tensors with their configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unibiomed_jax.config.model import ModelConfig, Sam2Config
from unibiomed_jax.config.presets import SAM2_VARIANTS
from unibiomed_jax.conversion.assemble import check_complete, check_tied_head
from unibiomed_jax.conversion.reading import Tensor, read_folder, read_json, read_torch
from unibiomed_jax.conversion.released_config import model_config
from unibiomed_jax.conversion.rows import Row
from unibiomed_jax.conversion.tables import heads, model_rows, sam2
from unibiomed_jax.conversion.tables.qwen2 import TORCH_EMBEDDING, TORCH_HEAD, lora_rows, projections
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import UNIBIOMED_TOKENS
from unibiomed_jax.parameters import LoraInfo, updated

# What the reference's training changes besides the language model, as names begin.
TRAINED = ("mlp1.", "text_hidden_fcs.", "grounding_encoder.sam2_model.sam_mask_decoder.")
# Standard deviation of the embeddings of new tokens, as the reference draws them.
NEW_ROW_SCALE = 0.02


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert; `rows` and `tensors` are known to correspond one to one."""

    config: ModelConfig
    rows: list[Row]
    tensors: dict[str, Tensor]
    # The config.json of the release it came from.
    release_config: dict
    # The folder with that file and the tokenizer's.
    folder: Path
    # The first id of the tokens that the tokenizer files still lack; None: they lack none.
    first_new_token: int | None = None
    # The release stores a tied head besides the embedding.
    stores_tied_head: bool = False
    # Adapters kept apart.
    lora: LoraInfo | None = None
    # Of what training changes: what its file lacks, so that it is the base's.
    from_base: tuple[str, ...] = ()


def released(folder: Path) -> Source:
    """A released checkpoint folder: safetensors, config.json, tokenizer."""
    _require_folder(folder)
    values = read_json(folder / "config.json")
    if isinstance(values, dict) and values.get("model_type") == "internvl_chat":
        raise InputError(
            f"{folder} is InternVL2.5 without SAM2; add its file with --sam2 sam2_hiera_large.pt."
        )
    # The configuration is judged before any weight is looked at: its errors say more.
    model_config(values, Sam2Config(), str(folder / "config.json"))
    tensors = unique(read_folder(folder), release_name, str(folder))
    config = model_config(values, recognise_sam2(tensors, str(folder)), str(folder / "config.json"))
    stored = check_tied_head(tensors, config.language.tie_word_embeddings, str(folder))
    rows = model_rows(config)
    check_complete(rows, tensors, str(folder))
    return Source(config, rows, tensors, values, folder, stores_tied_head=stored)


def starting_weights(folder: Path, sam2_file: Path, seed: int = 0) -> Source:
    """InternVL2.5 and SAM2 as they were published, joined as UniBiomed's training starts.

    The five new tokens get embeddings from N(0, 0.02) and text_hidden_fcs torch's default, both from `seed`.
    """
    source = _internvl_with_sam2(folder, sam2_file)
    config, tensors = source.config, dict(source.tensors)
    rng = np.random.default_rng(seed)
    rows = config.language.vocab_size
    for name in (TORCH_EMBEDDING, TORCH_HEAD):
        if name in tensors:
            tensors[name] = _with_new_rows(tensors[name], rows, rng.integers(2**63))
    for row in heads.rows(config):
        if row.path.startswith("text_hidden_fcs."):
            fan_in = config.language.hidden_size
            tensors[row.torch] = _drawn(row.shape, 1 / math.sqrt(fan_in), rng.integers(2**63))
    check_complete(source.rows, tensors, f"{folder} with {sam2_file.name}")
    return dataclasses.replace(source, tensors=tensors)


def trained(
    file: Path, base: Path, sam2_file: Path | None, *, rank: int, alpha: float, keep_lora: bool
) -> Source:
    """A training .pth over the weights it was trained from (a released folder, or InternVL2.5 with SAM2).

    Args:
        rank, alpha: of the adapters; alpha is not stored in the file.
        keep_lora: leave the adapters apart instead of merging W + (alpha / rank) B A in float32.
    """
    _require_folder(base)
    updates = unique(read_torch(file, "state_dict"), training_name, str(file))
    source = released(base) if sam2_file is None else _internvl_with_sam2(base, sam2_file)
    adapters = {name: updates.pop(name) for name in list(updates) if ".lora_" in name}
    lacking = tuple(part for part in TRAINED if not any(name.startswith(part) for name in updates))
    source = dataclasses.replace(source, from_base=lacking)
    tensors = source.tensors | updates
    check_tied_head(tensors, source.config.language.tie_word_embeddings, str(file))
    check_complete(source.rows, tensors, f"{file} over {base}")
    if not adapters:
        return dataclasses.replace(source, tensors=tensors)

    extra = lora_rows(source.config.language, rank)
    first = adapters.get(extra[0].names[0])
    if first is not None and first.shape[0] != rank:
        raise InputError(
            f"{file}: the adapters have rank {first.shape[0]}, not {rank}; pass --lora-rank {first.shape[0]} "
            "and the --lora-alpha that the training used."
        )
    check_complete(extra, adapters, f"{file} (adapters)")
    if keep_lora:
        return dataclasses.replace(
            source, tensors=tensors | adapters, rows=source.rows + extra, lora=LoraInfo(rank, alpha)
        )
    for name in projections(source.config.language):
        for i in range(source.config.language.num_layers):
            linear = f"language_model.model.layers.{i}.{name}"
            a, b = adapters[f"{linear}.lora_A.weight"], adapters[f"{linear}.lora_B.weight"]
            tensors[f"{linear}.weight"] = _merged(tensors[f"{linear}.weight"], a, b, alpha / rank)
    return dataclasses.replace(source, tensors=tensors)


def _internvl_with_sam2(folder: Path, sam2_file: Path) -> Source:
    """Both files under the released names; what neither holds is still missing from `tensors`."""
    _require_folder(folder)
    values = read_json(folder / "config.json")
    found = model_config(values, Sam2Config(), str(folder / "config.json"))
    if values["model_type"] != "internvl_chat":
        raise InputError(f"{folder} already holds SAM2; leave out --sam2.")
    tensors = unique(read_folder(folder), release_name, str(folder))
    tensors |= read_sam2(sam2_file)
    check_tied_head(tensors, found.language.tie_word_embeddings, str(folder))
    old = found.language.vocab_size
    language = dataclasses.replace(found.language, vocab_size=old + len(UNIBIOMED_TOKENS))
    config = dataclasses.replace(found, language=language, sam2=recognise_sam2(tensors, str(sam2_file)))
    for name in (TORCH_EMBEDDING, TORCH_HEAD):
        if name in tensors and tensors[name].shape[:1] != (old,):
            raise InputError(
                f"{folder}: {name} has {tensors[name].shape[0]} rows, but config.json says {old}."
            )
    return Source(config, model_rows(config), tensors, values, folder, first_new_token=old)


def read_sam2(file: Path) -> dict[str, Tensor]:
    """A published SAM 2.0 file, under the released names.

    Raises:
        InputError: it is SAM 2.1, which computes other things.
    """
    found = read_torch(file, "model")
    newer = [name for name in found if name.startswith(("no_obj_embed_spatial", "obj_ptr_tpos_proj"))]
    if newer:
        raise InputError(
            f"{file} is SAM 2.1 (it holds {newer[0]}), which encodes occlusion and pointer times that "
            "UniBiomed does not have; use a SAM 2.0 file, such as sam2_hiera_large.pt of July 2024."
        )
    return unique(found, lambda name: sam2.PREFIX + release_name(name), str(file))


def recognise_sam2(tensors: Mapping[str, Tensor], where: str) -> Sam2Config:
    """The SAM2 variant whose tensors these are; nearly all must agree, the strict check names the others.

    Raises:
        InputError: no known variant comes close.
    """
    scores = {}
    for variant, config in SAM2_VARIANTS.items():
        expected = {name: row.shape for row in sam2.rows(config) for name in row.names}
        agreeing = sum(name in tensors and tensors[name].shape == shape for name, shape in expected.items())
        scores[variant] = agreeing / len(expected)
    best = max(scores, key=scores.__getitem__)
    if scores[best] < 0.9:
        raise InputError(
            f"{where} holds no SAM2 of a known size ({scores[best]:.0%} of the tensors of the nearest one, "
            f"{best}); known are {', '.join(SAM2_VARIANTS)}."
        )
    return SAM2_VARIANTS[best]


# ------------------------------------------------------------------------------------------------------------
# Names


def release_name(name: str) -> str:
    """The canonical name; `gamma` and `g_weight` are the same tensor in files of different age."""
    return name.removesuffix(".gamma") + ".g_weight" if name.endswith(".gamma") else name


def training_name(name: str) -> str:
    """A name in a training .pth as the released one; adapters keep lora_A.weight and lora_B.weight."""
    name = name.removeprefix("mllm.model.")
    if name.startswith("language_model.base_model.model."):
        name = "language_model." + name.removeprefix("language_model.base_model.model.")
    for suffix in ("weight", "bias"):
        name = name.replace(f".base_layer.{suffix}", f".{suffix}")
    return release_name(name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B."))


def unique(tensors: Mapping[str, Tensor], rename: Callable[[str], str], where: str) -> dict[str, Tensor]:
    """Rename tensors.

    Raises:
        InputError: two of them are the same tensor under two names.
    """
    result, origin = {}, {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new in result:
            raise InputError(f"{where} sets {new} twice, as {origin[new]} and as {name}; remove one of them.")
        result[new], origin[new] = tensor, name
    return result


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of a downloaded checkpoint.")


# ------------------------------------------------------------------------------------------------------------
# Tensors made here


def _drawn(shape: tuple[int, ...], bound: float, seed: int) -> Tensor:
    """Uniform in [-bound, bound): torch's default for the weight and the bias of a linear layer."""

    def read() -> np.ndarray:
        return np.random.default_rng(seed).uniform(-bound, bound, shape).astype(np.float32)

    return Tensor(np.dtype(np.float32), shape, read, "new")


def _with_new_rows(table: Tensor, rows: int, seed: int) -> Tensor:
    """A vocabulary table lengthened to `rows` by draws from N(0, 0.02)."""
    missing = (rows - table.shape[0], *table.shape[1:])

    def read() -> np.ndarray:
        new = np.random.default_rng(seed).normal(0, NEW_ROW_SCALE, missing)
        return np.concatenate([table.read(), new.astype(table.dtype)])

    return Tensor(table.dtype, (rows, *table.shape[1:]), read, table.file)


def _merged(kernel: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A in float32, rounded once to W's number format."""

    def read() -> np.ndarray:
        return updated(kernel.read(), b.read(), a.read(), scale)

    return Tensor(kernel.dtype, kernel.shape, read, kernel.file)
