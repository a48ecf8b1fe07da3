"""The soak, quickly; and that each thing it looks at is found when it is wrong."""

from __future__ import annotations

import json
import random
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from edgeseg.engine.base import Engine
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.source import Source
from edgeseg.source.connection import Connection, Silence
from edgeseg.source.status import FrameLedger
from edgeseg.streams import Streams
from tests import soak
from tests.conftest import TINY_SPEC, Tiny
from tests.edgeseg.faults import FAULTS, FakeClock, Fault, FaultKind, FaultyCamera, StallingEngine
from tests.soak import (
    Denial,
    Footprint,
    Judge,
    Plan,
    Record,
    SinkFault,
    Slot,
    Suspect,
    Watch,
    checks,
    run,
    schedule,
)

MS = 1_000_000
# In some seconds the memory has not settled; `make soak` looks at it.
TAKES_MINUTES = "memory grows by less than 1% after warm-up"


@pytest.fixture(scope="module")
def record(tiny: Tiny) -> Record:
    """What a quick soak amounted to; ``tiny`` skips where its network cannot be made."""
    return run(Plan.quick(frames=2500))


def test_quick_soak(record: Record) -> None:
    wrong = [check for check in checks(record) if not check.holds and check.name != TAKES_MINUTES]
    assert wrong == [], soak.summary(record)
    assert set(record.faults) > set(FAULTS) and record.reconnects > 0
    assert record.received > record.delivered > record.finished > 0
    assert record.damaged and record.old and record.masks == record.finished - record.superseded


FOOTPRINT = Footprint(2, 5, 6)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"masks": 2499}, "frames processed"),
        ({"crashes": ("a thread: ValueError()",)}, "no crash"),
        ({"silent": ("nothing of camera 1 for 2.00 s",)}, "no hang over the stall timeout (0.6 s)"),
        ({"ending_s": 6.0}, "no hang over the stall timeout (0.6 s)"),
        (
            {"stale_found": 3, "stale_explained": 2},
            "no stale mask (2 frame intervals + its time in the engine)",
        ),
        ({"repeated": 1}, "never twice, never out of order"),
        ({"disordered": 1}, "never twice, never out of order"),
        ({"made_up": 1}, "real pictures, and their own masks"),
        ({"wrong_masks": 1}, "real pictures, and their own masks"),
        ({"sums": ("camera 1 gave 5 pictures and 4 came",)}, "every frame accounted for"),
        ({"rss_mb": (50.0, 60.0, 70.0, 100.0, 200.0, 101.0)}, TAKES_MINUTES),
        ({"after": replace(FOOTPRINT, threads=3)}, "threads and descriptors back to the start"),
        (
            {"after": replace(FOOTPRINT, native_threads=6)},
            "threads and descriptors back to the start",
        ),
        ({"after": replace(FOOTPRINT, descriptors=7)}, "threads and descriptors back to the start"),
        ({"faults": {"freeze": 3, "lie": 0}}, "every fault was there"),
        ({"sinks": ("lines: 4 results of 5 were written",)}, "sinks: nothing lost without being "
                                                             "counted"),
    ],
)  # fmt: skip
def test_each_check_fails_alone(record: Record, change: Mapping[str, object], name: str) -> None:
    good = replace(
        record, before=FOOTPRINT, after=FOOTPRINT, rss_mb=(50.0, 60.0, 70.0, 100.0, 200.0, 100.9),
        crashes=(), silent=(), stale_found=2, stale_explained=2, sums=(), sinks=(),
        faults={"freeze": 1}, ending_s=0.1, repeated=0, disordered=0, made_up=0, wrong_masks=0,
    )  # fmt: skip
    assert all(check.holds for check in checks(good))
    bad = replace(good, **change)  # type: ignore[arg-type]
    assert [check.name for check in checks(bad) if not check.holds] == [name]
    assert f"FAIL {name}" in soak.summary(bad)


# --- the looks at each mask


class Scene:
    """A camera, its pictures, and the judge; time is the camera's."""

    def __init__(self, *faults: Fault) -> None:
        self.camera = FaultyCamera(FakeClock(), faults, size=(32, 48))
        self.engine = StallingEngine.__new__(StallingEngine)
        self.engine.stalls = deque()
        self.judge = Judge(Plan(frames=100, fps=10.0), {"a": self.camera}, self.engine.stalls)
        self._line: Connection = self.camera.connect(FrameLedger(), threading.Event())

    def frame(self) -> Frame:
        """The camera's next."""
        while True:
            try:
                picture = self._line.read(1.0)
            except Silence:
                continue
            assert picture is not None
            return Frame(picture.pixels, picture.captured_ns, picture.index)

    def see(
        self, frame: Frame, *, after_ms: float = 20.0, inside_ms: float = 5.0, turn: int = 0
    ) -> None:
        """Its mask, finished so long after the camera's present time."""
        pixels = frame.pixels
        class_map = np.full((32, 48), (pixels[-1, -1].argmax() + turn) % 3, np.uint8)
        geometry = Geometry.between(frame.height, frame.width, TINY_SPEC)
        finished_ns = self.camera.clock.now_ns() + round(after_ms * MS)
        outputs = Outputs(class_map=class_map, network_ns=round(inside_ms * MS))
        result = SemanticResult(frame, TINY_SPEC, geometry, outputs, finished_ns)
        self.judge.see("a", result, finished_ns, finished_ns)

    @property
    def wrong(self) -> dict[str, int]:
        """What the judge found."""
        judge = self.judge
        found = {
            "stale": len(judge.stale),
            "silent": len(judge.silent),
            "repeated": judge.repeated,
            "disordered": judge.disordered,
            "made up": judge.made_up,
            "mask": judge.wrong_masks,
        }
        return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("kind", [None, "resize", "odd", "dot", "huge", "grey", "deep", "alpha"])
def test_masks_in_time_are_right(kind: FaultKind | None) -> None:
    scene = Scene(*([Fault(kind, 0.5, 2.0)] if kind else []))
    for _ in range(30):
        scene.see(scene.frame())
    assert scene.wrong == {} and scene.judge.masks == 30
    np.testing.assert_allclose(scene.judge.ages_ms, 20.0, atol=0.01)
    np.testing.assert_allclose(scene.judge.over, 0.15, atol=0.001)


@pytest.mark.parametrize(("after_ms", "stale"), [(204.0, 0), (206.0, 1)])
def test_old_mask_is_a_suspect(after_ms: float, stale: int) -> None:
    # Ten pictures per second: two intervals of 100 ms, and 5 ms inside the engine.
    scene = Scene()
    scene.see(scene.frame(), after_ms=after_ms)
    assert len(scene.judge.stale) == stale
    for suspect in scene.judge.stale:
        assert suspect.taken_ns == 201 * MS and suspect.limit_ns == 200 * MS
        assert suspect.what == "picture 1 of a, 206.0 ms old, of which 5.0 ms inside the engine"


def test_engine_that_was_made_to_stand_still_excuses_the_newest_only() -> None:
    scene = Scene()
    old, now_ns = scene.frame(), scene.camera.clock.now_ns()
    scene.engine.stalls.append((now_ns + 10 * MS, now_ns + 700 * MS))
    # It came into the engine at 725 ms, 690 of which it stood still.
    scene.see(old, after_ms=730.0)
    assert scene.wrong == {}
    other = Scene()
    old, now_ns = other.frame(), other.camera.clock.now_ns()
    other.engine.stalls.append((now_ns + 10 * MS, now_ns + 700 * MS))
    for _ in range(3):
        other.frame()
    # A newer one had come long before: this is a queue.
    other.see(old, after_ms=430.0)
    assert other.wrong == {"stale": 1}


def test_what_a_delay_took_is_not_the_age() -> None:
    scene = Scene(Fault("delay", 0.35, 3.0))
    for _ in range(3):
        scene.see(scene.frame())
    while scene.camera.good < 4:
        frame = scene.frame()
    # By its own time it is 300 ms old already.
    assert scene.camera.clock.now_ns() - frame.captured_ns == 300 * MS
    scene.see(frame)
    assert scene.wrong == {}
    np.testing.assert_allclose(scene.judge.ages_ms, 20.0, atol=0.01)


def test_order_is_seen() -> None:
    scene = Scene()
    first = scene.frame()
    scene.see(first)
    scene.see(first)
    assert scene.wrong == {"repeated": 1}
    second, third = scene.frame(), scene.frame()
    scene.see(third)
    scene.see(second)
    assert scene.wrong == {"repeated": 1, "disordered": 1}
    # The number of the picture is right, what the source says of it is not.
    fourth = scene.frame()
    scene.see(replace(fourth, captured_ns=second.captured_ns))
    assert scene.wrong == {"repeated": 1, "disordered": 2}


def test_made_up_pictures_and_masks_of_others_are_seen() -> None:
    scene = Scene()
    frame = scene.frame()
    scene.see(frame, turn=1)
    assert scene.wrong == {"mask": 1}
    half = frame.pixels.copy()
    half[16:] = 128
    scene.see(replace(frame, pixels=half))
    never = scene.camera.pixels(77)
    scene.see(replace(frame, pixels=never))
    assert scene.wrong == {"mask": 1, "made up": 2}


def test_pause_of_a_camera_that_gives_pictures_is_seen() -> None:
    # The plan's stall timeout is a second.
    scene = Scene(Fault("freeze", 1.0, 4.0))
    clock = scene.camera.clock
    for _ in range(9):
        scene.see(scene.frame())
    clock.wait(threading.Event(), 4.05 - clock.seconds)
    scene.camera.active()
    scene.judge.look(clock.now_ns())
    scene.see(scene.frame())
    assert scene.wrong == {}
    clock.wait(threading.Event(), 0.97)
    scene.judge.look(clock.now_ns())
    assert scene.wrong == {}
    clock.wait(threading.Event(), 0.06)
    scene.judge.look(clock.now_ns())
    assert scene.wrong == {"silent": 1}


# --- what is explained


def denial(queued_ms: int, ran_ms: int) -> Denial:
    """One whose threads stood and ran so long in each 50 ms, from 0 to 5 seconds."""
    found = Denial()
    found._count = 101
    for step in range(found._count):
        found._times[step] = 50 * MS * step
        found._ran[step] = ran_ms * MS * step
        found._queued[step] = queued_ms * MS * step
    return found


@pytest.mark.parametrize(
    ("queued_ms", "ran_ms", "denied_ms"),
    [
        (0, 0, 0),  # it had nothing to do
        (0, 50, 0),  # a lock held, or much to do
        (10, 40, 100),
        (200, 20, 300),  # many stood there at once
        (20, 60, 0),  # two cores were its own
    ],
)
def test_time_denied(queued_ms: int, ran_ms: int, denied_ms: int) -> None:
    found = denial(queued_ms, ran_ms)
    assert found.denied_ns(1020 * MS, 1480 * MS) == denied_ms * MS
    assert found.share == pytest.approx(denied_ms / 500)
    watch = Watch.__new__(Watch)
    watch.denial = found
    # Its life of 300 ms and the half second before, in slices of 50 ms: 850 ms.
    late = Suspect(300 * MS, 66 * MS, 2010 * MS, 2310 * MS, "")
    assert watch.explains(late) == (denied_ms * 850 / 500 >= 234)
    assert watch.explains(replace(late, taken_ns=66 * MS))


def test_time_in_the_run_queue_is_the_kernels() -> None:
    queued = soak._queued_ns()
    if not queued:
        pytest.skip("this kernel does not say how long threads stood in the run queue")
    assert str(threading.get_native_id()) in queued and min(queued.values()) >= 0


# --- sinks


@pytest.mark.parametrize("kind", soak.SINK_FAULTS)
def test_bad_sinks_are_counted(kind: SinkFault) -> None:
    scene, seen = Scene(), threading.active_count()
    slot = Slot(kind, replace(Plan.quick(), patience_s=0.05, sink_gap=4), random.Random(3))
    frame = scene.frame()
    geometry = Geometry.between(frame.height, frame.width, TINY_SPEC)
    outputs = Outputs(class_map=np.zeros((32, 48), np.uint8))
    result = SemanticResult(frame, TINY_SPEC, geometry, outputs)
    for _ in range(100_000):
        slot.write(result)
        if slot.ended == 2:
            break
        threading.Event().wait(0.0005)
    slot.end()
    assert slot.ended >= 2 and slot.wrong == [] and threading.active_count() == seen


# --- the whole of it, with something wrong


class Lagging(Source):
    """A live source of which 45 frames wait in a queue, as in a driver that nobody empties."""

    def __init__(self, source: Source) -> None:
        super().__init__("lagging", live=True)
        self._frames_of = iter(source)
        self._source = source
        self._queue: deque[Frame] = deque()

    def _read(self) -> Frame | None:
        while len(self._queue) < 45:
            frame = next(self._frames_of, None)
            if frame is None:
                return None
            self._queue.append(frame)
        return self._queue.popleft()

    def _release(self) -> None:
        self._source.close()


class Swapping(Streams):
    """Streams that hand out a few results twice, and a few too late."""

    def _run(self) -> Iterator[object]:  # type: ignore[override]
        held = None
        for count, stream in enumerate(super()._run()):
            if held is not None and held.name == stream.name:
                yield stream
                stream, held = held, None
            elif count % 100 == 50 and held is None:
                held = stream
                continue
            yield stream
            if count % 100 == 20:
                yield stream


def failed(record: Record) -> set[str]:
    return {check.name for check in checks(record) if not check.holds}


def test_queue_of_old_frames_is_found(tiny: Tiny) -> None:
    def lagging(engine: Engine, sources: Mapping[str, Source]) -> Streams:
        return Streams(engine, {name: Lagging(source) for name, source in sources.items()})

    found = run(replace(Plan.quick(frames=120), cameras=8), streams_of=lagging)
    assert "no stale mask (2 frame intervals + its time in the engine)" in failed(found)
    assert found.age_ms["p50"] > 1000


@pytest.mark.slow
def test_results_out_of_order_are_found(tiny: Tiny) -> None:
    found = run(Plan.quick(frames=600), streams_of=Swapping)
    assert "never twice, never out of order" in failed(found)
    assert found.repeated and found.disordered


@pytest.mark.slow
def test_source_that_raises_is_a_crash(tiny: Tiny) -> None:
    def broken(engine: Engine, sources: Mapping[str, Source]) -> Streams:
        def read() -> Frame | None:
            raise KeyError("a bug")

        first = next(iter(sources.values()))
        first._read = read  # type: ignore[method-assign]
        return Streams(engine, sources)

    found = run(replace(Plan.quick(frames=100), cameras=4), streams_of=broken)
    assert "no crash" in failed(found)


# --- the plan and the command


def test_faults_are_those_of_the_seed() -> None:
    plan = Plan(seed=5)
    faults = list(islice(schedule(plan, 3), 60))
    assert faults == list(islice(schedule(plan, 3), 60))
    assert faults != list(islice(schedule(plan, 4), 60))
    assert faults != list(islice(schedule(replace(plan, seed=6), 3), 60))
    for before, after in pairwise(faults):
        assert before.start_s < before.end_s < after.start_s
    firsts = {next(schedule(plan, camera)).kind for camera in range(plan.cameras)}
    assert firsts == set(FAULTS) == {fault.kind for fault in faults}


def test_command(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would be for the life of this process.
    monkeypatch.setattr(soak, "give_memory_back", lambda: None)
    path = tmp_path / "soak.json"
    code = soak.main(["--quick", "--frames", "100", "--seed", "2", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert figures["plan"]["seed"] == 2 and figures["masks"] >= 100
    assert {"cpu", "cores"} <= set(figures["machine"]) and len(figures["checks"]) == 11
    assert code == (0 if all(check["holds"] for check in figures["checks"]) else 1)
