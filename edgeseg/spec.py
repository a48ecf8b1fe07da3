"""What a deployed graph expects and gives; it travels inside the ONNX file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from edgeseg.errors import BundleError, RequestError
from edgeseg.jsonfile import parse_json

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

# Far above any network that runs on a device, and far below what its pictures would take.
_LONGEST_SIDE = 16384
_LARGEST_AREA = 1 << 26
_MOST_INSTANCES = 10_000
_LARGEST_MASKS = 1 << 30
_LONGEST_NAME = 200
# Characters that do something to the terminal or the page that a name is shown on: controls, halves
# of surrogate pairs, line ends, and what turns the direction of writing.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


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
        if (
            len(self.mean) != 3
            or len(self.std) != 3
            or min(self.std) <= 0
            or not all(math.isfinite(value) for value in (*self.mean, *self.std))
        ):
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
        if min(self.height, self.width) < 1 or not _fits(self.height, self.width):
            raise RequestError(f"a network size of {self.height}x{self.width} cannot be")
        for name in (self.name, self.architecture, *self.classes):
            if len(name) > _LONGEST_NAME or _UNPRINTABLE.search(name):
                raise RequestError(
                    f"a name has at most {_LONGEST_NAME} characters, all of them visible, and "
                    f"{name[:40]!a} came"
                )
        if not 1 <= len(self.classes) <= 255:
            raise RequestError(
                f"a class map of uint8 holds 1 to 255 classes, and {len(self.classes)} came"
            )
        if len(self.classes) != len(self.colours):
            raise RequestError(
                f"{len(self.classes)} classes came with {len(self.colours)} colours; "
                "give one colour per class"
            )
        if any(not 0 <= level <= 255 for colour in self.colours for level in colour):
            raise RequestError("a colour is three numbers from 0 to 255, and another one came")
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
        elif (
            self.capacity > _MOST_INSTANCES
            or not _fits(self.mask_height, self.mask_width)
            or self.capacity * self.mask_height * self.mask_width > _LARGEST_MASKS
        ):
            raise RequestError(
                f"{self.capacity} masks of {self.mask_height}x{self.mask_width} are more than fit "
                "into memory; give fewer, or smaller ones"
            )

    def to_json(self) -> str:
        """One line of JSON; ``from_json`` reads it back."""
        return json.dumps({"contract": CONTRACT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec that ``to_json`` wrote; raises BundleError for anything else."""
        try:
            values = parse_json(text)
            contract = values.pop("contract")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BundleError(f"the model's description cannot be read ({error})") from error
        if contract != CONTRACT or not isinstance(contract, int):
            raise BundleError(
                f"the model follows contract {str(contract)[:20]} and this EdgeSeg knows "
                f"{CONTRACT}; update EdgeSeg, or export the model again"
            )
        try:
            return cls._from_values(values)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"the model's description is incomplete ({error})") from error

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> ModelSpec:
        folded = values["preprocessing"]
        return cls(
            name=_text(values["name"]),
            architecture=_text(values["architecture"]),
            task=cast(Task, _text(values["task"])),
            height=_whole(values["height"]),
            width=_whole(values["width"]),
            classes=tuple(_text(name) for name in _list(values["classes"])),
            colours=tuple(
                (_whole(r), _whole(g), _whole(b)) for r, g, b in _list(values["colours"])
            ),
            ignore=_whole(values["ignore"]),
            preprocessing=Preprocessing(
                mean=tuple(_real(value) for value in _list(folded["mean"])),  # type: ignore[arg-type]
                std=tuple(_real(value) for value in _list(folded["std"])),  # type: ignore[arg-type]
                order=cast('Literal["rgb", "bgr"]', _text(folded["order"])),
            ),
            fit=cast(Fit, _text(values["fit"])),
            confidence=_truth(values["confidence"]),
            # Files from before there were instances lack these.
            capacity=_whole(values.get("capacity", 0)),
            mask_height=_whole(values.get("mask_height", 0)),
            mask_width=_whole(values.get("mask_width", 0)),
            mask_extent=cast(MaskExtent, _text(values.get("mask_extent", "image"))),
        )


def _fits(height: int, width: int) -> bool:
    return max(height, width) <= _LONGEST_SIDE and height * width <= _LARGEST_AREA


# Of values from JSON, each as it is or a TypeError: "3" is no 3, and 3.5 is no whole number.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{str(value)[:40]!r} is no whole number")
    return value


def _real(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{str(value)[:40]!r} is no number")
    return float(value)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is no list")
    return value


def parse_size(text: str, *, multiple: int = 1) -> tuple[int, int]:
    """``"384x480"`` -> (384, 480), height first.

    Raises RequestError if it is no size, or not a multiple of ``multiple`` both ways; the message
    then names the nearest sizes that are.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*[xX×]\s*([0-9]{1,18})\s*", text)
    if match is None:
        raise RequestError(f"a size is HEIGHTxWIDTH, such as 384x480, and {text!r} came")
    height, width = int(match[1]), int(match[2])
    if not (1 <= height <= _LONGEST_SIDE and 1 <= width <= _LONGEST_SIDE):
        raise RequestError(
            f"a size is between 1 and {_LONGEST_SIDE} pixels each way, and {text!r} came"
        )
    if height % multiple or width % multiple:
        below = "x".join(str(max(side // multiple, 1) * multiple) for side in (height, width))
        above = "x".join(str(-(-side // multiple) * multiple) for side in (height, width))
        nearest = below if below == above else f"{below} or {above}"
        raise RequestError(
            f"this network takes sizes that are multiples of {multiple}, and {height}x{width} "
            f"came; the nearest are {nearest} (frames of any size are fitted to it)"
        )
    return height, width
