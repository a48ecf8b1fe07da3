"""From a floating-point graph and some frames to everything that an INT8 graph is written from."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeseg.calibration.equalize import equalize
from edgeseg.calibration.frames import CalibrationFrames
from edgeseg.calibration.graph import Graph, prepared
from edgeseg.calibration.observe import Observation, observe
from edgeseg.calibration.placement import Placement, place
from edgeseg.calibration.quantize import Scales, quantize
from edgeseg.calibration.ranges import Histogram, scale, threshold, weight_scales
from edgeseg.calibration.recipe import QuantizationRecipe
from edgeseg.errors import CalibrationError, RequestError
from edgeseg.frame import Pixels

__all__ = ["Calibrated", "Pictures", "Stage", "calibrate", "silent"]

#: opens a progress display of the given title
Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


class Pictures:
    """The pixels of one or several sets of calibration frames, as often as they are asked for."""

    def __init__(self, sets: Sequence[CalibrationFrames]) -> None:
        self._sets = tuple(sets)

    def __len__(self) -> int:
        return sum(len(frames) for frames in self._sets)

    def __iter__(self) -> Iterator[Pixels]:
        for frames in self._sets:
            for _, pixels in frames:
                yield pixels


@dataclass(frozen=True)
class Calibrated:
    """A graph ready to be quantized, with any set of layers left in floating point.

    ``graph``: fp32, prepared and equalized. ``thresholds``: tensor -> clipping magnitude.
    ``weight_scales``: layer -> (output channels,) float32. ``observations``: tensor -> what the
    calibration frames showed.
    """

    graph: Graph
    thresholds: Mapping[str, float]
    weight_scales: Mapping[str, NDArray[np.float32]]
    observations: Mapping[str, Observation]

    def placement(self, floats: Collection[str] = ()) -> Placement:
        """Where Q/DQ pairs go with the layers ``floats`` in floating point."""
        return place(self.graph, floats=floats)

    def scales(self, placement: Placement) -> Scales:
        """The scales for ``placement``: of a group of tensors, the widest one's."""
        return Scales(
            {
                group: float(scale(max(self.thresholds[tensor] for tensor in tensors)))
                for group, tensors in placement.groups().items()
            },
            {layer.name: self.weight_scales[layer.name] for layer in placement.layers},
        )

    def model(self, floats: Collection[str] = ()) -> onnx.ModelProto:
        """The INT8 graph with the layers ``floats`` in floating point."""
        placement = self.placement(floats)
        return quantize(self.graph, placement, self.scales(placement))

    def trained(self, graph: Graph, placement: Placement, scales: Scales) -> Calibrated:
        """This with the numbers of a fine-tuning in place of the measured ones."""
        thresholds = dict(self.thresholds)
        for site in placement.sites:
            thresholds[site.tensor] = scales.activations[site.group] * 127
        return Calibrated(
            graph, thresholds, {**self.weight_scales, **scales.weights}, self.observations
        )

    def save(self, folder: Path, context: str) -> None:
        """Keeps this in ``folder`` under ``context``, whole or not at all."""
        beside = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            beside.mkdir()
            arrays: dict[str, NDArray[np.generic]] = {
                f"weights {name}": values for name, values in self.weight_scales.items()
            }
            for name, seen in self.observations.items():
                arrays[f"peak {name}"] = seen.channel_peak
                arrays[f"sum {name}"] = seen.channel_sum
            packed = io.BytesIO()
            np.savez(packed, **arrays)  # type: ignore[arg-type]
            files = {
                "graph.onnx": self.graph.model.SerializeToString(),
                "arrays.npz": packed.getvalue(),
            }
            for name, written in files.items():
                (beside / name).write_bytes(written)
            content = {
                "context": context,
                "files": {
                    name: hashlib.sha256(written).hexdigest() for name, written in files.items()
                },
                "thresholds": dict(self.thresholds),
                "histograms": {
                    name: seen.histogram.to_dict() for name, seen in self.observations.items()
                },
                "positions": {name: seen.positions for name, seen in self.observations.items()},
            }
            (beside / "calibrated.json").write_text(json.dumps(content), encoding="utf-8")
            beside.rename(folder)
        except OSError as error:
            raise CalibrationError(f"{folder} cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, folder: Path, context: str) -> Calibrated | None:
        """What ``save`` kept under the same ``context``; None if there is no such thing."""
        try:
            content = json.loads((folder / "calibrated.json").read_text(encoding="utf-8"))
            if content["context"] != context:
                return None
            thresholds = {str(k): float(v) for k, v in content["thresholds"].items()}
            files = {name: (folder / name).read_bytes() for name in content["files"]}
            for name, wanted in content["files"].items():
                if hashlib.sha256(files[name]).hexdigest() != wanted:
                    return None
            graph = Graph(onnx.load_model_from_string(files["graph.onnx"]))
            with np.load(io.BytesIO(files["arrays.npz"])) as arrays:
                observations = {
                    name: Observation(
                        Histogram.from_dict(histogram),
                        arrays[f"peak {name}"],
                        arrays[f"sum {name}"],
                        int(content["positions"][name]),
                    )
                    for name, histogram in content["histograms"].items()
                }
                weights = {
                    key.removeprefix("weights "): arrays[key]
                    for key in arrays
                    if key.startswith("weights ")
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CalibrationError):
            # Not there, or damaged, as by a machine that went off while writing: measured again.
            return None
        return cls(graph, thresholds, weights, observations)


@contextmanager
def silent(_: str) -> Iterator[Callable[[int, int], None]]:
    """A ``Stage`` that shows nothing."""
    yield lambda done, total: None


def calibrate(
    model: onnx.ModelProto, frames: Pictures, recipe: QuantizationRecipe, *, stage: Stage = silent
) -> Calibrated:
    """Folds, observes, equalizes, observes again and chooses ranges, as ``recipe`` says.

    ``model``: what `edgeseg export` wrote. CalibrationError when it cannot be quantized;
    RequestError when the recipe leaves layers in floating point that are not there, or all of them
    and nothing becomes FP16 either.
    """
    graph = prepared(model)
    _check_floats(graph, recipe)
    # Leaving layers out only ever takes sites away, so these are all that can be asked for later.
    placement = place(graph)
    tensors = [site.tensor for site in placement.sites]
    with stage("watching activations") as update:
        seen = observe(graph.model, tensors, frames, total=len(frames), progress=update)
    if recipe.equalize > 0:
        peaks = {name: seen[name].channel_peak for name in tensors}
        graph, divided = equalize(graph, peaks, balance=recipe.equalize)
        changed = [name for name in tensors if name in divided]
        with stage("watching evened activations") as update:
            seen.update(observe(graph.model, changed, frames, total=len(frames), progress=update))
    return Calibrated(
        graph,
        {
            name: threshold(seen[name].histogram, recipe.ranges, percentile=recipe.percentile)
            for name in tensors
        },
        {
            layer.name: weight_scales(graph.floats(layer.weight), layer.axis, recipe.weights)
            for layer in placement.layers
        },
        seen,
    )


def _check_floats(graph: Graph, recipe: QuantizationRecipe) -> None:
    layers = [layer.name for layer in graph.layers()]
    unknown = [name for name in recipe.floats if name not in layers]
    if unknown:
        raise RequestError(
            f"there is no layer {unknown[0]!r} to leave in floating point; the layers are "
            f"{', '.join(layers)}"
        )
    if set(recipe.floats) == set(layers) and not recipe.half:
        raise RequestError(
            f"all {len(layers)} layers are to stay in floating point, and nothing is left to "
            "quantize; name fewer, or ask for half"
        )
