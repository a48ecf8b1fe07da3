"""What a user gets for one frame: the classes of its pixels, or its instances."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeseg.borders import border_step, refine_borders
from edgeseg.errors import RequestError
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.spec import ModelSpec

__all__ = ["AnyOutputs", "AnyResult", "Outputs", "Result", "SemanticResult", "result_of"]


class Result(Protocol):
    """What the results of all tasks have in common: enough to show, write and time them."""

    @property
    def frame(self) -> Frame:
        """The frame that it is of."""

    @property
    def spec(self) -> ModelSpec:
        """The contract of the model that made it."""

    @property
    def geometry(self) -> Geometry:
        """How the frame was fitted to the network."""

    @property
    def finished_ns(self) -> int:
        """``time.monotonic_ns()`` when it was finished, at frame size."""

    @property
    def index(self) -> int:
        """Number of the frame in its source."""

    @property
    def age_ms(self) -> float:
        """Milliseconds from the frame's capture to the finished result."""

    @property
    def summary(self) -> str:
        """One line for a person: what is in the frame."""

    def maps(self) -> dict[str, NDArray[Any]]:
        """Single-channel pictures at frame size that hold the answer; name -> array."""

    def draw(self, *, opacity: float = 0.5, legend: bool = True) -> Pixels:
        """The frame with the answer over it, BGR; a new array."""


# Classes named in the summary of a frame.
_SUMMARISED = 4


@dataclass(frozen=True, eq=False)
class Outputs:
    """What an engine gives for one frame, at network size.

    ``class_map``: (height, width) uint8. ``confidence``: the same shape, probability of the winner
    times 255, or None when the graph has no such output. Both belong to the caller.
    ``network_ns`` is the time in the network, ``head_ns`` in the upsampling kernel (0 when the
    head runs inside the network's graph). ``fit_ns`` is the time for bringing the frame to network
    size and into the engine's memory, where the engine does that itself.
    """

    class_map: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None
    network_ns: int = 0
    head_ns: int = 0
    fit_ns: int = 0


@dataclass(frozen=True, eq=False)
class SemanticResult:
    """The classes of one frame.

    With ``refined`` the borders between them are those of the frame, see `edgeseg.borders`; the
    confidence stays what the network said of its own class. The arrays belong to the user;
    nothing overwrites them later.
    """

    frame: Frame
    spec: ModelSpec
    geometry: Geometry
    outputs: Outputs
    finished_ns: int = field(default_factory=time.monotonic_ns)
    refined: bool = False

    @classmethod
    def from_outputs(
        cls,
        outputs: Outputs,
        frame: Frame,
        geometry: Geometry,
        spec: ModelSpec,
        *,
        refined: bool = False,
    ) -> SemanticResult:
        """The result of ``frame``, finished now, its class map already at frame size."""
        result = cls(frame=frame, spec=spec, geometry=geometry, outputs=outputs, refined=refined)
        # A mask is finished when it is at frame size: bring it there before the clock is read.
        _ = result.class_map
        object.__setattr__(result, "finished_ns", time.monotonic_ns())
        return result

    @cached_property
    def class_map(self) -> NDArray[np.uint8]:
        """Class of every pixel of the frame: (frame height, frame width) uint8."""
        class_map = self.geometry.restore(self.outputs.class_map)
        if self.refined:
            return refine_borders(class_map, self.frame.pixels, border_step(self.geometry))
        return class_map

    @cached_property
    def confidence(self) -> NDArray[np.uint8] | None:
        """Probability x 255 of each pixel's class, at frame size, or None (not exported)."""
        if self.outputs.confidence is None:
            return None
        return self.geometry.restore(self.outputs.confidence)

    @property
    def index(self) -> int:
        """Number of the frame in its source."""
        return self.frame.index

    @property
    def age_ms(self) -> float:
        """Milliseconds from the frame's capture to its finished mask."""
        return (self.finished_ns - self.frame.captured_ns) / 1e6

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Where the class ``name`` is: (frame height, frame width) bool."""
        if name not in self.spec.classes:
            raise RequestError(
                f"the classes of {self.spec.name} are {', '.join(self.spec.classes)}, "
                f"and {name!r} came"
            )
        found: NDArray[np.bool_] = self.class_map == self.spec.classes.index(name)
        return found

    def shares(self) -> dict[str, float]:
        """Share of the frame that each class covers, 0 to 1, every class named."""
        counts = np.bincount(self.class_map.ravel(), minlength=len(self.spec.classes))
        return {
            name: float(count) / self.class_map.size
            for name, count in zip(self.spec.classes, counts, strict=False)
        }

    @property
    def summary(self) -> str:
        """One line for a person: the classes that cover most of the frame."""
        shares = sorted(self.shares().items(), key=lambda entry: -entry[1])
        return ", ".join(f"{name} {share:.0%}" for name, share in shares[:_SUMMARISED] if share)

    def maps(self) -> dict[str, NDArray[Any]]:
        """Pictures that hold the whole answer: ``classes``, the class map."""
        return {"classes": self.class_map}

    def draw(self, *, opacity: float = 0.5, legend: bool = True) -> Pixels:
        """The frame with its classes blended over it, BGR; a new array.

        ``opacity`` 0 shows the frame alone, 1 the classes alone. ``legend`` adds the names of the
        classes that are in the picture.
        """
        # Here, so that kernels and their tests have this class where there is no OpenCV.
        from edgeseg.draw import draw_classes

        return draw_classes(
            self.frame.pixels,
            self.class_map,
            names=self.spec.classes,
            colours=self.spec.colours,
            opacity=opacity,
            legend=legend,
        )


AnyOutputs = Outputs | InstanceOutputs
AnyResult = SemanticResult | InstanceResult


def result_of(
    outputs: AnyOutputs,
    frame: Frame,
    geometry: Geometry,
    spec: ModelSpec,
    postprocessing: Postprocessing = NOTHING_MORE,
) -> AnyResult:
    """The result that belongs to ``outputs``, finished now, its masks already at frame size.

    ``postprocessing``: what is done on the way, checked against ``spec`` before.
    """
    if isinstance(outputs, InstanceOutputs):
        return InstanceResult.from_outputs(
            postprocessing.instances(outputs), frame, geometry, spec, refined=postprocessing.refine
        )
    return SemanticResult.from_outputs(
        outputs, frame, geometry, spec, refined=postprocessing.refine
    )
