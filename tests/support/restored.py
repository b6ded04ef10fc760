"""Run in the processes of a job: a checkpoint as they restore it, hashed leaf by leaf; one line of JSON.

`process.py restored.py CONFIG [--field=value ...]`
"""

import json
import sys

from job import digests

from unibiomed_jax import distributed
from unibiomed_jax.training.experiment import load_command, main_arguments
from unibiomed_jax.training.snapshot import Checkpointer, leaves_by_name
from unibiomed_jax.training.start import belongs_to, prepare

config, acts = load_command(*main_arguments())
distributed.join(acts)
start = prepare(config)
restored = Checkpointer(start.checkpoint_folder, config.checkpoint).restore(
    start.abstract, belongs_to=belongs_to(config)
)
leaves = leaves_by_name(restored.state)
places = {name: leaf.sharding for name, leaf in leaves_by_name(start.abstract).items()}
assert places == {name: leaf.sharding for name, leaf in leaves.items()}
found = digests({name: distributed.whole(leaf) for name, leaf in leaves.items()})
if distributed.is_first():
    print(json.dumps(found))
distributed.finish()
sys.exit(0)
