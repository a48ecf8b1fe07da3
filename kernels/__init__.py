"""EdgeSeg's own kernels: the arithmetic around the network, compiled.

The CPU library is built when EdgeSeg is installed, or later with ``build()``; where it is missing,
``available()`` is false and engines run the operator's standard-ONNX form instead. Results are the
same bytes on every machine, at any number of threads.
"""

from __future__ import annotations

from edgeseg.kernels.argmax import upsample_argmax, upsample_argmax_confidence
from edgeseg.kernels.borders import refine_borders
from edgeseg.kernels.build import build
from edgeseg.kernels.frames import FrameRectangle, fit_frame
from edgeseg.kernels.levels import MaskGrid, level_bits, level_regions, level_rles
from edgeseg.kernels.library import available, available_cores, load
from edgeseg.kernels.masks import (
    CocoRle,
    assemble_mask_bits,
    assemble_mask_rles,
    assemble_masks,
)
from edgeseg.kernels.overlay import draw_overlay
from edgeseg.kernels.rois import pyramid_roi_align

__all__ = [
    "CocoRle",
    "FrameRectangle",
    "MaskGrid",
    "assemble_mask_bits",
    "assemble_mask_rles",
    "assemble_masks",
    "available",
    "available_cores",
    "build",
    "draw_overlay",
    "fit_frame",
    "level_bits",
    "level_regions",
    "level_rles",
    "load",
    "pyramid_roi_align",
    "refine_borders",
    "upsample_argmax",
    "upsample_argmax_confidence",
]
