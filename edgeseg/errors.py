"""Every error that EdgeSeg raises on purpose.

::

    EdgeSegError                exit code 1: something failed
    ├── RequestError            exit code 2: what was asked cannot be right (also a ValueError)
    ├── FrameError              an array that is no frame (also a ValueError)
    ├── WeightsError            a checkpoint that is missing, damaged, or of another model
    ├── BundleError             a bundle or an ONNX file that is missing, damaged, or not ours
    ├── EngineError             an engine that is not here, or that gives wrong masks
    ├── KernelError             the compiled kernels cannot be built or loaded
    ├── DataError               a data set with missing, unreadable or mismatched files
    ├── CalibrationError        a model that cannot be quantized as asked, or frames that do not do
    ├── SourceError             a camera, video or folder that gives no frames
    └── SinkError               an output that cannot be written

A message is one sentence or two: what was promised, what came, the way out.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CalibrationError",
    "DataError",
    "EdgeSegError",
    "EngineError",
    "FrameError",
    "KernelError",
    "RequestError",
    "SinkError",
    "SourceError",
    "WeightsError",
]


class EdgeSegError(Exception):
    """Base of all errors below; ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class RequestError(EdgeSegError, ValueError):
    """The request itself is wrong: an unknown name, a size that cannot be, options that clash."""

    exit_code = 2


class FrameError(EdgeSegError, ValueError):
    """An array that is not a frame: wrong dtype, wrong number of channels, empty."""


class WeightsError(EdgeSegError):
    """A checkpoint that is missing, damaged, or of another model."""


class BundleError(EdgeSegError):
    """A bundle or an ONNX file that is missing, damaged, or not made by EdgeSeg."""


class EngineError(EdgeSegError):
    """An inference engine that is not installed, cannot read the graph, or gives wrong masks."""


class KernelError(EdgeSegError):
    """The compiled kernels cannot be built or loaded."""


class DataError(EdgeSegError):
    """A data set whose files are missing, unreadable, or do not match."""


class CalibrationError(EdgeSegError):
    """A graph that cannot be quantized as asked, or frames that it cannot be calibrated with."""


class SourceError(EdgeSegError):
    """A source of frames that cannot be opened or gives nothing."""


class SinkError(EdgeSegError):
    """An output that cannot be written."""
