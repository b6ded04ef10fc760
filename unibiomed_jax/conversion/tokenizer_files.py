"""The tokenizer's files: extended by the tokens that UniBiomed adds to InternVL's, and checked."""

from __future__ import annotations

import json
from pathlib import Path

from unibiomed_jax.conversion.reading import read_json
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import UNIBIOMED_TOKENS, Tokenizer


def add_unibiomed_tokens(folder: Path, vocab_size: int) -> None:
    """Append UniBiomed's five tokens to the tokenizer files in `folder`, from id `vocab_size` on.

    Raises:
        InputError: the tokenizer already knows some of them, or ends at another id than the embedding.
    """
    config = read_json(folder / "tokenizer_config.json")
    decoder = config.setdefault("added_tokens_decoder", {})
    taken = {entry["content"]: int(number) for number, entry in decoder.items()}
    known = [token for token in UNIBIOMED_TOKENS if token in taken]
    if known:
        raise InputError(
            f"{folder} already knows the token {known[0]}; start from the original InternVL2.5 files."
        )
    if taken and max(taken.values()) + 1 != vocab_size:
        raise InputError(
            f"The tokenizer ends at id {max(taken.values())} but the embedding has {vocab_size} rows; use "
            "the tokenizer files that belong to the checkpoint."
        )
    numbers = {token: vocab_size + k for k, token in enumerate(UNIBIOMED_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    for token, number in numbers.items():
        decoder[str(number)] = {"content": token, **flags}
    _write(folder / "tokenizer_config.json", config)
    if (folder / "added_tokens.json").exists():
        _write(folder / "added_tokens.json", read_json(folder / "added_tokens.json") | numbers)
    if (folder / "tokenizer.json").exists():
        whole = read_json(folder / "tokenizer.json")
        whole["added_tokens"] += [
            {"id": number, "content": token, **flags} for token, number in numbers.items()
        ]
        _write(folder / "tokenizer.json", whole)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise InputError unless the tokenizer in `folder` can be read and every id of it has an embedding."""
    found = Tokenizer.from_folder(folder).vocab_size
    if found > vocab_size:
        raise InputError(
            f"The tokenizer in {folder} has {found} tokens but the embedding only {vocab_size} rows; use the "
            "tokenizer files that belong to the checkpoint."
        )


def _write(path: Path, values) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
