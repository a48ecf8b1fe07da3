"""Class maps as pictures: every class in its colour, blended over the frame, with a legend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import FrameError, RequestError
from edgeseg.frame import Pixels, checked_pixels

__all__ = ["colourise", "draw_classes"]

Colour = tuple[int, int, int]

# A class that covers less than this share of the picture is left out of the legend: it is mostly
# a few stray pixels, and its line would flicker from frame to frame.
_PRESENT = 0.001

_FONT = cv2.FONT_HERSHEY_SIMPLEX
# Height of capitals of that font at scale 1, in pixels.
_CAPITALS = 22.0
# Smallest line of the legend that can still be read, in pixels.
_SMALLEST_ROW = 13
# How much of the frame shines through the legend's panel, and the panel's own colour (BGR).
_PANEL_SEE_THROUGH = 0.35
_PANEL = (24, 20, 20)
_TEXT = (245, 245, 245)


def colourise(class_map: NDArray[np.uint8], colours: Sequence[Colour]) -> Pixels:
    """The class map as a picture: (height, width) uint8 -> (height, width, 3) uint8 BGR, new.

    ``colours`` are (red, green, blue), 0-255, one per class. Values beyond the last class, such
    as the label to ignore, come out black.
    """
    return cv2.applyColorMap(  # type: ignore[return-value]
        _checked_map(class_map), _palette(tuple(colours))
    )


def draw_classes(
    pixels: Pixels,
    class_map: NDArray[np.uint8],
    *,
    names: Sequence[str],
    colours: Sequence[Colour],
    opacity: float = 0.5,
    legend: bool = True,
) -> Pixels:
    """The frame with its classes blended over it: (height, width, 3) uint8 BGR, a new array.

    ``pixels``: (height, width, 3) uint8 BGR; ``class_map``: (height, width) uint8; ``names`` and
    ``colours`` (red, green, blue): one per class. ``opacity`` 0 shows the frame alone, 1 the
    classes alone. ``legend`` adds a panel with the classes that are in the picture; where they
    don't all fit, those that cover most. Raises FrameError when the two arrays don't belong
    together, RequestError for an opacity outside 0 to 1 or names without colours.
    """
    checked_pixels(pixels)
    _checked_map(class_map)
    if class_map.shape != pixels.shape[:2]:
        raise FrameError(
            f"the frame is {pixels.shape[0]}x{pixels.shape[1]} and the class map "
            f"{class_map.shape[0]}x{class_map.shape[1]}; give the map at frame size"
        )
    if not 0.0 <= opacity <= 1.0:
        raise RequestError(f"an opacity is between 0 and 1, and {opacity} came")
    if len(names) != len(colours):
        raise RequestError(
            f"{len(names)} class names came with {len(colours)} colours; give one colour per class"
        )
    painted = colourise(class_map, colours)
    cv2.addWeighted(pixels, 1.0 - opacity, painted, opacity, 0.0, dst=painted)
    if legend:
        _add_legend(painted, class_map, names, colours)
    return painted


def _checked_map(class_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if class_map.ndim != 2 or class_map.dtype != np.uint8 or class_map.size == 0:
        raise FrameError(
            "a class map is (height, width) uint8, and an array of shape "
            f"{class_map.shape} and type {class_map.dtype} came"
        )
    return class_map


@lru_cache(maxsize=16)
def _palette(colours: tuple[Colour, ...]) -> NDArray[np.uint8]:
    """Colour of each of the 256 values, in the shape and order OpenCV wants: (256, 1, 3) BGR."""
    if len(colours) > 256:
        raise RequestError(
            f"a class map of uint8 holds at most 256 classes, and {len(colours)} colours came"
        )
    palette = np.zeros((256, 1, 3), np.uint8)
    for index, (red, green, blue) in enumerate(colours):
        palette[index, 0] = (blue, green, red)
    palette.flags.writeable = False
    return palette


def _add_legend(
    picture: Pixels,
    class_map: NDArray[np.uint8],
    names: Sequence[str],
    colours: Sequence[Colour],
) -> None:
    """Draws the panel into ``picture``, in place; nothing where the picture is too small."""
    height, width = class_map.shape
    row = max(_SMALLEST_ROW, round(height * 0.032))
    margin = max(row // 2, 2)
    rows = (height - 3 * margin) // row
    text_width = _widest(tuple(names), row)
    column = text_width + 2 * row
    columns = (width - 2 * margin) // column
    if rows < 1 or columns < 1:
        return
    # At most two columns: more would cover what the picture is looked at for.
    shown = _present(class_map, len(names), rows * min(columns, 2))
    if not shown:
        return
    used_columns = -(-len(shown) // rows)
    used_rows = -(-len(shown) // used_columns)
    bottom = margin + used_rows * row + margin
    right = min(margin + used_columns * column, width)
    panel = picture[margin:bottom, margin:right]
    cv2.addWeighted(
        panel,
        _PANEL_SEE_THROUGH,
        np.full_like(panel, _PANEL),
        1.0 - _PANEL_SEE_THROUGH,
        0.0,
        dst=panel,
    )
    scale, thickness = _lettering(row)
    swatch = max(round(row * 0.64), 4)
    for place, index in enumerate(shown):
        left = margin + row // 3 + place // used_rows * column
        top = margin + margin // 2 + place % used_rows * row
        red, green, blue = colours[index]
        inset = (row - swatch) // 2
        corner = (left, top + inset)
        opposite = (left + swatch - 1, top + inset + swatch - 1)
        cv2.rectangle(picture, corner, opposite, (blue, green, red), cv2.FILLED)
        # A light rim keeps dark colours apart from the dark panel.
        cv2.rectangle(picture, corner, opposite, _TEXT, max(row // 24, 1))
        baseline = top + round((row + _CAPITALS * scale) / 2)
        cv2.putText(
            picture,
            _title(names[index]),
            (left + swatch + row // 3, baseline),
            _FONT,
            scale,
            _TEXT,
            thickness,
            cv2.LINE_AA,
        )


def _present(class_map: NDArray[np.uint8], classes: int, room: int) -> list[int]:
    """Classes that are in the picture, in class order; the ``room`` largest when there are more."""
    # OpenCV 4 gives (256, 1), OpenCV 5 (256,).
    counts = cv2.calcHist([class_map], [0], None, [256], [0.0, 256.0]).ravel()[:classes]
    found = [int(index) for index in np.flatnonzero(counts > _PRESENT * class_map.size)]
    if len(found) > room:
        found = sorted(sorted(found, key=lambda index: -float(counts[index]))[:room])
    return found


def _lettering(row: int) -> tuple[float, int]:
    """Scale and stroke of the font for lines of ``row`` pixels."""
    scale = row * 0.55 / _CAPITALS
    return scale, max(round(scale * 1.4), 1)


@lru_cache(maxsize=64)
def _widest(names: tuple[str, ...], row: int) -> int:
    """Width in pixels of the longest name, of all classes: the panel then keeps its width."""
    scale, thickness = _lettering(row)
    return max(
        (cv2.getTextSize(_title(name), _FONT, scale, thickness)[0][0] for name in names),
        default=0,
    )


def _title(name: str) -> str:
    return name.replace("_", " ")
