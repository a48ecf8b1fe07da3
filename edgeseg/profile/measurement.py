"""One model, measured over the frames of one source."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeseg.engine.layers import LayerTime, TimesLayers
from edgeseg.errors import RequestError, SourceError
from edgeseg.ledger import Summary
from edgeseg.model import Model
from edgeseg.pipeline import Pipeline
from edgeseg.profile.contestant import check_length
from edgeseg.profile.machine import MachineUse, Sample, SensorWatch, peak_rss_mb
from edgeseg.profile.page import profile_page, profile_text
from edgeseg.profile.timeline import Intervals, Timeline
from edgeseg.report import Report
from edgeseg.result import Result
from edgeseg.sensors import Sensors
from edgeseg.source import open_source
from edgeseg.source.address import without_password

__all__ = ["Profile", "profile"]

_FRAMES = 100
_WARM_UP = 10
# A desktop at rest takes less than this of one core.
_QUIET_PERCENT = 30
# Runs of the network over which each layer's median is taken.
_LAYER_RUNS = 20


@dataclass(frozen=True, eq=False)
class Profile:
    """What a profiling run found.

    ``summary`` holds frames per second, counts, stage times and mask age; ``intervals`` the times
    between finished masks, and ``timeline`` each of them. ``use``: what was taken from the machine,
    ``samples`` its readings. ``peak_rss_mb`` is the largest resident memory of the whole process so
    far, in MB. ``last`` is the last result. ``layers``: the layers of the network, timed one by
    one; empty when that was not asked for. ``notes``: what else has to be known, one sentence each.
    """

    model: str
    engine: str
    description: str
    source: str
    frame_size: tuple[int, int]
    network_size: tuple[int, int]
    live: bool
    summary: Summary
    intervals: Intervals
    timeline: Timeline
    use: MachineUse
    samples: tuple[Sample, ...]
    peak_rss_mb: float
    notes: tuple[str, ...]
    last: Result
    stopped: bool = False
    layers: tuple[LayerTime, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; DESIGN's keys are at the top level."""
        return {
            **self.summary.to_dict(),
            "interval_ms": {
                "p50": round(self.intervals.p50_ms, 3),
                "p95": round(self.intervals.p95_ms, 3),
                "p99": round(self.intervals.p99_ms, 3),
            },
            "jitter_ms": {
                "deviation": round(self.intervals.deviation_ms, 3),
                "p99_minus_p50": round(self.intervals.p99_minus_p50_ms, 3),
            },
            "engine": self.engine,
            "engine_description": self.description,
            "model": self.model,
            "source": self.source,
            "frame_size": list(self.frame_size),
            "network_size": list(self.network_size),
            "live": self.live,
            "stopped": self.stopped,
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "machine": self.use.to_dict(),
            "readings": [
                {"seconds": round(sample.seconds, 3), **sample.reading.to_dict()}
                for sample in self.samples
            ],
            "notes": list(self.notes),
            "layers": [layer._asdict() for layer in self.layers],
        }

    def render(self) -> str:
        """Plain text for a terminal."""
        return profile_text(self)

    def report(self) -> Report:
        """The same as a page, with plots."""
        return profile_page(self)


def profile(
    model: Model,
    uri: str = "synthetic:?frames=0",
    *,
    frames: int | None = None,
    seconds: float | None = None,
    warm_up: int = _WARM_UP,
    layers: bool = False,
    sensors: Sensors | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Runs ``model`` over frames of ``uri`` and measures.

    It ends after ``frames`` frames, or so many ``seconds`` after the first mask, whichever comes
    first; after 100 frames when neither is given. ``warm_up``: runs of the network before, on blank
    frames, that do not count. ``layers``: afterwards, the network's layers one by one on the last
    frame; RequestError when the engine cannot do that. ``sensors``: what is read meanwhile; None
    opens what is here. ``progress(done, total)`` is called after each frame.

    Ctrl-C ends the measurement; what was measured so far is given (``stopped``), and
    KeyboardInterrupt raised if that is nothing. SourceError when the source ends before two frames
    were measured.
    """
    engine = model.engine
    if layers and not isinstance(engine, TimesLayers):
        raise RequestError(
            f"{engine.name} cannot time the single layers of {model.spec.name}; leave out --layers"
        )
    check_length(frames, seconds)
    wanted = _FRAMES if frames is None and seconds is None else frames
    timeline = Timeline()
    last: Result | None = None
    stopped = ran_out = False
    try:
        blank = np.zeros((model.spec.height, model.spec.width, 3), np.uint8)
        for _ in range(warm_up):
            model(blank)
        with (
            Pipeline(
                engine, open_source(uri), max_frames=wanted, postprocessing=model.postprocessing
            ) as pipeline,
            SensorWatch(sensors) as watch,
        ):
            try:
                ends = float("inf")
                # Kept, since a loop that leaves an iterator to nobody ends the pipeline with it.
                results = iter(pipeline)
                for result in results:
                    if last is None and seconds is not None:
                        ends = time.monotonic() + seconds
                    last = result
                    timeline.add(result)
                    if progress is not None:
                        progress(len(timeline), wanted or 0)
                    if time.monotonic() >= ends:
                        break
                else:
                    ran_out = wanted is None or len(timeline) < wanted
            except KeyboardInterrupt:
                stopped = True
            # Before the frames that are still under way are given up.
            source, summary = pipeline.source, pipeline.ledger.summary()
    except KeyboardInterrupt:
        # In the warm-up, or a second one.
        raise KeyboardInterrupt from None
    if stopped and summary.frames < 2:
        raise KeyboardInterrupt
    if last is None or summary.frames < 2:
        raise SourceError(
            f"{without_password(uri)} gave {summary.frames} frames, and a profile needs two or more"
        )
    use = watch.use(summary.fps)
    timed: tuple[LayerTime, ...] = ()
    if layers and isinstance(engine, TimesLayers) and not stopped:
        found = engine.layer_times([last.geometry.fit(last.frame.pixels)] * _LAYER_RUNS)
        timed = tuple(LayerTime(*layer) for layer in found)
    return Profile(
        model=model.spec.name,
        engine=engine.name,
        description=engine.description,
        source=without_password(uri),
        frame_size=(last.frame.height, last.frame.width),
        network_size=(model.spec.height, model.spec.width),
        live=source.live,
        summary=summary,
        intervals=timeline.intervals(),
        timeline=timeline,
        use=use,
        samples=watch.samples,
        peak_rss_mb=peak_rss_mb(),
        notes=(*source.notes, *_notes(timeline, use, frames, seconds, stopped, ran_out)),
        last=last,
        stopped=stopped,
        layers=timed,
    )


def _notes(
    timeline: Timeline,
    use: MachineUse,
    frames: int | None,
    seconds: float | None,
    stopped: bool,
    ran_out: bool,
) -> list[str]:
    """What did not go as asked, or as it should."""
    notes = []
    if stopped:
        notes.append(
            f"It was stopped after {len(timeline)} frames; this is what was measured so far."
        )
    elif ran_out and seconds is not None:
        took = float(timeline.seconds[-1])
        notes.append(f"The source ended after {took:.1f} s of the {seconds:g} s asked for.")
    elif ran_out and frames is not None:
        notes.append(f"The source ended after {len(timeline)} of the {frames} frames asked for.")
    if use.others_percent is not None and use.others_percent > _QUIET_PERCENT:
        notes.append(
            f"Other programs took {use.others_percent:.0f} % of a core meanwhile; on a quiet "
            "machine the figures may be better."
        )
    return notes
