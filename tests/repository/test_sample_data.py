"""The dataset in the repository: what its README promises."""

import collections
import json
from pathlib import Path

import pytest
from places import SAMPLE_DATA

from unibiomed_jax.data.files import check_files
from unibiomed_jax.data.mixture import find_datasets, read_mixture
from unibiomed_jax.data.records import Kind

SPLITS = ("train", "val", "test")
FORBIDDEN = ("busbra", "chase_db1", "kvasir_polyp", "tnbc_pathology", "edd2020_endoscopy", "bus_uc_us",
             "utsw_glioma_t2_mri")  # fmt: skip


@pytest.fixture(scope="module")
def mixtures():
    return {
        split: read_mixture(find_datasets(SAMPLE_DATA, split, balance_to=0, repeats=1)) for split in SPLITS
    }


def test_every_file_is_there_and_none_besides(mixtures):
    used = set()
    for mixture in mixtures.values():
        check_files(mixture.records)
        for record in mixture.records:
            used.update(record.images)
            used.update(file for frames in record.masks for file in frames if file)
    used = {Path(path).resolve() for path in used}
    present = {path.resolve() for path in SAMPLE_DATA.rglob("*") if path.suffix in (".png", ".jpg")}
    unused = {path for path in present - used if "no+findings" not in path.name}
    # Slices of a volume in which the target does not occur belong to the volume all the same.
    assert all(path.parent.parent.joinpath("mask").is_dir() for path in unused)


def test_it_is_small_and_nothing_in_it_may_not_ship():
    files = [path for path in SAMPLE_DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    names = {path.name for path in SAMPLE_DATA.iterdir()}
    assert not names & set(FORBIDDEN)
    attribution = (SAMPLE_DATA / "ATTRIBUTION.md").read_text()
    for folder in (path for path in SAMPLE_DATA.iterdir() if path.is_dir()):
        section = attribution.split(f"\n## {folder.name}\n")[1].split("\n## ")[0]
        assert "\nLicence: " in section and len(section) > 150


def test_ten_modalities_and_every_task(mixtures):
    modalities = {
        record.texts[0].split()[-1]
        for split in ("train", "test")
        for record in mixtures[split].records
        if record.kind is Kind.SEGMENTATION
    }
    assert modalities == {"CT", "MRI", "PET", "OCT", "ultrasound", "X-ray", "pathology", "fundus",
                          "dermoscopy",
                          "microscopy"}  # fmt: skip
    for mixture in mixtures.values():
        assert {record.kind for record in mixture.records} == set(Kind)


def test_no_patient_is_in_two_splits(mixtures):
    places = collections.defaultdict(set)
    for split, mixture in mixtures.items():
        for record in mixture.records:
            assert record.patient, record.name
            places[record.patient].add(split)
    assert not {patient for patient, splits in places.items() if len(splits) > 1}
    assert sum(patient.startswith("sts/STS_") for patient in places) == 51


def test_outlines_by_algorithms_only_train_and_unknown_patients_stay_together():
    alone = {"nuinsseg_oesophagus_pathology", "camelyon_pathology", "ocdc_oral_cancer_pathology",
             "intracranial_hemorrhage_ct", "auto_isic2017_dermoscopy", "auto_cxr_vqarad_lungs"}  # fmt: skip
    for folder in alone:
        assert [
            path.name for path in sorted((SAMPLE_DATA / folder).glob("*.json")) if "train" not in path.name
        ] == []
    shown = json.loads((SAMPLE_DATA / "vqa_rad" / "train_captions.json").read_text())["images"]
    shown = {Path(image["file_name"]).stem for image in shown}
    assert {path.stem for path in (SAMPLE_DATA / "auto_cxr_vqarad_lungs" / "train").iterdir()} <= shown


def test_disease_and_region_words_are_those_of_segmentation(mixtures):
    words = {
        text
        for record in mixtures["train"].records
        if record.kind is Kind.SEGMENTATION
        for text in record.texts
    }
    regions = {
        text for record in mixtures["train"].records if record.kind is Kind.REGION for text in record.texts
    }
    assert regions <= words
    diseases = {
        text for record in mixtures["train"].records if record.kind is Kind.DISEASE for text in record.texts
    }
    assert {disease for disease in diseases - words if "no findings" not in disease} == {
        "diabetic retinopathy in retinal fundus"
    }
