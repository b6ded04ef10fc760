"""Released checkpoints in miniature, and other things that the tests of conversion share."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from places import MICRO
from safetensors.numpy import load_file, save_file

from unibiomed_jax import cli
from unibiomed_jax.config.model import LanguageConfig, ModelConfig, VisionConfig
from unibiomed_jax.config.presets import SAM2_VARIANTS
from unibiomed_jax.conversion.reading import Tensor
from unibiomed_jax.conversion.released_config import release_config
from unibiomed_jax.conversion.tables import model_rows

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SMALL = ModelConfig(
    vision=VisionConfig(hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, image_size=28),
    language=LanguageConfig(
        vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=24
    ),
    sam2=SAM2_VARIANTS["micro"],
)


def random_tensors(config, seed=0, dtype=np.float32):
    """Every tensor of a released checkpoint of `config`, random."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(row.shape).astype(dtype) for row in model_rows(config) for name in row.names
    }


def micro_tensors():
    return load_file(MICRO / "model.safetensors")


def write_released(folder, tensors, config=None, **changes):
    """A released folder: the tokenizer of the golden checkpoint, its config.json or that of `config`."""
    folder.mkdir(exist_ok=True)
    for path in MICRO.iterdir():
        if path.suffix in (".json", ".txt") and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    values = release_config(config) if config else json.loads((MICRO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_all(folder):
    """Every tensor of a released folder, read by the safetensors library; bfloat16 as its bits."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(found, expected):
    """Same names, number formats, shapes and bits."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        assert found[name].tobytes() == values.tobytes(), name


def lazy(tensors):
    """Arrays as tensors that a source would hold."""
    return {
        name: Tensor(values.dtype, values.shape, lambda values=values: values, "memory")
        for name, values in tensors.items()
    }


def tied(config):
    return dataclasses.replace(
        config, language=dataclasses.replace(config.language, tie_word_embeddings=True)
    )


def run_command(monkeypatch, module, *arguments):
    """Run the `unibiomed convert` command of a module of the conversion in this process; its exit code."""
    name = module.__name__.rpartition(".")[2].replace("_", "-")
    monkeypatch.setattr("sys.argv", ["unibiomed", "convert", name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code
