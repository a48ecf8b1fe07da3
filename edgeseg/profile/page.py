"""A profile as text and as a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeseg.ledger import Summary
from edgeseg.profile.machine import Sample
from edgeseg.profile.timeline import Timeline
from edgeseg.report import (
    Bar,
    Bars,
    Block,
    Details,
    Figure,
    Figures,
    LineChart,
    Paragraph,
    Picture,
    Pictures,
    Report,
    Section,
    Series,
    Stack,
    Table,
)

if TYPE_CHECKING:
    from edgeseg.engine.layers import LayerTime
    from edgeseg.profile.measurement import Profile

__all__ = [
    "DEFINITIONS",
    "profile_page",
    "profile_text",
    "speed_figures",
    "stage_blocks",
    "work_ms",
]

# Layers that a terminal shows, and a chart; the report's table and JSON have all.
_LAYERS_SHOWN = 15
# Points of a line over time: more than a phone has pixels for none.
_POINTS = 240

#: what the figures mean, for the foot of a page
DEFINITIONS = (
    "Frames per second: finished masks minus one, over the time from the first finished mask to "
    "the last; reading, resizing, network, upsampling and bringing the mask to frame size are all "
    "in it. Mask age: from the moment the source had the frame to its finished mask; frames of a "
    "file are read ahead and wait in line, frames of a live source are dropped instead. Jitter: "
    "the standard deviation of the time from one finished mask to the next."
)

_OVERLAP = (
    "Stages overlap: reading, inference and output run side by side, so the frame rate is set by "
    "the slowest of them, not by their sum."
)
_LAYER_REMARK = (
    "In the order in which they run, each the median over runs of its own, with the library's "
    "counters on. A layer is what the library made of the graph: the operators in its name were "
    "fused and have one time together. What happens between layers is in no layer, and layers that "
    "ran side by side count twice; so the sum is not the time of the network, and a share is a "
    "share of the sum."
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


def profile_text(found: Profile) -> str:
    """Plain text for a terminal."""
    summary, times = found.summary, found.intervals
    height, width = found.frame_size
    lines = [
        f"{found.model} on {found.description}",
        f"{found.source}: {width}x{height} frames, network {found.network_size[1]}x"
        f"{found.network_size[0]}",
        "",
        f"{summary.fps:8.1f}  frames per second, frame to finished mask",
        f"{summary.frames:8d}  frames, {summary.dropped} dropped",
        f"{work_ms(summary):8.1f}  ms of work on a frame, from pixels to mask, median",
        f"{summary.mask_age_ms.p50:8.1f}  ms mask age, median "
        f"({summary.mask_age_ms.p99:.1f} ms at the 99th percentile)"
        + ("" if found.live else "; frames of a file wait in line"),
        f"{times.deviation_ms:8.1f}  ms jitter of the time between masks "
        f"(median {times.p50_ms:.1f}, 99th percentile {times.p99_ms:.1f})",
        f"{found.peak_rss_mb:8.0f}  MB of memory at most",
        "",
        "stage          p50 ms   p95 ms   p99 ms",
    ]
    for name, stage in summary.stages.items():
        lines.append(f"{name:<12}{stage.p50_ms:9.2f}{stage.p95_ms:9.2f}{stage.p99_ms:9.2f}")
    lines += ["", _OVERLAP, "", "the machine, meanwhile"]
    lines += [f"{name:<12} {text}" for name, text in found.use.rows(found.peak_rss_mb)]
    if found.layers:
        slowest = sorted(found.layers, key=lambda layer: layer.ms, reverse=True)
        total = sum(layer.ms for layer in found.layers)
        lines += [
            "",
            f"the slowest of {len(found.layers)} layers, timed one by one ({total:.2f} ms in all; "
            "fused ones have one time together)",
            *(
                f"{layer.ms:9.3f} ms {_share(layer.ms, total):>6}  {layer.name}"
                + (f" ({layer.kind})" if layer.kind else "")
                for layer in slowest[:_LAYERS_SHOWN]
            ),
        ]
    lines += [*([""] if found.notes else []), *found.notes]
    return "\n".join(lines)


def profile_page(found: Profile) -> Report:
    """The same as a page, with plots."""
    top: list[Block] = [speed_figures(found.summary, found.peak_rss_mb, live=found.live)]
    remarks = list(found.notes)
    if found.use.throttled:
        remarks.insert(
            0,
            "The machine slowed itself down while this was measured (heat, or an overload of its "
            "supply): cooled and well fed it is faster.",
        )
    top += [Paragraph(remark) for remark in remarks]
    return Report(
        title=f"{found.model}: {found.summary.fps:.1f} frames per second",
        subtitle=f"{found.description} · {found.source}",
        sections=(
            Section("", tuple(top)),
            Section("Over time", _time_blocks(found)),
            Section("Where the time of a frame goes", stage_blocks(found.summary)),
            Section("The machine, meanwhile", _machine_blocks(found)),
            *_layer_sections(found.layers),
            Section(
                "The last frame",
                (
                    Pictures(
                        (
                            Picture(found.last.frame.pixels, "as it came"),
                            Picture(found.last.draw(), "with what was found"),
                        )
                    ),
                ),
            ),
        ),
        footer=DEFINITIONS,
    )


def _time_blocks(found: Profile) -> tuple[Block, ...]:
    timeline, times = found.timeline, found.intervals
    if len(timeline) < 2:
        # Of a live source, a caller may have been given fewer masks than were finished.
        return (Paragraph("Too few masks were taken to show them over time."),)
    age = "mask age" if found.live else "mask age, waiting in line included"
    return (
        LineChart(
            (
                Series(
                    "time since the mask before",
                    _thinned(timeline.seconds[1:], timeline.intervals_ms),
                ),
                Series(age, _thinned(timeline.seconds, timeline.ages_ms)),
            ),
            x_label="seconds since the first mask",
            y_label="milliseconds",
            caption="Each finished mask. Where there are more than the page has room for, the "
            "slowest of its neighbours stands for them.",
            from_zero=True,
        ),
        LineChart(
            (Series("", _shares(timeline)),),
            x_label="milliseconds from one finished mask to the next",
            y_label="% of the masks that took no longer",
            caption=f"Median {times.p50_ms:.1f} ms, 95th percentile {times.p95_ms:.1f} ms, 99th "
            f"{times.p99_ms:.1f} ms; standard deviation (jitter) {times.deviation_ms:.1f} ms.",
        ),
    )


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """At most 240 points: of each stretch the highest, so that no peak is lost."""
    if len(x) <= _POINTS:
        return tuple(zip(x.tolist(), y.tolist(), strict=True))
    edges = np.arange(_POINTS) * len(x) // _POINTS
    parts = zip(edges, [*edges[1:], len(x)], strict=True)
    peaks = [start + int(np.argmax(y[start:end])) for start, end in parts]
    return tuple((float(x[peak]), float(y[peak])) for peak in peaks)


def _shares(timeline: Timeline) -> tuple[tuple[float, float], ...]:
    """(interval in ms, per cent of the masks that took no longer), rising."""
    times = np.sort(timeline.intervals_ms)
    ranks = np.unique(np.linspace(0, len(times) - 1, min(len(times), _POINTS)).round().astype(int))
    return tuple((float(times[rank]), 100.0 * (rank + 1) / len(times)) for rank in ranks)


def _machine_blocks(found: Profile) -> tuple[Block, ...]:
    blocks: list[Block] = [
        Table(header=("of the machine", "taken"), rows=found.use.rows(found.peak_rss_mb)),
    ]
    for name, label in (
        ("power_w", "watts"),
        ("temperature_c", "degrees Celsius"),
        ("rss_mb", "MB of memory"),
    ):
        points = _readings(found.samples, name)
        if len(points) >= 3:
            blocks.append(LineChart((Series("", points),), x_label="seconds", y_label=label))
    if found.use.sources:
        blocks.append(Paragraph(f"Read from {', '.join(found.use.sources)}."))
    return tuple(blocks)


def _readings(samples: tuple[Sample, ...], name: str) -> tuple[tuple[float, float], ...]:
    values = [(s.seconds, getattr(s.reading, name)) for s in samples]
    known = [(seconds, float(value)) for seconds, value in values if value is not None]
    if not known:
        return ()
    return _thinned(np.array([x for x, _ in known]), np.array([y for _, y in known]))


def _layer_sections(layers: tuple[LayerTime, ...]) -> tuple[Section, ...]:
    if not layers:
        return ()
    total = sum(layer.ms for layer in layers)
    slowest = sorted(layers, key=lambda layer: layer.ms, reverse=True)[:_LAYERS_SHOWN]
    blocks: list[Block] = []
    kinds: dict[str, tuple[int, float]] = {}
    for layer in layers:
        count, ms = kinds.get(layer.kind, (0, 0.0))
        kinds[layer.kind] = count + 1, ms + layer.ms
    if len(kinds) > 1 and total > 0:
        groups = sorted(kinds.items(), key=lambda item: item[1][1], reverse=True)
        shown, rest = groups[:7], groups[7:]
        parts = [Bar(f"{count} {kind or 'other'}", ms, _ms(ms)) for kind, (count, ms) in shown]
        if rest:
            others = sum(ms for _, (_, ms) in rest)
            parts.append(Bar(f"{sum(n for _, (n, _) in rest)} others", others, _ms(others)))
        blocks.append(Stack(tuple(parts), caption="By kind."))
    blocks += [
        Bars(
            tuple(Bar(_short(layer), layer.ms, _ms(layer.ms)) for layer in slowest),
            caption=f"The slowest {len(slowest)} of {len(layers)}.",
        ),
        Paragraph(_LAYER_REMARK),
        Details(
            f"All {len(layers)} layers",
            (
                Table(
                    header=("layer", "kind", "ms", "share"),
                    rows=tuple(
                        (layer.name, layer.kind, f"{layer.ms:.3f}", _share(layer.ms, total))
                        for layer in layers
                    ),
                    align="llrr",
                ),
            ),
        ),
    ]
    return (Section("The network, layer by layer", tuple(blocks)),)


def _short(layer: LayerTime) -> str:
    """A layer's name for a narrow column: what it is, and the last of what is fused in it."""
    last = layer.name.rpartition(" + ")[2]
    return f"{last} ({layer.kind})" if layer.kind else last


def _ms(ms: float) -> str:
    """Milliseconds with three digits or so."""
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms"


def _share(part: float, total: float) -> str:
    return f"{100 * part / total:.1f} %" if total > 0 else ""
