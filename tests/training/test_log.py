"""What a run writes about itself, read back as other programs read it."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from unibiomed_jax.training.log import RunLog


def events(folder):
    """The records of TensorBoard's files: length, checksum, message, checksum."""
    messages = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(messages.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_measures_and_pictures_are_in_the_json_lines_and_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    log = RunLog(tmp_path, tensorboard=True)
    log.write(1, "train", {"loss": 2.5, "learning_rate": 1e-3})
    log.write(2, "validation", {"dice": 0.75})
    log.picture(2, "liver", Image.fromarray(np.full((8, 8, 3), 200, np.uint8)))
    log.close()

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(1, "train"), (2, "validation")]
    values = [
        (event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value
    ]
    scalars = {(step, value.tag): value.simple_value for step, value in values if not value.HasField("image")}
    assert scalars == {
        (1, "train/loss"): 2.5,
        (1, "train/learning_rate"): np.float32(1e-3),
        (2, "validation/dice"): 0.75,
    }
    (picture,) = [value for _, value in values if value.HasField("image")]
    assert (picture.tag, picture.image.width, picture.image.height) == ("liver", 8, 8)
    with Image.open(tmp_path / "pictures" / "00000002-liver.jpg") as saved:
        assert saved.size == (8, 8)


def test_what_is_not_finite_is_null_since_json_has_no_nan(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.write(1, "train", {"loss": float("nan"), "gradient_norm": float("-inf"), "tokens": 7.0})
    log.write(2, "skipped", {"bad_steps": 1, "samples": ["liver/1"]})
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "log.jsonl").read_text()
    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert (first["loss"], first["gradient_norm"], first["tokens"]) == (None, None, 7.0)
    assert (second["bad_steps"], second["samples"]) == (1, ["liver/1"])


def test_going_on_drops_what_will_be_said_again(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": float(step)})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')  # cut short by a kill
    RunLog(tmp_path, tensorboard=False, first_step=2).close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
