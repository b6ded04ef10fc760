"""The checkpoint's tokenizer: text to ids and back, with the ids that the model treats specially.

Read with the `tokenizers` library alone: loading runs no code from the checkpoint, asks nothing and needs
no network.
"""

import copy
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import is_text, locate, read_json, read_text, shown, write_beside

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SEG = "[SEG]"
PHRASE_START, PHRASE_END = "<p>", "</p>"
REGION_START, REGION_END = "<vp>", "</vp>"
# What UniBiomed adds to InternVL's vocabulary, in the order that gives the released ids.
UNIBIOMED_TOKENS = (SEG, PHRASE_START, PHRASE_END, REGION_START, REGION_END)

# How Qwen2 splits text before byte-pair merging (only needed when tokenizer.json is absent).
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What to do about a file that cannot be used.
_REMEDY = "copy it again from its source"

# The files of a tokenizer; which of them there are differs.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Tokenizer:
    """Byte-pair tokenizer with the special ids looked up by their text.

    Attributes:
        image_context_id: the token whose embeddings the visual features replace (tiles and regions alike).
        seg_id: the token whose hidden state prompts the mask decoder.
        eos_id, pad_id: end of generation, padding.
        vocab_size: number of ids, added tokens included; the embedding has at least as many rows.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str, pad: str, name: str = "The tokenizer"):
        required = (eos, pad, IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *UNIBIOMED_TOKENS)
        missing = [token for token in required if backend.token_to_id(token) is None]
        if missing:
            raise InputError(
                f"{name} lacks the special tokens {', '.join(missing)}; use the tokenizer files of a "
                "UniBiomed checkpoint, or convert the InternVL checkpoint first."
            )
        self.backend = backend
        self._encoder = backend
        self.eos, self.pad = eos, pad
        self.eos_id, self.pad_id = backend.token_to_id(eos), backend.token_to_id(pad)
        self.image_context_id = backend.token_to_id(IMAGE_CONTEXT)
        self.seg_id = backend.token_to_id(SEG)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, *, add_missing: bool = False) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json with merges.txt, and tokenizer_config.json.

        Args:
            folder: a checkpoint directory.
            add_missing: append those of UNIBIOMED_TOKENS that an InternVL tokenizer does not have yet.

        Raises:
            InputError: files missing, unreadable or damaged, or special tokens missing.
        """
        folder = locate(folder)
        config = _read_json(folder / "tokenizer_config.json")
        backend = _read_backend(folder, config)
        if add_missing:
            absent = [token for token in UNIBIOMED_TOKENS if backend.token_to_id(token) is None]
            backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in absent])
        names = {}
        for kind in ("eos_token", "pad_token"):
            value = config.get(kind)
            names[kind] = value.get("content") if isinstance(value, dict) else value
            if not isinstance(names[kind], str):
                raise InputError(
                    f"{folder / 'tokenizer_config.json'} has no {kind}; copy it from the release."
                )
        return cls(backend, eos=names["eos_token"], pad=names["pad_token"], name=f"The tokenizer in {folder}")

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written out in it become their single ids, and nothing is added.

        Raises:
            InputError: it is no valid text.
        """
        try:
            return self._encoder.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            require_text(text)
            raise error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens kept, bytes that are no UTF-8 replaced by U+FFFD."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def with_plain_text(self, *tokens: str) -> "Tokenizer":
        """A copy that encodes these special tokens, when they occur in a text, as ordinary text.

        The released weights saw <p> and </p> in training as text, not as the special tokens of the same
        spelling. Decoding is unchanged.
        """
        table = json.loads(self.backend.to_str())
        for entry in table["added_tokens"]:
            if entry["content"] in tokens:
                # A spelling that no text has keeps the id taken, so that the tokens after it keep theirs.
                entry["content"] = f"\ue000{entry['content']}\ue000"
        plain = copy.copy(self)
        plain._encoder = tokenizers.Tokenizer.from_str(json.dumps(table))
        return plain

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and a tokenizer_config.json that this class and transformers read."""
        folder = locate(folder)
        added = {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(self.backend.get_added_tokens_decoder().items())
        }
        config = {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": self.eos,
            "pad_token": self.pad,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
        for name, text in (
            ("tokenizer.json", self.backend.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False)),
        ):
            write_beside(folder / name, (text + "\n").encode())


def require_text(text: str, name: str = "The text") -> None:
    """Raise InputError for what is no text, or has bytes in it that are none (see `files.shown`)."""
    if not isinstance(text, str):
        raise InputError(f"{name} is a {type(text).__name__}; give words as a str.")
    if not is_text(text):
        raise InputError(
            f"{name} '{shown(text)[:80]}' is no valid text; write it in Unicode (a terminal must use UTF-8)."
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files into the folder `target`.

    Raises:
        InputError: tokenizer_config.json, or the vocabulary itself, is missing.
    """
    target.mkdir(exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    if not (target / "tokenizer_config.json").exists():
        raise InputError(f"{source / 'tokenizer_config.json'} is missing; copy it from the release.")
    if not (target / "tokenizer.json").exists() and not (
        (target / "vocab.json").exists() and (target / "merges.txt").exists()
    ):
        raise InputError(
            f"{source} holds neither tokenizer.json nor vocab.json with merges.txt; copy them from the "
            "release."
        )


def _require_file(path: Path) -> Path:
    if not path.exists():
        raise InputError(
            f"{shown(path)} is missing; copy the tokenizer files of the checkpoint into its folder."
        )
    return path


def _read_json(path: Path) -> dict:
    values = read_json(_require_file(path), remedy=_REMEDY)
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object; copy it again from its source.")
    return values


def _read_backend(folder: Path, config: dict) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _qwen2_backend(folder, config.get("added_tokens_decoder", {}))
    text = read_text(path, remedy=_REMEDY)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"{path} is truncated or damaged ({error}); copy it again from its source."
        ) from error


def _qwen2_backend(folder: Path, added: dict[str, dict]) -> tokenizers.Tokenizer:
    """The same tokenizer from the older pair of files, as InternVL releases have them."""
    vocabulary = _read_json(folder / "vocab.json")
    path = _require_file(folder / "merges.txt")
    merges = _read_merges(read_text(path, encoding="utf-8-sig", remedy=_REMEDY).splitlines())
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # as above
        raise InputError(
            f"{folder} has vocab.json and merges.txt that do not fit; copy both again."
        ) from error
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    config_path = folder / "tokenizer_config.json"
    try:
        tokens = {int(token_id): AddedToken(**entry) for token_id, entry in added.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{config_path} has a damaged added_tokens_decoder ({error}); copy it again from its source."
        ) from error
    for token_id, token in sorted(tokens.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise InputError(
                f"{config_path} gives {token.content} the id {token_id}, which does not follow from "
                "vocab.json; copy both again from one release."
            )
    return backend


def _read_merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#version")]
