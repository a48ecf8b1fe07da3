"""What decides the outcome of a training run, in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

from edgeseg.errors import RequestError
from edgeseg.export.distillation import Distillation
from edgeseg.export.models import definition
from edgeseg.tomlfile import read_toml

__all__ = ["FRAMES_PREFIX", "LOSSES", "OPTIMIZERS", "Recipe", "Source", "sources_of"]

LOSSES = ("ohem", "bootstrapped")
#: what the URI of frames without labels begins with
FRAMES_PREFIX = "frames:"
#: samples of a batch, if nobody says
_BATCH = 8
#: beginning of a model's name -> recipe of its authors
_PUBLISHED = {
    "bisenetv1": "bisenetv1.toml",
    "bisenetv2": "bisenetv2.toml",
    "fchardnet": "fchardnet.toml",
    "yolact": "yolact.toml",
}
#: "sgd" has a momentum of 0.9
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Source:
    """One data set of a recipe: its URI, its split, and how many samples of each batch it gives.

    A URI ``frames:`` names a folder, a list or a video without labels, for runs with a teacher.
    ``augment``: how much of the recipe's scale, aspect and colour changes its samples get, 0 to 1.
    """

    uri: str
    share: int
    split: str = "train"
    augment: float = 1.0

    @property
    def unlabelled(self) -> bool:
        """Whether these are frames without labels."""
        return self.uri.startswith(FRAMES_PREFIX)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run, apart from the machine.

    ``sources`` add up to the batch. ``crop`` is (height, width) in pixels; ``full_height`` the
    height at which a whole picture counts as scale 1. ``learning_rate`` falls to zero as
    ``(1 - step / steps) ** power`` after ``warmup`` steps of linear rise. ``average`` is the decay
    of the weights' exponential moving average, which is what is evaluated and saved.
    ``accumulate``: batches of which the gradients make one step.

    Of semantic networks alone: ``loss`` is "ohem" (BiSeNet's) or "bootstrapped" (FC-HarDNet's);
    ``class_weights`` raises rare classes by ``frequency ** -class_weights``, clipped to 0.5-5; a
    pixel at a distance of d pixels from a boundary counts
    ``1 + boundary_weight * exp(-d / boundary_reach)`` times. YOLACT has its own loss.

    ``distillation``: how to learn from a teacher as well.
    """

    model: str
    sources: tuple[Source, ...]
    steps: int
    crop: tuple[int, int] = (288, 384)
    full_height: int = 384
    scale: tuple[float, float] = (0.6, 1.8)
    aspect: float = 1.3
    colour: float = 0.5
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    power: float = 0.9
    warmup: int = 100
    average: float = 0.998
    loss: str = "ohem"
    class_weights: float = 0.5
    boundary_weight: float = 0.0
    boundary_reach: float = 5.0
    distillation: Distillation | None = None
    auxiliary_heads: bool = False
    mixed_precision: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise RequestError(
                "training needs data: name at least one [[source]] in the recipe, or give --data"
            )
        if any(source.uri == FRAMES_PREFIX for source in self.sources):
            raise RequestError(
                f"{FRAMES_PREFIX} goes on with a folder, a list or a video: {FRAMES_PREFIX}DIR"
            )
        if any(not isinstance(source.share, int) or source.share < 1 for source in self.sources):
            raise RequestError("the share of a source is a whole number of samples, 1 or more")
        if any(not 0 <= source.augment <= 1 for source in self.sources):
            raise RequestError("the augment of a source is between 0 and 1")
        if self.batch < 2:
            raise RequestError(
                "batch norm needs batches of two samples or more, "
                f"and the shares add up to {self.batch}; raise a source's share"
            )
        if self.steps < 1:
            raise RequestError(f"a recipe has at least one step, and {self.steps} came")
        if self.accumulate < 1:
            raise RequestError(
                f"a step has at least one batch, and accumulate is {self.accumulate}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise RequestError(
                f"the optimizer is one of {', '.join(OPTIMIZERS)}, and {self.optimizer!r} came"
            )
        if self.loss not in LOSSES:
            raise RequestError(f"the loss is one of {', '.join(LOSSES)}, and {self.loss!r} came")
        if self.boundary_weight < 0 or self.boundary_reach <= 0:
            raise RequestError(
                "boundary_weight is 0 or more and boundary_reach above 0 pixels, and "
                f"{self.boundary_weight} and {self.boundary_reach} came"
            )
        entry = definition(self.model)
        stride = entry.network.stride
        least = max(stride, entry.network.smallest)
        if len(self.crop) != 2 or min(self.crop) < least or any(n % stride for n in self.crop):
            raise RequestError(
                f"{self.model} trains on crops of [height, width], both {least} or more and "
                f"multiples of {stride}, and {list(self.crop)} came"
            )

    @property
    def batch(self) -> int:
        """Samples of one step."""
        return sum(source.share for source in self.sources)

    def check_labels(self, teacher: object | None) -> None:
        """RequestError when frames have no labels, and nobody who gives them some."""
        if teacher is None and any(source.unlabelled for source in self.sources):
            raise RequestError(
                f"{FRAMES_PREFIX} has no labels, so a teacher gives them; name one with "
                "`edgeseg distill ... --teacher`"
            )

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | None = None,
        sources: tuple[Source, ...] = (),
    ) -> Recipe:
        """The recipe in a TOML file; RequestError names what is missing or unknown in it.

        ``model``: what it is for, which a recipe that names a model must agree with. ``sources``
        take the place of its own.
        """
        return cls.from_dict(
            read_toml(path), name=f"the recipe {path}", model=model, sources=sources
        )

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        name: str = "the recipe",
        model: str | None = None,
        sources: tuple[Source, ...] = (),
    ) -> Recipe:
        """As ``read``, of the plain values in such a file; ``name`` is what errors call it."""
        values = dict(values)
        if model is not None and values.setdefault("model", model) != model:
            raise RequestError(f"{name} is for {values['model']}, and {model} is to be trained")
        try:
            own = tuple(Source(**entry) for entry in values.pop("source", []))
            for key in ("crop", "scale"):
                if key in values:
                    values[key] = tuple(values[key])
            if "distillation" in values:
                table = dict(values["distillation"])
                table["layers"] = tuple(tuple(pair) for pair in table.get("layers", ()))
                values["distillation"] = Distillation(**table)
            return cls(sources=sources or own, **values)
        except RequestError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"{name} does not fit: {error}") from error

    @classmethod
    def published(cls, model: str, sources: tuple[Source, ...]) -> Recipe:
        """The recipe that the authors of ``model`` publish, as far as this training has its parts.

        Its crop and its number of steps are for their data and their machines.
        """
        name = next((name for start, name in _PUBLISHED.items() if model.startswith(start)), None)
        if name is None:
            definition(model)
            raise RequestError(
                f"there is no published recipe for {model} here; give one with --recipe FILE.toml"
            )
        place = files("edgeseg.export") / "recipes" / name
        with as_file(place) as path:
            return cls.read(path, model=model, sources=sources)


def sources_of(uris: Sequence[str], shares: str | None, split: str) -> tuple[Source, ...]:
    """The sources that a command line names; ``shares`` is "3,5", one number for each of ``uris``.

    Without ``shares`` all have the same, and eight in all or a few more.
    """
    if shares is None:
        return tuple(Source(uri, -(-_BATCH // len(uris)), split) for uri in uris)
    numbers = shares.split(",")
    if len(numbers) != len(uris) or not all(
        text.isascii() and text.isdigit() and int(text) for text in numbers
    ):
        raise RequestError(
            f"shares are whole numbers of 1 or more, one for each of {len(uris)} data sets, "
            f"and {shares!r} came"
        )
    return tuple(Source(uri, int(text), split) for uri, text in zip(uris, numbers, strict=True))
