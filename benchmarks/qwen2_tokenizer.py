"""The tokenizer of Qwen2.5 with the added tokens, as the tests have it: what benchmarks use."""

from __future__ import annotations

import lzma
import shutil
import tempfile
from pathlib import Path

from unibiomed_jax.inputs.tokenizer import Tokenizer

FILES = Path(__file__).parents[1] / "tests" / "files" / "qwen2_tokenizer"


def qwen2_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = lzma.decompress((FILES / "tokenizer.json.xz").read_bytes())
        (Path(folder) / "tokenizer.json").write_bytes(vocabulary)
        shutil.copy(FILES / "tokenizer_config.json", folder)
        return Tokenizer.from_folder(folder)
