"""Live sources: states, stalls, reconnection and the ledger, on a clock that nobody waits for."""

from __future__ import annotations

import gc
import itertools
import math
import random
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from edgeseg.errors import RequestError, SourceError
from edgeseg.frame import Frame
from edgeseg.source import Backoff, LiveSource, Source
from edgeseg.source.connection import Connection, Feed, Picture, Reader, Silence
from edgeseg.source.status import FrameLedger
from tests.edgeseg.faults import (
    FakeClock,
    Fault,
    FaultKind,
    FaultyCamera,
    WorldClock,
    number_in,
)

PATIENCE_S = 10.0
TIMEOUT_S = 2.0


def live(camera: FaultyCamera, *, reconnect_s: float = math.inf, waits: bool = False) -> LiveSource:
    return LiveSource(
        "test://camera",
        camera.connect,
        name="the camera",
        timeout_s=TIMEOUT_S,
        reconnect_s=reconnect_s,
        waits=waits,
        clock=camera.clock,
        share=lambda: 0.0,
    )


def frames_until(source: Source, clock: WorldClock, end_s: float) -> list[tuple[float, Frame]]:
    """The frames that come up to a second of the clock, and when they came."""
    found = []
    for frame in source:
        found.append((clock.seconds, frame))
        if clock.seconds >= end_s:
            break
    return found


def states(source: Source) -> list[str]:
    return [status.state for status in source.history]


# --- one fault at a time


def test_without_faults_every_picture_comes_once() -> None:
    camera = FaultyCamera(FakeClock())
    source = live(camera)
    assert (source.live, source.fps) == (True, 10.0) and states(source) == ["opening"]
    found = frames_until(source, camera.clock, 5)
    assert [number_in(frame.pixels) for _, frame in found] == list(range(1, 51)) == camera.sent
    assert [frame.index for _, frame in found] == list(range(50))
    assert all(round(at_s * 1e9) == frame.captured_ns - 10**12 for at_s, frame in found)
    source.close()
    assert states(source) == ["opening", "live", "ended"]
    assert source.status.reason == "it was closed" and source.notes == ()
    assert (camera.opened, camera.closes) == (1, 1)


def test_frozen_camera_is_stalled_and_then_opened_anew() -> None:
    camera = FaultyCamera(FakeClock(), [Fault("freeze", 1, 6)])
    source = live(camera)
    seen: list[tuple[str, float]] = []
    source.listen(lambda status: seen.append((status.state, (status.since_ns - 10**12) / 1e9)))
    found = frames_until(source, camera.clock, 8)
    numbers = [number_in(frame.pixels) for _, frame in found]
    assert numbers == [*range(1, 10), *range(60, 81)] == camera.sent
    # The last picture came after 0.9 seconds: silence is noticed two seconds later, not before.
    assert [(state, round(at_s, 2)) for state, at_s in seen[:3]] == [
        ("live", 0.1), ("stalled", 2.9), ("reconnecting", 2.9)
    ]  # fmt: skip
    assert seen[-1][0] == "live" and seen[-1][1] == pytest.approx(6.0)
    assert source.history[2].reason == "it gave no new picture for 2 seconds"
    assert source.tally.reconnects >= 1
    (note,) = source.notes
    assert note.startswith("the camera was lost and opened anew") and "5.1 seconds" in note


@pytest.mark.parametrize("read_before", [0, 3])
def test_reader_that_was_away_is_no_stall(read_before: int) -> None:
    # An engine takes a minute to build, a caller goes for lunch: the camera was there all the time.
    camera = FaultyCamera(FakeClock())
    source = live(camera)
    frames = iter(source)
    for _ in range(read_before):
        next(frames)
    camera.clock.wait(threading.Event(), 60.0)
    frame = next(frames)
    assert number_in(frame.pixels) == round(10 * camera.clock.seconds)
    assert "stalled" not in states(source) and camera.opened == 1


@pytest.mark.parametrize("kind", ["break", "end", "refuse"])
def test_lost_camera_comes_back(kind: FaultKind) -> None:
    camera = FaultyCamera(FakeClock(), [Fault(kind, 2, 32)])
    source = live(camera)
    found = frames_until(source, camera.clock, 36)
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(found)]
    # From its return to the first picture: the longest pause between two attempts, and a picture.
    assert found[18][0] == pytest.approx(1.9)
    assert 30 < max(gaps) <= 30 + 2.0 + 0.25
    assert [state for state in states(source) if state != "reconnecting"] == [
        "opening", "live", "live"
    ]  # fmt: skip
    numbers = [number_in(frame.pixels) for _, frame in found]
    assert numbers == camera.sent == sorted(set(numbers))
    attempts = camera.refused + camera.opened
    # 0.25, 0.5 and 1 second, and every two seconds from then on.
    assert 17 <= attempts <= 21 or kind != "refuse"


def test_camera_that_gives_one_frame_at_a_time_is_not_hammered() -> None:
    # It breaks off after each frame: attempts slow down all the same.
    faults = [Fault("break", n / 10 + 0.05, n / 10 + 0.1) for n in range(1, 2000, 2)]
    faults += [Fault("break", n / 10, n / 10 + 0.05) for n in range(0, 2000, 2)]
    camera = FaultyCamera(FakeClock(), faults)
    source = live(camera, waits=True)
    frames_until(source, camera.clock, 60)
    assert camera.opened < 40


@pytest.mark.parametrize("kind", ["late", "behind", "repeat", "corrupt", "ahead", "loss", "resize"])
def test_bad_pictures_are_left_out_and_counted(kind: FaultKind) -> None:
    camera = FaultyCamera(FakeClock(), [Fault(kind, 2, 3.5)])
    source = live(camera)
    found = frames_until(source, camera.clock, 6)
    assert [number_in(frame.pixels) for _, frame in found] == camera.sent
    captured = [frame.captured_ns for _, frame in found]
    assert captured == sorted(set(captured))
    for at_s, frame in found:
        assert 0 <= round(at_s * 1e9) - (frame.captured_ns - 10**12) <= TIMEOUT_S * 1e9
    tally = source.tally
    assert tally.delivered == len(found) == len(camera.sent)
    assert (tally.damaged, tally.stale) == (
        (camera.bad, 0) if kind == "corrupt" else (0, camera.bad)
    )
    assert tally.received == len(found) + camera.bad and tally.reconnects == 0
    # One and a half seconds of it are no stall yet.
    assert states(source) == ["opening", "live"]
    assert len(source.notes) == (1 if camera.bad else 0)
    if kind == "resize":
        assert {frame.pixels.shape for _, frame in found} == {(24, 36, 3), (30, 20, 3)}
        assert source.size == (24, 36)


@pytest.mark.parametrize("kind", ["late", "behind", "corrupt"])
def test_old_pictures_only_are_a_stall(kind: FaultKind) -> None:
    # A camera that repeats itself, or whose clock is wrong, is as blind as one that is silent.
    camera = FaultyCamera(FakeClock(), [Fault(kind, 2, 9)])
    source = live(camera)
    found = frames_until(source, camera.clock, 12)
    assert "stalled" in states(source) and source.status.state == "live"
    assert [number_in(frame.pixels) for _, frame in found] == camera.sent
    assert max(b[0] - a[0] for a, b in itertools.pairwise(found)) < 7 + TIMEOUT_S + 2.5


# --- giving up


def test_wrong_address_is_told_at_once() -> None:
    with pytest.raises(SourceError, match="nobody answers"):
        live(FaultyCamera(FakeClock(), [Fault("refuse", 0, 5)]))


@pytest.mark.parametrize("kind", ["freeze", "break", "end"])
def test_camera_without_a_first_picture_is_told_at_once(kind: FaultKind) -> None:
    camera = FaultyCamera(FakeClock(), [Fault(kind, 0, 50)])
    with pytest.raises(SourceError, match=r"^the camera opens, and gives no frames") as raised:
        list(live(camera))
    assert camera.clock.seconds <= TIMEOUT_S and "\n" not in str(raised.value)


def test_camera_that_is_not_there_yet_is_waited_for() -> None:
    camera = FaultyCamera(FakeClock(), [Fault("refuse", 0, 20)])
    source = live(camera, waits=True)
    assert source.status.state == "reconnecting" and source.status.reason == "nobody answers"
    found = frames_until(source, camera.clock, 24)
    assert 20 < found[0][0] < 22.2


@pytest.mark.parametrize(
    ("kind", "says"), [("break", "after 19 frames: the cable is out"), ("freeze", "for 2 seconds")]
)
def test_without_reconnection_it_breaks(kind: FaultKind, says: str) -> None:
    camera = FaultyCamera(FakeClock(), [Fault(kind, 2, 50)])
    source = live(camera, reconnect_s=0)
    found: list[Frame] = []
    with pytest.raises(SourceError, match=says):
        found.extend(source)
    assert len(found) == source.tally.delivered == 19
    assert source.status.state == "ended" and camera.opened == 1


def test_without_reconnection_an_end_is_the_end() -> None:
    camera = FaultyCamera(FakeClock(), [Fault("end", 2, 50)])
    source = live(camera, reconnect_s=0)
    assert len(list(source)) == 19
    assert source.notes == ("the camera ended after 19 frames",)
    assert source.status.state == "ended"


def test_reconnection_is_given_up_in_time() -> None:
    camera = FaultyCamera(FakeClock(), [Fault("refuse", 2, 500)])
    source = live(camera, reconnect_s=30)
    with pytest.raises(
        SourceError, match=r"lost after 19 frames, .* back within 30 seconds \(nobody answers\)"
    ):
        list(source)
    assert 32 <= camera.clock.seconds <= 34.2


def test_hanging_drivers_are_bounded() -> None:
    clock = FakeClock()
    opened: list[float] = []

    class Hanging(Connection):
        hangs = True

        def read(self, timeout_s: float) -> Picture | None:
            if len(opened) == 1 and clock.seconds < 1:
                clock.ns += 10**8
                return Picture(np.zeros((4, 4, 3), np.uint8), clock.ns, len(opened))
            clock.ns += round(timeout_s * 1e9)
            raise Silence

        def close(self) -> None:
            """It does not let go."""

    def connect(frames: FrameLedger, closed: threading.Event) -> Connection:
        opened.append(clock.seconds)
        return Hanging()

    source = LiveSource(
        "x", connect, name="x", timeout_s=1, reconnect_s=100, clock=clock, share=lambda: 0.5
    )
    with pytest.raises(SourceError, match="hang in its driver"):
        list(source)
    assert len(opened) == 3


# --- all faults at once


@pytest.mark.parametrize("seed", range(6))
def test_nothing_old_or_made_up_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    kinds: tuple[FaultKind, ...] = (
        "freeze", "loss", "late", "repeat", "corrupt", "resize", "ahead", "behind", "break", "end",
        "refuse",
    )  # fmt: skip
    faults, at_s = [], 3.0
    while at_s < 600:
        length_s = chance.choice((0.1, 0.5, 3.0, 8.0))
        faults.append(Fault(chance.choice(kinds), at_s, at_s + length_s))
        at_s += chance.choice((0.0, 0.3, 4.0, 10.0)) + 0.5 * length_s
    camera = FaultyCamera(FakeClock(), faults)
    source = live(camera)
    found = frames_until(source, camera.clock, 620)
    numbers = [number_in(frame.pixels) for _, frame in found]
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(camera.sent)
    assert len(numbers) > 1000
    indices = [frame.index for _, frame in found]
    captured = [frame.captured_ns for _, frame in found]
    assert indices == sorted(set(indices)) and captured == sorted(set(captured))
    for at_s, frame in found:
        assert 0 <= round(at_s * 1e9) + 10**12 - frame.captured_ns <= TIMEOUT_S * 1e9
    tally = source.tally
    assert tally.received == len(camera.sent) + camera.bad
    assert (tally.delivered, tally.dropped) == (len(found), 0)
    assert tally.damaged + tally.stale == camera.bad + len(camera.sent) - len(found)
    assert tally.reconnects == camera.opened - 1 == camera.closes
    for before, after in itertools.pairwise(source.history):
        assert before.since_ns <= after.since_ns
        assert before.state != "stalled" or after.state == "reconnecting"


# --- backoff


def test_backoff_doubles_to_its_limit_with_jitter() -> None:
    backoff = Backoff(0.25, 2.0, 0.5)
    assert [backoff.delay_s(n, 0.0) for n in range(6)] == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]
    assert backoff.delay_s(1, 0.5) == pytest.approx(0.375)
    assert backoff.delay_s(10**9, 0.0) == 2.0
    shares = [backoff.delay_s(3, random.Random(n).random()) for n in range(200)]
    assert 1.0 < min(shares) < 1.1 and 1.9 < max(shares) <= 2.0


@pytest.mark.parametrize("wrong", [(0, 2, 0.5), (3, 2, 0.5), (1, 2, 1.5)])
def test_wrong_backoff(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(RequestError, match="first_s <= longest_s"):
        Backoff(*wrong)


@pytest.mark.parametrize(("timeout_s", "reconnect_s"), [(0, 1), (math.nan, 1), (1, -1)])
def test_wrong_times(timeout_s: float, reconnect_s: float) -> None:
    with pytest.raises(RequestError, match="seconds"):
        LiveSource(
            "x", FaultyCamera(FakeClock()).connect, name="x",
            timeout_s=timeout_s, reconnect_s=reconnect_s,
        )  # fmt: skip


# --- the thread that reads ahead


class Told(Reader):
    """Gives a picture whenever it is told to; ``None`` ends it, an error breaks it."""

    def __init__(self, frames: FrameLedger) -> None:
        self._frames = frames
        self._orders: list[BaseException | int | None] = []
        self._ordered = threading.Condition()
        self.closed_by = ""
        self.given = 0
        self._interrupted = False

    def order(self, *orders: BaseException | int | None) -> None:
        with self._ordered:
            self._orders += orders
            self._ordered.notify_all()

    def wait_given(self, count: int) -> None:
        with self._ordered:
            assert self._ordered.wait_for(lambda: self.given >= count, PATIENCE_S)

    def read(self) -> Picture | None:
        with self._ordered:
            # Asking for the next one means that the last one was handed over.
            self.given = self._frames.tally().received
            self._ordered.notify_all()
            self._ordered.wait_for(lambda: bool(self._orders) or self._interrupted, PATIENCE_S)
            order = None if self._interrupted else self._orders.pop(0)
        if isinstance(order, BaseException):
            raise order
        if order is None:
            return None
        return Picture(np.full((2, 2, 3), order % 256, np.uint8), order, self._frames.number())

    def interrupt(self) -> None:
        with self._ordered:
            self._interrupted = True
            self._ordered.notify_all()

    def close(self) -> None:
        self.closed_by = threading.current_thread().name


def feed(
    reader: Callable[[FrameLedger], Reader], *, timeout_s: float = PATIENCE_S
) -> tuple[Feed, FrameLedger]:
    frames = FrameLedger()
    opened = Feed(lambda: reader(frames), frames, threading.Event(), name="it", timeout_s=timeout_s)
    return opened, frames


def test_feed_keeps_the_newest_only() -> None:
    readers: list[Told] = []

    def make(frames: FrameLedger) -> Told:
        readers.append(Told(frames))
        return readers[0]

    connection, frames = feed(make)
    reader = readers[0]
    with pytest.raises(Silence):
        connection.read(0.0)
    reader.order(1, 2, 3)
    # Three came, nobody took one: the two older ones are dropped.
    deadline = threading.Event()
    while frames.tally().dropped < 2:
        assert not deadline.wait(0.001)
    picture = connection.read(PATIENCE_S)
    assert picture is not None and (picture.captured_ns, picture.index) == (3, 2)
    reader.order(4)
    picture = connection.read(PATIENCE_S)
    assert picture is not None and picture.captured_ns == 4
    reader.order(5, None)
    assert (found := connection.read(PATIENCE_S)) is not None and found.captured_ns == 5
    assert connection.read(PATIENCE_S) is None
    connection.close()
    assert reader.closed_by == "edgeseg-reader" and not connection.hangs
    assert frames.tally().dropped == 2


def test_feed_keeps_the_newest_whatever_comes_last() -> None:
    readers: list[Told] = []

    def make(frames: FrameLedger) -> Told:
        readers.append(Told(frames))
        return readers[0]

    connection, frames = feed(make)
    # The third is older than the second; the fourth came in one piece with it, and after it.
    readers[0].order(3, 9, 5, 9)
    deadline = threading.Event()
    while frames.tally().received < 3:
        assert not deadline.wait(0.001)
    picture = connection.read(PATIENCE_S)
    assert picture is not None and (picture.captured_ns, picture.index) == (9, 3)
    assert (frames.tally().dropped, frames.tally().stale) == (2, 1)
    # A clock that is years ahead: what waits here grows old all the same.
    readers[0].order(1 << 61)
    picture = connection.read(PATIENCE_S)
    assert picture is not None and picture.captured_ns <= time.monotonic_ns()
    connection.close()


class Breaking(Reader):
    """Gives a picture, and breaks."""

    def __init__(self, frames: FrameLedger) -> None:
        self._frames = frames
        self._given = False

    def read(self) -> Picture | None:
        if self._given:
            raise SourceError("it broke")
        self._given = True
        return Picture(np.zeros((2, 2, 3), np.uint8), time.monotonic_ns(), self._frames.number())

    def close(self) -> None:
        """Nothing to give back."""


def test_broken_streams_are_forgotten_at_once() -> None:
    # Not only when the garbage collector comes by: whole pictures go with them.
    feeds: list[weakref.ref[Feed]] = []

    def make(frames: FrameLedger) -> Breaking:
        if len(feeds) % 2:
            raise SourceError("nobody answers")
        return Breaking(frames)

    def connect(frames: FrameLedger, closed: threading.Event) -> Connection:
        made = Feed.__new__(Feed)
        feeds.append(weakref.ref(made))
        made.__init__(  # type: ignore[misc]
            lambda: make(frames), frames, closed, name="it", timeout_s=PATIENCE_S
        )
        return made

    gc.collect()
    gc.disable()
    try:
        backoff = Backoff(0.001, 0.001)
        with LiveSource("it", connect, name="it", waits=True, backoff=backoff) as source:
            for _ in zip(range(8), source, strict=False):
                pass
        assert len(feeds) >= 15 and [feed() for feed in feeds[:-1]] == [None] * (len(feeds) - 1)
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [SourceError("it broke"), MemoryError("none left")])
def test_feed_hands_on_what_goes_wrong(error: BaseException) -> None:
    readers: list[Told] = []

    def make(frames: FrameLedger) -> Told:
        readers.append(Told(frames))
        readers[0].order(error)
        return readers[0]

    connection, _ = feed(make)
    with pytest.raises(type(error)) as raised:
        connection.read(PATIENCE_S)
    assert raised.value is error
    connection.close()


def test_feed_that_is_closed_wakes_its_reader() -> None:
    readers: list[Told] = []

    def make(frames: FrameLedger) -> Told:
        readers.append(Told(frames))
        return readers[0]

    connection, _ = feed(make)
    found: list[Picture | None] = []
    waiting = threading.Thread(target=lambda: found.append(connection.read(PATIENCE_S)))
    waiting.start()
    connection.interrupt()
    waiting.join(PATIENCE_S)
    connection.close()
    assert found == [None] and not connection.hangs


def test_opening_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeseg.source.connection._OPENING_GRACE_S", 0.0)
    let_go, closed = threading.Event(), threading.Event()
    readers: list[Told] = []

    def make(frames: FrameLedger) -> Told:
        assert let_go.wait(PATIENCE_S)
        readers.append(Told(frames))
        return readers[0]

    with pytest.raises(SourceError, match=r"it gave no answer within 0\.1 seconds"):
        feed(make, timeout_s=0.1)
    (thread,) = [one for one in threading.enumerate() if one.name == "edgeseg-reader"]
    let_go.set()
    thread.join(PATIENCE_S)
    # What it opened in the end, it has given back.
    assert readers[0].closed_by == "edgeseg-reader" and not closed.is_set()
