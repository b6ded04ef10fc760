"""unibiomed-tiny, third run: on from the result of configs/tiny_continued.py, masks from 256 x 256 pixels.

Under two hours on two CPU cores; configs/tiny_fine.py goes on from its result.
"""

import dataclasses
import runpy
from pathlib import Path

from unibiomed_jax.data.records import DatasetConfig, Kind

second = runpy.run_path(str(Path(__file__).with_name("tiny_continued.py")))["config"]

# Neither targets nor sentences of these datasets tell left from right, those of the second list not even top
# from bottom.
SIDES_ALIKE = (
    "brain_tumor_mri",
    "brisc_brain_tumor_mri",
    "hc18_fetal_head",
    "idrid_fundus",
    "kidney_t2_mri",
    "liver_mass_us",
    "sarcoma_ct",
    "sarcoma_mri",
    "sarcoma_pet",
    "sts_sarcoma_ct",
    "sts_sarcoma_pet",
    "sts_sarcoma_t1_mri",
    "sts_wholebody_pet",
)
ANY_WAY_UP = (
    "auto_isic2017_dermoscopy",
    "glomeruli_pathology",
    "isic2017",
    "nuclei_stack",
    "octa_faz",
    "rings_prostate_pathology",
)


def adapted(dataset: DatasetConfig) -> DatasetConfig:
    """The dataset, mirrored in the directions in which it may be, with fewer slices of its volumes."""
    name = Path(dataset.root).name
    mirror = ("horizontal", "vertical") if name in ANY_WAY_UP else ("horizontal",) * (name in SIDES_ALIKE)
    if dataset.kind in (Kind.VQA, Kind.REPORT):  # they say where
        mirror = ()
    augment = dataclasses.replace(second.data.sample.augment, mirror=mirror)
    # Volumes cost most: three slices that are shown and one that is followed are enough.
    return dataclasses.replace(dataset, augment=augment, slices=4)


# Of the organs of one patient only the slices come, one by one.
datasets = tuple(
    adapted(dataset)
    for dataset in second.data.datasets
    if dataset.kind is not Kind.SEQUENCE or not Path(dataset.root).name.startswith("abdomen")
)

config = dataclasses.replace(
    second,
    folder="runs/tiny_large",
    initial=f"{second.folder}/model",
    model=dataclasses.replace(second.model, sam2=dataclasses.replace(second.model.sam2, image_size=256)),
    data=dataclasses.replace(second.data, datasets=datasets, seed=44),
    optim=dataclasses.replace(second.optim, steps=11500),
)
