"""What the five runs of unibiomed-tiny share: every part of the model at small width, the sample data."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from unibiomed_jax.config.model import (
    HieraConfig,
    LanguageConfig,
    ModelConfig,
    RematConfig,
    Sam2Config,
    VisionConfig,
)
from unibiomed_jax.config.preprocessing import PREPROCESSING
from unibiomed_jax.data.augment import AugmentConfig
from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.data.prompts import PromptConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.transforms import SampleConfig
from unibiomed_jax.training.config import (
    CheckpointConfig,
    FreezeConfig,
    LogConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

HERE = Path(__file__).parent
SAMPLE_DATA = HERE.parents[1] / "sample_data"

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
    preprocessing=PREPROCESSING["tiny"],
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
BALANCE_TO = {
    Kind.SEGMENTATION: 200,
    Kind.REGION: 80,
    Kind.DISEASE: 60,
    Kind.VQA: 40,
    Kind.REPORT: 40,
}

# Changes of the images from the second run on: so small a model did not fit images changed as much as in the
# first.
GENTLE = AugmentConfig(rotation=10, zoom=1.2, shift=0.05, light=0.25)

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


def name_of(dataset: DatasetConfig) -> str:
    """The folder of a dataset."""
    return Path(dataset.root).name


def datasets(split: str, balance_to: Mapping[Kind, int] = BALANCE_TO) -> tuple[DatasetConfig, ...]:
    """The sample datasets that are learned; six slices of a volume at a time, since they cost most."""
    times = dict.fromkeys(FEW, 0) | dict.fromkeys(SEVERAL_TARGETS, 2)
    return tuple(
        dataclasses.replace(
            dataset,
            balance_to=balance_to.get(dataset.kind, 0) * times.get(name_of(dataset), 1),
            repeats=1,
            slices=6,
        )
        for dataset in find_datasets(SAMPLE_DATA, split)
        if name_of(dataset) in DATASETS
    )


def mirrored_datasets() -> tuple[DatasetConfig, ...]:
    """The training data mirrored in the directions in which it may be, with fewer slices of its volumes."""

    def mirrored(dataset: DatasetConfig) -> DatasetConfig:
        name = name_of(dataset)
        mirror = ("horizontal",) * (name in SIDES_ALIKE)
        if name in ANY_WAY_UP:
            mirror = ("horizontal", "vertical")
        if dataset.kind in (Kind.VQA, Kind.REPORT):  # they say where
            mirror = ()
        # Volumes cost most: three slices that are shown and one that is followed are enough.
        return dataclasses.replace(dataset, augment=dataclasses.replace(GENTLE, mirror=mirror), slices=4)

    # Of the organs of one patient only the slices come, one by one.
    return tuple(
        mirrored(dataset)
        for dataset in datasets("train")
        if dataset.kind is not Kind.SEQUENCE or not name_of(dataset).startswith("abdomen")
    )


def run(
    name: str,
    *,
    after: str | None,
    data: tuple[DatasetConfig, ...],
    seed: int,
    augment: AugmentConfig,
    image_size: int,
    optim: OptimConfig,
    batch_size: int = 8,
    dice_weight: float = 2.0,
    masks_from: int = 0,
    trainable: tuple[str, ...] = ("*",),
    frozen: tuple[str, ...] = FreezeConfig().frozen,
) -> TrainConfig:
    """One of the runs.

    Args:
        name: of the run, and of its folder.
        after: the run whose result it goes on from; None starts from random parameters.
        data: training data.
        seed: of the data's order and changes.
        augment: changes of images whose dataset has none of its own.
        image_size: side of SAM2's image, pixels; it decides how fine masks are.
        optim: learning rate and length.
        batch_size: samples an update.
        dice_weight: how much overlap counts.
        masks_from: update from which on masks are learned.
        trainable, frozen: what trains, as in FreezeConfig.
    """
    return TrainConfig(
        folder=f"runs/unibiomed_tiny/{name}",
        initial=f"runs/unibiomed_tiny/{after}/model" if after else None,
        model=dataclasses.replace(MODEL, sam2=dataclasses.replace(MODEL.sam2, image_size=image_size)),
        tokenizer=str(HERE / "tokenizer"),
        data=PipelineConfig(
            datasets=data,
            sample=SampleConfig(
                max_tokens=1024,
                augment=augment,
                prompts=PromptConfig(turn="inference", phrase_marks="special", name_target=True),
            ),
            batch_size=batch_size,
            buckets=BucketConfig(tiles=(1,), text=(96,), objects=(1, 4)),
            seed=seed,
        ),
        validation=datasets("val", {}),
        # The reference starts from trained parts. From random parameters overlap counts four times as much,
        # and points are taken anywhere: the least certain are noise while nothing is certain.
        loss=LossConfig(
            dice_weight=dice_weight,
            num_points=2048,
            oversample=1.0,
            importance=0.0,
            masks_from=masks_from,
            token_chunk=128,
            follow=True,
        ),
        lora=LoraConfig(rank=0),
        freeze=FreezeConfig(trainable=trainable, frozen=frozen, frozen_dtype="float32"),
        optim=optim,
        remat=RematConfig(language="none"),
        checkpoint=CheckpointConfig(every=1000),
        log=LogConfig(every=50, validate_every=3000, validate_batches=30, overlays=8),
        export_dtype="bfloat16",
    )
