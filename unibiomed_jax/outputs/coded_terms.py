"""Words for what was segmented as codes of SNOMED CT, for DICOM objects."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Code of SNOMED CT and its meaning.
Code = tuple[str, str]

_STRUCTURE: Code = ("91723000", "Anatomical Structure")
_ABNORMAL: Code = ("49755003", "Morphologically Abnormal Structure")
_TISSUE: Code = ("85756007", "Tissue")
RIGHT: Code = ("24028007", "Right")
LEFT: Code = ("7771000", "Left")

_ORGANS: dict[str, Code] = {
    "liver": ("10200004", "Liver"),
    "spleen": ("78961009", "Spleen"),
    "kidney": ("64033007", "Kidney"),
    "pancreas": ("15776009", "Pancreas"),
    "aorta": ("15825003", "Aorta"),
    "lung": ("39607008", "Lung"),
    "gallbladder": ("28231008", "Gallbladder"),
    "stomach": ("69695003", "Stomach"),
    "esophagus": ("32849002", "Esophagus"),
    "duodenum": ("38848004", "Duodenum"),
    "adrenal gland": ("23451007", "Adrenal gland"),
    "bladder": ("89837001", "Urinary bladder"),
    "urinary bladder": ("89837001", "Urinary bladder"),
    "prostate": ("41216001", "Prostate"),
    "uterus": ("35039007", "Uterus"),
    "brain": ("12738006", "Brain"),
    "hippocampus": ("5366008", "Hippocampus"),
    "spinal cord": ("2748008", "Spinal cord"),
    "vertebra": ("51282000", "Vertebra"),
    "heart": ("80891009", "Heart"),
    "left ventricle": ("87878005", "Left ventricle"),
    "right ventricle": ("53085002", "Right ventricle"),
    "left atrium": ("82471001", "Left atrium"),
    "right atrium": ("73829009", "Right atrium"),
    "inferior vena cava": ("64131007", "Inferior vena cava"),
    "superior vena cava": ("48345005", "Superior vena cava"),
    "pulmonary artery": ("81040000", "Pulmonary artery"),
    "portal vein": ("32764006", "Portal vein"),
}
_FINDINGS: dict[str, Code] = {
    "tumor": ("108369006", "Neoplasm"),
    "tumour": ("108369006", "Neoplasm"),
    "neoplasm": ("108369006", "Neoplasm"),
    "lesion": ("52988006", "Lesion"),
    "mass": ("4147007", "Mass"),
    "nodule": ("27925004", "Nodule"),
    "cyst": ("367643001", "Cyst"),
    "edema": ("79654002", "Edema"),
    "hemorrhage": ("50960005", "Hemorrhage"),
    "necrosis": ("6574001", "Necrosis"),
    "pleural effusion": ("60046008", "Pleural effusion"),
}


@dataclass(frozen=True)
class Term:
    """What a segment is, in codes."""

    category: Code
    # None: no code is known, and none is guessed.
    property_type: Code | None
    # Side of a paired organ.
    side: Code | None = None
    # Where a finding is.
    region: Code | None = None


def find_term(phrase: str) -> Term:
    """The codes of a phrase such as "left kidney" or "liver tumor in abdomen CT".

    The last words of the thing named decide; what stands after "in" or "of" is its place. A word that is not
    in the table makes the whole phrase unknown: a "horseshoe kidney" is not coded as a kidney.
    """
    thing, _, place = re.sub(r"[^a-z]+", " ", phrase.lower()).strip().partition(" in ")
    thing = re.sub(r"^(the|a|an) ", "", thing)
    if " of " in thing:
        thing, _, place = thing.partition(" of ")
    side, bare = _side_of(thing)
    if thing in _ORGANS:
        return Term(_STRUCTURE, _ORGANS[thing])
    if bare in _ORGANS:
        return Term(_STRUCTURE, _ORGANS[bare], side)
    for words, code in _FINDINGS.items():
        organ = bare.removesuffix(words).strip()
        if bare == words or (bare.endswith(f" {words}") and organ in _ORGANS):
            region = _ORGANS.get(organ) or _ORGANS.get(re.sub(r"^the ", "", place))
            return Term(_ABNORMAL, code, side, region)
    if "lesion" in thing.split():
        return Term(_ABNORMAL, _FINDINGS["lesion"])
    return Term(_TISSUE, None)


def _side_of(thing: str) -> tuple[Code | None, str]:
    """The side that a phrase names, and the thing in the singular without it."""
    first, _, rest = thing.partition(" ")
    side = {"left": LEFT, "right": RIGHT}.get(first)
    bare = rest if side is not None else thing
    return side, bare if bare in _ORGANS or bare in _FINDINGS else bare.removesuffix("s")
