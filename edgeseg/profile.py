"""How fast a model is here, frame to finished mask, and where the time goes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from edgeseg.errors import RequestError, SourceError
from edgeseg.frame import Pixels
from edgeseg.ledger import Summary
from edgeseg.model import Model
from edgeseg.pipeline import Pipeline
from edgeseg.report import (
    Bar,
    Figure,
    Figures,
    Paragraph,
    Picture,
    Pictures,
    Report,
    Section,
    Stack,
    Table,
)
from edgeseg.result import Result
from edgeseg.source import open_source
from edgeseg.source.address import without_password

__all__ = ["Profile", "profile"]

_WARM_UP = 3
# Runs of the network over which each layer's median is taken.
_LAYER_RUNS = 20
# Layers that a terminal shows; the report and JSON have all.
_LAYERS_SHOWN = 15


@runtime_checkable
class TimesLayers(Protocol):
    """An engine that can say how long each layer takes."""

    def layer_times(self, images: Sequence[Pixels]) -> list[tuple[str, float]]:
        """Name and median milliseconds of each layer, over network inputs."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What a profiling run found.

    ``summary`` holds frames per second, counts, stage times and mask age. ``peak_rss_mb`` is the
    largest resident memory of the whole process so far, in MB. ``last`` is the last result.
    ``layers``: name and median milliseconds of each layer of the network, timed one by one; empty
    when that was not asked for.
    """

    model: str
    engine: str
    description: str
    source: str
    frame_size: tuple[int, int]
    network_size: tuple[int, int]
    live: bool
    summary: Summary
    peak_rss_mb: float
    notes: tuple[str, ...]
    last: Result
    layers: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; DESIGN's keys are at the top level."""
        return {
            **self.summary.to_dict(),
            "engine": self.engine,
            "engine_description": self.description,
            "model": self.model,
            "source": self.source,
            "frame_size": list(self.frame_size),
            "network_size": list(self.network_size),
            "live": self.live,
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "notes": list(self.notes),
            "layers": [{"name": name, "ms": ms} for name, ms in self.layers],
        }

    def render(self) -> str:
        """Plain text for a terminal."""
        summary = self.summary
        height, width = self.frame_size
        lines = [
            f"{self.model} on {self.description}",
            f"{self.source}: {width}x{height} frames, network {self.network_size[1]}x"
            f"{self.network_size[0]}",
            "",
            f"{summary.fps:8.1f}  frames per second, frame to finished mask",
            f"{summary.frames:8d}  frames, {summary.dropped} dropped",
            f"{work_ms(summary):8.1f}  ms of work on a frame, from pixels to mask, median",
            f"{summary.mask_age_ms.p50:8.1f}  ms mask age, median "
            f"({summary.mask_age_ms.p99:.1f} ms at the 99th percentile)"
            + ("" if self.live else "; frames of a file wait in line"),
            f"{self.peak_rss_mb:8.0f}  MB of memory at most",
            "",
            "stage          p50 ms   p95 ms   p99 ms",
        ]
        for name, times in summary.stages.items():
            lines.append(f"{name:<12}{times.p50_ms:9.2f}{times.p95_ms:9.2f}{times.p99_ms:9.2f}")
        lines += [
            "",
            "Stages overlap: reading, inference and output run side by side, so the frame rate is "
            "set by the slowest of them, not by their sum.",
        ]
        if self.layers:
            slowest = sorted(self.layers, key=lambda layer: layer[1], reverse=True)
            total = sum(ms for _, ms in self.layers)
            lines += [
                "",
                f"the slowest of {len(self.layers)} layers, timed one by one "
                f"({total:.2f} ms in all)",
                *(f"{ms:9.3f} ms  {name}" for name, ms in slowest[:_LAYERS_SHOWN]),
            ]
        lines += list(self.notes)
        return "\n".join(lines)

    def report(self) -> Report:
        """The same as a page."""
        return Report(
            title=f"{self.model}: {self.summary.fps:.1f} frames per second",
            subtitle=f"{self.description} · {self.source}",
            sections=(
                Section("", (speed_figures(self.summary, self.peak_rss_mb, live=self.live),)),
                Section("Where the time of a frame goes", stage_blocks(self.summary)),
                *self._layer_sections(),
                Section(
                    "The last frame",
                    (
                        Pictures(
                            (
                                Picture(self.last.frame.pixels, "as it came"),
                                Picture(self.last.draw(), "with what was found"),
                            )
                        ),
                    ),
                ),
            ),
            footer=DEFINITIONS,
        )

    def _layer_sections(self) -> tuple[Section, ...]:
        if not self.layers:
            return ()
        table = Table(
            header=("layer", "ms"),
            rows=tuple((name, f"{ms:.3f}") for name, ms in self.layers),
            align="lr",
        )
        remark = Paragraph(
            "In the order in which they run. Each was timed by itself, so that together they take "
            "longer than the network does."
        )
        return (Section("The network, layer by layer", (remark, table)),)


#: what the figures mean, for the foot of a page
DEFINITIONS = (
    "Frames per second: finished masks minus one, over the time from the first finished mask to "
    "the last; reading, resizing, network, upsampling and bringing the mask to frame size are all "
    "in it. Mask age: from the moment the source had the frame to its finished mask; frames of a "
    "file are read ahead and wait in line, frames of a live source are dropped instead."
)


def work_ms(summary: Summary) -> float:
    """Milliseconds of work on one frame, from its arrival to its mask: the medians added up."""
    stages = ("fit", "network", "head", "restore")
    return sum(times.p50_ms for name, times in summary.stages.items() if name in stages)


def speed_figures(summary: Summary, peak_rss_mb: float, *, live: bool) -> Figures:
    """The tiles of a speed report."""
    work = Figure(f"{work_ms(summary):.0f} ms", "work on a frame", "from pixels to mask, median")
    if live:
        age = summary.mask_age_ms
        work = Figure(
            f"{age.p50:.0f} ms", "mask age, median", f"{age.p99:.0f} ms at the 99th percentile"
        )
    return Figures(
        (
            Figure(f"{summary.fps:.1f}", "frames per second", "frame to finished mask"),
            work,
            Figure(str(summary.frames), "frames", f"{summary.dropped} dropped"),
            Figure(f"{peak_rss_mb:.0f} MB", "memory at most", "the whole process"),
        )
    )


def stage_blocks(summary: Summary) -> tuple[Stack | Table | Paragraph, ...]:
    """Stage times of a speed report: a stacked bar, a table, a remark."""
    stages = summary.stages
    blocks: list[Stack | Table | Paragraph] = []
    if any(times.p50_ms > 0 for times in stages.values()):
        blocks.append(
            Stack(
                tuple(
                    Bar(label=name, value=times.p50_ms, text=f"{times.p50_ms:.1f} ms")
                    for name, times in stages.items()
                ),
                caption="Median of each stage. Stages of different frames overlap.",
            )
        )
    blocks.append(
        Table(
            header=("stage", "p50 ms", "p95 ms", "p99 ms"),
            rows=tuple(
                (name, f"{t.p50_ms:.2f}", f"{t.p95_ms:.2f}", f"{t.p99_ms:.2f}")
                for name, t in stages.items()
            ),
            align="lrrr",
        )
    )
    return tuple(blocks)


def profile(
    model: Model,
    uri: str = "synthetic:?frames=0",
    *,
    frames: int = 100,
    layers: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Runs ``model`` over ``frames`` frames of ``uri`` and measures, after three to warm up.

    ``layers``: afterwards, the network's layers one by one on the last frame; RequestError when
    the engine cannot do that. ``progress(done, total)`` is called after each frame. SourceError
    when the source ends before two frames were measured.
    """
    engine = model.engine
    if layers and not isinstance(engine, TimesLayers):
        raise RequestError(
            f"single layers are timed by TensorRT only, and {model.spec.name} is on {engine.name}; "
            "leave out --layers"
        )
    blank = np.zeros((model.spec.height, model.spec.width, 3), np.uint8)
    for _ in range(_WARM_UP):
        model(blank)
    with Pipeline(
        engine, open_source(uri), max_frames=frames, postprocessing=model.postprocessing
    ) as pipeline:
        last: Result | None = None
        for done, result in enumerate(pipeline, 1):
            last = result
            if progress is not None:
                progress(done, frames)
        source = pipeline.source
        summary = pipeline.ledger.summary()
        notes = source.notes
        live = source.live
    if last is None or summary.frames < 2:
        raise SourceError(f"{uri} gave {summary.frames} frames, and a profile needs two or more")
    timed: list[tuple[str, float]] = []
    if layers and isinstance(engine, TimesLayers):
        timed = engine.layer_times([last.geometry.fit(last.frame.pixels)] * _LAYER_RUNS)
    return Profile(
        model=model.spec.name,
        engine=engine.name,
        description=engine.description,
        source=without_password(uri),
        frame_size=(last.frame.height, last.frame.width),
        network_size=(model.spec.height, model.spec.width),
        live=live,
        summary=summary,
        peak_rss_mb=peak_rss_mb(),
        notes=notes,
        last=last,
        layers=tuple(timed),
    )


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
