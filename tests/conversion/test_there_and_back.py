"""Conversion: the tables, and the way there and back in every bit."""

import dataclasses
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from micro_checkpoint import (
    BFLOAT16,
    MICRO,
    SMALL,
    assert_same_tensors,
    random_tensors,
    read_all,
    run_command,
    tied,
    write_released,
)
from places import FILES

from unibiomed_jax import checkpoint
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.presets import LANGUAGE_MODELS, SAM2_VARIANTS
from unibiomed_jax.conversion import from_torch, sources, to_torch
from unibiomed_jax.conversion.reading import INDEX
from unibiomed_jax.conversion.rows import Rearrangement, Row, contiguous, copy
from unibiomed_jax.conversion.tables import model_rows, sam2
from unibiomed_jax.conversion.tables.qwen2 import TORCH_EMBEDDING, TORCH_HEAD
from unibiomed_jax.conversion.writing import BLOCK, DirectFile, write_safetensors
from unibiomed_jax.errors import InputError
from unibiomed_jax.parameters import abstract_params, flatten, unflatten
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import FSDP

TSV = FILES / "weights.tsv"


# ------------------------------------------------------------------------------------------------------------
# Tables


def test_tables_list_every_released_tensor_with_its_shape():
    released = {}
    for line in TSV.read_text().splitlines()[1:]:
        name, shape, _ = line.split("\t")
        released[name] = tuple(map(int, shape.split("x")))
    assert len(released) == 1541
    assert {name: row.shape for row in model_rows(ModelConfig()) for name in row.names} == released


@pytest.mark.parametrize("config", [ModelConfig(), SMALL, tied(SMALL)], ids=["released", "small", "tied"])
def test_tables_fill_the_models_parameters_exactly(config):
    leaves = [(row.path, row.leaf_shape) for row in model_rows(config)]
    assert len(dict(leaves)) == len(leaves), "two rows fill one leaf"
    assert dict(leaves) == {path: leaf.shape for path, leaf in abstract_params(config).items()}


@st.composite
def rearrangements(draw):
    rank = draw(st.integers(1, 5))
    dropped = tuple(sorted(draw(st.sets(st.integers(0, rank - 1), max_size=rank - 1))))
    axes = tuple(draw(st.permutations(range(rank - len(dropped)))))
    shape = tuple(1 if axis in dropped else draw(st.integers(1, 5)) for axis in range(rank))
    return Rearrangement(dropped, axes), shape


@given(rearrangements(), st.data())
def test_every_rearrangement_is_undone_by_its_inverse(rearrangement_and_shape, data):
    rearrangement, shape = rearrangement_and_shape
    tensor = data.draw(arrays(np.uint16, shape))
    leaf = rearrangement.forward(tensor)
    assert leaf.shape == rearrangement.forward_shape(shape)
    assert np.array_equal(rearrangement.inverse(leaf), tensor)
    assert np.array_equal(contiguous(leaf), leaf) and contiguous(leaf).flags.c_contiguous
    target = np.zeros(shape, np.uint16)
    copy(rearrangement.inverse(rearrangement.forward(target)), contiguous(tensor))
    assert np.array_equal(target, tensor)


@given(rearrangements(), st.integers(0, 3), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_rows_give_back_what_they_were_filled_with(rearrangement_and_shape, stacked, extra, seed):
    rearrangement, shape = rearrangement_and_shape
    stack = tuple(range(5, 5 + stacked)) if stacked else None
    padded = shape[0] + extra if not stacked and 0 not in rearrangement.dropped else 0
    row = Row("t.{i}" if stack else "t", "leaf", shape, rearrangement, stack, padded)
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name in row.names}
    leaf = np.full(row.leaf_shape, np.nan, np.float32)
    for name, part in row.parts(leaf):
        part[...] = tensors[name]
    assert np.isnan(leaf).sum() == (np.isnan(row.padding(leaf)).sum() if padded else 0)
    assert_same_tensors({name: contiguous(part) for name, part in row.parts(leaf)}, tensors)


def test_equal_blocks_of_the_trunk_are_stacked_in_their_order():
    rows = {row.path: row for row in sam2.rows(SAM2_VARIANTS["large"])}
    counts = [
        len(rows[f"sam2.image_encoder.trunk.runs.{k}.norm1.scale"].names)
        for k in range(len(SAM2_VARIANTS["large"].hiera.runs()))
    ]
    blocks = [
        int(name.split("blocks.")[1].split(".")[0])
        for path, row in rows.items()
        if path.endswith("norm1.scale") and "trunk.runs" in path
        for name in row.names
    ]
    assert sum(counts) == 48 and blocks == list(range(48))


# ------------------------------------------------------------------------------------------------------------
# There and back


def test_the_golden_checkpoint_comes_back_byte_for_byte(tmp_path):
    from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in MICRO.iterdir()}
    for path in MICRO.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def mixed(config):
    """Number formats as a mixed training leaves them, some of them inside one stack."""
    tensors = random_tensors(config)
    for position, name in enumerate(tensors):
        if name.startswith(("vision_model", "language_model")):
            tensors[name] = tensors[name].astype(np.float16 if position % 7 == 0 else BFLOAT16)
        elif position % 3 == 0:
            tensors[name] = tensors[name].astype(BFLOAT16)
    return tensors


def test_mixed_number_formats_come_back_in_every_bit(tmp_path):
    tensors = mixed(SMALL)
    # Every pattern of a bfloat16 that is a number, and negative zero, must survive a detour over float32.
    patterns = np.arange(2**16, dtype=np.uint16)
    finite = patterns[np.isfinite(patterns.view(BFLOAT16).astype(np.float32))].view(BFLOAT16)
    name = "vision_model.encoder.layers.1.attn.qkv.weight"
    tensors[name] = np.resize(finite, tensors[name].shape)
    write_released(tmp_path / "released", tensors, SMALL)
    from_torch.convert(sources.released(tmp_path / "released"), tmp_path / "converted")
    plan = to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert plan[name] == (BFLOAT16, tensors[name].shape)
    assert_same_tensors(read_all(tmp_path / "back"), tensors)


@pytest.mark.parametrize("direct", ["possible", "short", "unknown", "refused"])
@given(sizes=st.lists(st.integers(0, 4 * BLOCK), min_size=1, max_size=6), random=st.randoms())
def test_a_file_written_past_the_page_cache_holds_every_byte(direct, sizes, random):
    ends = np.cumsum(sizes)
    data = np.random.default_rng(len(sizes)).integers(0, 256, ends[-1], np.uint8)
    pieces = list(zip(ends - sizes, ends, strict=True))
    random.shuffle(pieces)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("unibiomed_jax.conversion.writing.BUFFER_BYTES", 2 * BLOCK)
        path = Path(folder) / "file"
        path.touch()
        if direct == "unknown":
            patch.delattr(os, "O_DIRECT", raising=False)
        file = DirectFile(path)
        write, past_the_cache = os.pwrite, []

        def pwrite(descriptor, piece, offset):
            if descriptor == file.direct:
                if direct == "refused":
                    raise OSError(errno.EINVAL, "Invalid argument")
                piece = piece[:BLOCK] if direct == "short" else piece
                past_the_cache.append(len(piece))
            return write(descriptor, piece, offset)

        patch.setattr(os, "pwrite", pwrite)
        for start, end in pieces:
            file.write(data[start:end], int(start))
        file.close()
        assert path.read_bytes() == data.tobytes()
        if direct == "possible" and file.direct is not None:
            blocks = [max(end // BLOCK - -(-start // BLOCK), 0) for start, end in pieces]
            assert sum(past_the_cache) == BLOCK * sum(blocks)
        elif direct != "short":
            assert not past_the_cache


def test_shards_are_read_and_written(tmp_path):
    tensors = mixed(SMALL)
    plan = {name: (values.dtype, values.shape) for name, values in tensors.items()}
    released = write_released(tmp_path / "released", {}, SMALL)
    (released / "model.safetensors").unlink()
    write_safetensors(released, plan, tensors.items(), shard_bytes=100_000)
    assert len(list(released.glob("*.safetensors"))) > 5 and (released / INDEX).exists()
    from_torch.convert(sources.released(released), tmp_path / "converted")
    to_torch.convert(tmp_path / "converted", tmp_path / "back", shard_bytes=200_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert_same_tensors(read_all(tmp_path / "back"), tensors)
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())


def test_vocabulary_is_padded_with_zeros_inside_and_trimmed_outside(tmp_path):
    tensors = random_tensors(SMALL)
    source = sources.released(write_released(tmp_path / "released", tensors, SMALL))
    from_torch.convert(source, tmp_path / "converted")
    manifest = checkpoint.read_manifest(tmp_path / "converted")
    params = checkpoint.read_part(tmp_path / "converted", "language_model", manifest)
    embedding, head = params["embed_tokens"], params["lm_head.kernel"]
    assert embedding.shape == (384, 16) and head.shape == (16, 384)
    assert np.array_equal(embedding[:300], tensors[TORCH_EMBEDDING]) and not embedding[300:].any()
    assert np.array_equal(head[:, :300], tensors[TORCH_HEAD].T) and not head[:, 300:].any()
    plan = to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert plan[TORCH_EMBEDDING][1] == plan[TORCH_HEAD][1] == (300, 16)


def test_gamma_and_g_weight_are_one_name(tmp_path):
    tensors = random_tensors(SMALL)
    old = {name.replace("g_weight", "gamma"): values for name, values in tensors.items()}
    from_torch.convert(
        sources.released(write_released(tmp_path / "released", old, SMALL)), tmp_path / "converted"
    )
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert_same_tensors(read_all(tmp_path / "back"), tensors)

    both = tensors | {name: values for name, values in old.items() if "gamma" in name}
    with pytest.raises(InputError, match=r"fuser.layers.0.g_weight twice, as .*gamma"):
        sources.released(write_released(tmp_path / "both", both, SMALL))


def test_code_that_the_folder_lacks_is_named(tmp_path, monkeypatch, capsys):
    released = shutil.copytree(MICRO, tmp_path / "released")
    for code, said in (((), True), (("configuration_sa2va_chat.py", "modeling_sa2va_chat.py"), False)):
        for name in code:
            (released / name).write_text("")
        assert run_command(monkeypatch, from_torch, released, tmp_path / "out", "--overwrite") == 0
        assert run_command(monkeypatch, to_torch, tmp_path / "out", tmp_path / "back", "--overwrite") == 0
        needs = "needs configuration_sa2va_chat.py, modeling_sa2va_chat.py beside the weights"
        assert (needs in capsys.readouterr().out) == said


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_comes_back_as_it_was_stored(tmp_path, stored):
    config = tied(SMALL)
    tensors = random_tensors(config)
    if stored:
        tensors[TORCH_HEAD] = tensors[TORCH_EMBEDDING].copy()
    from_torch.convert(
        sources.released(write_released(tmp_path / "released", tensors, config)), tmp_path / "converted"
    )
    assert "language_model.lm_head.kernel" not in checkpoint.read_manifest(tmp_path / "converted").leaves
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert_same_tensors(read_all(tmp_path / "back"), tensors)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    config = tied(SMALL)
    tensors = random_tensors(config)
    tensors[TORCH_HEAD] = tensors[TORCH_EMBEDDING].copy()
    tensors[TORCH_HEAD][3, 5] = -tensors[TORCH_HEAD][3, 5]
    with pytest.raises(InputError, match="ties language_model.lm_head.weight .* contents differ"):
        sources.released(write_released(tmp_path / "released", tensors, config))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_family_converts_at_reduced_width(tmp_path, name):
    full = LANGUAGE_MODELS[name]
    language = dataclasses.replace(
        full, hidden_size=8 * full.num_heads, mlp_dim=24, num_layers=2, vocab_size=300
    )
    config = dataclasses.replace(SMALL, language=language)
    tensors = random_tensors(config)
    source = sources.released(write_released(tmp_path / "released", tensors, config))
    assert source.config == config
    from_torch.convert(source, tmp_path / "converted")
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert_same_tensors(read_all(tmp_path / "back"), tensors)


def test_a_released_folder_in_memory_is_the_converted_one(tmp_path):
    digest = from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    loaded, direct = checkpoint.load(tmp_path / "converted"), from_torch.read_released(MICRO)
    assert loaded.hash == direct.hash == digest and loaded.config == direct.config
    assert_same_tensors(
        {path: np.asarray(leaf) for path, leaf in flatten(direct.params).items()},
        {path: np.asarray(leaf) for path, leaf in flatten(loaded.params).items()},
    )


def test_a_released_folder_goes_straight_to_the_devices():
    layout = Layout.over(jax.devices()[:1], FSDP)
    on_host, placed = from_torch.read_released(MICRO), from_torch.read_released(MICRO, layout.parameter)
    assert placed.hash == on_host.hash and placed.config == on_host.config
    expected = flatten(on_host.params)
    assert flatten(placed.params).keys() == expected.keys()
    for path, leaf in flatten(placed.params).items():
        np.testing.assert_array_equal(leaf, expected[path])
        assert leaf.sharding == layout.parameter(path, leaf.shape)


def test_a_changed_vocabulary_changes_the_exported_config(tmp_path):
    source = sources.released(write_released(tmp_path / "released", random_tensors(SMALL), SMALL))
    from_torch.convert(source, tmp_path / "converted")
    converted = tmp_path / "converted"
    manifest = checkpoint.read_manifest(converted)
    params = {
        part: unflatten(checkpoint.read_part(converted, part, manifest))
        for part in {path.split(".")[0] for path in manifest.leaves}
    }
    config = dataclasses.replace(SMALL, language=dataclasses.replace(SMALL.language, vocab_size=310))
    checkpoint.save(
        tmp_path / "changed", config, params, converted / "tokenizer", release=converted / "release"
    )
    to_torch.convert(tmp_path / "changed", tmp_path / "back")
    assert sources.released(tmp_path / "back").config == config
