"""Pictures of masks on their image: a tint, an outline, and a legend under the image."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from unibiomed_jax.errors import InputError

# Okabe and Ito's colours, which all common colour-vision deficiencies tell apart, without black; in an order
# whose first ones stand out from grey scans, stained tissue and skin alike.
PALETTE = (
    (86, 180, 233),  # sky blue
    (240, 228, 66),  # yellow
    (213, 94, 0),  # vermilion
    (0, 158, 115),  # bluish green
    (204, 121, 167),  # reddish purple
    (230, 159, 0),  # orange
    (0, 114, 178),  # blue
)
_TINT, _HALO = 0.25, 0.55
_PANEL, _TEXT, _MUTED = (22, 24, 29), (236, 238, 241), (150, 156, 166)
# Small images are enlarged so that lines and letters are crisp, huge ones reduced; in pixels of the long
# side.
_SMALLEST, _LARGEST = 768, 2048
# The legend is at least this wide, also under a narrow image.
_PANEL_WIDTH = 480
_LABEL_LINES = 3
# Under every picture, which may be passed on without the answer it belongs to.
NOTICE = "For research use only; a qualified expert must review it."


def overlay(
    image: Image.Image, masks: Sequence[np.ndarray] | np.ndarray, labels: Sequence[str]
) -> Image.Image:
    """Draw masks on an image, with one colour and one legend entry for each distinct label.

    The legend is a strip below the image, so it never covers a region; a label whose masks are all empty is
    listed as having none, and the intended-use notice is the last line. Lines and letters grow with the
    picture, whose long side is 768 to 2048 pixels.

    Args:
        image: RGB image of (width, height).
        masks: one (height, width) mask for each label, non-zero inside.
        labels: the phrase of each mask; equal phrases share a colour.

    Raises:
        InputError: a mask of another size than the image, or another number of masks than of labels.
    """
    masks = [np.asarray(mask) != 0 for mask in masks]
    if len(masks) != len(labels):
        raise InputError(
            f"There are {len(masks)} masks but {len(labels)} labels; give one label to each mask."
        )
    for number, mask in enumerate(masks):
        if mask.shape != image.size[::-1]:
            raise InputError(
                f"Mask {number} has the shape {mask.shape} but the image has {image.height} rows and "
                f"{image.width} columns; resize the mask to the image."
            )
    names = [" ".join(label.split()) or "unnamed region" for label in labels]
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(dict.fromkeys(names))}
    found = {name for name, mask in zip(names, masks, strict=True) if mask.any()}

    picture, order, centres = _paint(image, masks, [colours[name] for name in names])
    # Where colours repeat, numbers in the regions and in the legend tell them apart.
    if len(colours) > len(PALETTE):
        numbers = {name: str(number) for number, name in enumerate(colours, 1)}
        _draw_numbers(
            picture, [(numbers[names[index]], at) for index, at in zip(order, centres, strict=True)]
        )
        entries = [(f"{numbers[name]}  {name}", colour, name in found) for name, colour in colours.items()]
    else:
        entries = [(name, colour, name in found) for name, colour in colours.items()]
    return _add_legend(picture, entries)


def outline(image: Image.Image, masks: Sequence[Bool[np.ndarray, "height width"]]) -> Image.Image:
    """As `overlay`, without a legend: for pages that say beside the picture what it shows."""
    colours = [PALETTE[number % len(PALETTE)] for number in range(len(masks))]
    return _paint(image, masks, colours)[0]


def _paint(
    image: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[tuple[int, int, int]]
) -> tuple[Image.Image, list[int], list[tuple[int, int]]]:
    """The enlarged image with masks on it; which of them, in order of drawing, and a point inside of each."""
    scale = np.clip(max(image.size), _SMALLEST, _LARGEST) / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    canvas = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
    # Large regions first, so that small ones inside them stay visible.
    order = sorted(
        (index for index in range(len(masks)) if masks[index].any()), key=lambda i: -masks[i].sum()
    )
    centres = [_draw_mask(canvas, masks[index], colours[index]) for index in order]
    return Image.fromarray(np.rint(canvas).astype(np.uint8)), order, centres


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Tint and outline one region in place; returns (x, y) of its pixel farthest from the border.

    Only the part of the canvas around the region is computed.
    """
    height, width = canvas.shape[:2]
    enlargement = height / mask.shape[0]
    # Every pixel of the mask keeps a trace, so that thin vessels do not break and no small lesion gets lost.
    filtered = Image.fromarray(mask.astype(np.float32)).resize(
        (width, height), Image.Resampling.NEAREST if enlargement >= 1 else Image.Resampling.BOX
    )
    inside = np.asarray(filtered) > 0
    line = max(height, width) / 360
    margin = int(np.ceil(2 * line)) + 2
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    window = tuple(slice(max(0, along[0] - margin), along[-1] + margin + 1) for along in (rows, columns))
    inside = inside[window]
    # Signed distance to the border in pixels, smoothed over part of a mask pixel against stair steps.
    # Beyond the image the region is taken to go on, so that no line runs along the image's edge.
    if inside.all():
        distance = np.full(inside.shape, np.inf)
    else:
        padded = np.pad(inside, margin, mode="edge")
        distance = ndimage.distance_transform_edt(padded) - ndimage.distance_transform_edt(~padded)
        distance -= 0.5 * np.sign(distance)  # from pixel centres to the border between them
        smoothing = max(1.0, 0.42 * enlargement)  # from 0.45 on, a lone pixel of the mask would vanish
        distance = ndimage.gaussian_filter(distance, smoothing)[margin:-margin, margin:-margin]
    # A thin structure, such as a vessel, gets a thin line that does not hide it.
    line = np.clip(distance[inside].mean(), 1.2, line)
    part = canvas[window]
    _blend(part, colour, _TINT * np.clip(distance + 0.5, 0, 1))
    _blend(part, (0, 0, 0), _HALO * np.clip(line - np.abs(distance) + 0.5, 0, 1))
    _blend(part, colour, np.clip(line / 2 - np.abs(distance) + 0.5, 0, 1))
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x) + window[1].start, int(y) + window[0].start


def _blend(pixels: np.ndarray, colour: tuple[int, int, int], alpha: np.ndarray) -> None:
    pixels += alpha[..., None] * (np.array(colour, np.float32) - pixels)


def _draw_numbers(picture: Image.Image, numbers: Sequence[tuple[str, tuple[int, int]]]) -> None:
    font = ImageFont.load_default(_letters(picture))
    draw = ImageDraw.Draw(picture)
    for number, position in numbers:
        draw.text(position, number, fill=_TEXT, font=font, anchor="mm", stroke_width=2, stroke_fill=_PANEL)


def _letters(picture: Image.Image) -> int:
    """Font size in pixels."""
    return round(max(picture.size) / 43)


def _add_legend(
    picture: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int], bool]]
) -> Image.Image:
    """Put a strip under the picture: a swatch and a label an entry, as many a row as fit, then the notice."""
    letters = _letters(picture)
    font = ImageFont.load_default(letters)
    pad, swatch, line_height = round(0.9 * letters), letters, round(1.35 * letters)
    width = max(picture.width, _PANEL_WIDTH)
    room = width - 2 * pad

    # Place the entries: each is (left, top, lines of text).
    placed, left, top, row_height = [], 0, 0, 0
    for name, _, is_found in entries:
        lines = _wrap(name if is_found else f"{name} (no region)", font, room - 1.5 * swatch)
        length = 1.5 * swatch + max(font.getlength(text) for text in lines)
        if left and left + length > room:
            left, top, row_height = 0, top + row_height, 0
        placed.append((left, top, lines))
        left += length + 1.5 * letters
        row_height = max(row_height, len(lines) * line_height)
    small = ImageFont.load_default(round(0.7 * letters))
    notice_top = top + row_height
    strip = notice_top + line_height + 2 * pad - (line_height - letters)

    result = Image.new("RGB", (width, picture.height + strip), _PANEL)
    result.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(result)
    for (left, top, lines), (_, colour, is_found) in zip(placed, entries, strict=True):
        x, y = pad + left, picture.height + pad + top
        box = (x, y, x + swatch, y + swatch)
        draw.rounded_rectangle(
            box, radius=swatch // 5, fill=colour if is_found else None, outline=colour, width=2
        )
        for row, text in enumerate(lines):
            middle = y + swatch / 2 + row * line_height
            draw.text(
                (x + 1.5 * swatch, middle), text, fill=_TEXT if is_found else _MUTED, font=font, anchor="lm"
            )
    draw.text(
        (pad, picture.height + pad + notice_top + letters / 2), NOTICE, fill=_MUTED, font=small, anchor="lm"
    )
    return result


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    """Break a label into lines that fit; a label longer than _LABEL_LINES lines ends in an ellipsis."""
    lines, rest = [], text
    while rest:
        if font.getlength(rest) <= room:
            return [*lines, rest]
        last = len(lines) == _LABEL_LINES - 1
        lengths = range(1, len(rest))
        fits = max(1, bisect_right(lengths, room, key=lambda n: font.getlength(rest[:n] + "…")))
        if last:
            return [*lines, rest[:fits].rstrip() + "…"]
        space = rest.rfind(" ", 0, fits + 1)
        cut = space if space > 0 else fits
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines
