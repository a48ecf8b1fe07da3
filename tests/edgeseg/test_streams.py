"""Several sources in one engine: fair turns, and each on its own when something goes wrong."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest

from edgeseg import streams as streams_module
from edgeseg.engine.base import Prepared
from edgeseg.errors import EngineError, FrameError, RequestError, SourceError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.lanes import Lane, Lanes
from edgeseg.pipeline import Pipeline
from edgeseg.source import LiveSource, Source, open_source
from edgeseg.source.connection import Feed, Picture, Reader
from edgeseg.streams import Streams
from tests.edgeseg.faults import (
    FakeClock,
    Fault,
    FaultKind,
    FaultyCamera,
    WorldClock,
    number_in,
)
from tests.edgeseg.test_pipeline import (
    PATIENCE_S,
    Flights,
    Numbers,
    Stripes,
    expected,
    failing,
)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


class Endless(Numbers):
    """A source that goes on for ever, its pixels from 0 to 249 again and again."""

    def __init__(self, *, live: bool) -> None:
        super().__init__(250, live=live)

    def _read(self) -> Frame | None:
        self.given %= 250
        return super()._read()


# --- lanes


def test_lanes_take_turns() -> None:
    lanes: Lanes[str] = Lanes([Lane(9, False), Lane(9, False), Lane(9, False)])
    for lane, items in enumerate(("aaaa", "b", "cc")):
        for item in items:
            assert not lanes.put(lane, item)
        lanes.finish(lane)
    found = []
    while (taken := lanes.get()) is not None:
        found.append(taken[1])
    assert "".join(found) == "abcacaa"
    assert lanes.get() is None


def test_newest_only_is_a_matter_of_the_lane() -> None:
    lanes: Lanes[int] = Lanes([Lane(1, True), Lane(3, False)])
    assert [lanes.put(0, item) for item in (1, 2, 3)] == [False, True, True]
    assert [lanes.put(1, item) for item in (10, 20, 30)] == [False] * 3
    assert [lanes.get() for _ in range(4)] == [(0, 3), (1, 10), (1, 20), (1, 30)]
    lanes.abandon_lane(1)
    assert not lanes.put(1, 40) and lanes.is_abandoned(1) and not lanes.is_abandoned(0)
    lanes.put(0, 4)
    assert lanes.get() == (0, 4)
    lanes.abandon()
    assert lanes.get() is None and not lanes.put(0, 5)


def test_error_ends_all_lanes_after_what_was_there() -> None:
    lanes: Lanes[int] = Lanes([Lane(3, False), Lane(3, False)])
    lanes.put(1, 7)
    lanes.finish(0, MemoryError("none left"))
    assert lanes.get() == (1, 7)
    with pytest.raises(MemoryError):
        lanes.get()


# --- streams


def numbers_of(streams: Streams) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in streams.sources}
    for stream in streams:
        assert stream.result.frame.pixels[0, 0, 0] == stream.result.index
        found[stream.name].append(stream.result.index)
    return found


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("engine", [Stripes, lambda: Flights(3)])
def test_files_give_every_frame_in_order(depth: int, engine: Callable[[], Stripes]) -> None:
    sources = {"a": Numbers(20), "b": Numbers(0), "c": Numbers(7), "d": Numbers(1)}
    with Streams(engine(), sources, depth=depth) as streams:
        found = numbers_of(streams)
    assert found == {"a": [*range(20)], "b": [], "c": [*range(7)], "d": [0]}
    assert {name: ledger.frames for name, ledger in streams.ledgers.items()} == {
        "a": 20, "b": 0, "c": 7, "d": 1
    }  # fmt: skip
    assert [source.releases for source in sources.values()] == [1] * 4 and streams.errors == {}


def test_masks_are_those_of_a_pipeline() -> None:
    uris = {"a": "synthetic:?size=96x128&frames=4", "b": "synthetic:?size=64x64&frames=5&seed=9"}
    with Streams(Stripes(), {name: open_source(uri) for name, uri in uris.items()}) as streams:
        found = [(stream.name, stream.result) for stream in streams]
    for name, uri in uris.items():
        mine = [result for owner, result in found if owner == name]
        with Pipeline(Stripes(), open_source(uri)) as pipeline:
            for ours, theirs in zip(mine, pipeline, strict=True):
                np.testing.assert_array_equal(ours.class_map, theirs.class_map)
                np.testing.assert_array_equal(ours.class_map, expected(ours.frame))


def test_fast_source_does_not_starve_a_slow_one() -> None:
    # The fast camera always has a frame; the slow one gets one only when its last was served.
    served = [threading.Semaphore(0) for _ in range(2)]

    def slow(index: int) -> None:
        if index:
            assert served[1].acquire(timeout=PATIENCE_S)

    sources = {"fast": Numbers(250, live=True), "slow": Numbers(30, live=True, before=slow)}
    order: list[str] = []

    def infer(call: int) -> None:
        # No turn before both of them, or all that is left, had the chance to be there.
        threading.Event().wait(0.001)

    with Streams(Stripes(infer), sources) as streams:
        for stream in streams:
            order.append(stream.name)
            if stream.name == "slow":
                served[1].release()
    assert order.count("slow") + streams.ledgers["slow"].superseded == 30


@pytest.mark.parametrize("count", [2, 5])
def test_turns_are_even_when_all_have_frames(count: int) -> None:
    go = threading.Event()
    sources: dict[str, Source] = {f"{lane}": Numbers(40) for lane in range(count)}
    first = threading.Event()

    def infer(call: int) -> None:
        if call == 0:
            first.set()
            assert go.wait(PATIENCE_S)

    with Streams(Stripes(infer), sources, depth=40) as streams:
        taken: list[str] = []
        iterator = iter(streams)

        def release() -> None:
            assert first.wait(PATIENCE_S)
            while sum(len(items) for items in streams._waiting._items) < 40 * count - 1:
                threading.Event().wait(0.001)
            go.set()

        releaser = threading.Thread(target=release)
        releaser.start()
        # What waited from the first on is served in strict turns.
        taken += [stream.name for stream in iterator]
        releaser.join()
    counts = Counter(taken)
    assert set(counts.values()) == {40}
    for start in range(0, 20 * count, count):
        assert len(set(taken[start + 1 : start + 1 + count])) >= count - 1


# --- what goes wrong with one


@pytest.mark.parametrize("live", [False, True])
def test_source_that_breaks_leaves_the_others_alone(live: bool) -> None:
    error = SourceError("the camera is gone")

    def broken(index: int) -> None:
        if index == 3:
            raise error

    sources = {"good": Numbers(30), "bad": Numbers(30, live=live, before=broken), "x": Numbers(5)}
    with Streams(Stripes(), sources) as streams:
        found = numbers_of(streams)
    assert found["good"] == [*range(30)] and found["x"] == [*range(5)]
    assert found["bad"] == [0, 1, 2] or (live and found["bad"][-1] == 2)
    assert streams.errors == {"bad": error}
    assert sources["bad"].status.state == "ended" and sources["bad"].releases == 1


def test_frame_of_another_kind_is_an_error_of_its_source() -> None:
    sources = {"good": Numbers(9), "grey": Numbers(9, shape=(24, 36))}
    with Streams(Stripes(), sources) as streams:
        assert numbers_of(streams) == {"good": [*range(9)], "grey": []}
    assert isinstance(streams.errors["grey"], FrameError)


@pytest.mark.parametrize("where", ["submit", "outputs"])
def test_error_of_the_engine_ends_all(where: str) -> None:
    error = EngineError("the network gave nothing")
    calls = iter(range(10_000))

    def fail(index: int) -> None:
        if next(calls) == 5:
            raise error

    engine = Flights(2, **{f"before_{where}": fail})
    sources = {"a": Numbers(200), "b": Numbers(200)}
    with pytest.raises(EngineError) as raised, Streams(engine, sources) as streams:
        list(streams)
    assert raised.value is error and streams.errors == {}
    assert engine.taken == engine.submitted
    assert [source.releases for source in sources.values()] == [1, 1]


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(5, "no such thing"), KeyError(3)])
def test_mistake_in_a_source_ends_it_alone_and_is_told(error: Exception) -> None:
    sources = {"a": Numbers(50), "b": Numbers(9, before=failing(2, error)), "c": Numbers(3)}
    with Streams(Stripes(), sources) as streams:
        assert numbers_of(streams) == {"a": [*range(50)], "b": [0, 1], "c": [0, 1, 2]}
    (told,) = streams.errors.values()
    assert isinstance(told, SourceError) and told.__cause__ is error
    assert f"numbers was to give frames, and raised {type(error).__name__}" in str(told)
    assert list(streams.errors) == ["b"] and sources["b"].releases == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError("none left")])
def test_what_ends_a_program_ends_all_streams(error: BaseException) -> None:
    sources = {"a": Numbers(200), "b": Numbers(9, before=failing(2, error))}
    with pytest.raises(type(error)) as raised, Streams(Stripes(), sources) as streams:
        list(streams)
    assert raised.value is error and streams.errors == {}
    assert [source.releases for source in sources.values()] == [1, 1]


class _Preparing(Stripes):
    """An engine that fails while it prepares the frames of one size."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def prepare(self, frame: Frame, geometry: Geometry) -> Prepared:
        if frame.height == 10 and frame.index == 2:
            raise self._error
        return super().prepare(frame, geometry)


def test_frame_that_cannot_be_prepared_is_an_error_of_its_source() -> None:
    error = cv2.error("too many columns")
    sources = {"a": Numbers(30), "b": Numbers(30, shape=(10, 9, 3))}
    with Streams(_Preparing(error), sources) as streams:
        assert numbers_of(streams) == {"a": [*range(30)], "b": [0, 1]}
    assert streams.errors["b"].__cause__ is error


def test_engine_that_fails_while_it_prepares_ends_all() -> None:
    error = EngineError("the GPU has fallen off the bus")
    sources = {"a": Numbers(200), "b": Numbers(30, shape=(10, 9, 3))}
    with pytest.raises(EngineError) as raised, Streams(_Preparing(error), sources) as streams:
        list(streams)
    assert raised.value is error and streams.errors == {}


def test_error_that_is_remembered_keeps_no_frame_alive() -> None:
    kept: list[weakref.ref[Frame]] = []

    class Failing(Numbers):
        def _read(self) -> Frame | None:
            frame = super()._read()
            assert frame is not None
            kept.append(weakref.ref(frame))
            raise ValueError("a mistake, with a frame in a variable")

    with Streams(Stripes(), {"a": Failing(3)}) as streams:
        assert list(streams) == []
    assert len(kept) == 1 and kept[0]() is None and "a" in streams.errors


class _Unclosable(Numbers):
    """A source that breaks when it is closed."""

    def _release(self) -> None:
        super()._release()
        raise OSError("the driver is gone")


def test_source_that_cannot_be_closed_leaves_the_others_alone() -> None:
    sources = {"a": _Unclosable(5), "b": Numbers(30), "c": _Unclosable(250)}
    with Streams(Stripes(), sources, max_frames=30) as streams:
        found = numbers_of(streams)
    assert [len(numbers) for numbers in found.values()] == [5, 30, 30]
    assert sorted(streams.errors) == ["a", "c"]
    assert [source.releases for source in sources.values()] == [1, 1, 1]


class _Cut(Numbers):
    """A source whose last read ends when it is closed, with an error."""

    def __init__(self, count: int) -> None:
        super().__init__(count, live=True)
        self.cut = threading.Event()

    def _read(self) -> Frame | None:
        if self.given == self._count:
            assert self.cut.wait(PATIENCE_S)
            raise OSError("interrupted")
        return super()._read()

    def _interrupt(self) -> None:
        self.cut.set()


@pytest.mark.parametrize("how", ["break", "max_frames", "stop"])
def test_error_of_a_read_that_was_cut_short_is_none(how: str) -> None:
    with Streams(
        Stripes(), {"a": _Cut(1)}, max_frames=1 if how == "max_frames" else None
    ) as streams:
        for _ in streams:
            if how == "stop":
                streams.stop()
            elif how == "break":
                break
    assert streams.errors == {}


def test_source_that_hangs_after_its_last_wanted_frame_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams_module, "_CAPTURE_GRACE_S", 0.1)
    go_on, hangs = threading.Event(), threading.Event()

    def hang(index: int) -> None:
        if index == 1:
            hangs.set()
            go_on.wait()

    sources = {"a": Numbers(9, live=True, before=hang), "b": Numbers(5)}
    with Streams(Stripes(), sources, max_frames=1) as streams:
        found = []
        for stream in streams:
            assert hangs.wait(PATIENCE_S)
            found.append(stream.name)
    assert sorted(found) == ["a", "b"]
    # It is told that it lives on, and who it is.
    assert streams.stats().threads == ("edgeseg-capture-a",)
    go_on.set()
    (stuck,) = [one for one in threading.enumerate() if one.name == "edgeseg-capture-a"]
    stuck.join(PATIENCE_S)
    assert streams.stats().threads == ()


@pytest.mark.parametrize("live", [False, True])
def test_max_frames_is_for_each(live: bool) -> None:
    sources = {"a": Endless(live=live), "b": Numbers(3), "c": Numbers(250)}
    with Streams(Stripes(), sources, max_frames=5) as streams:
        counts = Counter(stream.name for stream in streams)
    assert counts == {"a": 5, "b": 3, "c": 5}
    assert sources["c"].given == 5


@pytest.mark.parametrize("how", ["break", "Ctrl-C", "close", "unused"])
def test_leaving_early_ends_everything(how: str) -> None:
    sources = {"a": Endless(live=False), "b": Endless(live=True)}
    streams = Streams(Stripes(), sources)
    try:
        with streams:
            for _ in () if how == "unused" else streams:
                if how == "Ctrl-C":
                    raise KeyboardInterrupt
                if how == "close":
                    streams.close()
                    continue
                break
    except KeyboardInterrupt:
        assert how == "Ctrl-C"
    assert [source.releases for source in sources.values()] == [1, 1]


def test_sources_that_hang_do_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "_CAPTURE_GRACE_S", 0.1)
    go_on = threading.Event()

    def hang(index: int) -> None:
        if index == 2:
            go_on.wait()

    sources = {str(lane): Numbers(10, live=True, before=hang) for lane in range(3)}
    with Streams(Stripes(), sources) as streams:
        for _ in streams:
            break
    stuck = [one for one in threading.enumerate() if one.name.startswith("edgeseg-capture")]
    go_on.set()
    for thread in stuck:
        thread.join(PATIENCE_S)
    assert [source.releases for source in sources.values()] == [1, 1, 1]


def test_wrong_requests() -> None:
    with pytest.raises(RequestError, match="at least one source"):
        Streams(Stripes(), {})
    with pytest.raises(RequestError, match="at least 1, and 0 came"):
        Streams(Stripes(), {"a": Numbers(1)}, depth=0)
    with pytest.raises(RequestError, match="at least 1, and 0 came"):
        Streams(Stripes(), {"a": Numbers(1)}, max_frames=0)
    for patience_s in (0, -1, float("nan")):
        with pytest.raises(RequestError, match=f"above 0, and {patience_s} came"):
            Streams(Stripes(), {"a": Numbers(1)}, patience_s=patience_s)
    with Streams(Stripes(), {"a": Numbers(1)}) as streams:
        assert len(list(streams)) == 1
        with pytest.raises(RequestError, match="run once"):
            iter(streams)


# --- the watchdog


@pytest.fixture
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "_CAPTURE_GRACE_S", 0.05)
    # A test that waits for this one is seen.
    monkeypatch.setattr(streams_module, "_INFERENCE_GRACE_S", 1000.0)
    monkeypatch.setattr(streams_module, "_SLICE_S", 0.05)


@pytest.mark.usefixtures("short_graces")
@pytest.mark.parametrize("where", ["submit", "outputs"])
@pytest.mark.parametrize("live", [False, True])
def test_engine_that_never_answers_ends_the_loop(where: str, live: bool) -> None:
    clock, go_on = FakeClock(), threading.Event()

    def hang(index: int) -> None:
        if index == 3:
            clock.ns += 61 * 10**9
            go_on.wait()

    def pace(index: int) -> None:
        # Of a live source, too, none is dropped.
        if live and index in (1, 2, 3):
            assert seen[index - 1].wait(PATIENCE_S)

    seen = [threading.Event() for _ in range(4)]
    engine = Flights(2, **{f"before_{where}": hang})
    source = Numbers(30 if not live else 4, live=live, before=pace)
    streams = Streams(engine, {"a": source}, clock=clock)
    found = []
    with (
        pytest.raises(EngineError, match="flights was to finish a frame within 60 seconds"),
        streams,
    ):
        for stream in streams:
            found.append(stream.result.index)
            seen[stream.result.index].set()
    assert found == [0, 1, 2] and source.releases == 1
    # The thread that hangs is left behind, named, and ends when the engine lets go.
    name = "edgeseg-inference" if where == "submit" else "edgeseg-finishing"
    stats = streams.stats()
    assert name in stats.threads and stats.in_engine_s >= 61
    stuck = [one for one in threading.enumerate() if one.name.startswith("edgeseg-")]
    assert stuck and all(one.daemon for one in stuck)
    go_on.set()
    for thread in stuck:
        thread.join(PATIENCE_S)
    assert streams.stats().threads == () and engine.taken == engine.submitted


@pytest.mark.usefixtures("short_graces")
def test_engine_that_breaks_and_then_hangs_ends_the_loop() -> None:
    clock, go_on, all_inside = FakeClock(), threading.Event(), threading.Event()

    def outputs(index: int) -> None:
        if index == 0:
            assert all_inside.wait(PATIENCE_S)
            raise EngineError("the first one")
        clock.ns += 100 * 10**9
        go_on.wait()

    def submit(index: int) -> None:
        if index == 1:
            all_inside.set()

    engine = Flights(2, submit, outputs)
    with (
        pytest.raises(EngineError, match="within 90 seconds"),
        Streams(engine, {"a": Numbers(9)}, clock=clock, patience_s=90) as streams,
    ):
        list(streams)
    stuck = [one for one in threading.enumerate() if one.name.startswith("edgeseg-")]
    go_on.set()
    for thread in stuck:
        thread.join(PATIENCE_S)


def test_slow_engine_within_its_patience_is_waited_for() -> None:
    clock = FakeClock()

    def compile_first(call: int) -> None:
        clock.ns += (59 if call == 0 else 5) * 10**9
        # Long enough for the caller's loop to look up.
        threading.Event().wait(0.25 if call == 0 else 0)

    with Streams(Stripes(compile_first), {"a": Numbers(20)}, clock=clock) as streams:
        assert len(list(streams)) == 20


def until(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold, on a machine that may be busy."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


@pytest.mark.parametrize("frames_in_flight", [1, 3])
def test_slow_caller_is_no_engine_that_hangs(frames_in_flight: int) -> None:
    # Frames are inside for hours, because nobody takes what is finished.
    clock = FakeClock()
    with Streams(Flights(frames_in_flight), {"a": Numbers(12)}, clock=clock) as streams:
        found = []
        for stream in streams:
            found.append(stream.result.index)
            clock.ns += 3600 * 10**9
            # What went on meanwhile comes to its end, and what then goes on began now.
            assert until(lambda: streams.stats().in_engine_s < 3600)
    assert found == [*range(12)]


def test_process_that_stood_still_is_no_engine_that_hangs() -> None:
    clock = FakeClock()

    def stand_still(index: int) -> None:
        if index == 3:
            # The clock has run on, and the engine needs as long as ever: two looks of the caller.
            clock.ns += 3600 * 10**9
            threading.Event().wait(0.2)

    with Streams(Stripes(stand_still), {"a": Numbers(8)}, clock=clock) as streams:
        assert len(list(streams)) == 8


# --- stopping in peace


@pytest.mark.parametrize("live", [False, True])
def test_stop_gives_out_what_is_inside(live: bool) -> None:
    inside = [threading.Event() for _ in range(250)]

    def outputs(index: int) -> None:
        # Before the stop, all that fits is inside the engine.
        if index == 1:
            assert inside[3].wait(PATIENCE_S)
            streams.stop()

    def pace(index: int) -> None:
        # The engine takes each of a camera's first frames.
        if live and 0 < index < 5:
            assert inside[index - 1].wait(PATIENCE_S)

    engine = Flights(3, lambda index: inside[index].set(), outputs)
    sources = {"a": Numbers(250, live=live, before=pace)}
    with Streams(engine, sources, depth=1) as streams:
        found = [stream.result.index for stream in streams]
    assert engine.taken == engine.submitted
    assert engine.submitted[:4] == [0, 1, 2, 3] and len(engine.submitted) < 20
    if not live:
        # Nothing that is finished is left out; sources may pass over masks of a camera.
        assert found == engine.submitted
    assert found[-1] == engine.submitted[-1]
    assert sources["a"].releases == 1 and streams.stats().threads == ()


def test_stop_before_the_first_frame_gives_nothing() -> None:
    source = Numbers(9)
    with Streams(Stripes(), {"a": source}) as streams:
        streams.stop()
        streams.stop()
        assert list(streams) == [] and source.releases == 1


class _Silent(Numbers):
    """A camera that gives three frames, and then nothing until it is closed."""

    def __init__(self) -> None:
        super().__init__(3)
        self._closing = threading.Event()
        self.silent = threading.Event()

    def _read(self) -> Frame | None:
        if self.given == 3:
            self.silent.set()
            assert self._closing.wait(PATIENCE_S)
            return None
        return super()._read()

    def _interrupt(self) -> None:
        self._closing.set()


@pytest.mark.parametrize("how", ["thread", "signal", "signal in the loop's body"])
def test_stop_while_nothing_comes(how: str) -> None:
    source = _Silent()
    streams = Streams(Stripes(), {"a": source})
    before = signal.signal(signal.SIGUSR1, lambda number, frame: streams.stop())

    def ask() -> None:
        assert source.silent.wait(PATIENCE_S)
        if how == "thread":
            streams.stop()
        else:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGUSR1)

    asker = threading.Thread(target=ask)
    try:
        found = []
        with streams:
            for stream in streams:
                found.append(stream.result.index)
                if stream.result.index == 2:
                    if how == "signal in the loop's body":
                        ask()
                    else:
                        asker.start()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [0, 1, 2]
    if asker.ident is not None:
        asker.join()


def test_stop_takes_no_lock() -> None:
    # A signal handler runs in the middle of anything that the main thread does.
    streams = Streams(Stripes(), {"a": Numbers(9)})
    waiting, results, flying = streams._waiting, streams._results, streams._flying
    stopper = threading.Thread(target=streams.stop)
    (ledger,), (source,) = streams.ledgers.values(), streams.sources.values()
    with (
        waiting._lock, results._lock, flying._lock, ledger._lock, source._reading,
        source._closed._cond,  # type: ignore[attr-defined]
    ):  # fmt: skip
        stopper.start()
        stopper.join(PATIENCE_S)
        assert not stopper.is_alive()
    with streams:
        assert list(streams) == []


# --- every thread accounted for


class _Film(Reader):
    """Pictures without end, or until it is told."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._count = 0

    def read(self) -> Picture | None:
        if self._ended.wait(0.001):
            return None
        self._count += 1
        pixels = np.full((24, 36, 3), self._count % 250, np.uint8)
        return Picture(pixels, time.monotonic_ns(), self._count)

    def close(self) -> None:
        """Nothing to give back."""

    def interrupt(self) -> None:
        self._ended.set()


def camera() -> LiveSource:
    return LiveSource(
        "film:",
        lambda frames, closed: Feed(_Film, frames, closed, name="film", timeout_s=5.0),
        name="film",
    )


class _Mine(Exception):
    """Something that goes wrong in a caller's loop."""


ENDS = (
    "end of source", "max_frames", "engine", "source", "mistake", "break", "error", "Ctrl-C",
    "close", "close from another thread", "stop", "unused", "generator dropped",
)  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("one", [False, True])
def test_no_thread_survives_any_end(how: str, one: bool) -> None:
    wrong = {"source": SourceError("the camera is gone"), "mistake": ZeroDivisionError()}.get(how)
    engine = Flights(2, failing(40, EngineError("broken")) if how == "engine" else lambda i: None)
    ends_itself = how in ("end of source", "source", "mistake", "engine")
    source: Source = Endless(live=False)
    if ends_itself:
        source = Numbers(60, before=failing(20, wrong) if wrong else lambda i: None)
    most = 30 if how == "max_frames" else None
    run: Pipeline | Streams
    if one:
        run = Pipeline(engine, source, max_frames=most)
    else:
        sources: dict[str, Source] = {"a": source, "b": Numbers(5)}
        if not ends_itself:
            sources["film"] = camera()
        run = Streams(engine, sources, max_frames=most)
    closers: list[threading.Thread] = []
    taken = 0
    try:
        with run:
            results = iter(() if how == "unused" else run)
            for _ in results:
                taken += 1
                if taken == 3:
                    names = run.stats().threads
                    assert "edgeseg-inference" in names and "edgeseg-finishing" in names
                    assert f"edgeseg-capture-{'source' if one else 'a'}" in names
                    assert ("edgeseg-reader" in names) == (not one and not ends_itself)
                if taken == 10:
                    if how in ("break", "generator dropped"):
                        break
                    if how in ("error", "Ctrl-C"):
                        raise _Mine if how == "error" else KeyboardInterrupt
                    if how == "close":
                        run.close()
                    if how == "stop":
                        run.stop()
                    if how == "close from another thread":
                        closers.append(threading.Thread(target=run.close))
                        closers[-1].start()
            if how == "generator dropped":
                del results
                assert run.stats().threads == ()
    except (_Mine, KeyboardInterrupt):
        assert how in ("error", "Ctrl-C")
    except (EngineError, SourceError):
        assert how == "engine" or (one and wrong)
    # Before the closer is waited for: leaving the block has waited for the threads all the same.
    assert run.stats().threads == ()
    mine = [one for one in threading.enumerate() if one.name.startswith("edgeseg-")]
    assert mine == []
    for closer in closers:
        closer.join(PATIENCE_S)
    assert taken >= 10 or how == "unused"
    stats = run.stats()
    assert all(one.status.state == "ended" for one in stats.sources)
    assert stats.in_engine_s == 0 and stats.uptime_s == run.stats().uptime_s


# --- memory


class _Alive:
    """How many frames are alive, and how many there have been at most."""

    def __init__(self) -> None:
        # A frame may go while the lock is held.
        self._lock = threading.RLock()
        self._refs: set[weakref.ref[Frame]] = set()
        self.most = 0

    def watch(self, frame: Frame) -> Frame:
        with self._lock:
            self._refs.add(weakref.ref(frame, self._gone))
            self.most = max(self.most, len(self._refs))
        return frame

    def _gone(self, ref: weakref.ref[Frame]) -> None:
        with self._lock:
            self._refs.discard(ref)

    def __len__(self) -> int:
        return len(self._refs)


class _Changing(Source):
    """Frames of ever other sizes, all of them watched."""

    def __init__(self, count: int, alive: _Alive, seed: int, *, live: bool) -> None:
        super().__init__("changing", live=live)
        self._count = count
        self._alive = alive
        self._chance = random.Random(seed)
        self._next = 0

    def _read(self) -> Frame | None:
        if self._next == self._count:
            return None
        self._next += 1
        height, width = self._chance.randint(1, 40), self._chance.randint(1, 40)
        pixels = np.full((height, width, 3), self._next % 250, np.uint8)
        return self._alive.watch(Frame(pixels, time.monotonic_ns(), self._next - 1))


@pytest.mark.parametrize(
    ("live", "depth", "frames_in_flight"),
    [((False,), 1, 1), ((True,), 2, 1), ((False, True, False), 3, 2), ((True, True), 1, 3)],
)
def test_frames_alive_are_bounded(
    live: tuple[bool, ...], depth: int, frames_in_flight: int
) -> None:
    alive = _Alive()
    chance = random.Random(5)
    count = 2000 // len(live)
    engine = Flights(frames_in_flight)
    sources = {
        str(lane): _Changing(count, alive, lane, live=is_live) for lane, is_live in enumerate(live)
    }
    bound = sum(2 * (1 if is_live else depth) + 1 for is_live in live) + frames_in_flight + 3
    # Nothing may wait for the collector of cycles, which comes when it likes.
    gc.collect()
    gc.disable()
    try:
        with Streams(engine, sources, depth=depth) as streams:
            for stream in streams:
                assert stream.result.class_map.shape == stream.result.frame.pixels.shape[:2]
                # The caller is slow now and then, so that the lanes fill up. At first it waits for
                # that: live sources may have ended before it is slow a second time.
                if chance.random() < 0.02 or alive.most <= bound // 3:
                    time.sleep(0.002)
                assert len(alive) <= bound
        del stream
        assert len(alive) == 0
    finally:
        gc.enable()
    assert bound // 3 < alive.most <= bound
    assert sum(source.tally.delivered for source in sources.values()) == count * len(live)


# --- faults, through to the mask


class _Ending(Source):
    """A live source that ends at a second of its camera's clock."""

    def __init__(self, inner: Source, clock: WorldClock, end_s: float) -> None:
        super().__init__("ending", live=False)
        self._inner = inner
        self._frames_of = iter(inner)
        self._clock = clock
        self._end_s = end_s

    def _read(self) -> Frame | None:
        return next(self._frames_of, None) if self._clock.seconds < self._end_s else None

    def _release(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("seed", range(3))
def test_masks_are_of_real_frames_whatever_cameras_do(seed: int) -> None:
    chance = random.Random(seed)
    kinds: tuple[FaultKind, ...] = (
        "freeze", "loss", "late", "repeat", "corrupt", "resize", "behind", "break", "end", "refuse"
    )  # fmt: skip
    cameras, sources = {}, {}
    for name in ("a", "b", "c"):
        faults = [
            Fault(chance.choice(kinds), start, start + chance.choice((0.3, 3.0)))
            for start in (chance.uniform(1, 60) for _ in range(12))
        ]
        camera = cameras[name] = FaultyCamera(FakeClock(), faults)
        live = LiveSource(
            name, camera.connect, name=name, timeout_s=2.0, clock=camera.clock, share=lambda: 0.5
        )
        sources[name] = _Ending(live, camera.clock, 65)
    found: dict[str, list[int]] = {name: [] for name in cameras}
    with Streams(Stripes(), sources) as streams:
        for stream in streams:
            number = number_in(stream.result.frame.pixels)
            found[stream.name].append(number)
            # A size that changes is fitted anew.
            frame = stream.result.frame
            assert stream.result.class_map.shape == (frame.height, frame.width)
            np.testing.assert_array_equal(stream.result.class_map, expected(frame))
    for name, numbers in found.items():
        assert len(numbers) > 100 and numbers == sorted(set(numbers))
        assert set(numbers) <= set(cameras[name].sent)
    assert streams.errors == {}
