"""The converted folder: what is saved is what is loaded, on any device and in any dtype; damage is named."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from micro_checkpoint import BFLOAT16, MICRO, SMALL, tied

from unibiomed_jax import checkpoint
from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.config.precision import BFLOAT16 as BFLOAT16_EVERYWHERE
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import LoraInfo, abstract_params, flatten, unflatten
from unibiomed_jax.training import lora


@pytest.fixture(scope="module")
def params():
    """Random parameters of a small model, some of them bfloat16."""
    rng = np.random.default_rng(0)
    return unflatten(
        {
            path: rng.standard_normal(leaf.shape).astype(BFLOAT16 if ".mlp." in path else np.float32)
            for path, leaf in abstract_params(SMALL).items()
        }
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MICRO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def saved(params, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(folder, SMALL, params, tokenizer)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def assert_same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_what_is_saved_is_loaded(saved, params):
    loaded = checkpoint.load(saved)
    assert loaded.config == SMALL and loaded.lora is None
    assert sorted(path.name for path in loaded.tokenizer.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert_same(loaded.params, params)


def test_dtypes_are_cast_part_by_part(saved, params):
    loaded = flatten(checkpoint.load(saved, dtype={"sam2": "bfloat16", "mlp1": "float32"}).params)
    for path, leaf in flatten(params).items():
        wanted = {"sam2": jnp.bfloat16, "mlp1": jnp.float32}.get(path.split(".")[0], leaf.dtype)
        assert loaded[path].dtype == wanted, path
        assert np.array_equal(np.asarray(loaded[path]), leaf.astype(wanted)), path
    assert {leaf.dtype for leaf in flatten(checkpoint.load(saved, dtype="float32").params).values()} == {
        np.dtype("float32")
    }


def test_parameters_go_where_they_are_sent(saved, params):
    mesh = jax.make_mesh((1,), ("fsdp",))
    asked = {}

    def place(path, shape):
        axis = "fsdp" if len(shape) == 3 else None
        asked[path] = jax.NamedSharding(mesh, jax.P(axis))
        return asked[path]

    loaded = flatten(checkpoint.load(saved, sharding=place).params)
    assert loaded.keys() == asked.keys()
    assert all(leaf.sharding == asked[path] for path, leaf in loaded.items())
    assert_same(unflatten(loaded), params)


def test_the_tree_is_that_of_the_model_and_its_state_can_be_saved(params, tokenizer, tmp_path):
    state = nnx.state(nnx.eval_shape(lambda: UniBiomedModel(SMALL, FLOAT32, rngs=nnx.Rngs(0))), nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    digest = checkpoint.save(tmp_path / "model", SMALL, state, tokenizer)
    assert digest == checkpoint.hash_of(params) == checkpoint.hash_of(state)


def test_the_folder_may_be_named_from_where_one_is(saved, params, monkeypatch):
    monkeypatch.chdir(saved.parent)
    loaded = flatten(checkpoint.load("model").params)
    assert all((value == loaded[path]).all() for path, value in flatten(params).items())
    manifest = checkpoint.read_manifest("model")
    assert checkpoint.read_part("model", "mlp1", manifest)


def test_the_hash_is_that_of_the_weights(saved, params, tokenizer, tmp_path):
    assert checkpoint.load(saved).hash == checkpoint.hash_of(params)
    reordered = dict(reversed(params.items()))
    assert checkpoint.save(tmp_path / "again", SMALL, reordered, tokenizer) == checkpoint.hash_of(params)
    changed = flatten(params)
    changed["sam2.no_obj_ptr"] = changed["sam2.no_obj_ptr"] + np.float32(1e-7)
    assert checkpoint.hash_of(unflatten(changed)) != checkpoint.hash_of(params)


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_are_merged_or_kept_apart(params, tokenizer, tmp_path, merge):
    rng = np.random.default_rng(1)
    flat = flatten(params)
    for target in lora.DECODER_LAYERS:
        layers, features_in, features_out = flat[f"{target}.kernel"].shape
        flat[f"{target}.lora.a"] = rng.standard_normal((layers, features_in, 2)).astype(np.float32)
        flat[f"{target}.lora.b"] = rng.standard_normal((layers, 2, features_out)).astype(np.float32)
    info = LoraInfo(rank=2, alpha=6.0)
    checkpoint.save(tmp_path / "model", SMALL, unflatten(flat), tokenizer, lora=info)
    loaded = checkpoint.load(tmp_path / "model", merge_lora=merge)
    if not merge:
        assert loaded.lora == info
        assert_same(loaded.params, unflatten(flat))
        return
    assert loaded.lora is None
    found = flatten(loaded.params)
    assert found.keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        expected = leaf.astype(np.float64)
        if f"{path.removesuffix('.kernel')}.lora.a" in flat:
            linear = path.removesuffix(".kernel")
            a, b = (flat[f"{linear}.lora.{x}"].astype(np.float64) for x in "ab")
            expected = expected + 3.0 * np.einsum("lir,lro->lio", a, b)
            tolerance = np.abs(expected).max() * (2.0**-8 if leaf.dtype == BFLOAT16 else 1e-6)
            assert np.abs(np.asarray(found[path], np.float64) - expected).max() <= tolerance, path
        else:
            assert np.array_equal(np.asarray(found[path]), leaf), path


# ------------------------------------------------------------------------------------------------------------
# Refused


def test_an_existing_folder_is_not_overwritten_unasked(saved, params, tokenizer, tmp_path):
    with pytest.raises(InputError, match="exists; choose another folder"):
        checkpoint.save(saved, SMALL, params, tokenizer)
    target = shutil.copytree(saved, tmp_path / "model")
    (target / "stale").write_text("")
    checkpoint.save(target, SMALL, params, tokenizer, overwrite=True)
    assert not (target / "stale").exists()
    assert os.listdir(tmp_path) == ["model"]


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not a complete checkpoint \(config.json is missing\); convert"):
        checkpoint.load(tmp_path)
    assert not checkpoint.is_checkpoint(tmp_path) and not checkpoint.is_checkpoint(MICRO)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_truncated_file_is_named(copied):
    path = largest_file(copied / "params" / "vision_model")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="params/vision_model cannot be read .*convert the release again"):
        checkpoint.load(copied)


def test_a_parameter_of_other_bytes_is_named(copied, params):
    """Orbax has no checksum of the numbers themselves."""
    stored = params["mlp1"]["linear1"]["kernel"].tobytes()
    path = next(
        p for p in (copied / "params" / "mlp1").rglob("*") if p.is_file() and stored in p.read_bytes()
    )
    content = bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 1
    path.write_bytes(content)
    reason = r"model: mlp1\.linear1\.kernel is damaged .*; convert the release again"
    for dtype in (None, "bfloat16"):
        with pytest.raises(InputError, match=reason):
            checkpoint.load(copied, dtype=dtype)
    with pytest.raises(InputError, match=reason):
        checkpoint.read_part(copied, "mlp1", checkpoint.read_manifest(copied))


@pytest.mark.parametrize("name", ["params/mlp1", "manifest.json", "config.json"])
def test_a_missing_file_is_named(copied, name):
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=f"{os.path.basename(name)}.*; convert the release again"):
        checkpoint.load(copied)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_damaged_file_is_named(copied, name):
    (copied / name).write_text((copied / name).read_text()[:-20])
    with pytest.raises(InputError, match=f"{name} is damaged"):
        checkpoint.load(copied)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_manifest_that_was_edited_is_refused(copied):
    edit(copied / "manifest.json", lambda m: m["leaves"]["mlp1.norm.scale"].update(dtype="bfloat16"))
    with pytest.raises(InputError, match="was changed after it was written"):
        checkpoint.load(copied)
    edit(copied / "manifest.json", lambda m: m.pop("hash"))
    with pytest.raises(InputError, match="manifest.json is damaged"):
        checkpoint.load(copied)


def test_a_later_format_is_refused(copied):
    edit(copied / "manifest.json", lambda m: m.update(format=2))
    with pytest.raises(InputError, match="format 2, this version reads 1"):
        checkpoint.load(copied)


@pytest.mark.parametrize(
    ("part", "field", "value", "reason"),
    [
        ("vision", "hidden_size", 32, r"mlp1.linear1.kernel should be \(128, 16\) but is \(64, 16\)"),
        ("vision", "num_layers", 3, r"\(3, .* but is \(2,"),
        ("language", "tie_word_embeddings", True, "lm_head.kernel should be absent but is"),
        ("vision", "patch_size", 0, "no model can be built from"),
        ("language", "hiden_size", 16, "Unknown field 'hiden_size' .* did you mean 'hidden_size'"),
        ("sam2", "memory_dim", "8", "memory_dim must be of type int"),
        ("language", "rope_theta", None, "rope_theta must be of type float, not None"),
    ],
)
def test_a_wrong_config_is_refused(copied, part, field, value, reason):
    edit(copied / "config.json", lambda config: config[part].update({field: value}))
    with pytest.raises(InputError, match=reason):
        checkpoint.load(copied)


@pytest.mark.parametrize(
    "precision", [to_dict(FLOAT32), to_dict(BFLOAT16_EVERYWHERE), {"of": "another time"}]
)
def test_the_precision_that_version_0_1_wrote_is_passed_over(copied, params, precision):
    edit(copied / "config.json", lambda config: config.update(precision=precision))
    assert checkpoint.read_config(copied) == SMALL
    assert_same(checkpoint.load(copied).params, params)


def test_version_0_1_wrote_no_other_table(copied):
    edit(copied / "config.json", lambda config: config.update(precison={}))
    with pytest.raises(InputError, match="Unknown field 'precison' in .*config.json"):
        checkpoint.read_config(copied)


def test_a_leaf_that_is_not_in_the_manifest_is_refused(params, tokenizer, tmp_path):
    checkpoint.save(tmp_path / "model", tied(SMALL), params, tokenizer)
    with pytest.raises(InputError, match="lm_head.kernel should be"):
        checkpoint.load(tmp_path / "model")
