"""Panoptic quality: segments found, missed and invented, and how well the found ones fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import DataError, RequestError
from edgeseg.metrics import mean_of_known

__all__ = ["VOID", "LabelledSegment", "PanopticQuality", "QualityFigures"]

#: The id of pixels that belong to no segment.
VOID = 0


@dataclass(frozen=True)
class LabelledSegment:
    """One segment of an id map: an object, or all of a class that is not counted.

    ``id`` is what its pixels hold, 1 or more; ``label`` the index of its class. ``crowd``, in the
    truth alone: many objects that were not told apart.
    """

    id: int
    label: int
    crowd: bool = False


@dataclass(frozen=True)
class QualityFigures:
    """PQ and its two factors, each 0 to 1: ``pq`` = ``sq`` x ``rq``, for one class.

    ``sq`` (segmentation quality) is the mean IoU of the segments found; ``rq`` (recognition
    quality) the F1 score of finding them. For several classes they are means of the figures of
    each, and the product no longer holds. NaN without any segment. ``classes`` is the number of
    classes that they are the mean of.
    """

    pq: float
    sq: float
    rq: float
    classes: int = 1

    def to_dict(self) -> dict[str, float | None]:
        """``pq``, ``sq`` and ``rq`` for JSON, None in place of NaN."""
        figures = {"pq": self.pq, "sq": self.sq, "rq": self.rq}
        return {name: None if math.isnan(value) else value for name, value in figures.items()}


class PanopticQuality:
    """Panoptic quality over any number of frames.

    Kirillov et al., "Panoptic Segmentation", 2019, arXiv 1801.00868, in the form of COCO's
    panoptic challenge: a segment is found where one of the prediction has its class and overlaps
    it by an IoU above 0.5, pixels without truth left out of the union. A predicted segment that
    matches none and lies by more than half of its area where there is no truth, or in a crowd of
    its class, counts nowhere.

    ``num_classes``: labels are 0 ... num_classes - 1. ``things``: the labels of what is counted,
    object by object; the others are stuff.
    """

    def __init__(self, num_classes: int, things: frozenset[int]) -> None:
        if num_classes < 1:
            raise RequestError(f"panoptic quality is of one class or more, not {num_classes}")
        if not things <= set(range(num_classes)):
            raise RequestError(
                f"labels are 0 to {num_classes - 1}, and {max(things, key=abs)} came as a thing"
            )
        self._num_classes = num_classes
        self._things = things
        self._overlap = np.zeros(num_classes, np.float64)
        # Segments found, invented, and missed.
        self._right = np.zeros(num_classes, np.int64)
        self._wrong = np.zeros(num_classes, np.int64)
        self._missed = np.zeros(num_classes, np.int64)

    def update(
        self,
        prediction: NDArray[np.integer],
        predicted: Sequence[LabelledSegment],
        truth: NDArray[np.integer],
        true: Sequence[LabelledSegment],
    ) -> None:
        """Adds one frame.

        ``prediction`` and ``truth``: (height, width) maps of ids of any integer type, VOID where
        there is no segment; ``predicted`` and ``true`` are the segments with these ids. One
        without any pixel counts as if it were not there. Raises DataError, and adds nothing, when
        the sizes differ, an id has no segment or two, or a label is no class.
        """
        if prediction.shape != truth.shape:
            raise DataError(
                "a prediction and its truth have the same size, and "
                f"{_size(prediction)} against {_size(truth)} came"
            )
        ours = _Side.of("prediction", prediction, predicted, self._num_classes)
        theirs = _Side.of("truth", truth, true, self._num_classes)
        # How many pixels each pair of segments shares; row and column 0 are VOID.
        pairs = theirs.rows * ours.areas.size + ours.rows
        shared = np.bincount(pairs.ravel(), minlength=theirs.areas.size * ours.areas.size)
        shared = shared.reshape(theirs.areas.size, ours.areas.size)
        union = theirs.areas[:, None] + ours.areas[None, :] - shared - shared[0]
        iou = np.zeros(shared.shape)
        np.divide(shared, union, out=iou, where=union > 0)
        same = theirs.labels[:, None] == ours.labels[None, :]
        same[0] = same[:, 0] = False
        # Above one half, a segment can have one partner at most.
        match = (iou > 0.5) & same & ~theirs.crowd[:, None]
        crowded = (shared * (same & theirs.crowd[:, None])).sum(axis=0)
        excused = shared[0] + crowded > 0.5 * ours.areas
        invented = ~match.any(axis=0) & ~excused & (ours.areas > 0)
        missed = ~match.any(axis=1) & ~theirs.crowd & (theirs.areas > 0)
        invented[0] = missed[0] = False

        found, partner = np.nonzero(match)
        np.add.at(self._overlap, theirs.labels[found], iou[found, partner])
        np.add.at(self._right, theirs.labels[found], 1)
        np.add.at(self._wrong, ours.labels[invented], 1)
        np.add.at(self._missed, theirs.labels[missed], 1)

    def per_class(self) -> tuple[QualityFigures, ...]:
        """The figures of each class, in the order of the labels; NaN for one that never occurs."""
        return tuple(
            QualityFigures(float(pq), float(sq), float(rq))
            for pq, sq, rq in zip(*self._figures(), strict=True)
        )

    def all(self) -> QualityFigures:
        """Means over the classes that occur."""
        return self._mean(np.ones(self._num_classes, np.bool_))

    def things(self) -> QualityFigures:
        """Means over the things that occur."""
        return self._mean(self._countable())

    def stuff(self) -> QualityFigures:
        """Means over the stuff that occurs."""
        return self._mean(~self._countable())

    def _countable(self) -> NDArray[np.bool_]:
        return np.isin(np.arange(self._num_classes), sorted(self._things))

    def _figures(self) -> tuple[NDArray[np.float64], ...]:
        """PQ, SQ and RQ, (num_classes,) each.

        Where segments were missed or invented and none was found, all three are 0; where there
        are no segments at all, NaN.
        """
        weight = self._right + (self._wrong + self._missed) / 2
        figures = []
        for top, bottom in (
            (self._overlap, weight),
            (self._overlap, self._right),
            (self._right, weight),
        ):
            figure = np.where(weight > 0, 0.0, np.nan)
            np.divide(top, bottom, out=figure, where=bottom > 0)
            figures.append(figure)
        return tuple(figures)

    def _mean(self, chosen: NDArray[np.bool_]) -> QualityFigures:
        pq, sq, rq = (figure[chosen] for figure in self._figures())
        return QualityFigures(
            mean_of_known(pq), mean_of_known(sq), mean_of_known(rq), int((~np.isnan(pq)).sum())
        )


@dataclass(frozen=True, eq=False)
class _Side:
    """The segments of one id map as rows 1, 2, ...; row 0 is VOID.

    ``rows``: (height, width) int64. ``labels`` (-1 for VOID), ``crowd``, ``areas``: one per row.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        role: str,
        ids: NDArray[np.integer],
        segments: Sequence[LabelledSegment],
        num_classes: int,
    ) -> _Side:
        known = np.array([VOID, *(segment.id for segment in segments)], np.int64)
        labels = np.array([-1, *(segment.label for segment in segments)], np.int64)
        order = np.argsort(known, kind="stable")
        ranked = known[order]
        if ranked[0] < VOID or (np.diff(ranked) == 0).any():
            raise DataError(f"the segments of the {role} have ids of their own, 1 or more")
        strays = (labels[1:] < 0) | (labels[1:] >= num_classes)
        if strays.any():
            raise DataError(
                f"the labels of the {role} are 0 to {num_classes - 1}, "
                f"and {int(labels[1:][strays][0])} came"
            )
        flat = ids.astype(np.int64).ravel()
        place = np.searchsorted(ranked, flat).clip(max=ranked.size - 1)
        lost = ranked[place] != flat
        if lost.any():
            raise DataError(
                f"every id in the {role} is that of a segment, and {int(flat[lost][0])} is not"
            )
        rows = order[place].reshape(ids.shape)
        return cls(
            rows=rows,
            labels=labels,
            crowd=np.array([False, *(segment.crowd for segment in segments)], np.bool_),
            areas=np.bincount(rows.ravel(), minlength=known.size),
        )


def _size(ids: NDArray[np.integer]) -> str:
    """``360x480``, height first."""
    return "x".join(str(side) for side in ids.shape)
