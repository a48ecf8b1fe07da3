"""EdgeSeg's own kernels: the arithmetic around the network, compiled.

The CPU library is built when EdgeSeg is installed, or later with ``build()``; where it is missing,
``available()`` is false and engines run the operator's standard-ONNX form instead. Results are the
same bytes on every machine, at any number of threads.
"""

from __future__ import annotations

from edgeseg.kernels.argmax import upsample_argmax, upsample_argmax_confidence
from edgeseg.kernels.build import build
from edgeseg.kernels.library import available, available_cores, load

__all__ = [
    "available",
    "available_cores",
    "build",
    "load",
    "upsample_argmax",
    "upsample_argmax_confidence",
]
