"""The volumes of the sample dataset: which, in what window, with which targets, in which split."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from unibiomed_jax.datasets.volumes import VolumeTarget
from unibiomed_jax.inputs.volumes import apply_window, load_labelled, percentile_window

SOFT_TISSUE = (-160.0, 240.0)  # HU
SARCOMA = "soft tissue sarcoma"
# Patients with CT and MRI volumes; their split follows from the patient like that of all their images.
SARCOMA_PATIENTS = ("STS_008", "STS_019", "STS_024", "STS_025", "STS_042")

# Organs of the multi-organ scans: name -> labels that make it up.
ORGANS = {
    "liver": ("liver",),
    "spleen": ("spleen",),
    "right kidney": ("kidney_right",),
    "left kidney": ("kidney_left",),
    "stomach": ("stomach",),
    "colon": ("colon",),
    "small bowel": ("small_bowel",),
    "urinary bladder": ("urinary_bladder",),
    "aorta": ("aorta",),
    "vertebrae": (),  # every label that begins so, and the sacrum
    "hip bones": ("hip_left", "hip_right"),
    "gluteal muscles": tuple(
        f"gluteus_{part}_{side}" for part in ("maximus", "medius", "minimus") for side in ("left", "right")
    ),
    "back muscles": ("autochthon_left", "autochthon_right"),
}


@dataclass(frozen=True)
class Volume:
    """One scan ready to be written."""

    # Folder of the sample dataset that it goes to, and its own name there.
    folder: str
    name: str
    # Source folder (for the attribution), namespace and name of the patient, split if set by hand.
    source: str
    namespace: str
    patient: str
    split: str
    pixels: np.ndarray
    window: tuple[float, float]
    targets: list[VolumeTarget]
    # 2-D annotations are written for every so many slices; 0 for none.
    table_step: int = 0


def read_volumes(data: Path) -> Iterator[Volume]:
    """All volumes of the source folders, one after the other."""
    yield from _organ_volumes(data / "totalsegmentator")
    yield from _sarcoma_volumes(data / "ibsi_sts")
    yield _whole_body_pet(data / "sts_pet_raw")
    yield from _brain_volumes(data / "pyradiomics")
    yield _nuclei_stack(data / "stardist_nuclei")


def _organ_volumes(folder: Path) -> Iterator[Volume]:
    tables = json.loads((folder / "labels.json").read_text())
    for image, labels, table, place, patient in (
        ("example_ct", "example_seg_fast_force_split", "total", "abdomen CT", "a"),
        ("example_mr_sm", "example_seg_mr", "total_mr", "abdomen MRI", "c"),
    ):
        voxels, values = load_labelled(folder / f"{image}.nii.gz", folder / f"{labels}.nii.gz")
        names = {int(value): name for value, name in tables[table].items()}
        targets = []
        for organ, parts in ORGANS.items():
            wanted = [
                value
                for value, name in names.items()
                if name in parts or (not parts and (name.startswith("vertebrae") or name == "sacrum"))
            ]
            targets.append(VolumeTarget(organ, (f"{organ} in {place}",), np.isin(values, wanted)))
        ct = place.endswith("CT")
        window = SOFT_TISSUE if ct else percentile_window(voxels)
        if ct:  # every second of the 112 slices of 3 mm
            voxels, targets = voxels[::2], [replace(target, mask=target.mask[::2]) for target in targets]
        pixels = apply_window(voxels, window)
        name = "abdomen_ct" if ct else "abdomen_mri"
        yield Volume(name, f"{name}_{patient}", folder.name, folder.name, patient, "train", pixels, window,
                     targets, 1)  # fmt: skip
    # Another patient, held out: every fourth slice of 1.5 mm.
    crop = folder / "aorta_report"
    voxels, values = load_labelled(crop / "ct_cropped.nii.gz", crop / "aorta.nii.gz")
    target = VolumeTarget("aorta", ("aorta in abdomen CT",), values[::4] > 0)
    yield Volume("chest_ct", "chest_ct_b", folder.name, folder.name, "b", "test",
                 apply_window(voxels[::4], SOFT_TISSUE), SOFT_TISSUE, [target], 1)  # fmt: skip


def _sarcoma_volumes(folder: Path) -> Iterator[Volume]:
    # Every second patient, and all with CT and MRI.
    patients = sorted(path.name for path in folder.glob("STS_*"))
    for patient in sorted({*patients[::2], *SARCOMA_PATIENTS}):
        for file, modality in (("CT", "CT"), ("MR_T1", "MRI"), ("PET", "PET")):
            path = folder / patient / f"{file}_image.nii.gz"
            if not path.is_file() or (modality != "PET" and patient not in SARCOMA_PATIENTS):
                continue
            voxels, values = load_labelled(path, folder / patient / f"{file}_mask.nii.gz")
            mask = values > 0
            inside = np.flatnonzero(mask.any((1, 2)))
            # A few slices, evenly from the contour's first to its last.
            chosen = np.unique(
                np.linspace(inside[0], inside[-1], 8 if modality == "PET" else 12).round().astype(int)
            )
            window = {"CT": SOFT_TISSUE, "PET": (0.0, 10.0)}.get(modality) or percentile_window(
                voxels, 0, 99.5
            )
            pixels, mask = apply_window(voxels[chosen], window), mask[chosen]
            if modality == "PET":  # voxels of 5 mm: magnified as their 2-D slices are
                pixels, mask = _magnify(pixels, 4), mask.repeat(4, 1).repeat(4, 2)
            target = VolumeTarget(SARCOMA, (f"{SARCOMA} in body {modality}",), mask)
            name = f"sarcoma_{modality.lower()}"
            yield Volume(name, f"{patient}_{modality.lower()}", folder.name, "sts", patient, "", pixels,
                         window, [target])  # fmt: skip


def _whole_body_pet(folder: Path) -> Volume:
    files = ("STS_001_FDG_PET_SUV.nii.gz", "STS_001_FDG_PET_GTV_mask.nii.gz")
    voxels, values = load_labelled(*(folder / file for file in files))
    chosen = np.arange(1, len(values), 4)
    target = VolumeTarget(SARCOMA, (f"{SARCOMA} in body PET",), values[chosen] > 0)
    window = (0.0, 10.0)  # SUV
    return Volume("sarcoma_pet", "STS_001_wholebody", folder.name, "sts", "STS_001", "",
                  apply_window(voxels[chosen], window), window, [target])  # fmt: skip


def _brain_volumes(folder: Path) -> Iterator[Volume]:
    for patient, split in (("brain1", "train"), ("brain2", "test")):
        voxels, mask = (_load_nrrd(folder / f"{patient}_{part}.nrrd") for part in ("image", "label"))
        inside = np.flatnonzero(mask.any((1, 2)))
        chosen = slice(max(0, inside[0] - 2), inside[-1] + 3)
        window = percentile_window(voxels)
        target = VolumeTarget("brain tumor", ("brain tumor in brain MRI",), mask[chosen] > 0)
        yield Volume("brain_tumor_mri", patient, folder.name, folder.name, patient, split,
                     apply_window(voxels[chosen], window), window, [target], 1)  # fmt: skip


def _nuclei_stack(folder: Path) -> Volume:
    with Image.open(folder / "img3d.tif") as image, Image.open(folder / "mask3d.tif") as labels:
        voxels = np.stack([_frame(image, number) for number in range(image.n_frames)])
        mask = np.stack([_frame(labels, number) for number in range(labels.n_frames)]) > 0
    window = percentile_window(voxels)
    target = VolumeTarget("cell nuclei", ("cell nuclei in cell microscopy",), mask)
    return Volume("nuclei_stack", "embryo", folder.name, folder.name, "img3d", "train",
                  apply_window(voxels, window), window, [target], 3)  # fmt: skip


def _frame(image: Image.Image, number: int) -> np.ndarray:
    image.seek(number)
    return np.asarray(image)


def _magnify(pixels: np.ndarray, factor: int) -> np.ndarray:
    height, width = pixels.shape[1:]
    size = (width * factor, height * factor)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in pixels]
    )


def _load_nrrd(path: Path) -> np.ndarray:
    """Voxels of a gzip NRRD file in left-posterior-superior axes as (slices, rows, columns), front up."""
    header, _, data = path.read_bytes().partition(b"\n\n")
    fields = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
    dtype = {"short": "<i2", "int": "<i4", "unsigned short": "<u2"}[fields["type"]]
    shape = tuple(int(size) for size in fields["sizes"].split())
    voxels = np.frombuffer(gzip.decompress(data), dtype).reshape(shape[::-1])
    # Rows and columns run to the back and to the left, except along axes of negative direction.
    for axis, direction in enumerate(fields["space directions"].split()):
        if float(direction.strip("()").split(",")[axis]) < 0:
            voxels = np.flip(voxels, 2 - axis)
    return voxels
