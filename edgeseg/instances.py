"""The instances of one frame: what an engine gives, and what a user gets."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.frame import Frame, Pixels
from edgeseg.framemasks import FrameMasks
from edgeseg.geometry import Geometry
from edgeseg.kernels import CocoRle, MaskGrid
from edgeseg.spec import ModelSpec

__all__ = ["CocoInstance", "CocoSegmentation", "InstanceOutputs", "InstanceResult"]

# Far outside of any frame.
_FARTHEST = 1 << 24


class CocoSegmentation(TypedDict):
    """A mask in COCO's JSON: ``size`` is [height, width], ``counts`` compressed run lengths."""

    size: list[int]
    counts: str


class CocoInstance(TypedDict):
    """One entry of COCO's results; ``bbox`` is x, y, width, height in pixels of the frame."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float
    segmentation: CocoSegmentation


@dataclass(frozen=True, eq=False)
class InstanceOutputs:
    """What an engine gives for the n instances of one frame, best score first, at network size.

    ``boxes``: (n, 4) float32, x1, y1, x2, y2 in network pixels. ``scores``: (n,) float32, 0 to 1.
    ``labels``: (n,) int32, indices into the spec's classes. ``masks``: (n, mask height, mask
    width) uint8, probability times 255, over what the spec's ``mask_extent`` says. All belong to
    the caller. Times as those of ``Outputs``; the head is the assembly of the masks.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]
    masks: NDArray[np.uint8]
    network_ns: int = 0
    head_ns: int = 0
    fit_ns: int = 0

    @property
    def class_map(self) -> NoReturn:
        """RequestError: only semantic models give one."""
        raise RequestError(
            "this needs a semantic model's class map, and an instance model gives boxes and masks"
        )

    @property
    def confidence(self) -> None:
        """None: instances have scores."""
        return None


@dataclass(frozen=True, eq=False)
class InstanceResult:
    """The instances of one frame, best score first.

    Boxes and masks are at frame size; with ``refined`` the borders of the masks are those of the
    frame, see `edgeseg.borders`. Masks are kept as packed bits of the part of the frame that
    each can reach; the other forms are made when they are asked for. The arrays belong to the
    user; nothing overwrites them later.
    """

    frame: Frame
    spec: ModelSpec
    geometry: Geometry
    outputs: InstanceOutputs
    finished_ns: int = field(default_factory=time.monotonic_ns)
    refined: bool = False

    @classmethod
    def from_outputs(
        cls,
        outputs: InstanceOutputs,
        frame: Frame,
        geometry: Geometry,
        spec: ModelSpec,
        *,
        refined: bool = False,
    ) -> InstanceResult:
        """The result of ``frame``, finished now, its masks already at frame size."""
        result = cls(frame=frame, spec=spec, geometry=geometry, outputs=outputs, refined=refined)
        # A mask is finished when it is at frame size: bring it there before the clock is read.
        _ = result.frame_masks
        object.__setattr__(result, "finished_ns", time.monotonic_ns())
        return result

    def __len__(self) -> int:
        return len(self.outputs.scores)

    @cached_property
    def boxes(self) -> NDArray[np.float32]:
        """x1, y1, x2, y2 in pixels of the frame and clipped to it: (n, 4) float32."""
        boxes = self._unclipped()
        sides = np.array([self.geometry.frame_width, self.geometry.frame_height] * 2, np.float32)
        return np.clip(boxes, np.float32(0), sides)

    @property
    def scores(self) -> NDArray[np.float32]:
        """(n,) float32, 0 to 1."""
        return self.outputs.scores

    @property
    def labels(self) -> NDArray[np.int32]:
        """Index of each instance's class: (n,) int32."""
        return self.outputs.labels

    @property
    def names(self) -> list[str]:
        """Name of each instance's class."""
        return [self.spec.classes[label] for label in self.labels.tolist()]

    @cached_property
    def frame_masks(self) -> FrameMasks:
        """The masks at frame size, as packed bits of the part of the frame that each can reach."""
        levels = np.ascontiguousarray(self.outputs.masks)
        if self.spec.mask_extent == "box":
            grid = MaskGrid(levels, pastes=self._pastes())
        else:
            grid = MaskGrid(levels, boxes=np.ascontiguousarray(self.outputs.boxes))
        masks = FrameMasks.of(grid, self.geometry)
        return masks.refined(self.frame.pixels) if self.refined else masks

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """Where each instance is: (n, frame height, frame width) bool."""
        return self.frame_masks.arrays()

    def mask_bits(self) -> NDArray[np.uint8]:
        """The masks as ``numpy.packbits`` makes them along the last axis.

        (n, frame height, ceil(frame width / 8)) uint8; ``numpy.unpackbits`` with ``axis=-1`` and
        ``count`` the frame's width gives the pixels.
        """
        return self.frame_masks.all_bits()

    def rles(self) -> list[CocoRle]:
        """The masks as COCO's compressed run lengths, as ``pycocotools.mask`` takes them."""
        return self.frame_masks.rles()

    def polygons(self) -> list[list[NDArray[np.int32]]]:
        """The outlines of each instance's parts: (m, 2) int32 each, x and y of border pixels.

        Outer borders only, by ``cv2.findContours``; an instance that covers no pixel has none.
        """
        # Here, so that kernels and their tests have this class where there is no OpenCV.
        import cv2

        found = []
        for index in range(len(self)):
            top, left, mask = self.frame_masks.window(index)
            outlines: Sequence[Any] = ()
            if mask.size:
                outlines, _ = cv2.findContours(
                    mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
                )
            shift = np.array([left, top], np.int32)
            found.append([outline.reshape(-1, 2).astype(np.int32) + shift for outline in outlines])
        return found

    @cached_property
    def instance_map(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Number of the best instance at each pixel, from 1 on, 0 for none: (height, width).

        uint8 where the model's capacity fits, else uint16.
        """
        element = np.uint8 if self.spec.capacity < 256 else np.uint16
        numbers = np.zeros((self.geometry.frame_height, self.geometry.frame_width), element)
        for index in reversed(range(len(self))):
            top, left, mask = self.frame_masks.window(index)
            numbers[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = index + 1
        return numbers

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[CocoInstance]:
        """Entries of COCO's results, ready for ``json.dump``.

        ``category_ids``: the id of each class of the model; None counts them from 1.
        """
        if category_ids is None:
            category_ids = range(1, len(self.spec.classes) + 1)
        if len(category_ids) != len(self.spec.classes):
            raise RequestError(
                f"{self.spec.name} has {len(self.spec.classes)} classes, and "
                f"{len(category_ids)} category ids came; give one per class"
            )
        entries = []
        for (x1, y1, x2, y2), score, label, rle in zip(
            self.boxes.tolist(),
            self.scores.tolist(),
            self.labels.tolist(),
            self.rles(),
            strict=True,
        ):
            entries.append(
                CocoInstance(
                    image_id=image_id,
                    category_id=int(category_ids[label]),
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    score=score,
                    segmentation=CocoSegmentation(
                        size=rle["size"], counts=rle["counts"].decode("ascii")
                    ),
                )
            )
        return entries

    def to_supervision(self) -> Any:
        """The same as ``supervision.Detections``; RequestError where that is not installed."""
        if importlib.util.find_spec("supervision") is None:
            raise RequestError(
                "to_supervision() needs the package supervision, and it is not installed; "
                "`pip install supervision` adds it"
            )
        supervision = importlib.import_module("supervision")
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(np.int64),
            data={"class_name": np.array(self.names, dtype=np.str_)},
        )

    @property
    def index(self) -> int:
        """Number of the frame in its source."""
        return self.frame.index

    @property
    def age_ms(self) -> float:
        """Milliseconds from the frame's capture to its finished masks."""
        return (self.finished_ns - self.frame.captured_ns) / 1e6

    @property
    def summary(self) -> str:
        """One line for a person: how many of what."""
        if not len(self):
            return "nothing found"
        return ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())

    def maps(self) -> dict[str, NDArray[Any]]:
        """Pictures that hold the whole answer: ``instances``, see ``instance_map``."""
        return {"instances": self.instance_map}

    @property
    def class_map(self) -> NoReturn:
        """RequestError: only semantic models give one."""
        raise RequestError(
            f"{self.spec.name} finds instances and has no class map; take masks, boxes, labels and "
            "scores, or instance_map"
        )

    @property
    def confidence(self) -> None:
        """None: instances have scores."""
        return None

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Where any instance of the class ``name`` is: (frame height, frame width) bool, new."""
        if name not in self.spec.classes:
            raise RequestError(
                f"the classes of {self.spec.name} are {', '.join(self.spec.classes)}, "
                f"and {name!r} came"
            )
        whole = np.zeros((self.geometry.frame_height, self.geometry.frame_width), np.bool_)
        for index in np.flatnonzero(self.labels == self.spec.classes.index(name)).tolist():
            top, left, mask = self.frame_masks.window(index)
            whole[top : top + mask.shape[0], left : left + mask.shape[1]] |= mask
        return whole

    def shares(self) -> dict[str, float]:
        """Share of the frame, 0 to 1, in which each class has the best instance; all named."""
        counts = np.bincount(self.instance_map.ravel(), minlength=len(self) + 1)[1:]
        covered = np.bincount(self.labels, counts, minlength=len(self.spec.classes))
        return {
            name: float(count) / self.instance_map.size
            for name, count in zip(self.spec.classes, covered, strict=True)
        }

    def draw(
        self, *, opacity: float = 0.5, legend: bool = True, least_score: float = 0.3
    ) -> Pixels:
        """The frame with its instances over it, BGR; a new array.

        Masks in the colours of their classes with ``opacity`` (0 leaves them out, 1 hides what is
        below), boxes around them, and with ``legend`` name and score at each box. Instances with a
        lower score than ``least_score`` are not drawn: a network gives many of which it is not
        sure, for whoever wants to choose.
        """
        # Here, so that kernels and their tests have this class where there is no OpenCV.
        from edgeseg.draw import draw_instances

        shown = np.flatnonzero(self.scores >= least_score)
        return draw_instances(
            self.frame.pixels,
            windows=[self.frame_masks.window(index) for index in shown.tolist()],
            boxes=self.boxes[shown],
            labels=self.labels[shown],
            scores=self.scores[shown],
            names=self.spec.classes,
            colours=self.spec.colours,
            opacity=opacity,
            legend=legend,
        )

    def _unclipped(self) -> NDArray[np.float32]:
        """The boxes in pixels of the frame, wherever they lie."""
        at = self.geometry
        start = np.array([at.left, at.top] * 2, np.float32)
        scale = np.array(
            [at.frame_width / at.inner_width, at.frame_height / at.inner_height] * 2, np.float32
        )
        # A network in trouble gives boxes without numbers; they have no pixels.
        with np.errstate(invalid="ignore", over="ignore"):
            boxes: NDArray[np.float32] = (self.outputs.boxes - start) * scale
        return boxes

    def _pastes(self) -> NDArray[np.int32]:
        """The rectangle of pixels that each mask, in a border of one empty sample, is pasted into.

        First column and row, last column and row, as torchvision's ``paste_masks_in_image`` takes
        them: the box enlarged by the border about its centre, in float32, cut off to integers.
        """
        boxes = self._unclipped()
        half = np.float32(0.5)
        # torchvision's masks are square; here each axis has its own border.
        sides = np.array([self.spec.mask_width, self.spec.mask_height], np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            centre = (boxes[:, 2:] + boxes[:, :2]) * half
            reach = (boxes[:, 2:] - boxes[:, :2]) * half * ((sides + 2) / sides)
            corners = np.concatenate([centre - reach, centre + reach], axis=1)
        known = np.isfinite(corners).all(axis=1)
        pastes = np.clip(np.where(known[:, None], corners, 0), -_FARTHEST, _FARTHEST)
        # A box with a NaN has no pixel: its last one comes before its first.
        return np.where(known[:, None], np.trunc(pastes), [0, 0, -1, -1]).astype(np.int32)
