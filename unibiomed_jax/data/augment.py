"""Random changes of an image and its masks together, for training on little data. The reference has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool
from PIL import Image

from unibiomed_jax.config.fields import ABOVE_ZERO, ZERO_OR_MORE, require_limits
from unibiomed_jax.errors import InputError

# Directions in which images may be mirrored.
MIRRORS = ("horizontal", "vertical")


@dataclass(frozen=True)
class AugmentConfig:
    """Largest changes; each is drawn evenly up to its limit.

    Raises:
        InputError: a negative limit, no zoom, or an unknown direction in `mirror`.
    """

    # Rotation in the plane, degrees either way.
    rotation: Annotated[float, ZERO_OR_MORE] = 15.0
    # Zoom, as a factor in or out.
    zoom: Annotated[float, ABOVE_ZERO] = 1.2
    # Shift, as a share of width and height.
    shift: Annotated[float, ZERO_OR_MORE] = 0.08
    # Brightness and gamma, as exponents of e: 0.2 is about a fifth more or less.
    light: Annotated[float, ZERO_OR_MORE] = 0.2
    # Brightness of every colour channel by itself, as an exponent of e. Grey images become coloured.
    colour: Annotated[float, ZERO_OR_MORE] = 0.0
    # Directions (of MIRRORS) in which every second sample is mirrored at random. Only where no text tells the
    # sides apart: "left kidney" would become a lie.
    mirror: tuple[str, ...] = ()

    def __post_init__(self):
        require_limits(self, "augment.")
        if not set(self.mirror) <= set(MIRRORS):
            raise InputError(
                f"mirror = {self.mirror!r} is impossible; give a tuple of {' and '.join(MIRRORS)}."
            )


def augment(
    frames: Sequence[Image.Image],
    masks: Bool[np.ndarray, "objects frames height width"],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[list[Image.Image], Bool[np.ndarray, "objects frames height width"]]:
    """The same change for all frames and masks of a sample; sizes stay.

    What comes in from outside the image is its mirror image, black further out than half of it, in pixels and
    masks alike, so that every pixel is labelled as it looks.
    """
    width, height = frames[0].size
    margin = (height // 2, width // 2)
    angle = np.deg2rad(rng.uniform(-config.rotation, config.rotation))
    zoom = np.exp(rng.uniform(-1, 1) * np.log(config.zoom))
    shift = rng.uniform(-config.shift, config.shift, 2) * (width, height)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    for axis, direction in enumerate(MIRRORS):
        if direction in config.mirror and rng.random() < 0.5:
            turn[:, axis] *= -1
    # Output pixel p reads input pixel turn @ (p - centre) + centre + shift, in the mirrored frame.
    centre = np.array([width, height]) / 2
    offset = centre + shift + margin[::-1] - turn @ centre
    matrix = (*turn[0], offset[0], *turn[1], offset[1])
    gamma, gain = np.exp(rng.uniform(-config.light, config.light, 2))
    # Value 0 to 255 of every channel to its new value.
    curve = 255 * gain * (np.arange(256) / 255) ** gamma
    gains = np.ones(3)
    if config.colour:  # without it, what is drawn from `rng` after this stays the same
        gains = np.exp(rng.uniform(-config.colour, config.colour, 3))
    curves = np.clip(np.rint(gains[:, None] * curve), 0, 255).astype(np.uint8).ravel().tolist()

    def move(pixels: np.ndarray, resample: Image.Resampling) -> Image.Image:
        pad = ((margin[0], margin[0]), (margin[1], margin[1]), *((0, 0),) * (pixels.ndim - 2))
        image = Image.fromarray(np.pad(pixels, pad, mode="symmetric"))
        return image.transform((width, height), Image.Transform.AFFINE, matrix, resample)

    moved = [move(np.asarray(frame), Image.Resampling.BILINEAR).point(curves) for frame in frames]
    bytes_ = masks.astype(np.uint8)
    for index in np.ndindex(masks.shape[:2]):
        bytes_[index] = move(bytes_[index], Image.Resampling.NEAREST)
    return moved, bytes_ > 0
