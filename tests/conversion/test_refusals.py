"""Conversion: what is refused, with the reason, and that nothing is left half-written."""

import dataclasses
import errno
import json
import os
import shutil
import struct
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from micro_checkpoint import (
    MICRO,
    SMALL,
    lazy,
    micro_tensors,
    random_tensors,
    run_command,
    write_released,
)
from safetensors.numpy import save_file

from unibiomed_jax.config.presets import MODELS, SAM2_VARIANTS
from unibiomed_jax.conversion import from_torch, sources, to_torch
from unibiomed_jax.conversion.options import FromTorchOptions
from unibiomed_jax.conversion.reading import INDEX, read_folder, read_safetensors, read_torch
from unibiomed_jax.conversion.released_config import model_config, release_config
from unibiomed_jax.conversion.tables import sam2
from unibiomed_jax.errors import DiskFullError, InputError

TENSORS = micro_tensors()
few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ------------------------------------------------------------------------------------------------------------
# Tensors


names = st.sampled_from(sorted(TENSORS))


@given(names)
@few
def test_a_dropped_tensor_is_named(tmp_path, name):
    folder = write_released(tmp_path / "released", {n: v for n, v in TENSORS.items() if n != name})
    with pytest.raises(InputError) as error:
        sources.released(folder)
    assert f"{name} is missing" in str(error.value)


@given(names, st.sampled_from(["{}.weight", "x{}", "model.{}", "{}_orig"]))
@few
def test_a_renamed_tensor_is_named_with_the_nearest_name(tmp_path, name, pattern):
    renamed = pattern.format(name)
    tensors = {(renamed if n == name else n): v for n, v in TENSORS.items()}
    with pytest.raises(InputError) as error:
        sources.released(write_released(tmp_path / "released", tensors))
    assert f"{renamed} has no place" in str(error.value)
    assert f"nearest missing name: {name})" in str(error.value)


@given(names, st.integers(0, 3))
@few
def test_a_reshaped_tensor_is_named(tmp_path, name, way):
    values = TENSORS[name]
    axis = way % values.ndim
    changed = (
        np.concatenate([values, values], axis)
        if way < 2
        else values[None]
        if way == 2
        else np.ascontiguousarray(values.reshape(-1, 1))
    )
    if changed.shape == values.shape:
        changed = changed[None]
    with pytest.raises(InputError) as error:
        sources.released(write_released(tmp_path / "released", TENSORS | {name: changed}))
    assert f"{name} has shape {changed.shape}, not {values.shape}" in str(error.value)


def test_an_extra_tensor_is_named(tmp_path):
    extra = {"vision_model.encoder.layers.0.attn.q_norm.weight": np.ones(4, np.float32)}
    with pytest.raises(InputError, match="q_norm.weight has no place in this model"):
        sources.released(write_released(tmp_path / "released", TENSORS | extra))


def test_many_offenders_are_counted(tmp_path):
    kept = {name: values for name, values in TENSORS.items() if not name.startswith("vision_model")}
    with pytest.raises(InputError, match="29 more are missing"):
        sources.released(write_released(tmp_path / "released", kept))


@pytest.mark.parametrize("variant", SAM2_VARIANTS)
def test_each_size_of_sam2_is_recognised(variant):
    shapes = {name: np.broadcast_to(np.float32(0), row.shape) for row in sam2.rows(SAM2_VARIANTS[variant])
              for name in row.names}  # fmt: skip
    assert sources.recognise_sam2(lazy(shapes), "here") == SAM2_VARIANTS[variant]


def test_an_unknown_size_of_sam2_is_refused():
    with pytest.raises(InputError, match="here holds no SAM2 of a known size"):
        sources.recognise_sam2(lazy({"x": np.zeros(3, np.float32)}), "here")


def test_recognised_sizes_are_those_of_the_golden_checkpoint():
    assert sources.recognise_sam2(lazy(TENSORS), "here") == SAM2_VARIANTS["micro"]


# ------------------------------------------------------------------------------------------------------------
# Files


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        sources.released(tmp_path / "nowhere")
    shutil.copytree(MICRO, tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        sources.released(tmp_path / "part")
    (tmp_path / "part" / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing"):
        sources.released(tmp_path / "part")


@given(st.floats(0, 1, exclude_max=True))
@few
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, fraction):
    whole = (MICRO / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(InputError, match="cut.safetensors .*download it again"):
        read_safetensors(path)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_no_header_are_refused(tmp_path, content):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(InputError, match="noise.safetensors has a corrupt"):
        read_safetensors(path)


def header(path, text, data=b""):
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
    return path


@pytest.mark.parametrize(
    ("entries", "data", "reason"),
    [
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
         4, "'a' occurs twice"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', 4, "'a' .size and shape differ"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}', 0, "'a' .size and shape differ"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, "'a' .overlap or gap"),
        ('{"a":{"dtype":"F32","shape":[1]}}', 4, "corrupt entry for 'a'"),
        ('{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', 8, "'a' holds I64 numbers"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 9, "longer than its header says"),
        ("[]", 0, "not a table of tensors"),
    ],
)  # fmt: skip
def test_a_corrupt_header_is_explained(tmp_path, entries, data, reason):
    with pytest.raises(InputError, match=reason):
        read_safetensors(header(tmp_path / "x.safetensors", entries, bytes(data)))


def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        read_safetensors(path)


@pytest.fixture
def sharded(tmp_path):
    tensors = {name: np.full(3, k, np.float32) for k, name in enumerate("abcd")}
    save_file({name: tensors[name] for name in "ab"}, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in "cd"}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors"}
    weight_map |= {"c": "two.safetensors", "d": "two.safetensors"}
    return tmp_path, weight_map


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_must_agree_with_their_index(sharded):
    folder, weight_map = sharded
    write_index(folder, weight_map)
    assert sorted(read_folder(folder)) == list("abcd")
    write_index(folder, {name: file for name, file in weight_map.items() if name != "c"})
    with pytest.raises(InputError, match="two.safetensors holds 'c' but .* does not name it"):
        read_folder(folder)
    write_index(folder, weight_map | {"e": "two.safetensors"})
    with pytest.raises(InputError, match="two.safetensors lacks 'e'"):
        read_folder(folder)
    write_index(folder, weight_map | {"c": "one.safetensors"})
    with pytest.raises(InputError, match="holds 'c' but .* says one.safetensors"):
        read_folder(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(InputError, match="'a' occurs twice"):
        read_folder(folder)
    (folder / INDEX).write_text('{"weight_map": ["one.safetensors"]}')
    with pytest.raises(InputError, match="no table 'weight_map'"):
        read_folder(folder)


def test_a_missing_shard_is_named(sharded):
    folder, weight_map = sharded
    write_index(folder, weight_map)
    (folder / "two.safetensors").unlink()
    with pytest.raises(InputError, match="two.safetensors is missing"):
        read_folder(folder)


@pytest.mark.parametrize(
    "name", ["../two.safetensors", "/etc/passwd", "sub/two.safetensors", "..", "", "a\\b"]
)
def test_an_index_cannot_name_a_file_elsewhere(sharded, name):
    folder, weight_map = sharded
    write_index(folder, weight_map | {"d": name})
    with pytest.raises(InputError, match="not a plain file name"):
        read_folder(folder)


def test_a_deepspeed_folder_is_refused_with_the_remedy(tmp_path):
    folder = tmp_path / "iter_1000.pth"
    folder.mkdir()
    for call in (
        read_torch,
        lambda path, _: from_torch.open_source(FromTorchOptions(path, tmp_path / "out")),
    ):
        with pytest.raises(InputError, match=r"DeepSpeed shards; join them .*zero_to_fp32.py"):
            call(folder, "state_dict")


def test_a_pth_without_torch_or_base_is_explained(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.pth").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"needs PyTorch.*jax\[parity\]"):
        patch.setitem(sys.modules, "torch", None)
        read_torch(tmp_path / "x.pth", "state_dict")
    assert run_command(monkeypatch, from_torch, tmp_path / "x.pth", tmp_path / "out") == 2
    assert "--base" in capsys.readouterr().err


def test_names_in_a_training_file_are_the_released_ones():
    decoder = "mllm.model.language_model.base_model.model"
    pairs = {
        f"{decoder}.model.layers.3.self_attn.q_proj.lora_A.default.weight":
            "language_model.model.layers.3.self_attn.q_proj.lora_A.weight",
        f"{decoder}.model.layers.3.mlp.up_proj.base_layer.weight":
            "language_model.model.layers.3.mlp.up_proj.weight",
        f"{decoder}.model.layers.3.self_attn.q_proj.base_layer.bias":
            "language_model.model.layers.3.self_attn.q_proj.bias",
        f"{decoder}.lm_head.weight": "language_model.lm_head.weight",
        f"{decoder}.model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "mllm.model.mlp1.0.weight": "mlp1.0.weight",
        "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.gamma":
            "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.g_weight",
        "text_hidden_fcs.0.bias": "text_hidden_fcs.0.bias",
    }  # fmt: skip
    assert {name: sources.training_name(name) for name in pairs} == pairs


# ------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("name", MODELS)
def test_release_configs_say_everything_but_sam2(name):
    config = MODELS[name]
    values = json.loads(json.dumps(release_config(config)))
    assert model_config(values, config.sam2) == config
    assert release_config(config, values) is values


def change(values, path, value):
    *parents, last = path.split(".")
    node = values
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("model_type", "llava", "'model_type' is 'llava'"),
        ("select_layer", -2, "'select_layer' is -2"),
        ("template", "internlm2_chat", "'template' is 'internlm2_chat', .* only phi3_chat"),
        ("template", None, "lacks 'template'"),
        ("ps_version", "v3", "'ps_version' is 'v3'"),
        ("downsample_ratio", 0.3, "'downsample_ratio' is 0.3"),
        ("downsample_ratio", "half", "'downsample_ratio' must be of type float"),
        ("force_image_size", 448, "force_image_size 448 differs"),
        ("use_llm_lora", 128, "'use_llm_lora' is 128, .*merge the adapters"),
        ("vision_config", None, "vision_config must be a table"),
        ("vision_config.model_type", "siglip_vision_model", "must be an InternViT"),
        ("vision_config.qk_normalization", True, "'qk_normalization' is True"),
        ("vision_config.qk_normalization", None, "'qk_normalization' is True"),
        ("vision_config.norm_type", "rms_norm", "'norm_type' is 'rms_norm'"),
        ("vision_config.hidden_act", "gelu_tanh", "exact GELU"),
        ("vision_config.hidden_size", None, "lacks 'hidden_size'"),
        ("vision_config.num_attention_heads", 7, "'num_attention_heads' 7 does not divide"),
        ("llm_config.architectures", ["InternLM2ForCausalLM"], "InternLM2ForCausalLM .* is not supported"),
        ("llm_config.architectures", ["Phi3ForCausalLM"], "Phi3ForCausalLM"),
        ("llm_config.model_type", "qwen3", "qwen3"),
        ("llm_config.rope_theta", None, "lacks 'rope_theta'"),
        ("llm_config.use_sliding_window", True, "sliding-window"),
        ("llm_config.head_dim", 128, "'head_dim' 128"),
        ("llm_config.num_key_value_heads", 3, "'num_key_value_heads' 3 does not divide"),
        ("llm_config.vocab_size", True, "'vocab_size' must be of type int"),
        ("llm_config.hidden_size", -64, "must not be negative"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_with_the_reason(path, value, reason):
    values = change(json.loads((MICRO / "config.json").read_text()), path, value)
    with pytest.raises(InputError, match=reason):
        model_config(values, SAM2_VARIANTS["micro"])


def test_a_config_that_lies_about_the_weights_is_refused(tmp_path):
    values = json.loads((MICRO / "config.json").read_text())
    for path, value in (("llm_config.vocab_size", 300), ("vision_config.num_hidden_layers", 3)):
        changed = change(json.loads(json.dumps(values)), path, value)
        folder = write_released(tmp_path / "released", TENSORS, **changed)
        with pytest.raises(InputError, match="does not fit its config.json"):
            sources.released(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, language=dataclasses.replace(SMALL.language, vocab_size=291))
    folder = write_released(tmp_path / "released", random_tensors(config), config)
    message = "has 292 tokens but the embedding only 291 rows"
    with pytest.raises(InputError, match=message):
        from_torch.convert(sources.released(folder), tmp_path / "out")
    with pytest.raises(InputError, match=message):
        from_torch.read_released(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="tokenizer_config.json is missing"):
        from_torch.convert(sources.released(folder), tmp_path / "out")
    assert os.listdir(tmp_path) == ["released"]


def test_rope_scaling_and_template_spelling_change_nothing():
    values = json.loads((MICRO / "config.json").read_text())
    expected = model_config(values, SAM2_VARIANTS["micro"])
    values["llm_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    values["template"] = "phi3-chat"
    theta = values["llm_config"].pop("rope_theta")
    values["llm_config"]["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    assert model_config(values, SAM2_VARIANTS["micro"]) == expected


# ------------------------------------------------------------------------------------------------------------
# Nothing half-written


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert run_command(monkeypatch, from_torch, MICRO, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "exists; choose another folder or pass --overwrite" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert (tmp_path / "out" / "precious").exists()
    assert run_command(monkeypatch, from_torch, MICRO, tmp_path / "out", "--overwrite") == 0
    assert "Converted 425 tensors" in capsys.readouterr().out
    assert not (tmp_path / "out" / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("failure", "caught", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "disk of .* is full"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: write: No space left on device"),
            InputError,
            "disk of .* is full",
        ),
    ],
    ids=["interrupt", "full", "full-in-orbax"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch, failure, caught, message, overwrite):
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
    parts = from_torch.build_parts

    def fails(*arguments):
        yield next(iter(parts(*arguments)))
        raise failure

    monkeypatch.setattr(from_torch, "build_parts", fails)
    with pytest.raises(caught, match=message):
        from_torch.convert(sources.released(MICRO), tmp_path / "out", overwrite=overwrite)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == (
        ["out", "out/precious"] if overwrite else []
    )


@pytest.mark.parametrize(
    ("failure", "caught"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError),
    ],
    ids=["interrupt", "full", "quota"],
)
def test_a_failure_on_the_way_back_leaves_nothing_half_written(tmp_path, monkeypatch, failure, caught):
    from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    write, written = os.pwrite, []

    def pwrite(*arguments):
        written.append(arguments)
        if len(written) > 20:
            raise failure
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(caught):
        to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def test_a_failure_leaves_no_thread_behind(tmp_path, monkeypatch):
    """One that the garbage collector ends may wait for a lock that the collected program holds."""
    from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    failure = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "pwrite", lambda *arguments: (_ for _ in ()).throw(failure))
    before = threading.active_count()
    with pytest.raises(OSError) as caught:
        to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert threading.active_count() <= before, caught  # whose traceback keeps every frame alive

    def write(folder, config, parts, lora):
        next(parts)
        raise failure

    monkeypatch.setattr("unibiomed_jax.checkpoint.write", write)
    with pytest.raises(OSError) as caught:
        from_torch.convert(sources.released(MICRO), tmp_path / "again")
    assert threading.active_count() <= before, caught


def test_other_failures_of_the_disk_are_one_line_too(monkeypatch, tmp_path, capsys):
    failure = OSError(errno.EIO, "Input/output error")  # which does not say where
    monkeypatch.setattr(os, "pwrite", lambda *arguments: (_ for _ in ()).throw(failure))
    from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    assert run_command(monkeypatch, to_torch, tmp_path / "converted", tmp_path / "back") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {tmp_path}/.back.partial-")
    assert "/model.safetensors cannot be used (Input/output error); " in line
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def test_a_small_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(InputError, match="needs 0.00 GB but only 0.00 GB are free"):
        from_torch.convert(sources.released(MICRO), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_exported(tmp_path, monkeypatch, capsys):
    from_torch.convert(sources.released(MICRO), tmp_path / "converted")
    shutil.rmtree(tmp_path / "converted" / "params" / "sam2")
    assert run_command(monkeypatch, to_torch, tmp_path / "converted", tmp_path / "back") == 2
    assert "params/sam2 cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert run_command(monkeypatch, to_torch, tmp_path / "converted", tmp_path / "back", "--adapter") == 2
    assert "no adapters" in capsys.readouterr().err
