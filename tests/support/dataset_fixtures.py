"""A small dataset of every kind on disk, and the two tokenizers that the tests read it with."""

import lzma
import shutil
from pathlib import Path

import pytest
from places import MICRO, QWEN2
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """256 bytes and the special tokens: one id a byte, so that lengths can be counted by hand."""
    return Tokenizer.from_folder(MICRO)


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    (folder / "tokenizer.json").write_bytes(lzma.decompress((QWEN2 / "tokenizer.json.xz").read_bytes()))
    shutil.copy(QWEN2 / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="session")
def qwen2(qwen2_folder) -> Tokenizer:
    return Tokenizer.from_folder(qwen2_folder)


@pytest.fixture
def targets(tmp_path) -> Path:
    """Five images with one target each, in the layout of 2-D segmentation."""
    root = tmp_path / "liver"
    for number in range(5):
        save_picture(root / "train" / f"{number}.png", seed=number)
        save_square(root / "train_mask" / f"{number}_liver.png", corner=(number, number))
    write_table(root / "train.json", coco_table(5))
    return root


@pytest.fixture
def volumes(tmp_path) -> Path:
    """One volume of 14 slices, the target in slices 1 to 12."""
    root = tmp_path / "volumes"
    names = [f"v1-{number:03d}.png" for number in range(14)]
    masks = [f"mask/v1/{name[:-4]}_lung+tumor.png" for name in names[1:13]]
    for number, name in enumerate(names):
        save_picture(root / "v1" / name, seed=number)
    for number, mask in enumerate(masks):
        save_square(root / mask, corner=(number, 2))
    expression = {"exp": "Lung tumor in chest CT.", "mask_file": masks, "img_file": []}
    write_table(
        root / "meta_train.json", {"volumes": {"v1": {"slices": names, "expressions": {"0": expression}}}}
    )
    return root


@pytest.fixture
def findings(tmp_path) -> Path:
    """Grounded questions and reports: one finding, none, and two."""
    root = tmp_path / "findings"
    for number in range(3):
        save_picture(root / "train" / f"{number}.png", seed=number)
        save_square(root / "train_mask" / f"{number}.png")
        save_square(root / "train_mask" / f"{number}b.png", corner=(20, 10))
    entry = {"anatomy": "Lung", "report": '" A 5 mm nodule. "'}
    write_table(
        root / "train_parse.json",
        {
            "a": {**entry, "image_file": "train/0.png", "mask_file": "train_mask/0.png",
                  "abnormality": "Nodule"},
            "b": {**entry, "image_file": "train/1.png", "mask_file": "train_mask/1.png",
                  "abnormality": "no findings"},
            "c": {**entry, "image_file": "train/2.png",
                  "mask_file": ["train_mask/2.png", "train_mask/2b.png"],
                  "abnormality": ["Nodule", "Effusion"]},
        },
    )  # fmt: skip
    return root


@pytest.fixture
def captions(tmp_path) -> Path:
    root = tmp_path / "captions"
    for number in range(2):
        save_picture(root / f"{number}.png", seed=number)
    write_table(
        root / "train.json",
        {"annotations": [{"file_name": "0.png", "caption": " A Chest X-ray. "},
                         {"file_name": "1.png", "caption": "yes", "question": "Is this a chest X-ray?"}]},
    )  # fmt: skip
    return root


@pytest.fixture
def mixture(targets, volumes, findings, captions) -> tuple[DatasetConfig, ...]:
    """All seven kinds, nothing repeated."""
    return (
        DatasetConfig(Kind.SEGMENTATION, str(targets), balance_to=0),
        DatasetConfig(Kind.SEQUENCE, str(volumes), repeats=3, slices=3),
        DatasetConfig(Kind.DISEASE, str(targets), balance_to=0),
        DatasetConfig(Kind.REGION, str(targets), balance_to=0),
        DatasetConfig(Kind.VQA, str(findings), repeats=1),
        DatasetConfig(Kind.REPORT, str(findings), repeats=1),
        DatasetConfig(Kind.CAPTION, str(captions), balance_to=0),
    )
