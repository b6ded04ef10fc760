"""README.md and ATTRIBUTION.md of the sample dataset: what it holds, its sources, what was changed."""

import collections
import json
from pathlib import Path

# Folders that do not come from a list of sources with a licence of its own.
LICENCES = {
    "totalsegmentator": "Apache-2.0",
    "ibsi_sts": "CC BY 3.0",
    "sts_pet_raw": "CC BY 3.0",
    "pyradiomics": "BSD-3-Clause",
    "stardist_nuclei": "BSD-3-Clause; image CC0",
    "vqa_rad": "CC0",
}
HEAD = """# Attribution

Every folder keeps the licence of its source, which is stated here together with the people to name. Folders
under CC BY-SA may be passed on, changed or not, only under CC BY-SA. The text of each section says where the
material comes from and how it had been prepared before; for this dataset all 2-D images were then reduced to
at most {long_side} pixels on the long side (JPEG), their masks with them (1-bit PNG), volumes were windowed
to 8 bits and written slice by slice, and the tables, sentences, questions and reports were added.
`sarcoma_ct/STS_025_ct.nii.gz` and its mask are the source's own files, unchanged.

"""


def write_attribution(data: Path, out: Path, sources: dict, volumes: dict[str, str], long_side: int) -> None:
    """One section for every dataset folder: its licence, then the source's own provenance note."""
    origins = {folder: (folder, source.licence) for folder, source in sources.items()}
    for folder, source in volumes.items():
        origins[folder] = (source, LICENCES[source])
    origins["vqa_rad"] = ("vqa_rad", LICENCES["vqa_rad"])
    parts = [HEAD.format(long_side=long_side)]
    for folder in sorted(origins):
        source, licence = origins[folder]
        note = (data / source / "PROVENANCE.md").read_text().strip()
        lines = [line for line in note.splitlines() if not line.startswith("# ")]
        parts.append(f"## {folder}\n\nLicence: {licence}\n\n" + "\n".join(lines) + "\n\n")
    # One scan of sarcoma_pet comes from another copy of the same collection.
    parts.append("## sarcoma_pet/STS_001_wholebody\n\nLicence: " + LICENCES["sts_pet_raw"] + "\n\n")
    parts.append((data / "sts_pet_raw" / "PROVENANCE.md").read_text().strip() + "\n")
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        assert folder.name in origins, f"{folder.name} has no attribution"
    (out / "ATTRIBUTION.md").write_text("".join(parts))


README = """# Sample dataset

Real biomedical images with masks, volumes, questions and answers, small enough to live in the repository:
enough to train a small model and to try every task of the data pipeline. Written by
`scripts/build_sample_dataset.py`; do not edit it by hand. Not for clinical use.

- `<folder>/train.json`, `val.json`, `test.json`: one target in one image (2-D segmentation).
- `*_disease.json`: "is anything abnormal?"; `*_region.json`: what is in the box; `*_parse.json`: grounded
  questions and reports; `meta_*.json`: targets through the slices of a volume; `*_captions.json`: image and
  text (in `vqa_rad` with a question of its own).
- Splits are by patient, over all folders in which a patient occurs; where a source does not tell patients
  apart, by image, or the whole folder is in one split. The patient of every image is in the tables.
- `auto_*`: outlines made by an algorithm on easy cases; they only train. The organs of `abdomen_ct`,
  `abdomen_mri` and `chest_ct` are labels by TotalSegmentator, not by a person.
- Captions and reports are sentences that the tables and masks make true (what, where, how large), not a
  radiologist's.
- CT is windowed to -160..240 HU, PET to 0..10 SUV, MRI to percentiles of the volume (`window` in
  `meta_*.json`).
- `sarcoma_ct/STS_025_ct.nii.gz` is a whole scan in HU (and its contour beside it), for `unibiomed study`.
- Licences and the people to name: `ATTRIBUTION.md`.
{missing}
## Folders

Images with at least one target (for volumes: scans), by split.

{folders}
## Targets

2-D annotations by split, and patients in brackets where there are fewer of them.

{targets}"""
MISSING = """- Not in the repository, because the sources themselves do not state the licence: all endoscopy,
  breast ultrasound, and one set each of fundus, nuclei and brain images. \
The same script builds them from their
  folders with `--all`.
"""


def write_readme(out: Path, modalities: dict[str, str], everything: bool) -> None:
    """What the finished dataset holds, counted from its own tables."""
    splits = ("train", "val", "test")
    counts: dict[str, list[int]] = {}
    # The patient of every annotation, by target and split.
    targets = collections.defaultdict(lambda: {split: [] for split in splits})
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        counts[folder.name] = [0, 0, 0]
        for position, split in enumerate(splits):
            for name in (f"{split}.json", f"{split}_captions.json", f"meta_{split}.json"):
                path = folder / name
                if not path.is_file():
                    continue
                table = json.loads(path.read_text())
                counts[folder.name][position] = len(table.get("volumes") or table["images"])
                patients = {image["file_name"]: image["patient"] for image in table.get("images", ())}
                for row in table.get("annotations", ()) if name == f"{split}.json" else ():
                    targets[row["sentences"][0]["raw"]][split].append(patients[row["file_name"]])
    lines = ["| folder | modality | train | val | test |", "|---|---|---|---|---|"]
    for name, row in counts.items():
        lines.append(f"| {name} | {modalities[name]} | {' | '.join(map(str, row))} |")
    rows = ["| target | train | val | test |", "|---|---|---|---|"]
    for target in sorted(targets):
        cells = []
        for patients in targets[target].values():
            few = f" ({len(set(patients))})" if len(set(patients)) < len(patients) else ""
            cells.append(f"{len(patients)}{few}")
        rows.append(f"| {target} | {' | '.join(cells)} |")
    missing = "" if everything else MISSING
    tables = ["\n".join(part) + "\n" for part in (lines, rows)]
    (out / "README.md").write_text(README.format(missing=missing, folders=tables[0], targets=tables[1]))
