"""How long one kernel takes: what it computes or what it moves, whichever is longer.

Of a peak, only a share is reached. The share that follows from the layer is computed: tensor cores
take channels in eights (fp16) or in 32s (int8), a matrix is cut into tiles of which the last ones
are part empty, and a few tiles leave multiprocessors idle. What remains (how good the libraries'
kernels are, how much of a memory's bandwidth a kernel sees, what starting one costs) is a handful
of numbers for all devices, `Constants`, fitted to published speeds by benchmarks/bench_estimate.py.

Roofline: Williams, Waterman and Patterson 2009, Communications of the ACM 52(4).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from edgeseg.engine.graph import Precision
from edgeseg.estimate.devices import Device
from edgeseg.estimate.layers import Layer

__all__ = [
    "CONSTANTS",
    "SPREAD",
    "Constants",
    "LayerCost",
    "LayerTime",
    "Limit",
    "Reach",
    "layer_time",
]

#: what a layer waits for: its arithmetic, memory, or being started at all
Limit = Literal["arithmetic", "bandwidth", "start"]
#: which of `Constants` says what share of its peak a layer's arithmetic reaches
Reach = Literal["tensor_fp16", "tensor_int8", "tensor_tf32", "plain", "depthwise"]

# (rows, columns) of a tile of the result that one block of threads computes, and the share of the
# peak that a tile of that size can reach: a smaller one reads more for each result.
_TILES = ((256, 128, 1.0), (128, 128, 1.0), (128, 64, 0.9), (64, 64, 0.75), (64, 32, 0.6))
# A block needs this many steps of depth until its pipeline is full.
_FILL = 48
# In how many parts libraries cut a deep product, when there are few tiles.
_MOST_SPLITS = 8
_LEAST_DEPTH = 256
# Channels side by side that one instruction takes.
_ALIGNMENT: dict[Precision, int] = {"int8": 32, "fp8": 32, "fp16": 8, "bf16": 8, "fp32": 4}
# Colours: the first layer has kernels of its own, which take four channels.
_COLOURS = 4
_TENSOR: dict[Precision, Reach] = {
    "int8": "tensor_int8",
    "fp8": "tensor_int8",
    "fp16": "tensor_fp16",
    "bf16": "tensor_fp16",
    "fp32": "tensor_tf32",
}


@dataclass(frozen=True)
class Constants:
    """What cannot be read off a data sheet, as shares of a peak and as microseconds.

    ``tensor_fp16``, ``tensor_int8``, ``tensor_tf32``: share of the tensor cores' peak that a large
    product with aligned channels reaches; ``plain``: of the plain cores' peak, fp32 or fp16
    (above 1 is possible: Winograd's algorithm saves multiplications); ``bandwidth``: of the
    memory's; ``depthwise``: of the plain cores' peak, by convolutions of single channels.
    ``start_us`` and ``jetson_start_us``: between two kernels, on a card and on a Jetson.
    ``eager_us`` and ``jetson_eager_us``: the same of a framework that starts operators one by one;
    only published speeds of such are compared with it.
    """

    tensor_fp16: float
    tensor_int8: float
    tensor_tf32: float
    plain: float
    bandwidth: float
    depthwise: float
    start_us: float
    jetson_start_us: float
    eager_us: float
    jetson_eager_us: float


#: fitted by benchmarks/bench_estimate.py to `PUBLISHED`; --check compares
CONSTANTS = Constants(
    tensor_fp16=0.699,
    tensor_int8=0.388,
    tensor_tf32=0.622,
    plain=1.06,
    bandwidth=0.708,
    depthwise=0.244,
    start_us=12.6,
    jetson_start_us=16.7,
    eager_us=26.3,
    jetson_eager_us=109.0,
)


#: half the width of the interval, as a natural logarithm, from the same program: the 90th
#: percentile of the errors on tables that were left out of the fit
SPREAD = 0.40


@dataclass(frozen=True)
class LayerCost:
    """What one kernel would take with nothing lost, in microseconds: computing, and moving.

    What its sizes lose is in ``arithmetic_us`` already; ``reach`` says which constant is still to
    be divided by.
    """

    reach: Reach
    arithmetic_us: float
    bandwidth_us: float

    @classmethod
    def of(cls, layer: Layer, device: Device, *, tf32: bool = False) -> LayerCost:
        """The cost of ``layer`` on ``device``; ``tf32``: fp32 may be rounded for tensor cores."""
        bandwidth = layer.bytes / (device.bandwidth_gbs * 1e3)
        tensor = layer.kind == "matrix"
        peak, precision = device.peak(layer.precision, tensor=tensor, tf32=tf32)
        if layer.macs == 0 or not tensor:
            return cls("depthwise", 2e6 * layer.macs / peak, bandwidth)
        cores = device.has_tensor_cores(precision, tf32=tf32)
        share = _share_of(
            layer.rows,
            layer.columns,
            layer.depth,
            layer.channels,
            layer.groups,
            _ALIGNMENT[precision] if cores else 1,
            device.multiprocessors,
        )
        reach: Reach = "plain"
        if cores:
            reach = _TENSOR[precision]
        return cls(reach, 2e6 * layer.macs / (peak * share), bandwidth)


@dataclass(frozen=True)
class LayerTime:
    """What one kernel takes, in microseconds: computing, moving, and in all."""

    arithmetic_us: float
    bandwidth_us: float
    total_us: float
    limit: Limit


def layer_time(
    layer: Layer, device: Device, constants: Constants = CONSTANTS, *, tf32: bool = False
) -> LayerTime:
    """How long ``layer`` takes on ``device`` inside an engine."""
    cost = LayerCost.of(layer, device, tf32=tf32)
    arithmetic = cost.arithmetic_us / float(getattr(constants, cost.reach))
    bandwidth = cost.bandwidth_us / constants.bandwidth
    # The two overlap, but not wholly: loads at the beginning and stores at the end stand alone.
    busy = math.hypot(arithmetic, bandwidth)
    start = constants.jetson_start_us if device.kind == "jetson" else constants.start_us
    if start > busy:
        limit: Limit = "start"
    else:
        limit = "arithmetic" if arithmetic > bandwidth else "bandwidth"
    return LayerTime(arithmetic, bandwidth, busy + start, limit)


@functools.cache
def _share_of(
    rows: int,
    columns: int,
    depth: int,
    channels: int,
    groups: int,
    alignment: int,
    multiprocessors: int,
) -> float:
    alignment = min(alignment, _COLOURS) if channels <= _COLOURS else alignment
    aligned = -(-channels // alignment) * alignment
    padded = depth // max(channels, 1) * aligned
    best = 0.0
    for tile_rows, tile_columns, reach in _TILES:
        tiles = groups * -(-rows // tile_rows) * -(-columns // tile_columns)
        for splits in range(1, _MOST_SPLITS + 1):
            part = padded / splits
            if splits > 1 and part < _LEAST_DEPTH:
                break
            waves = -(-tiles * splits // multiprocessors)
            busy = (
                groups
                * rows
                * columns
                * splits
                / (waves * multiprocessors * tile_rows * tile_columns)
            )
            best = max(best, reach * busy * part / (part + _FILL))
    return best * depth / max(padded, 1)
