"""One file that says how a trained model becomes a small one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeseg.bundle import SHIPPED, Bundle
from edgeseg.calibration.recipe import QuantizationRecipe
from edgeseg.errors import RequestError
from edgeseg.export.models import definition
from edgeseg.export.prune import Rules, Target
from edgeseg.export.prune_request import MEASURES, Measure
from edgeseg.export.recipe import Recipe
from edgeseg.export.structure import Cost
from edgeseg.tomlfile import read_toml

__all__ = ["CompressionRecipe", "Cut"]


@dataclass(frozen=True)
class Cut:
    """One pruning. Exactly one of ``macs``, ``parameters`` and ``milliseconds`` says how far.

    Shares below 1 are of the model that the recipe begins with. ``importance``: see `PruneRequest`;
    ``multiple``, ``minimum``, ``protect``: see `Rules`. ``steps``: importance is measured anew so
    often. ``train_steps``: how long the training after this cut is, in place of the recipe's.
    """

    macs: float | None = None
    parameters: float | None = None
    milliseconds: float | None = None
    importance: Measure = "l2"
    multiple: int = 8
    minimum: int = 8
    protect: tuple[str, ...] = ()
    steps: int = 1
    train_steps: int | None = None

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("macs", "parameters", "milliseconds")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise RequestError(
                "each [[prune]] has one of macs, parameters and milliseconds, and "
                f"{' and '.join(given) or 'none of them'} came"
            )
        if self.importance not in MEASURES:
            raise RequestError(
                f"importance is one of {', '.join(MEASURES)}, and {self.importance!r} came"
            )
        if self.steps < 1 or (self.train_steps is not None and self.train_steps < 1):
            raise RequestError("steps and train_steps of [[prune]] are 1 or more")
        # Both check themselves.
        Target(given[0], getattr(self, given[0]))  # type: ignore[arg-type]
        Rules(self.multiple, self.minimum, self.protect)

    @property
    def rules(self) -> Rules:
        """Which widths layers may have."""
        return Rules(self.multiple, self.minimum, self.protect)

    def target(self, whole: Cost) -> Target:
        """How far, for a recipe that begins with a network of the cost ``whole``."""
        if self.milliseconds is not None:
            return Target("milliseconds", self.milliseconds)
        if self.macs is not None:
            return Target("macs", _absolute(self.macs, whole.macs))
        assert self.parameters is not None
        return Target("parameters", _absolute(self.parameters, whole.parameters))


@dataclass(frozen=True)
class CompressionRecipe:
    """How a model is pruned, trained, and quantized, one after the other.

    ``model``, ``weights`` and ``classes``: as ``edgeseg export`` takes them. ``size``: "HxW" of the
    network.
    ``data`` and ``split``: labelled pictures on which each step is measured, ``pictures`` of them
    at most. ``calibration``: frames without labels, as for ``edgeseg quantize``, up to ``frames``
    of each. ``max_drop``: points of mIoU, or of mask AP, that the best trade-off may lose.

    ``cuts``: prunings, the furthest last; after each of them ``train`` runs, or once if there are
    none. With a table ``[train.distillation]`` the network learns from ``teacher`` too, which is
    the model that the recipe begins with if nothing else is named. ``balance``: as for ``edgeseg
    export``, for what comes out of each training. ``quantize``: None leaves INT8 out.
    """

    model: str
    data: str
    calibration: tuple[str, ...]
    weights: str | None = None
    size: str | None = None
    classes: tuple[str, ...] | None = None
    split: str = "val"
    pictures: int | None = None
    frames: int = 100
    max_drop: float = 1.0
    teacher: str | None = None
    balance: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    train: Recipe | None = None
    quantize: QuantizationRecipe | None = None

    def __post_init__(self) -> None:
        _architecture(self.model)
        if not self.cuts and self.train is None and self.quantize is None:
            raise RequestError(
                "this recipe does nothing; add one or more of [[prune]], [train] and [quantize]"
            )
        if not math.isfinite(self.max_drop) or not 0 <= self.max_drop <= 100:
            raise RequestError(
                f"max_drop is in points of mIoU or AP, 0 to 100, and {self.max_drop:g} came"
            )
        if self.frames < 1 or (self.pictures is not None and self.pictures < 1):
            raise RequestError("frames and pictures of a compression are 1 or more")
        if not self.calibration and (self.cuts or self.quantize is not None):
            raise RequestError(
                "pruning and INT8 need frames like those the model will see; name a folder, a "
                "list or a video in calibration"
            )
        distils = self.train is not None and self.train.distillation is not None
        if self.teacher is not None and not distils:
            raise RequestError("a teacher goes with a table [train.distillation]; add one")
        if self.balance and self.train is None:
            raise RequestError("classes are balanced after a training; add a table [train]")

    @property
    def architecture(self) -> str:
        """The name under which `edgeseg.export.models` knows the network."""
        return _architecture(self.model)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> CompressionRecipe:
        """The recipe in a TOML file; RequestError says what is missing or unknown in it."""
        return cls.from_dict(read_toml(path), f"the recipe {path}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "the recipe") -> CompressionRecipe:
        """The recipe of the plain values in such a file."""
        values = dict(values)
        for key in ("model", "data"):
            if not isinstance(values.get(key), str):
                raise RequestError(f'{name} does not say {key}; add {key} = "..."')
        cuts, train = values.pop("prune", []), values.pop("train", None)
        quantize = values.pop("quantize", None)
        for key, kind, form in (
            (cuts, list, "tables [[prune]]"),
            (train, Mapping, "a table [train]"),
            (quantize, Mapping, "a table [quantize]"),
        ):
            if key is not None and not isinstance(key, kind):
                raise RequestError(f"{name} does not fit: {form} is wanted, and {key!r} came")
        try:
            for key in ("calibration", "balance"):
                uris = values.get(key, ())
                values[key] = (uris,) if isinstance(uris, str) else tuple(uris)
            if "classes" in values:
                values["classes"] = tuple(values["classes"])
            return cls(
                **values,
                cuts=tuple(_cut(entry) for entry in cuts),
                train=None
                if train is None
                else Recipe.from_dict(
                    train, name=f"[train] of {name}", model=_architecture(values["model"])
                ),
                quantize=None
                if quantize is None
                else QuantizationRecipe.from_dict(quantize, f"[quantize] of {name}"),
            )
        except RequestError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"{name} does not fit: {error}") from error


def _architecture(model: str) -> str:
    if model in SHIPPED:
        return Bundle.open(model).spec.architecture
    return definition(model).name


def _absolute(amount: float, whole: int) -> float:
    return amount * whole if amount < 1 else amount


def _cut(entry: Mapping[str, Any]) -> Cut:
    values = dict(entry)
    if "protect" in values:
        values["protect"] = tuple(values["protect"])
    return Cut(**values)
