"""The pipeline: order, drops, errors, and that nothing is left behind."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import ledger as ledger_module
from edgeseg import streams as streams_module
from edgeseg.engine.base import Engine, OneAtATime, Pending, Prepared
from edgeseg.errors import EngineError, FrameError, RequestError, SourceError
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.ledger import STAGES, Ledger, Stage
from edgeseg.pipeline import Pipeline
from edgeseg.result import AnyOutputs, Outputs, SemanticResult
from edgeseg.source import Source, open_source
from edgeseg.spec import ModelSpec, Preprocessing

PATIENCE_S = 10.0

SPEC = ModelSpec(
    name="stripes",
    architecture="none",
    task="semantic",
    height=32,
    width=48,
    classes=("dark", "middle", "bright", "white"),
    colours=((0, 0, 0), (90, 0, 0), (0, 180, 0), (0, 0, 255)),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
)


class Stripes(OneAtATime):
    """An engine whose class is the brightness of the red channel; ``before`` runs first."""

    name = "stripes"
    description = "a test's engine"
    spec = SPEC

    def __init__(self, before: Callable[[int], None] = lambda call: None) -> None:
        self._before = before
        self.calls = 0

    def run(self, pixels: Pixels) -> Outputs:
        self._before(self.calls)
        self.calls += 1
        assert pixels.shape == (32, 48, 3) and pixels.flags.c_contiguous
        return Outputs(class_map=pixels[..., 2] // 64, network_ns=2_000_000, head_ns=1_000_000)

    def close(self) -> None:
        """Nothing to give back."""


class Numbers(Source):
    """Frames whose every pixel is their number; ``before`` runs before each is handed out."""

    def __init__(
        self,
        count: int,
        *,
        live: bool = False,
        before: Callable[[int], None] = lambda index: None,
        shape: tuple[int, ...] = (24, 36, 3),
    ) -> None:
        super().__init__("numbers", live=live, length=count)
        self._count = count
        self._before = before
        self._shape = shape
        self.given = 0
        self.releases = 0

    def _read(self) -> Frame | None:
        index = self.given
        self._before(index)
        if index == self._count:
            return None
        self.given += 1
        frame = Frame.of(np.full((1, 1, 3), index, np.uint8), index)
        return replace(frame, pixels=np.full(self._shape, index, np.uint8))

    def _release(self) -> None:
        self.releases += 1


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def expected(frame: Frame) -> NDArray[np.uint8]:
    geometry = Geometry.between(frame.height, frame.width, SPEC)
    return geometry.restore(geometry.fit(frame.pixels)[..., 2] // 64)


# --- files: nothing is dropped


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_files_give_every_frame_in_order(count: int, depth: int) -> None:
    source = Numbers(count)
    with Pipeline(Stripes(), source, depth=depth) as results:
        found = list(results)
    assert [result.index for result in found] == list(range(count))
    assert [int(result.frame.pixels[0, 0, 0]) for result in found] == list(range(count))
    ledger = results.ledger
    assert (ledger.frames, ledger.dropped, ledger.superseded) == (count, 0, 0)
    assert source.releases == 1


def test_results_are_the_steps_done_by_hand() -> None:
    engine: Engine = Stripes()
    with open_source("synthetic:?size=96x128&frames=6") as source:
        for result in Pipeline(engine, source):
            assert result.class_map.shape == (96, 128)
            np.testing.assert_array_equal(result.class_map, expected(result.frame))
            assert result.age_ms > 0


def test_frame_size_may_change(tmp_path: Path) -> None:
    sizes = [(24, 36), (24, 36), (50, 20), (32, 48), (7, 90), (24, 36)]
    for index, (height, width) in enumerate(sizes):
        picture = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        (tmp_path / f"{index}.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    with Pipeline(Stripes(), open_source(str(tmp_path))) as results:
        found = list(results)
    assert [result.class_map.shape for result in found] == sizes
    for result in found:
        np.testing.assert_array_equal(result.class_map, expected(result.frame))


@pytest.mark.parametrize(("frames", "count"), [(1, 1), (7, 7), (30, 20)])
def test_max_frames(frames: int, count: int) -> None:
    source = Numbers(20)
    with Pipeline(Stripes(), source, max_frames=frames) as results:
        assert len(list(results)) == count
    assert source.given == count == results.ledger.frames
    assert source.releases == 1


def test_reading_inference_and_output_overlap() -> None:
    # Each stage waits until the stage before it has begun with the next frame: were any two of
    # them to take turns, this would never end.
    captured = [threading.Event() for _ in range(10)]
    inferred = [threading.Event() for _ in range(10)]

    def capture(index: int) -> None:
        if index < 10:
            captured[index].set()

    def infer(call: int) -> None:
        inferred[call].set()
        if call < 9:
            assert captured[call + 1].wait(PATIENCE_S)

    with Pipeline(Stripes(infer), Numbers(10, before=capture)) as results:
        for result in results:
            if result.index < 9:
                assert inferred[result.index + 1].wait(PATIENCE_S)
    assert results.ledger.frames == 10


# --- live: the newest frame wins


def test_live_drops_what_the_engine_has_no_time_for() -> None:
    first_is_in = threading.Event()
    all_were_read = threading.Event()
    first_was_taken = threading.Event()

    def capture(index: int) -> None:
        if index == 1:
            assert first_is_in.wait(PATIENCE_S)
        if index == 30:
            all_were_read.set()

    def infer(call: int) -> None:
        if call == 0:
            first_is_in.set()
            assert all_were_read.wait(PATIENCE_S)
        else:
            assert first_was_taken.wait(PATIENCE_S)

    source = Numbers(30, live=True, before=capture)
    found = []
    with Pipeline(Stripes(infer), source) as results:
        for result in results:
            found.append(result.index)
            first_was_taken.set()
    # Frame 0 was with the engine while 1 to 29 came: of those only the last is processed.
    assert found == [0, 29]
    ledger = results.ledger
    assert (ledger.frames, ledger.dropped, ledger.superseded) == (2, 28, 0)


def test_live_passes_over_masks_the_caller_has_no_time_for() -> None:
    taken = threading.Event()
    done = threading.Event()
    asked = threading.Semaphore(0)

    def capture(index: int) -> None:
        # One frame at a time through the engine, so that none is dropped on the way in.
        if 0 < index < 20:
            assert asked.acquire(timeout=PATIENCE_S)
        if index == 1:
            assert taken.wait(PATIENCE_S)
        if index == 20:
            done.set()

    with Pipeline(
        Stripes(lambda call: asked.release()), Numbers(20, live=True, before=capture)
    ) as results:
        found = []
        for result in results:
            found.append(result.index)
            if result.index == 0:
                taken.set()
                assert done.wait(PATIENCE_S)
    ledger = results.ledger
    assert found[0] == 0 and found[-1] == 19 and found == sorted(set(found))
    assert len(found) <= 4
    assert ledger.frames + ledger.dropped == 20
    assert ledger.superseded == ledger.frames - len(found)


def test_live_max_frames_counts_results() -> None:
    with Pipeline(
        Stripes(), open_source("synthetic:?size=64x64&live=1&fps=500&frames=0"), max_frames=5
    ) as results:
        assert len(list(results)) == 5


# --- engines that take several frames at a time


class Flights:
    """An engine that makes stripes of whole frames, several at a time.

    ``before_submit`` and ``before_outputs`` run first, with the frame's number and the engine.
    """

    name = "flights"
    description = "a test's engine"
    spec = SPEC

    def __init__(
        self,
        frames_in_flight: int,
        before_submit: Callable[[int], None] = lambda index: None,
        before_outputs: Callable[[int], None] = lambda index: None,
    ) -> None:
        self.frames_in_flight = frames_in_flight
        self.before_submit = before_submit
        self.before_outputs = before_outputs
        self.submitted: list[int] = []
        self.taken: list[int] = []
        self.most_inside = 0

    def run(self, pixels: Pixels) -> AnyOutputs:
        return self.submit(Prepared(pixels)).outputs()

    def prepare(self, frame: Frame, geometry: Geometry) -> Prepared:
        return Prepared(frame.pixels, geometry)

    def submit(self, prepared: Prepared) -> Pending:
        index = int(prepared.pixels[0, 0, 0])
        self.before_submit(index)
        self.submitted.append(index)
        self.most_inside = max(self.most_inside, len(self.submitted) - len(self.taken))
        return Flight(self, prepared)

    def close(self) -> None:
        """Nothing to give back."""


class Flight:
    """A frame inside; its outputs are there when somebody asks."""

    def __init__(self, engine: Flights, prepared: Prepared) -> None:
        self._engine = engine
        self._prepared = prepared

    def outputs(self) -> AnyOutputs:
        index = int(self._prepared.pixels[0, 0, 0])
        assert index == self._engine.submitted[len(self._engine.taken)]
        try:
            self._engine.before_outputs(index)
        finally:
            self._engine.taken.append(index)
        geometry = self._prepared.geometry
        assert geometry is not None
        fitted = geometry.fit(self._prepared.pixels)
        return Outputs(fitted[..., 2] // 64, network_ns=2_000_000, fit_ns=5_000_000_000)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("frames_in_flight", [1, 2, 3])
def test_as_many_frames_inside_as_the_engine_takes(frames_in_flight: int, depth: int) -> None:
    engine: Engine
    inside = [threading.Event() for _ in range(30)]

    def outputs(index: int) -> None:
        # Nobody's outputs are given before the engine is full.
        last = min(index + frames_in_flight, 30) - 1
        assert inside[last].wait(PATIENCE_S)

    engine = flights = Flights(frames_in_flight, lambda index: inside[index].set(), outputs)
    with Pipeline(engine, Numbers(30), depth=depth) as results:
        found = list(results)
    assert [result.index for result in found] == list(range(30)) == flights.taken
    for result in found:
        np.testing.assert_array_equal(result.class_map, expected(result.frame))
    assert flights.most_inside == frames_in_flight


def test_mask_of_an_idle_camera_is_not_held_back() -> None:
    seen = [threading.Event() for _ in range(6)]

    def capture(index: int) -> None:
        # The camera has its next picture only after the last one's mask was seen.
        if index > 0:
            assert seen[index - 1].wait(PATIENCE_S)

    with Pipeline(Flights(3), Numbers(6, live=True, before=capture)) as results:
        for result in results:
            seen[result.index].set()
    assert results.ledger.frames == 6


def test_full_engine_takes_the_newest_frame_next() -> None:
    read = [threading.Event() for _ in range(31)]
    submitted = [threading.Event() for _ in range(31)]
    taken = [threading.Event() for _ in range(31)]

    def capture(index: int) -> None:
        read[index].set()
        if index in (1, 2):
            assert submitted[index - 1].wait(PATIENCE_S)

    def outputs(index: int) -> None:
        assert read[30].wait(PATIENCE_S)
        if index > 0:
            assert taken[0 if index == 1 else 1].wait(PATIENCE_S)

    engine = Flights(2, lambda index: submitted[index].set(), outputs)
    with Pipeline(engine, Numbers(30, live=True, before=capture)) as results:
        found = []
        for result in results:
            found.append(result.index)
            taken[result.index].set()
    # 0 and 1 were inside while 2 to 29 came.
    assert found == [0, 1, 29] and results.ledger.dropped == 27


def test_fit_is_what_pipeline_and_engine_did_of_it() -> None:
    with Pipeline(Flights(2), Numbers(5)) as results:
        assert len(list(results)) == 5
    fit_ms = results.ledger.percentiles("fit")[0]
    assert 5_000 < fit_ms < 6_000


@pytest.mark.parametrize("where", ["submit", "outputs"])
def test_error_of_a_frame_comes_after_those_before_it(where: str) -> None:
    error = EngineError("the network gave nothing")
    hooks = {f"before_{where}": failing(3, error)}
    engine = Flights(3, **hooks)
    source = Numbers(250)
    with pytest.raises(EngineError) as raised, Pipeline(engine, source) as results:
        found = []
        for result in results:
            found.append(result.index)
    assert raised.value is error and found == [0, 1, 2]
    # What was inside has been taken out, and the source was not read for nobody.
    assert engine.taken == engine.submitted
    assert source.given < 30 and source.releases == 1


def test_every_frame_fails() -> None:
    def fail(index: int) -> None:
        raise EngineError(f"frame {index}")

    engine = Flights(3, before_outputs=fail)
    with pytest.raises(EngineError, match="frame 0"), Pipeline(engine, Numbers(250)) as results:
        list(results)
    assert engine.taken == engine.submitted


@pytest.mark.parametrize("live", [False, True])
def test_leaving_early_takes_out_what_is_inside(live: bool) -> None:
    engine = Flights(3)
    with Pipeline(engine, Numbers(250, live=live)) as results:
        for _ in results:
            break
    assert engine.taken == engine.submitted


# --- errors


def failing(at: int, error: BaseException) -> Callable[[int], None]:
    def before(index: int) -> None:
        if index == at:
            raise error

    return before


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "error", [SourceError("the camera is gone"), MemoryError("none left"), KeyboardInterrupt()]
)
def test_error_of_the_source_comes_after_what_was_finished(
    error: BaseException, live: bool
) -> None:
    source = Numbers(10, live=live, before=failing(3, error))
    found = []
    with (
        pytest.raises(type(error)) as raised,
        Pipeline(Stripes(), source) as results,
    ):
        for result in results:
            found.append(result.index)
    assert raised.value is error
    assert found == [0, 1, 2] if not live else found[-1] == 2
    assert source.releases == 1


def test_error_of_the_engine() -> None:
    error = EngineError("the network gave nothing")
    source = Numbers(10_000)
    with (
        pytest.raises(EngineError) as raised,
        Pipeline(Stripes(failing(3, error)), source) as results,
    ):
        assert [result.index for result in results] == [0, 1, 2]
    assert raised.value is error
    # The file was not read to its end for nobody.
    assert source.given < 20 and source.releases == 1


def test_mistake_in_a_source_is_an_error_of_the_source() -> None:
    mistake = ZeroDivisionError("division by zero")
    found = []
    with (
        pytest.raises(SourceError, match="raised ZeroDivisionError: division by zero") as raised,
        Pipeline(Stripes(), Numbers(9, before=failing(3, mistake))) as results,
    ):
        for result in results:
            found.append(result.index)
    assert raised.value.__cause__ is mistake and found == [0, 1, 2]


def test_engine_that_never_answers_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "_CAPTURE_GRACE_S", 0.05)
    go_on = threading.Event()

    def hang(call: int) -> None:
        if call == 2:
            go_on.wait()

    found = []
    with (
        pytest.raises(EngineError, match=r"stripes was to finish a frame within 0\.1 seconds"),
        Pipeline(Stripes(hang), Numbers(9), patience_s=0.1) as results,
    ):
        for result in results:
            found.append(result.index)
    assert found == [0, 1]
    stuck = [thread for thread in threading.enumerate() if thread.name.startswith("edgeseg-")]
    assert "edgeseg-inference" in {thread.name for thread in stuck}
    go_on.set()
    for thread in stuck:
        thread.join(PATIENCE_S)


def test_stop_ends_the_iteration_in_peace() -> None:
    source = Numbers(100_000)
    with Pipeline(Stripes(), source) as results:
        found = []
        for result in results:
            found.append(result.index)
            if result.index == 5:
                results.stop()
    assert found == [*range(len(found))] and 6 <= len(found) < 20
    assert source.releases == 1 and results.stats().threads == ()


@pytest.mark.parametrize("shape", [(24, 36), (24, 36, 4)])
def test_frame_of_another_kind(shape: tuple[int, ...]) -> None:
    with (
        pytest.raises(FrameError, match="cvtColor"),
        Pipeline(Stripes(), Numbers(3, shape=shape)) as results,
    ):
        list(results)


def test_wrong_requests() -> None:
    with pytest.raises(RequestError, match="at least 1, and 0 came"):
        Pipeline(Stripes(), Numbers(3), depth=0)
    with pytest.raises(RequestError, match="at least 1, and 0 came"):
        Pipeline(Stripes(), Numbers(3), max_frames=0)
    with Pipeline(Stripes(), Numbers(3)) as results:
        assert len(list(results)) == 3
        with pytest.raises(RequestError, match="runs once"):
            iter(results)


# --- leaving early


class _Mine(Exception):
    """Something that goes wrong in a caller's loop."""


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("how", ["break", "error", "Ctrl-C", "generator", "close", "unused"])
def test_leaving_early_ends_everything(how: str, live: bool) -> None:
    source = Numbers(100_000, live=live)
    results = Pipeline(Stripes(), source)
    if how == "generator":
        frames = iter(results)
        next(frames)
        frames.close()  # type: ignore[attr-defined]
    elif how == "close":
        frames = iter(results)
        next(frames)
        results.close()
        assert list(frames) == []
    elif how == "unused":
        with results:
            pass
    else:
        error = {"error": _Mine, "Ctrl-C": KeyboardInterrupt}.get(how)
        try:
            with results:
                for result in results:
                    if result.index >= 2:
                        if error is not None:
                            raise error
                        break
        except (_Mine, KeyboardInterrupt):
            assert how != "break"
    results.close()
    assert source.releases == 1
    assert source.given < 100_000


def test_source_that_hangs_does_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "_CAPTURE_GRACE_S", 0.1)
    go_on = threading.Event()

    def hang(index: int) -> None:
        if index == 2:
            go_on.wait()

    source = Numbers(10, live=True, before=hang)
    with Pipeline(Stripes(), source) as results:
        for _ in results:
            break
    (stuck,) = [
        thread for thread in threading.enumerate() if thread.name == "edgeseg-capture-source"
    ]
    assert stuck.daemon and source.releases == 0
    # It gives the source back by itself, once the source lets go.
    go_on.set()
    stuck.join(PATIENCE_S)
    assert source.releases == 1


# --- the ledger


def finished(at_ms: float, captured_ms: float = 0.0, index: int = 0) -> SemanticResult:
    frame = Frame(np.zeros((32, 48, 3), np.uint8), round(captured_ms * 1e6), index)
    outputs = Outputs(np.zeros((32, 48), np.uint8), network_ns=3_000_000, head_ns=500_000)
    geometry = Geometry.between(32, 48, SPEC)
    return SemanticResult(frame, SPEC, geometry, outputs, finished_ns=round(at_ms * 1e6))


def test_ledger_before_anything() -> None:
    ledger = Ledger()
    assert (ledger.frames, ledger.dropped, ledger.fps(), ledger.elapsed) == (0, 0, 0.0, 0.0)
    assert ledger.percentiles("fit") == (0.0, 0.0, 0.0)
    assert ledger.summary().to_dict() == {
        "fps": 0.0,
        "frames": 0,
        "dropped": 0,
        "stages": {},
        "mask_age_ms": {"p50": 0.0, "p99": 0.0},
    }
    with pytest.raises(RequestError, match="capture, fit, network"):
        ledger.record("lunch", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("finished_ms", "fps"),
    [((), 0.0), ((5,), 0.0), ((5, 5), 0.0), ((1000, 1020), 50.0), ((0, 10, 500, 2000), 1.5)],
)
def test_fps_is_between_the_first_and_the_last_mask(
    finished_ms: tuple[float, ...], fps: float
) -> None:
    ledger = Ledger()
    for at_ms in finished_ms:
        ledger.count_finished(finished(at_ms), 0)
    assert ledger.fps() == pytest.approx(fps)


@pytest.mark.parametrize(
    ("finished_ms", "now_ms", "fps"),
    [
        ((), 1000, 0.0),
        ((0,), 10, 0.0),
        # In the beginning: since the first mask, without it.
        ((1000, 1100, 1200), 1200, 10.0),
        ((1000, 1100, 1200), 2000, 2.0),
        # Later: those of the last five seconds, over five seconds.
        (tuple(range(0, 20_001, 100)), 20_000, 10.0),
        (tuple(range(0, 20_001, 100)), 22_000, 6.0),
        (tuple(range(0, 20_001, 100)), 25_000, 0.0),
        ((0, 60_000), 60_500, 0.2),
    ],
)
def test_recent_fps(finished_ms: tuple[float, ...], now_ms: int, fps: float) -> None:
    ledger = Ledger()
    for at_ms in finished_ms:
        ledger.count_finished(finished(at_ms), 0)
    assert ledger.recent_fps(now_ms * 1_000_000) == pytest.approx(fps)
    assert Ledger().recent_fps() == 0.0


def test_ledger_sums_up() -> None:
    ledger = Ledger()
    for index in range(101):
        ledger.record("capture", index * 1_000_000)
        ledger.count_finished(finished(20 * index + 7, 20 * index, index), 250_000)
    for _ in range(3):
        ledger.count_dropped()
    ledger.record("output", 4_000_000)
    assert ledger.percentiles("capture") == pytest.approx((50.0, 95.0, 99.0))
    found = json.loads(json.dumps(ledger.summary().to_dict()))
    assert list(found) == ["fps", "frames", "dropped", "stages", "mask_age_ms"]
    assert list(found["stages"]) == ["capture", "network", "head", "restore", "output"]
    assert found["stages"]["network"] == {"p50_ms": 3.0, "p95_ms": 3.0, "p99_ms": 3.0}
    assert found["stages"]["restore"]["p99_ms"] == 0.25
    assert found["mask_age_ms"] == {"p50": 7.0, "p99": 7.0}
    assert (found["frames"], found["dropped"], found["fps"]) == (101, 3, pytest.approx(50.0))


def test_ledger_remembers_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_REMEMBERED", 10)
    ledger = Ledger()
    for index in range(1000):
        ledger.record("fit", index * 1_000_000)
        ledger.count_finished(finished(index), 0)
    assert ledger.percentiles("fit")[0] == pytest.approx(994.5)
    assert ledger.frames == 1000
    # More masks in five seconds than are remembered: over the time of those that are.
    assert ledger.recent_fps(999_000_000) == pytest.approx(1000)


def test_memory_of_a_ledger_does_not_grow() -> None:
    ledger, result = Ledger(), finished(7)

    def run(start: int, stop: int) -> None:
        for index in range(start, stop):
            for stage in STAGES:
                ledger.record(stage, 10**12 + index)
            ledger.count_finished(replace(result, finished_ns=10**7 * index), 10**12 + index)

    tracemalloc.start()
    try:
        # More than the five seconds that are remembered mask by mask.
        run(0, 600)
        before = tracemalloc.get_traced_memory()[0]
        run(600, 3600)
        assert tracemalloc.get_traced_memory()[0] - before < 2_000
    finally:
        tracemalloc.stop()


def test_ledger_sorts_without_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, sorted_ = Ledger(), []
    ledger.count_finished(finished(5), 1)
    percentile = np.percentile

    def unlocked(*given: Any) -> Any:
        sorted_.append(ledger._lock.locked())
        return percentile(*given)

    monkeypatch.setattr(np, "percentile", unlocked)
    assert ledger.summary().mask_age_ms.p50 == 5
    assert sorted_ and not any(sorted_)


def test_ledger_of_a_run_has_every_stage() -> None:
    with Pipeline(Stripes(), Numbers(8)) as results:
        for _ in results:
            results.ledger.record("output", 1_000)
    stages: list[Stage] = ["capture", "fit", "network", "head", "restore", "output"]
    ledger = results.ledger
    assert list(ledger.summary().stages) == stages
    assert ledger.percentiles("network")[0] == 2.0 and ledger.percentiles("head")[0] == 1.0
    assert ledger.elapsed > 0 and ledger.elapsed == ledger.elapsed
