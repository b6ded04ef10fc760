"""Questions and answers of the seven tasks, word for word (spelling included) as the weights were trained."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unibiomed_jax.data.records import Kind, Record
from unibiomed_jax.inputs.prompt import IMAGE
from unibiomed_jax.inputs.tokenizer import PHRASE_END, PHRASE_START, SEG


@dataclass(frozen=True)
class PromptConfig:
    """Choices where the released weights depend on a habit of the reference; the defaults follow it."""

    # "training": no newline between <|end|> and <|assistant|>, as the weights were trained; "inference":
    # with it, as the predictor asks, which suits a model trained from scratch.
    turn: Literal["training", "inference"] = "training"
    # A newline between a 2-D image and its question.
    newline_after_image: bool = True
    # Targets and findings in lower case.
    lower_case: bool = True
    # <p> and </p> of grounded VQA and reports as ordinary text ("text") or as the special tokens ("special").
    phrase_marks: Literal["text", "special"] = "text"
    # A target with several wordings keeps one for the whole run ("fixed") or draws anew at every visit
    # ("redraw").
    wording: Literal["fixed", "redraw"] = "fixed"
    # Segmentation is answered by "[SEG] <target>." and not by the reference's sentences, so that the state
    # at [SEG] has to know the target in order to say it next. Without pre-training, masks alone do not teach
    # that: [SEG] stays the same whatever was asked for.
    name_target: bool = False


SEGMENTATION_QUESTIONS = (
    "Can you segment the {class_name}?",
    "Please segment {class_name}.",
    "What is {class_name}? Please respond with segmentation mask.",
    "What is {class_name}? Please output segmentation mask.",
    "Can you segment the {class_name}",
    "Please segment {class_name}",
    "What is {class_name}? Please respond with segmentation mask",
    "What is {class_name}? Please output segmentation mask",
    "Could you provide a segmentation mask for the {class_name}?",
    "Please identify and segment the {class_name}.",
    "Where is the {class_name}? Please respond with a segmentation mask.",
    "Can you highlight the {class_name} with a segmentation mask?",
    "Could you provide a segmentation mask for the {class_name}",
    "Please identify and segment the {class_name}",
    "Where is the {class_name}? Please respond with a segmentation mask",
    "Can you highlight the {class_name}with a segmentation mask",
)
SEQUENCE_QUESTIONS = (
    "Can you segment the {class_name}?",
    "Please segment {class_name}.",
    "What is {class_name}? Please respond with segmentation mask.",
    "What is {class_name}? Please output segmentation mask.",
    "Can you segment the {class_name}.",
    "Please segment {class_name}.",
    "What is {class_name}? Please respond with segmentation mask.",
    "What is {class_name}? Please output segmentation mask.",
    "Could you provide a segmentation mask for the {class_name}?",
    "Please identify and segment the {class_name}.",
    "Where is the {class_name}? Please respond with a segmentation mask.",
    "Can you highlight the {class_name} with a segmentation mask?",
    "Could you provide a segmentation mask for the {class_name}?",
    "Please identify and segment the {class_name}.",
    "Where is the {class_name}? Please respond with a segmentation mask.",
    "Can you highlight the {class_name} with a segmentation mask?",
)
SEGMENTATION_ANSWERS = (
    "It is [SEG].",
    "Sure, [SEG].",
    "Sure, it is [SEG].",
    "Sure, the segmentation result is [SEG].",
    "[SEG].",
)
DISEASE_QUESTIONS = (
    "Can we observe any signs of abnormality? Please "
    "respond with interleaved segmentation masks for the corresponding parts.",
    "Can we see abnormality? Please highlight the region with interleaved segmentation masks.",
    "Can abnormality be identified? Please output with "
    "interleaved segmentation masks for the corresponding phrases.",
    "Can abnormality be observed? Please output with "
    "interleaved segmentation masks for the corresponding phrases.",
    "Are there any visible indications of abnormality? Please "
    "respond with interleaved segmentation masks for the corresponding parts.",
    "Are there any observable signs of abnormality? "
    "Please highlight the region with interleaved segmentation masks.",
    "Does the visual features suggest the presence of abnormality? "
    "Please output with interleaved segmentation masks for the corresponding phrases.",
    "Are there any clear indications of abnormality? Please "
    "output with interleaved segmentation masks for the corresponding phrases.",
)
DISEASE_ANSWERS = (
    "It is [SEG].",
    "[SEG].",
)
REGION_QUESTIONS = (
    "What is the <region> in the picture?",
    "Can you tell me what is the <region> in the image?",
    "Could you tell me the <region> in the picture?",
    "Can you identify the <region> in the image?",
    "Can you tell me about the <region> represents in this photo?",
    "What does the <region> in the photo indicate?",
    "What does the <region> refer to in this image?",
    "Could you clarify what the <region> in the photo shows?",
    "What is shown in the <region> in the picture?",
)
VQA_QUESTIONS = (
    "Can we observe any signs of abnormality in {anatomy}? "
    "Please respond with interleaved segmentation masks for the corresponding parts.",
    "Can we see abnormality in {anatomy}? Please highlight the region with interleaved segmentation masks.",
    "Can abnormality be identified in {anatomy}? Please output "
    "with interleaved segmentation masks for the corresponding phrases.",
    "Can abnormality be observed within {anatomy}? Please output "
    "with interleaved segmentation masks for the corresponding phrases.",
    "Are there any visible indications of abnormality in {anatomy}? "
    "Please respond with interleaved segmentation masks for the corresponding parts.",
    "Are there any observable signs of abnormality in "
    "{anatomy}? Please highlight the region with interleaved segmentation masks.",
    "Does the visual features suggest the presence of abnormality in "
    "{anatomy}? Please output with interleaved segmentation masks for the corresponding phrases.",
    "Are there any clear indications of abnormality within {anatomy}? "
    "Please output with interleaved segmentation masks for the corresponding phrases.",
)
REPORT_QUESTIONS = (
    "Could you diagnosis the abnormality in this image? Please "
    "respond with interleaved segmentation masks for the corresponding parts.",
    "Could you describe the abnormality in this image? "
    "Please highlight the region with interleaved segmentation masks.",
    "Can you generate a brief report for this image? "
    "Please output with interleaved segmentation masks for the corresponding phrases.",
    "Could you give a brief discription of what abnormality can be found "
    "within this image? Please output with interleaved segmentation masks for the corresponding phrases.",
)
CAPTION_QUESTIONS = (
    "Can you provide me with a detailed description of the region in the picture marked by <region>?",
    "I'm curious about the region represented by <region> in the picture. Could you describe it in detail?",
    "What can you tell me about the region indicated by <region> in the image?",
    "I'd like to know more about the area in the "
    "photo labeled <region>. Can you give me a detailed description?",
    "Could you describe the region shown as <region> in the picture in great detail?",
    "What details can you give me about the region outlined by <region> in the photo?",
    "Please provide me with a comprehensive description of the region marked with <region> in the image.",
    "Can you give me a detailed account of the region labeled as <region> in the picture?",
    "I'm interested in learning more about the region represented by "
    "<region> in the photo. Can you describe it in detail?",
    "What is the region outlined by <region> in the picture like? Could you give me a detailed description?",
    "Can you provide me with a detailed description of the region in the picture marked by <region>, please?",
    "I'm curious about the region represented by <region> in "
    "the picture. Could you describe it in detail, please?",
    "What can you tell me about the region indicated by <region> in the image, exactly?",
    "I'd like to know more about the area in the "
    "photo labeled <region>, please. Can you give me a detailed description?",
    "Could you describe the region shown as <region> in the picture in great detail, please?",
    "What details can you give me about the region outlined by <region> in the photo, please?",
    "Please provide me with a comprehensive description of "
    "the region marked with <region> in the image, please.",
    "Can you give me a detailed account of the region labeled as <region> in the picture, please?",
    "I'm interested in learning more about the region represented by "
    "<region> in the photo. Can you describe it in detail, please?",
    "What is the region outlined by <region> in the "
    "picture like, please? Could you give me a detailed description?",
    "Please describe the region <region> in the image in detail.",
    "Can you offer a thorough analysis of the region <region> in the image?",
    "Could you elaborate on the region highlighted by <region> in the picture provided?",
    "Please share more information about the zone emphasized with <region> in the photo.",
    "What insights can you give about the area denoted by <region> in the image presented?",
    "Can you share a comprehensive rundown of the region denoted by <region> in the presented image?",
    "I'd like to know more about the region highlighted by <region> in the picture provided.",
    "Work through the important details of the area <region> in the image.",
    "Illustrate the area represented by <region> through a descriptive explanation.",
    "Examine the region <region> closely and share its details.",
)


@dataclass(frozen=True)
class Conversation:
    """One turn: the question with `<image>` where the image goes, and the answer without the end mark."""

    question: str
    answer: str


def draw(record: Record, rng: np.random.Generator, seed: int, config: PromptConfig) -> Conversation:
    """One question and answer, drawn uniformly from the task's lists.

    Args:
        record: what it is about.
        rng: draws question and answer.
        seed: of the run; together with the record's name it fixes the wording under `wording="fixed"`.
        config: choices.
    """
    texts = record.texts
    if record.kind not in (Kind.VQA, Kind.REPORT) and len(texts) > 1:
        if config.wording == "redraw":
            chosen = int(rng.integers(len(texts)))
        else:
            digest = hashlib.sha256(f"{seed}/{record.name}".encode()).digest()
            chosen = int.from_bytes(digest[:8], "big") % len(texts)
        texts = (texts[chosen],)
    asked, answered = questions(record, texts, config), answers(record, texts, config)
    return Conversation(asked[int(rng.integers(len(asked)))], answered[int(rng.integers(len(answered)))])


def variants(record: Record, config: PromptConfig) -> tuple[list[str], list[str]]:
    """Every question and every answer that `draw` can give for this record."""
    wordings = (
        [record.texts] if record.kind in (Kind.VQA, Kind.REPORT) else [(text,) for text in record.texts]
    )
    asked = [question for texts in wordings for question in questions(record, texts, config)]
    return asked, [answer for texts in wordings for answer in answers(record, texts, config)]


def questions(record: Record, texts: tuple[str, ...], config: PromptConfig) -> list[str]:
    """The task's questions about this record, `<image>` in front (sequences have no newline after it)."""
    kind = record.kind
    if kind is Kind.SEQUENCE:
        return [IMAGE + question for question in _sequence_questions(texts[0], config)]
    lead = IMAGE + ("\n" if config.newline_after_image else "")
    if kind is Kind.SEGMENTATION:
        name = _case(texts[0], config).removesuffix(".")
        return [lead + question.replace("{class_name}", name) for question in SEGMENTATION_QUESTIONS]
    if kind is Kind.VQA:
        return [lead + question.replace("{anatomy}", record.anatomy) for question in VQA_QUESTIONS]
    if kind is Kind.CAPTION and record.question:
        return [lead + record.question]
    fixed = {
        Kind.DISEASE: DISEASE_QUESTIONS,
        Kind.REGION: REGION_QUESTIONS,
        Kind.REPORT: REPORT_QUESTIONS,
        Kind.CAPTION: CAPTION_QUESTIONS,
    }
    return [lead + question for question in fixed[kind]]


def answers(record: Record, texts: tuple[str, ...], config: PromptConfig) -> list[str]:
    """The task's answers for this record: one [SEG] per object, none for the text-only tasks."""
    kind = record.kind
    if kind in (Kind.SEGMENTATION, Kind.SEQUENCE):
        if config.name_target:
            return [f"{SEG} {_case(texts[0], config).removesuffix('.')}."]
        return list(SEGMENTATION_ANSWERS)
    if kind is Kind.DISEASE:
        finding = _case(texts[0], config).removesuffix(".")
        return [f"{answer} {finding}." for answer in DISEASE_ANSWERS]
    if kind is Kind.REGION:
        return [_case(texts[0], config).strip()]
    if kind is Kind.CAPTION:
        return [texts[0].strip()]
    phrases = [text + "." for text in texts]
    if kind is Kind.REPORT:
        phrases[-1] += " " + record.report.strip('"').strip()
    return [" ".join(f"{PHRASE_START} {_case(phrase, config)} {PHRASE_END} {SEG}" for phrase in phrases)]


def _sequence_questions(text: str, config: PromptConfig) -> list[str]:
    if "?" in text:
        return [text]
    name = _case(text.replace(".", "").strip(), config)
    return [question.replace("{class_name}", name) for question in SEQUENCE_QUESTIONS]


def _case(text: str, config: PromptConfig) -> str:
    return text.lower() if config.lower_case else text
