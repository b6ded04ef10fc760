"""Build the sample dataset from the folders of real images that it comes from.

    python scripts/build_sample_dataset.py --data FOLDER --out sample_data          # what may ship
    python scripts/build_sample_dataset.py --data FOLDER --out sample_all --all     # and what may not

2-D images are brought down to 256 px on the long side (JPEG), volumes keep their voxels (PNG), masks are
1-bit PNG. Every split is by patient, as far as the source tells patients apart.
"""

import collections
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from sample_attribution import LICENCES, README, write_attribution, write_readme  # noqa: E402
from sample_sources import MICROSCOPY, SOURCES, Source, patient_of  # noqa: E402
from sample_volumes import Volume, read_volumes  # noqa: E402

from unibiomed_jax.commands.run import main  # noqa: E402
from unibiomed_jax.datasets.volumes import write_volume  # noqa: E402
from unibiomed_jax.datasets.write import (  # noqa: E402
    SPLITS,
    CocoTable,
    assign_splits,
    fit_size,
    mask_name,
    save_image,
    save_json,
    save_mask,
)
from unibiomed_jax.errors import InputError  # noqa: E402
from unibiomed_jax.files import new_folder  # noqa: E402
from unibiomed_jax.masks.resize import resize_mask  # noqa: E402

LONG_SIDE = 256
QUALITY = 88
# Targets that shrink below this are left out.
MIN_PIXELS = 16
QUESTION_IMAGES = "vqa_rad"


@dataclass(frozen=True)
class Picture:
    """One image of a source folder."""

    source: Source
    stem: str
    path: Path
    # Namespace and patient; equal keys are one person.
    key: tuple[str, str]


def find_pictures(data: Path, everything: bool) -> list[Picture]:
    pictures = []
    for source in SOURCES:
        if not (source.ships or everything):
            continue
        folder = data / source.folder
        # chase_db1 keeps images and masks side by side.
        images = folder / "images"
        paths = sorted(images.iterdir() if images.is_dir() else folder.glob("*.jpg"))
        patients = {path: patient_of(source, path.stem) for path in paths}
        if source.gap:
            patients = merge_neighbours(patients, source.gap)
        namespace = source.namespace or source.folder
        pictures += [Picture(source, path.stem, path, (namespace, patients[path])) for path in paths]
    return pictures


def merge_neighbours(numbers: dict[Path, str], gap: int) -> dict[Path, str]:
    """Running numbers closer than `gap` become one patient, named after the first."""
    merged, first, last = {}, None, None
    for path, number in sorted(numbers.items(), key=lambda item: int(item[1])):
        if last is None or int(number) - last >= gap:
            first = number
        merged[path], last = first, int(number)
    return merged


def split_patients(pictures: list[Picture], volumes: list[Volume], question_images: list[str]) -> dict:
    """(namespace, patient) -> split, decided once for every folder that shares the namespace."""
    patients, pins, fractions = collections.defaultdict(list), collections.defaultdict(dict), {}
    for picture in pictures:
        namespace, patient = picture.key
        patients[namespace].append(patient)
        pins[namespace].update(picture.source.pinned)
        fractions.setdefault(namespace, picture.source.fractions)
        if picture.source.split:
            pins[namespace][patient] = picture.source.split
    for volume in volumes:
        patients[volume.namespace].append(volume.patient)
        if volume.split:
            pins[volume.namespace][volume.patient] = volume.split
    patients[QUESTION_IMAGES] += question_images
    splits = {}
    for namespace, members in patients.items():
        found = assign_splits(members, fractions.get(namespace, Source.fractions), pinned=pins[namespace])
        splits.update({(namespace, patient): split for patient, split in found.items()})
    return splits


class Tables:
    """The tables of one dataset folder, saved at the end."""

    def __init__(self):
        self.coco: dict[tuple[str, str], CocoTable] = {}
        self.findings: dict[str, dict] = collections.defaultdict(dict)
        self.volumes: dict[str, dict] = collections.defaultdict(dict)

    def get(self, split: str, task: str = "") -> CocoTable:
        return self.coco.setdefault((split, task), CocoTable(split))

    def save(self, folder: Path) -> None:
        for (split, task), table in self.coco.items():
            table.save(folder / (f"{split}_{task}.json" if task else f"{split}.json"))
        for split, samples in self.findings.items():
            save_json(folder / f"{split}_parse.json", samples)
        for split, volumes in self.volumes.items():
            save_json(folder / f"meta_{split}.json", {"volumes": volumes})


def load_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits: stretched between its extremes
            values = np.asarray(image).astype(np.float32)
            return np.rint((values - values.min()) * (255 / (values.max() - values.min()))).astype(np.uint8)
        pixels = np.asarray(image.convert("RGB"))
    grey = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0] if grey else pixels


def load_masks(picture: Picture) -> dict[str, np.ndarray]:
    """Target name -> boolean mask, of every target of the source that this image has."""
    found = {}
    names = {name for target in picture.source.targets for name in (target.union or (target.name,))}
    for name in names:
        if picture.source.folder == "chase_db1":
            path = picture.path.with_name(f"{picture.stem}_1stHO.png")
        elif picture.source is MICROSCOPY:
            path = picture.path.with_name("mask2d.tif")
        else:
            path = picture.path.parents[1] / "masks" / mask_name(picture.stem, name)
        if path.is_file():
            with Image.open(path) as image:
                mask = np.asarray(image)
            found[name] = (mask[..., 0] if mask.ndim == 3 else mask) > 0
    for target in picture.source.targets:
        parts = [found[name] for name in target.union if name in found]
        if parts:
            found[target.name] = np.any(parts, axis=0)
    return found


def write_picture(picture: Picture, split: str, folder: Path, tables: Tables, captions: CocoTable) -> None:
    source, file_name = picture.source, f"{picture.stem}.jpg"
    pixels, masks = load_pixels(picture.path), load_masks(picture)
    if source.upside_down:
        pixels, masks = pixels[::-1], {name: mask[::-1] for name, mask in masks.items()}
    size = fit_size(pixels.shape[1], pixels.shape[0], LONG_SIDE)
    kept = {}
    for target in source.targets:
        if target.name in masks:
            mask = resize_mask(masks[target.name], size, target.cover)
            if mask.sum() >= MIN_PIXELS:
                kept[target] = mask
    if not kept:
        return
    save_image(folder / split / file_name, pixels, LONG_SIDE, QUALITY)
    patient = "/".join(picture.key)
    for target, mask in kept.items():
        mask_file = mask_name(picture.stem, target.name)
        save_mask(folder / f"{split}_mask" / mask_file, mask)
        row = (file_name, size, patient, mask_file, target.words[0].split(" in ")[0])
        tables.get(split).add(*row, target.words)
        if target.region:
            tables.get(split, "region").add(*row, target.words[:1])
        if target.disease:
            tables.get(split, "disease").add(*row, [target.disease])
    add_findings(picture, split, folder, tables, kept, size, patient)
    shown = [target.words[0].split(" in ")[0] for target in kept if target.region or len(kept) == 1]
    shown = list(dict.fromkeys(shown))
    caption = f"{source.picture} showing {enumerate_names(shown)}." if shown else f"{source.picture}."
    captions.add_caption(f"{source.folder}/{split}/{file_name}", size, patient, caption)


def add_findings(
    picture: Picture,
    split: str,
    folder: Path,
    tables: Tables,
    kept: dict,
    size: tuple[int, int],
    patient: str,
) -> None:
    """Grounded questions and reports: the image's findings, or none where the source says it is healthy."""
    source, file_name = picture.source, f"{picture.stem}.jpg"
    if not source.anatomy:
        return
    healthy = bool(source.healthy) and re.match(source.healthy, picture.stem) is not None
    if healthy:
        mask_file, words = mask_name(picture.stem, "no findings"), f"no findings in {place_of(source)}"
        save_mask(folder / f"{split}_mask" / mask_file, np.zeros(size[::-1], bool))
        tables.get(split, "disease").add(file_name, size, patient, mask_file, "no findings", [words])
        findings, files = ["no findings"], [f"{split}_mask/{mask_file}"]
        report = "The organ is reported as healthy."
    else:
        targets = [target for target in kept if target.disease]
        if not targets:
            return
        # What a union is made of is reported part by part.
        parts = [target for target in kept if target.name in targets[0].union] or targets[:1]
        findings = [target.words[0].split(" in ")[0] for target in parts]
        files = [f"{split}_mask/{mask_name(picture.stem, target.name)}" for target in parts]
        report = describe(kept[targets[0]])
    single = len(findings) == 1
    tables.findings[split][str(len(tables.findings[split]))] = {
        "image_file": f"{split}/{file_name}",
        "mask_file": files[0] if single else files,
        "anatomy": source.anatomy,
        "abnormality": findings[0] if single else findings,
        "report": report,
        "width": size[0],
        "height": size[1],
        "patient": patient,
    }


def place_of(source: Source) -> str:
    return source.targets[0].words[0].split(" in ", 1)[1]


def describe(mask: np.ndarray) -> str:
    """A sentence that the mask itself makes true: size and place of the outlined area."""
    share = mask.mean()
    size = "small" if share < 0.02 else "medium-sized" if share < 0.1 else "large"
    rows, columns = np.nonzero(mask)
    vertical = ("upper", "middle", "lower")[min(2, int(3 * rows.mean() / mask.shape[0]))]
    horizontal = ("left", "center", "right")[min(2, int(3 * columns.mean() / mask.shape[1]))]
    place = "center" if (vertical, horizontal) == ("middle", "center") else f"{vertical} {horizontal}"
    return f"A {size} area in the {place} of the image."


def enumerate_names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"


def write_questions(data: Path, out: Path, splits: dict) -> None:
    """vqa_rad: radiographs, CT and MR slices with questions and answers, as captions with own questions."""
    pairs = [
        pair
        for file in ("trainset.json", "testset.json")
        for pair in json.loads((data / QUESTION_IMAGES / file).read_text())
    ]
    tables, sizes = Tables(), {}
    for pair in pairs:
        stem = Path(pair["image_name"]).stem
        split = splits[QUESTION_IMAGES, stem]
        file_name = f"{split}/{stem}.jpg"
        if stem not in sizes:
            pixels = load_pixels(data / QUESTION_IMAGES / "images" / pair["image_name"])
            sizes[stem] = save_image(out / QUESTION_IMAGES / file_name, pixels, 224, 80)
        question, answer = str(pair["question"]).strip(), str(pair["answer"]).strip()
        tables.get(split, "captions").add_caption(
            file_name, sizes[stem], f"{QUESTION_IMAGES}/{stem}", answer, question=question
        )
    tables.save(out / QUESTION_IMAGES)


@dataclass(frozen=True)
class Options:
    """Build the sample dataset from the folders of real images that it comes from."""

    # Folder that holds the source folders.
    data: Path
    # Folder to write; an older one is replaced.
    out: Path
    # Also build what may not ship with the repository.
    all: bool = False


def build(options: Options) -> None:
    check_folders(options.data, options.out, options.all)
    with new_folder(options.out, overwrite=True) as folder:
        write_dataset(options.data, folder, options.all)


def check_folders(data: Path, out: Path, everything: bool) -> None:
    """Raise InputError if a source is missing, or if `out` is anything but an older sample dataset."""
    sources = [source.folder for source in SOURCES if source.ships or everything]
    for folder in (*sources, *LICENCES):
        if not (data / folder).is_dir():
            raise InputError(f"{data} does not hold the source folder {folder}; correct --data.")
    readme, title = out / "README.md", README.splitlines()[0]
    ours = (out / "ATTRIBUTION.md").is_file() and readme.is_file() and title in readme.read_text()
    if out.exists() and not ours:
        raise InputError(f"{out} is no sample dataset of this script; remove it or choose another --out.")


def write_dataset(data: Path, out: Path, everything: bool) -> None:
    """Fill the empty folder `out`."""
    pictures = find_pictures(data, everything)
    microscopy = data / MICROSCOPY.folder / "img2d.tif"
    pictures.append(Picture(MICROSCOPY, "img2d", microscopy, (MICROSCOPY.folder, "img2d")))
    volumes = list(read_volumes(data))
    question_images = [path.stem for path in sorted((data / QUESTION_IMAGES / "images").iterdir())]
    splits = split_patients(pictures, volumes, question_images)

    tables, captions = collections.defaultdict(Tables), {split: CocoTable(split) for split in SPLITS}
    for picture in pictures:
        split, folder = splits[picture.key], picture.source.folder
        write_picture(picture, split, out / folder, tables[folder], captions[split])
    for volume in volumes:
        split = splits[volume.namespace, volume.patient]
        entry = write_volume(
            out / volume.folder,
            volume.name,
            volume.pixels,
            volume.targets,
            patient=f"{volume.namespace}/{volume.patient}",
            window=volume.window,
            min_pixels=MIN_PIXELS,
            table=tables[volume.folder].get(split) if volume.table_step else None,
            table_step=volume.table_step or 1,
        )
        tables[volume.folder].volumes[split][volume.name] = entry
    for part, name in (("CT_image", "STS_025_ct"), ("CT_mask", "STS_025_ct_mask")):
        shutil.copyfile(
            data / "ibsi_sts" / "STS_025" / f"{part}.nii.gz", out / "sarcoma_ct" / f"{name}.nii.gz"
        )
    for folder, table in tables.items():
        table.save(out / folder)
    for split, table in captions.items():
        table.save(out / f"{split}_captions.json")
    write_questions(data, out, splits)
    sources = {picture.source.folder: picture.source for picture in pictures}
    volume_sources = {volume.folder: volume.source for volume in volumes if volume.source != "sts_pet_raw"}
    write_attribution(data, out, sources, volume_sources, LONG_SIDE)
    modalities = {folder: source.modality for folder, source in sources.items()}
    modalities["vqa_rad"] = "X-ray, CT, MRI"
    for volume in volumes:
        modalities[volume.folder] = f"{volume.targets[0].words[0].split()[-1]} (volumes)"
    write_readme(out, modalities, everything)


if __name__ == "__main__":
    main(Options, build)
