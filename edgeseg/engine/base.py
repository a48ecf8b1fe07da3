"""The contract that every inference engine keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.result import AnyOutputs
from edgeseg.spec import ModelSpec

__all__ = ["Engine", "Finished", "OneAtATime", "Pending", "Prepared"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A frame as its engine wants it, made by ``Engine.prepare`` for ``Engine.submit``.

    ``pixels``: the network's input, (height, width, 3) uint8 BGR; or the frame as it came, and in
    ``geometry`` how the engine is to bring it to network size.
    """

    pixels: Any
    geometry: Geometry | None = None


class Pending(Protocol):
    """One frame inside an engine, whose outputs are to come."""

    def outputs(self) -> AnyOutputs:
        """Waits for the outputs; they belong to the caller. To be called once.

        EngineError when the engine failed on this frame.
        """


class Engine(Protocol):
    """One opened model on one inference library.

    An engine serves one caller at a time; two callers need two engines, or a lock. What one caller
    may do is to spread the way of its frames over threads: ``prepare`` in any of them, ``submit``
    in one, ``Pending.outputs`` in another, both in the order of the frames.
    """

    @property
    def name(self) -> str:
        """What the command line calls it: ``tensorrt``, ``openvino``, ``onnxruntime``."""

    @property
    def spec(self) -> ModelSpec:
        """The contract of the graph it has opened."""

    @property
    def description(self) -> str:
        """One line for a person: library, version, device, precision, threads, head."""

    @property
    def frames_in_flight(self) -> int:
        """How many frames may be submitted whose outputs nobody has taken yet; 1 or more."""

    def run(self, pixels: Pixels) -> AnyOutputs:
        """What the model's task gives for one network input: a class map, or instances.

        ``pixels``: (spec.height, spec.width, 3) uint8 BGR; FrameError otherwise. The outputs
        belong to the caller.
        """

    def prepare(self, frame: Frame, geometry: Geometry) -> Prepared:
        """What can be done for ``frame`` before it is its turn; ``geometry`` is for its size.

        A prepared frame may be dropped. It holds on to the frame's memory.
        """

    def submit(self, prepared: Prepared) -> Pending:
        """Hands a frame to the library; returns at once where the library works by itself.

        RequestError when ``frames_in_flight`` frames are inside already; EngineError when the
        library does not take it.
        """

    def close(self) -> None:
        """Gives the library's memory back; nothing else must be called afterwards.

        Frames that are still inside are waited for and forgotten. A second call does nothing.
        """


@dataclass(frozen=True, eq=False)
class Finished:
    """A `Pending` of an engine that has finished when ``submit`` returns."""

    value: AnyOutputs

    def outputs(self) -> AnyOutputs:
        """The outputs, at once."""
        return self.value


class OneAtATime(ABC):
    """What an engine on the CPU does with frames: fits them, then finishes one before the next.

    Fitting is left to ``prepare``, so that it overlaps with the network where the caller has a
    thread for it.
    """

    frames_in_flight = 1
    #: what ``description`` says after the number of threads where `open_engine` chose it
    tuned_text = ""

    @abstractmethod
    def run(self, pixels: Pixels) -> AnyOutputs:
        """See ``Engine.run``."""

    def prepare(self, frame: Frame, geometry: Geometry) -> Prepared:
        """See ``Engine.prepare``."""
        return Prepared(geometry.fit(frame.pixels))

    def submit(self, prepared: Prepared) -> Pending:
        """See ``Engine.submit``."""
        return Finished(self.run(prepared.pixels))
