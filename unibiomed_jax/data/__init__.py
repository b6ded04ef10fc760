"""Datasets on disk to batches of arrays: records, prompts, transforms, and the pipeline over them."""

from unibiomed_jax.data.pipeline import Batch, BatchIterator, Pipeline, PipelineConfig
from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.data.prompts import PromptConfig
from unibiomed_jax.data.readers import find_datasets, read_dataset, read_mixture
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.data.transforms import SampleConfig

__all__ = [
    "Batch",
    "BatchIterator",
    "BucketConfig",
    "DatasetConfig",
    "Kind",
    "Pipeline",
    "PipelineConfig",
    "PromptConfig",
    "Record",
    "SampleConfig",
    "find_datasets",
    "read_dataset",
    "read_mixture",
]
