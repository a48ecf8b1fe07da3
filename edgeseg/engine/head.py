"""The head outside the graph: upsampling and argmax in the compiled kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import FrameError
from edgeseg.frame import Pixels
from edgeseg.onnxfile import Head
from edgeseg.spec import ModelSpec

__all__ = ["checked_input", "run_head", "wants_compiled_head"]


def wants_compiled_head(asked: bool | None) -> bool:
    """Whether to cut the graph before its head: ``asked``, or None for "if the kernel is there".

    KernelError when it is asked for and is not there.
    """
    if asked is None:
        return kernels.available()
    if asked:
        kernels.load()
    return asked


def run_head(
    head: Head, logits: NDArray[np.float32], threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Class map and, if promised, confidence, (height, width) uint8 each, of low-resolution logits.

    ``logits``: (1, classes, h, w) float32.
    """
    size = (head.height, head.width)
    if head.confidence:
        return kernels.upsample_argmax_confidence(
            logits, size, align_corners=head.align_corners, threads=threads
        )
    class_map = kernels.upsample_argmax(
        logits, size, align_corners=head.align_corners, threads=threads
    )
    return class_map, None


def checked_input(pixels: Pixels, spec: ModelSpec) -> Pixels:
    """``pixels`` as (1, height, width, 3); FrameError unless it is of network size and uint8."""
    wanted = (spec.height, spec.width, 3)
    if pixels.shape != wanted or pixels.dtype != np.uint8:
        raise FrameError(
            f"{spec.name} takes {wanted} uint8, and {pixels.shape} {pixels.dtype} came; "
            "Geometry.fit brings a frame to that size"
        )
    return np.ascontiguousarray(pixels)[None]
