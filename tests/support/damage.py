"""Files as copying, editing and bad luck leave them."""

import copy
import json
import random
from typing import Any

ODD_VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "0", " ", "\0", "\n", "../../../etc/passwd", "/dev/zero", "/dev/stdin", "a" * 5000, "é", "e\u0301",
    "\ud800", "\u202e", "名", "model", ".", "..", "C:\\x", [], [[]], [None], [0, 0], [-1, -1], {}, {"": {}},
    {"a": [1]}, [[[[[]]]]],
)  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes with something missing, changed, repeated or put in."""
    kind = rng.randrange(10) if data else 3
    at = rng.randrange(len(data) + 1)
    head = rng.randrange(min(len(data), 400) + 1)
    length = rng.choice((1, 2, 4, 8, 64, 1024))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:head]
    if kind == 2:
        return b""
    if kind == 3:
        return rng.randbytes(rng.choice((1, 7, 8, 9, 100, 5000)))
    if kind == 4:
        return data[:at] + data[at + length :]
    if kind == 5:
        return data[:head] + rng.randbytes(length) + data[head:]
    if kind == 6:
        return data[:at] + bytes(length) + data[at + length :]
    if kind == 7:
        return data + rng.choice((data, bytes(length), rng.randbytes(length)))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        place = rng.randrange(min(len(data), 200) if kind == 8 else len(data))
        changed[place] = rng.choice((0, 1, 127, 128, 255, changed[place] ^ 1 << rng.randrange(8)))
    return bytes(changed)


def damage_json(value: Any, rng: random.Random) -> bytes:
    """A JSON file with a value missing, of another kind, in another encoding, or no longer JSON."""
    kind = rng.randrange(12)
    if kind == 0:
        return damage(json.dumps(value).encode(), rng)
    if kind == 1:
        return json.dumps(rng.choice(ODD_VALUES)).encode()
    if kind == 2:
        return json.dumps(value).encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le")))
    if kind == 3:
        return rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b'{"a": 1, "a": 2}', b"\xff"))
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 3))):
        places = list(_places(value))
        if not places:
            break
        parent, key = rng.choice(places)
        if kind == 4:
            del parent[key]
        elif kind == 5 and isinstance(parent, dict):
            parent[rng.choice(("", "unknown", key + " ", key.upper()))] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return json.dumps(value).encode()


def odd_name(rng: random.Random) -> bytes:
    """A file name out of everything that file systems take: all bytes but the slash and zero."""
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(
            rng.choice([c for c in range(1, 256) if c != ord("/")]) for _ in range(rng.randint(1, 60))
        )
    if kind == 1:
        pieces = (
            " ",
            "-",
            "--",
            "$(x)",
            "*",
            "?",
            "'",
            '"',
            "\\",
            "\n",
            "\r",
            "\t",
            "\x1b[31m",
            "%s",
            "{}",
            "~",
            "#",
        )
    elif kind == 2:
        pieces = ("é", "e\u0301", "名前", "\u202e", "\u200b", "😀", "ß", "İ", "ﬁ", "\ufeff", "\u2028")
    elif kind == 3:
        pieces = ("_", "liver", "a", ".", "..a", "._a", "CON", "nul", "mask", "train", "x" * 80)
    else:
        pieces = ("a", "B", "7", "[/red]", "[bold]", "</s>", "<image>", "[SEG]")
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 3))).encode()[:150].strip(b".") or b"a"


def _places(value: Any):
    """Every (container, key) in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])
