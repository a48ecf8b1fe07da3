"""Hausdorff distance: how far the outlines of the classes are from each other, in pixels."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.metrics import Labels, check_labelling, label_pairs, mean_of_known

__all__ = ["HausdorffDistance", "hausdorff"]


class HausdorffDistance:
    """The 95th percentile of the distance between outlines (HD95), averaged over frames.

    ``num_classes`` and ``ignore`` are those of `ConfusionMatrix`; pixels without truth are no
    part of any mask, in the prediction as in the truth. ``percentile`` 100 is the distance that
    Hausdorff defined; 95 forgives the few pixels of a speck.

    A distance belongs to one class of one frame. Where the class is in neither the truth nor the
    prediction there is none. Where it is in one of them alone, nothing is as far as that: the
    diagonal of the frame counts.
    """

    def __init__(self, num_classes: int, ignore: int, *, percentile: float = 95.0) -> None:
        check_labelling(num_classes, ignore)
        if not 0 <= percentile <= 100:
            raise RequestError(f"a percentile is from 0 to 100, and {percentile} came")
        self._num_classes = num_classes
        self._ignore = ignore
        self._percentile = percentile
        self._sums = np.zeros(num_classes, np.float64)
        self._frames = np.zeros(num_classes, np.int64)

    def update(self, prediction: Labels, truth: Labels) -> None:
        """Adds one frame.

        ``prediction`` and ``truth``: (height, width) uint8 of the same size. Raises DataError, and
        adds nothing, for what `ConfusionMatrix.update` refuses.
        """
        table = label_pairs(prediction, truth, num_classes=self._num_classes, ignore=self._ignore)
        present = table.sum(axis=0) + table.sum(axis=1) > 0
        known = truth != self._ignore
        for label in np.flatnonzero(present):
            self._sums[label] += hausdorff(
                (prediction == label) & known, truth == label, percentile=self._percentile
            )
            self._frames[label] += 1

    def per_class(self) -> NDArray[np.float64]:
        """Mean distance of each class, in pixels: (num_classes,); NaN where it never occurs."""
        distance = np.full(self._num_classes, np.nan)
        np.divide(self._sums, self._frames, out=distance, where=self._frames > 0)
        return distance

    def mean(self) -> float:
        """Mean over the classes that occur in the truth or the prediction; NaN without any."""
        return mean_of_known(self.per_class())


def hausdorff(
    first: NDArray[np.bool_], second: NDArray[np.bool_], *, percentile: float = 95.0
) -> float:
    """Distance between the outlines of two masks, (height, width) bool, in pixels.

    From each pixel of one outline to the nearest of the other, the ``percentile`` of these
    distances, both ways, and the greater of the two (Huttenlocher et al., "Comparing images using
    the Hausdorff distance", 1993). The outline is the pixels of the mask with one of their four
    neighbours, or the border of the picture, outside it. NaN when both masks are empty, and the
    diagonal of the picture when one of them is.
    """
    if not first.any() or not second.any():
        empty = not first.any() and not second.any()
        return math.nan if empty else math.hypot(*first.shape)
    # Outlines and the paths between them lie within the box around both masks, which is all that
    # has to be looked at.
    left, top, width, height = cv2.boundingRect((first | second).view(np.uint8))
    box = (slice(top, top + height), slice(left, left + width))
    outlines = [_outline(mask[box]) for mask in (first, second)]
    distances = []
    for here, there in (outlines, outlines[::-1]):
        field = cv2.distanceTransform(
            (~there).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE, dstType=cv2.CV_32F
        )
        distances.append(float(np.percentile(field[here].astype(np.float64), percentile)))
    return max(distances)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask that have one of their four neighbours outside it, or outside the array.

    Cutting a mask to a box that holds all of it leaves its outline as it is.
    """
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline: NDArray[np.bool_] = mask & ~inner
    return outline
