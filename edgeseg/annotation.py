"""The truth about one object in a picture, and where COCO keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import DataError, RequestError

__all__ = ["Annotation", "coco_masks", "run_lengths"]


@dataclass(frozen=True, eq=False)
class Annotation:
    """One object, as an annotation of COCO has it.

    ``label``: index of its class in the data set's ``classes``. ``box``: (x, y, width, height) in
    pixels, x and y of its upper left corner. ``area``: pixels of the object, by which COCO tells
    small from large. ``crowd``: it stands for many objects that were not told apart, or for one
    too hidden to be asked for; a detection inside it is neither right nor wrong.

    ``segmentation``: polygons, [[x, y, x, y, ...], ...] in pixels, or run lengths, {"size":
    [height, width], "counts": ...}, column by column, as a list of numbers or in COCO's packed
    form; None where there is a box and no outline.
    """

    label: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    segmentation: list[list[float]] | dict[str, Any] | None

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (*self.box, self.area)):
            raise DataError(f"a box and an area are numbers, and {self.box}, {self.area} came")
        if min(self.box[2:]) < 0 or self.area < 0:
            raise DataError(
                f"a box and an area are zero or more each way, and {self.box}, {self.area} came"
            )

    def mask(self, height: int, width: int) -> NDArray[np.bool_]:
        """Where the object is, in a picture of this size: (height, width) bool.

        Polygons are filled as pycocotools does it, which is the rule by which COCO compares.
        Without an outline it is the box. RequestError without pycocotools, which run lengths do
        not need, and DataError when they are of another size.
        """
        segmentation = self.segmentation
        if not isinstance(segmentation, dict):
            segmentation = self.packed(height, width)
        _check_size(segmentation, height, width)
        counts = segmentation["counts"]
        counts = np.array(counts if isinstance(counts, list) else _unpacked(counts), np.int64)
        _check_counts(counts, height, width)
        values = np.arange(counts.size) % 2 == 1
        mask: NDArray[np.bool_] = values.repeat(counts).reshape(width, height).T
        return mask

    def packed(self, height: int, width: int) -> dict[str, Any]:
        """The same in COCO's packed run lengths: {"size": [height, width], "counts": bytes}.

        DataError when the run lengths are of another size.
        """
        masks = coco_masks()
        if self.segmentation is None:
            x, y, across, down = self.box
            corners = [x, y, x + across, y, x + across, y + down, x, y + down]
            return dict(masks.merge(masks.frPyObjects([corners], height, width)))
        if not isinstance(self.segmentation, dict):
            return dict(masks.merge(masks.frPyObjects(self.segmentation, height, width)))
        _check_size(self.segmentation, height, width)
        counts = self.segmentation["counts"]
        if not isinstance(counts, list):
            return self.segmentation
        _check_counts(np.array(counts, np.int64), height, width)
        return dict(masks.frPyObjects(self.segmentation, height, width))


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A (height, width) mask as run lengths in COCO's plain form.

    ``counts`` are the lengths of the runs of 0 and 1 in turn, 0 first, column by column.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate(([0], changes, [flat.size]))
    counts = np.diff(ends).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def _check_size(segmentation: Mapping[str, Any], height: int, width: int) -> None:
    if list(segmentation["size"]) != [height, width]:
        raise DataError(
            f"run lengths have the size of their picture, {height}x{width}, and those of "
            f"{'x'.join(str(side) for side in segmentation['size'])} came"
        )


def _check_counts(counts: NDArray[np.int64], height: int, width: int) -> None:
    if counts.sum() != height * width or (counts < 0).any():
        raise DataError(
            f"the run lengths of {height}x{width} pixels are zero or more and add up to "
            f"{height * width}, and these add up to {counts.sum()}"
        )


def _unpacked(packed: str | bytes) -> list[int]:
    """COCO's packed run lengths as numbers.

    Each is written in digits of five bits, the lowest first, in characters from 48 on; 32 says that
    more follow, and 16 in the last one that the number is below zero. From the fourth run on it is
    the difference to the run before the last. (``pycocotools.mask.decode`` does the same, with a
    warning from numpy 2, and memory of its own for the pixels.)
    """
    digits = packed.encode("ascii") if isinstance(packed, str) else packed
    counts: list[int] = []
    value = shift = 0
    for digit in digits:
        bits = digit - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def coco_masks() -> ModuleType:
    """``pycocotools.mask``; RequestError, which says how to get it, where it is missing."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise RequestError(
            f"average precision and COCO's masks come from pycocotools, which cannot be imported "
            f"({error}); pip install 'edgeseg[eval]'"
        ) from error
    found: ModuleType = mask
    return found
