"""Borders between classes, moved to where the picture changes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry

__all__ = ["border_step", "influence", "refine_borders"]

#: pixels of the network's input from one sample that votes to the next: seven of them span two
#: cells of logits at an eighth of that size
_NETWORK_STEP = 3

# The rule's constants, those of edgeseg/refine_borders.h.
_REACH = 3
_LIKE_COLOURS = 60
_CLOSE_SAMPLES = 20


def border_step(geometry: Geometry) -> tuple[int, int]:
    """Rows and columns of the frame from one sample to the next, each 1 or more."""
    return (
        max(round(_NETWORK_STEP * geometry.frame_height / geometry.inner_height), 1),
        max(round(_NETWORK_STEP * geometry.frame_width / geometry.inner_width), 1),
    )


def influence(step: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns from a border to the farthest sample that has a say in where it goes."""
    rows, columns = (_REACH * side + _uncertain(side) for side in step)
    return rows, columns


def refine_borders(
    class_map: NDArray[np.uint8],
    pixels: Pixels,
    step: tuple[int, int],
    *,
    compiled: bool | None = None,
) -> NDArray[np.uint8]:
    """``class_map`` with the pixels near a border decided again by those of like colour around.

    ``class_map``: (height, width) uint8, at the size of ``pixels``, (height, width, 3) uint8 BGR.
    Uncertain is a pixel with another class within 4/3 of ``step`` (rows, columns) in a rectangle.
    For each, the 7 x 7 samples around it, ``step`` apart, vote for their class, with a weight that
    falls with the distance of the colours and of the places: a joint bilateral filter (Petschnig
    et al., 2004) of the class map, where PointRend (Kirillov et al., arXiv 1912.08193) has a
    learned head. A new array, or ``class_map`` itself where nothing is uncertain.

    ``compiled``: whether the kernel does it; None uses it if it is there. The bytes are the same.
    KernelError when it is asked for and is not there.
    """
    uncertain = _near_borders(class_map, step)
    if not len(uncertain):
        return class_map
    class_map = np.ascontiguousarray(class_map)
    compiled = kernels.available() if compiled is None else compiled
    if compiled:
        if pixels.strides[1:] != (3, 1) or pixels.strides[0] < 0:
            pixels = np.ascontiguousarray(pixels)
        return kernels.refine_borders(class_map, pixels, uncertain, step)
    return _refined(class_map, pixels, uncertain, step)


def _near_borders(class_map: NDArray[np.uint8], step: tuple[int, int]) -> NDArray[np.int64]:
    """Positions in the flat ``class_map`` that have another class close by."""
    # Here, so that kernels and their tests have this module where there is no OpenCV.
    import cv2

    rows, columns = (_uncertain(side) for side in step)
    window = np.ones((2 * rows + 1, 2 * columns + 1), np.uint8)
    # Outside of the picture there is no class; OpenCV's border for these two is just that.
    spread = cv2.dilate(class_map, window) != cv2.erode(class_map, window)
    return np.flatnonzero(spread)


def _uncertain(step: int) -> int:
    """Pixels from a border to the last one that is uncertain."""
    return 4 * step // 3


def _refined(
    class_map: NDArray[np.uint8],
    pixels: Pixels,
    uncertain: NDArray[np.int64],
    step: tuple[int, int],
) -> NDArray[np.uint8]:
    """The kernel's arithmetic in numpy, for machines without it."""
    height, width = class_map.shape
    colours = pixels.reshape(-1, 3).astype(np.int16)
    classes, labels = np.unique(class_map, return_inverse=True)
    labels = labels.reshape(-1)
    y, x = np.divmod(uncertain, width)
    votes = np.zeros((len(uncertain), len(classes)), np.int32)
    order = np.arange(len(uncertain))
    own = colours[uncertain]
    for i in range(-_REACH, _REACH + 1):
        for j in range(-_REACH, _REACH + 1):
            row, column = y + i * step[0], x + j * step[1]
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = np.where(inside, row * width + column, 0)
            distance = np.abs(colours[at] - own).sum(axis=1, dtype=np.int32)
            weight = np.maximum(_LIKE_COLOURS - distance, 0) * (_CLOSE_SAMPLES - i * i - j * j)
            votes[order, labels[at]] += np.where(inside, weight, 0)
    # On a tie the class that the pixel had wins, otherwise the lowest: argmax takes the first.
    votes *= 2
    votes[order, labels[uncertain]] += 1
    refined: NDArray[np.uint8] = class_map.copy()
    refined.reshape(-1)[uncertain] = classes[votes.argmax(axis=1)]
    return refined
