"""How a model is quantized: every choice that has an influence on the numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from edgeseg.calibration.ranges import METHODS
from edgeseg.errors import RequestError
from edgeseg.tomlfile import read_toml

__all__ = ["Finetuning", "QuantizationRecipe"]


@dataclass(frozen=True)
class Finetuning:
    """How long and how strongly the integers are trained towards the floating-point outputs.

    ``steps`` of ``batch`` frames with Adam; the learning rates (of the weights, relative to the
    size of each output channel, and of the logarithms of the activation scales) rise over the first
    twentieth and fall to 0 along a cosine.
    ``views``: factors on the network size at which the teacher looks at each frame, always also
    mirrored. ``seed`` fixes order and mirroring. ``frames``: more frames than were calibrated with
    may be used, up to so many from each source. ``mixed_precision``: products in bf16, rounding to
    int8 in float32 all the same; several times faster on processors that have bf16, slower on
    others.
    """

    steps: int = 600
    batch: int = 4
    learning_rate: float = 3e-4
    scale_learning_rate: float = 1e-3
    views: tuple[float, ...] = (1.0, 1.333)
    frames: int = 400
    mixed_precision: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.frames) < 1:
            raise RequestError(
                "fine-tuning takes at least one step of one frame, and "
                f"{self.steps} steps of {self.batch} of {self.frames} frames came"
            )
        rates = (self.learning_rate, self.scale_learning_rate)
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise RequestError(f"learning rates are 0 or more, and {rates[0]} and {rates[1]} came")
        if self.seed < 0:
            raise RequestError(f"a seed is a whole number from 0 on, and {self.seed} came")
        if not self.views or not all(math.isfinite(view) and view > 0 for view in self.views):
            raise RequestError(f"the teacher's views are factors above 0, and {self.views} came")


@dataclass(frozen=True)
class QuantizationRecipe:
    """``ranges`` and ``percentile``: see ``threshold`` in ranges.py; ``weights``: "minmax" or
    "mse", per output channel. ``equalize``: balance of cross-layer equalization, 0 leaves it out.
    ``frames``: calibration frames at most, from each source. ``floats``: layers to leave in
    floating point whatever they cost. ``half``: what is not INT8 becomes FP16. ``finetune``: None
    leaves the training out."""

    ranges: str = "mse"
    percentile: float = 99.99
    weights: str = "minmax"
    equalize: float = 0.65
    frames: int = 100
    floats: tuple[str, ...] = ()
    half: bool = False
    finetune: Finetuning | None = None

    def __post_init__(self) -> None:
        if self.ranges not in METHODS:
            raise RequestError(f"ranges are one of {', '.join(METHODS)}, and {self.ranges!r} came")
        if self.weights not in ("minmax", "mse"):
            raise RequestError(f"weights are minmax or mse, and {self.weights!r} came")
        if not 0 < self.percentile <= 100:
            raise RequestError(f"a percentile is above 0 and at most 100, not {self.percentile}")
        if not 0 <= self.equalize <= 1:
            raise RequestError(f"equalize is between 0 and 1, and {self.equalize} came")
        if self.frames < 1:
            raise RequestError(f"calibration takes at least one frame, and {self.frames} came")
        twice = [name for name in self.floats if self.floats.count(name) > 1]
        if twice:
            raise RequestError(f"a layer is left in floating point once, and {twice[0]} came twice")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> QuantizationRecipe:
        """The recipe in a TOML file, ``[finetune]`` a table in it."""
        return cls.from_dict(read_toml(path), f"the recipe {path}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "the recipe") -> QuantizationRecipe:
        """The recipe of plain values; RequestError for one that it does not know."""
        given = dict(values)
        finetune = given.pop("finetune", None)
        try:
            if finetune is not None:
                if not isinstance(finetune, Mapping):
                    raise TypeError(f"finetune is {finetune!r}, and a table [finetune] is wanted")
                finetune = Finetuning(**_fitting(Finetuning, finetune))
            return cls(**_fitting(cls, given), finetune=finetune)
        except (TypeError, OverflowError) as error:
            raise RequestError(f"{name} does not fit: {error}") from error

    def to_dict(self) -> dict[str, object]:
        """Plain values; ``from_dict`` reads them back."""
        return asdict(self)


# By the types of the fields below, as they are written there: what it is for a person, and a
# function that gives the value in that type, or None for one of another.
_TYPES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "int": ("a whole number", lambda value: value if type(value) is int else None),
    "float": ("a number", lambda value: float(value) if type(value) in (int, float) else None),
    "bool": ("true or false", lambda value: value if type(value) is bool else None),
    "str": ("a text", lambda value: value if type(value) is str else None),
    "tuple[str, ...]": ("a list of texts", lambda value: _each("str", value)),
    "tuple[float, ...]": ("a list of numbers", lambda value: _each("float", value)),
}


def _each(kind: str, values: Any) -> tuple[Any, ...] | None:
    if not isinstance(values, (list, tuple)):
        return None
    found = tuple(_TYPES[kind][1](value) for value in values)
    return None if None in found else found


def _fitting(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` in the types of the fields of ``kind``; TypeError for one that does not fit."""
    # A field that is a table of its own is none of these.
    known = {field.name: str(field.type) for field in fields(kind) if str(field.type) in _TYPES}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise TypeError(f"it says {name}, and knows {', '.join(known)}")
        wanted, fitted = _TYPES[known[name]]
        # Always the same type, so that 1 and 1.0 are one recipe.
        found[name] = fitted(value)
        if found[name] is None:
            raise TypeError(f"{name} is {value!r}, and {wanted} is wanted")
    return found
