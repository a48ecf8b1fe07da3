"""`edgeseg estimate` against speeds that others have published, each estimated without itself.

Builds the networks of the published tables with random weights (a few minutes; once with --cache),
fits the handful of constants of edgeseg/estimate/roofline.py, and prints, for every published
speed, what the estimate would have been

- with that one speed left out of the fit (leave-one-out)
- with its whole table left out: another author, and mostly another device or model

and whether it lies in the interval that the rest would have given. Nothing is timed here, so the
machine doesn't matter.

    python benchmarks/bench_estimate.py [--cache DIR] [--check] [--quick] [--json FILE]

--check ends with exit code 1 when the constants in the package are not those of the fit.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rounds import add_output_arguments, say, write_json

from edgeseg.estimate.devices import device
from edgeseg.estimate.layers import Network
from edgeseg.estimate.published import PUBLISHED, Measured
from edgeseg.estimate.roofline import CONSTANTS, SPREAD, Constants, LayerCost
from edgeseg.estimate.speed import interval_factor

Floats = NDArray[np.float64]

_NAMES = [entry.name for entry in fields(Constants)]

# What is thought of the constants before any published speed is seen: share of tensor cores, of
# INT8 and TF32 ones, of plain cores, of bandwidth, of plain cores by depthwise; microseconds.
_EXPECTED = np.log([0.55, 0.45, 0.55, 0.85, 0.7, 0.25, 4.0, 8.0, 12.0, 60.0])
# Within which factor, as a natural logarithm: so the few points there are for some don't carry
# them away.
_DOUBT = np.array([0.4] * 6 + [0.7] * 4)
# How far off a published speed usually is, and from where on it counts less.
_NOISE, _FAR = 0.25, 0.2
_QUANTILE = 0.9
# --quick takes networks up to this many pixels.
_SMALL = 224 * 224


@dataclass(frozen=True)
class Problem:
    """All published speeds, as arrays over the layers of all of them; one point is one segment."""

    points: tuple[Measured, ...]
    starts: NDArray[np.intp]
    arithmetic: Floats
    bandwidth: Floats
    reach: NDArray[np.intp]
    start: NDArray[np.intp]
    eager: NDArray[np.bool_]

    @classmethod
    def of(
        cls, points: Sequence[Measured], network: Callable[[Measured, bool], Network]
    ) -> Problem:
        """The problem of ``points``; ``network(point, fused)`` gives the layers of one."""
        starts: list[int] = []
        rows: list[tuple[float, float, int, int, bool]] = []
        for point in points:
            starts.append(len(rows))
            rows.extend(_rows(point, network(point, point.runtime != "eager")))
        arithmetic, bandwidth, reach, start, eager = zip(*rows, strict=True)
        return cls(
            tuple(points),
            np.array(starts),
            np.array(arithmetic),
            np.array(bandwidth),
            np.array(reach),
            np.array(start),
            np.array(eager),
        )

    def milliseconds(self, constants: Floats) -> Floats:
        """Natural logarithm of each point's estimate; ``constants``: logarithms as well."""
        values = np.exp(constants)
        busy = np.hypot(
            self.arithmetic / values[self.reach],
            self.bandwidth / values[_NAMES.index("bandwidth")],
        )
        start = values[self.start]
        # A framework starts the next operator while the device still computes; an engine's kernels
        # stand in line.
        times = np.where(self.eager, np.maximum(busy, start), busy + start)
        return np.asarray(np.log(np.add.reduceat(times, self.starts) / 1e3))

    def fit(self, used: NDArray[np.bool_], begin: Floats = _EXPECTED) -> Floats:
        """Constants (logarithms) that explain the ``used`` points: damped Gauss-Newton.

        Every table counts by the root of its length, so that the longest doesn't rule; points far
        off count less (Huber).
        """
        measured = np.log([point.ms for point in self.points])
        lengths = Counter(point.table for point in self.points)
        weights = np.array([lengths[point.table] ** -0.5 for point in self.points])
        weights = np.where(used, weights / weights.mean(), 0.0)
        found: Floats = begin.copy()
        for _ in range(20):
            now = self.milliseconds(found)
            slopes = np.stack(
                [
                    (self.milliseconds(found + 1e-4 * direction) - now) / 1e-4
                    for direction in np.eye(len(found))
                ],
                axis=1,
            )
            error = now - measured
            weight = weights / np.maximum(1, np.abs(error) / _FAR) / _NOISE**2
            curvature = slopes.T @ (weight[:, None] * slopes) + np.diag(_DOUBT**-2.0)
            gradient = slopes.T @ (weight * error) + (found - _EXPECTED) / _DOUBT**2
            step = np.clip(np.linalg.solve(curvature, gradient), -0.5, 0.5)
            found = found - step
            if np.abs(step).max() < 1e-5:
                break
        return found

    def errors(self, groups: Sequence[object]) -> Floats:
        """Each point's log(estimate / published), fitted without the points of its group."""
        measured = np.log([point.ms for point in self.points])
        begin = self.fit(np.ones(len(self.points), bool))
        found = np.empty(len(self.points))
        for group in dict.fromkeys(groups):
            own = np.array([entry == group for entry in groups])
            found[own] = (self.milliseconds(self.fit(~own, begin)) - measured)[own]
        return found


def _rows(point: Measured, network: Network) -> list[tuple[float, float, int, int, bool]]:
    board = device(point.device)
    prefix = "jetson_" if board.kind == "jetson" else ""
    # Behind the last convolution a split program goes on in its framework.
    last = max(index for index, layer in enumerate(network.layers) if layer.io_elements)
    rows = []
    for index, layer in enumerate(network.layers):
        # TensorRT and PyTorch take TF32 for convolutions unless they are told not to.
        cost = LayerCost.of(layer, board, tf32=True)
        eager = point.runtime == "eager" or (point.runtime == "split" and index > last)
        rows.append(
            (
                cost.arithmetic_us,
                cost.bandwidth_us,
                _NAMES.index(cost.reach),
                _NAMES.index(prefix + ("eager_us" if eager else "start_us")),
                eager,
            )
        )
    return rows


class _Networks:
    """The networks of the points, built once; ``cache``: folder that keeps the files."""

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._files: dict[str, bytes] = {}
        self._networks: dict[tuple[str, str, bool], Network] = {}

    def __call__(self, point: Measured, fused: bool) -> Network:
        name = f"{point.model}_{point.height}x{point.width}"
        key = (name, point.precision, fused)
        if key not in self._networks:
            self._networks[key] = Network.read(
                self._file(name, point), name, precision=point.precision, fused=fused
            )
        return self._networks[key]

    def _file(self, name: str, point: Measured) -> bytes:
        path = None if self._cache is None else self._cache / f"{name}.onnx"
        if name not in self._files:
            if path is not None and path.exists():
                self._files[name] = path.read_bytes()
            else:
                from estimate_graphs import graph

                say(f"building {name}")
                self._files[name] = graph(point.model, point.height, point.width)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(self._files[name])
        return self._files[name]


def _inside(errors: Floats, others: Floats, points: Sequence[Measured]) -> NDArray[np.bool_]:
    """Whether each point lies in the interval that the ``others``' errors but its own give."""
    found = []
    for index, point in enumerate(points):
        spread = float(np.quantile(np.abs(np.delete(others, index)), _QUANTILE))
        found.append(abs(errors[index]) <= np.log(interval_factor(device(point.device), spread)))
    return np.array(found)


def _off(errors: Floats) -> Floats:
    """How far the estimates are from what was published, as a share."""
    return np.asarray(np.abs(np.exp(errors) - 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit code 1 when --check finds other constants in the package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keeps the networks there")
    parser.add_argument("--check", action="store_true", help="compare with the package's constants")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    points = [
        point for point in PUBLISHED if not options.quick or point.height * point.width <= _SMALL
    ]
    problem = Problem.of(points, _Networks(options.cache))
    fitted = Constants(*np.exp(problem.fit(np.ones(len(points), bool))).tolist())
    alone = problem.errors(range(len(points)))
    tables = [point.table for point in points]
    without_table = problem.errors(tables)
    inside = _inside(alone, without_table, points)
    inside_table = _inside(without_table, without_table, points)
    spread = float(np.quantile(np.abs(without_table), _QUANTILE))

    rows = []
    for index, point in enumerate(points):
        rows.append(
            {
                "table": point.table,
                "model": point.model,
                "size": f"{point.height}x{point.width}",
                "device": point.device,
                "precision": point.precision,
                "published_ms": round(point.ms, 3),
                "leave_one_out": round(float(np.exp(alone[index])), 3),
                "leave_table_out": round(float(np.exp(without_table[index])), 3),
                "inside": bool(inside[index]),
            }
        )
        say(
            f"{point.table[:32]:<32}  {point.model:<22} {point.height:>4}x{point.width:<4} "
            f"{point.device:<13} {point.precision:<4} {point.ms:9.2f} ms published, estimate x "
            f"{np.exp(alone[index]):4.2f}, without its table x {np.exp(without_table[index]):4.2f}"
            f"{'' if inside[index] else '  outside'}"
        )
    say("")
    groups: list[tuple[str, NDArray[np.bool_]]] = [
        (table, np.array([entry == table for entry in tables])) for table in dict.fromkeys(tables)
    ]
    engines = np.array([point.runtime == "tensorrt" for point in points])
    (longest, _), *_ = Counter(tables).most_common(1)
    groups += [
        ("TensorRT engines alone", engines),
        ("all but the longest table", np.array([table != longest for table in tables])),
        ("all", np.ones(len(points), bool)),
    ]
    summary = []
    for name, chosen in groups:
        figures = {
            "table": name,
            "points": int(chosen.sum()),
            "median_error": round(float(np.median(_off(alone[chosen]))), 4),
            "inside": round(float(inside[chosen].mean()), 4),
            "median_error_without_table": round(float(np.median(_off(without_table[chosen]))), 4),
            "inside_without_table": round(float(inside_table[chosen].mean()), 4),
        }
        summary.append(figures)
        say(
            f"{name:<36} {figures['points']:3} points  leave-one-out: median error "
            f"{figures['median_error']:5.1%}, {figures['inside']:4.0%} inside   without the table: "
            f"{figures['median_error_without_table']:5.1%}, {figures['inside_without_table']:4.0%}"
        )
    say("")
    for name, value in zip(_NAMES, astuple(fitted), strict=True):
        say(f"    {name}={value:.3g},")
    say(f"SPREAD = {spread:.2f}")
    write_json(
        options.json,
        {
            "points": rows,
            "tables": summary,
            "constants": dict(zip(_NAMES, astuple(fitted), strict=True)),
            "spread": spread,
        },
    )
    ours = np.array([*astuple(CONSTANTS), SPREAD])
    theirs = np.array([*astuple(fitted), spread])
    if options.check and not np.allclose(ours, theirs, rtol=0.02):
        say("edgeseg/estimate/roofline.py has other constants than this fit")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
