"""The figures of a run for Prometheus, in its text format.

Names begin with ``edgeseg_``; times are in seconds, memory in bytes, shares from 0 to 1, and
counters end in ``_total`` (https://prometheus.io/docs/practices/naming/). Labels: ``source``,
``outlet``, ``stage``, ``quantile``, ``state``, ``fate``. What is not known is absent, and not 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from edgeseg.errors import RequestError
from edgeseg.source import State
from edgeseg.stats import SourceStats, Stats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from edgeseg.sensors import Reading
    from edgeseg.sink.outlet import OutletStats

__all__ = ["CONTENT_TYPE", "exposition"]

#: what an HTTP answer with an exposition says it is: the text format, version 0.0.4
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(stats: Stats) -> bytes:
    """All of ``stats`` as a page for Prometheus to fetch; UTF-8, of `CONTENT_TYPE`.

    Made by ``prometheus_client`` from a registry of its own, so that an application's other
    metrics are neither in it nor in its way. RequestError where that is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise RequestError(
            "figures for Prometheus need prometheus-client, and it is not installed; "
            "pip install 'edgeseg[serve]' adds it"
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Moment(stats))
    return generate_latest(registry)


class _Moment:
    """A collector of one moment's figures."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The families that have something to say."""
        for family in (
            *_of_run(self._stats),
            *_of_sources(self._stats.sources),
            *_of_frames(self._stats.sources),
            *_of_outlets(self._stats.outlets),
            *(() if self._stats.reading is None else _of_machine(self._stats.reading)),
        ):
            if family.samples:
                yield family


def _of_run(stats: Stats) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

    height, width = stats.network_size
    yield InfoMetricFamily(
        "edgeseg_run",
        "The model, and what runs it.",
        value={
            "model": stats.model,
            "engine": stats.engine,
            "description": stats.description,
            "network_height": str(height),
            "network_width": str(width),
        },
    )
    for name, text, value in (
        ("uptime_seconds", "How long the run has lasted.", stats.uptime_s),
        (
            "in_engine_seconds",
            "How long the oldest frame has been inside the engine; 0 when there is none.",
            stats.in_engine_s,
        ),
        ("threads", "Living threads of this run.", len(stats.threads)),
    ):
        yield GaugeMetricFamily(f"edgeseg_{name}", text, value=value)


def _of_sources(sources: Sequence[SourceStats]) -> Iterator[Metric]:
    """States, sizes, and what became of the frames that the sources were sent."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    named = InfoMetricFamily(
        "edgeseg_source", "Where the frames come from, without a password.", labels=["source"]
    )
    state = GaugeMetricFamily(
        "edgeseg_source_state",
        "1 for the state that the source is in, 0 for the others.",
        labels=["source", "state"],
    )
    lasted = GaugeMetricFamily(
        "edgeseg_source_state_seconds",
        "How long the source has been in its state.",
        labels=["source"],
    )
    failed = GaugeMetricFamily(
        "edgeseg_source_failed", "Whether an error ended the source.", labels=["source"]
    )
    size = GaugeMetricFamily(
        "edgeseg_source_size_pixels",
        "Height and width of the source's latest frame.",
        labels=["source", "side"],
    )
    frames = CounterMetricFamily(
        "edgeseg_source_frames",
        "What became of the frames that the source was sent.",
        labels=["source", "fate"],
    )
    reconnects = CounterMetricFamily(
        "edgeseg_source_reconnects",
        "How often the source was lost and opened anew.",
        labels=["source"],
    )
    now_ns = time.monotonic_ns()
    for one in sources:
        named.add_metric([one.name], {"uri": one.uri})
        for name in get_args(State):
            state.add_metric([one.name, name], float(one.status.state == name))
        lasted.add_metric([one.name], (now_ns - one.status.since_ns) / 1e9)
        failed.add_metric([one.name], float(one.error is not None))
        if one.size is not None:
            for side, pixels in zip(("height", "width"), one.size, strict=True):
                size.add_metric([one.name, side], pixels)
        tally = one.tally
        for fate, count in (
            ("delivered", tally.delivered),
            ("dropped", tally.dropped),
            ("damaged", tally.damaged),
            ("stale", tally.stale),
        ):
            frames.add_metric([one.name, fate], count)
        reconnects.add_metric([one.name], tally.reconnects)
    yield from (named, state, lasted, failed, size, frames, reconnects)


def _of_frames(sources: Sequence[SourceStats]) -> Iterator[Metric]:
    """What the pipeline made of the frames, how fast, and how old the masks were."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        Metric,
    )

    masks = CounterMetricFamily("edgeseg_masks", "Masks that were finished.", labels=["source"])
    dropped = CounterMetricFamily(
        "edgeseg_frames_dropped",
        "Frames that were replaced by a newer one before they were processed, in the source "
        "or after it.",
        labels=["source"],
    )
    superseded = CounterMetricFamily(
        "edgeseg_masks_superseded",
        "Finished masks that a newer one replaced before they were taken.",
        labels=["source"],
    )
    fps = GaugeMetricFamily(
        "edgeseg_masks_per_second",
        "Finished masks per second over the last five seconds.",
        labels=["source"],
    )
    # Summaries by hand: the library's own family has no quantiles.
    stage = Metric(
        "edgeseg_stage_seconds",
        "Time that one stage took per frame, of the latest 20 000 frames.",
        "summary",
    )
    age = Metric(
        "edgeseg_mask_age_seconds",
        "From a frame's capture to its finished mask, of the latest 20 000 frames.",
        "summary",
    )
    for one in sources:
        summary = one.summary
        masks.add_metric([one.name], summary.frames)
        dropped.add_metric([one.name], summary.dropped)
        superseded.add_metric([one.name], one.superseded)
        fps.add_metric([one.name], one.fps)
        for name, times in summary.stages.items():
            for quantile, ms in (
                ("0.5", times.p50_ms),
                ("0.95", times.p95_ms),
                ("0.99", times.p99_ms),
            ):
                labels = {"source": one.name, "stage": name, "quantile": quantile}
                stage.add_sample(stage.name, labels, ms / 1e3)
        if summary.frames:
            for quantile, ms in (
                ("0.5", summary.mask_age_ms.p50),
                ("0.99", summary.mask_age_ms.p99),
            ):
                age.add_sample(age.name, {"source": one.name, "quantile": quantile}, ms / 1e3)
    yield from (masks, dropped, superseded, fps, stage, age)


def _of_outlets(outlets: Sequence[OutletStats]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    written = CounterMetricFamily(
        "edgeseg_outlet_written", "Results that the outlet's sink took.", labels=["outlet"]
    )
    dropped = CounterMetricFamily(
        "edgeseg_outlet_dropped", "Results that the outlet's sink did not take.", labels=["outlet"]
    )
    waiting = GaugeMetricFamily(
        "edgeseg_outlet_waiting", "Results that wait for the outlet's sink.", labels=["outlet"]
    )
    busy = GaugeMetricFamily(
        "edgeseg_outlet_busy_seconds",
        "How long the write under way takes already; 0 when there is none.",
        labels=["outlet"],
    )
    failed = GaugeMetricFamily(
        "edgeseg_outlet_failed", "Whether the outlet was given up.", labels=["outlet"]
    )
    for name, one in zip(_distinct([one.name for one in outlets]), outlets, strict=True):
        written.add_metric([name], one.written)
        dropped.add_metric([name], one.dropped)
        waiting.add_metric([name], one.waiting)
        busy.add_metric([name], one.busy_s)
        failed.add_metric([name], float(one.error is not None))
    yield from (written, dropped, waiting, busy, failed)


def _of_machine(reading: Reading) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    for name, text, value, unit in (
        ("cpu_cores", "Processor cores that this process keeps busy.", reading.cpu_percent, 0.01),
        ("resident_memory_bytes", "Resident memory of this process.", reading.rss_mb, 1e6),
        ("gpu_usage_ratio", "Share of time that the GPU is busy.", reading.gpu_percent, 0.01),
        ("gpu_memory_bytes", "Memory of the GPU that is in use.", reading.gpu_memory_mb, 1e6),
        ("temperature_celsius", "The hottest of SoC, CPU and GPU.", reading.temperature_c, 1.0),
        ("power_watts", "Power that the board or the package takes.", reading.power_w, 1.0),
        ("throttled", "Whether the clock is held down for heat.", reading.throttled, 1.0),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"edgeseg_{name}", text, value=value * unit)


def _distinct(names: Sequence[str]) -> list[str]:
    """``names``, numbered where one came before: Prometheus refuses a page with two alike."""
    distinct: list[str] = []
    for name in names:
        unique, number = name, 2
        while unique in distinct:
            unique, number = f"{name} ({number})", number + 1
        distinct.append(unique)
    return distinct
