"""What a deployed graph expects and gives; it travels inside the ONNX file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from edgeseg.errors import BundleError, RequestError

__all__ = [
    "FITS",
    "MASK_EXTENTS",
    "TASKS",
    "Fit",
    "MaskExtent",
    "ModelSpec",
    "Preprocessing",
    "Task",
    "parse_size",
]

Task = Literal["semantic", "instance"]
Fit = Literal["stretch", "letterbox"]
MaskExtent = Literal["image", "box"]
TASKS: tuple[Task, ...] = ("semantic", "instance")
FITS: tuple[Fit, ...] = ("stretch", "letterbox")
MASK_EXTENTS: tuple[MaskExtent, ...] = ("image", "box")

#: version of the contract between the graph and the code that runs it
CONTRACT = 1


@dataclass(frozen=True)
class Preprocessing:
    """What the network was trained with: ``(channel / 255 - mean) / std`` in ``order``.

    ``mean`` and ``std`` are in the order of ``order``. The deployed graph does all of this itself;
    it is kept here so that a person, and ``verify``, can see it.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    order: Literal["rgb", "bgr"]

    def __post_init__(self) -> None:
        if self.order not in ("rgb", "bgr"):
            raise RequestError(f"the channel order is rgb or bgr, and {self.order!r} came")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise RequestError(
                "mean and std are three numbers each, std above zero, "
                f"and {self.mean} and {self.std} came"
            )


@dataclass(frozen=True)
class ModelSpec:
    """The contract of one graph.

    ``height`` and ``width`` are the network size in pixels; ``classes`` the names in the order of
    the values in the class map; ``colours`` one (red, green, blue) per class; ``ignore`` the label
    value that evaluation leaves out; ``fit`` how a frame is brought to network size.

    An instance model gives at most ``capacity`` instances with masks of ``mask_height`` x
    ``mask_width`` samples; with ``mask_extent`` "image" they span the network's input and are zero
    outside of the instance's box, with "box" they span the box. Its classes hold no background. A
    semantic model has 0 for the three numbers.
    """

    name: str
    architecture: str
    task: Task
    height: int
    width: int
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignore: int
    preprocessing: Preprocessing
    fit: Fit = "stretch"
    confidence: bool = False
    capacity: int = 0
    mask_height: int = 0
    mask_width: int = 0
    mask_extent: MaskExtent = "image"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise RequestError(f"the task is one of {', '.join(TASKS)}, and {self.task!r} came")
        if self.fit not in FITS:
            raise RequestError(f"the fit is one of {', '.join(FITS)}, and {self.fit!r} came")
        if self.height < 1 or self.width < 1:
            raise RequestError(f"a network size of {self.height}x{self.width} cannot be")
        if not 1 <= len(self.classes) <= 255:
            raise RequestError(
                f"a class map of uint8 holds 1 to 255 classes, and {len(self.classes)} came"
            )
        if len(self.classes) != len(self.colours):
            raise RequestError(
                f"{len(self.classes)} classes came with {len(self.colours)} colours; "
                "give one colour per class"
            )
        if self.mask_extent not in MASK_EXTENTS:
            raise RequestError(
                f"masks span one of {', '.join(MASK_EXTENTS)}, and {self.mask_extent!r} came"
            )
        numbers = (self.capacity, self.mask_height, self.mask_width)
        if self.task == "semantic":
            if any(numbers) or self.mask_extent != "image":
                raise RequestError(
                    f"a semantic model has no instances, and a capacity of {self.capacity} with "
                    f"masks of {self.mask_height}x{self.mask_width} came"
                )
        elif min(numbers) < 1 or self.confidence:
            raise RequestError(
                "an instance model has a capacity and a mask size of 1 or more and no confidence "
                f"map, and a capacity of {self.capacity} with masks of "
                f"{self.mask_height}x{self.mask_width} came"
                + (", and a confidence map" if self.confidence else "")
            )

    def to_json(self) -> str:
        """One line of JSON; ``from_json`` reads it back."""
        return json.dumps({"contract": CONTRACT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec that ``to_json`` wrote; raises BundleError for anything else."""
        try:
            values = json.loads(text)
            contract = values.pop("contract")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BundleError(f"the model's description cannot be read ({error})") from error
        if contract != CONTRACT:
            raise BundleError(
                f"the model follows contract {contract} and this EdgeSeg knows {CONTRACT}; "
                "update EdgeSeg, or export the model again"
            )
        try:
            return cls._from_values(values)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"the model's description is incomplete ({error})") from error

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> ModelSpec:
        folded = values["preprocessing"]
        return cls(
            name=str(values["name"]),
            architecture=str(values["architecture"]),
            task=cast(Task, values["task"]),
            height=int(values["height"]),
            width=int(values["width"]),
            classes=tuple(str(name) for name in values["classes"]),
            colours=tuple((int(r), int(g), int(b)) for r, g, b in values["colours"]),
            ignore=int(values["ignore"]),
            preprocessing=Preprocessing(
                mean=tuple(float(value) for value in folded["mean"]),  # type: ignore[arg-type]
                std=tuple(float(value) for value in folded["std"]),  # type: ignore[arg-type]
                order=folded["order"],
            ),
            fit=cast(Fit, values["fit"]),
            confidence=bool(values["confidence"]),
            # Files from before there were instances lack these.
            capacity=int(values.get("capacity", 0)),
            mask_height=int(values.get("mask_height", 0)),
            mask_width=int(values.get("mask_width", 0)),
            mask_extent=cast(MaskExtent, values.get("mask_extent", "image")),
        )


def parse_size(text: str, *, multiple: int = 1) -> tuple[int, int]:
    """``"384x480"`` -> (384, 480), height first.

    Raises RequestError if it is no size, or not a multiple of ``multiple`` both ways; the message
    then names the nearest sizes that are.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", text)
    if match is None:
        raise RequestError(f"a size is HEIGHTxWIDTH, such as 384x480, and {text!r} came")
    height, width = int(match[1]), int(match[2])
    if not (1 <= height <= 16384 and 1 <= width <= 16384):
        raise RequestError(f"a size is between 1 and 16384 pixels each way, and {text!r} came")
    if height % multiple or width % multiple:
        below = "x".join(str(max(side // multiple, 1) * multiple) for side in (height, width))
        above = "x".join(str(-(-side // multiple) * multiple) for side in (height, width))
        nearest = below if below == above else f"{below} or {above}"
        raise RequestError(
            f"this network takes sizes that are multiples of {multiple}, and {height}x{width} "
            f"came; the nearest are {nearest} (frames of any size are fitted to it)"
        )
    return height, width
