"""The pages that a person judges a model by: one file each, without scripts and without network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.compare import Difference
from unibiomed_jax.evaluation.readers import image_folder
from unibiomed_jax.evaluation.records import Sample, decode_masks
from unibiomed_jax.evaluation.scoring import UNNAMED, TaskResult, rows
from unibiomed_jax.evaluation.tasks import TASKS
from unibiomed_jax.files import locate, shown, write_beside
from unibiomed_jax.inference.answer import INTENDED_USE
from unibiomed_jax.inputs.images import open_image
from unibiomed_jax.masks.overlay import outline

PAGE = "index.html"
# Cases of each kind (worst, median, best) that are shown of a task.
CASES = 3
# Bins of the distribution of Dice.
BINS = 20
# The score that a task's targets are drawn by, the first that it has; all are 1 at best.
HEADLINES = ("dice", "accuracy", "mdice", "holds", "ROUGE_L", "mean_dice")
# Long side of a picture, pixels.
_PICTURE = 480
# Reasons for what was not scored that are written out; all are in results.json.
_REASONS = 20

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --muted: #59636e; --line: #d4dae1;
  --card: #f5f7f9; --bar: #2f6fb5; --track: #e4e9ee; --whisker: #1b1f24; --better: #1a7f4b;
  --worse: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --text: #e6e9ed; --muted: #9aa4b0;
  --line: #343b45; --card: #1d2229; --bar: #5f9fe0; --track: #2a313b; --whisker: #e6e9ed; --better: #4cc38a;
  --worse: #ec7a62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .5rem;
  border-top: 1px solid var(--line); padding-top: 1.5rem; } h3 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
p { margin: .4rem 0; } .muted, caption { color: var(--muted); font-size: .9rem; }
.notice { border-left: 4px solid var(--worse); background: var(--card); padding: .6rem .9rem;
  margin: 1rem 0; }
nav a { margin-right: 1rem; white-space: nowrap; } a { color: var(--bar); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; }
dt { color: var(--muted); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; color: var(--muted); } th.l, td.l { text-align: left; }
.bar { display: grid; grid-template-columns: minmax(9rem, 20rem) 1fr 7.5rem; gap: .1rem .8rem;
  align-items: center; font-size: .92rem; margin: .3rem 0; } .bar > :last-child {
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.track { position: relative; height: 1rem; background: var(--track); border-radius: 3px; }
.track i { position: absolute; top: 0; bottom: 0; background: var(--bar); border-radius: 3px; }
.track b { position: absolute; top: calc(50% - 1px); height: 2px; background: var(--whisker); }
.track b::before, .track b::after { content: ""; position: absolute; top: -3px; height: 8px; width: 2px;
  background: var(--whisker); } .track b::before { left: 0; } .track b::after { right: 0; }
.track u { position: absolute; left: 50%; top: -3px; bottom: -3px; width: 1px; background: var(--muted); }
.better { color: var(--better); } .worse { color: var(--worse); }
.histogram { display: grid; grid-template-columns: repeat(20, 1fr); gap: 2px; align-items: end;
  height: 9rem; max-width: 40rem; border-bottom: 1px solid var(--line); }
.histogram div { background: var(--bar); border-radius: 2px 2px 0 0; position: relative; }
.histogram span { position: absolute; bottom: 100%; left: 0; right: 0; text-align: center; font-size: .68rem;
  color: var(--muted); } .axis { display: flex; justify-content: space-between; max-width: 40rem; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.case { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  font-size: .9rem; min-width: 0; } .case header { display: flex;
  justify-content: space-between; gap: .5rem; } .case header strong { overflow-wrap: anywhere; min-width: 0; }
.case header span { white-space: nowrap; }
.pictures { display: grid; grid-auto-columns: 1fr; grid-auto-flow: column; gap: .5rem;
  margin: .6rem 0; align-items: start; }
figure { margin: 0; } figure img { width: 100%; display: block; border-radius: 4px; } figcaption {
  color: var(--muted); font-size: .8rem; } details { margin: .8rem 0; } summary { cursor: pointer; }
@media (max-width: 36rem) { .bar { grid-template-columns: 1fr max-content; } .bar > .track {
  grid-column: 1 / -1; grid-row: 2; } body { padding-top: 1rem; }
  .histogram span { display: none; } dl { grid-template-columns: 1fr; } dt { margin-top: .3rem; } }
"""

_DEFINITIONS = {
    "dice": "Dice over all cases; both masks empty 1, one empty 0.",
    "dice_present": "Dice where the target is in the image; no mask counts 0.",
    "absent_correct": "Share of absent targets for which nothing was drawn.",
    "iou": "Intersection over union, as dice.",
    "nsd_1mm": "Surface Dice: share of both borders within 1 mm of the other (nsd_2mm, nsd_3mm, px alike).",
    "hd95_mm": "95th percentile of the distance between borders; smaller is better, empty masks left out.",
    "hd95_penalised_mm": "The same, a missing mask counting the diagonal of the image.",
    "assigned_dice": "Several masks: Dice of the best pairs, divided by pairs and masks left over.",
    "exact": "The answer is the truth.",
    "holds": "The answer holds the truth as whole words.",
    "ROUGE_L": "Longest common run of words with the truth.",
    "CIDEr": "Shared n-grams, weighted by how rare they are; 10 at best.",
}


def write_page(
    path: Path,
    results: Sequence[TaskResult],
    samples: Mapping[str, Sequence[Sample]],
    about: Mapping[str, Any],
) -> None:
    """The page of a run.

    Args:
        path: of the file.
        results: of all tasks and protocols.
        samples: the records with their scores, by task; empty where folders were scored without records.
        about: what the run's config.json says, and the hash of the data.
    """
    folders = [] if about.get("folder") is None else [image_folder(about["folder"])]
    # A table may name its images from the folder of the split on.
    folders += [folder / about["split"] for folder in folders if "split" in about]
    body = [_head("Evaluation", about)]
    titles = [f"{result.task}, {result.protocol} protocol" for result in results]
    links = (f'<a href="#{number}">{escape(title)}</a>' for number, title in enumerate(titles))
    body.append(f"<nav>{''.join(links)}</nav>")
    for number, (title, result) in enumerate(zip(titles, results, strict=True)):
        body.append(f'<h2 id="{number}">{escape(title)}</h2>')
        body += _task(result)
        of_task = samples.get(result.task, ())
        if result.protocol == "strict" and of_task:
            body += _cases(result.task, of_task, folders)
    _write(path, "Evaluation", body)


def write_comparison(path: Path, differences: Sequence[Difference], names: tuple[Path, Path]) -> None:
    """The page of `eval compare`: what the second run has more than the first, with intervals."""
    first, second = (shown(name) for name in names)
    about = {"first run": names[0], "second run": names[1]}
    body = [_head("Comparison", about)]
    body.append(
        "<p>Differences are second minus first over the records that both scored; for their 95 % intervals "
        "the same patients are drawn for both runs. Colour: the interval leaves out 0.</p>"
    )
    for task in dict.fromkeys(found.task for found in differences):
        of_task = [found for found in differences if found.task == task]
        body.append(f"<h2>{escape(task)}</h2>")
        whole = [found for found in of_task if found.difference.dataset is None]
        table = [
            [
                found.difference.score,
                _number(found.first.value),
                _number(found.second.value),
                _signed(found),
                _interval(found.difference.interval, "+"),
                found.difference.cases,
                found.difference.patients,
            ]
            for found in whole
        ]
        columns = ("score", first, second, "difference", "95 %", "n", "patients")
        body.append(_table(columns, table, "Means over the targets", plain=(3,)))
        scores = [found.difference.score for found in whole]
        headline = next((name for name in HEADLINES if name in scores), None)
        targets = [
            found
            for found in of_task
            if found.difference.score == headline and found.difference.target is not None
        ]
        if targets:
            body.append(f"<h3>{escape(str(headline))}, target by target</h3>")
            body.append(_difference_bars(targets))
    _write(path, "Comparison", body)


def _head(title: str, about: Mapping[str, Any]) -> str:
    known = {
        "checkpoint": " ".join(str(about[key]) for key in ("path", "checkpoint") if about.get(key)),
        "data": " ".join(str(about[key]) for key in ("folder", "split", "data") if about.get(key)),
        "first run": about.get("first run", ""),
        "second run": about.get("second run", ""),
        "versions": ", ".join(f"{name} {of}" for name, of in about.get("versions", {}).items()),
        "longest answer": f"{about['max_new_tokens']} tokens" if "max_new_tokens" in about else "",
        "device": about.get("device", ""),
    }
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(shown(str(value)))}</dd>"
        for name, value in known.items()
        if value
    )
    return f'<h1>{title}</h1><p class="notice">{escape(INTENDED_USE)}</p><dl>{entries}</dl>'


def _task(result: TaskResult) -> list[str]:
    """Tables and bars of one task under one protocol."""
    found = rows([result])
    datasets = list(dict.fromkeys(row["dataset"] for row in found if row.get("dataset")))
    body = [f"<p>{escape(note)}</p>" for note in result.notes]
    whole = [row for row in found if row.get("target") is None and row.get("dataset") is None]
    body.append(_score_table(whole, "Means over the targets"))
    explained = [f"<dt>{name}</dt><dd>{_DEFINITIONS[name]}</dd>" for name in _DEFINITIONS
                 if any(re.sub("(px|voxel)$", "mm", row["score"]) == name for row in whole)]  # fmt: skip
    if explained:
        body.append(f"<details><summary>What the scores are</summary><dl>{''.join(explained)}</dl></details>")
    if len(datasets) > 1:
        inner = [row for row in found if row.get("dataset") and row.get("target") is None]
        table = _score_table(inner, "Means over the targets of a dataset", dataset=True)
        body.append(f"<details><summary>{len(datasets)} datasets</summary>{table}</details>")
    names = [row["score"] for row in found]
    headline = next((name for name in HEADLINES if name in names), None)
    targets = [row for row in found if row["score"] == headline and row.get("target") not in (None, UNNAMED)]
    if targets:
        body.append(f"<h3>{escape(str(headline))}, target by target</h3>")
        body.append(_bars(targets, several=len(datasets) > 1))
    scores = result.numbers.get("object_score")
    if scores is not None and scores["auroc"] is not None:
        body += _object_score(scores)
    if result.unscored:
        items = [f"<li>{escape(shown(n))}: {escape(why)}</li>" for n, why in result.unscored.items()]
        more = f"<li>and {len(items) - _REASONS} more, in results.json</li>" if len(items) > _REASONS else ""
        body.append(
            f"<details open><summary>{len(items)} not scored</summary>"
            f"<ul>{''.join(items[:_REASONS])}{more}</ul></details>"
        )
    return body


def _score_table(found: Sequence[Mapping[str, Any]], caption: str, *, dataset: bool = False) -> str:
    lines = [
        [
            *([row["dataset"]] if dataset else []),
            row["score"],
            _number(row["value"]),
            _interval((row["low"], row["high"]) if row.get("low") is not None else None),
            row["n"],
            row.get("patients", ""),
        ]
        for row in found
    ]
    columns = [*(["dataset"] if dataset else []), "score", "mean", "95 %", "n", "patients"]
    return _table(columns, lines, caption, left=1 + dataset)


def _table(
    columns: Sequence[str],
    lines: Iterable[Sequence[Any]],
    caption: str,
    *,
    left: int = 1,
    plain: Sequence[int] = (),
) -> str:
    """A table whose first columns stand left; cells of the `plain` columns are HTML already."""

    def cell(tag: str, number: int, value: Any) -> str:
        text = value if number in plain and tag == "td" else escape(shown(str(value)))
        return f"<{tag}{' class=l' if number < left else ''}>{text}</{tag}>"

    head = "".join(cell("th", number, name) for number, name in enumerate(columns))
    body = "".join(
        f"<tr>{''.join(cell('td', number, value) for number, value in enumerate(line))}</tr>"
        for line in lines
    )
    return (
        f"<div class=scroll><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _bars(targets: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """A bar a target from 0 to 1, the best first, with its interval."""
    parts = []
    for row in sorted(targets, key=lambda row: -(row["value"] or 0)):
        where = f" <span class=muted>{escape(shown(row['dataset']))}</span>" if several else ""
        value = row["value"] or 0
        inner = f'<i style="left:0;width:{100 * min(max(value, 0), 1):.2f}%"></i>'
        if row.get("low") is not None:
            inner += (
                f'<b style="left:{100 * row["low"]:.2f}%;width:{100 * (row["high"] - row["low"]):.2f}%"></b>'
            )
        parts.append(
            f"<div class=bar><div>{escape(shown(row['target']))}{where}</div><div class=track>{inner}</div>"
            f"<div>{value:.3f} <span class=muted>n={row['n']}</span></div></div>"
        )
    return "".join(parts)


def _difference_bars(targets: Sequence[Difference]) -> str:
    """A bar a target from -1 to 1."""
    parts = []
    for found in sorted(targets, key=lambda found: -found.difference.value):
        value = found.difference.value
        left, width = 50 + 50 * min(value, 0), 50 * abs(value)
        inner = f'<i style="left:{left:.2f}%;width:{width:.2f}%"></i><u></u>'
        if found.difference.interval is not None:
            low, high = found.difference.interval
            inner += f'<b style="left:{50 + 50 * low:.2f}%;width:{50 * (high - low):.2f}%"></b>'
        name = f"{found.difference.target} ({found.difference.dataset})"
        parts.append(
            f"<div class=bar><div>{escape(shown(name))}</div><div class=track>{inner}</div>"
            f"<div>{_signed(found)} <span class=muted>n={found.difference.cases}</span></div></div>"
        )
    return "".join(parts)


def _object_score(found: Mapping[str, Any]) -> list[str]:
    bins = [
        [f"{row['from']:.1f} to {row['to']:.1f}", row["n"], _number(row["chance"]), _number(row["present"])]
        for row in found["bins"]
    ]
    thresholds = [
        [
            f"{row['above']:+.0f}",
            *(_number(row[name]) for name in ("absent_hidden", "present_hidden", "dice")),
        ]
        for row in found["thresholds"]
    ]
    return [
        "<h3>Object score against presence</h3>",
        _table(
            ("score as probability", "n", "mean", "share present"),
            bins,
            f"{found['present']} present and {found['absent']} absent targets",
        ),
        _table(
            ("masks kept above (logit)", "absent hidden", "present hidden", "Dice over all"),
            thresholds,
            f"What hiding would do; without it Dice over all is {found['dice']:.4f}. hide_absent keeps masks "
            "above 0.",
        ),
    ]


def _cases(task: str, samples: Sequence[Sample], folders: Sequence[Path]) -> list[str]:
    """The distribution of Dice, and the worst, median and best cases."""
    name = "dice" if TASKS[task].masks else next((n for n in HEADLINES if _has(samples, n)), None)
    scored = [sample for sample in samples if name in sample.scores.get("strict", {})]
    if name is None or not scored:
        return []
    body = []
    scored.sort(key=lambda sample: sample.scores["strict"][name])
    values = [sample.scores["strict"][name] for sample in scored]
    if name == "dice":
        body.append("<h3>Distribution of Dice</h3>" + _histogram(values))
    places = {
        "Worst": range(0, CASES),
        "Median": range(len(scored) // 2 - CASES // 2, len(scored) // 2 - CASES // 2 + CASES),
        "Best": range(len(scored) - CASES, len(scored)),
    }
    shown_already: set[int] = set()
    for title, chosen in places.items():
        kept = [number for number in chosen if 0 <= number < len(scored) and number not in shown_already]
        shown_already.update(kept)
        if kept:
            cards = "".join(_card(scored[number], name, folders) for number in kept)
            body.append(f"<h3>{title} cases</h3><div class=cases>{cards}</div>")
    return body


def _has(samples: Sequence[Sample], name: str) -> bool:
    return any(name in sample.scores.get("strict", {}) for sample in samples)


def _histogram(values: Sequence[float]) -> str:
    counts = np.histogram(values, BINS, (0, 1))[0]
    bars = "".join(
        f'<div style="height:{100 * count / max(counts) * 0.88:.1f}%" title="{count}">'
        f"<span>{count or ''}</span></div>"
        for count in counts.tolist()
    )
    axis = "".join(f"<span>{value:g}</span>" for value in (0, 0.25, 0.5, 0.75, 1))
    return (
        f"<div class=histogram>{bars}</div><div class='axis muted'>{axis}</div>"
        f"<p class=muted>Number of cases by Dice; {len(values)} cases, median {np.median(values):.3f}.</p>"
    )


def _card(sample: Sample, name: str, folders: Sequence[Path]) -> str:
    """One case: pictures of truth and answer, the words of both."""
    pictures = "".join(
        f'<figure><img alt="{escape(title)}" loading=lazy src="{source}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, source in _pictures(sample, folders).items()
    )
    texts = {
        "question": sample.question.replace("<image>", "").strip(),
        "truth": sample.answer or (sample.category if TASKS[sample.task].masks else ""),
        "answer": sample.prediction or "nothing",
    }
    words = "".join(f"<dt>{k}</dt><dd>{escape(shown(text))}</dd>" for k, text in texts.items() if text)
    score = sample.scores["strict"][name]
    return (
        f"<article class=case><header><strong>{escape(shown(sample.doc_id))}</strong>"
        f"<span>{escape(name)}&nbsp;{score:.3f}</span></header>"
        f"<div class=pictures>{pictures}</div><dl>{words}</dl></article>"
    )


def _pictures(sample: Sample, folders: Sequence[Path]) -> dict[str, str]:
    """Truth and answer on the image, as data URLs; on black, where the image is not at hand."""
    truths, masks = (
        [mask for mask in decode_masks(found, sample.doc_id)] for found in (sample.truth_masks, sample.masks)
    )
    number, title = None, ""
    if truths and truths[0].ndim == 3:  # the slice that shows most
        areas = (np.stack(truths) if truths[0].any() or not masks else np.stack(masks)).sum((0, 2, 3))
        number = int(areas.argmax())
        title = f", slice {number + 1} of {len(areas)}"
        truths, masks = ([mask[number] for mask in found] for found in (truths, masks))
    image = _image(sample, folders, number)
    if image is None and not truths:
        return {}
    if image is None:
        image = Image.new("RGB", truths[0].shape[::-1])
    sides = {f"truth{title}": truths}
    if TASKS[sample.task].masks:
        sides[f"answer{title}"] = masks
    return {
        side: _data_url(outline(image, [mask for mask in found if mask.shape == image.size[::-1]]))
        for side, found in sides.items()
    }


def _image(sample: Sample, folders: Sequence[Path], number: int | None) -> Image.Image | None:
    for folder in folders if sample.image else ():
        path = locate(folder) / sample.image
        if number is not None and len(sample.slices) > number:
            path = path / sample.slices[number]
        try:
            return open_image(path)[0]
        except InputError:  # not here, or moved since it was asked about
            continue
    return None


def _data_url(image: Image.Image) -> str:
    image.thumbnail((_PICTURE, _PICTURE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _interval(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"


def _signed(found: Difference) -> str:
    """The difference, coloured where it is certain; of distances, less is better."""
    value = found.difference.value
    text = f"{value:+.4f}"
    if not found.certain:
        return text
    smaller = found.difference.score.startswith(("hd95", "false_positive"))
    return f"<span class={'better' if (value < 0) == smaller else 'worse'}>{text}</span>"


def _write(path: Path, title: str, body: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width, initial-scale=1"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    write_beside(path, page.encode("utf-8", "backslashreplace"))
