"""Outlets: a thread per sink, what a full queue does, and sinks that fail or hang."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgeseg.errors import RequestError, SinkError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, Result, SemanticResult
from edgeseg.sink import MultiSink, NullSink, Outlet, Policy, Sink
from edgeseg.spec import ModelSpec, Preprocessing

# Longer than anything here takes; a test that waits so long has failed.
LONG_S = 20.0
SHORT_S = 0.05

SPEC = ModelSpec(
    name="halves",
    architecture="none",
    task="semantic",
    height=32,
    width=32,
    classes=("left", "right"),
    colours=((255, 0, 0), (0, 0, 255)),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
)


def result(index: int) -> SemanticResult:
    frame = Frame.of(np.zeros((32, 32, 3), np.uint8), index)
    return SemanticResult.from_outputs(
        Outputs(np.zeros((32, 32), np.uint8)), frame, Geometry.between(32, 32, SPEC), SPEC
    )


class Gate(Sink):
    """A sink that lets one result through per `let`, and notes what is asked of it, and where."""

    def __init__(self, *, opened: bool = True) -> None:
        self.calls: list[str] = []
        self.threads: set[threading.Thread] = set()
        self.entered = threading.Semaphore(0)
        self._permits = threading.Semaphore(1_000_000 if opened else 0)
        self.asked_to_stop = False
        self.failing: dict[str, BaseException] = {}

    @property
    def stopped(self) -> bool:
        return self.asked_to_stop

    def let(self, results: int = 1) -> None:
        for _ in range(results):
            self._permits.release()

    def await_write(self) -> None:
        assert self.entered.acquire(timeout=LONG_S)

    def write(self, result: Result) -> None:
        self.entered.release()
        assert self._permits.acquire(timeout=LONG_S)
        self._note(f"write {result.index}")

    def close(self) -> None:
        self._note("close")

    def abort(self) -> None:
        self._note("abort")

    def _note(self, call: str) -> None:
        self.threads.add(threading.current_thread())
        self.calls.append(call)
        if call in self.failing:
            raise self.failing[call]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in outlet_threads():
        thread.join(LONG_S)
    assert outlet_threads() == []


def outlet_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("edgeseg-outlet-")]


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_all_of_a_sink_happens_in_one_thread_in_order() -> None:
    sink = Gate()
    with Outlet(sink, name="file", depth=3) as outlet:
        (thread,) = outlet_threads()
        for index in range(50):
            outlet.write(result(index))
    outlet.close()
    outlet.abort()
    assert sink.calls == [*(f"write {index}" for index in range(50)), "close"]
    assert sink.threads == {thread}
    assert thread.name == "edgeseg-outlet-file" and thread.daemon and not thread.is_alive()
    stats = outlet.stats
    assert (stats.name, stats.policy, stats.written, stats.dropped) == ("file", "wait", 50, 0)
    assert (stats.waiting, stats.busy_s, stats.error) == (0, 0.0, None)


def test_an_error_in_the_block_aborts_in_the_same_thread() -> None:
    sink = Gate(opened=False)
    with pytest.raises(ZeroDivisionError), Outlet(sink, name="file") as outlet:
        (thread,) = outlet_threads()
        outlet.write(result(0))
        sink.await_write()
        outlet.write(result(1))
        sink.let(2)
        raise ZeroDivisionError
    # The second may have been begun before the abort, and is not forgotten then.
    assert sink.calls in (["write 0", "abort"], ["write 0", "write 1", "abort"])
    assert sink.threads == {thread}
    assert outlet.stats.written + outlet.stats.dropped == 2


def test_a_full_queue_makes_a_file_wait_and_loses_nothing() -> None:
    sink = Gate(opened=False)
    outlet = Outlet(sink, name="file", policy="wait", depth=2)
    outlet.write(result(0))
    sink.await_write()
    outlet.write(result(1))
    outlet.write(result(2))
    assert outlet.stats.waiting == 2
    writer = in_background(lambda: outlet.write(result(3)))
    # It cannot get through: nothing has made room.
    writer.join(SHORT_S)
    assert writer.is_alive()
    assert outlet.stats.busy_s > 0
    sink.let()
    writer.join(LONG_S)
    assert not writer.is_alive()
    sink.let(3)
    outlet.close()
    assert sink.calls == ["write 0", "write 1", "write 2", "write 3", "close"]
    assert outlet.stats.dropped == 0


def test_a_full_queue_makes_a_viewer_lose_the_oldest() -> None:
    sink = Gate(opened=False)
    outlet = Outlet(sink, name="page", policy="drop", depth=2)
    outlet.write(result(0))
    sink.await_write()
    for index in range(1, 10):
        outlet.write(result(index))
    assert (outlet.stats.waiting, outlet.stats.dropped) == (2, 7)
    sink.let(10)
    outlet.close()
    assert sink.calls == ["write 0", "write 8", "write 9", "close"]
    stats = outlet.stats
    assert (stats.written, stats.dropped, stats.waiting) == (3, 7, 0)


@pytest.mark.parametrize("policy", ["wait", "drop"])
@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (SinkError("the disk is full"), "the disk is full"),
        (ZeroDivisionError("by zero"), "file broke: by zero"),
        (KeyError(), "file broke: KeyError"),
        (SystemExit(3), "file broke: 3"),
    ],
)
def test_a_failing_sink_is_aborted_and_the_others_go_on(
    policy: Policy, failure: BaseException, says: str
) -> None:
    bad, good = Gate(), Gate()
    bad.failing["write 1"] = failure
    bad.failing["abort"] = RuntimeError("and aborting fails as well")
    outlets = (
        Outlet(bad, name="file", policy=policy, depth=1),
        Outlet(good, name="other", depth=1),
    )
    (bad_thread,) = (one for one in outlet_threads() if one.name.endswith("file"))
    both = MultiSink(outlets)
    for index in range(20):
        both.write(result(index))
        if index < 2:
            bad.await_write()
        if index == 1:
            # Until the failure is noticed, one more would be queued.
            bad_thread.join(LONG_S)
    assert str(outlets[0].error) == says and outlets[0].stats.error == says
    assert outlets[1].error is None
    with pytest.raises(SinkError, match=says):
        both.close()
    both.close()
    assert bad.calls == ["write 0", "write 1", "abort"]
    assert good.calls == [*(f"write {index}" for index in range(20)), "close"]
    assert (outlets[0].stats.written, outlets[0].stats.dropped) == (1, 19)


def test_a_sink_that_fails_at_the_end_tells_when_closed() -> None:
    sink = Gate()
    sink.failing["close"] = SinkError("the disk is full")
    outlet = Outlet(sink, name="file")
    outlet.write(result(0))
    with pytest.raises(SinkError, match="the disk is full"):
        outlet.close()
    assert sink.calls == ["write 0", "close", "abort"]
    assert outlet.stats.written == 1


@pytest.mark.parametrize("policy", ["wait", "drop"])
def test_a_hanging_sink_is_given_up(policy: Policy) -> None:
    sink = Gate(opened=False)
    outlet = Outlet(sink, name="share", policy=policy, depth=1, patience_s=SHORT_S)
    outlet.write(result(0))
    sink.await_write()
    written = 1
    # With "wait" the third write waits until the patience is lost; with "drop" none does.
    while outlet.error is None:
        outlet.write(result(written))
        written += 1
    assert "share took more than 0.05 seconds over one frame" in str(outlet.error)
    outlet.write(result(written))
    stats = outlet.stats
    assert (stats.written, stats.waiting, stats.dropped) == (0, 0, written)
    assert stats.busy_s >= SHORT_S and stats.error is not None
    with pytest.raises(SinkError, match="is given up"):
        outlet.close()
    assert outlet_threads() != []
    # It comes back after all: the one it was at is counted, and the rest taken back.
    sink.let()
    for thread in outlet_threads():
        thread.join(LONG_S)
    assert sink.calls == ["write 0", "abort"]


@pytest.mark.parametrize("ending", ["close", "abort"])
def test_an_end_that_hangs_is_not_waited_for(ending: str) -> None:
    released = threading.Event()

    class Endless(NullSink):
        def close(self) -> None:
            assert released.wait(LONG_S)

        def abort(self) -> None:
            assert released.wait(LONG_S)

    outlet = Outlet(Endless(), name="share", patience_s=SHORT_S)
    if ending == "close":
        with pytest.raises(SinkError, match=r"not finished within 0\.05 seconds"):
            outlet.close()
    else:
        outlet.abort()
    assert "not finished within" in str(outlet.error)
    released.set()


def test_a_writer_that_waits_is_let_go_by_an_abort() -> None:
    sink = Gate(opened=False)
    outlet = Outlet(sink, name="file", depth=1)
    outlet.write(result(0))
    sink.await_write()
    outlet.write(result(1))
    writer = in_background(lambda: outlet.write(result(2)))
    writer.join(SHORT_S)
    assert writer.is_alive()
    ender = in_background(outlet.abort)
    writer.join(LONG_S)
    assert not writer.is_alive()
    sink.let()
    ender.join(LONG_S)
    assert sink.calls == ["write 0", "abort"]
    assert (outlet.stats.written, outlet.stats.dropped) == (1, 2)
    with pytest.raises(SinkError, match="file is finished, and one more frame came"):
        outlet.write(result(3))


def test_stopped_is_the_sinks_own() -> None:
    sink = Gate()
    with Outlet(sink, name="window") as outlet:
        assert not outlet.stopped
        sink.asked_to_stop = True
        assert outlet.stopped


def test_results_are_let_go_once_they_are_written() -> None:
    sink = Gate(opened=False)
    outlet = Outlet(sink, name="file", depth=4)
    kept = []
    for index in range(3):
        one = result(index)
        kept.append(weakref.ref(one))
        outlet.write(one)
        del one
    sink.let(3)
    while outlet.stats.written < 3:
        sink.await_write()
    gc.collect()
    assert [one() for one in kept] == [None] * 3
    outlet.close()


@pytest.mark.parametrize("failure", [SinkError("full"), ZeroDivisionError()])
def test_a_failure_keeps_no_frame_alive(failure: Exception) -> None:
    class Failing(NullSink):
        def write(self, result: Result) -> None:
            try:
                picture = result.frame.pixels.copy()
                raise OSError(28, f"no space for {picture.shape}")
            except OSError as error:
                raise failure from error

    outlet = Outlet(Failing(), name="file", depth=1)
    one = result(0)
    kept = weakref.ref(one)
    outlet.write(one)
    del one
    (thread,) = outlet_threads()
    thread.join(LONG_S)
    assert outlet.error is not None
    del thread
    gc.collect()
    assert kept() is None
    outlet.abort()


@pytest.mark.parametrize(
    ("depth", "patience_s", "policy", "says"),
    [
        (0, 1.0, "wait", "1 result or more"),
        (1, 0.0, "wait", "above 0"),
        (1, float("inf"), "wait", "above 0"),
        (1, 1.0, "hold", "wait or drop"),
    ],
)
def test_wrong_requests(depth: int, patience_s: float, policy: Policy, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Outlet(NullSink(), name="x", policy=policy, depth=depth, patience_s=patience_s)
