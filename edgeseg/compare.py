"""Models, and steps after the network, side by side: what each gains and what it costs."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeseg.boundary import BoundaryOverlap
from edgeseg.dataset import Dataset, Sample
from edgeseg.detection import DetectionScorer
from edgeseg.engine.base import Engine
from edgeseg.errors import DataError, EngineError, RequestError
from edgeseg.evaluate import check_classes, match_classes
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.instance_dataset import InstanceDataset, InstanceSample
from edgeseg.instances import InstanceResult
from edgeseg.metrics import ConfusionMatrix
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.result import AnyResult, SemanticResult, result_of

__all__ = ["Candidate", "Comparison", "Spread", "Standing", "compare"]

# In the order of the table; gains are told in points, hundredths of these.
_TITLES = {
    "miou": "mIoU",
    "boundary_iou": "boundary IoU",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model on its engine, and what is done after it."""

    title: str
    engine: Engine
    postprocessing: Postprocessing = NOTHING_MORE


@dataclass(frozen=True)
class Spread:
    """The middle half of what was measured, and its median, in milliseconds."""

    p25: float
    p50: float
    p75: float

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Spread:
        """The spread of one or more times."""
        p25, p50, p75 = (float(value) / 1e6 for value in np.percentile(nanoseconds, (25, 50, 75)))
        return cls(p25, p50, p75)

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"p25": self.p25, "p50": self.p50, "p75": self.p75}


@dataclass(frozen=True)
class Standing:
    """How one candidate did.

    ``figures``: the metrics of its task, 0 to 1, NaN where nothing could be measured. ``frame_ms``:
    from frame to finished masks, the network included. ``extra_ms``: what it took more than the
    first candidate did for the same frame.
    """

    title: str
    figures: dict[str, float]
    frame_ms: Spread
    extra_ms: Spread


@dataclass(frozen=True)
class Comparison:
    """How the candidates did on the same pictures; the others are held against the first.

    ``data`` and ``split`` name the data set; ``seconds`` is the wall time of it all.
    """

    data: str
    split: str
    frames: int
    standings: tuple[Standing, ...]
    seconds: float

    def gains(self, standing: Standing) -> dict[str, float]:
        """What ``standing`` has more than the first candidate, 0 to 1, by metric."""
        first = self.standings[0].figures
        return {name: value - first[name] for name, value in standing.figures.items()}

    def to_dict(self) -> dict[str, object]:
        """The figures for JSON: plain values, None in place of NaN."""
        return {
            "data": self.data,
            "split": self.split,
            "frames": self.frames,
            "candidates": [
                {
                    "title": standing.title,
                    **_plain(standing.figures),
                    "gain": _plain(self.gains(standing)),
                    "frame_ms": standing.frame_ms.to_dict(),
                    "extra_ms": standing.extra_ms.to_dict(),
                }
                for standing in self.standings
            ],
            "seconds": self.seconds,
        }

    def render(self) -> str:
        """A table for a person: metrics with gains in points, milliseconds with the middle half."""
        metrics = list(self.standings[0].figures)
        head = ["", *(_TITLES[name] for name in metrics), "ms a frame", "more than the first"]
        rows = [head]
        for place, standing in enumerate(self.standings):
            gains = self.gains(standing)
            cells = [standing.title]
            for name in metrics:
                cell = _share(standing.figures[name])
                cells.append(cell if place == 0 else f"{cell} {_points(gains[name])}")
            cells.append(_milliseconds(standing.frame_ms))
            cells.append("" if place == 0 else _milliseconds(standing.extra_ms, sign="+"))
            rows.append(cells)
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def compare(
    candidates: Sequence[Candidate],
    dataset: Dataset | InstanceDataset,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Runs all ``candidates``, two or more of one task, over ``dataset``, picture by picture.

    Each picture goes to every candidate before the next one comes, and each time another one goes
    first: a machine that gets slower meanwhile does so for all. Only the way from frame to
    finished masks is timed, after one that is not. ``limit`` and ``progress`` are those of
    `edgeseg.evaluate.evaluate`; metrics are mIoU and boundary IoU, or box and mask AP.

    DataError when the classes of a model are not the data set's, RequestError when a candidate is
    not of the data set's task, or a step not for its model.
    """
    if len(candidates) < 2:
        raise RequestError(f"a comparison needs two candidates, and {len(candidates)} came")
    if limit is not None and limit < 1:
        raise RequestError(f"a comparison needs at least one frame, and a limit of {limit} came")
    task = "semantic" if isinstance(dataset, Dataset) else "instance"
    for candidate in candidates:
        if candidate.engine.spec.task != task:
            raise RequestError(
                f"candidates are of one task, here {task}, and {candidate.title} is for "
                f"{candidate.engine.spec.task}"
            )
        candidate.postprocessing.check(candidate.engine.spec)
    entrants: Sequence[_Entrant]
    if isinstance(dataset, Dataset):
        entrants = [_Classes(candidate, dataset) for candidate in candidates]
    else:
        entrants = [_Objects(candidate, dataset) for candidate in candidates]
    total = len(dataset) if limit is None else min(limit, len(dataset))
    started = time.perf_counter()
    for done in range(total):
        sample = dataset.sample(done * len(dataset) // total)
        for step in range(len(entrants)):
            entrant = entrants[(done + step) % len(entrants)]
            if done == 0:
                entrant.result(sample.pixels, done)
            started_ns = time.perf_counter_ns()
            result = entrant.result(sample.pixels, done)
            entrant.times_ns.append(time.perf_counter_ns() - started_ns)
            try:
                entrant.score(result, sample)
            except DataError as error:
                where = f"{dataset.title} {dataset.split}, {sample.name}"
                raise DataError(f"{where}: {error}") from error
        if progress is not None:
            progress(done + 1, total)
    first = entrants[0].times_ns
    return Comparison(
        data=dataset.title,
        split=dataset.split,
        frames=total,
        standings=tuple(
            Standing(
                title=entrant.title,
                figures=entrant.figures(),
                frame_ms=Spread.of(entrant.times_ns),
                extra_ms=Spread.of(
                    [ours - theirs for ours, theirs in zip(entrant.times_ns, first, strict=True)]
                ),
            )
            for entrant in entrants
        ),
        seconds=time.perf_counter() - started,
    )


class _Entrant(ABC):
    """A candidate, its score and its times."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self.times_ns: list[int] = []

    @property
    def title(self) -> str:
        """What the table calls it."""
        return self._candidate.title

    def result(self, pixels: Pixels, index: int) -> AnyResult:
        """What a user gets for one picture."""
        engine = self._candidate.engine
        frame = Frame.of(pixels, index)
        geometry = Geometry.between(frame.height, frame.width, engine.spec)
        outputs = engine.submit(engine.prepare(frame, geometry)).outputs()
        return result_of(outputs, frame, geometry, engine.spec, self._candidate.postprocessing)

    @abstractmethod
    def score(self, result: AnyResult, sample: Sample | InstanceSample) -> None:
        """Counts one picture."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """The metrics over all that was counted."""

    def _unexpected(self, result: AnyResult) -> EngineError:
        engine = self._candidate.engine
        return EngineError(
            f"{engine.name} gave {type(result).__name__} for a model of the task {engine.spec.task}"
        )


class _Classes(_Entrant):
    def __init__(self, candidate: Candidate, dataset: Dataset) -> None:
        super().__init__(candidate)
        classes = dataset.classes
        check_classes(candidate.engine.spec.classes, classes)
        self._matrix = ConfusionMatrix(len(classes.names), classes.ignore)
        self._boundary = BoundaryOverlap(len(classes.names), classes.ignore)

    def score(self, result: AnyResult, sample: Sample | InstanceSample) -> None:
        if not isinstance(result, SemanticResult) or not isinstance(sample, Sample):
            raise self._unexpected(result)
        self._matrix.update(result.class_map, sample.labels)
        self._boundary.update(result.class_map, sample.labels)

    def figures(self) -> dict[str, float]:
        return {"miou": self._matrix.miou(), "boundary_iou": self._boundary.mean()}


class _Objects(_Entrant):
    def __init__(self, candidate: Candidate, dataset: InstanceDataset) -> None:
        super().__init__(candidate)
        spec = candidate.engine.spec
        self._labels = match_classes(spec.classes, dataset.classes, dataset.title)
        self._scorer = DetectionScorer(dataset.classes)

    def score(self, result: AnyResult, sample: Sample | InstanceSample) -> None:
        if not isinstance(result, InstanceResult) or not isinstance(sample, InstanceSample):
            raise self._unexpected(result)
        self._scorer.add(
            sample.number,
            (result.frame.height, result.frame.width),
            sample.annotations,
            result.to_coco(sample.number, self._labels),
        )

    def figures(self) -> dict[str, float]:
        masks = {"mask_ap": self._scorer.masks().ap} if self._scorer.outlined else {}
        return {"box_ap": self._scorer.boxes().ap, **masks}


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def _share(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:.4f}"


def _points(gain: float) -> str:
    return "" if math.isnan(gain) else f"{100 * gain:+.2f}"


def _milliseconds(spread: Spread, sign: str = "") -> str:
    middle = f"{spread.p25:.1f} to {spread.p75:.1f}"
    return f"{spread.p50:{sign}.1f} ({middle})"
