"""The contract that every inference engine keeps."""

from __future__ import annotations

from typing import Protocol

from edgeseg.frame import Pixels
from edgeseg.result import Outputs
from edgeseg.spec import ModelSpec

__all__ = ["Engine"]


class Engine(Protocol):
    """One opened model on one inference library.

    An engine serves one caller at a time; two threads need two engines, or a lock.
    """

    @property
    def name(self) -> str:
        """What the command line calls it: ``openvino``, ``onnxruntime``."""

    @property
    def spec(self) -> ModelSpec:
        """The contract of the graph it has opened."""

    @property
    def description(self) -> str:
        """One line for a person: library, version, device, precision, threads, head."""

    def run(self, pixels: Pixels) -> Outputs:
        """Masks of one network input.

        ``pixels``: (spec.height, spec.width, 3) uint8 BGR, contiguous; FrameError otherwise. The
        outputs belong to the caller.
        """

    def close(self) -> None:
        """Gives the library's memory back; ``run`` must not be called afterwards.

        A second call does nothing.
        """
