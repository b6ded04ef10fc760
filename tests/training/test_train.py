"""train.py as users run it: killed, stopped, with a damaged checkpoint, on a full disk.

UNIBIOMED_KILLS=20 makes the run that is killed be killed that often (20 minutes on two cores); by default
three times.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from micro_checkpoint import lazy, read_all
from orbax.checkpoint.experimental import v1 as ocp
from places import MICRO_RUN, ROOT
from safetensors.numpy import load_file
from small import STEP
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax import UniBiomed, checkpoint
from unibiomed_jax.conversion import to_torch
from unibiomed_jax.conversion.assemble import build_parts
from unibiomed_jax.conversion.tables import model_rows
from unibiomed_jax.parameters import flatten
from unibiomed_jax.training.snapshot import find_damage, leaves_by_name

pytestmark = pytest.mark.slow

CONFIG = MICRO_RUN
KILLS = int(os.environ.get("UNIBIOMED_KILLS", "3"))
STEPS = 8 * KILLS + 4


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A small dataset, and programs that are compiled once for all runs."""
    base = tmp_path_factory.mktemp("train")
    for split, count in (("train", 12), ("val", 2)):
        for number in range(count):
            save_picture(base / "data" / split / f"{number}.png", seed=number)
            mask = base / "data" / f"{split}_mask" / f"{number}_liver.png"
            save_square(mask, corner=(number, number))
        write_table(base / "data" / f"{split}.json", coco_table(count))
    return os.environ | {
        "MICRO_DATA": str(base / "data"),
        "PYTHONPATH": str(CONFIG.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def command(folder, *options):
    return [sys.executable, str(ROOT / "train.py"), str(CONFIG), f"--folder={folder}",
            f"--optim.steps={STEPS}", *options]  # fmt: skip


def run(environment, folder, *options):
    """Run to the end: (exit code, everything said with line breaks as spaces)."""
    result = subprocess.run(
        command(folder, *options), env=environment, capture_output=True, text=True, check=False
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def checkpoints(folder):
    found = folder / "checkpoints"
    return sorted(path.name for path in found.iterdir()) if found.is_dir() else []


def newest(folder):
    return folder / "checkpoints" / [name for name in checkpoints(folder) if name.isdigit()][-1]


def contents(checkpoint):
    """Every leaf of a checkpoint by name."""
    leaves = leaves_by_name(ocp.load(checkpoint / "state"))
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def digest(folder):
    """Update of the newest checkpoint, one hash over every leaf of it, and where the data stood."""
    hashed = hashlib.sha256()
    for name, leaf in sorted(contents(newest(folder)).items()):
        hashed.update(f"{name} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return newest(folder).name, hashed.hexdigest(), (newest(folder) / "position.json").read_text()


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """Folder of a run that nothing interrupted, with a validation at its end."""
    folder = tmp_path_factory.mktemp("finished")
    code, said = run(environment, folder, "--log.validate-every=1000000")
    assert code == 0, said
    assert newest(folder).name == f"{STEPS:08d}"
    return folder


def test_a_run_logs_every_update_and_validates(finished):
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    (validation,) = [line for line in lines if line["kind"] == "validation"]
    assert validation["step"] == STEPS and 0 <= validation["dice"] <= 1
    always = {"step", "kind", "seconds", "loss", "loss_tokens", "loss_mask", "loss_dice"}
    speed = {"images_per_second", "tokens_per_second", "teraflops"}  # and no share of a peak on a CPU
    measures = {"learning_rate", "gradient_norm", "bad_steps", "tokens", "masks"}
    for line in lines:
        own = (
            {"dice", "dice/segmentation", "answers/segmentation"} if line is validation else measures | speed
        )
        assert set(line) == always | own
    assert validation["answers/segmentation"] == 0
    assert len(list((finished / "pictures").iterdir())) == 2


@pytest.mark.scale
def test_killed_and_stopped_it_ends_as_if_nothing_had_happened(environment, finished, tmp_path):
    """Killed in turn during a save, soon after one, and while it starts; then stopped by SIGTERM."""
    moments = random.Random(0)
    options = ("--data.workers=2",)
    unfinished = []
    for number in range(KILLS + 1):
        last, kind = number == KILLS, number % 3
        process = subprocess.Popen(
            command(tmp_path, *options), env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        if last or kind < 2:
            wait_for_save(tmp_path, process)
            time.sleep(moments.uniform(0, 0.03 if kind == 0 else 0.5))
        else:
            time.sleep(moments.uniform(0, 5))
        assert process.poll() is None, "the run was over before it could be killed"
        process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
        assert process.wait(300) == (0 if last else -signal.SIGKILL)
        assert not_running(process.pid)
        unfinished += [name for name in checkpoints(tmp_path) if not name.isdigit()]
    assert unfinished
    stopped = int(newest(tmp_path).name)
    assert 0 < stopped < STEPS
    code, said = run(environment, tmp_path, *options)
    assert code == 0 and f"Going on after update {stopped} of {STEPS}" in said, said
    assert digest(tmp_path) == digest(finished)
    lines = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))


def wait_for_save(folder, process):
    """Until the process begins a save; what the one before left unfinished goes when it starts."""
    unfinished = {name for name in checkpoints(folder) if not name.isdigit()}
    while unfinished & set(checkpoints(folder)) and process.poll() is None:
        time.sleep(0.002)
    while all(name.isdigit() for name in checkpoints(folder)) and process.poll() is None:
        time.sleep(0.002)


def not_running(group):
    """Whether no process of a session is left, after a few seconds at most."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_damaged_checkpoint_is_said_and_the_run_goes_on_from_the_one_before(
    environment, finished, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    data = max((newest(folder) / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, said = run(environment, folder, "--export=last")
    assert code == 0 and f"{STEPS:08d} is damaged" in said, said
    code, said = run(environment, folder)
    assert code == 0, said
    assert f"{STEPS:08d} is damaged" in said and f"Going on after update {STEPS - 2} of" in said
    assert digest(folder) == digest(finished)


def test_losses_that_are_not_finite_stop_the_run_and_the_save_before_is_finished(environment, tmp_path):
    code, said = run(environment, tmp_path, "--optim.lr=1e38", "--max-bad-steps=3")
    assert code == 2 and "Traceback" not in said
    assert "Error: The loss was not finite 3 times in a row, the last time for data/segmentation" in said
    assert find_damage(newest(tmp_path)) is None
    assert not [name for name in checkpoints(tmp_path) if not name.isdigit()]


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(environment, tmp_path):
    inside = "mount -t tmpfs -o size=3m none {0} && {1}; code=$?; cp -r {0} {0}.copy; exit $code"
    script = inside.format(tmp_path / "small", " ".join(command(tmp_path / "small")))
    (tmp_path / "small").mkdir()
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    trial = inside.format(tmp_path / "small", "true")
    try:
        possible = subprocess.run([*namespace, trial], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("a small file system cannot be mounted here")
    shutil.rmtree(tmp_path / "small.copy")
    result = subprocess.run(
        [*namespace, script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    error = " ".join(result.stderr.split())
    kept = newest(tmp_path / "small.copy")
    assert error.startswith("Error: The disk of") and "Traceback" not in error
    assert "is full" in error and "free some space" in error
    assert find_damage(kept) is None
    assert int(contents(kept)["train/step"]) == int(kept.name) > 0


def test_the_model_is_the_average_of_the_run_with_its_adapters_merged(finished):
    leaves = contents(newest(finished))
    scale = STEP.lora.alpha / STEP.lora.rank
    adapted = 0
    for path, value in flatten(checkpoint.load(finished / "model").params).items():
        expected = leaves.get(f"train/average/{path}", leaves.get(f"frozen/{path}")).astype(np.float32)
        adapter = f"train/average/{path.removesuffix('.kernel')}.lora"
        if f"{adapter}.a" in leaves:
            update = scale * leaves[f"{adapter}.a"] @ leaves[f"{adapter}.b"]
            assert np.abs(update).max() > 0
            expected, adapted = expected + update, adapted + 1
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=path)
    assert adapted == 7


def test_a_model_is_exported_whatever_became_of_the_data(environment, finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    tables = tmp_path / "data"  # without a single image
    shutil.copytree(environment["MICRO_DATA"], tables, ignore=shutil.ignore_patterns("*.png"))
    code, said = run(environment | {"MICRO_DATA": str(tables)}, tmp_path, "--export=last", "--data.seed=5")
    assert code == 0, said
    exported, trained = (checkpoint.read_manifest(folder / "model") for folder in (tmp_path, finished))
    assert exported.hash == trained.hash


def test_what_was_trained_goes_only_with_what_it_was_trained_on(environment, finished, tmp_path):
    start, folder = tmp_path / "start", tmp_path / "run"
    shutil.copytree(finished / "model", start)
    options = (f"--initial={start}", "--checkpoint.no-save-frozen", "--optim.steps=2")
    code, said = run(environment, folder, *options)
    assert code == 0, said
    trained = checkpoint.read_manifest(folder / "model").hash
    code, said = run(environment, folder, *options, "--export=last")
    assert code == 0 and checkpoint.read_manifest(folder / "model").hash == trained, said

    shutil.rmtree(start)
    shutil.copytree(folder / "model", start)  # other weights of the same shapes
    first = checkpoint.read_manifest(finished / "model").hash
    for more in ((), ("--export=last",)):
        code, said = run(environment, folder, *options, *more)
        assert code == 2 and f"initial is {first} there and {trained} here" in said, said
    code, said = run(environment, finished, "--export=last", "--model.vision.num-heads=1")
    assert code == 2 and "model.vision.num_heads is 2 there and 1 here" in said, said


def test_a_profile_that_would_not_be_written_is_refused(environment, tmp_path):
    code, said = run(environment, tmp_path, "--profile", "--optim.steps=13")
    assert (
        code == 2
        and "--profile traces the updates 10 to 14 after a start; raise --optim.steps from 13" in said
    )


def test_a_profile_is_written_and_does_not_keep_a_run_from_going_on(environment, finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(newest(tmp_path))
    code, said = run(environment, tmp_path, "--profile")
    assert code == 0 and "Too few updates are left to profile them" in said, said
    code, said = run(environment, tmp_path / "new", "--profile", "--optim.steps=14")
    assert code == 0 and list((tmp_path / "new" / "profile").rglob("*.xplane.pb")), said


def test_the_adapter_is_the_average_of_the_run(finished):
    """tests/parity/test_lora.py loads such a folder in peft."""
    leaves = contents(newest(finished))
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    stack = leaves["train/average/language_model.layers.self_attn.q_proj.lora.a"]
    for layer, matrix in enumerate(stack):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
        np.testing.assert_array_equal(tensors[name], matrix.T)


def test_the_model_answers_and_goes_to_the_released_layout_and_back(finished, tmp_path):
    model = UniBiomed.from_pretrained(finished / "model")
    picture = np.zeros((40, 60, 3), np.uint8)
    answer = model.predict(picture, "<image>\nPlease segment the liver.", max_new_tokens=3)
    assert answer.text
    to_torch.convert(finished / "model", tmp_path / "released", lossy=True)  # one tile, not up to twelve
    rows = model_rows(checkpoint.read_config(finished / "model"))
    again = {
        f"{part}.{path}": leaf
        for part, leaves in build_parts(rows, lazy(read_all(tmp_path / "released")))
        for path, leaf in leaves.items()
    }
    for path, value in flatten(checkpoint.load(finished / "model").params).items():
        if path in ("language_model.embed_tokens", "language_model.lm_head.kernel"):
            axis = int("lm_head" in path)  # the released vocabulary has no padding
            value, again[path] = (np.moveaxis(np.asarray(x), axis, 0)[:292] for x in (value, again[path]))
        np.testing.assert_array_equal(again[path], value, err_msg=path)
