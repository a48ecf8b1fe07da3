"""Several sources through one engine, in fair turns; one that fails leaves the others alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from edgeseg.engine.base import Engine, Pending, Prepared
from edgeseg.errors import EdgeSegError, RequestError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.ledger import Ledger, timed
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.result import AnyResult, result_of
from edgeseg.source import Source

__all__ = ["Lanes", "StreamResult", "Streams"]

# How long threads may take to notice that they are to end, in seconds: all readers together, for
# which a source that hangs is not waited longer, and a network in the middle of a frame.
_CAPTURE_GRACE_S = 3.0
_INFERENCE_GRACE_S = 30.0
# Waiting in slices keeps Ctrl-C working on Windows, where a wait without end ignores it.
_SLICE_S = 0.5
# How many frame sizes are remembered per source.
_SIZES = 64

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class StreamResult:
    """A result, and the ``name`` of the source that its frame came from."""

    name: str
    result: AnyResult


class Streams:
    """The results of several sources, as they are finished; iterate it once.

    ``sources``: by name. Each has a thread that reads it and keeps its newest frame (from a camera)
    or its next ``depth`` frames (from a file). Whenever the engine has room, the next source in
    turn that has a frame gives it, so that a fast camera cannot keep a slow one waiting, and no
    frame is chosen before it can be taken. What holds for one source in a `Pipeline` holds for
    each here: order, newest first, nothing dropped of a file.

    A source that breaks is put into `errors` and ends; the others go on. An error of the engine
    ends them all, and is raised in the caller's loop. ``max_frames`` is for each source. Use it in
    ``with``: leaving the block ends the threads and closes the sources (not the engine)::

        with Streams(engine, {"door": door, "yard": yard}) as streams:
            for stream in streams:
                sinks[stream.name].write(stream.result)
    """

    def __init__(
        self,
        engine: Engine,
        sources: Mapping[str, Source],
        *,
        depth: int = 2,
        max_frames: int | None = None,
        postprocessing: Postprocessing = NOTHING_MORE,
    ) -> None:
        postprocessing.check(engine.spec)
        if not sources:
            raise RequestError("streams need at least one source, and none came")
        if depth < 1:
            raise RequestError(f"the depth of streams is at least 1, and {depth} came")
        if max_frames is not None and max_frames < 1:
            raise RequestError(f"the number of frames is at least 1, and {max_frames} came")
        self._engine = engine
        self._names = tuple(sources)
        self._sources = tuple(sources.values())
        self._max_frames = max_frames
        self._postprocessing = postprocessing
        self._ledgers = tuple(Ledger() for _ in self._names)
        self._errors: dict[str, EdgeSegError] = {}
        lanes = [Lane(1, True) if source.live else Lane(depth, False) for source in self._sources]
        self._waiting: Lanes[_Waiting] = Lanes(lanes)
        # Only `_room` limits how many frames are inside the engine.
        self._flying: Lanes[_Flying] = Lanes([Lane(engine.frames_in_flight + 1, False)])
        self._room = threading.Semaphore(engine.frames_in_flight)
        self._results: Lanes[AnyResult] = Lanes(lanes)
        self._captures: list[threading.Thread] = []
        self._workers: list[threading.Thread] = []
        self._started = False
        self._closed = False

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

    def __iter__(self) -> Iterator[StreamResult]:
        """Starts the threads at the first result; raises RequestError the second time."""
        if self._started or self._closed:
            raise RequestError("streams run once; make new ones, with newly opened sources")
        self._started = True
        return self._run()

    def close(self) -> None:
        """Ends the threads and closes the sources; a second call does nothing.

        Waits three seconds at most for sources that hang, however many; their threads end by
        themselves when they let go.
        """
        if self._closed:
            return
        self._closed = True
        self._waiting.abandon()
        self._results.abandon()
        for source in self._sources:
            source.close()
        deadline = time.monotonic() + _CAPTURE_GRACE_S
        for thread in self._captures:
            if thread.is_alive():
                thread.join(max(deadline - time.monotonic(), 0))
        for thread in self._workers:
            if thread.is_alive():
                thread.join(_INFERENCE_GRACE_S)
        for ledger in self._ledgers:
            ledger.stop()

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
        try:
            for ledger in self._ledgers:
                ledger.start()
            for thread in (*self._captures, *self._workers):
                thread.start()
            while (found := self._results.get()) is not None:
                lane, result = found
                taken[lane] += 1
                if taken[lane] == self._max_frames:
                    # Nothing more of it is wanted; the others go on.
                    self._waiting.abandon_lane(lane)
                    self._results.abandon_lane(lane)
                    self._sources[lane].close()
                    self._ledgers[lane].stop()
                yield StreamResult(self._names[lane], result)
                # Not kept while waiting for the next: a result holds a whole frame.
                del found, result
        finally:
            self.close()

    def _capture(self, lane: int) -> None:
        """Body of a source's thread: frames -> prepared frames."""
        source, ledger, engine = self._sources[lane], self._ledgers[lane], self._engine
        geometries: dict[tuple[int, int], Geometry] = {}
        failure: BaseException | None = None

        def wanted(read: int) -> bool:
            limit = None if source.live else self._max_frames
            return read != limit and not self._waiting.is_abandoned(lane)

        try:
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
        except EdgeSegError as error:
            self._errors[self._names[lane]] = error
        except BaseException as error:
            failure = error
        finally:
            # What is left of it will be seen through by the other threads.
            source.close()
            self._waiting.finish(lane, failure)

    def _infer(self) -> None:
        """Body of the inference thread: prepared frames -> frames inside the engine."""
        failure: BaseException | None = None
        try:
            while True:
                self._room.acquire()
                found = self._waiting.get()
                if found is None:
                    break
                lane, waiting = found
                pending = self._engine.submit(waiting.prepared)
                self._flying.put(0, _Flying(lane, waiting, pending))
                # Not kept while waiting for the next: it holds a whole frame.
                del found, waiting, pending
        except BaseException as error:
            failure = error
            self._waiting.abandon()
        finally:
            self._flying.finish(0, failure)

    def _finish(self) -> None:
        """Body of the finishing thread: frames inside the engine -> results."""
        failure: BaseException | None = None
        try:
            while (found := self._flying.get()) is not None:
                _, flying = found
                try:
                    outputs = flying.pending.outputs()
                finally:
                    self._room.release()
                waiting, ledger = flying.waiting, self._ledgers[flying.lane]
                if not self._results.is_abandoned(flying.lane):
                    started_ns = time.perf_counter_ns()
                    result = result_of(
                        outputs,
                        waiting.frame,
                        waiting.geometry,
                        self._engine.spec,
                        self._postprocessing,
                    )
                    ledger.record("fit", waiting.prepare_ns + outputs.fit_ns)
                    ledger.count_finished(result, time.perf_counter_ns() - started_ns)
                    if self._results.put(flying.lane, result):
                        ledger.count_superseded()
                    del result
                del found, flying, waiting, outputs
        except BaseException as error:
            failure = error
            self._waiting.abandon()
            self._forget_the_rest()
        finally:
            for lane in range(len(self._names)):
                self._results.finish(lane, failure if lane == 0 else None)

    def _forget_the_rest(self) -> None:
        """Takes what is still inside the engine, so that it may be closed, or used again."""
        while True:
            try:
                found = self._flying.get()
                if found is None:
                    return
                self._room.release()
                found[1].pending.outputs()
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


@dataclass(frozen=True)
class Lane:
    """How many items a lane holds, and whether a newer one takes the place of the oldest."""

    capacity: int
    newest_only: bool


class Lanes(Generic[_Item]):
    """A hand-over from several threads to one, which takes from each in turn.

    A lane that is full makes its ``put`` wait, or loses its oldest item if it is ``newest_only``.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = tuple(lanes)
        self._items: tuple[deque[_Item], ...] = tuple(deque() for _ in lanes)
        self._open = set(range(len(self._lanes)))
        self._left: set[int] = set()
        self._turn = 0
        self._changed = threading.Condition()
        self._abandoned = False
        self._error: BaseException | None = None

    def is_abandoned(self, lane: int) -> bool:
        """Whether nobody takes items of that lane any more."""
        return self._abandoned or lane in self._left

    def put(self, lane: int, item: _Item) -> bool:
        """Hands ``item`` over; True when it took the place of one that nobody had taken."""
        kind, items = self._lanes[lane], self._items[lane]
        with self._changed:
            if not kind.newest_only:
                while len(items) == kind.capacity and not self.is_abandoned(lane):
                    self._changed.wait(_SLICE_S)
            if self.is_abandoned(lane):
                return False
            replaced = len(items) == kind.capacity
            if replaced:
                items.popleft()
            items.append(item)
            self._changed.notify_all()
            return replaced

    def get(self) -> tuple[int, _Item] | None:
        """The next item and its lane, waited for; None when all lanes have ended.

        The lane after the one that was served last comes first. Raises what `finish` was given,
        after the items that were there before.
        """
        with self._changed:
            while True:
                if self._abandoned:
                    return None
                count = len(self._lanes)
                for step in range(count):
                    lane = (self._turn + step) % count
                    if self._items[lane]:
                        self._turn = lane + 1
                        item = self._items[lane].popleft()
                        self._changed.notify_all()
                        return lane, item
                if self._error is not None or not self._open:
                    break
                self._changed.wait(_SLICE_S)
            # Handed on, not kept: an error holds its traceback, and that holds whole frames.
            error, self._error = self._error, None
        if error is None:
            return None
        try:
            raise error
        finally:
            del error

    def finish(self, lane: int, error: BaseException | None = None) -> None:
        """No more items come on that lane; ``error``, if any, ends all of them."""
        with self._changed:
            self._open.discard(lane)
            self._error = self._error or error
            self._changed.notify_all()

    def abandon_lane(self, lane: int) -> None:
        """Nobody takes items of that lane any more."""
        with self._changed:
            self._left.add(lane)
            self._items[lane].clear()
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody takes items any more: drops what is there and wakes all who wait."""
        with self._changed:
            self._abandoned = True
            for items in self._items:
                items.clear()
            self._changed.notify_all()
