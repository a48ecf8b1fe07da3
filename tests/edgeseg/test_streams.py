"""Several sources in one engine: fair turns, and each on its own when something goes wrong."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgeseg import streams as streams_module
from edgeseg.errors import EngineError, FrameError, RequestError, SourceError
from edgeseg.frame import Frame
from edgeseg.pipeline import Pipeline
from edgeseg.source import LiveSource, Source, open_source
from edgeseg.streams import Lane, Lanes, Streams
from tests.edgeseg.faults import FakeClock, Fault, FaultKind, FaultyCamera, number_in
from tests.edgeseg.test_pipeline import PATIENCE_S, Flights, Numbers, Stripes, expected


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


def test_mistake_in_a_source_is_not_swallowed() -> None:
    def fail(index: int) -> None:
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        Streams(Stripes(), {"a": Numbers(200), "b": Numbers(2, before=fail)}) as streams,
    ):
        list(streams)


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
    with Streams(Stripes(), {"a": Numbers(1)}) as streams:
        assert len(list(streams)) == 1
        with pytest.raises(RequestError, match="run once"):
            iter(streams)


# --- faults, through to the mask


class _Ending(Source):
    """A live source that ends at a second of its camera's clock."""

    def __init__(self, inner: Source, clock: FakeClock, end_s: float) -> None:
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
