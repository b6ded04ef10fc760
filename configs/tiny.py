"""unibiomed-tiny: every part of the model at small width, from random parameters, on the sample dataset.

An hour and three quarters on two CPU cores; configs/tiny_continued.py goes on from its result, and
docs/unibiomed_tiny.md says what came out. All of it trains.
"""

import dataclasses
from pathlib import Path

from unibiomed_jax.config import HieraConfig, LanguageConfig, ModelConfig, Sam2Config, VisionConfig
from unibiomed_jax.data.augment import AugmentConfig
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.data.prompts import PromptConfig
from unibiomed_jax.data.readers import find_datasets
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.transforms import SampleConfig
from unibiomed_jax.training.config import (
    CheckpointConfig,
    FreezeConfig,
    LogConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    RematConfig,
    TrainConfig,
)

HERE = Path(__file__).parent
DATASET = HERE.parent / "sample_data"

MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=128, num_layers=3, num_heads=4, mlp_dim=384, image_size=112),
    language=LanguageConfig(
        vocab_size=1024,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=384,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    ),
    sam2=Sam2Config(
        image_size=128,
        hiera=HieraConfig(
            embed_dim=32,
            num_heads=1,
            stages=(1, 2, 4, 1),
            global_attention_blocks=(5,),
            window_spec=(8, 4, 8, 4),
        ),
        d_model=96,
        decoder_heads=4,
        decoder_mlp_dim=256,
        memory_dim=32,
        memory_layers=2,
        memory_mlp_dim=256,
        max_conditioning_frames=3,
    ),
    # One tile: the model is too small to gain from more.
    max_tiles=1,
)

# What is learned, and what it is measured on (two of them are for testing alone). Left out are most datasets
# of thin or tiny targets and the open questions of vqa_rad: the time goes to what can be learned in it.
DATASETS = (
    "abdomen_ct",
    "abdomen_mri",
    "auto_cxr_vqarad_lungs",
    "auto_isic2017_dermoscopy",
    "brain_tumor_mri",
    "brisc_brain_tumor_mri",
    "chest_ct",
    "cxr_ccby",
    "cxr_montgomery",
    "glomeruli_pathology",
    "hc18_fetal_head",
    "hvsmr_heart_mri",
    "idrid_fundus",
    "isic2017",
    "kidney_t2_mri",
    "liver_mass_us",
    "msd_hippocampus_mri",
    "msd_spleen_ct",
    "nuclei_stack",
    "octa_faz",
    "rings_prostate_pathology",
    "sarcoma_ct",
    "sarcoma_mri",
    "sarcoma_pet",
    "spider_spine_t2_mri",
    "stardist_nuclei",
    "sts_sarcoma_ct",
    "sts_sarcoma_pet",
    "sts_sarcoma_t1_mri",
    "sts_wholebody_pet",
)

# So few images, and more of their kind in other datasets, that they are not repeated.
FEW = ("cxr_ccby", "isic2017")
# Several targets in each image, so that they come twice as often.
SEVERAL_TARGETS = ("auto_cxr_vqarad_lungs", "hvsmr_heart_mri", "idrid_fundus", "spider_spine_t2_mri")

# How often a dataset's records come in an epoch at least, by task, so that small ones are not forgotten.
MINIMUM = {
    Kind.SEGMENTATION: 200,
    Kind.REGION: 80,
    Kind.DISEASE: 60,
    Kind.VQA: 40,
    Kind.REPORT: 40,
}


def datasets(split: str, minimum: dict[Kind, int]) -> tuple[DatasetConfig, ...]:
    """The sample datasets that are learned; six slices of a volume at a time, since they cost most."""
    times = dict.fromkeys(FEW, 0) | dict.fromkeys(SEVERAL_TARGETS, 2)
    return tuple(
        dataclasses.replace(
            dataset,
            minimum=minimum.get(dataset.kind, 0) * times.get(Path(dataset.root).name, 1),
            repeats=1,
            slices=6,
        )
        for dataset in find_datasets(DATASET, split)
        if Path(dataset.root).name in DATASETS
    )


config = TrainConfig(
    folder="runs/tiny",
    model=MODEL,
    tokenizer=str(HERE / "tiny_tokenizer"),
    data=PipelineConfig(
        datasets=datasets("train", MINIMUM),
        sample=SampleConfig(
            max_tokens=1024,
            augment=AugmentConfig(rotation=25, zoom=1.35, shift=0.1, light=0.3),
            prompts=PromptConfig(turn="inference", phrase_marks="special", name_target=True),
        ),
        batch_size=8,
        buckets=BucketConfig(tiles=(1,), text=(96,), objects=(1, 4)),
    ),
    validation=datasets("val", {}),
    # The reference starts from trained parts. From random parameters the words come first, overlap counts
    # four times as much, and points are taken anywhere: the least certain are noise while nothing is certain.
    loss=LossConfig(
        dice_weight=2.0,
        num_points=2048,
        oversample=1.0,
        importance=0.0,
        masks_from=500,
        token_chunk=128,
        track=True,
    ),
    lora=LoraConfig(rank=0),
    freeze=FreezeConfig(
        trainable=("*",),
        frozen=FreezeConfig().frozen,
        frozen_dtype="float32",
    ),
    optim=OptimConfig(lr=5e-4, steps=20000, warmup=0.02, beta2=0.99, accumulate=1),
    remat=RematConfig(language="none"),
    checkpoint=CheckpointConfig(every=1000),
    log=LogConfig(every=50, validate_every=3000, validate_batches=30, overlays=8),
    export_dtype="bfloat16",
)
