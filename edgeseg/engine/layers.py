"""How long the layers of a network take, as its library says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from edgeseg.errors import EngineError, RequestError
from edgeseg.frame import Pixels

__all__ = ["LayerTime", "LayerTimes", "TimesLayers"]


class LayerTime(NamedTuple):
    """One layer as its library runs it: several of the graph's operators may be fused in it.

    ``ms``: median over the runs. ``kind``: what it is, such as "Convolution f32"; empty where the
    library does not say.
    """

    name: str
    ms: float
    kind: str = ""


@runtime_checkable
class TimesLayers(Protocol):
    """An engine that can say how long each layer takes."""

    def layer_times(
        self, images: Sequence[Pixels]
    ) -> Sequence[LayerTime] | Sequence[tuple[str, float]]:
        """Each layer in the order in which they run, the median over network inputs.

        ``images``: (height, width, 3) uint8 BGR each; the first is run once more to warm up.
        RequestError for none.
        """


class LayerTimes:
    """Milliseconds of each layer over several runs, taken up one run after the other."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._ms: dict[str, list[float]] = {}

    def add(self, name: str, kind: str, ms: float) -> None:
        """One layer of the run under way."""
        self._kinds.setdefault(name, kind)
        self._ms.setdefault(name, []).append(ms)

    def medians(self) -> list[LayerTime]:
        """The layers in the order in which they came first; EngineError when none came."""
        if not self._ms:
            raise EngineError("the library reported no times of layers; leave out --layers")
        return [
            LayerTime(name, float(np.median(ms)), self._kinds[name])
            for name, ms in self._ms.items()
        ]


def checked_images(images: Sequence[Pixels]) -> None:
    """RequestError when there are no images to time layers on."""
    if not images:
        raise RequestError("layers are timed on one image or more, and none came")
