"""How a model is quantized: every choice that has an influence on the numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from edgeseg.calibration.ranges import METHODS
from edgeseg.errors import RequestError
from edgeseg.tomlfile import read_toml

__all__ = ["Finetuning", "QuantizationRecipe"]


@dataclass(frozen=True)
class Finetuning:
    """How long and how strongly the integers are trained towards the floating-point outputs.

    ``steps`` of ``batch`` frames with Adam; the learning rates (of the weights, and of the
    logarithms of the activation scales) rise over the first twentieth and fall to 0 along a cosine.
    ``views``: factors on the network size at which the teacher looks at each frame, always also
    mirrored. ``seed`` fixes order and mirroring. ``frames``: more frames than were calibrated with
    may be used, up to so many from each source.
    """

    steps: int = 600
    batch: int = 4
    learning_rate: float = 3e-5
    scale_learning_rate: float = 1e-3
    views: tuple[float, ...] = (1.0, 1.333)
    frames: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.frames) < 1:
            raise RequestError(
                "fine-tuning takes at least one step of one frame, and "
                f"{self.steps} steps of {self.batch} of {self.frames} frames came"
            )
        if not self.views or min(self.views) <= 0:
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
                finetune = _made(Finetuning, finetune)
            made: QuantizationRecipe = _made(cls, {**given, "finetune": finetune})
            return made
        except TypeError as error:
            raise RequestError(f"{name} does not fit: {error}") from error

    def to_dict(self) -> dict[str, object]:
        """Plain values; ``from_dict`` reads them back."""
        return asdict(self)


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    known = {field.name: field.type for field in fields(kind)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise TypeError(f"it says {name}, and knows {', '.join(known)}")
        given[name] = tuple(value) if isinstance(value, list) else value
        wanted = str(known[name])
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, (int, float)) and not isinstance(value, bool),
            "bool": isinstance(value, bool),
            "str": isinstance(value, str),
        }.get(wanted, True)
        if not fits:
            raise TypeError(f"{name} is {value!r}, and a value of type {wanted} is wanted")
    return kind(**given)
