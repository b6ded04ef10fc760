"""Datasets in the readers' format from what people have: images and masks, or NIfTI volumes and labels."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from unibiomed_jax.data.files import require_mask_size
from unibiomed_jax.data.tables import owner
from unibiomed_jax.datasets.volumes import split_labels, write_volume
from unibiomed_jax.datasets.write import (
    SPLITS,
    CocoTable,
    assign_splits,
    fit_size,
    mask_name,
    save_image,
    save_json,
    save_mask,
)
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import is_text, new_folder, read_json, shown, spelled
from unibiomed_jax.inputs.images import open_image
from unibiomed_jax.inputs.masks import open_mask
from unibiomed_jax.inputs.tokenizer import require_text
from unibiomed_jax.inputs.volumes import apply_window, load_labelled, load_labels, percentile_window
from unibiomed_jax.masks.resize import resize_mask

# A GIF is more often an animation than an image to learn from.
_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
# Where readers look for something else than a volume.
_TAKEN = {"mask", *SPLITS, *(f"{split}_mask" for split in SPLITS)}


@dataclass(frozen=True)
class BuildOptions:
    """Make a dataset from images and masks, or from NIfTI volumes and label volumes."""

    # Folder to write; must not exist yet.
    out: Path
    # How the images were taken, for the sentence "<target> in <site> <modality>": CT, ultrasound, ...
    modality: str
    # What they show, for the same sentence: abdomen, retinal, ...
    site: str
    # Folder of images; needs `masks`.
    images: Path | None = None
    # Folder of masks named <image stem>_<target>.png, black outside the target; + for blanks in it.
    masks: Path | None = None
    # Folder of NIfTI volumes; needs `labels` and `label_names`.
    volumes: Path | None = None
    # Folder of label volumes, named as the volumes and with the same voxels.
    labels: Path | None = None
    # JSON file of label values and their names: {"1": "liver", "2": "spleen"}; other values are left out,
    # those of one name are one target.
    label_names: Path | None = None
    # Grey values that become black and white; by default the 0.5 and 99.5 percentiles of each volume. Give
    # the window for CT: -160 240 shows soft tissue.
    window: tuple[float, float] | None = None
    # Targets that are findings: also written as grounded disease recognition.
    findings: tuple[str, ...] = ()
    # Regular expression whose first group is the patient in a file name; by default every file is one.
    patient: str = "(.*)"
    # Shares of images in train, val and test; patients are never divided.
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    # Another seed, another split.
    seed: int = 42
    # Reduce 2-D images to this long side in pixels; by default they keep their size.
    long_side: int | None = None


@dataclass
class BuildReport:
    """What `build` wrote."""

    out: Path
    # By split: patients, images or volumes, annotations.
    patients: Counter
    images: Counter
    annotations: Counter
    # By target: annotations.
    targets: Counter
    # Images and volumes that have no mask and were left out.
    without_masks: list[Path]
    # Masks that are empty, or too small to be seen at the size that is written.
    empty_masks: list[Path]
    # What else lies in the given folders, such as files of other endings and sub-folders.
    not_read: list[Path]
    # Why splits that were to have a share got nothing.
    empty_splits: dict[str, str]

    def table(self) -> Table:
        """For the terminal: one row per split."""
        table = Table("split", "patients", "images or volumes", "annotations")
        for split in SPLITS:
            counts = (self.patients[split], self.images[split], self.annotations[split])
            table.add_row(split, *map(str, counts))
        return table


def build(options: BuildOptions) -> BuildReport:
    """Write the dataset beside its final place, then move it there.

    Tables: {split}.json (segmentation), {split}_region.json, {split}_disease.json for findings, and for
    volumes meta_{split}.json.

    Raises:
        InputError: folders that are missing or do not fit together, files that cannot be read, masks that
            are all empty, a mask of another size than its image, labels that lie elsewhere than their
            volume, an empty window, a name without patient or target or that readers would mistake, a
            finding that is no target, a place that cannot be written.
        DiskFullError: the disk is full.
    """
    pairs = ((options.images, options.masks), (options.volumes, options.labels))
    given = [pair for pair in pairs if pair != (None, None)]
    if len(given) != 1 or None in given[0]:
        raise InputError("Give either images and masks, or volumes and labels.")
    if options.long_side is not None and options.long_side < 1:
        raise InputError(f"long_side={options.long_side} must be at least 1.")
    for name, text in (("modality", options.modality), ("site", options.site)):
        require_text(text, name)
    for folder in given[0]:
        if not folder.is_dir():
            raise InputError(f"The folder {shown(folder)} does not exist; check the path.")
    if options.out.exists():
        raise InputError(f"{shown(options.out)} exists already; remove it or choose another place.")
    try:
        with new_folder(options.out) as folder:
            return (_build_images if options.images else _build_volumes)(options, folder)
    except OSError as error:
        raise InputError(
            f"{shown(options.out)} was not written ({shown(str(error))}); mend that or choose another place."
        ) from error


class _Writer:
    """Tables of all splits, and the counts for the report."""

    def __init__(self, options: BuildOptions, stems: list[str]):
        self.options = options
        self.patients = {stem: _patient(options.patient, stem) for stem in stems}
        self.splits = assign_splits(self.patients.values(), options.fractions, options.seed)
        self.targets = {split: CocoTable(split) for split in SPLITS}
        self.volumes: dict[str, dict] = {split: {} for split in SPLITS}

    def place(self, stem: str) -> tuple[str, str]:
        patient = self.patients[stem]
        return patient, self.splits[patient]

    def words(self, target: str) -> tuple[str]:
        return (f"{target} in {self.options.site} {self.options.modality}",)

    def save(
        self, folder: Path, without_masks: list[Path], empty_masks: list[Path], others: list[Path]
    ) -> BuildReport:
        options = self.options
        # One given folder may lie in another, the label names in either.
        given = (options.images, options.masks, options.volumes, options.labels, options.label_names)
        not_read = [path for path in others if path not in given]
        counts = (Counter(), Counter(), Counter(), Counter())
        report = BuildReport(options.out, *counts, without_masks, empty_masks, not_read, {})
        for split, table in self.targets.items():
            people = {image["patient"] for image in table.images.values()}
            report.patients[split] = len(people)
            report.images[split] = len(self.volumes[split]) or len(table.images)
            report.annotations[split] = len(table.annotations)
            if not table.annotations:
                if options.fractions[SPLITS.index(split)]:
                    report.empty_splits[split] = self._why_empty(split)
                continue
            table.save(folder / f"{split}.json")
            table.save(folder / f"{split}_region.json")
            names = {number: name for name, number in table.categories.items()}
            findings = CocoTable(split)
            for row in table.annotations:
                target = names[row["category_id"]]
                report.targets[target] += 1
                if target in options.findings:
                    image = table.images[row["file_name"]]
                    size = (image["width"], image["height"])
                    place = (row["file_name"], size, image["patient"], row["mask_file"])
                    findings.add(*place, target, self.words(target))
            if findings.annotations:
                findings.save(folder / f"{split}_disease.json")
            if self.volumes[split]:
                save_json(folder / f"meta_{split}.json", {"volumes": self.volumes[split]})
        return report

    def _why_empty(self, split: str) -> str:
        if split in self.splits.values():
            return "all masks of its patients are empty"
        people = len(self.splits)
        count = "is one patient" if people == 1 else f"are {people} patients"
        return f"there {count}, and a patient is never divided"


def _build_images(options: BuildOptions, folder: Path) -> BuildReport:
    files, others = _listing(options.images, _is_image)
    masks, mask_others = _listing(options.masks, _is_image)
    images = _by_stem(files, lambda path: path.stem)
    owned: dict[str, dict[str, Path]] = {stem: {} for stem in images}
    for mask in masks:
        name = spelled(mask.stem)
        stem = owner(name, images)
        if stem is None:
            raise InputError(
                f"The mask {mask} belongs to no image in {options.images}; name it <image stem>_<target>"
                f"{mask.suffix}."
            )
        target = name[len(stem) + 1 :].replace("+", " ").replace("_", " ").strip()
        if not target:
            raise InputError(f"The mask {mask} names no target; name it <image stem>_<target>{mask.suffix}.")
        if target in owned[stem]:
            raise InputError(f"{owned[stem][target]} and {mask} are masks of one target; merge them.")
        owned[stem][target] = mask
    with_masks = [stem for stem in images if owned[stem]]
    if not with_masks:
        raise InputError(
            f"{options.masks} holds no mask of an image in {options.images}; check both folders."
        )
    options = _with_findings(options, {target for targets in owned.values() for target in targets})
    writer, empty = _Writer(options, with_masks), []
    for stem in with_masks:
        patient, split = writer.place(stem)
        image, _ = open_image(images[stem])
        size = fit_size(*image.size, options.long_side)
        for target, path in owned[stem].items():
            mask = open_mask(path)
            require_mask_size(stem, str(path), mask.shape[::-1], image.size)
            mask = resize_mask(mask, size)
            if not mask.any():  # nothing was there, or it is too small for `long_side`
                empty.append(path)
                continue
            mask_file = mask_name(stem, target)
            save_mask(folder / f"{split}_mask" / mask_file, mask)
            words = writer.words(target)
            writer.targets[split].add(f"{stem}.png", size, patient, mask_file, target, words)
        if f"{stem}.png" in writer.targets[split].images:
            save_image(folder / split / f"{stem}.png", np.asarray(image), options.long_side)
    if not any(table.annotations for table in writer.targets.values()):
        raise InputError(f"All masks in {options.masks} are empty; draw them, or give a larger long_side.")
    without_masks = [images[stem] for stem in images if not owned[stem]]
    return writer.save(folder, without_masks, empty, others + mask_others)


def _build_volumes(options: BuildOptions, folder: Path) -> BuildReport:
    names = _read_label_names(options.label_names)
    options = _with_findings(options, set(names.values()))
    files, others = _listing(options.volumes, _is_nifti)
    label_files, label_others = _listing(options.labels, _is_nifti)
    volumes, labels = _by_stem(files, _nifti_stem), _by_stem(label_files, _nifti_stem)
    if not volumes:
        raise InputError(f"{options.volumes} holds no NIfTI files (.nii, .nii.gz); check the path.")
    for stem, path in volumes.items():
        if stem not in labels:
            raise InputError(f"{path} has no label volume of its name in {options.labels}; add it.")
        if stem in _TAKEN:
            raise InputError(f"{path} has a name that datasets keep for other folders; rename it.")
    for stem, path in labels.items():
        if stem not in volumes:
            raise InputError(f"{path} has no volume of its name in {options.volumes}; add or remove it.")
    # Read ahead, because the splits are shares of what will be written.
    with_masks = [stem for stem in volumes if np.isin(load_labels(labels[stem])[0], list(names)).any()]
    if not with_masks:
        raise InputError(
            f"The volumes of {options.labels} hold none of the labels "
            f"{', '.join(f'{value} ({name})' for value, name in names.items())}; correct "
            f"{options.label_names}."
        )
    writer = _Writer(options, with_masks)
    for stem in with_masks:
        patient, split = writer.place(stem)
        voxels, values = load_labelled(volumes[stem], labels[stem])
        low, high = window = options.window or percentile_window(voxels)
        if not (low < high and math.isfinite(high - low)):
            raise InputError(
                f"The window {low:g}..{high:g} of {volumes[stem]} is empty or endless; give window two "
                "numbers, the lower first."
            )
        writer.volumes[split][stem] = write_volume(
            folder,
            stem,
            apply_window(voxels, window),
            split_labels(values, names, writer.words),
            patient=patient,
            window=window,
            table=writer.targets[split],
        )
    without_masks = [path for stem, path in volumes.items() if stem not in with_masks]
    return writer.save(folder, without_masks, [], others + label_others)


def _listing(folder: Path, wanted: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """The files of a folder that are wanted, and what else is in it; hidden ones (.DS_Store) do not count.

    Raises:
        InputError: a wanted file's name cannot be written into a table.
    """
    files, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not (wanted(path) and path.is_file()):
            others.append(path)
        elif not is_text(path.name):
            raise InputError(f"The name of {shown(path)} is no UTF-8 text; rename the file.")
        else:
            files.append(path)
    return files, others


def _by_stem(files: Iterable[Path], stem: Callable[[Path], str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        name = spelled(stem(path))
        if name in found:
            raise InputError(f"{found[name]} and {path} have one name; rename one of them.")
        found[name] = path
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def _nifti_stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _read_label_names(path: Path | None) -> dict[int, str]:
    if path is None:
        raise InputError('Volumes need label_names, a JSON file such as {"1": "liver"}; write one.')
    table = read_json(path, remedy='write a JSON object such as {"1": "liver"}', unique_keys=True)
    try:
        names = {int(value): name for value, name in table.items()}
    except (ValueError, AttributeError) as error:
        raise InputError(
            f'{shown(path)} must be a JSON object such as {{"1": "liver"}} ({error}).'
        ) from error
    for value, name in names.items():
        if not isinstance(name, str) or not name.strip() or set(name) & {"/", "\\"}:
            raise InputError(
                f"{path} names the label {value} {json.dumps(name)}; give it a name in words, without "
                "slashes."
            )
    return {value: spelled(name) for value, name in names.items()}


def _with_findings(options: BuildOptions, targets: set[str]) -> BuildOptions:
    """The options with findings spelled as the targets are."""
    findings = tuple(spelled(finding) for finding in options.findings)
    for finding in findings:
        if finding not in targets:
            known = ", ".join(sorted(targets))
            raise InputError(f"The finding {finding!r} is no target; the targets are {known}.")
    return replace(options, findings=findings)


def _patient(pattern: str, stem: str) -> str:
    try:
        match = re.search(pattern, stem)
    except re.error as error:
        raise InputError(f"patient={pattern!r} is no regular expression ({error}); correct it.") from error
    if match is None or not match.groups() or not match.group(1):
        raise InputError(
            f"patient={pattern!r} finds no patient in the name {stem!r}; give an expression with one group "
            "that matches every file name."
        )
    return match.group(1)
