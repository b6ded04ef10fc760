"""unibiomed-tiny: every part of the model at small width, from random parameters, on the sample dataset.

About an hour on two CPU cores, which is too short for useful masks. All of it trains; there is no adapter.
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
    vision=VisionConfig(hidden_size=192, num_layers=4, num_heads=6, mlp_dim=576, image_size=112),
    language=LanguageConfig(
        vocab_size=1024,
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        mlp_dim=512,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    ),
    sam2=Sam2Config(
        image_size=192,
        hiera=HieraConfig(
            embed_dim=32,
            num_heads=1,
            stages=(1, 2, 4, 1),
            global_attention_blocks=(5,),
            window_spec=(8, 4, 12, 6),
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

# How often a dataset's records come in an epoch at least, by task, so that small ones are not forgotten.
MINIMUM = {
    Kind.SEGMENTATION: 150,
    Kind.REGION: 60,
    Kind.DISEASE: 60,
    Kind.VQA: 40,
    Kind.REPORT: 40,
    Kind.CAPTION: 0,
    Kind.SEQUENCE: 0,
}


def datasets() -> tuple[DatasetConfig, ...]:
    """The training split of the sample datasets; six slices of a volume at a time, since they cost most.

    Without the open questions of vqa_rad, which would be a third of all samples.
    """
    return tuple(
        dataclasses.replace(
            dataset,
            minimum=MINIMUM[dataset.kind],
            repeats=2 if dataset.kind is Kind.SEQUENCE else 1,
            slices=6,
        )
        for dataset in find_datasets(DATASET, "train")
        if Path(dataset.root).name != "vqa_rad"
    )


config = TrainConfig(
    folder="runs/tiny",
    model=MODEL,
    tokenizer=str(HERE / "tiny_tokenizer"),
    data=PipelineConfig(
        datasets=datasets(),
        sample=SampleConfig(
            max_tokens=1024,
            augment=AugmentConfig(),
            prompts=PromptConfig(turn="inference", phrase_marks="special"),
        ),
        batch_size=8,
        buckets=BucketConfig(tiles=(1,), text=(64, 128), objects=(1, 4)),
    ),
    validation=find_datasets(DATASET, "val", minimum=0, repeats=1, slices=6),
    # Overlap counts four times as much as in the reference, which starts from a trained SAM2.
    loss=LossConfig(dice_weight=2.0, num_points=2048, token_chunk=64, track=True),
    lora=LoraConfig(rank=0),
    freeze=FreezeConfig(
        trainable=("*",),
        frozen=FreezeConfig().frozen,
        frozen_dtype="float32",
    ),
    optim=OptimConfig(lr=1e-3, steps=3200, warmup=0.03, weight_decay=0.05, accumulate=1),
    remat=RematConfig(language="none"),
    checkpoint=CheckpointConfig(every=250),
    log=LogConfig(every=20, validate_every=800, validate_batches=40, overlays=6),
    export_dtype="bfloat16",
)
