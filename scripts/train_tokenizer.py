"""Train a small tokenizer on the texts of a dataset: python scripts/train_tokenizer.py sample_data OUT

It splits text as Qwen2's does, merges byte pairs, and ends with the special tokens of a release in the
release's order, so that everything that reads a released tokenizer reads this one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unibiomed_jax.commands.run import run
from unibiomed_jax.data.mixture import find_datasets, read_mixture
from unibiomed_jax.data.prompts import PromptConfig, variants
from unibiomed_jax.inputs import tokenizer as release
from unibiomed_jax.inputs.prompt import IMAGE, INFERENCE_TURN, STOP_TEXT

SPECIALS = (
    "<|endoftext|>",
    "<|im_end|>",
    release.IMAGE_START,
    release.IMAGE_END,
    release.IMAGE_CONTEXT,
    *release.UNIBIOMED_TOKENS,
)


def texts(root: Path, split: str) -> list[str]:
    """Every wording of every question and answer, without image marks and special tokens."""
    mixture = read_mixture(find_datasets(root, split, balance_to=0, repeats=1))
    found = []
    for record in mixture.records:
        asked, answered = variants(record, PromptConfig())
        found += [INFERENCE_TURN.format(input=question) for question in asked]
        found += [answer + STOP_TEXT for answer in answered]
    for token in (IMAGE, *SPECIALS):
        found = [text.replace(token, "") for text in found]
    return found


def main(
    dataset: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    size: int = 1024,
    split: str = "train",
) -> None:
    """Write tokenizer.json and tokenizer_config.json into `out`.

    Args:
        dataset: folder of datasets; only the texts of `split` are read.
        out: folder to write into.
        size: number of tokens, special ones included.
        split: which tables.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(release.QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(dataset, split), trainer)
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    out.mkdir(parents=True, exist_ok=True)
    release.Tokenizer(backend, eos="<|im_end|>", pad="<|endoftext|>").save(out)
    print(f"{backend.get_vocab_size()} tokens in {out}")


if __name__ == "__main__":
    sys.exit(run(lambda: tyro.cli(main)))
