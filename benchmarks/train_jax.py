"""An update of the parameters by this library: the worker that `train.py` drives."""

from __future__ import annotations

import dataclasses
import platform
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from predict import measure_ceilings
from random_model import SIZES, describe, random_array
from worker import serve

from unibiomed_jax import runtime
from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import PrecisionName, find_precision
from unibiomed_jax.parameters import Parameters, count, matches, partition
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training import flops
from unibiomed_jax.training.config import LoraConfig, LossConfig, OptimConfig, TrainConfig
from unibiomed_jax.training.experiment import load_experiment
from unibiomed_jax.training.forward import TokenIds
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.losses import IGNORE
from unibiomed_jax.training.step import TrainStep, init_state

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the experiments import from one another
TINY = ROOT / "configs" / "unibiomed_tiny" / "1_base.py"
# Samples of a batch, and tokens of text beside those of the tile.
SAMPLES = {"full": 1, "tiny": 8, "micro": 2}
TEXT_TOKENS = {"full": 44, "tiny": 64, "micro": 24}
# Tokens of text at the end that are learned; the last but one is [SEG].
ANSWER_TOKENS = 20
# Parameters of SAM2's memory, which single images do not reach and the torch worker does not have.
MEMORY = (
    "sam2.memory_*",
    "sam2.maskmem_tpos_enc",
    "sam2.mask_downsample.*",
    "sam2.no_mem_pos_enc",
    "sam2.no_obj_ptr",
    "sam2.obj_ptr_proj.*",
)


def training_config(size: str, precision: PrecisionName) -> TrainConfig:
    """The recipe at one of the three sizes."""
    recipe = TrainConfig(optim=OptimConfig(accumulate=1))
    config = {
        "full": lambda: recipe,
        "tiny": lambda: load_experiment(str(TINY)),
        "micro": lambda: dataclasses.replace(
            recipe, model=SIZES["micro"], lora=LoraConfig(rank=4, alpha=8.0), loss=LossConfig(num_points=256)
        ),
    }[size]()
    return dataclasses.replace(config, precision=find_precision(precision))


def random_batch(config: ModelConfig, samples: int, text: int) -> tuple[dict[str, np.ndarray], TokenIds]:
    """Images of one tile, each with a question, an answer, and a disc as the mask of its one [SEG]."""
    rng = np.random.default_rng(0)
    ids = TokenIds(image=config.language.vocab_size - 1, seg=config.language.vocab_size - 2)
    visual, tokens = config.tokens_per_tile, config.tokens_per_tile + text
    input_ids = rng.integers(0, ids.seg, (samples, tokens), np.int32)
    input_ids[:, 4 : 4 + visual] = ids.image
    input_ids[:, -2] = ids.seg
    learned = np.arange(tokens) >= tokens - ANSWER_TOKENS
    tile, side, mask = config.vision.image_size, config.sam2.image_size, config.sam2.image_size // 4
    row, column = np.ogrid[:mask, :mask]
    disc = ((row - mask / 2) ** 2 + (column - mask / 2) ** 2 < (mask / 4) ** 2).astype(np.uint8)
    batch = {
        "pixel_values": rng.integers(0, 256, (samples, 1, tile, tile, 3), np.uint8),
        "input_ids": input_ids,
        "labels": np.where(learned, input_ids, np.int32(IGNORE)),
        "sam_pixels": rng.integers(0, 256, (samples, 1, side, side, 3), np.uint8),
        "masks": np.broadcast_to(disc, (samples, 1, 1, mask, mask)),
        "object_valid": np.ones((samples, 1), bool),
        "frame_valid": np.ones((samples, 1), bool),
        "tile_valid": np.ones((samples, 1), bool),
        "token_valid": np.ones((samples, tokens), bool),
    }
    return batch, ids


def peak_bytes() -> int:
    """The most memory ever held: of the device, or of the process on a CPU."""
    statistics = jax.devices()[0].memory_stats()
    if statistics is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics["peak_bytes_in_use"]


def prepare(setup: dict):
    """Make model, optimiser state and batch, and store the batch where the torch worker finds it."""
    runtime.prepare()
    config = training_config(setup["size"], setup["precision"])
    samples = setup["samples"] or SAMPLES[setup["size"]]
    batch, ids = random_batch(config.model, samples, TEXT_TOKENS[setup["size"]])
    np.savez(setup["batch"], **batch, image_id=ids.image, seg_id=ids.seg)

    layout = Layout.over(jax.devices()[:1])
    graphdef, shapes = structure(config)
    trainable, frozen = partition(shapes, config.freeze.trainable, config.freeze.frozen)
    language = config.model.language
    facts = {
        "name": f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}",
        "backend": jax.default_backend(),
        "precision": describe(config.precision),
        "config": to_dict(config.model),
        "derived": {"grid": config.model.sam2.grid, "stage_dims": config.model.sam2.hiera.stage_dims},
        "lora": to_dict(config.lora),
        "loss": to_dict(config.loss),
        "optim": to_dict(config.optim),
        "all_trains": config.freeze.trainable == ("*",),
        "recompute_language": config.remat.language != "none",
        "trainable": count(trainable, language.padded_vocab_size - language.vocab_size),
        "trainable_memory": count({path: leaf for path, leaf in trainable.items() if matches(path, MEMORY)}),
        "samples": samples,
        "tokens": batch["input_ids"].size,
        "flops": flops.step_flops(
            flops.forward_work(config.model, batch, config.lora.rank), trainable.keys()
        ),
        "peak_flops": flops.peak_flops(jax.devices()[0]),
    }

    def fill(table: Parameters, dtype: str) -> Parameters:
        return {
            path: jnp.asarray(random_array(path.rpartition(".")[2], value.shape, np.dtype(dtype)))
            for path, value in table.items()
        }

    def start(trainable: Parameters):
        return init_state(trainable, config)

    places = layout.tree(jax.eval_shape(start, trainable))
    state = jax.jit(start, out_shardings=places, donate_argnums=0)(fill(trainable, "float32"))
    frozen = layout.place(fill(frozen, config.freeze.frozen_dtype))
    step = TrainStep(graphdef, config, ids, layout)

    def answer(message: dict) -> dict:
        nonlocal state
        if message.get("measure") == "matmul":
            return measure_ceilings().flops
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, [layout.place_batch(batch)]))
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "loss": float(metrics["loss"]), "peak_bytes": peak_bytes()}

    return facts, answer


if __name__ == "__main__":
    serve(prepare)
