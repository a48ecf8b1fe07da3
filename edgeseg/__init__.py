"""EdgeSeg: real-time segmentation on edge devices.

::

    import edgeseg

    model = edgeseg.load("streets")             # a bundle, an ONNX file, or a shipped model
    result = model(frame)                       # any BGR uint8 array
    for result in model.stream("rtsp://..."):   # a camera, video, folder, stream or synthetic:
        show(result.draw())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# Names are looked up when they are first used: `import edgeseg` stays fast, and `edgeseg doctor`
# can say what is wrong with an OpenCV that does not load.
if TYPE_CHECKING:
    from edgeseg.bundle import Bundle
    from edgeseg.frame import Frame
    from edgeseg.instances import InstanceResult
    from edgeseg.model import Model, load
    from edgeseg.panoptic import PanopticResult
    from edgeseg.result import SemanticResult
    from edgeseg.spec import ModelSpec

__all__ = [
    "Bundle",
    "Frame",
    "InstanceResult",
    "Model",
    "ModelSpec",
    "PanopticResult",
    "SemanticResult",
    "__version__",
    "load",
]

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "edgeseg.bundle",
    "Frame": "edgeseg.frame",
    "InstanceResult": "edgeseg.instances",
    "Model": "edgeseg.model",
    "ModelSpec": "edgeseg.spec",
    "PanopticResult": "edgeseg.panoptic",
    "SemanticResult": "edgeseg.result",
    "load": "edgeseg.model",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeseg' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
