"""What each step of a compression cost and gained, as one curve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeseg.compare import Comparison, Standing
from edgeseg.export.compress_recipe import CompressionRecipe
from edgeseg.export.prune import counted
from edgeseg.export.structure import Cost
from edgeseg.report import (
    Bar,
    Bars,
    Block,
    Curve,
    Figure,
    Figures,
    Paragraph,
    Point,
    Report,
    Section,
    Table,
)

__all__ = ["CompressionReport", "Step"]

#: what each task is judged by
_METRICS = {"miou": "mIoU", "mask_ap": "mask AP", "box_ap": "box AP"}


@dataclass(frozen=True)
class Step:
    """A model on the way: its bundle, its cost, and how many filters each layer has."""

    title: str
    bundle: Path
    cost: Cost
    filters: Mapping[str, int]

    @property
    def megabytes(self) -> float:
        """Of the ONNX file."""
        return (self.bundle / "model.onnx").stat().st_size / 1e6


@dataclass(frozen=True)
class CompressionReport:
    """The steps of a recipe, measured side by side; the first is the model as it came.

    ``comparison``: one standing for each of ``steps``. ``engine``: what they were measured on.
    """

    name: str
    recipe: CompressionRecipe
    steps: tuple[Step, ...]
    comparison: Comparison
    engine: str

    @property
    def metric(self) -> str:
        """Name, in ``Standing.figures``, of the figure that counts."""
        figures = self.comparison.standings[0].figures
        return next(name for name in _METRICS if name in figures and not math.isnan(figures[name]))

    @property
    def best(self) -> int:
        """The fastest step that loses no more than ``max_drop`` points of the first's accuracy."""
        standings = self.comparison.standings
        least = standings[0].figures[self.metric] - self.recipe.max_drop / 100
        allowed = [
            place
            for place, standing in enumerate(standings)
            # A figure that lies on the limit is within it, whatever the last bit says.
            if standing.figures[self.metric] >= least - 1e-9
        ]
        return min(allowed, key=lambda place: standings[place].frame_ms.p50)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        compared = self.comparison
        return {
            "data": compared.data,
            "split": compared.split,
            "pictures": compared.frames,
            "engine": self.engine,
            "metric": self.metric,
            "max_drop": self.recipe.max_drop,
            "best": self.steps[self.best].title,
            "steps": [
                {
                    "step": step.title,
                    "accuracy": standing.figures[self.metric],
                    "milliseconds": standing.frame_ms.to_dict(),
                    "macs": step.cost.macs,
                    "parameters": step.cost.parameters,
                    "megabytes": round(step.megabytes, 3),
                }
                for step, standing in self._pairs()
            ],
        }

    def render(self) -> str:
        """The table, for a terminal."""
        rows = [self._header(), *self._rows()]
        wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, wide, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self._measured(), "", *lines, "", self._verdict()])

    def report(self) -> Report:
        """The page."""
        first, best = self.comparison.standings[0], self.comparison.standings[self.best]
        before, after = self.steps[0], self.steps[self.best]
        change = (best.figures[self.metric] - first.figures[self.metric]) * 100
        figures = Figures(
            (
                Figure(
                    f"{first.frame_ms.p50 / best.frame_ms.p50:.2f}×",
                    "as fast",
                    f"{first.frame_ms.p50:.1f} ms before, {best.frame_ms.p50:.1f} ms after",
                ),
                Figure(
                    f"{best.figures[self.metric] * 100:.1f} %",
                    _METRICS[self.metric],
                    f"{change:+.2f} points",
                ),
                Figure(
                    f"{after.cost.macs / before.cost.macs:.0%}",
                    "of the multiplications",
                    f"{counted(before.cost.macs)} before, {counted(after.cost.macs)} after",
                ),
                Figure(
                    f"{after.megabytes:.1f}", "MB, ONNX file", f"{before.megabytes:.1f} MB before"
                ),
            )
        )
        curve = Curve(
            tuple(
                Point(
                    standing.frame_ms.p50,
                    standing.figures[self.metric] * 100,
                    step.title,
                    marked=place == self.best,
                )
                for place, (step, standing) in enumerate(self._pairs())
            ),
            "milliseconds a frame",
            f"{_METRICS[self.metric]}, %",
            f"Steps in their order; marked is the best trade-off: the fastest that loses "
            f"{self._allowed()} or less. {self._measured()}",
        )
        return Report(
            title=f"{self.name}: smaller and faster",
            subtitle=f"{self.recipe.architecture}; the best of {len(self.steps)}: {after.title}",
            sections=(
                Section("", (figures, Paragraph(self._verdict()))),
                Section("Accuracy against time", (curve,)),
                Section(
                    "Step by step",
                    (Table(self._header(), tuple(self._rows()), "l" + "r" * 7),),
                ),
                *self._layers(),
            ),
        )

    def _layers(self) -> Iterator[Section]:
        before, after = self.steps[0].filters, self.steps[self.best].filters
        if before == after:
            return
        bars: Block = Bars(
            tuple(
                Bar(
                    name,
                    after[name] / count,
                    str(count) if after[name] == count else f"{count} → {after[name]}",
                )
                for name, count in before.items()
            ),
            full=1.0,
        )
        yield Section("Filters that stay", (bars,))

    def _pairs(self) -> Iterator[tuple[Step, Standing]]:
        return zip(self.steps, self.comparison.standings, strict=True)

    def _header(self) -> tuple[str, ...]:
        return (
            "step",
            f"{_METRICS[self.metric]}, %",
            "points",
            "ms a frame",
            "times as fast",
            "multiplications",
            "parameters",
            "MB",
        )

    def _rows(self) -> Iterator[tuple[str, ...]]:
        first = self.comparison.standings[0]
        for place, (step, standing) in enumerate(self._pairs()):
            value = standing.figures[self.metric]
            change = (value - first.figures[self.metric]) * 100
            yield (
                step.title + (" (best)" if place == self.best else ""),
                f"{value * 100:.2f}",
                f"{change:+.2f}" if place else "",
                f"{standing.frame_ms.p50:.1f}",
                f"{first.frame_ms.p50 / standing.frame_ms.p50:.2f}",
                counted(step.cost.macs),
                counted(step.cost.parameters),
                f"{step.megabytes:.1f}",
            )

    def _measured(self) -> str:
        compared = self.comparison
        return (
            f"{compared.frames} pictures of {compared.data} {compared.split}, all steps in turn on "
            f"each; {self.engine}; medians of the time from frame to masks."
        )

    def _allowed(self) -> str:
        drop = self.recipe.max_drop
        return f"{drop:g} point{'' if drop == 1 else 's'}"

    def _verdict(self) -> str:
        best = self.comparison.standings[self.best]
        if self.best == 0:
            return (
                f"No step is faster and loses {self._allowed()} of {_METRICS[self.metric]} or less."
            )
        first = self.comparison.standings[0]
        change = (best.figures[self.metric] - first.figures[self.metric]) * 100
        return (
            f"{self.steps[self.best].title}: {first.frame_ms.p50 / best.frame_ms.p50:.2f} times as "
            f"fast, {change:+.2f} points of {_METRICS[self.metric]}."
        )
