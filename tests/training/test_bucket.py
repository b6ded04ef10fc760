"""train.py with its run folder in a bucket: a real S3 server on the loopback."""

import os

import pytest
from bucket_server import serve
from places import MICRO_RUN, ROOT
from small_datasets import coco_table, save_picture, save_square, write_table

pytestmark = pytest.mark.slow
pytest.importorskip("s3fs")
pytest.importorskip("moto")

STEPS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), "runs") as running:
        yield running


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    """A small dataset, the server, and programs that are compiled once for all runs."""
    base = tmp_path_factory.mktemp("train")
    for split, count in (("train", 12), ("val", 2)):
        for number in range(count):
            save_picture(base / "data" / split / f"{number}.png", seed=number)
            save_square(base / "data" / f"{split}_mask" / f"{number}_liver.png", corner=(number, number))
        write_table(base / "data" / f"{split}.json", coco_table(count))
    return os.environ | server.environment | {
        "MICRO_DATA": str(base / "data"),
        "PYTHONPATH": os.pathsep.join([str(MICRO_RUN.parent), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
