"""What the sample dataset is made of: every source folder, its words, its patients, and whether it may ship.

The words of a target are "<target> in <site> <modality>". Where a source knows a finer class than a small
model can tell (benign or malignant), the finer wording stands second.
"""

import re
from dataclasses import dataclass

CC0, CC_BY, CC_BY_3, CC_BY_SA = "CC0", "CC BY 4.0", "CC BY 3.0", "CC BY-SA 4.0"


@dataclass(frozen=True)
class Target:
    """A target of a source folder."""

    # Part of the mask's name in the source.
    name: str
    # Wordings; the first is the one that region understanding and evaluation use.
    words: tuple[str, ...]
    # Also written as grounded disease recognition, under these words.
    disease: str = ""
    # Also written for region understanding.
    region: bool = True
    # Share of a pixel's area from which a mask pixel survives shrinking; thin targets need less.
    cover: float = 0.5
    # The mask is the union of these masks of the source instead of one file.
    union: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A folder of images and masks."""

    folder: str
    # For captions: what an image of this folder is.
    picture: str
    modality: str
    licence: str
    targets: tuple[Target, ...]
    # First group of this expression in the file name is the patient; by default every image is a patient.
    patient: str = r"(.*)"
    # Folders in which equal ids are the same person share a namespace.
    namespace: str = ""
    # Numbers closer than this count as one patient (running slice numbers).
    gap: int = 0
    # Patients whose split is set by hand.
    pinned: tuple[tuple[str, str], ...] = ()
    # Shares of images in train, val and test.
    fractions: tuple[float, float, float] = (0.65, 0.1, 0.25)
    # All images go here: outlines by an algorithm only train; folders of one unknown patient stay together.
    split: str = ""
    # May be part of the repository.
    ships: bool = True
    # What grounded questions ask about; none are written without it.
    anatomy: str = ""
    # Its images stand on their head and are turned, as one looks at them (mirrored, top to bottom).
    upside_down: bool = False
    # Expression of file names that show a healthy organ (as the source says).
    healthy: str = ""


def words(target: str, place: str, *finer: str) -> tuple[str, ...]:
    return (f"{target} in {place}", *(f"{name} in {place}" for name in finer))


def lesion(name: str, target: str, place: str, *finer: str, cover: float = 0.5) -> Target:
    """A target that is a finding of its own."""
    wordings = words(target, place, *finer)
    return Target(name, wordings, wordings[0], cover=cover)


def organ(name: str, place: str, *, region: bool = True, cover: float = 0.5) -> Target:
    return Target(name, words(name, place), region=region, cover=cover)


STS = "sts"
NUMBER = r"(\d+)_"
HEART = ("left ventricle", "right ventricle", "left atrium", "right atrium", "aorta", "pulmonary artery",
         "superior vena cava", "inferior vena cava")  # fmt: skip

SOURCES = (
    # ------------------------------------------------------------------ ultrasound
    Source("hc18_fetal_head", "An ultrasound image of a fetus", "ultrasound", CC_BY,
           (organ("fetal head", "fetal ultrasound"),)),
    Source("liver_mass_us", "An ultrasound image of the liver", "ultrasound", CC_BY,
           (lesion("benign liver mass", "liver lesion", "liver ultrasound", "benign liver mass"),
            lesion("malignant liver mass", "liver lesion", "liver ultrasound", "malignant liver mass")),
           anatomy="liver"),
    Source("carotid_us", "An ultrasound image of the neck", "ultrasound", CC_BY,
           (organ("carotid artery", "neck ultrasound"),), patient=r"(.*)VAS"),
    Source("busbra", "An ultrasound image of the breast", "ultrasound", CC_BY,
           (lesion("benign tumor", "breast lesion", "breast ultrasound", "benign breast tumor"),
            lesion("malignant tumor", "breast lesion", "breast ultrasound", "malignant breast tumor")),
           patient=r".*_(\d+)-", ships=False, anatomy="breast"),
    Source("bus_uc_us", "An ultrasound image of the breast", "ultrasound", CC_BY,
           (lesion("malignant breast tumor", "breast lesion", "breast ultrasound",
                   "malignant breast tumor"),),
           ships=False, anatomy="breast"),
    # ------------------------------------------------------------------ X-ray
    Source("cxr_montgomery", "A frontal chest X-ray", "X-ray", CC0,
           tuple(organ(name, "chest X-ray") for name in ("lungs", "left lung", "right lung")),
           pinned=(("montgomery_1", "val"), ("montgomery_2", "test"), ("montgomery_3", "test"),
                   ("montgomery_4", "test"))),
    Source("cxr_ccby", "A frontal chest X-ray", "X-ray", "CC BY and CC BY-SA, by image",
           (Target("lungs", words("lungs", "chest X-ray"), union=("left lung", "right lung")),
            *(organ(name, "chest X-ray") for name in ("left lung", "right lung")),
            Target("ground glass opacities", words("ground glass opacities", "chest X-ray"), region=False)),
           pinned=(("ARDSSevere", "train"), ("pneumocystis-pneumonia-1", "val"),
                   ("X-ray_of_cyst_in_pneumocystis_pneumonia_1", "test"))),
    Source("auto_cxr_vqarad_lungs", "A frontal chest X-ray", "X-ray", CC0,
           tuple(organ(name, "chest X-ray") for name in ("lungs", "left lung", "right lung")),
           namespace="vqa_rad", split="train"),
    # ------------------------------------------------------------------ CT
    Source("msd_spleen_ct", "An axial CT slice of the abdomen", "CT", CC_BY_SA,
           (organ("spleen", "abdomen CT"),), patient=r".*spleen_(\d+)"),
    Source("msd_hepatic_vessel_ct", "An axial CT slice of the abdomen", "CT", CC_BY_SA,
           (Target("hepatic vessel", words("hepatic vessel", "abdomen CT"), region=False, cover=0.35),
            lesion("liver tumor", "liver tumor", "abdomen CT")), patient=NUMBER, anatomy="liver"),
    Source("msd_lung_tumor_ct", "An axial CT slice of the chest", "CT", CC_BY_SA,
           (lesion("lung tumor", "lung tumor", "chest CT"),), patient=NUMBER, anatomy="lung"),
    Source("intracranial_hemorrhage_ct", "An axial CT slice of the head", "CT", CC_BY,
           (lesion("intracranial hemorrhage", "intracranial hemorrhage", "brain CT"),), split="train"),
    Source("perihematomal_edema_ct", "An axial CT slice of the head", "CT", CC_BY_SA,
           (lesion("perihematomal edema", "perihematomal edema", "brain CT", cover=0.4),), patient=r"(\d+)",
           gap=30),
    Source("sts_sarcoma_ct", "An axial CT slice around a soft tissue tumor", "CT", CC_BY_3,
           (lesion("soft tissue sarcoma", "soft tissue sarcoma", "body CT"),), patient=r"(STS_\d+)",
           namespace=STS, anatomy="soft tissue"),
    # ------------------------------------------------------------------ MRI
    Source("sts_sarcoma_t1_mri", "An axial T1-weighted MRI slice around a soft tissue tumor", "MRI", CC_BY_3,
           (lesion("soft tissue sarcoma", "soft tissue sarcoma", "body MRI"),), patient=r"(STS_\d+)",
           namespace=STS, anatomy="soft tissue"),
    Source("spider_spine_t2_mri", "A sagittal T2-weighted MRI slice of the lumbar spine", "MRI", CC_BY,
           (organ("vertebrae", "lumbar spine MRI"), organ("intervertebral discs", "lumbar spine MRI"),
            organ("spinal canal", "lumbar spine MRI")), patient=NUMBER, upside_down=True),
    Source("hvsmr_heart_mri", "An MRI slice of the heart", "MRI", CC_BY,
           tuple(organ(name, "heart MRI") for name in HEART), patient=NUMBER,
           pinned=(("10000", "train"), ("10001", "train"), ("10002", "test"), ("10003", "train"),
                   ("10004", "val"))),
    Source("kidney_t2_mri", "A coronal T2-weighted MRI slice of the abdomen", "MRI", CC_BY,
           (organ("kidney", "abdomen MRI"),), patient=NUMBER, anatomy="kidney", healthy=r"2\d\d000_"),
    Source("brisc_brain_tumor_mri", "An MRI slice of the head", "MRI", CC_BY,
           tuple(lesion(name, "brain tumor", "brain MRI", name)
                 for name in ("glioma", "meningioma", "pituitary tumor")),
           patient=r"(102|108|12|15|100)\d\d$",
           pinned=(("102", "train"), ("108", "train"), ("12", "test"), ("15", "test"), ("100", "val")),
           anatomy="brain"),
    Source("utsw_glioma_t2_mri", "An axial T2-weighted MRI slice of the brain", "MRI", "MIT",
           (lesion("glioma", "brain tumor", "brain MRI", "glioma"),
            *(Target(name, words(name, "brain MRI"), region=False)
              for name in ("enhancing tumor", "peritumoral edema", "necrotic tumor core"))),
           patient=NUMBER, ships=False, anatomy="brain"),
    Source("ms_lesion_flair_mri", "An axial FLAIR MRI slice of the brain", "MRI", CC_BY,
           (lesion("multiple sclerosis lesion", "multiple sclerosis lesion", "brain MRI", cover=0.4),),
           patient=r"\d(\d\d)\d\d\d"),
    Source("npc_t2_mri", "An axial T2-weighted MRI slice of the head and neck", "MRI", CC_BY,
           (lesion("nasopharyngeal carcinoma", "nasopharyngeal carcinoma", "head and neck MRI"),),
           patient=r"(\d+)", gap=30),
    Source("msd_hippocampus_mri", "An MRI slice cropped around the hippocampus", "MRI", CC_BY_SA,
           (organ("hippocampus", "brain MRI"),), patient=NUMBER),
    # ------------------------------------------------------------------ PET
    Source("sts_sarcoma_pet", "An axial FDG-PET slice around a soft tissue tumor", "PET", CC_BY_3,
           (lesion("soft tissue sarcoma", "soft tissue sarcoma", "body PET"),), patient=r"(STS_\d+)",
           namespace=STS, anatomy="soft tissue"),
    Source("sts_wholebody_pet", "An axial FDG-PET slice of the body", "PET", CC_BY_3,
           (lesion("soft tissue sarcoma", "soft tissue sarcoma", "body PET"),), patient=r"(STS_\d+)",
           namespace=STS, anatomy="soft tissue"),
    # ------------------------------------------------------------------ OCT and fundus
    Source("octa_faz", "An en face OCT angiography image of the retina", "OCT", CC_BY,
           (organ("foveal avascular zone", "retinal OCT"),), patient=r".*_(\d+)"),
    Source("idrid_fundus", "A fundus photograph of a retina with diabetic retinopathy", "fundus", CC_BY,
           (organ("optic disc", "retinal fundus"),
            Target("hard exudate", words("hard exudate", "retinal fundus"), cover=0.4),
            Target("soft exudate", words("soft exudate", "retinal fundus"), region=False, cover=0.4),
            Target("haemorrhage", words("haemorrhage", "retinal fundus"), region=False, cover=0.4),
            Target("diabetic retinopathy lesions", words("diabetic retinopathy lesions", "retinal fundus"),
                   "diabetic retinopathy in retinal fundus", region=False, cover=0.4,
                   union=("haemorrhage", "hard exudate", "soft exudate", "microaneurysm"))),
           anatomy="retina"),
    Source("hrf_vessel_fundus", "A fundus photograph of a retina", "fundus", CC_BY,
           (organ("retinal vessel", "retinal fundus", region=False, cover=0.35),), anatomy="retina",
           healthy=r".*_h$"),
    Source("rop_ridge_fundus", "A fundus photograph of a premature infant", "fundus", CC_BY,
           (lesion("retinopathy of prematurity ridge", "retinopathy of prematurity ridge", "retinal fundus",
                   cover=0.4),)),
    Source("chase_db1", "A fundus photograph of a retina", "fundus", "CC BY 4.0 (not confirmed)",
           (organ("retinal vessel", "retinal fundus", region=False, cover=0.35),), patient=r"Image_(\d+)",
           ships=False),
    # ------------------------------------------------------------------ dermoscopy
    Source("isic2017", "A dermoscopic image of the skin", "dermoscopy", CC0,
           (lesion("skin lesion", "skin lesion", "skin dermoscopy"),), fractions=(0.2, 0.2, 0.6),
           anatomy="skin"),
    Source("auto_isic2017_dermoscopy", "A dermoscopic image of the skin", "dermoscopy", CC0,
           (lesion("skin lesion", "skin lesion", "skin dermoscopy"),), split="train", anatomy="skin"),
    # ------------------------------------------------------------------ endoscopy
    Source("kvasir_polyp", "An endoscopic image of the colon", "endoscopy", "CC BY 4.0 (not confirmed)",
           (lesion("polyp", "polyp", "gastrointestinal endoscopy"),), ships=False, anatomy="colon"),
    Source("edd2020_endoscopy", "An endoscopic image of the digestive tract", "endoscopy", CC_BY,
           tuple(lesion(name, name, "gastrointestinal endoscopy")
                 for name in ("polyp", "Barrett esophagus", "gastrointestinal cancer", "high grade dysplasia",
                              "suspicious area")), split="train", ships=False),
    # ------------------------------------------------------------------ pathology and microscopy
    Source("nuinsseg_oesophagus_pathology", "An H&E-stained section of the oesophagus", "pathology", CC_BY,
           (organ("cell nuclei", "oesophagus pathology", region=False, cover=0.45),), split="train"),
    Source("tnbc_pathology", "An H&E-stained section of breast cancer", "pathology",
           "CC BY 4.0 (not confirmed)", (Target("nuclei", words("cell nuclei", "breast pathology"),
                                                region=False, cover=0.45),),
           patient=r".*?(\d+)$", ships=False),
    Source("rings_prostate_pathology", "An H&E-stained section of the prostate", "pathology", CC_BY,
           (organ("prostate gland", "prostate pathology"),
            lesion("prostate tumor", "prostate tumor", "prostate pathology")), patient=r"(P\d)_",
           pinned=(("P3", "test"), ("P4", "train"), ("P5", "val"))),
    Source("glomeruli_pathology", "A PAS-stained section of the kidney", "pathology", CC_BY,
           (organ("glomerulus", "kidney pathology"),), patient=r"(\d+)", gap=10),
    Source("camelyon_pathology", "An H&E-stained section of a lymph node", "pathology", CC0,
           (lesion("breast cancer metastasis", "breast cancer metastasis", "lymph node pathology"),),
           split="train"),
    Source("ocdc_oral_cancer_pathology", "An H&E-stained section of the oral mucosa", "pathology", CC_BY,
           (lesion("oral squamous cell carcinoma", "oral squamous cell carcinoma", "oral cavity pathology"),),
           split="train"),
)  # fmt: skip

# stardist_nuclei (one image, one stack) is read by the script itself.
MICROSCOPY = Source(
    "stardist_nuclei", "A fluorescence microscopy image of cells", "microscopy", "BSD-3-Clause; image CC0",
    (organ("cell nuclei", "cell microscopy", region=False),), split="test",
)  # fmt: skip


def patient_of(source: Source, stem: str) -> str:
    """The patient in a file name, `_warp` of augmented variants left out."""
    match = re.match(source.patient, stem.removesuffix("_warp"))
    if match is None:
        raise ValueError(f"{source.folder}: no patient in the name {stem!r}")
    return match.group(1)
