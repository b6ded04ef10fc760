"""UniBiomed as published: InternVL2.5-1B and SAM2 Hiera-L, adapters of rank 128, on the paper's 93 datasets.

`initial` is made by: unibiomed convert from-torch InternVL2_5-1B runs/start --sam2 sam2_hiera_large.pt
"""

from unibiomed_jax.config.precision import BFLOAT16
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.training.config import CheckpointConfig, LossConfig, OptimConfig, TrainConfig

# Where the reference looks for its data, in the layout that DatasetConfig takes by default.
ROOT = "data/Biomed"

# The mixture in the order of the reference: folders below ROOT by what is learned from them. One folder may
# serve several tasks, and `train.json` is the table of four of them, so they are listed and not found.
FOLDERS = {
    Kind.VQA: "RadGenome",
    Kind.REPORT: "RadGenome",
    Kind.CAPTION: "MedTrinity",
    Kind.SEGMENTATION: """
        ACDC amos22/CT amos22/MRI BreastUS CAMUS CDD-CESM COVID-19_CT COVID-QU-Ex CXR_Masks_and_Labels DRIVE
        FH-PS-AOP LGG LIDC-IDRI LiverUS
        MSD/Task01_BrainTumour MSD/Task02_Heart MSD/Task03_Liver MSD/Task04_Hippocampus MSD/Task05_Prostate
        MSD/Task06_Lung MSD/Task07_Pancreas MSD/Task08_HepaticVessel MSD/Task09_Spleen MSD/Task10_Colon
        NeoPolyp OCT-CME
        Radiography/COVID Radiography/Lung_Opacity Radiography/Normal Radiography/Viral_Pneumonia
        REFUGE siim-acr-pneumothorax UWaterlooSkinCancer
        PanNuke CoCaHis CryoNuSeg DigestPath2019_colonoscopy_tissue_segment GlaS SICAPv2 WSSS4LUAD
        BTCV WORD KiTS2023 AIIB23 aorta Flare22 RadGenome
    """,
    Kind.SEQUENCE: "3D/Task06_Lung 3D/Task09_Spleen 3D/Task10_Colon 3D/COVID-19_CT",
    Kind.DISEASE: """
        Disease/BrainTumor Disease/ColonCancer Disease/Fibrotic Disease/LiverTumor Disease/LungTumor
        Disease/pneumothorax Disease/ProstateCancer Disease/Retinal Disease/BreastTumor Disease/COVID19
        Disease/KidneyTumor Disease/LungNodule Disease/PancreasTumor Disease/ColonPolyp Disease/Skin
        Disease/NoFindings
    """,
    Kind.REGION: """
        BreastUS CDD-CESM COVID-19_CT COVID-QU-Ex LGG LIDC-IDRI
        MSD/Task03_Liver MSD/Task06_Lung MSD/Task07_Pancreas MSD/Task08_HepaticVessel MSD/Task10_Colon
        NeoPolyp OCT-CME Radiography/COVID siim-acr-pneumothorax UWaterlooSkinCancer
        KiTS2023 PanNuke CoCaHis CryoNuSeg GlaS SICAPv2 WSSS4LUAD
    """,
}

# Tables, folders of images and masks, and how often a list is repeated are the reference's by default. The
# names hold the whole path, since the last part alone (CT, COVID) says too little in a message.
DATASETS = tuple(
    DatasetConfig(kind, f"{ROOT}/{folder}", name=f"{folder}/{kind}")
    for kind, folders in FOLDERS.items()
    for folder in folders.split()
)

config = TrainConfig(
    folder="runs/unibiomed_1b",
    initial="runs/start",
    precision=BFLOAT16,
    # 128 samples an update, whatever the number of devices: the published run had 8 of them, 4 samples each.
    # A pod takes all of them at once, --data.batch-size 128 --optim.accumulate 1, and beyond 128 chips
    # several share the tokens and images of a sample:
    #   16, 32, 64 chips   --strategy fsdp
    #                      (16 of v5e: batches of 32, as here; two volumes a chip take 7.3 of its 16 GiB)
    #   128                --strategy hsdp --mesh replica=2,fsdp=64
    #   256                --strategy sequence --mesh fsdp=64,sequence=4
    # Shapes of batches: few, and little of them is padding (python benchmarks/padding.py).
    data=PipelineConfig(
        datasets=DATASETS,
        batch_size=32,
        buckets=BucketConfig(tiles=(1, 3, 5, 7, 10, 13), text=(128, 256, 512, 2048)),
        workers=8,
    ),
    # Tokens of an answer that the output head takes at a time: most answers are shorter.
    loss=LossConfig(token_chunk=128),
    optim=OptimConfig(lr=4e-5, steps=100_000, warmup=0.05, accumulate=4),
    checkpoint=CheckpointConfig(every=125),
)
