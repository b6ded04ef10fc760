"""unibiomed-tiny, fourth run: on from the third, masks from 384 x 384 pixels.

Under two hours on two CPU cores; 5_volumes.py goes on from its result.
"""

import dataclasses

from configs.unibiomed_tiny.shared import GENTLE, mirrored_datasets, name_of, run
from unibiomed_jax.data.augment import AugmentConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.training.config import OptimConfig

# How often the records of a dataset come in an epoch at least, where that is not as before: often what is
# learned slowly, and the four skin lesions that were outlined by hand (an algorithm outlined the others).
BALANCE_TO = {
    "brain_tumor_mri": 280,
    "brisc_brain_tumor_mri": 480,
    "hvsmr_heart_mri": 528,
    "idrid_fundus": 456,
    "isic2017": 280,
    "kidney_t2_mri": 396,
    "liver_mass_us": 460,
    "msd_spleen_ct": 480,
    "spider_spine_t2_mri": 804,
    "sts_sarcoma_pet": 272,
}
# Skin was learned by heart, outlines and all.
SKIN = ("auto_isic2017_dermoscopy", "isic2017")
STRONGER = AugmentConfig(
    rotation=180, zoom=1.5, shift=0.1, light=0.3, colour=0.1, mirror=("horizontal", "vertical")
)


def adapted(dataset: DatasetConfig) -> DatasetConfig:
    """The dataset as often as it now comes, changed as it now is."""
    name = name_of(dataset)
    if dataset.kind is Kind.SEGMENTATION and name in BALANCE_TO:
        dataset = dataclasses.replace(dataset, balance_to=BALANCE_TO[name])
    if name in SKIN and dataset.kind in (Kind.SEGMENTATION, Kind.REGION, Kind.DISEASE):
        dataset = dataclasses.replace(dataset, augment=STRONGER)
    return dataset


config = run(
    "4_fine",
    after="3_large",
    data=tuple(map(adapted, mirrored_datasets())),
    seed=45,
    augment=GENTLE,
    image_size=384,
    # Masks were drawn too small: a pixel in doubt lowers the overlap more when it is left out.
    dice_weight=4.0,
    # At 5e-4 a run undoes half of what the one before it had settled.
    optim=OptimConfig(lr=3e-4, steps=5000, warmup=0.02, beta2=0.99, accumulate=1),
)
