"""Several sources through one engine, in fair turns; one that fails leaves the others alone."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from edgeseg.engine.base import Engine, Pending, Prepared
from edgeseg.errors import EdgeSegError, EngineError, KernelError, RequestError, SourceError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.lanes import Lane, Lanes, Lull
from edgeseg.ledger import Ledger, timed
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.result import AnyOutputs, AnyResult, result_of
from edgeseg.source import Source
from edgeseg.source.address import without_password
from edgeseg.source.status import Clock
from edgeseg.stats import SourceStats, Stats

if TYPE_CHECKING:
    from edgeseg.sensors import Reading
    from edgeseg.sink.outlet import Outlet

__all__ = ["StreamResult", "Streams"]

# How long threads may take to notice that they are to end, in seconds: all readers together, for
# which a source that hangs is not waited longer, and a network in the middle of a frame, which must
# be waited for, because its engine may be closed next. One that was waited for in vain already gets
# no more than a reader.
_CAPTURE_GRACE_S = 3.0
_INFERENCE_GRACE_S = 30.0
# How often the thread that waits for the engine's room sees whether it is to end, in seconds.
_SLICE_S = 0.5
# How often the caller's loop looks up while it waits for a result, in seconds: so long a stop may
# go unnoticed.
_LOOK_S = 0.1
# At how many looks in a row the engine has to be overdue.
_OVERDUE = 5
# How many frame sizes are remembered per source. A camera has a few; a folder of pictures may have
# thousands.
_SIZES = 64


@dataclass(frozen=True, eq=False)
class StreamResult:
    """A result, and the ``name`` of the source that its frame came from."""

    name: str
    result: AnyResult


class Streams:
    """The results of several sources, as they are finished; iterate it once.

    ``sources``: by name. Each has a thread that reads and prepares its frames, and keeps the newest
    (of a camera) or the next ``depth`` (of a file). Whenever the engine has room, the next source
    in turn that has a frame gives it, so that a fast camera cannot keep a slow one waiting, and no
    frame is chosen before it can be taken. An inference thread hands frames to the engine, as many
    as it takes at once; a third waits for the masks and brings them to frame size; the caller's
    loop draws and writes. From a file nothing is dropped: a caller who is slow slows its reading
    down. Of a live source, a frame that was not processed when the next came is dropped and
    counted, and so is a mask that was not taken when the next was finished. Results of one source
    come in order, and each when it is finished, whether or not another frame comes.

    A source that breaks, whatever it raises, is put into `errors` and ends; the others go on. What
    the engine raises, or an interpreter that is to end or has no memory left, ends them all, and is
    raised in the caller's loop after the results that were finished before. So is an EngineError
    when one call into the engine takes longer than ``patience_s``: the first frame may have to wait
    for a compiler, hence the minute (`math.inf`: wait for ever). Its thread cannot be ended and is
    left behind, as a daemon; such an engine must not be used again.

    ``max_frames`` is for each source. ``postprocessing`` is what is done to the outputs on their
    way to a result. ``clock`` is for tests. Use it in ``with``: leaving the block, however that
    happens, ends the threads and closes the sources (not the engine)::

        with Streams(engine, {"door": door, "yard": yard}) as streams:
            for stream in streams:
                sinks[stream.name].write(stream.result)

    Memory is bounded by construction, however long it runs. With capacity 1 for a live source and
    ``depth`` for another, at most ``sum(2 * capacity + 1) + engine.frames_in_flight + 3`` frames
    are alive: per source those that wait for the engine, those finished, and the one being read;
    those inside the engine; one being finished; one that the caller has, and the one it is given
    next. What a source reads ahead, and what a caller keeps, comes on top. Of each source, 64 frame
    sizes, one error, and a `Ledger` of fixed size are remembered.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Mapping[str, Source],
        *,
        depth: int = 2,
        max_frames: int | None = None,
        postprocessing: Postprocessing = NOTHING_MORE,
        patience_s: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        postprocessing.check(engine.spec)
        if not sources:
            raise RequestError("streams need at least one source, and none came")
        if depth < 1:
            raise RequestError(f"the depth is at least 1, and {depth} came")
        if max_frames is not None and max_frames < 1:
            raise RequestError(f"the number of frames is at least 1, and {max_frames} came")
        if not patience_s > 0:
            raise RequestError(
                f"the patience is a number of seconds above 0, and {patience_s} came"
            )
        self._engine = engine
        self._names = tuple(sources)
        self._sources = tuple(sources.values())
        self._max_frames = max_frames
        self._postprocessing = postprocessing
        self._patience_s = patience_s
        self._clock = clock or Clock()
        self._ledgers = tuple(Ledger() for _ in self._names)
        self._errors: dict[str, EdgeSegError] = {}
        lanes = [Lane(1, True) if source.live else Lane(depth, False) for source in self._sources]
        self._waiting: Lanes[_Waiting] = Lanes(lanes)
        # Frames inside the engine. Only `_room` limits them: a frame is taken from its source's
        # lane when the engine has room for it and not before, so that it is the newest.
        self._flying: Lanes[_Flying] = Lanes([Lane(engine.frames_in_flight + 1, False)])
        self._room = threading.Semaphore(engine.frames_in_flight)
        self._results: Lanes[AnyResult] = Lanes(lanes)
        self._captures: list[threading.Thread] = []
        self._workers: list[threading.Thread] = []
        # Since when the two threads have been inside a call of the engine's; None: they are not.
        self._submitting_ns: int | None = None
        self._awaiting_ns: int | None = None
        self._started_ns: int | None = None
        self._ended_ns: int | None = None
        self._hangs = False
        self._overdue = 0
        self._stopping = False
        self._closed = False
        self._deadlines: tuple[float, float] | None = None

    @property
    def sources(self) -> dict[str, Source]:
        """The sources by name."""
        return dict(zip(self._names, self._sources, strict=True))

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """Times and counts of each source, readable during the run and afterwards."""
        return dict(zip(self._names, self._ledgers, strict=True))

    @property
    def errors(self) -> dict[str, EdgeSegError]:
        """What went wrong with which source; those without an error are not in it."""
        return dict(self._errors)

    def stats(self, outlets: Sequence[Outlet] = (), reading: Reading | None = None) -> Stats:
        """How everything is doing now, with what is known of ``outlets`` and the machine.

        Any thread may call it, also afterwards. It takes a few milliseconds per source.
        """
        spec, errors = self._engine.spec, self._errors
        seen = tuple(outlet.stats for outlet in outlets)
        return Stats(
            model=spec.name,
            engine=self._engine.name,
            description=self._engine.description,
            network_size=(spec.height, spec.width),
            uptime_s=self._uptime_s(),
            in_engine_s=self._in_engine_s(),
            threads=(*self._living(), *_living_of_outlets([one.name for one in seen])),
            sources=tuple(
                SourceStats(
                    name=name,
                    uri=without_password(source.uri),
                    status=source.status,
                    tally=source.tally,
                    size=source.size,
                    fps=ledger.recent_fps(),
                    summary=ledger.summary(),
                    superseded=ledger.superseded,
                    error=str(errors[name]) if name in errors else None,
                )
                for name, source, ledger in zip(
                    self._names, self._sources, self._ledgers, strict=True
                )
            ),
            outlets=seen,
            reading=reading,
        )

    def __iter__(self) -> Iterator[StreamResult]:
        """Starts the threads at the first result; raises RequestError the second time."""
        if self._started_ns is not None or self._closed:
            raise RequestError("streams run once; make new ones, with newly opened sources")
        self._started_ns = self._clock.now_ns()
        return self._run()

    def stop(self) -> None:
        """Has the iteration end in peace: no more is read, what is inside or finished still comes.

        Frames that wait for the engine are left out. Any thread may call it, and any signal
        handler: it sets a flag and takes no lock. The iteration sees it within a tenth of a second
        while it waits; before it has begun, it gives nothing.
        """
        self._stopping = True

    def close(self) -> None:
        """Ends the threads and closes the sources, without giving out what is inside.

        Any thread may call it, several times. Waits three seconds at most for sources that hang,
        however many, and half a minute for a frame inside the engine; threads that take longer end
        by themselves when the driver lets go, and never keep the program from ending.
        """
        self._closed = True
        self._waiting.abandon()
        self._results.abandon()
        now = time.monotonic()
        if self._deadlines is None:
            grace_s = _CAPTURE_GRACE_S if self._hangs else _INFERENCE_GRACE_S
            self._deadlines = (now + _CAPTURE_GRACE_S, now + grace_s)
        try:
            for lane in range(len(self._sources)):
                self._close_source(lane)
            # Each call waits, and none waits anew: who calls second wants them to have ended, too.
            for threads, deadline in zip(
                (self._captures, self._workers), self._deadlines, strict=True
            ):
                for thread in threads:
                    if thread.is_alive() and thread is not threading.current_thread():
                        thread.join(max(deadline - time.monotonic(), 0))
        finally:
            for ledger in self._ledgers:
                ledger.stop()
            if self._ended_ns is None:
                self._ended_ns = self._clock.now_ns()

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> Iterator[StreamResult]:
        if self._closed:
            return
        self._captures = [
            threading.Thread(
                target=self._capture, args=(lane,), name=f"edgeseg-capture-{name}", daemon=True
            )
            for lane, name in enumerate(self._names)
        ]
        self._workers = [
            threading.Thread(target=self._infer, name="edgeseg-inference", daemon=True),
            threading.Thread(target=self._finish, name="edgeseg-finishing", daemon=True),
        ]
        taken = [0] * len(self._names)
        wound_up = False
        try:
            for ledger in self._ledgers:
                ledger.start()
            for thread in (*self._captures, *self._workers):
                thread.start()
            while True:
                if self._stopping and not wound_up:
                    wound_up = True
                    self._wind_up()
                try:
                    found = self._results.get(_LOOK_S)
                except Lull:
                    self._lose_patience()
                    continue
                if found is None:
                    break
                lane, result = found
                taken[lane] += 1
                if taken[lane] == self._max_frames:
                    # Nothing more of it is wanted; the others go on.
                    self._waiting.abandon_lane(lane)
                    self._results.abandon_lane(lane)
                    self._close_source(lane)
                    self._ledgers[lane].stop()
                yield StreamResult(self._names[lane], result)
                # Not kept while waiting for the next: a result holds a whole frame.
                del found, result
        finally:
            self.close()

    def _wind_up(self) -> None:
        """Ends the reading; what has been read and is not inside the engine is left out."""
        self._waiting.abandon()
        for lane in range(len(self._sources)):
            self._close_source(lane)

    def _lose_patience(self) -> None:
        """Raises EngineError when the engine has been busy with one call for too long.

        And still is at several looks: after the whole process stood still (a debugger, a container
        that was paused) the clock has run on, and the engine needs a moment to finish.
        """
        if self._in_engine_s() <= self._patience_s:
            self._overdue = 0
            return
        self._overdue += 1
        if self._overdue == _OVERDUE:
            self._hangs = True
            raise EngineError(
                f"{self._engine.name} was to finish a frame within {self._patience_s:g} seconds, "
                "and still has not; restart the program, with more patience (patience_s) if "
                "a frame may take that long here"
            )

    def _in_engine_s(self) -> float:
        since_ns = [at for at in (self._submitting_ns, self._awaiting_ns) if at is not None]
        return max((self._clock.now_ns() - min(since_ns)) / 1e9, 0.0) if since_ns else 0.0

    def _uptime_s(self) -> float:
        if self._started_ns is None:
            return 0.0
        until_ns = self._clock.now_ns() if self._ended_ns is None else self._ended_ns
        return (until_ns - self._started_ns) / 1e9

    def _living(self) -> list[str]:
        """The names of the threads that live, in the order of a frame."""
        readers = [thread for source in self._sources for thread in source.threads]
        threads = (*readers, *self._captures, *self._workers)
        return [thread.name for thread in threads if thread.is_alive()]

    def _close_source(self, lane: int) -> None:
        try:
            self._sources[lane].close()
        except Exception as error:
            self._blame(lane, error)

    def _blame(self, lane: int, error: Exception) -> None:
        """Puts what a source raised into `errors`; its first error counts."""
        if not isinstance(error, EdgeSegError):
            cause, detail = error, f"{type(error).__name__}: {error}".rstrip(": ")
            error = SourceError(
                f"{without_password(self._sources[lane].uri)} was to give frames, and "
                f"raised {detail}, which is a mistake in the program rather than in the camera"
            )
            error.__cause__ = cause
        # It may be kept for months, and the variables of its traceback hold whole frames.
        chained: BaseException | None = error
        while chained is not None:
            traceback.clear_frames(chained.__traceback__)
            chained = chained.__cause__ or chained.__context__
        self._errors.setdefault(self._names[lane], error)

    def _capture(self, lane: int) -> None:
        """Body of a source's thread."""
        failure: BaseException | None = None
        try:
            self._read(lane)
        except (EngineError, KernelError, MemoryError) as error:
            failure = error
        except Exception as error:
            # A source that was closed in the middle of a read may raise anything.
            if not self._waiting.is_abandoned(lane):
                self._blame(lane, error)
        except BaseException as error:
            failure = error
        finally:
            # What is left of it will be seen through by the other threads.
            self._close_source(lane)
            self._waiting.finish(lane, failure)
            del failure

    def _read(self, lane: int) -> None:
        """A source's frames -> prepared frames, until there are no more or none are wanted."""
        source, ledger, engine = self._sources[lane], self._ledgers[lane], self._engine
        geometries: dict[tuple[int, int], Geometry] = {}

        def wanted(read: int) -> bool:
            # From a live source any number of frames may be dropped before enough were processed.
            limit = None if source.live else self._max_frames
            return read != limit and not self._stopping and not self._waiting.is_abandoned(lane)

        for frame in timed(source, ledger, wanted):
            started_ns = time.perf_counter_ns()
            size = (frame.height, frame.width)
            geometry = geometries.get(size)
            if geometry is None:
                if len(geometries) == _SIZES:
                    geometries.clear()
                geometry = geometries[size] = Geometry.between(*size, engine.spec)
            prepared = engine.prepare(frame, geometry)
            prepare_ns = time.perf_counter_ns() - started_ns
            if self._waiting.put(lane, _Waiting(frame, geometry, prepared, prepare_ns)):
                ledger.count_dropped()
            # Not kept while waiting for the next: they hold a whole picture.
            del frame, prepared

    def _infer(self) -> None:
        """Body of the inference thread: prepared frames -> frames inside the engine."""
        failure: BaseException | None = None
        try:
            while self._wait_for_room():
                found = self._waiting.get()
                if found is None:
                    break
                lane, waiting = found
                self._submitting_ns = self._clock.now_ns()
                pending = self._engine.submit(waiting.prepared)
                self._submitting_ns = None
                self._flying.put(0, _Flying(lane, waiting, pending))
                # Not kept while waiting for the next: it holds a whole frame.
                del found, waiting, pending
        except BaseException as error:
            failure = error
            # The capture threads may be waiting for room that nobody will make.
            self._waiting.abandon()
        finally:
            self._submitting_ns = None
            self._flying.finish(0, failure)
            del failure

    def _wait_for_room(self) -> bool:
        """Waits until the engine takes another frame; False when there is to be none."""
        while not self._room.acquire(timeout=_SLICE_S):
            if self._closed:
                return False
        return True

    def _finish(self) -> None:
        """Body of the finishing thread: frames inside the engine -> results."""
        failure: BaseException | None = None
        try:
            while (found := self._flying.get()) is not None:
                _, flying = found
                outputs = self._outputs_of(flying)
                if not self._results.is_abandoned(flying.lane):
                    self._deliver(flying, outputs)
                del found, flying, outputs
        except BaseException as error:
            failure = error
            self._waiting.abandon()
            self._forget_the_rest()
        finally:
            for lane in range(len(self._names)):
                self._results.finish(lane, failure if lane == 0 else None)
            del failure

    def _outputs_of(self, flying: _Flying) -> AnyOutputs:
        """Waits for a frame inside the engine, and makes room for another."""
        self._awaiting_ns = self._clock.now_ns()
        try:
            return flying.pending.outputs()
        finally:
            self._awaiting_ns = None
            self._room.release()

    def _deliver(self, flying: _Flying, outputs: AnyOutputs) -> None:
        """Outputs -> the caller."""
        started_ns = time.perf_counter_ns()
        waiting, ledger = flying.waiting, self._ledgers[flying.lane]
        result = result_of(
            outputs, waiting.frame, waiting.geometry, self._engine.spec, self._postprocessing
        )
        ledger.record("fit", waiting.prepare_ns + outputs.fit_ns)
        ledger.count_finished(result, time.perf_counter_ns() - started_ns)
        if self._results.put(flying.lane, result):
            ledger.count_superseded()

    def _forget_the_rest(self) -> None:
        """Takes what is still inside the engine, so that it may be closed, or used again."""
        while True:
            try:
                found = self._flying.get()
                if found is None:
                    return
                self._outputs_of(found[1])
            except BaseException:
                # The first error is the one to tell, and the caller hears of it already.
                continue


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A frame on its way to the engine, and the time that preparing it took."""

    frame: Frame
    geometry: Geometry
    prepared: Prepared
    prepare_ns: int


@dataclass(frozen=True, eq=False)
class _Flying:
    """A frame inside the engine, and whose it is."""

    lane: int
    waiting: _Waiting
    pending: Pending


def _living_of_outlets(names: Sequence[str]) -> list[str]:
    """The names of the threads of outlets that live."""
    living = {thread.name for thread in threading.enumerate()} if names else set()
    return [name for name in (f"edgeseg-outlet-{name}" for name in names) if name in living]
