"""How right a model is: its class maps, or its objects, against ground truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeseg.boundary import BoundaryOverlap
from edgeseg.classes import ClassList
from edgeseg.dataset import Dataset
from edgeseg.detection import AveragePrecision, DetectionScorer
from edgeseg.engine.base import Engine
from edgeseg.errors import DataError, EngineError, RequestError
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.hausdorff import HausdorffDistance
from edgeseg.instance_dataset import InstanceDataset
from edgeseg.instances import InstanceResult
from edgeseg.metrics import ConfusionMatrix
from edgeseg.panoptic import Fusion, PanopticResult
from edgeseg.panoptic_dataset import PanopticDataset
from edgeseg.panoptic_quality import LabelledSegment, PanopticQuality, QualityFigures
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.result import AnyResult, SemanticResult, result_of
from edgeseg.spec import Task

__all__ = [
    "Evaluation",
    "InstanceEvaluation",
    "Outlines",
    "PanopticEvaluation",
    "Scorer",
    "check_classes",
    "evaluate",
    "evaluate_instances",
    "evaluate_panoptic",
    "match_classes",
]


@dataclass(frozen=True)
class Outlines:
    """How well the outlines of the classes agree; means, and each class in the order of its label.

    ``boundary_iou``: 0 to 1, see `edgeseg.boundary`. ``hd95``: pixels, see `edgeseg.hausdorff`.
    NaN without any class, and None for a class that occurs neither in the truth nor in the
    predictions.
    """

    boundary_iou: float
    per_class_boundary_iou: dict[str, float | None]
    hd95: float
    per_class_hd95: dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    ``data`` and ``split`` name the data set, ``engine`` what made the masks. ``miou``, ``dice`` and
    ``pixel_accuracy`` are shares, 0 to 1, NaN when no pixel had a label; ``per_class`` is the IoU
    of each class in the order of its label, None for a class that occurs neither in the truth nor
    in the predictions (`ConfusionMatrix.miou` has the definition), and ``per_class_dice`` its
    Dice. ``outlines`` is None where it was not asked for. ``seconds``: wall time from the first
    sample to the last, reading and comparing included.
    """

    data: str
    split: str
    engine: str
    frames: int
    miou: float
    per_class: dict[str, float | None]
    pixel_accuracy: float
    seconds: float
    dice: float = math.nan
    per_class_dice: dict[str, float | None] = field(default_factory=dict)
    outlines: Outlines | None = None

    def to_dict(self) -> dict[str, object]:
        """The figures for JSON: plain values, None in place of NaN."""
        figures: dict[str, object] = {
            "data": self.data,
            "split": self.split,
            "engine": self.engine,
            "frames": self.frames,
            "miou": _plain(self.miou),
            "per_class": dict(self.per_class),
            "pixel_accuracy": _plain(self.pixel_accuracy),
            "dice": _plain(self.dice),
            "per_class_dice": dict(self.per_class_dice),
        }
        if self.outlines is not None:
            figures |= {
                "boundary_iou": _plain(self.outlines.boundary_iou),
                "per_class_boundary_iou": dict(self.outlines.per_class_boundary_iou),
                "hd95": _plain(self.outlines.hd95),
                "per_class_hd95": dict(self.outlines.per_class_hd95),
            }
        return {**figures, "seconds": self.seconds}


@dataclass(frozen=True)
class InstanceEvaluation:
    """How well objects were found, and on what.

    ``data``, ``split``, ``engine`` and ``seconds`` are those of `Evaluation`. ``box`` compares
    boxes and ``mask`` masks; the latter is None where the data set has objects without outline.
    """

    data: str
    split: str
    engine: str
    frames: int
    box: AveragePrecision
    mask: AveragePrecision | None
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """The figures for JSON: plain values, None in place of NaN."""
        box, mask = self.box, self.mask
        masks = None if mask is None else mask.to_classes()
        return {
            "data": self.data,
            "split": self.split,
            "engine": self.engine,
            "frames": self.frames,
            "box_ap": _plain(box.ap),
            "mask_ap": None if mask is None else _plain(mask.ap),
            "box": box.to_dict(),
            "mask": None if mask is None else mask.to_dict(),
            "per_class": {
                name: {"box_ap": ap, "mask_ap": None if masks is None else masks[name]}
                for name, ap in box.to_classes().items()
            },
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class PanopticEvaluation:
    """Panoptic quality, and on what.

    ``data``, ``split`` and ``seconds`` are those of `Evaluation`; ``engine`` is what made the
    segments, both where they differ. ``all``, ``things`` and ``stuff`` are means over the classes
    that occur.
    """

    data: str
    split: str
    engine: str
    frames: int
    all: QualityFigures
    things: QualityFigures
    stuff: QualityFigures
    per_class: dict[str, QualityFigures]
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """The figures for JSON: plain values, None in place of NaN."""
        return {
            "data": self.data,
            "split": self.split,
            "engine": self.engine,
            "frames": self.frames,
            **self.all.to_dict(),
            "things": self.things.to_dict(),
            "stuff": self.stuff.to_dict(),
            "per_class": {name: figures.to_dict() for name, figures in self.per_class.items()},
            "seconds": self.seconds,
        }


class Scorer:
    """Collects class maps and their truths, one by one, into an Evaluation.

    ``model``: names of the model's classes, in order; DataError when they are not the truth's.
    ``boundary`` adds the outlines, which takes some times as long as the rest. For whoever has
    the masks already, such as a clip with known truth that is being played; `evaluate` runs the
    model itself. The clock starts with the scorer.
    """

    def __init__(
        self, model: tuple[str, ...], classes: ClassList, *, boundary: bool = False
    ) -> None:
        check_classes(model, classes)
        count, ignore = len(classes.names), classes.ignore
        self._classes = classes
        self._matrix = ConfusionMatrix(count, ignore)
        self._boundary = BoundaryOverlap(count, ignore) if boundary else None
        self._distance = HausdorffDistance(count, ignore) if boundary else None
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
        if self._boundary is not None:
            self._boundary.update(class_map, truth)
        if self._distance is not None:
            self._distance.update(class_map, truth)
        self._frames += 1

    def evaluation(self, *, data: str, split: str, engine: str) -> Evaluation:
        """The figures of all that was added."""
        outlines = None
        if self._boundary is not None and self._distance is not None:
            outlines = Outlines(
                boundary_iou=self._boundary.mean(),
                per_class_boundary_iou=self._named(self._boundary.per_class()),
                hd95=self._distance.mean(),
                per_class_hd95=self._named(self._distance.per_class()),
            )
        return Evaluation(
            data=data,
            split=split,
            engine=engine,
            frames=self._frames,
            miou=self._matrix.miou(),
            per_class=self._named(self._matrix.per_class_iou()),
            pixel_accuracy=self._matrix.pixel_accuracy(),
            seconds=time.perf_counter() - self._started,
            dice=self._matrix.dice(),
            per_class_dice=self._named(self._matrix.per_class_dice()),
            outlines=outlines,
        )

    def _named(self, values: NDArray[np.float64]) -> dict[str, float | None]:
        return {
            name: _plain(float(value))
            for name, value in zip(self._classes.names, values, strict=True)
        }


def evaluate(
    engine: Engine,
    dataset: Dataset,
    *,
    limit: int | None = None,
    boundary: bool = False,
    postprocessing: Postprocessing = NOTHING_MORE,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Runs a semantic ``engine`` over ``dataset`` and compares at the size of the pictures.

    ``limit``: that many samples at most, spread evenly over the data set, since neighbours in a
    video tell the same story; the whole set by default. ``boundary`` adds the figures of the
    outlines. ``postprocessing``: what is done after the network. ``progress(done, total)`` is
    called after each sample.

    Raises DataError when the model's classes are not the data set's, or a file is not as promised,
    and RequestError when the model is for instances, or a step not for it.
    """
    total = _total(limit, len(dataset))
    _check_task(engine, "semantic")
    postprocessing.check(engine.spec)
    scorer = Scorer(engine.spec.classes, dataset.classes, boundary=boundary)
    for done in range(total):
        sample = dataset.sample(done * len(dataset) // total)
        result = _semantic_result(engine, sample.pixels, done, postprocessing)
        try:
            scorer.add(result.class_map, sample.labels)
        except DataError as error:
            raise DataError(f"{dataset.title} {dataset.split}, {sample.name}: {error}") from error
        if progress is not None:
            progress(done + 1, total)
    return scorer.evaluation(data=dataset.title, split=dataset.split, engine=engine.name)


def evaluate_instances(
    engine: Engine,
    dataset: InstanceDataset,
    *,
    limit: int | None = None,
    postprocessing: Postprocessing = NOTHING_MORE,
    progress: Callable[[int, int], None] | None = None,
) -> InstanceEvaluation:
    """Runs an instance ``engine`` over ``dataset`` and compares boxes, and masks at picture size.

    ``limit``, ``postprocessing`` and ``progress`` are those of `evaluate`. The model's classes go
    by their names, upper and lower case the same: it must know all of the data set's, in any order,
    and what it knows beyond them is not looked at.

    Raises DataError when it does not, or a file is not as promised, and RequestError when the model
    is semantic, a step not for it, or pycocotools is missing.
    """
    total = _total(limit, len(dataset))
    _check_task(engine, "instance")
    postprocessing.check(engine.spec)
    labels = match_classes(engine.spec.classes, dataset.classes, dataset.title)
    scorer = DetectionScorer(dataset.classes)
    started = time.perf_counter()
    for done in range(total):
        sample = dataset.sample(done * len(dataset) // total)
        result = _instance_result(engine, sample.pixels, done, postprocessing)
        try:
            scorer.add(
                sample.number,
                (result.frame.height, result.frame.width),
                sample.annotations,
                result.to_coco(sample.number, labels),
            )
        except DataError as error:
            raise DataError(f"{dataset.title} {dataset.split}, {sample.name}: {error}") from error
        if progress is not None:
            progress(done + 1, total)
    return InstanceEvaluation(
        data=dataset.title,
        split=dataset.split,
        engine=engine.name,
        frames=total,
        box=scorer.boxes(),
        mask=scorer.masks() if scorer.outlined else None,
        seconds=time.perf_counter() - started,
    )


def evaluate_panoptic(
    semantic: Engine,
    instance: Engine,
    dataset: PanopticDataset,
    *,
    fusion: Fusion | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PanopticEvaluation:
    """Runs two engines over ``dataset``, makes one panoptic result of theirs, and compares it.

    ``fusion`` is how they are put together, None for what `Fusion` does by itself. ``limit`` and
    ``progress`` are those of `evaluate`. Classes go by their names, upper and lower case the same:
    between them the models must know all of the data set's, and no other.

    Raises DataError when they do not, or a file is not as promised, and RequestError when the
    models are not one of each task.
    """
    total = _total(limit, len(dataset))
    _check_task(semantic, "semantic")
    _check_task(instance, "instance")
    labels = {name.casefold(): label for label, name in enumerate(dataset.classes)}
    _check_union((*semantic.spec.classes, *instance.spec.classes), dataset)
    quality = PanopticQuality(len(dataset.classes), dataset.things)
    started = time.perf_counter()
    for done in range(total):
        sample = dataset.sample(done * len(dataset) // total)
        result = PanopticResult.fuse(
            _semantic_result(semantic, sample.pixels, done),
            _instance_result(instance, sample.pixels, done),
            fusion or Fusion(),
        )
        quality.update(
            result.ids,
            [
                LabelledSegment(segment.id, labels[segment.name.casefold()])
                for segment in result.segments
            ],
            sample.ids,
            sample.segments,
        )
        if progress is not None:
            progress(done + 1, total)
    names = dict.fromkeys((semantic.name, instance.name))
    return PanopticEvaluation(
        data=dataset.title,
        split=dataset.split,
        engine=", ".join(names),
        frames=total,
        all=quality.all(),
        things=quality.things(),
        stuff=quality.stuff(),
        per_class=dict(zip(dataset.classes, quality.per_class(), strict=True)),
        seconds=time.perf_counter() - started,
    )


def _total(limit: int | None, samples: int) -> int:
    """How many samples are looked at; RequestError for a limit below one."""
    if limit is not None and limit < 1:
        raise RequestError(f"an evaluation needs at least one frame, and a limit of {limit} came")
    return samples if limit is None else min(limit, samples)


def _check_task(engine: Engine, task: Task) -> None:
    if engine.spec.task != task:
        raise RequestError(
            f"these figures are for {task} models, and {engine.spec.name} is for {engine.spec.task}"
        )


def _semantic_result(
    engine: Engine, pixels: Pixels, index: int, postprocessing: Postprocessing = NOTHING_MORE
) -> SemanticResult:
    result = _result(engine, pixels, index, postprocessing)
    if not isinstance(result, SemanticResult):
        raise EngineError(f"{engine.name} gave {type(result).__name__} for a semantic model")
    return result


def _instance_result(
    engine: Engine, pixels: Pixels, index: int, postprocessing: Postprocessing = NOTHING_MORE
) -> InstanceResult:
    result = _result(engine, pixels, index, postprocessing)
    if not isinstance(result, InstanceResult):
        raise EngineError(f"{engine.name} gave {type(result).__name__} for an instance model")
    return result


def _result(
    engine: Engine, pixels: Pixels, index: int, postprocessing: Postprocessing
) -> AnyResult:
    """What a user gets for one picture."""
    frame = Frame.of(pixels, index)
    geometry = Geometry.between(frame.height, frame.width, engine.spec)
    outputs = engine.run(geometry.fit(frame.pixels))
    return result_of(outputs, frame, geometry, engine.spec, postprocessing)


def match_classes(model: tuple[str, ...], truth: tuple[str, ...], title: str) -> tuple[int, ...]:
    """For each class of the model the index of the same name in the truth, or -1.

    Upper and lower case are the same. DataError when the model lacks one of the truth's, or has
    one twice, since no figure over all classes could be right then.
    """
    ours = [name.casefold() for name in model]
    theirs = [name.casefold() for name in truth]
    missing = [name for name in truth if name.casefold() not in ours]
    if missing:
        raise DataError(
            f"a model is evaluated on classes that it knows, and of the {len(truth)} of {title} "
            f"its {len(model)} lack {_some(missing)}; names must be the same, or use an annotation "
            "file with the model's classes alone"
        )
    twice = [name for name in truth if ours.count(name.casefold()) > 1]
    if twice:
        raise DataError(f"a class has one index in the model, and {_some(twice)} has more")
    return tuple(theirs.index(name) if name in theirs else -1 for name in ours)


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


def _check_union(models: tuple[str, ...], dataset: PanopticDataset) -> None:
    """Raises DataError unless these names, taken together, are the classes of the data set."""
    ours = {name.casefold(): name for name in models}
    theirs = {name.casefold(): name for name in dataset.classes}
    missing = [name for folded, name in theirs.items() if folded not in ours]
    extra = [name for folded, name in ours.items() if folded not in theirs]
    if missing or extra:
        parts = [f"the models lack {_some(missing)}"] if missing else []
        parts += [f"{dataset.title} lack {_some(extra)}"] if extra else []
        raise DataError(
            f"two models are evaluated on the classes that they have between them: "
            f"{' and '.join(parts)}"
        )


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _plain(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
