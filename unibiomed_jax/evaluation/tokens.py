"""Words of texts as the Penn Treebank counts them, lower-cased and without punctuation, for BLEU and its kin.

The reference is Stanford's tokeniser, a Java program (`java.py`). This is ours for where there is no Java: it
follows the same rules on English reports, and numbers made with it say so ("own tokens").
"""

from __future__ import annotations

import re

# Tokens that do not count, after lower-casing: so that brackets, written "-lrb-", do.
PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Written with a full stop that belongs to them.
_ABBREVIATIONS = (
    "mr mrs ms dr prof st vs etc al ct ind va md mo ga wis wyo conn colo calif fla minn mich mont neb "
    "nev okla penn tenn ala ariz kan ky dak vt jan feb mar apr jun jul aug sep sept oct nov dec mon "
    "tue tues wed thu thurs fri inc ltd co corp jr sr gen rep sen gov lt sgt col capt maj hon rev "
    "pres ave blvd rd sq ft mt dept univ assn bros cos mfg cf est ext rt adm atty cmdr brig cpl ph "
    "tel adj"
).split()
# The same if they begin with a capital: in lower case they are words ("a mass.").
_CAPITALISED = "mass ill miss del la pa ark tex ore wash".split()
# The same before a number.
_NUMBERED = "no nos fig figs ca pp".split()
# One word that counts as two: where it is parted.
_PARTED = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3, "d'ye": 2}

# Superscripts are letters to Python, and signs to the Treebank.
_LETTER = "[^\\W¹²³]"
_WORD = rf"[^\W_¹²³](?:{_LETTER}|[-/](?={_LETTER})|\.(?=[^\W\d_]{{2}}|\d))*"
_TOKEN = re.compile(
    "|".join(
        (
            r"(?P<tag></?[A-Za-z][^<>\s|]*>)",
            r"(?P<address>(?:https?://|www\.)\S*[\w/=]|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|[#@][A-Za-z_]\w*)",
            r"(?P<initials>(?:[A-Za-z]\.){2,}|[A-Z][a-z]\.[A-Z]\.)",
            rf"(?P<abbreviation>\b(?:(?i:{'|'.join(_ABBREVIATIONS)})"
            rf"|(?:{'|'.join(f'[{word[0].upper()}](?i:{word[1:]})' for word in _CAPITALISED)})"
            rf"|(?i:{'|'.join(_NUMBERED)})(?=\. ?\d)"
            r"|[A-Za-z](?!\.\s+[A-Z]))\.(?!\w))",
            r"(?P<mixed>(?<![\w.])\d+[  ]\d+/\d+(?![\w/]))",
            r"(?P<measure>[-+]?\d*\.\d+(?=[A-Za-z]))",
            r"(?P<number>(?<![\w.])[-+]?\d*[.,]?\d+(?:[.,:/-]\d+)*(?![\w]))",
            r"(?P<name>O['’][A-Z][a-z]+)",
            r"(?P<joined>[^\W\d_]+&[^\W\d_]+)",
            r"(?P<clitic>n['’]t\b|['’](?:s|m|d|re|ve|ll)\b)",
            rf"(?P<word>{_WORD}(?=n['’]t\b)|{_WORD})",
            r"(?P<run>\.{2,}|[!?]{2,}|-{2,}|[—–])",
            r"(?P<symbol>\S)",
        )
    )
)


def tokenise(text: str) -> str:
    """The words of a text, blanks between them."""
    found: list[str] = []
    for match in _TOKEN.finditer(text.replace("’", "'")):
        token, kind = match.group().lower(), match.lastgroup
        if kind == "mixed":  # one and a half is one word
            token = token.replace(" ", "\u00a0")
        elif kind == "symbol":
            token = _BRACKETS.get(token, "..." if token == "…" else token)
            token = "'" if token in '"“”‘«»' else token
        elif kind == "run":
            token = "--" if token[0] in "-—–" else "..." if token[0] == "." else token
        at = _PARTED.get(token, 0)
        found += [token[:at], token[at:]] if at else [token]
    return " ".join(token for token in found if token not in PUNCTUATION)
