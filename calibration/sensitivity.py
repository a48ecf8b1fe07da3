"""Which layers lose the accuracy, what each costs to keep, and the fewest that meet a budget.

The damage of a layer is measured on frames without labels, when that layer alone is quantized: the
share of pixels whose class changes, or for instances the error of the raw heads (see `Heads`). What
it costs to leave it in floating point is measured as well, in milliseconds against the INT8 graph,
taking turns. The budget itself is proven on labelled data.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from edgeseg.bundle import Bundle
from edgeseg.calibration.accuracy import (
    AnyDataset,
    AnyEvaluation,
    figure,
    figure_name,
    measured,
)
from edgeseg.calibration.agreement import Agreement, agreement_of
from edgeseg.calibration.calibrate import Calibrated, Stage, silent
from edgeseg.calibration.heads import Heads
from edgeseg.engine import Engine, open_engine
from edgeseg.errors import CalibrationError, RequestError
from edgeseg.frame import Pixels
from edgeseg.jsonfile import write_json
from edgeseg.onnxfile import OnnxFile

__all__ = ["Laboratory", "LayerDamage", "Search", "Trials", "search"]

# Pictures per turn and turns of a latency measurement.
_TIMED = 4
_TURNS = 9
# A layer is never taken for cheaper than this share of the INT8 graph's time: below it the clock
# says nothing, and a division by it would say anything.
_LEAST_COST = 0.005
# Searches that are begun once more without the layer that costs most.
_ALTERNATIVES = 3
# Pictures whose raw heads are kept: far more numbers than class maps have.
_WITH_HEADS = 8


class Trials:
    """Measurements by name, kept in a JSON file as they come in, for a run that is continued.

    ``context`` says what was measured; a file of another context is begun anew.
    """

    def __init__(self, path: Path, context: str) -> None:
        self._path = path
        self._context = context
        self._values: dict[str, float] = {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["context"] == context:
                self._values = {str(k): float(v) for k, v in content["values"].items()}

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """The value called ``name``, measured if it is not known yet."""
        if name not in self._values:
            self._values[name] = measure()
            write_json(self._path, {"context": self._context, "values": self._values})
        return self._values[name]


@dataclass(frozen=True)
class LayerDamage:
    """``damage``: when ``layer`` alone is quantized, the share of pixels, 0 to 1, whose class
    changes, or for instances the error of the raw heads (see `Heads.error`). ``cost_ms``: time that
    a frame takes longer when it alone stays in floating point; None if the budget needed no such
    measurement."""

    layer: str
    damage: float
    cost_ms: float | None = None


class Laboratory:
    """Runs a calibrated model with any layers in floating point on one engine.

    ``bundle`` is the floating-point one, ``pictures`` some frames of network size.
    """

    def __init__(
        self,
        bundle: Bundle,
        calibrated: Calibrated,
        pictures: Sequence[Pixels],
        trials: Trials,
        *,
        engine: str | None = None,
        threads: int = 0,
        finish: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model,
    ) -> None:
        self.bundle = bundle
        self.layers = tuple(layer.name for layer in calibrated.graph.layers())
        self._calibrated = calibrated
        self._pictures = tuple(pictures)
        self._trials = trials
        self._engine = engine
        self._threads = threads
        self._finish = finish
        self._wanted: list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]] | None = None
        self._heads: Heads | None = None
        self._proven: dict[tuple[str, AnyDataset], AnyEvaluation] = {}

    def model(self, floats: Collection[str]) -> onnx.ModelProto:
        """The graph with ``floats`` in floating point."""
        return self._finish(self._calibrated.model(floats))

    def opened(self, floats: Collection[str]) -> Engine:
        """An engine with that graph; with all layers in ``floats``, the original."""
        bundle = self.bundle
        if len(set(floats)) < len(self.layers):
            content = self.model(floats).SerializeToString()
            bundle = replace(bundle, model=OnnxFile(content, f"{bundle.name}, quantized"))
        return open_engine(bundle, self._engine, threads=self._threads, check=False)

    @property
    def figure_name(self) -> str:
        """What the accuracy is, for a person: mIoU or AP."""
        return figure_name(self.bundle.spec.task)

    def disagreement(self, floats: Collection[str]) -> float:
        """How far the graph is from the original on the pictures, 0 for not at all.

        The share of pixels to which it gives another class; for instances the error of the raw
        heads.
        """
        instances = self.bundle.spec.task == "instance"
        measure = self._head_error if instances else self._other_pixels
        return self._trials.get(f"disagreement {self._key(floats)}", lambda: measure(floats))

    def _other_pixels(self, floats: Collection[str]) -> float:
        if self._wanted is None:
            original = self.opened(self.layers)
            self._wanted = [original.run(pixels).class_map for pixels in self._pictures]
            original.close()
        engine = self.opened(floats)
        wrong = [
            float(np.mean(engine.run(pixels).class_map != wanted))
            for pixels, wanted in zip(self._pictures, self._wanted, strict=True)
        ]
        engine.close()
        return statistics.fmean(wrong)

    def _head_error(self, floats: Collection[str]) -> float:
        return statistics.fmean(self.head_errors(floats).values())

    def head_errors(self, floats: Collection[str]) -> dict[str, float]:
        """Raw head of an instance model -> its error in the graph: see `Heads.errors`."""
        if self._heads is None:
            self._heads = Heads(self._calibrated.graph, self._pictures[:_WITH_HEADS])
        return self._heads.errors(self.model(floats))

    def agreement(self, floats: Collection[str]) -> float:
        """Share of what the original says on the pictures that the graph says as well.

        Pixels with the same class, or instances: see `agreement_of`. NaN for instances where
        neither finds any that is worth a look.
        """
        if self.bundle.spec.task == "semantic":
            return 1 - self.disagreement(floats)
        one, other = self.opened(self.layers), self.opened(floats)
        parts = [agreement_of(one.run(pixels), other.run(pixels)) for pixels in self._pictures]
        one.close()
        other.close()
        return Agreement.sum(parts).share

    def evaluation(
        self, floats: Collection[str], dataset: AnyDataset, stage: Stage = silent
    ) -> AnyEvaluation:
        """The graph's accuracy on the whole of ``dataset``, measured once."""
        proven = (self._key(floats), dataset)
        if proven in self._proven:
            return self._proven[proven]
        engine = self.opened(floats)
        what = "fp32" if len(set(floats)) == len(self.layers) else "INT8"
        with stage(f"proving {what} with {len(set(floats))} layers in floating point") as update:
            self._proven[proven] = measured(engine, dataset, progress=update)
        engine.close()
        return self._proven[proven]

    def figure(self, floats: Collection[str], dataset: AnyDataset, stage: Stage = silent) -> float:
        """The accuracy that a budget is about, 0 to 1, on the whole of ``dataset``."""
        return self._trials.get(
            f"accuracy {self._key(floats)}",
            lambda: figure(self.evaluation(floats, dataset, stage)),
        )

    def extra_ms(self, floats: Collection[str]) -> float:
        """Milliseconds a frame that the graph takes longer than all-INT8, taking turns with it."""

        def measure() -> float:
            one, other = self.opened(()), self.opened(floats)
            differences = []
            for turn in range(_TURNS + 1):
                times = [self._turn(engine) for engine in (one, other)]
                if turn:
                    differences.append(times[1] - times[0])
            one.close()
            other.close()
            return statistics.median(differences)

        return self._trials.get(f"extra ms {self._key(floats)}", measure)

    def latency_ms(self) -> float:
        """Milliseconds a frame of the all-INT8 graph."""

        def measure() -> float:
            engine = self.opened(())
            times = [self._turn(engine) for _ in range(_TURNS + 1)]
            engine.close()
            return statistics.median(times[1:])

        return self._trials.get("latency", measure)

    def _turn(self, engine: Engine) -> float:
        pictures = self._pictures[:_TIMED]
        started = time.perf_counter()
        for pixels in pictures:
            engine.run(pixels)
        return (time.perf_counter() - started) / len(pictures) * 1e3

    def _key(self, floats: Collection[str]) -> str:
        names = set(floats)
        if len(names) == len(self.layers):
            return "fp32"
        if len(names) > len(self.layers) // 2:
            return "only " + " ".join(name for name in self.layers if name not in names)
        return "without " + " ".join(name for name in self.layers if name in names)


@dataclass(frozen=True)
class Search:
    """What a search found. ``floats``: the layers to leave in floating point. ``fp32`` and
    ``int8``: mIoU or AP on the whole evaluation split, 0 to 1. ``tried``: (number of layers in
    floating point, that figure) of the graphs that were proven, by that number; of several with
    the same, the one that was taken, else the best. ``damages``: by layer."""

    floats: tuple[str, ...]
    fp32: float
    int8: float
    tried: tuple[tuple[int, float], ...]
    damages: tuple[LayerDamage, ...]

    @property
    def drop(self) -> float:
        """Points lost, 0 to 100; negative for a gain."""
        return (self.fp32 - self.int8) * 100


def damages(laboratory: Laboratory, *, stage: Stage = silent) -> tuple[LayerDamage, ...]:
    """The damage of every layer, in the order of the graph."""
    found = []
    with stage("measuring the damage of each layer") as update:
        for index, name in enumerate(laboratory.layers):
            others = [other for other in laboratory.layers if other != name]
            found.append(LayerDamage(name, laboratory.disagreement(others)))
            update(index + 1, len(laboratory.layers))
    return tuple(found)


def search(
    laboratory: Laboratory,
    dataset: AnyDataset,
    max_drop: float,
    *,
    fixed: Collection[str] = (),
    stage: Stage = silent,
) -> Search:
    """The layers to leave in floating point so that ``max_drop`` points are lost at most.

    Points of mIoU, or of AP for instances: see `calibration.accuracy`.

    First none but ``fixed``. If that does not do, layers are taken in the order of damage per
    millisecond, as few as meet the budget, and those that turn out not to be needed are given back.
    This is repeated without the layer that costs most as long as it leads to a graph that is
    quicker, by the clock: one slow layer with much damage may stand for a few quick ones.

    RequestError for a name in ``fixed`` that no layer has. CalibrationError with the best that was
    found when even half of the layers do not do it, when the result would be no faster than
    floating point, and when nothing in ``dataset`` has a label.
    """
    unknown = sorted(set(fixed).difference(laboratory.layers))
    if unknown:
        raise RequestError(
            f"there is no layer {unknown[0]} to leave in floating point; the layers are "
            f"{', '.join(laboratory.layers)}"
        )
    name = laboratory.figure_name
    fp32 = laboratory.figure(laboratory.layers, dataset, stage)
    if math.isnan(fp32):
        raise CalibrationError(
            f"a budget is proven on labelled pictures, and nothing in {dataset.title} "
            f"{dataset.split} has a label, so that there is no {name}; give other pictures with "
            "--data"
        )
    tried: dict[int, float] = {}

    def drop(floats: Sequence[str]) -> float:
        int8 = laboratory.figure(floats, dataset, stage)
        tried[len(floats)] = max(int8, tried.get(len(floats), int8))
        return (fp32 - int8) * 100

    chosen = tuple(name for name in laboratory.layers if name in fixed)
    best: Found = (drop(chosen), chosen)
    measured: tuple[LayerDamage, ...] = ()
    if best[0] > max_drop:
        measured = _with_costs(laboratory, damages(laboratory, stage=stage), stage)
        best = _least(laboratory, chosen, measured, drop, max_drop, best)
    lost, taken = best
    # Fine-tuning is for models that give a class to every pixel.
    tune = ", or fine-tune (--finetune)" if name == figure_name("semantic") else ""
    cures = f"give more calibration frames{tune}" if tune else "or give more calibration frames"
    if lost > max_drop:
        raise CalibrationError(
            f"no INT8 graph within {max_drop:g} points of {name} was found: the best loses "
            f"{lost:.2f} ({fp32 * 100 - lost:.2f} % instead of {fp32 * 100:.2f} %) with "
            f"{len(taken)} of {len(laboratory.layers)} layers in floating point; allow "
            f"--max-drop {math.ceil(lost * 10) / 10:.1f}, {cures}"
        )
    # Those that were asked for are left as they are, whatever that costs.
    if taken != chosen and (laboratory.extra_ms(laboratory.layers) <= laboratory.extra_ms(taken)):
        raise CalibrationError(
            f"{len(taken)} of {len(laboratory.layers)} layers would have to stay in floating "
            f"point to lose {max_drop:g} points of {name} at most, and then it is no faster than "
            f"the model it was made from; allow a larger --max-drop{tune}"
        )
    floats = tuple(name for name in laboratory.layers if name in set(taken))
    int8 = fp32 - lost / 100
    tried[len(floats)] = int8
    return Search(floats, fp32, int8, tuple(sorted(tried.items())), measured)


def _with_costs(
    laboratory: Laboratory, measured: Sequence[LayerDamage], stage: Stage
) -> tuple[LayerDamage, ...]:
    found = []
    with stage("timing each layer in floating point") as update:
        for index, entry in enumerate(measured):
            cost = laboratory.extra_ms([entry.layer])
            found.append(LayerDamage(entry.layer, entry.damage, cost))
            update(index + 1, len(measured))
    return tuple(found)


#: points of mIoU lost, and the layers in floating point
Found = tuple[float, tuple[str, ...]]
Drop = Callable[[Sequence[str]], float]


def _least(
    laboratory: Laboratory,
    fixed: Sequence[str],
    measured: Sequence[LayerDamage],
    drop: Drop,
    max_drop: float,
    best: Found,
) -> Found:
    """The quickest graph within the budget that is found, or the best one if none is."""
    least = laboratory.latency_ms() * _LEAST_COST
    free = [entry for entry in measured if entry.layer not in fixed]
    costs = {entry.layer: max(entry.cost_ms or 0.0, least) for entry in free}
    most = len(laboratory.layers) // 2

    def attempt(order: Sequence[str], best: Found) -> Found:
        found = _fewest(fixed, order, drop, max_drop, most, best)
        return found if found[0] > max_drop else _needed(found, fixed, order, drop, max_drop)

    by_damage = sorted(free, key=lambda entry: -entry.damage)
    order = [
        entry.layer
        for entry in sorted(by_damage, key=lambda entry: -entry.damage / costs[entry.layer])
    ]
    found = attempt(order, best)
    if found[0] > max_drop:
        # Half of the layers may do after all, if they are those with most damage.
        found = attempt([entry.layer for entry in by_damage], found)
    if found[0] > max_drop:
        return found
    for _ in range(_ALTERNATIVES):
        taken = [name for name in found[1] if name not in fixed]
        if len(taken) == len(order):
            break
        dearest = max(taken, key=lambda name: costs[name])
        order = [name for name in order if name != dearest]
        other = attempt(order, (math.inf, ()))
        if other[0] > max_drop:
            break
        if laboratory.extra_ms(other[1]) >= laboratory.extra_ms(found[1]):
            break
        found = other
    return found


def _fewest(
    chosen: Sequence[str],
    order: Sequence[str],
    drop: Drop,
    max_drop: float,
    most: int,
    best: Found,
) -> Found:
    """The shortest beginning of ``order`` that meets the budget, of ``most`` layers at most:
    doubling, then halving. If there is none, the one that loses least, ``best`` among them."""

    def at(count: int) -> Found:
        floats = (*chosen, *order[:count])
        return drop(floats), floats

    low, count = 0, 1
    most = min(most, len(order))
    while True:
        count = min(count, most)
        found = at(count)
        if found[0] <= max_drop or count == most:
            break
        best = min(best, found, key=_loss)
        low, count = count, count * 2
    if found[0] > max_drop:
        return min(best, found, key=_loss)
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        between = at(middle)
        if between[0] <= max_drop:
            high, found = middle, between
        else:
            low = middle
    return found


def _needed(
    found: Found,
    fixed: Sequence[str],
    order: Sequence[str],
    drop: Drop,
    max_drop: float,
) -> Found:
    """Gives layers back to INT8, the last in ``order`` first, as long as the budget is met."""
    for name in [name for name in reversed(order) if name in found[1]]:
        if len(found[1]) == len(fixed) + 1:
            # One is needed: none was tried first.
            break
        floats = tuple(other for other in found[1] if other != name)
        lost = drop(floats)
        if lost <= max_drop:
            found = (lost, floats)
    return found


def _loss(found: Found) -> tuple[float, int]:
    return found[0], len(found[1])
