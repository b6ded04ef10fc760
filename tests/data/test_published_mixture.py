"""The paper's mixture in configs/unibiomed_1b.py: which datasets, from where, and how often."""

import csv
from collections import Counter
from pathlib import Path

import pytest
from places import ROOT
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax.data.files import check_files
from unibiomed_jax.data.mixture import read_mixture
from unibiomed_jax.data.records import Kind
from unibiomed_jax.errors import InputError
from unibiomed_jax.training.experiment import load_experiment

FILE = ROOT / "configs" / "unibiomed_1b.py"
# The reference's list of datasets as a table, where it lies beside the repository.
TABLE = ROOT.parent / "shared" / "spec" / "datasets.csv"
TASKS = {
    "grounded VQA": Kind.VQA,
    "grounded report generation": Kind.REPORT,
    "MedTrinity captioning (report)": Kind.CAPTION,
    "2D referring segmentation": Kind.SEGMENTATION,
    "3D (slice stack) segmentation": Kind.SEQUENCE,
    "grounded disease recognition": Kind.DISEASE,
    "region understanding (green box)": Kind.REGION,
}


@pytest.fixture(scope="module")
def datasets():
    # With an option, as in the README: the command line must cope with so many datasets.
    return load_experiment(str(FILE), ["--optim.lr=1e-5"]).data.datasets


def test_loading_reads_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = load_experiment(str(FILE)).data.datasets
    with pytest.raises(InputError) as error:
        read_mixture(missing)
    assert str(error.value) == (
        "The dataset folder data/Biomed/RadGenome does not exist; check the path of RadGenome/vqa."
    )


def test_tasks_and_order(datasets):
    counts = Counter(dataset.kind for dataset in datasets)
    expected = {"vqa": 1, "report": 1, "caption": 1, "segmentation": 47, "sequence": 4, "disease": 16,
                "region": 23}  # fmt: skip
    assert list(counts.items()) == list(expected.items())
    assert len({dataset.title for dataset in datasets}) == len(datasets) == 93


@pytest.mark.parametrize(
    ("number", "kind", "table", "images", "masks"),
    [
        (1, Kind.VQA, "RadGenome/train_parse.json", "RadGenome", "RadGenome"),
        (2, Kind.REPORT, "RadGenome/train_parse.json", "RadGenome", "RadGenome"),
        (3, Kind.CAPTION, "MedTrinity/train.json", "MedTrinity", None),
        (4, Kind.SEGMENTATION, "ACDC/train.json", "ACDC/train", "ACDC/train_mask"),
        (20, Kind.SEGMENTATION, "MSD/Task03_Liver/train.json", "MSD/Task03_Liver/train",
         "MSD/Task03_Liver/train_mask"),
        (50, Kind.SEGMENTATION, "RadGenome/train.json", "RadGenome/train", "RadGenome/train_mask"),
        (54, Kind.SEQUENCE, "3D/COVID-19_CT/meta_train.json", "3D/COVID-19_CT", "3D/COVID-19_CT"),
        (55, Kind.DISEASE, "Disease/BrainTumor/train.json", "Disease/BrainTumor/train",
         "Disease/BrainTumor/train_mask"),
        (70, Kind.DISEASE, "Disease/NoFindings/train.json", "Disease/NoFindings/train",
         "Disease/NoFindings/train_mask"),
        (77, Kind.REGION, "MSD/Task03_Liver/train.json", "MSD/Task03_Liver/train",
         "MSD/Task03_Liver/train_mask"),
        (93, Kind.REGION, "WSSS4LUAD/train.json", "WSSS4LUAD/train", "WSSS4LUAD/train_mask"),
    ],
)  # fmt: skip
def test_rows(datasets, number, kind, table, images, masks):
    root, dataset = Path("data/Biomed"), datasets[number - 1]
    assert dataset.kind == kind
    assert dataset.annotation_path == root / table
    assert dataset.image_folder == root / images
    assert masks is None or dataset.mask_folder == root / masks


@pytest.mark.parametrize(
    ("kind", "repetitions"),
    [
        (Kind.SEGMENTATION, (50, 3, 1)),
        (Kind.DISEASE, (50, 3, 1)),
        (Kind.CAPTION, (50, 3, 1)),
        (Kind.REGION, (30, 2, 1)),
        (Kind.SEQUENCE, (10, 10, 10)),
        (Kind.VQA, (2, 2, 2)),
        (Kind.REPORT, (2, 2, 2)),
    ],
)
def test_balancing(datasets, kind, repetitions):
    """Up to 5000 samples, regions 3000, by whole repeats; volumes and RadGenome a fixed number of times."""
    found = {
        tuple(map(dataset.repetitions, (100, 1500, 6000))) for dataset in datasets if dataset.kind == kind
    }
    assert found == {repetitions}


def test_ten_slices_of_a_volume(datasets):
    assert {dataset.slices for dataset in datasets if dataset.kind is Kind.SEQUENCE} == {10}


@pytest.mark.skipif(not TABLE.is_file(), reason="the reference's list of datasets is not here")
def test_every_row_is_the_references(datasets):
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["in_biomed"] == "yes"]
    assert [int(row["order_in_biomed"]) for row in rows] == [*range(1, len(datasets) + 1)]
    for row, dataset in zip(rows, datasets, strict=True):
        balance, fixed = int(row["balance_min_items"] or 0), row["effective_repeat_rule"].startswith("len = ")
        repeats = int(row["repeats_arg"]) if fixed else 1
        assert dataset.kind == TASKS[row["task"]]
        assert Path(dataset.root) == Path(row["root"])
        assert dataset.annotation_path == Path(row["annotation_file"])
        assert dataset.image_folder == Path(row["image_dir"])
        assert not row["mask_dir"] or dataset.mask_folder == Path(row["mask_dir"])
        for records in (1, 999, 1700, 2600, 9000):
            assert dataset.repetitions(records) == repeats * max(1, balance // records)
        assert not row["sampled_slices"] or dataset.slices == int(row["sampled_slices"])


def test_the_layout_is_read_as_the_right_tasks(tmp_path, monkeypatch, datasets):
    """`train.json` is a disease in one folder, a caption in another, and two tasks in a third."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data" / "Biomed"
    for folder in ("Disease/LungTumor", "BreastUS"):
        save_picture(root / folder / "train" / "0.png")
        save_square(root / folder / "train_mask" / "0_liver.png")
        write_table(root / folder / "train.json", coco_table(1))
    save_picture(root / "MedTrinity" / "images" / "0.png")
    caption = {"file_name": "images/0.png", "caption": "A chest X-ray."}
    write_table(root / "MedTrinity" / "train.json", {"images": [], "annotations": [caption]})

    present = [dataset for dataset in datasets if Path(dataset.root).is_dir()]
    mixture = read_mixture(present)
    check_files(mixture.records)
    assert [(record.name, record.kind) for record in mixture.records] == [
        ("MedTrinity/caption:train/images/0.png", Kind.CAPTION),
        ("BreastUS/segmentation:train/0_liver.png", Kind.SEGMENTATION),
        ("Disease/LungTumor/disease:train/0_liver.png", Kind.DISEASE),
        ("BreastUS/region:train/0_liver.png", Kind.REGION),
    ]
    assert [samples for _, _, samples in mixture.sizes] == [5000, 5000, 5000, 3000]
