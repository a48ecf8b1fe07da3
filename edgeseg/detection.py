"""Average precision of detected objects, by COCO's own code."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from edgeseg.annotation import Annotation, coco_masks
from edgeseg.errors import DataError, RequestError

__all__ = ["AveragePrecision", "DetectionScorer"]

# In the order of COCOeval.summarize.
_FIGURES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar_1",
    "ar_10",
    "ar_100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


@dataclass(frozen=True)
class AveragePrecision:
    """The twelve figures of COCO, each 0 to 1, and the AP of each class.

    ``ap`` is the mean over overlaps (IoU) of 0.50 to 0.95 in steps of 0.05, over all classes that
    have objects; ``ap50`` and ``ap75`` at that one overlap; small objects are below 32 x 32
    pixels, large ones from 96 x 96. ``ar_1``, ``ar_10``, ``ar_100``: average recall with that many
    detections to a picture, at most. NaN where the truth has no such object, and in ``per_class``
    for a class without any.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar_100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: dict[str, float]

    def to_dict(self) -> dict[str, float | None]:
        """The twelve figures for JSON, None in place of NaN; without the classes."""
        figures = asdict(self)
        del figures["per_class"]
        return _plain(figures)

    def to_classes(self) -> dict[str, float | None]:
        """The AP of each class for JSON, None in place of NaN."""
        return _plain(self.per_class)


class DetectionScorer:
    """Collects detections and their truth, picture by picture, into AveragePrecision.

    ``classes``: names of the data set's classes, in the order of `Annotation.label`. What is kept
    of a picture are boxes and packed outlines, no pixels.

    The figures are those of pycocotools: the protocol of COCO 2017 (Lin et al., arXiv 1405.0312;
    its evaluation code). RequestError where that package is missing.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        coco_masks()
        self._classes = classes
        self._images: list[dict[str, Any]] = []
        self._numbers: set[int] = set()
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []
        self._outlined = True

    def add(
        self,
        number: int,
        size: tuple[int, int],
        annotations: Sequence[Annotation],
        detections: Iterable[Mapping[str, Any]],
    ) -> None:
        """Adds one picture.

        ``number``: its id, which must be new. ``size``: (height, width) in pixels. ``detections``
        in COCO's format of results: ``image_id``, ``category_id`` (here: the index of the class),
        ``bbox`` (x, y, width, height), ``score``, and ``segmentation``, run lengths of that size.
        One of a category that is none of the classes is left out, since there is no truth for it.
        Raises DataError when a detection is of another picture or its mask of another size.
        """
        if number in self._numbers:
            raise RequestError(f"a picture is evaluated once, and number {number} came again")
        height, width = size
        truth = [self._true(number, annotation, size) for annotation in annotations]
        found = []
        for detection in detections:
            category = int(detection["category_id"])
            if not 0 <= category < len(self._classes):
                continue
            if detection["image_id"] != number:
                raise DataError(
                    f"a detection in picture {number} says that it is in {detection['image_id']}"
                )
            outline = detection["segmentation"]
            if list(outline["size"]) != [height, width]:
                raise DataError(
                    f"a mask has the size of its picture, {height}x{width}, and one of "
                    f"{'x'.join(str(side) for side in outline['size'])} came"
                )
            found.append(
                {
                    "image_id": number,
                    "category_id": category,
                    "bbox": [float(value) for value in detection["bbox"]],
                    "score": float(detection["score"]),
                    "segmentation": outline,
                    "iscrowd": 0,
                }
            )
        self._outlined &= all(annotation.segmentation is not None for annotation in annotations)
        self._numbers.add(number)
        self._images.append({"id": number, "height": height, "width": width})
        self._truth += truth
        self._found += found

    def boxes(self) -> AveragePrecision:
        """How well the boxes agree, over all pictures added."""
        return self._measured("bbox")

    @property
    def outlined(self) -> bool:
        """Whether every object added has an outline, and not a box alone."""
        return self._outlined

    def masks(self) -> AveragePrecision:
        """How well the masks agree, over all pictures added; a box stands in for no outline."""
        return self._measured("segm")

    def _true(self, number: int, annotation: Annotation, size: tuple[int, int]) -> dict[str, Any]:
        if not 0 <= annotation.label < len(self._classes):
            raise DataError(
                f"labels are 0 to {len(self._classes) - 1}, and {annotation.label} came"
            )
        return {
            "image_id": number,
            "category_id": annotation.label,
            "bbox": list(annotation.box),
            "area": annotation.area,
            "iscrowd": int(annotation.crowd),
            "segmentation": annotation.packed(*size),
        }

    def _measured(self, kind: Literal["bbox", "segm"]) -> AveragePrecision:
        from pycocotools.cocoeval import COCOeval

        masks = coco_masks()
        found = []
        for detection in self._found:
            # The size of an object is that of its box where boxes are compared.
            _, _, width, height = detection["bbox"]
            area = (
                width * height if kind == "bbox" else float(masks.area(detection["segmentation"]))
            )
            found.append({**detection, "area": area})
        # pycocotools reports to standard output, which may be where the user wants JSON.
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._indexed(self._truth), self._indexed(found), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        figures = [_figure(float(value)) for value in evaluation.stats]
        # (overlaps, recalls, classes, sizes, most detections): all sizes, 100 detections.
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
        per_class = {}
        for label, name in enumerate(self._classes):
            known = precision[:, :, label]
            known = known[known > -1]
            per_class[name] = float(known.mean()) if known.size else math.nan
        return AveragePrecision(**dict(zip(_FIGURES, figures, strict=True)), per_class=per_class)

    def _indexed(self, annotations: list[dict[str, Any]]) -> Any:
        """pycocotools' index of the annotations, each a copy, since it writes into them."""
        from pycocotools.coco import COCO

        index = COCO()
        index.dataset = {
            "images": self._images,
            "categories": [{"id": label, "name": name} for label, name in enumerate(self._classes)],
            # Numbered from one: zero is what the evaluation writes for "no match".
            "annotations": [
                {**annotation, "id": number} for number, annotation in enumerate(annotations, 1)
            ],
        }
        index.createIndex()
        return index


def _plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def _figure(value: float) -> float:
    """A figure of pycocotools, which writes -1 where there is none."""
    return math.nan if value == -1 else value
