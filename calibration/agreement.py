"""How far two models, or one model on two engines, say the same of a picture.

Of class maps: the share of pixels with the same class. Of instances: the share that the other one
finds as well, both ways, among those that are worth a look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.instances import InstanceOutputs
from edgeseg.result import AnyOutputs, Outputs

__all__ = ["MINIMUM_SCORE", "SAME_IOU", "Agreement", "agreement_of", "partners"]

#: Instances with less are not looked for: of those near the threshold of a model, rounding decides.
MINIMUM_SCORE = 0.3
#: overlap of the boxes, and of the masks, from which on two instances are the same
SAME_IOU = 0.5

# A level of a mask is on where the probability is above a half.
_HALF = 127


@dataclass(frozen=True)
class Agreement:
    """``same`` of ``total`` agree: pixels, or instances."""

    same: int
    total: int

    @property
    def share(self) -> float:
        """0 to 1; NaN where there is nothing to compare."""
        return self.same / self.total if self.total else math.nan

    @classmethod
    def sum(cls, parts: Iterable[Agreement]) -> Agreement:
        """Of several pictures together."""
        found = list(parts)
        return cls(sum(part.same for part in found), sum(part.total for part in found))


def agreement_of(one: AnyOutputs, other: AnyOutputs) -> Agreement:
    """How far two outputs for the same picture agree; none of it if the tasks differ.

    Instances count that have a score of ``MINIMUM_SCORE`` or more, of either side, whatever the
    score of their partner: see ``partners``.
    """
    if isinstance(one, Outputs) and isinstance(other, Outputs):
        return Agreement(int(np.sum(one.class_map == other.class_map)), one.class_map.size)
    if not (isinstance(one, InstanceOutputs) and isinstance(other, InstanceOutputs)):
        return Agreement(0, 1)
    pairs = partners(one, other)
    same = total = 0
    for outputs, rows in (
        (one, {first for first, _ in pairs}),
        (other, {second for _, second in pairs}),
    ):
        clear = np.flatnonzero(outputs.scores >= MINIMUM_SCORE).tolist()
        total += len(clear)
        same += len(rows.intersection(clear))
    return Agreement(same, total)


def partners(one: InstanceOutputs, other: InstanceOutputs) -> list[tuple[int, int]]:
    """Rows of ``one`` and of ``other`` that are the same instance, each once at most.

    The same: label, boxes with an IoU of ``SAME_IOU`` or more, and so the masks on their grids.
    The best of ``one`` chooses first, and takes what overlaps its box most.
    """
    free = np.ones(len(other.scores), np.bool_)
    pairs = []
    for row in range(len(one.scores)):
        same = np.flatnonzero(free & (other.labels == one.labels[row]))
        overlaps = _overlaps(one.boxes[row], other.boxes[same])
        for place in np.argsort(-overlaps, kind="stable").tolist():
            if not overlaps[place] >= SAME_IOU:
                break
            found = int(same[place])
            if _mask_overlap(one.masks[row], other.masks[found]) >= SAME_IOU:
                free[found] = False
                pairs.append((row, found))
                break
    return pairs


def _overlaps(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """IoU of ``box`` (4,) with each of ``boxes`` (n, 4); 0 for boxes of no size."""
    wide, many = box.astype(np.float64), boxes.astype(np.float64)
    low, high = np.maximum(wide[:2], many[:, :2]), np.minimum(wide[2:], many[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    areas = (wide[2:] - wide[:2]).prod() + (many[:, 2:] - many[:, :2]).prod(axis=1) - common
    found: NDArray[np.float64] = np.where(areas > 0, common / np.where(areas > 0, areas, 1), 0)
    return found


def _mask_overlap(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """IoU of two masks of levels; 1 where both are empty."""
    first, second = one > _HALF, other > _HALF
    either = int(np.sum(first | second))
    return int(np.sum(first & second)) / either if either else 1.0
