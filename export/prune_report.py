"""What pruning did to each layer, for a person and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgeseg.export.prune import Pruning, counted
from edgeseg.export.structure import LayerShape, macs_of
from edgeseg.report import Bar, Bars, Figure, Figures, Paragraph, Report, Section, Table

__all__ = ["PruneReport"]


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after; ``macs`` are 0 for training heads."""

    name: str
    before: LayerShape
    after: LayerShape
    macs: tuple[int, int]


@dataclass(frozen=True)
class PruneReport:
    """The figures of one pruning.

    ``importance``: name of the measure. ``engine``: what milliseconds were measured on. ``notes``:
    what the frames gave cause to say.
    """

    model: str
    importance: str
    target: str
    pruning: Pruning
    engine: str | None = None
    notes: tuple[str, ...] = ()

    def layers(self) -> Iterator[LayerChange]:
        """Every convolution and linear layer, in the order of the state_dict."""
        pruning = self.pruning
        for name, before in pruning.before.items():
            after = pruning.after[name]
            positions = pruning.positions.get(name, 0)
            macs = (macs_of(before, positions), macs_of(after, positions))
            yield LayerChange(name, before, after, macs)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; costs and times are (before, after)."""
        before, after = self.pruning.costs
        return {
            "model": self.model,
            "importance": self.importance,
            "target": self.target,
            "size": list(self.pruning.size),
            "macs": [before.macs, after.macs],
            "parameters": [before.parameters, after.parameters],
            "milliseconds": self.pruning.milliseconds and list(self.pruning.milliseconds),
            "engine": self.engine,
            "layers": [
                {
                    "name": layer.name,
                    "out_channels": [layer.before.out_channels, layer.after.out_channels],
                    "in_channels": [layer.before.in_channels, layer.after.in_channels],
                    "macs": list(layer.macs),
                    "parameters": [layer.before.weights, layer.after.weights],
                }
                for layer in self.layers()
            ],
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """Plain text for a terminal: the layers that changed, then the sums."""
        changed = [layer for layer in self.layers() if layer.before != layer.after]
        wide = max([len("layer"), *(len(layer.name) for layer in changed)])
        lines = [*self.notes, f"{'layer':<{wide}}  {'filters':>13}  {'multiplications':>22}"]
        for layer in changed:
            filters = f"{layer.before.out_channels:>5} > {layer.after.out_channels:>5}"
            macs = " > ".join(f"{counted(each):>9}" for each in layer.macs)
            lines.append(f"{layer.name:<{wide}}  {filters:>13}  {macs:>22}")
        lines += ["", *(f"{title}: {text}" for title, text in self._sums())]
        return "\n".join(lines)

    def _sums(self) -> Iterator[tuple[str, str]]:
        before, after = self.pruning.costs
        height, width = self.pruning.size
        yield (
            f"multiplications at {height}x{width}",
            f"{counted(before.macs)} > {counted(after.macs)} ({after.macs / before.macs:.1%})",
        )
        share = after.parameters / before.parameters
        yield (
            "parameters",
            f"{counted(before.parameters)} > {counted(after.parameters)} ({share:.1%})",
        )
        if self.pruning.milliseconds is not None:
            slow, fast = self.pruning.milliseconds
            yield (
                f"milliseconds on {self.engine}",
                f"{slow:.2f} > {fast:.2f} ({slow / fast:.2f} times as fast)",
            )

    def report(self) -> Report:
        """The page."""
        before, after = self.pruning.costs
        height, width = self.pruning.size
        figures = [
            Figure(
                f"{after.macs / before.macs:.0%}",
                "of the multiplications",
                f"{counted(before.macs)} before, {counted(after.macs)} after, at {height}×{width}",
            ),
            Figure(
                f"{after.parameters / before.parameters:.0%}",
                "of the parameters",
                f"{counted(before.parameters)} before, {counted(after.parameters)} after",
            ),
        ]
        if self.pruning.milliseconds is not None:
            slow, fast = self.pruning.milliseconds
            figures.insert(
                0,
                Figure(
                    f"{slow / fast:.2f}×",
                    "as fast",
                    f"{slow:.1f} ms before, {fast:.1f} ms after; {self.engine}",
                ),
            )
        layers = [layer for layer in self.layers() if layer.name in self.pruning.positions]
        rows = tuple(
            (
                layer.name,
                _pair(layer.before.out_channels, layer.after.out_channels),
                _pair(layer.before.in_channels, layer.after.in_channels),
                f"{counted(layer.macs[0])} → {counted(layer.macs[1])}",
                f"{counted(layer.before.weights)} → {counted(layer.after.weights)}",
            )
            for layer in layers
        )
        bars = tuple(
            Bar(
                layer.name,
                layer.after.out_channels / layer.before.out_channels,
                _pair(layer.before.out_channels, layer.after.out_channels),
            )
            for layer in layers
        )
        return Report(
            title=f"{self.model}, pruned",
            subtitle=f"to {self.target}, by {self.importance}",
            sections=(
                Section(
                    "",
                    (
                        Figures(tuple(figures)),
                        *(Paragraph(note) for note in self.notes),
                    ),
                ),
                Section("Filters that stay", (Bars(bars, full=1.0),)),
                Section(
                    "Layer by layer",
                    (
                        Table(
                            ("layer", "filters", "reads", "multiplications", "parameters"),
                            rows,
                            "lrrrr",
                        ),
                    ),
                ),
            ),
        )


def _pair(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} → {after}"
