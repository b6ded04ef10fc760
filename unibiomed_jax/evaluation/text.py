"""BLEU-1 to 4, ROUGE-L, CIDEr and METEOR of texts, whichever tokeniser there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unibiomed_jax.evaluation import ngrams
from unibiomed_jax.evaluation.java import Java
from unibiomed_jax.evaluation.paper_text import TextItem
from unibiomed_jax.evaluation.tokens import tokenise

STANFORD, OWN = "Stanford PTB 3.4.1", "own tokens"
NO_METEOR = "METEOR: not computed, because the extra 'eval' (METEOR and Java) is not installed"


@dataclass(frozen=True)
class TextScores:
    """Scores by the names of published tables."""

    whole: dict[str, float]
    # Of every item, in their order.
    items: list[dict[str, float]]
    # What made the tokens; scores of different ones are not comparable.
    tokens: str
    # What is not computed, and why.
    missing: list[str] = field(default_factory=list)


def score_texts(corpora: Mapping[str, Sequence[TextItem]]) -> dict[str, TextScores]:
    """The scores of several corpora by name. METEOR's process is started once, for all of them.

    Texts have one line each (`paper_text.one_line`). An empty corpus has no scores.
    """
    corpora = {name: items for name, items in corpora.items() if items}
    if not corpora:
        return {}
    java = Java.find()
    texts = [text for items in corpora.values() for item in items for text in (item.truth, item.predicted)]
    tokens = iter(java.tokenise(texts) if java else map(tokenise, texts))
    pairs = {name: [(next(tokens), next(tokens)) for _ in items] for name, items in corpora.items()}
    meteors = java.score_meteor(list(pairs.values())) if java else [None] * len(pairs)
    return {
        name: _scores(of_corpus, meteor, STANFORD if java else OWN)
        for (name, of_corpus), meteor in zip(pairs.items(), meteors, strict=True)
    }


def _scores(
    pairs: Sequence[tuple[str, str]], meteor: tuple[float, list[float]] | None, tokens: str
) -> TextScores:
    truths, predictions = zip(*pairs, strict=True)
    bleu, bleus = ngrams.bleu(truths, predictions)
    by_name = {
        f"Bleu_{order + 1}": (bleu[order], [row[order] for row in bleus]) for order in range(ngrams.ORDERS)
    }
    if meteor is not None:
        by_name["METEOR"] = meteor
    by_name["ROUGE_L"] = ngrams.rouge_l(truths, predictions)
    by_name["CIDEr"] = ngrams.cider(truths, predictions)
    return TextScores(
        {name: whole for name, (whole, _) in by_name.items()},
        [{name: single[n] for name, (_, single) in by_name.items()} for n in range(len(pairs))],
        tokens,
        [] if meteor is not None else [NO_METEOR],
    )
