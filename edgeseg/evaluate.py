"""How right a model is: its class maps against ground truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.classes import ClassList
from edgeseg.dataset import Dataset
from edgeseg.engine.base import Engine
from edgeseg.errors import DataError, RequestError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.metrics import ConfusionMatrix

__all__ = ["Evaluation", "Scorer", "check_classes", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    ``data`` and ``split`` name the data set, ``engine`` what made the masks. ``miou`` and
    ``pixel_accuracy`` are shares, 0 to 1, NaN when no pixel had a label; ``per_class`` is the IoU
    of each class in the order of its label, None for a class that occurs neither in the truth nor
    in the predictions (`ConfusionMatrix.miou` has the definition). ``seconds``: wall time from
    the first sample to the last, reading and comparing included.
    """

    data: str
    split: str
    engine: str
    frames: int
    miou: float
    per_class: dict[str, float | None]
    pixel_accuracy: float
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """The figures for JSON: plain values, None in place of NaN."""
        return {
            "data": self.data,
            "split": self.split,
            "engine": self.engine,
            "frames": self.frames,
            "miou": _plain(self.miou),
            "per_class": dict(self.per_class),
            "pixel_accuracy": _plain(self.pixel_accuracy),
            "seconds": self.seconds,
        }


class Scorer:
    """Collects class maps and their truths, one by one, into an Evaluation.

    ``model``: names of the model's classes, in order; DataError when they are not the truth's.
    For whoever has the masks already, such as a clip with known truth that is being played;
    `evaluate` runs the model itself. The clock starts with the scorer.
    """

    def __init__(self, model: tuple[str, ...], classes: ClassList) -> None:
        check_classes(model, classes)
        self._classes = classes
        self._matrix = ConfusionMatrix(len(classes.names), classes.ignore)
        self._frames = 0
        self._started = time.perf_counter()

    @property
    def frames(self) -> int:
        """Pairs added so far."""
        return self._frames

    def add(self, class_map: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Counts one frame; both are (frame height, frame width) uint8.

        Raises DataError when the sizes differ or a label is out of range.
        """
        self._matrix.update(class_map, truth)
        self._frames += 1

    def evaluation(self, *, data: str, split: str, engine: str) -> Evaluation:
        """The figures of all that was added."""
        return Evaluation(
            data=data,
            split=split,
            engine=engine,
            frames=self._frames,
            miou=self._matrix.miou(),
            per_class={
                name: _plain(float(iou))
                for name, iou in zip(self._classes.names, self._matrix.per_class_iou(), strict=True)
            },
            pixel_accuracy=self._matrix.pixel_accuracy(),
            seconds=time.perf_counter() - self._started,
        )


def evaluate(
    engine: Engine,
    dataset: Dataset,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Runs ``engine`` over ``dataset`` and compares at the size of the pictures.

    ``limit``: that many samples at most, spread evenly over the data set, since neighbours in a
    video tell the same story; the whole set by default. ``progress(done, total)`` is called after
    each sample.

    Raises DataError when the model's classes are not the data set's, or a file is not as promised.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"an evaluation needs at least one frame, and a limit of {limit} came")
    scorer = Scorer(engine.spec.classes, dataset.classes)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    for done in range(total):
        sample = dataset.sample(done * len(dataset) // total)
        frame = Frame.of(sample.pixels, done)
        geometry = Geometry.between(frame.height, frame.width, engine.spec)
        outputs = engine.run(geometry.fit(frame.pixels))
        try:
            scorer.add(geometry.restore(outputs.class_map), sample.labels)
        except DataError as error:
            raise DataError(f"{dataset.title} {dataset.split}, {sample.name}: {error}") from error
        if progress is not None:
            progress(done + 1, total)
    return scorer.evaluation(data=dataset.title, split=dataset.split, engine=engine.name)


def check_classes(model: tuple[str, ...], truth: ClassList) -> None:
    """Raises DataError unless the model's classes are those of the truth, in the same order.

    Upper and lower case are the same; the first difference is named.
    """
    ours = [name.casefold() for name in model]
    theirs = [name.casefold() for name in truth.names]
    if ours == theirs:
        return
    if sorted(ours) == sorted(theirs):
        first = next(index for index, name in enumerate(ours) if name != theirs[index])
        difference = (
            f"class {first} is {model[first]!r} in the model and {truth.names[first]!r} there"
        )
    else:
        missing = [name for name in truth.names if name.casefold() not in ours]
        extra = [name for name in model if name.casefold() not in theirs]
        parts = []
        if missing:
            parts.append(f"the model lacks {_some(missing)}")
        if extra:
            parts.append(f"{truth.title} lacks {_some(extra)}")
        difference = " and ".join(parts) or "a name occurs twice"
    raise DataError(
        f"a model is evaluated on its own classes, and its {len(model)} are not the "
        f"{len(truth.names)} of {truth.title}: {difference}"
    )


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _plain(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
