"""The compiled functions as files that run without this package: StableHLO, and weights beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from unibiomed_jax.checkpoint import Checkpoint
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.generate import Decoding, Limits
from unibiomed_jax.inference.network import build_network
from unibiomed_jax.inference.stages import StageIds, Stages
from unibiomed_jax.inference.stopping import stop_text
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.models.attention import exported
from unibiomed_jax.models.sam2 import ImageFeatures
from unibiomed_jax.parameters import flatten, unflatten
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import DATA_PARALLEL, MESH_AXES

Target = Literal["cpu", "cuda", "tpu"]
# How JAX calls their devices.
PLATFORMS: dict[Target, str] = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
# A layout in memory, which only the CPU's compiler is asked for and knows.
LAYOUT = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")

LOADER = '''\
"""Runs what lies beside it: `programs, about = load()`; needs jax and numpy, nothing of unibiomed_jax."""
import functools, json, pathlib
import jax, jax.export, numpy as np

def load(folder=pathlib.Path(__file__).parent):
    """Functions by name, each of a dict of arrays (see about["programs"]), and what manifest.json says."""
    about = json.loads((folder / "manifest.json").read_text())
    with np.load(folder / "parameters.npz") as stored:
        kinds = about["parameters"].items()
        weights = {name: jax.numpy.asarray(stored[name].view(kind)) for name, kind in kinds}
    read = lambda name: jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
    return {name: functools.partial(jax.jit(read(name).call), weights) for name in about["programs"]}, about
'''


# Programs that take any number of rows; the shapes of the others' loops depend on it.
ANY_BATCH = ("encode_tiles", "prefill", "segment")


class Sizes(NamedTuple):
    """Of what an exported program takes."""

    # Rows, where a program does not take any number of them.
    batch: int
    # Tiles, tokens of the question, tokens of the answer, masks of an answer.
    tiles: int
    tokens: int
    new_tokens: int
    objects: int


def export_folder(
    loaded: Checkpoint, folder: Path, target: Target, sizes: Sizes, precision: Precision
) -> None:
    """Write programs, weights, tokenizer and a loader into a folder that is not there yet.

    Raises:
        InputError: the model's context is too short for the sizes.
    """
    config, tokenizer = loaded.config, Tokenizer.from_folder(loaded.tokenizer)
    context = config.language.max_position_embeddings
    if sizes.tokens + sizes.new_tokens > context:
        raise InputError(
            f"{sizes.tokens} tokens and {sizes.new_tokens} new ones are more than the model's context, "
            f"{context}; lower --tokens or --new-tokens."
        )
    device = AbstractDevice(PLATFORMS[target], None, PLATFORMS[target])
    axes = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, axis_types=axes, abstract_device=device)
    layout = Layout(mesh, DATA_PARALLEL, {})
    graphdef, state = build_network(config, loaded.params, precision, layout)
    parameters = {path: np.asarray(value) for path, value in flatten(state).items()}
    shapes = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in parameters.items()}
    programs = Programs(config, graphdef, state, tokenizer, layout, sizes)

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    about: dict[str, Any] = {"target": target, "jax": jax.__version__, "programs": {}}
    with exported():
        for name, (function, inputs) in programs.all().items():
            export = jax.export.export(layout.jit(function), platforms=[target], disabled_checks=[LAYOUT])
            (partial / f"{name}.stablehlo").write_bytes(export(shapes, inputs).serialize())
            about["programs"][name] = {
                key: [str(leaf.dtype), *map(str, leaf.shape)] for key, leaf in inputs.items()
            }
    about["parameters"] = {path: str(value.dtype) for path, value in parameters.items()}
    about |= {"end": tokenizer.eos_id, "seg": tokenizer.seg_id, "image": tokenizer.image_context_id}
    # numpy's files know no bfloat16: its bits as whole numbers.
    bits = {path: value.view(f"u{value.dtype.itemsize}") for path, value in parameters.items()}
    np.savez(partial / "parameters.npz", **bits)
    shutil.copytree(loaded.tokenizer, partial / "tokenizer")
    (partial / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")
    (partial / "load.py").write_text(LOADER)
    partial.rename(folder)


class Programs:
    """The functions that are exported, each of (parameters, inputs): plain dicts of arrays."""

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef,
        state: nnx.State,
        tokenizer: Tokenizer,
        layout: Layout,
        sizes: Sizes,
    ):
        self.config, self.sizes, self._graphdef, self._state = config, sizes, graphdef, state
        self._stages = Stages(graphdef, StageIds.of(tokenizer), layout)
        stop = stop_text(tokenizer, config.language.vocab_size)
        self._stop = jax.tree.map(jnp.asarray, stop)

    def _network(self, parameters: Mapping[str, jax.Array]) -> nnx.State:
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, unflatten(parameters))
        return state

    def all(self) -> dict[str, tuple[Any, dict]]:
        """Functions with their abstract inputs, by name."""
        (symbolic,) = jax.export.symbolic_shape("batch")
        fixed, free = self._of_rows(self.sizes.batch), self._of_rows(symbolic)
        return {name: (free if name in ANY_BATCH else fixed)[name] for name in fixed}

    def _of_rows(self, rows: Any) -> dict[str, tuple[Any, dict]]:
        """As `all`, with so many rows."""
        config, sizes = self.config, self.sizes
        side, size, width = config.vision.image_size, config.sam2.image_size, config.language.hidden_size
        array = jax.ShapeDtypeStruct
        tiles = array((rows, sizes.tiles, side, side, 3), np.uint8)
        image = array((rows, size, size, 3), np.uint8)
        prompt = {
            "ids": array((rows, sizes.tokens), np.int32),
            "source": array((rows, sizes.tokens), np.int32),
            "lengths": array((rows,), np.int32),
            "forced": array((rows, sizes.new_tokens), np.int32),
            "limit_tokens": array((rows,), np.int32),
            "limit_segs": array((rows,), np.int32),
        }
        visual = array((rows, max(1, sizes.tiles * config.tokens_per_tile), width), np.float32)
        asked = prompt | {"visual": visual}
        shapes = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), flatten(self._state))
        state = jax.eval_shape(self.prefill, shapes, asked)
        one = jax.eval_shape(self.encode_image, shapes, {"image": array((1, *image.shape[1:]), np.uint8)})
        features = {name: array((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in one.items()}
        hidden = array((rows, sizes.objects, width), state["hidden"].dtype)
        return {
            "ground": (self.ground, prompt | {"tiles": tiles, "image": image}),
            "encode_tiles": (self.encode_tiles, {"tiles": tiles}),
            "prefill": (self.prefill, asked),
            "advance": (
                self.advance,
                state | {"done": array((rows,), np.bool_), "limit": array((), np.int32)},
            ),
            "encode_image": (self.encode_image, {"image": image}),
            "segment": (self.segment, features | {"hidden": hidden}),
        }

    def ground(self, parameters: dict, inputs: dict) -> dict:
        """The whole answer: see `generate.ground`."""
        found = self._stages.ground(
            self._network(parameters),
            inputs["tiles"],
            *(inputs[name] for name in ("ids", "source", "lengths")),
            inputs["image"][:, None],
            inputs["forced"],
            Limits(inputs["limit_tokens"], inputs["limit_segs"]),
            None,
            self._stop,
            None,
            objects=self.sizes.objects,
        )
        masks = found.masks
        said = {"ids": found.ids, "count": found.count, "hidden": found.hidden, "valid": found.valid}
        return said | {"masks": masks.masks, "ious": masks.ious, "object_scores": masks.object_scores}

    def encode_tiles(self, parameters: dict, inputs: dict) -> dict:
        """Rows of the language model, one tile after the other."""
        tiles = inputs["tiles"]
        rows = self._stages.encode_tiles(self._network(parameters), tiles.reshape(-1, *tiles.shape[2:]))
        return {"visual": rows.reshape(tiles.shape[0], -1, rows.shape[-1]).astype(jnp.float32)}

    def prefill(self, parameters: dict, inputs: dict) -> dict:
        """The state of an answer after its first token: see `generate.Decoding`."""
        limits = Limits(inputs["limit_tokens"], inputs["limit_segs"])
        given = (inputs[name] for name in ("ids", "source", "lengths", "visual", "forced"))
        return _plain(self._stages.prefill(self._network(parameters), *given, limits))

    def advance(self, parameters: dict, inputs: dict) -> dict:
        """The state after up to `limit` more tokens; rows that are `done` say nothing more."""
        state = Decoding(
            cache={"k": inputs["k"], "v": inputs["v"]},
            **{name: inputs[name] for name in ("lengths", "ids", "hidden", "step", "forced")},
            limits=Limits(inputs["limit_tokens"], inputs["limit_segs"]),
            draw=None,
        )
        network = self._network(parameters)
        return _plain(self._stages.advance(network, state, inputs["done"], inputs["limit"], self._stop))

    def encode_image(self, parameters: dict, inputs: dict) -> dict:
        """SAM2's features."""
        return self._stages.encode_image(self._network(parameters), inputs["image"])._asdict()

    def segment(self, parameters: dict, inputs: dict) -> dict:
        """Masks of states of an answer about each image."""
        features = ImageFeatures(*(inputs[name] for name in ImageFeatures._fields))
        model = nnx.merge(self._graphdef, self._network(parameters))
        with jax.default_matmul_precision("highest"):
            return model.segment(features, inputs["hidden"])._asdict()


def _plain(state: Decoding) -> dict:
    """A state as a dict of arrays."""
    named = {name: getattr(state, name) for name in ("lengths", "ids", "hidden", "step", "forced")}
    return state.cache | named | {"limit_tokens": state.limits.tokens, "limit_segs": state.limits.segs}
