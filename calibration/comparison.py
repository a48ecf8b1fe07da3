"""One picture with what fp32 and INT8 made of it, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.calibration.agreement import MINIMUM_SCORE, agreement_of, partners
from edgeseg.draw import draw_classes, draw_instances
from edgeseg.errors import EngineError
from edgeseg.frame import Pixels
from edgeseg.instances import InstanceResult
from edgeseg.result import AnyResult, SemanticResult
from edgeseg.spec import ModelSpec

__all__ = ["Comparison", "InstanceComparison", "PixelComparison", "compared"]

# Pixels: half of the page on a laptop; the page stays small enough to be mailed.
_PICTURE_WIDTH = 512

# Where the masks differ, as (blue, green, red).
_LOST, _WON, _OTHER = (0, 140, 255), (255, 170, 60), (240, 240, 240)

_MINUS = "\N{MINUS SIGN}"


class Comparison(Protocol):
    """One picture before and after."""

    @property
    def differing(self) -> float:
        """Share of what is compared, 0 to 1, that is not the same; 0: nothing to show."""

    @property
    def rank(self) -> float:
        """How bad it is; larger is worse."""

    def intro(self, frames: str) -> str:
        """What such pictures show, ``frames`` being those that were looked at."""

    def caption(self) -> str:
        """The figures, in words."""

    def pictures(self) -> list[tuple[str, Pixels]]:
        """(words, picture) of each view, small enough for a page."""


def compared(
    name: str, fp32: AnyResult, int8: AnyResult, labels: NDArray[np.uint8] | None = None
) -> Comparison:
    """The comparison of two results for the same frame.

    ``labels``: (height, width) uint8, the truth of a semantic model's frame where it is known.
    """
    if isinstance(fp32, SemanticResult) and isinstance(int8, SemanticResult):
        return PixelComparison(
            name, fp32.frame.pixels, fp32.class_map, int8.class_map, labels, fp32.spec
        )
    if isinstance(fp32, InstanceResult) and isinstance(int8, InstanceResult):
        return InstanceComparison(name, fp32, int8)
    raise EngineError(f"fp32 gave {type(fp32).__name__} for {name}, and INT8 {type(int8).__name__}")


@dataclass(frozen=True, eq=False)
class PixelComparison:
    """Two class maps, all (height, width) of the picture; ``labels`` if the truth is known."""

    name: str
    pixels: Pixels
    fp32: NDArray[np.uint8]
    int8: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None
    spec: ModelSpec

    @property
    def differing(self) -> float:
        """Share of pixels, 0 to 1, with another class in INT8."""
        return float(np.mean(self.fp32 != self.int8))

    def right(self, class_map: NDArray[np.uint8]) -> float | None:
        """Share of the labelled pixels that ``class_map`` has right; None without any."""
        if self.labels is None:
            return None
        known = self.labels != self.spec.ignore
        if not known.any():
            return None
        return float(np.mean(class_map[known] == self.labels[known]))

    @property
    def rank(self) -> float:
        """Pixel accuracy lost, or the share that differs where nothing is known."""
        before, after = self.right(self.fp32), self.right(self.int8)
        if self.labels is None:
            return self.differing
        return 0.0 if before is None or after is None else before - after

    def intro(self, frames: str) -> str:
        """See ``Comparison.intro``."""
        if self.labels is None:
            return (
                f"Of {frames} those on which the masks of fp32 and INT8 differ most. Orange: where "
                "they differ."
            )
        return (
            f"Of {frames} those that lose most. Orange: fp32 was right and INT8 is not; blue: the "
            "other way round; white: neither is, or no truth is known."
        )

    def caption(self) -> str:
        """See ``Comparison.caption``."""
        text = f"{self.name}: {_percent(self.differing)} of pixels differ"
        before, after = self.right(self.fp32), self.right(self.int8)
        if before is not None and after is not None:
            points = f"{round((after - before) * 100, 2) or 0.0:+.2f}".replace("-", _MINUS)
            points = "0.00" if points == "+0.00" else points
            text += (
                f"; right are {_percent(before)} with fp32 and {_percent(after)} with INT8 "
                f"({points} points)"
            )
        return text

    def differences(self) -> Pixels:
        """The picture, dark and grey, with the pixels that differ painted over it."""
        picture = _darkened(self.pixels)
        differs = self.fp32 != self.int8
        if self.labels is None:
            picture[differs] = _LOST
            return picture
        picture[differs] = _OTHER
        # No mask has the label to ignore, so what has no truth stays as it is.
        picture[differs & (self.fp32 == self.labels)] = _LOST
        picture[differs & (self.int8 == self.labels)] = _WON
        return picture

    def pictures(self) -> list[tuple[str, Pixels]]:
        """See ``Comparison.pictures``."""
        shown = self._shrunk()

        def drawn(class_map: NDArray[np.uint8], opacity: float, *, legend: bool) -> Pixels:
            return draw_classes(
                shown.pixels,
                class_map,
                names=self.spec.classes,
                colours=self.spec.colours,
                opacity=opacity,
                legend=legend,
            )

        # The legend stands on the plain picture, where it hides no part of a mask.
        return [
            ("picture", drawn(shown.fp32, 0.0, legend=True)),
            ("where the masks differ", shown.differences()),
            ("before: fp32", drawn(shown.fp32, 0.65, legend=False)),
            ("after: INT8", drawn(shown.int8, 0.65, legend=False)),
        ]

    def _shrunk(self) -> PixelComparison:
        """This at the width at which it is shown; narrower ones as they are."""
        height, width = self.fp32.shape
        if width <= _PICTURE_WIDTH:
            return self
        size = (_PICTURE_WIDTH, max(round(height * _PICTURE_WIDTH / width), 1))

        def nearest(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return cv2.resize(  # type: ignore[return-value]
                values, size, interpolation=cv2.INTER_NEAREST
            )

        return PixelComparison(
            self.name,
            _resized(self.pixels, size),
            nearest(self.fp32),
            nearest(self.int8),
            None if self.labels is None else nearest(self.labels),
            self.spec,
        )


@dataclass(frozen=True, eq=False)
class InstanceComparison:
    """The instances of one frame before and after; those with ``MINIMUM_SCORE`` or more count."""

    name: str
    fp32: InstanceResult
    int8: InstanceResult

    @property
    def differing(self) -> float:
        """Share of the instances, 0 to 1, that only one of the two finds."""
        found = agreement_of(self.fp32.outputs, self.int8.outputs)
        return 1 - found.share if found.total else 0.0

    @property
    def rank(self) -> float:
        """Number of the instances that only one of the two finds."""
        found = agreement_of(self.fp32.outputs, self.int8.outputs)
        return float(found.total - found.same)

    def intro(self, frames: str) -> str:
        """See ``Comparison.intro``."""
        return (
            f"Of {frames} those on which fp32 and INT8 differ in most instances. Shown are "
            f"instances with a score of {MINIMUM_SCORE:g} or more. Orange: only fp32 has it; blue: "
            "only INT8."
        )

    def caption(self) -> str:
        """See ``Comparison.caption``."""
        lost, won = (len(rows) for rows in self._alone())
        before, after = (len(_clear(result)) for result in (self.fp32, self.int8))
        return (
            f"{self.name}: fp32 finds {before} and INT8 {after}; {lost} only fp32 and {won} only "
            "INT8"
        )

    def differences(self) -> Pixels:
        """The picture, dark and grey, with the masks that only one of the two has over it."""
        picture = _darkened(self.fp32.frame.pixels)
        for result, rows, colour in zip(
            (self.fp32, self.int8), self._alone(), (_LOST, _WON), strict=True
        ):
            for row in rows:
                top, left, mask = result.frame_masks.window(row)
                part = picture[top : top + mask.shape[0], left : left + mask.shape[1]]
                part[mask] = colour
        return picture

    def pictures(self) -> list[tuple[str, Pixels]]:
        """See ``Comparison.pictures``."""
        views: list[tuple[str, Callable[[], Pixels]]] = [
            ("picture", lambda: self.fp32.frame.pixels),
            ("what only one of them finds", self.differences),
            ("before: fp32", lambda: _drawn(self.fp32)),
            ("after: INT8", lambda: _drawn(self.int8)),
        ]
        found = []
        for words, view in views:
            pixels = view()
            height, width = pixels.shape[:2]
            if width > _PICTURE_WIDTH:
                pixels = _resized(
                    pixels, (_PICTURE_WIDTH, max(round(height * _PICTURE_WIDTH / width), 1))
                )
            found.append((words, pixels))
        return found

    def _alone(self) -> tuple[list[int], list[int]]:
        """Rows of fp32, and of INT8, that have no partner and are worth a look."""
        pairs = partners(self.fp32.outputs, self.int8.outputs)
        first = {one for one, _ in pairs}
        second = {other for _, other in pairs}
        return (
            [row for row in _clear(self.fp32) if row not in first],
            [row for row in _clear(self.int8) if row not in second],
        )


def _clear(result: InstanceResult) -> list[int]:
    rows: list[int] = np.flatnonzero(result.scores >= MINIMUM_SCORE).tolist()
    return rows


def _drawn(result: InstanceResult) -> Pixels:
    rows = _clear(result)
    return draw_instances(
        result.frame.pixels,
        windows=[result.frame_masks.window(row) for row in rows],
        boxes=result.boxes[rows],
        labels=result.labels[rows],
        scores=result.scores[rows],
        names=result.spec.classes,
        colours=result.spec.colours,
        opacity=0.6,
        legend=True,
    )


def _darkened(pixels: Pixels) -> Pixels:
    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    picture: Pixels = cv2.cvtColor(grey // 2, cv2.COLOR_GRAY2BGR)  # type: ignore[assignment]
    return picture


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _percent(share: float) -> str:
    """A share of 0 to 1 in per cent; two digits that say something where it is small."""
    value = share * 100
    return "<0.01 %" if 0 < value < 0.01 else f"{value:.2f} %"
