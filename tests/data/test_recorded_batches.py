"""The batches of the five runs of unibiomed-tiny stay what they were, to the byte.

A change that is meant to change them renews the record, from the root of the checkout:

    PYTHONPATH=.:tests/support python tests/data/test_recorded_batches.py
"""

import hashlib
import itertools
import json

import numpy as np
import pytest
from PIL import features
from places import FILES, ROOT

from unibiomed_jax.data.pipeline import Batch
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.training.experiment import load_experiment
from unibiomed_jax.training.start import find_tokenizer, open_data

RUNS = sorted((ROOT / "configs" / "unibiomed_tiny").glob("[0-9]_*.py"))
RECORD = FILES / "batches.json"
# Batches of each kind of data.
COUNT = 3
# Two decoders may disagree about the last bit of a pixel.
JPEG = {name: features.version(name) for name in ("jpg", "libjpeg_turbo")}


def digest(batch: Batch) -> str:
    """One sha256 over names, number formats, shapes and bytes of the arrays, and the names of the rows."""
    hashed = hashlib.sha256()
    for name, array in sorted(batch.arrays.items()):
        hashed.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
    hashed.update("\n".join(batch.names).encode())
    return hashed.hexdigest()


def first_batches(run, training: bool) -> list[str]:
    config = load_experiment(str(run))
    iterator = iter(open_data(config, Tokenizer.from_folder(find_tokenizer(config)), training=training))
    found = [digest(batch) for batch in itertools.islice(iterator, COUNT)]
    iterator.close()
    return found


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
@pytest.mark.parametrize("data", ["training", "validation"])
def test_batches_are_those_that_were_recorded(run, data):
    record = json.loads(RECORD.read_text())
    if record["jpeg"] != JPEG:
        pytest.skip(f"recorded with the JPEG decoder {record['jpeg']}, but {JPEG} is installed")
    assert first_batches(run, data == "training") == record["batches"][run.stem][data]


def test_every_run_is_recorded_and_no_two_batches_are_alike():
    batches = json.loads(RECORD.read_text())["batches"]
    assert list(batches) == [run.stem for run in RUNS]
    hashes = {found for run in batches.values() for data in run.values() for found in data}
    assert len(hashes) == len(RUNS) * 2 * COUNT


def main() -> None:
    batches = {
        run.stem: {data: first_batches(run, data == "training") for data in ("training", "validation")}
        for run in RUNS
    }
    RECORD.write_text(json.dumps({"jpeg": JPEG, "batches": batches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
