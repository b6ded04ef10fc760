"""What a dataset is made of: the configuration of one, and one training sample before any pixel is read."""

import operator
import os
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tyro

from unibiomed_jax.config.fields import ONE_OR_MORE, ZERO_OR_MORE, require_limits
from unibiomed_jax.data.augment import AugmentConfig
from unibiomed_jax.files import locate, shown
from unibiomed_jax.inputs.shards import StoredFile


class Kind(StrEnum):
    """The seven tasks of the reference."""

    # One target in one image: question about it, answer with [SEG].
    SEGMENTATION = "segmentation"
    # One target through the slices of a volume.
    SEQUENCE = "sequence"
    # "Is anything abnormal?": answer with [SEG] and the name of the finding.
    DISEASE = "disease"
    # What is inside the green box drawn on the image; no mask.
    REGION = "region"
    # Grounded question about one anatomy: the abnormality as a phrase with [SEG].
    VQA = "vqa"
    # Grounded report: abnormality and report as phrases with [SEG].
    REPORT = "report"
    # Image and text without a mask: a caption, or an answer to the record's own question.
    CAPTION = "caption"


# Kinds whose answers carry no [SEG] and whose samples have neither a SAM image nor a mask.
TEXT_ONLY = (Kind.REGION, Kind.CAPTION)
# The list of a dataset is repeated floor(balance_to / n) times while it is shorter (0: never), and always
# `repeats` times.
_BALANCE_TO = {Kind.SEGMENTATION: 5000, Kind.DISEASE: 5000, Kind.REGION: 3000, Kind.CAPTION: 5000}
_REPEATS = {Kind.SEQUENCE: 10, Kind.VQA: 2, Kind.REPORT: 2}
_ANNOTATIONS = {
    Kind.SEQUENCE: "meta_{split}.json",
    Kind.VQA: "{split}_parse.json",
    Kind.REPORT: "{split}_parse.json",
}
# In these, image paths are relative to the dataset's root.
_FROM_ROOT = (Kind.SEQUENCE, Kind.VQA, Kind.REPORT, Kind.CAPTION)


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture. `{split}` in a path is replaced by the split.

    Raises:
        InputError: a negative `balance_to`, or `repeats` or `slices` below 1.
    """

    # Task, which decides reader, questions and answers.
    kind: Kind
    # Folder of the dataset.
    root: str
    # Name in messages; by default the folder's last part and the task.
    name: str = ""
    # Which part to read: train, val or test.
    split: str = "train"
    # JSON table inside the root; by default the reference's name for the kind.
    annotations: str | None = None
    # Folder of images and of masks inside the root; by default {split} and {split}_mask, or the root itself
    # for the kinds whose tables hold paths from the root.
    images: str | None = None
    masks: str | None = None
    # Repeat the list floor(balance_to / n) times when it has fewer records than that; 0 leaves it as it is.
    # By default the reference's balancing: 5000, for region understanding 3000, none where `repeats` is
    # fixed.
    balance_to: Annotated[int | None, ZERO_OR_MORE] = None
    # Repeat the list so many times; by default the reference's: sequences 10, grounded VQA and reports 2,
    # others 1.
    repeats: Annotated[int | None, ONE_OR_MORE] = None
    # Slices drawn from a volume at every visit.
    slices: Annotated[int, ONE_OR_MORE] = 10
    # Random changes of its own instead of sample.augment, in training. (On the command line its fields are
    # options: a subcommand for every dataset would be too much.)
    augment: Annotated[AugmentConfig | None, tyro.conf.AvoidSubcommands] = None

    def __post_init__(self):
        require_limits(self, of=f" of the dataset {self.title}")

    @property
    def title(self) -> str:
        return shown(self.name or f"{Path(self.root).name}/{self.kind}")

    @property
    def annotation_path(self) -> Path:
        return locate(self.root) / self._part(self.annotations, _ANNOTATIONS.get(self.kind, "{split}.json"))

    @property
    def image_folder(self) -> Path:
        return locate(self.root) / self._part(self.images, "" if self.kind in _FROM_ROOT else "{split}")

    @property
    def mask_folder(self) -> Path:
        return locate(self.root) / self._part(self.masks, "" if self.kind in _FROM_ROOT else "{split}_mask")

    def repetitions(self, records: int) -> int:
        """How many times the list of `records` records stands in the mixture."""
        repeats = _REPEATS.get(self.kind, 1) if self.repeats is None else self.repeats
        wanted = _BALANCE_TO.get(self.kind, 0) if self.balance_to is None else self.balance_to
        return repeats * max(1, wanted // records) if 0 < records < wanted else repeats

    def _part(self, given: str | None, default: str) -> str:
        return (default if given is None else given).replace("{split}", self.split)


@dataclass(frozen=True, slots=True)
class Record:
    """One sample: files and words, no pixels. A file is a path, or lies in a shard of a packed dataset.

    masks[object][frame] is the file of one object in one frame; an empty string stands for an all-zero mask.
    Kinds without masks have none.
    """

    # Unique in the mixture and found in every message about this sample.
    name: str
    kind: Kind
    # One image, or the slices of a volume in order.
    images: tuple[str | StoredFile, ...]
    masks: tuple[tuple[str | StoredFile, ...], ...] = ()
    # Wordings of the target, of which one is used; for VQA and reports the abnormality of every object; for
    # captions the text.
    texts: tuple[str, ...] = ()
    # VQA: what the question is about.
    anatomy: str = ""
    # Reports: the text after the abnormality.
    report: str = ""
    # Captions: the record's own question, if it has one.
    question: str = ""
    # Width and height of the images in pixels; (0, 0) if the table does not say.
    size: tuple[int, int] = (0, 0)
    # Sequences: how many slices are drawn at every visit.
    slices: int = 0
    # Random changes of its own.
    augment: AugmentConfig | None = None
    # Who was imaged, as far as the table says.
    patient: str = field(default="")

    def __reduce__(self):  # several times as fast as what dataclasses write
        return Record, _fields_of(self)

    @property
    def frames(self) -> int:
        """SAM frames of the sample: 0 without masks, the drawn slices of a sequence, else 1."""
        return self.slices if self.kind is Kind.SEQUENCE else 0 if self.kind in TEXT_ONLY else 1


_fields_of = operator.attrgetter(*(field.name for field in fields(Record)))


def without_place(record: Record, config: DatasetConfig) -> Record:
    """The record with its files' paths from its dataset's folder on, and named within its dataset."""
    prefix = os.path.join(locate(config.root), "")
    images, *masks = (
        tuple(os.fspath(file).removeprefix(prefix) for file in files)
        for files in (record.images, *record.masks)
    )
    name = record.name.removeprefix(f"{config.title}:{config.split}/")
    return replace(record, name=name, images=images, masks=tuple(masks))
