"""One HTML file, without network, that shows the masks of a study and what was said about them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from unibiomed_jax.inference.phrases import clean_answer
from unibiomed_jax.inference.study_answer import StudyAnswer
from unibiomed_jax.inputs.tokenizer import SEG
from unibiomed_jax.masks.overlay import PALETTE
from unibiomed_jax.outputs.outlines import trace
from unibiomed_jax.studies.grey import require_window, to_grey
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.views import View, edges, upright
from unibiomed_jax.studies.windows import Window

# Long side of the slices of a volume, and of a single picture; larger ones are reduced, their masks are not.
_SLICE, _PICTURE = 512, 2048
_JPEG_QUALITY = 80
# Colours darker than this share of white carry white letters.
_DARK = 0.18
# Height of a row of the strip that shows where each mask lies, and of the mark of the present slice.
_ROW = 7


@dataclass(frozen=True)
class _Region:
    """A mask as the page shows it."""

    number: int
    phrase: str
    mask: np.ndarray
    # A row of `masks` in the record.
    record: Mapping

    @property
    def colour(self) -> str:
        return "#{:02x}{:02x}{:02x}".format(*PALETTE[self.number % len(PALETTE)])

    @property
    def ink(self) -> str:
        """Black or white, whichever is read better on the colour."""
        shares = np.array(PALETTE[self.number % len(PALETTE)]) / 255
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        return "#fff" if linear @ (0.2126, 0.7152, 0.0722) < _DARK else "#000"

    @cached_property
    def areas(self) -> np.ndarray:
        """(slices,) pixels."""
        return self.mask.sum((1, 2))

    @property
    def best(self) -> int | None:
        """The slice with most of it."""
        return int(self.areas.argmax()) if self.areas.any() else None

    def button(self, words: str | None = None) -> str:
        """Its phrase, or other words for it, which light up its mask."""
        empty = "" if self.areas.any() else " empty"
        return (
            f'<button type="button" class="phrase{empty}" data-region="{self.number}" aria-pressed="false" '
            f'style="--colour:{self.colour};--ink:{self.ink}">{escape(words or self.phrase)}</button>'
        )


def write_page(
    path: Path,
    study: Study,
    masks: Mapping[str, np.ndarray],
    record: Mapping,
    *,
    answer: StudyAnswer | None,
    window: Window | None,
) -> None:
    """Write the page.

    Slices are turned as they are looked at, compressed, and shown with the size of their pixels; masks are
    outlines along the edges of pixels. The file loads nothing and runs no script but its own.

    Args:
        path: of the new file, .html.
        study: what the masks were drawn on.
        masks: phrase -> (slices, rows, columns) bool.
        record: as `describe_study` makes it of the same.
        answer: that the masks come from, if a model said anything.
        window: values that become black and white; None for studies in colour.

    Raises:
        InputError: the study is grey and no window is given.
    """
    require_window(study, window)
    view = upright(study)
    regions = [
        _Region(number, phrase, mask, measures)
        for number, ((phrase, mask), measures) in enumerate(zip(masks.items(), record["masks"], strict=True))
    ]
    covered = np.sum([region.areas for region in regions], axis=0)
    first = int(covered.argmax()) if covered.any() else len(study.values) // 2
    slices = [_jpeg(study, window, view, index) for index in range(len(study.values))]
    outlines = [
        {index: _outline(view.show(region.mask[index])) for index in np.flatnonzero(region.areas).tolist()}
        for region in regions
    ]
    # Large masks first, so that small ones inside them can be reached.
    order = sorted(range(len(regions)), key=lambda number: -int(regions[number].areas.sum()))
    data = {
        "slices": slices,
        "first": first,
        "order": order,
        "regions": [
            {
                "phrase": region.phrase,
                "colour": region.colour,
                "best": region.best,
                "paths": paths,
                "scores": region.record.get("predicted_iou"),
            }
            for region, paths in zip(regions, outlines, strict=True)
        ],
    }
    room = files("unibiomed_jax.outputs")
    script = room.joinpath("study_page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": escape(f"{record['study']}, {record['series']}: masks"),
        "notice": escape(record["notice"]),
        "answer": _answer(answer, regions, record),
        "viewer": _viewer(study, view, regions, [paths.get(first) for paths in outlines], data, record),
        "regions": _table(regions),
        "facts": _facts(record, _size(study, view)),
        "data": _json(data),
        "script": script,
        "script_hash": f"sha256-{digest}",
    }
    template = room.joinpath("study_page.html").read_text("utf-8")
    # In one pass, so that nothing inside a part is taken for the place of another.
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)
    path.write_text(page, encoding="utf-8")


def _json(data: object) -> str:
    """JSON that ends no script element and begins no comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _jpeg(study: Study, window: Window | None, view: View, index: int) -> str:
    pixels = study.values[index] if window is None else to_grey(study, window, truncate=False, index=index)
    picture = Image.fromarray(np.ascontiguousarray(view.show(pixels)))
    longest = _SLICE if len(study.values) > 1 else _PICTURE
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _outline(mask: np.ndarray) -> str:
    """An SVG path around the pixels of a slice, by turns along rows and columns."""
    parts = []
    for outline in trace(mask):
        corners = np.rint(outline + 0.5).astype(int)
        parts.append(f"M{corners[0, 1]} {corners[0, 0]}")
        for down, right in np.diff(corners, axis=0).tolist():
            parts.append(f"v{down}" if down else f"h{right}")
        parts.append("z")
    return "".join(parts)


def _size(study: Study, view: View) -> tuple[float, float]:
    """Height and width of a pixel of the view, of which the smaller is 1."""
    if study.geometry is None:
        return 1.0, 1.0
    _, down, across = study.geometry.spacing
    height, width = (across, down) if view.transposed else (down, across)
    return height / min(height, width), width / min(height, width)


def _answer(answer: StudyAnswer | None, regions: Sequence[_Region], record: Mapping) -> str:
    if answer is None:
        buttons = " ".join(region.button() for region in regions)
        return f'<h1>Masks of {escape(record["series"])}</h1><p class="answer">{buttons}</p>'
    question = escape(clean_answer(answer.prompt))
    return (
        f'<p class="question">Question</p><h1>{question}</h1><p class="answer">{_words(answer, regions)}</p>'
    )


def _words(answer: StudyAnswer, regions: Sequence[_Region]) -> str:
    """The answer with the phrase of each `[SEG]` as a button.

    A phrase is looked for before its `[SEG]`, then after it ("[SEG] liver."); where neither has it (it stood
    in the question), the button takes the place of `[SEG]`. Where every slice had an answer of its own, the
    text is that of one of them: phrases are looked for anywhere in it, and follow it where it has them not.
    """
    pieces = clean_answer(answer.text).split(SEG)
    marks: list[list[tuple[int, int, _Region]]] = [[] for _ in pieces]
    tails: list[list[str]] = [[] for _ in pieces]
    everywhere = [(place, str.find) for place in range(len(pieces))]
    is_of_one_slice = answer.conditioning.choice == "each" and len(answer.conditioning.slices) > 1
    for number, (region, segment) in enumerate(zip(regions, answer.segments, strict=True)):
        phrase = segment.phrase.lower()
        own = [(number, str.rfind), (number + 1, str.find)]
        for place, find in everywhere if is_of_one_slice else own:
            start = find(pieces[place].lower(), phrase) if phrase else -1
            end = start + len(phrase)
            if start >= 0 and all(end <= left or start >= right for left, right, _ in marks[place]):
                marks[place].append((start, end, region))
                break
        else:
            tails[-1 if is_of_one_slice else number].append(region.button())
    text = ""
    for piece, found, tail in zip(pieces, marks, tails, strict=True):
        at, words = 0, ""
        for start, end, region in sorted(found, key=lambda mark: mark[0]):
            words += escape(piece[at:start]) + region.button(piece[start:end])
            at = end
        rest = escape(piece[at:])
        text += words + (" ".join([rest.rstrip(), *tail]) if tail else rest)
    return re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r" {2,}", " ", text)).strip()


def _viewer(
    study: Study,
    view: View,
    regions: Sequence[_Region],
    paths: Sequence[str | None],
    data: Mapping,
    record: Mapping,
) -> str:
    """The picture of the first slice as it is without a script, and what moves it."""
    rows, columns = view.show(study.values[0]).shape[:2]
    tall, wide = _size(study, view)
    count, first = len(study.values), data["first"]
    shapes = "".join(
        f'<path d="{paths[number]}" fill="{regions[number].colour}" stroke="{regions[number].colour}" '
        f'vector-effect="non-scaling-stroke" data-region="{number}"></path>'
        for number in data["order"]
        if paths[number]
    )
    letters = edges(study, view)
    sides = (
        ""
        if letters is None
        else "".join(
            f'<span class="edge {side}" aria-hidden="true">{letter}</span>'
            for side, letter in zip(("top", "right", "bottom", "left"), letters, strict=True)
        )
    )
    picture = (
        f'<div class="picture" tabindex="0" role="group" aria-label="Slice with masks; arrow keys change the '
        f'slice, m hides the masks"><svg viewBox="0 0 {columns * wide:g} {rows * tall:g}">'
        f'<image width="{columns * wide:g}" height="{rows * tall:g}" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{data["slices"][first]}"></image>'
        f'<g class="regions" fill-rule="evenodd" transform="scale({wide:g} {tall:g})">{shapes}</g></svg>'
        f"{sides}</div>"
    )
    scroller = hint = ""
    if count > 1:
        hint = " Scroll by wheel, arrow keys, slider, or dragging sideways."
        scroller = (
            '<div class="scroller">'
            '<button type="button" data-step="-1" aria-label="Previous slice">◀</button>'
            f'<div class="track"><input type="range" min="1" max="{count}" value="{first + 1}" '
            f'aria-label="Slice">{_strip(regions, count, first)}</div>'
            '<button type="button" data-step="1" aria-label="Next slice">▶</button></div>'
        )
    window = record["window"]
    shown = "in its own colours" if window is None else f"window {_window(record)}"
    plane = record["plane"] or "no known plane"
    nothing = "" if regions else " hidden"
    return (
        f'{picture}{scroller}<div class="under"><strong class="shown" aria-live="polite">Slice {first + 1} '
        f'of {count}</strong><button type="button" class="toggle" aria-pressed="true"{nothing}>Masks</button>'
        "</div>"
        f'<p class="muted scores"></p><p class="muted">{escape(f"{plane}, {shown}")}. Compressed pictures: '
        f"not for reading findings.{hint}</p>"
        "<noscript><p>One slice is shown; turn JavaScript on to scroll.</p></noscript>"
    )


def _strip(regions: Sequence[_Region], count: int, first: int) -> str:
    """A row for each mask that shows in which slices it lies."""
    height = _ROW * max(1, len(regions))
    bars = ""
    for row, region in enumerate(regions):
        inside = np.flatnonzero(np.diff(np.r_[False, region.areas > 0, False]))
        for start, end in inside.reshape(-1, 2).tolist():
            bars += (
                f'<rect x="{start}" y="{row * _ROW + 1}" width="{end - start}" height="{_ROW - 2}" '
                f'fill="{region.colour}"></rect>'
            )
    return (
        f'<svg class="strip" viewBox="0 0 {count} {height}" height="{height}" preserveAspectRatio="none" '
        f'aria-hidden="true">{bars}<rect class="now" x="{first}" y="0" width="1" height="{height}" '
        'fill-opacity="0.45"></rect></svg>'
    )


def _table(regions: Sequence[_Region]) -> str:
    """Sizes and scores of each mask."""
    if not regions:
        return "<p>There are no masks.</p>"
    scored = any("predicted_iou" in region.record for region in regions)
    heads = ["Volume, ml", "Longest line, mm (slice)", "Slices"]
    heads += ["Predicted IoU", "Object score"] if scored else []
    rows = ""
    for region in regions:
        sizes = region.record
        if sizes["slices"] is None:
            cells = ["–", "–", "none"]
        else:
            longest = _number(sizes["diameter_mm"], 1)
            cells = [
                "–" if sizes["volume_ml"] is None else f"{sizes['volume_ml']:.4g}",
                longest if longest == "–" else f"{longest} ({sizes['diameter_slice']})",
                " to ".join(map(str, dict.fromkeys(sizes["slices"]))),
            ]
        if scored:
            cells += [_median(region, "predicted_iou"), _median(region, "object_score")]
        rows += (
            f'<tbody><tr><th scope="rowgroup" colspan="{len(heads)}">{region.button()}</th></tr>'
            f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr></tbody>"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    note = (
        '<p class="muted">Scores are medians over the slices of the mask: the overlap with the truth as the '
        "model itself expects it (0 to 1), and the logit that the object is there.</p>"
        if scored
        else ""
    )
    return f"<table><thead><tr>{head}</tr></thead>{rows}</table>{note}"


def _median(region: _Region, name: str) -> str:
    inside = [
        score
        for score, area in zip(region.record[name], region.areas.tolist(), strict=True)
        if area and score is not None
    ]
    return _number(statistics.median(inside) if inside else None, 2)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _window(record: Mapping) -> str:
    window, unit = record["window"], f" {record['unit']}" if record["unit"] else ""
    return f"{window['low']:.4g} to {window['high']:.4g}{unit} ({window['from']})"


def _facts(record: Mapping, size: tuple[float, float]) -> str:
    """What was opened, how it was shown and asked, and by what."""
    slices, rows, columns = record["shape"]
    spacing = record["spacing_mm"]
    facts: list[tuple[str, str | Sequence[str]]] = [
        ("Series", f"{record['series']} of {record['study']}"),
        ("Modality", record["modality"]),
        ("Plane", record["plane"] or "not known"),
        ("Size", f"{slices} slice{'s' * (slices > 1)} of {rows} x {columns} pixels"),
        ("Spacing", "not known" if spacing is None else " x ".join(f"{mm:.4g}" for mm in spacing) + " mm"),
        ("Window", "none, in colour" if record["window"] is None else _window(record)),
        ("Shown", "as one looks at it, " + ("pixels square" if size == (1, 1) else "pixels at their size")),
        ("Noticed", record["notes"]),
    ]
    if "conditioning" in record:
        seen = record["conditioning"]
        numbers = ", ".join(map(str, seen["slices"]))
        facts += [
            ("Read by the language model", f"slices {numbers} ({seen['choice']}): {seen['reason']}"),
            ("Seen by the model", _seen(record)),
            ("Masks cleaned", record["cleaning"]),
            ("About the answer", record["answer_notes"]),
            ("Time", f"{sum(record['seconds'].values()):.1f} s"),
            ("Model", f"sha256 {record['checkpoint']}"),
            ("Data", f"sha256 {record['study_hash']}"),
        ]
    facts.append(("Identity", record["identity"]))
    facts.append(("Versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())))
    return (
        "<dl>"
        + "".join(f"<dt>{name}</dt><dd>{_value(value)}</dd>" for name, value in facts if value)
        + "</dl>"
    )


def _seen(record: Mapping) -> str:
    view = record["view"]
    turned = [
        words
        for name, words in (
            ("transposed", "rows and columns exchanged"),
            ("flipped_rows", "upside down"),
            ("flipped_columns", "mirrored"),
            ("square", "padded to a square"),
        )
        if view[name]
    ]
    name = record["preprocessing"]["name"]
    return f"slices as stored, {', '.join(turned)} ({name})" if turned else f"slices as stored ({name})"


def _value(value: str | Sequence[str]) -> str:
    if isinstance(value, str):
        return escape(value)
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in value) + "</ul>"
