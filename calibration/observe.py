"""Runs a graph over calibration frames and keeps what quantization has to know of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgeseg.calibration.graph import Graph
from edgeseg.calibration.ranges import Histogram
from edgeseg.errors import CalibrationError
from edgeseg.frame import Pixels

__all__ = ["Observation", "cut", "observe", "run"]

# Largest sum of outputs that one session gives at once; more tensors mean more passes.
_BYTES_A_PASS = 192 << 20


@dataclass
class Observation:
    """One tensor over all frames: its histogram, and per channel (axis 1) the largest magnitude
    and the mean, (channels,) float64 each; empty for a tensor without channels."""

    histogram: Histogram = field(default_factory=Histogram)
    channel_peak: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    channel_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    positions: int = 0

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts one frame's tensor."""
        self.histogram.add(values)
        if values.ndim < 2 or not values.size:
            return
        planes = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
        peak = np.maximum(planes.max(axis=1), -planes.min(axis=1)).astype(np.float64)
        if self.channel_peak.size == 0:
            self.channel_peak = peak
            self.channel_sum = planes.sum(axis=1, dtype=np.float64)
        else:
            np.maximum(self.channel_peak, peak, out=self.channel_peak)
            self.channel_sum += planes.sum(axis=1, dtype=np.float64)
        self.positions += planes.shape[1]

    @property
    def channel_mean(self) -> NDArray[np.float64]:
        """Mean of each channel over all frames and positions."""
        return self.channel_sum / max(self.positions, 1)


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    frames: Iterable[Pixels],
    *,
    total: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Observation]:
    """Tensor name -> what was seen of it in ``total`` frames of network size.

    ``frames`` is iterated once for each pass (memory is bounded by the largest picture, not by
    their number), so it must not be a generator. CalibrationError when there are none, or a tensor
    holds something that is no number.
    """
    found = {name: Observation() for name in tensors}
    passes = _passes(model, tensors)
    done = 0
    for names in passes:
        before = done
        for outputs in run(model, names, frames):
            for name, values in outputs.items():
                try:
                    found[name].add(values)
                except CalibrationError as error:
                    raise CalibrationError(
                        f"{name} cannot be calibrated: {error}; the model gives such values "
                        "already in floating point"
                    ) from error
            done += 1
            if progress is not None:
                progress(done, total * len(passes))
        if done == before:
            raise CalibrationError(
                f"there is no frame to observe the model with, where {total} were promised"
            )
    return found


def run(
    model: onnx.ModelProto, tensors: Sequence[str], frames: Iterable[Pixels]
) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    """For each frame the float32 values of ``tensors`` in ``model``, by ONNX Runtime.

    The arrays are the caller's.
    """
    session = opened(model, tensors)
    for pixels in frames:
        values = session.run(list(tensors), {session.get_inputs()[0].name: pixels[None]})
        yield dict(zip(tensors, values, strict=True))


def opened(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session whose outputs are ``tensors``; what only the others need is left out."""
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    del asked.graph.output[:]
    asked.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    cut(asked.graph, set(tensors))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The arena keeps what the largest run needed; a calibration is to fit a small machine.
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(
        asked.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def cut(graph: onnx.GraphProto, wanted: set[str]) -> None:
    """Leaves of ``graph`` the nodes and constants that the tensors ``wanted`` need."""
    needed = set(wanted)
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            # An empty name is an optional input left out.
            needed.update(filter(None, node.input))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _passes(model: onnx.ModelProto, tensors: Sequence[str]) -> list[list[str]]:
    """``tensors`` in portions that stay below the limit of bytes."""
    shapes = Graph(model).shapes()
    portions: list[list[str]] = []
    room = 0
    for name in tensors:
        size = 4 * math.prod(max(side, 1) for side in shapes.get(name, ()))
        if not portions or size > room:
            portions.append([])
            room = _BYTES_A_PASS
        portions[-1].append(name)
        room -= size
    return portions
