"""Where things lie in the repository."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
# Small arrays and checkpoints that tests read.
FILES = TESTS / "files"
GOLDEN = TESTS / "golden"
MICRO = GOLDEN / "micro" / "checkpoint"
QWEN2 = FILES / "qwen2_tokenizer"
SAMPLE_DATA = ROOT / "sample_data"
TINY = ROOT / "checkpoints" / "unibiomed-tiny"
# The experiment that the tests of train.py run.
MICRO_RUN = TESTS / "support" / "micro_run.py"
