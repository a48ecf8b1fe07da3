"""Boundary IoU: how well the outlines of the classes agree."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.metrics import Labels, check_labelling, label_pairs, mean_of_known

__all__ = ["BOUNDARY_RATIO", "BoundaryOverlap", "boundary_of"]

#: Width of the boundary over the diagonal of the picture, as in the paper.
BOUNDARY_RATIO = 0.02


class BoundaryOverlap:
    """Intersection over union of the boundaries of each class, over any number of frames.

    The boundary of a mask is the part of it that is within ``ratio`` of the picture's diagonal
    from its contour (Cheng et al., "Boundary IoU", 2021, arXiv 2103.16562); IoU of whole masks
    hardly sees an outline that is off by some pixels when the object is large, and this does.
    The border of the picture is a contour too, as it is for the authors. As in `ConfusionMatrix`,
    the figures come from the sums over all pixels of all frames.

    ``num_classes`` and ``ignore`` are those of `ConfusionMatrix`. Pixels without truth are no
    part of any mask, in the prediction as in the truth, so a right prediction scores 1.
    """

    def __init__(self, num_classes: int, ignore: int, *, ratio: float = BOUNDARY_RATIO) -> None:
        check_labelling(num_classes, ignore)
        if not 0 < ratio <= 1:
            raise RequestError(f"a boundary is 0 to 1 diagonals wide, not {ratio}")
        self._num_classes = num_classes
        self._ignore = ignore
        self._ratio = ratio
        self._both = np.zeros(num_classes, np.int64)
        self._either = np.zeros(num_classes, np.int64)

    def update(self, prediction: Labels, truth: Labels) -> None:
        """Adds one frame.

        ``prediction`` and ``truth``: (height, width) uint8 of the same size. Raises DataError, and
        adds nothing, for what `ConfusionMatrix.update` refuses.
        """
        label_pairs(prediction, truth, num_classes=self._num_classes, ignore=self._ignore)
        if not truth.size:
            return
        width = boundary_width(*truth.shape, ratio=self._ratio)
        known = truth != self._ignore
        prediction = np.where(known, prediction, np.uint8(self._ignore))
        true_edge = boundary_of(truth, width) & known
        predicted_edge = boundary_of(prediction, width) & known
        both = self._count(truth[true_edge & predicted_edge & (truth == prediction)])
        self._both += both
        self._either += self._count(truth[true_edge]) + self._count(prediction[predicted_edge])
        self._either -= both

    def per_class(self) -> NDArray[np.float64]:
        """Boundary IoU of each class: (num_classes,) float64, 0 to 1; NaN where it never occurs."""
        iou = np.full(self._num_classes, np.nan)
        np.divide(self._both, self._either, out=iou, where=self._either > 0)
        return iou

    def mean(self) -> float:
        """Mean over the classes that occur in the truth or the prediction; NaN without any."""
        return mean_of_known(self.per_class())

    def _count(self, labels: Labels) -> NDArray[np.int64]:
        return np.bincount(labels, minlength=self._num_classes)[: self._num_classes]


def boundary_width(height: int, width: int, *, ratio: float = BOUNDARY_RATIO) -> int:
    """Pixels that a boundary is wide in a picture of this size; at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundary_of(labels: Labels, width: int) -> NDArray[np.bool_]:
    """Pixels at most ``width`` steps from another label or from the border, as (H, W) bool.

    A step goes to one of the eight neighbours, so the pixels at the contour itself are one step
    away from what is outside. All labels are answered at once: a pixel is on the boundary of its
    own mask exactly when the square around it holds two labels or reaches over the border.
    """
    height, breadth = labels.shape
    inner: NDArray[np.bool_] = np.zeros(labels.shape, np.bool_)
    if min(height, breadth) > 2 * width:
        square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
        same = cv2.dilate(labels, square) == cv2.erode(labels, square)
        inside = (slice(width, height - width), slice(width, breadth - width))
        inner[inside] = same[inside]
    return ~inner
