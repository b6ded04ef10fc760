"""What a mask is, in whatever file it comes."""

import os

import numpy as np
from jaxtyping import Bool
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.pixels import ImageSource, Pixels, decode, palette_of, to_rgb


def open_mask(source: ImageSource) -> Bool[np.ndarray, "height width"]:
    """A mask as booleans, upright as its image is: black (0) is outside, everything else inside.

    - Numbers (bilevel, grey, 16 bits, floats) count as they are shown: what a TIFF file with white as zero
      shows black is outside.
    - Colours are inside if any channel is not 0.
    - Files compressed with losses (JPEG, WebP, AVIF, whatever their names say) hold specks around what was
      drawn: there only what is brighter than half in any channel is inside.
    - Palettes: where index 0 and black are the same (label maps as of Pascal VOC), either says it. Where
      they are not, the colours decide if those in use are black and grey alone: an editor's black and white
      may be in any order.
    - Alpha counts for nothing, but may not say the opposite.

    What this cannot decide is refused.

    Raises:
        InputError: whatever `open_image` would refuse; or a palette that shows other colours for outside, a
            drawing in the alpha channel, several values of which none is 0, or a file that may or may not
            have been compressed with losses, where that matters.
    """
    pixels = decode(source)
    name = f"The mask {pixels.record.source}" if isinstance(source, str | os.PathLike) else "The mask"
    if isinstance(pixels.values, Image.Image) and pixels.values.mode in ("P", "PA"):
        inside = _inside_of_palette(pixels.values, name)
    else:
        inside = _inside_of_values(pixels, name)
    alpha = _alpha(pixels.values)
    if alpha is not None and alpha.min() < alpha.max():
        if (inside & (alpha == 0)).any():
            raise InputError(
                f"{name} has transparent pixels that are not black; save it without transparency."
            )
        if not inside.any():
            raise InputError(
                f"{name} is black wherever it can be seen; draw the target in white on black, without "
                "transparency."
            )
    return inside


def _inside_of_values(pixels: Pixels, name: str) -> np.ndarray:
    values = pixels.values
    if isinstance(values, Image.Image):
        grey = values.mode in ("1", "L")
        values = np.asarray(values.convert("L") if grey else to_rgb(values, pixels.record)[0])
    values = values[..., :3] if values.ndim == 3 else values[..., None]
    drawn = values != 0
    if pixels.losses != "none":
        bright = values > np.iinfo(values.dtype).max / 2
        if pixels.losses == "maybe" and (bright.any(-1) != drawn.any(-1)).any():
            raise InputError(
                f"{name} is {pixels.record.format} with values between black and white, which may be labels "
                "or what compression left; save it as PNG."
            )
        values = drawn = bright
    inside = drawn.any(-1)
    if inside.all() and (values != values[0, 0]).any():
        raise InputError(f"{name} holds several values but no 0, which marks what is outside; set that to 0.")
    return inside


def _inside_of_palette(image: Image.Image, name: str) -> np.ndarray:
    indices, colours = palette_of(image)
    used = np.flatnonzero(np.bincount(indices.reshape(-1)))
    if len(colours) and used[-1] >= len(colours):
        raise InputError(f"{name} has pixels without a colour in its palette; save it again as a grey image.")
    by_index = used > 0
    if not len(colours):  # made in memory
        return indices > 0
    shown = colours[used]
    by_colour = shown.any(-1)
    if (by_index == by_colour).all():
        if by_index.all() and len(used) > 1 and colours[0].any():
            raise InputError(f"{name} holds several colours but no black, which marks what is outside.")
        return indices > 0
    if len(used) > 1:
        decided = by_colour.any() and not by_colour.all() and _is_grey(shown)
    elif by_colour[0]:  # index 0 alone, and not black: an editor's white, or a label map of other colours?
        decided = _is_grey(colours)
    else:  # black under another index, alone: nothing is drawn, or the palette was never filled
        decided = colours.any()
    if not decided:
        raise InputError(
            f"{name} is a palette image whose index 0 is not the only black; save it as a grey image, black "
            "outside."
        )
    return np.isin(indices, used[by_colour])


def _is_grey(colours: np.ndarray) -> bool:
    return bool((colours == colours[:, :1]).all())


def _alpha(values: Image.Image | np.ndarray) -> np.ndarray | None:
    if isinstance(values, np.ndarray):
        return values[..., 3] if values.shape[2:] == (4,) else None
    if values.mode.endswith(("A", "a")):
        return np.asarray(values.getchannel(len(values.getbands()) - 1))
    if "transparency" in values.info:
        return np.asarray(values.convert("RGBA").getchannel("A"))
    return None
