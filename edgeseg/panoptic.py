"""Panoptic segmentation: every pixel of a frame in one thing or one stuff, of two results.

Kirillov et al., "Panoptic Segmentation", CVPR 2019 (arXiv:1801.00868), section 6: instances in the
order of their scores, each without the pixels of better ones, and left out when little of it
remains; then the classes of stuff on the pixels that are left.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeseg.draw import draw_panoptic
from edgeseg.errors import RequestError
from edgeseg.frame import Frame, Pixels
from edgeseg.instances import InstanceResult
from edgeseg.result import SemanticResult

__all__ = ["Fusion", "PanopticResult", "Segment", "SegmentInfo"]


class SegmentInfo(TypedDict):
    """One entry of ``segments_info`` in COCO's panoptic JSON; ``bbox`` is x, y, width, height."""

    id: int
    category_id: int
    area: int
    bbox: list[int]
    iscrowd: int


@dataclass(frozen=True)
class Fusion:
    """How two results become one.

    ``score``: instances below it are left out. ``remains``: share of an instance's pixels that no
    better one may have taken. ``stuff_area``: share of the frame that a class of stuff has to
    cover, over all its parts.
    """

    score: float = 0.5
    remains: float = 0.5
    stuff_area: float = 0.005

    def __post_init__(self) -> None:
        for name in ("score", "remains", "stuff_area"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise RequestError(f"{name} of a fusion is between 0 and 1, and {value} came")


@dataclass(frozen=True)
class Segment:
    """One thing, or all of one class of stuff.

    ``id``: its value in the map of ids, from 1. ``score``: the instance's; for stuff the mean
    confidence of its pixels, or 1 where the model gives none. ``area`` in pixels.
    """

    id: int
    name: str
    is_thing: bool
    score: float
    area: int
    colour: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PanopticResult:
    """The segments of one frame: ``ids`` (frame height, frame width) int32, 0 where there is none.

    ``segments``: in the order of their ids: things, best first, then stuff.
    """

    frame: Frame
    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]
    finished_ns: int = field(default_factory=time.monotonic_ns)

    @classmethod
    def fuse(
        cls, semantic: SemanticResult, instances: InstanceResult, fusion: Fusion = Fusion()
    ) -> PanopticResult:
        """The segments of a frame that both results are of.

        A class that both models have is a thing: its pixels count where an instance of it lies, and
        are nobody's elsewhere. RequestError when the results are of frames of different sizes.
        """
        sizes = [(result.frame.height, result.frame.width) for result in (semantic, instances)]
        if sizes[0] != sizes[1]:
            raise RequestError(
                f"two results of one frame are fused, and frames of {sizes[0]} and {sizes[1]} came"
            )
        ids = np.zeros(sizes[0], np.int32)
        segments: list[Segment] = []
        # The engine gives the best first; a result that somebody made may not.
        for index in np.argsort(-instances.scores, kind="stable").tolist():
            score = float(instances.scores[index])
            if not score >= fusion.score:
                continue
            top, left, mask = instances.frame_masks.window(index)
            part = ids[top : top + mask.shape[0], left : left + mask.shape[1]]
            free = mask & (part == 0)
            area, whole = int(np.count_nonzero(free)), int(np.count_nonzero(mask))
            if area == 0 or area < fusion.remains * whole:
                continue
            label = int(instances.labels[index])
            number = len(segments) + 1
            part[free] = number
            colour = instances.spec.colours[label]
            name = instances.spec.classes[label]
            segments.append(Segment(number, name, True, score, area, colour))
        things = set(instances.spec.classes)
        class_map, confidence = semantic.class_map, semantic.confidence
        free = ids == 0
        counts = np.bincount(class_map[free], minlength=256)
        for label, name in enumerate(semantic.spec.classes):
            area = int(counts[label])
            if name in things or area == 0 or area < fusion.stuff_area * ids.size:
                continue
            number = len(segments) + 1
            covered = free & (class_map == label)
            ids[covered] = number
            score = 1.0 if confidence is None else float(confidence[covered].mean() / 255)
            colour = semantic.spec.colours[label]
            segments.append(Segment(number, name, False, score, area, colour))
        return cls(instances.frame, ids, tuple(segments))

    @property
    def index(self) -> int:
        """Number of the frame in its source."""
        return self.frame.index

    @property
    def age_ms(self) -> float:
        """Milliseconds from the frame's capture to the finished segments."""
        return (self.finished_ns - self.frame.captured_ns) / 1e6

    @property
    def summary(self) -> str:
        """One line for a person: the things, then the stuff."""
        counts: dict[str, int] = {}
        for segment in self.segments:
            counts[segment.name] = counts.get(segment.name, 0) + segment.is_thing
        named = [f"{count} {name}" if count else name for name, count in counts.items()]
        return ", ".join(named) or "nothing found"

    @cached_property
    def boxes(self) -> NDArray[np.int32]:
        """First column, first row, last column, last row of each segment: (n, 4) int32."""
        boxes = np.zeros((len(self.segments), 4), np.int32)
        columns = np.arange(self.ids.shape[1], dtype=np.int32)
        boxes[:, :2] = np.iinfo(np.int32).max
        boxes[:, 2:] = -1
        # Row by row, the ids that are there: a pass over the picture for all segments together.
        for row, ids in enumerate(self.ids):
            starts = np.flatnonzero(np.diff(ids, prepend=-1))
            ends = np.append(starts[1:], len(columns)) - 1
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                box = boxes[ids[start] - 1] if ids[start] else None
                if box is not None:
                    box[:2] = np.minimum(box[:2], (start, row))
                    box[2:] = np.maximum(box[2:], (end, row))
        return boxes

    def segments_info(self, category_ids: Mapping[str, int]) -> list[SegmentInfo]:
        """Entries of COCO's panoptic JSON; ``category_ids``: the id of each class by name."""
        missing = sorted({segment.name for segment in self.segments} - set(category_ids))
        if missing:
            raise RequestError(
                f"every class of a panoptic result has a category id, and {', '.join(missing)} "
                "came without one"
            )
        entries = []
        for segment, (x1, y1, x2, y2) in zip(self.segments, self.boxes.tolist(), strict=True):
            entries.append(
                SegmentInfo(
                    id=segment.id,
                    category_id=category_ids[segment.name],
                    area=segment.area,
                    bbox=[x1, y1, x2 - x1 + 1, y2 - y1 + 1],
                    iscrowd=0,
                )
            )
        return entries

    def id_picture(self) -> Pixels:
        """The ids as COCO's panoptic PNGs hold them: (height, width, 3) uint8 BGR, for
        ``cv2.imwrite``; an id is red + 256 green + 65536 blue."""
        low, middle, high = (self.ids >> shift & 255 for shift in (0, 8, 16))
        picture: Pixels = np.stack([high, middle, low], axis=-1).astype(np.uint8)
        return picture

    def maps(self) -> dict[str, NDArray[Any]]:
        """Pictures that hold the whole answer: ``segments``, the ids, uint16."""
        return {"segments": self.ids.astype(np.uint16)}

    def draw(self, *, opacity: float = 0.5, legend: bool = True) -> Pixels:
        """The frame with its segments in their classes' colours, things with a rim, BGR; new.

        ``legend`` adds the names of the classes that are in the picture.
        """
        return draw_panoptic(
            self.frame.pixels,
            self.ids,
            names=[segment.name for segment in self.segments],
            colours=[segment.colour for segment in self.segments],
            things=[segment.is_thing for segment in self.segments],
            opacity=opacity,
            legend=legend,
        )
