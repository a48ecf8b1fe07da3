"""Which layers lose the accuracy, what each costs to keep, and the fewest that meet a budget.

The damage of a layer is measured on frames without labels: the share of pixels whose class changes
when that layer alone is quantized. What it costs to leave it in floating point is measured as well,
in milliseconds against the INT8 graph, taking turns. The budget itself is proven on labelled data.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from edgeseg.bundle import Bundle
from edgeseg.calibration.calibrate import Calibrated, Stage, silent
from edgeseg.dataset import Dataset
from edgeseg.engine import Engine, open_engine
from edgeseg.errors import CalibrationError
from edgeseg.evaluate import Evaluation, evaluate
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


class Trials:
    """Measurements by name, kept in a JSON file as they come in, for a run that is continued.

    ``context`` says what was measured; a file of another context is begun anew.
    """

    def __init__(self, path: Path, context: str) -> None:
        self._path = path
        self._context = context
        self._values: dict[str, float] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):
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
    """``damage``: share of pixels, 0 to 1, whose class changes when ``layer`` alone is quantized.
    ``cost_ms``: time that a frame takes longer when it alone stays in floating point; None if the
    budget needed no such measurement."""

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

    def disagreement(self, floats: Collection[str]) -> float:
        """Share of pixels to which the graph gives another class than the original does."""

        def measure() -> float:
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

        return self._trials.get(f"disagreement {self._key(floats)}", measure)

    def evaluation(
        self, floats: Collection[str], dataset: Dataset, stage: Stage = silent
    ) -> Evaluation:
        """The graph's accuracy on the whole of ``dataset``."""
        engine = self.opened(floats)
        what = "fp32" if len(set(floats)) == len(self.layers) else "INT8"
        with stage(f"proving {what} with {len(set(floats))} layers in floating point") as update:
            found = evaluate(engine, dataset, progress=update)
        engine.close()
        return found

    def miou(self, floats: Collection[str], dataset: Dataset, stage: Stage = silent) -> float:
        """mIoU, 0 to 1, on the whole of ``dataset``."""
        return self._trials.get(
            f"miou {self._key(floats)}", lambda: self.evaluation(floats, dataset, stage).miou
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
    ``miou``: on the whole evaluation split, 0 to 1. ``tried``: (number of layers in floating
    point, mIoU) of every graph that was proven, in that order. ``damages``: by layer."""

    floats: tuple[str, ...]
    fp32: float
    miou: float
    tried: tuple[tuple[int, float], ...]
    damages: tuple[LayerDamage, ...]

    @property
    def drop(self) -> float:
        """Points of mIoU lost, 0 to 100; negative for a gain."""
        return (self.fp32 - self.miou) * 100


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
    dataset: Dataset,
    max_drop: float,
    *,
    fixed: Collection[str] = (),
    stage: Stage = silent,
) -> Search:
    """The layers to leave in floating point so that mIoU falls by ``max_drop`` points at most.

    First none but ``fixed``; if that does not do, layers are taken in the order of damage per
    millisecond, as few as meet the budget, and those that turn out not to be needed are given back.
    CalibrationError with the best that was found when even half of the layers do not do it, or the
    result would be no faster than floating point.
    """
    fp32 = laboratory.miou(laboratory.layers, dataset, stage)
    tried: dict[int, float] = {}

    def drop(floats: Sequence[str]) -> float:
        miou = laboratory.miou(floats, dataset, stage)
        tried[len(floats)] = miou
        return (fp32 - miou) * 100

    chosen = [name for name in laboratory.layers if name in fixed]
    best = (drop(chosen), tuple(chosen))
    measured: tuple[LayerDamage, ...] = ()
    if best[0] > max_drop:
        measured = _with_costs(laboratory, damages(laboratory, stage=stage), stage)
        least = laboratory.latency_ms() * _LEAST_COST
        ranked = sorted(
            (entry for entry in measured if entry.layer not in chosen),
            key=lambda entry: -entry.damage / max(entry.cost_ms or 0.0, least),
        )
        order = [entry.layer for entry in ranked]
        best = _fewest(chosen, order, drop, max_drop, len(laboratory.layers) // 2, best)
        if best[0] <= max_drop:
            best = _without_needless(best, chosen, order, drop, max_drop)
    if best[0] > max_drop:
        raise CalibrationError(
            f"no INT8 graph within {max_drop:g} points of mIoU was found: the best loses "
            f"{best[0]:.2f} ({(fp32 - best[0] / 100) * 100:.2f} % instead of {fp32 * 100:.2f} %) "
            f"with {len(best[1])} of {len(laboratory.layers)} layers in floating point; allow "
            f"--max-drop {best[0] + 0.05:.1f}, give more calibration frames, or fine-tune "
            "(--finetune)"
        )
    if best[1] and laboratory.extra_ms(laboratory.layers) <= laboratory.extra_ms(best[1]):
        raise CalibrationError(
            f"{len(best[1])} of {len(laboratory.layers)} layers would have to stay in floating "
            f"point to lose {max_drop:g} points of mIoU at most, and then it is no faster than "
            "the model it was made from; allow a larger --max-drop, or fine-tune (--finetune)"
        )
    floats = tuple(name for name in laboratory.layers if name in set(best[1]))
    return Search(floats, fp32, fp32 - best[0] / 100, tuple(sorted(tried.items())), measured)


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


Found = tuple[float, tuple[str, ...]]


def _fewest(
    chosen: Sequence[str],
    order: Sequence[str],
    drop: Callable[[Sequence[str]], float],
    max_drop: float,
    most: int,
    best: Found,
) -> Found:
    """The shortest beginning of ``order`` that meets the budget: doubling, then halving."""

    def at(count: int) -> Found:
        floats = (*chosen, *order[:count])
        return drop(floats), floats

    low, count = 0, 1
    most = min(most, len(order))
    while True:
        count = min(count, most)
        found = at(count)
        best = min(best, found)
        if found[0] <= max_drop or count == most:
            break
        low, count = count, count * 2
    if found[0] > max_drop:
        return best
    high, best = count, found
    while high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        if found[0] <= max_drop:
            high, best = middle, found
        else:
            low = middle
    return best


def _without_needless(
    best: Found,
    fixed: Sequence[str],
    order: Sequence[str],
    drop: Callable[[Sequence[str]], float],
    max_drop: float,
) -> Found:
    """Gives layers back to INT8, the least damaging first, as long as the budget is met."""
    for name in [name for name in reversed(order) if name in best[1]]:
        if len(best[1]) == len(fixed) + 1:
            # One is needed: none was tried first.
            break
        floats = tuple(other for other in best[1] if other != name)
        found = drop(floats)
        if found <= max_drop:
            best = (found, floats)
    return best
