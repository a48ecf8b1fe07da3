"""The confusion matrix of a segmentation, and the figures that are read from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import DataError, RequestError

__all__ = ["ConfusionMatrix", "Labels", "check_labelling", "label_pairs", "mean_of_known"]

#: (height, width) uint8, a class per pixel, or the label that stands for none
Labels = NDArray[np.uint8]


class ConfusionMatrix:
    """How many pixels of each true class were predicted as each class, over any number of frames.

    ``num_classes``: 1 to 255 classes, with labels 0 ... num_classes - 1. ``ignore``: the label
    that stands for "no truth here"; pixels that have it in the truth count nowhere, whatever was
    predicted for them. It must not be one of the classes: RequestError.

    All figures come from the sums over all pixels of all frames, as the PASCAL VOC, CamVid and
    Cityscapes benchmarks do it, and not from an average over frames.
    """

    def __init__(self, num_classes: int, ignore: int) -> None:
        check_labelling(num_classes, ignore)
        self._num_classes = num_classes
        self._ignore = ignore
        self._counts = np.zeros((num_classes, num_classes), np.int64)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._num_classes

    @property
    def ignore(self) -> int:
        """The label in the truth that is left out."""
        return self._ignore

    @property
    def counts(self) -> NDArray[np.int64]:
        """Pixels by (true class, predicted class): (num_classes, num_classes) int64, a copy."""
        counts: NDArray[np.int64] = self._counts.copy()
        return counts

    def update(self, prediction: Labels, truth: Labels) -> None:
        """Adds one frame.

        ``prediction`` and ``truth``: (height, width) uint8 of the same size. Raises DataError, and
        adds nothing, when the sizes differ or when a value is neither a class nor, in the truth,
        the label to ignore.
        """
        table = label_pairs(prediction, truth, num_classes=self._num_classes, ignore=self._ignore)
        self._counts += table[: self._num_classes, : self._num_classes]

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds all that ``other`` has counted; RequestError if its classes are others."""
        if (self._num_classes, self._ignore) != (other._num_classes, other._ignore):
            raise RequestError(
                "only matrices of the same classes add up, and "
                f"{self._num_classes} classes (ignoring {self._ignore}) against "
                f"{other._num_classes} (ignoring {other._ignore}) came"
            )
        self._counts += other._counts

    def per_class_iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class: (num_classes,) float64, 0 to 1.

        Pixels that are the class both in truth and prediction, over pixels that are it in either.
        NaN for a class that occurs in neither.
        """
        both = np.diagonal(self._counts)
        either = self._counts.sum(axis=0) + self._counts.sum(axis=1) - both
        iou = np.full(self._num_classes, np.nan)
        np.divide(both, either, out=iou, where=either > 0)
        return iou

    def miou(self) -> float:
        """Mean of the per-class IoU over the classes that occur in the truth or the prediction.

        A class that occurs in neither has no IoU and is left out; one that is predicted and never
        true has IoU 0 and counts. NaN when nothing was counted.
        """
        return mean_of_known(self.per_class_iou())

    def per_class_dice(self) -> NDArray[np.float64]:
        """Dice coefficient of each class: (num_classes,) float64, 0 to 1.

        Twice the pixels that are the class in both, over those of the truth plus those of the
        prediction: the F1 score of the pixels, 2 IoU / (1 + IoU). NaN for a class that occurs in
        neither.
        """
        both = np.diagonal(self._counts)
        sizes = self._counts.sum(axis=0) + self._counts.sum(axis=1)
        dice = np.full(self._num_classes, np.nan)
        np.divide(2 * both, sizes, out=dice, where=sizes > 0)
        return dice

    def dice(self) -> float:
        """Mean of the per-class Dice over the classes of `miou`; NaN when nothing was counted."""
        return mean_of_known(self.per_class_dice())

    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels whose class is right, 0 to 1; NaN when there are none."""
        total = int(self._counts.sum())
        return int(np.trace(self._counts)) / total if total else float("nan")


def check_labelling(num_classes: int, ignore: int) -> None:
    """Raises RequestError unless labels of so many classes, and the one to ignore, can be."""
    if not 1 <= num_classes <= 255:
        raise RequestError(f"a label map of uint8 holds 1 to 255 classes, not {num_classes}")
    if not num_classes <= ignore <= 255:
        raise RequestError(
            f"the label to ignore is beyond the {num_classes} classes, at most 255, "
            f"and {ignore} came"
        )


def label_pairs(
    prediction: Labels, truth: Labels, *, num_classes: int, ignore: int
) -> NDArray[np.int64]:
    """How many pixels of one frame have each (true label, predicted label): (256, 256) int64.

    Row ``ignore`` is zero: what was predicted where there is no truth is no pair. Raises DataError
    when the sizes differ, or when a value is neither a class, 0 ... num_classes - 1, nor, in the
    truth, the label to ignore.
    """
    if prediction.shape != truth.shape:
        raise DataError(
            "a prediction and its truth have the same size, and "
            f"{_size(prediction)} against {_size(truth)} came"
        )
    for role, labels in (("prediction", prediction), ("truth", truth)):
        if labels.dtype != np.uint8:
            raise DataError(f"the {role} is a map of uint8, and one of {labels.dtype} came")
    # All 256 x 256 pairs that two bytes can form are counted, so that the one pass which
    # counts also finds the values that must not be there.
    pairs = truth.astype(np.uint16)
    pairs <<= 8
    pairs |= prediction
    table = np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)
    table[ignore] = 0
    for role, used in (("truth", table.sum(axis=1)), ("prediction", table.sum(axis=0))):
        strays = np.flatnonzero(used[num_classes:])
        if strays.size:
            may_be = f"0 to {num_classes - 1}"
            if role == "truth":
                may_be += f", or {ignore} for no label"
            raise DataError(
                f"the labels of the {role} are {may_be}, and {num_classes + int(strays[0])} came"
            )
    return table


def mean_of_known(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not NaN; NaN when there are none."""
    known = ~np.isnan(values)
    return float(values[known].mean()) if known.any() else float("nan")


def _size(labels: Labels) -> str:
    """``360x480``, height first."""
    return "x".join(str(side) for side in labels.shape)
