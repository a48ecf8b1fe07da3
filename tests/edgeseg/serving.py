"""What the tests of the web page share: results, figures, and a camera that feeds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.ledger import MaskAge, StageTimes, Summary
from edgeseg.result import Outputs, SemanticResult
from edgeseg.sensors import Reading
from edgeseg.serve import WebPage
from edgeseg.sink import OutletStats
from edgeseg.source import State, Status, Tally
from edgeseg.spec import ModelSpec, Preprocessing
from edgeseg.stats import SourceStats, Stats

SPEC = ModelSpec(
    name="halves",
    architecture="none",
    task="semantic",
    height=48,
    width=64,
    classes=("left", "right_side"),
    colours=((250, 20, 20), (20, 20, 250)),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
)
LEGEND = dict(zip(SPEC.classes, SPEC.colours, strict=True))


def result(
    index: int, *, level: int | None = None, size: tuple[int, int] = (48, 64), age_ms: float = 12.0
) -> SemanticResult:
    """A grey frame, left class on its left; its level follows its number unless it is given."""
    grey = (40 + index * 3) % 200 if level is None else level
    class_map = np.zeros((48, 64), np.uint8)
    class_map[:, 32:] = 1
    captured_ns = time.monotonic_ns() - int(age_ms * 1e6)
    frame = Frame(np.full((*size, 3), grey, np.uint8), captured_ns, index)
    return SemanticResult.from_outputs(
        Outputs(class_map), frame, Geometry.between(*size, SPEC), SPEC
    )


def source_stats(
    name: str = "door", *, state: State = "live", reason: str = "", fps: float = 24.5
) -> SourceStats:
    """Figures of one source; none is like another, so that a mistaken one is seen."""
    return SourceStats(
        name=name,
        uri=f"rtsp://camera/{name}",
        status=Status(state, time.monotonic_ns() - 7_300_000_000, reason),
        tally=Tally(delivered=1234, dropped=56, damaged=7, stale=8, reconnects=9),
        size=(48, 64),
        fps=fps,
        summary=Summary(
            fps=24.0,
            frames=1178,
            dropped=56,
            stages={
                "capture": StageTimes(31.5, 35.0, 41.0),
                "fit": StageTimes(0.41, 0.55, 0.9),
                "network": StageTimes(11.2, 12.5, 19.0),
                "head": StageTimes(0.62, 0.8, 1.1),
                "restore": StageTimes(0.33, 0.4, 0.7),
            },
            mask_age_ms=MaskAge(18.4, 33.3),
        ),
        superseded=3,
        error=None,
    )


def stats(*sources: SourceStats, reading: Reading | None = None) -> Stats:
    """Figures of a run."""
    return Stats(
        model=SPEC.name,
        engine="openvino",
        description="OpenVINO 2026.1, CPU, 2 threads",
        network_size=(48, 64),
        uptime_s=3725.0,
        in_engine_s=0.004,
        threads=("edgeseg-capture-door", "edgeseg-inference"),
        sources=sources or (source_stats(),),
        outlets=(OutletStats("street.mp4", "wait", 1170, 0, 1, 0.0, None),),
        reading=reading or Reading(163.0, 310.5, None, None, 61.0, None, None, ("psutil",)),
    )


def web_page(
    address: str = "127.0.0.1:0",
    *,
    names: Sequence[str] = ("door",),
    figures: Callable[[], Stats] | None = None,
    **options: Any,
) -> WebPage:
    """A page on a port of its own."""

    def made() -> Stats:
        return stats(*(source_stats(name) for name in names))

    return WebPage(
        address, stats=figures or made, names=list(names), legend=dict(LEGEND), **options
    )


@contextmanager
def camera(page: WebPage, *names: str, fps: float = 50.0, **looks: Any) -> Iterator[None]:
    """Feeds the page with results from a thread, as a pipeline does."""
    ended = threading.Event()

    def run() -> None:
        sinks = [page.sink(name) for name in names or ("door",)]
        index = 0
        while not ended.wait(1 / fps):
            for place, sink in enumerate(sinks):
                made = result(index, **looks)
                # Each source has a frame number of its own.
                sink.write(replace(made, frame=replace(made.frame, index=index + 1000 * place)))
            index += 1

    thread = threading.Thread(target=run, name="test-camera")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
