"""Run in a process with eight CPU devices by test_sharded.py; prints its findings as one line of JSON."""

import json
import sys

import jax
from golden_cases import CASES, NEW_TOKENS, OBJECTS, assert_masks_equal, load, request
from PIL import Image
from places import GOLDEN, MICRO

from unibiomed_jax import UniBiomed
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import STRATEGIES

MESHES = {
    "hsdp": {"replica": 2, "fsdp": 4},
    "tensor": {"replica": 4, "tensor": 2},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "sequence": {"fsdp": 4, "sequence": 2},
}
# What one call can answer together: pictures, words, a volume.
TOGETHER = [[case for case in CASES if case not in ("text_only", "video8")], ["text_only"], ["video8"]]
# Strategies under which the volume is asked for, too: its program takes as long to compile as all others.
OF_VOLUMES = ("fsdp_tensor", "sequence")


def check(model, image, cases):
    """That a model says and draws what the reference does."""
    golden = [load(case) for case in cases]
    asked = [request(model, image, *pair) for pair in zip(cases, golden, strict=True)]
    answers = model.ground(asked, max_new_tokens=NEW_TOKENS, objects=OBJECTS)
    for answer, expected in zip(answers, golden, strict=True):
        assert answer.text == str(expected["prediction"])
        assert_masks_equal(answer, expected)


def main(strategies):
    assert len(jax.devices()) == 8
    image = Image.open(GOLDEN / "images" / "CT_abdomen.png")
    found = {}
    for name in strategies or STRATEGIES:
        layout = Layout.over(strategy=STRATEGIES[name], mesh=MESHES.get(name))
        model = UniBiomed.from_pretrained(MICRO, precision=FLOAT32, layout=layout)
        for cases in TOGETHER if name in OF_VOLUMES or strategies else TOGETHER[:2]:
            check(model, image, cases)
        on_first = (leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.params))
        found[name] = {
            "share": sum(on_first) / sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
            "devices": sorted({len(leaf.sharding.device_set) for leaf in jax.tree.leaves(model.params)}),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
