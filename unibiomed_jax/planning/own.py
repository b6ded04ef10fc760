"""The plan of one's own training run."""

from __future__ import annotations

from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.parameters import partition
from unibiomed_jax.planning.programs import TrainCase
from unibiomed_jax.planning.topologies import find_topology
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.footprint import heaviest
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.start import find_tokenizer, open_data, resolve_model


def own_case(config: TrainConfig, topology: str) -> TrainCase:
    """An update of a run with the heaviest batch of its data, on devices of a topology.

    Raises:
        InputError: the topology is unknown, or the model, the tokenizer or the data cannot be used.
    """
    place = find_topology(topology)
    config = resolve_model(config)
    data = open_data(config, Tokenizer.from_folder(find_tokenizer(config)), training=True)
    trainable, _ = partition(structure(config)[1], config.freeze.trainable, config.freeze.frozen)
    shape = heaviest(config, data.plan.shapes, trainable)
    return TrainCase(config.folder, config, shape, place.name)
