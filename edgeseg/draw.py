"""Results as pictures: classes or instances in their colours, blended over the frame."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import FrameError, RequestError
from edgeseg.frame import Pixels, checked_pixels

__all__ = ["colourise", "draw_classes", "draw_instances", "draw_panoptic"]

Colour = tuple[int, int, int]

# A class that covers less than this share of the picture is left out of the legend: it is mostly
# a few stray pixels, and its line would flicker from frame to frame.
_PRESENT = 0.001

_FONT = cv2.FONT_HERSHEY_SIMPLEX
# Height of capitals of that font at scale 1, in pixels.
_CAPITALS = 22.0
# Smallest line of letters that can still be read, in pixels.
_SMALLEST_ROW = 13
# How tall a line of the legend, or a label, is, as a share of the picture's height.
_ROW_SHARE = 0.032
# How much of the frame shines through the legend's panel, and the panel's own colour (BGR).
_PANEL_SEE_THROUGH = 0.35
_PANEL = (24, 20, 20)
_TEXT = (245, 245, 245)
# What stands in a map of classes where none is: a spec has 255 classes at most.
_NO_CLASS = 255


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
    row = max(_SMALLEST_ROW, round(height * _ROW_SHARE))
    margin = _margin(row)
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
    through, letters = _panel(
        tuple((_title(names[index]), colours[index]) for index in shown),
        panel.shape[:2],
        row=row,
        column=column,
        rows=used_rows,
    )
    cv2.multiply(panel, through, dst=panel, scale=1.0 / 255.0)
    cv2.add(panel, letters, dst=panel)


# The classes in the picture change from time to time only, and their lines are a fifth of the work.
@lru_cache(maxsize=16)
def _panel(
    lines: tuple[tuple[str, Colour], ...],
    size: tuple[int, int],
    *,
    row: int,
    column: int,
    rows: int,
) -> tuple[Pixels, Pixels]:
    """The legend: how much of the frame shines through, of 255, and what is added to that.

    Both (*size, 3) uint8.
    """
    on_black, on_white = (
        _lettered(lines, np.full((*size, 3), light, np.uint8), row=row, column=column, rows=rows)
        for light in (0, 255)
    )
    through = cv2.subtract(on_white, on_black)
    for array in (through, on_black):
        array.flags.writeable = False
    return through, on_black  # type: ignore[return-value]


def _lettered(
    lines: tuple[tuple[str, Colour], ...], panel: Pixels, *, row: int, column: int, rows: int
) -> Pixels:
    """The panel with its shade, its swatches and its names, in place."""
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
    for place, (title, (red, green, blue)) in enumerate(lines):
        left = row // 3 + place // rows * column
        top = _margin(row) // 2 + place % rows * row
        inset = (row - swatch) // 2
        corner = (left, top + inset)
        opposite = (left + swatch - 1, top + inset + swatch - 1)
        cv2.rectangle(panel, corner, opposite, (blue, green, red), cv2.FILLED)
        # A light rim keeps dark colours apart from the dark panel.
        cv2.rectangle(panel, corner, opposite, _TEXT, max(row // 24, 1))
        baseline = top + round((row + _CAPITALS * scale) / 2)
        cv2.putText(
            panel,
            title,
            (left + swatch + row // 3, baseline),
            _FONT,
            scale,
            _TEXT,
            thickness,
            cv2.LINE_AA,
        )
    return panel


def _present(class_map: NDArray[np.uint8], classes: int, room: int) -> list[int]:
    """Classes that are in the picture, in class order; the ``room`` largest when there are more."""
    # OpenCV 4 gives (256, 1), OpenCV 5 (256,).
    counts = cv2.calcHist([class_map], [0], None, [256], [0.0, 256.0]).ravel()[:classes]
    found = [int(index) for index in np.flatnonzero(counts > _PRESENT * class_map.size)]
    if len(found) > room:
        found = sorted(sorted(found, key=lambda index: -float(counts[index]))[:room])
    return found


def _margin(row: int) -> int:
    """Pixels between the panel and the picture's edge, and around what is in the panel."""
    return max(row // 2, 2)


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


def draw_instances(
    pixels: Pixels,
    *,
    windows: Sequence[tuple[int, int, NDArray[np.bool_]]],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int32],
    scores: NDArray[np.float32],
    names: Sequence[str],
    colours: Sequence[Colour],
    opacity: float = 0.5,
    legend: bool = True,
) -> Pixels:
    """The frame with n instances over it: (height, width, 3) uint8 BGR, a new array.

    ``pixels``: (height, width, 3) uint8 BGR. ``windows``: per instance the top, the left and the
    pixels, (rows, columns) bool, of the part of the frame that holds its mask. ``boxes``: (n, 4)
    x1, y1, x2, y2 in pixels of the frame; ``labels``: (n,) indices into ``names`` and ``colours``
    (red, green, blue); ``scores``: (n,), best first. A class keeps its colour from frame to frame.
    ``opacity`` 0 leaves the masks out, 1 hides what is below them; ``legend`` writes name and score
    at each box. Better instances lie above worse ones. FrameError when a window is not in the
    frame, RequestError for an opacity outside 0 to 1 or lengths that differ.
    """
    checked_pixels(pixels)
    if not 0.0 <= opacity <= 1.0:
        raise RequestError(f"an opacity is between 0 and 1, and {opacity} came")
    if len(names) != len(colours):
        raise RequestError(
            f"{len(names)} class names came with {len(colours)} colours; give one colour per class"
        )
    counts = {len(windows), len(boxes), len(labels), len(scores)}
    if len(counts) > 1:
        raise RequestError(
            f"{len(windows)} masks, {len(boxes)} boxes, {len(labels)} labels and {len(scores)} "
            "scores came; give one of each per instance"
        )
    picture: Pixels = pixels.copy()
    order = np.arange(len(windows) - 1, -1, -1)
    if opacity > 0:
        _blend(
            picture, [windows[index] for index in order.tolist()], labels[order], colours, opacity
        )
    height, width = picture.shape[:2]
    thickness = max(round(min(height, width) / 360), 1)
    for index in order.tolist():
        box = boxes[index]
        if not np.isfinite(box).all():
            continue
        left, right = (int(np.clip(x, 0, width - 1)) for x in (box[0], box[2]))
        top, bottom = (int(np.clip(y, 0, height - 1)) for y in (box[1], box[3]))
        label = int(labels[index])
        red, green, blue = colours[label]
        cv2.rectangle(picture, (left, top), (right, bottom), (blue, green, red), thickness)
        if legend:
            title = f"{_title(names[label])} {float(scores[index]):.0%}"
            _write_label(picture, title, (left, top), (blue, green, red))
    return picture


def _blend(
    picture: Pixels,
    windows: Sequence[tuple[int, int, NDArray[np.bool_]]],
    labels: NDArray[np.int32],
    colours: Sequence[Colour],
    opacity: float,
) -> None:
    """Blends the masks' colours over ``picture``, in place, the last mask on top.

    By way of a map of classes, so that each pixel is blended once, however many masks it is in.
    """
    edges = []
    for top, left, mask in windows:
        bottom, right = top + mask.shape[0], left + mask.shape[1]
        if not (
            top >= 0 and bottom <= picture.shape[0] and left >= 0 and right <= picture.shape[1]
        ):
            raise FrameError(
                f"a mask of {mask.shape[0]}x{mask.shape[1]} at ({top}, {left}) does not lie in a "
                f"frame of {picture.shape[0]}x{picture.shape[1]}"
            )
        if mask.size:
            edges.append((top, left, bottom, right))
    if not edges:
        return
    first_row, first_column = (min(edge[side] for edge in edges) for side in (0, 1))
    end_row, end_column = (max(edge[side] for edge in edges) for side in (2, 3))
    classes = np.full((end_row - first_row, end_column - first_column), _NO_CLASS, np.uint8)
    for (top, left, mask), label in zip(windows, labels.tolist(), strict=True):
        row, column = top - first_row, left - first_column
        part = classes[row : row + mask.shape[0], column : column + mask.shape[1]]
        np.copyto(part, np.uint8(label), where=mask)
    under = picture[first_row:end_row, first_column:end_column]
    painted = colourise(classes, colours)
    cv2.addWeighted(under, 1.0 - opacity, painted, opacity, 0.0, dst=painted)
    cv2.copyTo(painted, (classes != _NO_CLASS).view(np.uint8), under)


def _write_label(picture: Pixels, title: str, corner: tuple[int, int], colour: Colour) -> None:
    """Writes ``title`` on a plate of ``colour`` above ``corner``, or below it where that is out."""
    height, width = picture.shape[:2]
    row = max(_SMALLEST_ROW, round(height * _ROW_SHARE))
    scale, thickness = _lettering(row)
    text_width = cv2.getTextSize(title, _FONT, scale, thickness)[0][0]
    plate_width = text_width + row // 2
    left = max(min(corner[0], width - plate_width), 0)
    top = corner[1] - row if corner[1] >= row else corner[1]
    cv2.rectangle(picture, (left, top), (left + plate_width - 1, top + row - 1), colour, cv2.FILLED)
    blue, green, red = colour
    # Luma of ITU-R BT.601: dark letters on light plates, light ones on dark plates.
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    cv2.putText(
        picture,
        title,
        (left + row // 4, top + round((row + _CAPITALS * scale) / 2)),
        _FONT,
        scale,
        _PANEL if is_light else _TEXT,
        thickness,
        cv2.LINE_AA,
    )


def draw_panoptic(
    pixels: Pixels,
    ids: NDArray[np.int32],
    *,
    names: Sequence[str],
    colours: Sequence[Colour],
    things: Sequence[bool],
    opacity: float = 0.5,
    legend: bool = True,
) -> Pixels:
    """The frame with its segments over it: (height, width, 3) uint8 BGR, a new array.

    ``ids``: (height, width) int32, 0 for none, k for the segment with ``names[k - 1]``,
    ``colours[k - 1]`` (red, green, blue) and, in ``things[k - 1]``, whether it gets a rim. The
    legend, as that of `draw_classes`, names each class once.
    """
    classes = list(dict.fromkeys(names))
    lookup = np.array([_NO_CLASS, *(classes.index(name) for name in names)], np.uint8)
    by_class = dict(zip(names, colours, strict=True))
    class_map = lookup[ids]
    drawn = draw_classes(
        pixels,
        class_map,
        names=classes,
        colours=[by_class[name] for name in classes],
        opacity=opacity,
        legend=False,
    )
    none = ids == 0
    drawn[none] = pixels[none]
    rimmed = np.array([False, *things])[ids]
    rim = np.zeros(ids.shape, np.bool_)
    for axis in (0, 1):
        before = (slice(None),) * axis + (slice(None, -1),)
        after = (slice(None),) * axis + (slice(1, None),)
        differs = ids[before] != ids[after]
        rim[before] |= differs & rimmed[before]
        rim[after] |= differs & rimmed[after]
    drawn[rim] = _TEXT
    if legend:
        _add_legend(drawn, class_map, classes, [by_class[name] for name in classes])
    return drawn
