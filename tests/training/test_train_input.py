"""What train.py refuses, in one sentence before the first step."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from places import MICRO_RUN, ROOT
from small import STEP
from small_datasets import coco_table, save_picture, save_square, write_table

import train
from unibiomed_jax.data.augment import AugmentConfig
from unibiomed_jax.data.pipeline import Batch
from unibiomed_jax.data.plan import Shape
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import DATA_PARALLEL, MESH_AXES
from unibiomed_jax.training.config import Acts, CheckpointConfig
from unibiomed_jax.training.experiment import load_command, load_experiment
from unibiomed_jax.training.footprint import heaviest
from unibiomed_jax.training.log import RunLog
from unibiomed_jax.training.snapshot import Checkpointer
from unibiomed_jax.training.start import open_data

pytestmark = pytest.mark.slow

CONFIG = MICRO_RUN


@pytest.fixture(autouse=True)
def handlers():
    """A run sets its own handlers of signals; the tests have theirs."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A dataset of two images that the configuration finds."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for number in range(2):
            save_picture(root / split / f"{number}.png", seed=number)
            save_square(root / f"{split}_mask" / f"{number}_liver.png")
        write_table(root / f"{split}.json", coco_table(2))
    monkeypatch.setenv("MICRO_DATA", str(root))
    return root


@pytest.fixture
def refuses(data, tmp_path, monkeypatch):
    """`refuses(pattern, *options)`: the run ends with this one sentence."""

    def check(pattern, *options):
        run = [f"--folder={tmp_path / 'run'}", *options]
        monkeypatch.setattr("sys.argv", ["train.py", str(CONFIG), *run])
        monkeypatch.setattr(train.runtime, "prepare", lambda: None)
        with pytest.raises(InputError, match=pattern) as raised:
            train.main()
        message = str(raised.value)
        assert "\n" not in message and message.endswith(".")

    return check


def test_the_command_says_it_in_one_line_and_exits_with_2(data, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CONFIG.parent))
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(CONFIG), "--optim.lrr=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "Error: There is no field 'optim.lrr'; the nearest is --optim.lr.\n"


@pytest.mark.parametrize(
    "pattern, option",
    [
        (r"no field 'optim\.steps2'; the nearest is --optim\.steps", "--optim.steps2=3"),
        ("optim.steps", "--optim.steps=many"),
        ("Unknown sharding strategy 'fsdb'", "--strategy=fsdb"),
        ("nowhere", "--tokenizer=nowhere"),
        (
            r"292 tokens but the model only 100.*--model\.language\.vocab-size",
            "--model.language.vocab-size=100",
        ),
        ("'sam3.\\*' in trainable matches no parameter", "--freeze.trainable=sam3.*"),
        (
            r"asks for model\.\S+ = .* but \S*unibiomed-tiny has .*leave `model` out",
            f"--initial={ROOT / 'checkpoints' / 'unibiomed-tiny'}",
        ),
        ("no checkpoint 'best'", "--export=best"),
        ("batch_size=0", "--data.batch-size=0"),
        (r"--optim\.accumulate=0 is impossible", "--optim.accumulate=0"),
        (r"--log\.every=-1 is impossible", "--log.every=-1"),
        (
            r"no field 'data\.sample\.max_tiles'; the nearest is --data\.sample\.max_tokens\.",
            "--data.sample.max-tiles=6",
        ),
        (r"'bf16'.*--export-dtype.*'float32', 'bfloat16'", "--export-dtype=bf16"),
        (r"'bf16'.*--freeze\.frozen-dtype.*'float32', 'bfloat16'", "--freeze.frozen-dtype=bf16"),
        (r"'Full'.*--remat\.language.*'none', 'full', 'dots'", "--remat.language=Full"),
        (r"--loss\.importance=2\.0 is impossible; give 0 to 1", "--loss.importance=2"),
        (r"--loss\.oversample=0\.5 is impossible; give 1 or more", "--loss.oversample=0.5"),
        (r"--loss\.copies=0 is impossible; give 1 or more", "--loss.copies=0"),
        (r"--optim\.lr=0\.0 is impossible; give a number above 0", "--optim.lr=0"),
        (r"--optim\.lr=nan is impossible", "--optim.lr=nan"),
        (r"--optim\.lr=inf is impossible", "--optim.lr=inf"),
        (r"--optim\.clip=-1\.0 is impossible; give a number above 0", "--optim.clip=-1"),
        (r"--optim\.eps=0\.0 is impossible", "--optim.eps=0"),
        (r"--optim\.beta1=1\.0 is impossible; give 0 to less than 1", "--optim.beta1=1"),
        (r"--optim\.beta2=nan is impossible", "--optim.beta2=nan"),
        (r"--optim\.warmup=1\.0 is impossible", "--optim.warmup=1"),
        (r"--optim\.warmup_start=2\.0 is impossible; give 0 to 1", "--optim.warmup-start=2"),
        (r"--optim\.weight_decay=-0\.1 is impossible; give 0 or more", "--optim.weight-decay=-0.1"),
        (r"--optim\.ema=1\.0 is impossible", "--optim.ema=1"),
        (r"--lora\.rank=-1 is impossible; give 0 or more", "--lora.rank=-1"),
        (r"--lora\.alpha=0\.0 is impossible", "--lora.alpha=0"),
        (r"--lora\.dropout=1\.0 is impossible", "--lora.dropout=1"),
        (r"--loss\.mask_weight=inf is impossible", "--loss.mask-weight=inf"),
        (r"--loss\.masks_from=-1 is impossible", "--loss.masks-from=-1"),
        (r"--log\.validate_every=-1 is impossible", "--log.validate-every=-1"),
        (r"--log\.validate_batches=0 is impossible; give 1 or more", "--log.validate-batches=0"),
        (r"--seed=-1 is impossible; give 0 to 4294967295", "--seed=-1"),
        (r"no field 'data\.no_training'; the nearest is --data\.", "--data.no-training"),
        (
            r"no field 'model\.precision\.vision'; the nearest is --precision\.vision\.",
            "--model.precision.vision=bfloat16",
        ),
        (
            r"nowhere is no converted checkpoint; .*`unibiomed convert from-torch`, .* RUN/model",
            "--initial=nowhere",
        ),
        (
            r"model\.language\.hidden_size=16 must be a multiple of 2 \* model\.language\.num_heads=3\.",
            "--model.language.num-heads=3",
        ),
        (r"--checkpoint\.best=dize is no measure.*dice, dice/segmentation, .*", "--checkpoint.best=dize"),
    ],
)
def test_a_configuration_that_cannot_be_meant(refuses, pattern, option):
    refuses(pattern, option)


def test_nothing_changes_at_random_in_validation(data):
    config = load_experiment(str(CONFIG))
    tokenizer = Tokenizer.from_folder(config.tokenizer)

    def pixels(training, changes=None):
        datasets = tuple(dataclasses.replace(item, augment=changes) for item in config.validation)
        both = {"data": dataclasses.replace(config.data, datasets=datasets), "validation": datasets}
        changed = dataclasses.replace(config, **both)
        return open_data(changed, tokenizer, training=training).read(0).arrays["sam_pixels"]

    changes = AugmentConfig(rotation=90)
    assert (pixels(True, changes) != pixels(True)).any()
    np.testing.assert_array_equal(pixels(False, changes), pixels(False))


FILE_BEGINS = """
from unibiomed_jax.data.records import Kind
from unibiomed_jax.data.transforms import SampleConfig
from unibiomed_jax.training.config import *
"""


@pytest.mark.parametrize(
    "source, pattern",
    [
        (
            "optim=OptimConfig(learing_rate=1)",
            r"'learing_rate' in OptimConfig \(.*wrong\.py, line 5\).*lr, steps",
        ),
        ("optim=OptimConfig(step=1)", "'step' in OptimConfig .*did you mean 'steps'"),
        ("optm=OptimConfig()", r"'optm' in TrainConfig \(.*wrong\.py, line 5\): did you mean 'optim'"),
        ("optim={'lr': 1}", r"wrong\.py: config\.optim must be of type OptimConfig, not \{'lr': 1\}\."),
        ("optim=OptimConfig(lr='1e-3')", r"config\.optim\.lr must be of type float, not '1e-3'\."),
        ("optim=OptimConfig(steps=1e4)", r"optim\.steps must be of type int, not 10000\.0; give 10000\."),
        ("seed=True", r"config\.seed must be of type int, not True\."),
        ("initial=3", r"config\.initial must be of type str, not 3\."),
        ("remat=RematConfig(language='Full')", r"remat\.language must be one of 'none', 'full', 'dots', not"),
        (
            "freeze=FreezeConfig(trainable='*')",
            r"freeze\.trainable must be a tuple, as in \(one,\).*, not '\*'",
        ),
        (
            "lora=LoraConfig(targets=('*.q_proj', 3))",
            r"config\.lora\.targets\.1 must be of type str, not 3\.",
        ),
        ("data=PipelineConfig(datasets=[])", r"config\.data\.datasets must be a tuple, .*, not \[\]"),
        (
            "validation=(DatasetConfig(kind='segmentaton', root='data'),)",
            r"validation\.0\.kind must be one of Kind\.SEGMENTATION, Kind\.SEQUENCE, .*, not 'segmentaton'",
        ),
        ("seed=", r"wrong\.py, line \d+ cannot be used \(SyntaxError: "),
        (
            "seed=seed_of_the_day",
            r"wrong\.py, line 5 cannot be used \(NameError: .*seed_of_the_day.*; correct it",
        ),
        (
            "seed=__import__('nonsense')",
            r"wrong\.py, line 5 cannot be used \(ModuleNotFoundError: .*nonsense",
        ),
        ("model=ModelConfig(precision=Precision())", r"'precision' in ModelConfig \(.*wrong\.py, line 5\): "),
        (
            "data=PipelineConfig((), training=False)",
            r"'training' in PipelineConfig \(.*wrong\.py, line 5\): ",
        ),
        (
            "data=PipelineConfig((), sample=SampleConfig(max_tiles=6))",
            r"'max_tiles' in SampleConfig .*did you mean 'max_tokens'",
        ),
        ("dry_run=True", r"'dry_run' in TrainConfig \(.*wrong\.py, line 5\): "),
        ("data=PipelineConfig((), workers=-1)", r"^workers=-1 is impossible; give 0 or more\.$"),
    ],
)
def test_a_mistake_in_the_file(tmp_path, source, pattern):
    file = tmp_path / "wrong.py"
    file.write_text(f"{FILE_BEGINS}config = TrainConfig({source})\n")
    with pytest.raises(InputError, match=pattern) as raised:
        load_experiment(str(file))
    assert "\n" not in str(raised.value)


def test_a_mistake_in_the_file_that_another_one_builds_on(tmp_path):
    (tmp_path / "first.py").write_text("\n\n1 / 0\n")
    (tmp_path / "second.py").write_text(f"import runpy\nrunpy.run_path({str(tmp_path / 'first.py')!r})\n")
    with pytest.raises(InputError, match=r"first\.py, line 3 .*ZeroDivisionError"):
        load_experiment(str(tmp_path / "second.py"))


def test_a_mistake_in_a_file_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.py").write_text("from unibiomed_jax.data.plan import BucketConfig\n\nBucketConfig(tiles=5)\n")
    with pytest.raises(InputError, match=r"^here\.py, line 3 cannot be used \(TypeError"):
        load_experiment("here.py")


@pytest.mark.parametrize(
    "options, acts",
    [
        ((), Acts()),
        (("--dry-run",), Acts(dry_run=True)),
        (("--profile", "--no-dry-run"), Acts(profile=True)),
        (("--export=best",), Acts(export="best")),
    ],
)
def test_what_to_do_is_no_part_of_the_experiment(data, options, acts):
    config, found = load_command(str(CONFIG), ["--optim.steps=7", *options])
    assert found == acts
    assert config == load_experiment(str(CONFIG), ["--optim.steps=7"]) and config.optim.steps == 7


def test_an_unknown_act_is_named_with_the_nearest(data):
    with pytest.raises(InputError, match=r"no field 'dry_runn'; the nearest is --dry_run\."):
        load_command(str(CONFIG), ["--dry-runn"])


def test_a_whole_number_is_a_float_too(tmp_path):
    (tmp_path / "whole.py").write_text(f"{FILE_BEGINS}config = TrainConfig(optim=OptimConfig(clip=1))\n")
    assert load_experiment(str(tmp_path / "whole.py")).optim.clip == 1


def test_help_does_not_need_the_data(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "configs" / "finetune.py")
    with pytest.raises(InputError, match="dataset folder data/mine does not exist"):
        load_experiment(file)
    with pytest.raises(SystemExit) as ended:
        load_experiment(file, ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--optim.lr" in shown and "data/mine does not exist" in shown


def test_a_batch_that_the_devices_cannot_share(refuses, monkeypatch):
    eight = Layout(AbstractMesh((8, 1, 1, 1), MESH_AXES), DATA_PARALLEL, {})
    monkeypatch.setattr(Layout, "over", lambda *_, **__: eight)
    refuses("batch of 2 samples cannot be split over 8 devices")


def test_no_dataset_where_the_configuration_looks(refuses, data):
    shutil.rmtree(data)
    refuses("data does not exist")
    data.mkdir()
    refuses("holds no table for the split 'train'")


def harm_mask_missing(root):
    (root / "train_mask" / "1_liver.png").unlink()


def harm_empty_table(root):
    write_table(root / "train.json", coco_table(0))


def harm_schema(root):
    write_table(root / "train.json", {"pictures": []})


def harm_json(root):
    (root / "train.json").write_text('{"images": [')


def harm_mask_field(root):
    table = coco_table(2)
    del table["annotations"][1]["mask_file"]
    write_table(root / "train.json", table)


@pytest.mark.parametrize(
    "harm, pattern",
    [
        (harm_mask_missing, "1_liver.png"),
        (harm_empty_table, "train.json holds no samples"),
        (harm_schema, "train.json.*images"),
        (harm_json, "train.json.*JSON"),
        (harm_mask_field, "train.json.*mask_file"),
    ],
)
def test_a_dataset_that_cannot_be_read(refuses, data, harm, pattern):
    harm(data)
    refuses(pattern)


def test_a_checkpoint_of_another_model(refuses, tmp_path):
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", CheckpointConfig())
    checkpointer.save(4, {"train": {"weight": jax.numpy.zeros(3)}}, position={}, config={})
    checkpointer.wait()
    refuses("00000004 was saved by another model, adapter or optimiser: .*; resume with")


def test_a_folder_in_which_another_process_trains(refuses, tmp_path):
    running = Checkpointer(tmp_path / "run" / "checkpoints", CheckpointConfig())
    with running.claim():
        unfinished = running.folder / "00000004.partial"
        unfinished.mkdir()
        refuses("Another process trains in")
        refuses("no checkpoint 'last'", "--export=last")
        assert unfinished.exists()


def test_a_dry_run_takes_the_heaviest_shape():
    more_frames, more_tokens = Shape(2, 1, 2, 40), Shape(1, 1, 13, 4000)
    assert heaviest(STEP, [more_frames, more_tokens], ["mlp1"]) == more_tokens


def test_a_dry_run_shows_the_program_that_sums_gradients(data, tmp_path, monkeypatch, capsys):
    class Accumulating(train.TrainStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            del self.whole

    monkeypatch.setattr(train, "TrainStep", Accumulating)
    monkeypatch.setattr(train.runtime, "prepare", lambda: None)
    options = [f"--folder={tmp_path / 'run'}", "--dry-run", "--optim.accumulate=2", "--optim.ema=0.9"]
    monkeypatch.setattr("sys.argv", ["train.py", str(CONFIG), *options])
    assert train.main() == 0
    rows = dict(re.findall(r"│ ([a-z ]+?) +│ ([0-9.]+) +│", capsys.readouterr().out))
    assert rows["gradient total"] == rows["running average"] == rows["trainable parameters"]


def test_a_dry_run_for_chips_that_are_not_here_plans_the_heaviest_batch(data, tmp_path, monkeypatch, capsys):
    planned = []

    def find_all(cases, folder, memory):
        planned.extend(cases)
        return [InputError("That is what would be compiled.")]

    monkeypatch.setattr("unibiomed_jax.planning.worker.find_all", find_all)
    monkeypatch.setattr(train.runtime, "prepare", lambda: None)
    run = f"--folder={tmp_path / 'run'}"
    monkeypatch.setattr(
        "sys.argv", ["train.py", str(CONFIG), run, "--dry-run", "--topology=v5e:2x2", "--strategy=fsdp"]
    )
    with pytest.raises(InputError, match="what would be compiled"):
        train.main()
    (case,) = planned
    assert (case.topology, case.config.strategy, case.config.folder) == (
        "v5e:2x2",
        "fsdp",
        str(tmp_path / "run"),
    )
    assert case.shape.tokens >= 512 and case.config.model.language.vocab_size == 292
    monkeypatch.setattr("sys.argv", ["train.py", str(CONFIG), run, "--topology=v5e:2x2"])
    with pytest.raises(InputError, match="--topology plans a run .*; add --dry-run"):
        train.main()


def test_a_run_stops_after_too_many_losses_that_are_not_finite(tmp_path, capsys):
    log = RunLog(tmp_path, tensorboard=False)
    batches = [Batch({}, ("liver/3", ""), 0), Batch({}, ("liver/7",), 1)]
    train.require_finite(5, log, 8, {"bad_steps": np.int32(0)}, batches)
    train.require_finite(5, log, 9, {"bad_steps": np.int32(4)}, batches)
    assert "Update 9 was skipped" in capsys.readouterr().out
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["step"] == 9 and line["samples"] == ["liver/3", "liver/7"]
    with pytest.raises(InputError, match="not finite 5 times in a row.*liver/3, liver/7"):
        train.require_finite(5, log, 10, {"bad_steps": np.int32(5)}, batches)
