"""Frames in, results out: reading, inference and the caller's loop overlap, each in its thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from edgeseg.engine.base import Engine, Pending, Prepared
from edgeseg.errors import RequestError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.ledger import Ledger, timed
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.result import AnyOutputs, AnyResult, result_of
from edgeseg.source import Source

__all__ = ["Pipeline"]

# How long a thread may take to notice that it is to end, in seconds. A camera or a network that
# hangs must not hang its reader's program; a network in the middle of a frame must be waited for,
# because its engine may be closed next.
_CAPTURE_GRACE_S = 3.0
_INFERENCE_GRACE_S = 30.0

# How many frame sizes are remembered. A camera has a few; a folder of pictures may have thousands.
_SIZES = 64

# Waiting in slices keeps Ctrl-C working on Windows, where a wait without end ignores it.
_SLICE_S = 0.5

_Item = TypeVar("_Item")


class Pipeline:
    """The results of a source's frames, in order; iterate it once.

    A capture thread reads frames and prepares them, an inference thread hands them to the engine,
    as many as it takes at once, a third waits for the masks and brings them to frame size, the
    caller's loop draws and writes. From a file or a folder nothing is dropped: at most ``depth``
    frames wait between two stages. From a live source the newest frame wins: one that was not
    processed when the next came is dropped and counted, and so is a mask that the caller did not
    take in time. A mask is given out when it is finished, whether or not another frame comes.

    ``max_frames`` ends the iteration after so many results. ``postprocessing`` is what is done to
    the outputs on their way to a result. What goes wrong in a thread is raised
    in the caller's loop, after the results that were finished before. Use it in ``with``: leaving
    the block, however that happens, ends the threads and closes the source (not the engine)::

        with Pipeline(engine, source) as results:
            for result in results:
                sink.write(result)
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        *,
        depth: int = 2,
        max_frames: int | None = None,
        postprocessing: Postprocessing = NOTHING_MORE,
    ) -> None:
        postprocessing.check(engine.spec)
        if depth < 1:
            raise RequestError(f"the depth of a pipeline is at least 1, and {depth} came")
        if max_frames is not None and max_frames < 1:
            raise RequestError(f"the number of frames is at least 1, and {max_frames} came")
        self._engine = engine
        self._source = source
        self._max_frames = max_frames
        self._postprocessing = postprocessing
        self._ledger = Ledger()
        newest_only = source.live
        self._waiting: _Channel[_Waiting] = _Channel(1 if newest_only else depth, newest_only)
        # Frames inside the engine. Only `_room` limits them: a frame is taken from the source's
        # side when the engine has room for it and not before, so that it is the newest.
        self._flying: _Channel[_Flying] = _Channel(engine.frames_in_flight, newest_only=False)
        self._room = threading.Semaphore(engine.frames_in_flight)
        self._results: _Channel[AnyResult] = _Channel(1 if newest_only else depth, newest_only)
        self._threads: list[tuple[threading.Thread, float]] = []
        self._started = False
        self._closed = False

    @property
    def ledger(self) -> Ledger:
        """Times and counts, readable during the run and afterwards."""
        return self._ledger

    @property
    def source(self) -> Source:
        """Where the frames come from."""
        return self._source

    def __iter__(self) -> Iterator[AnyResult]:
        """Starts the threads at the first result; raises RequestError the second time."""
        if self._started or self._closed:
            raise RequestError("a pipeline runs once; make a new one, with a newly opened source")
        self._started = True
        return self._run()

    def close(self) -> None:
        """Ends the threads and closes the source; a second call does nothing.

        Waits a few seconds at most for a source that hangs; its thread then ends by itself when
        the source lets go, and never keeps the program from ending.
        """
        if self._closed:
            return
        self._closed = True
        self._waiting.abandon()
        self._results.abandon()
        self._source.close()
        for thread, grace_s in self._threads:
            if thread.is_alive():
                thread.join(grace_s)
        self._ledger.stop()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> Iterator[AnyResult]:
        if self._closed:
            return
        capture = threading.Thread(target=self._capture, name="edgeseg-capture", daemon=True)
        inference = threading.Thread(target=self._infer, name="edgeseg-inference", daemon=True)
        finishing = threading.Thread(target=self._finish, name="edgeseg-finishing", daemon=True)
        self._threads = [
            (capture, _CAPTURE_GRACE_S),
            (inference, _INFERENCE_GRACE_S),
            (finishing, _INFERENCE_GRACE_S),
        ]
        self._ledger.start()
        try:
            for thread, _ in self._threads:
                thread.start()
            taken = 0
            while (result := self._results.get()) is not None:
                yield result
                # Not kept while waiting for the next: a result holds a whole frame.
                del result
                taken += 1
                if taken == self._max_frames:
                    break
        finally:
            self.close()

    def _capture(self) -> None:
        """Body of the capture thread: source -> prepared frames."""
        error: BaseException | None = None
        try:
            engine, spec = self._engine, self._engine.spec
            geometries: dict[tuple[int, int], Geometry] = {}
            for frame in timed(self._source, self._ledger, self._wanted):
                started_ns = time.perf_counter_ns()
                size = (frame.height, frame.width)
                geometry = geometries.get(size)
                if geometry is None:
                    if len(geometries) == _SIZES:
                        geometries.clear()
                    geometry = geometries[size] = Geometry.between(*size, spec)
                prepared = engine.prepare(frame, geometry)
                prepare_ns = time.perf_counter_ns() - started_ns
                if self._waiting.put(_Waiting(frame, geometry, prepared, prepare_ns)):
                    self._ledger.count_dropped()
        except BaseException as raised:
            error = raised
        finally:
            self._waiting.finish(error)

    def _wanted(self, read: int) -> bool:
        """Whether another frame is to be read, after so many."""
        # From a live source any number of frames may be dropped before enough were processed.
        limit = None if self._source.live else self._max_frames
        return read != limit and not self._waiting.abandoned

    def _infer(self) -> None:
        """Body of the inference thread: prepared frames -> frames inside the engine."""
        error: BaseException | None = None
        try:
            while True:
                self._room.acquire()
                waiting = self._waiting.get()
                if waiting is None:
                    break
                pending = self._engine.submit(waiting.prepared)
                self._flying.put(_Flying(waiting, pending))
                # Not kept while waiting for the next: it holds a whole frame.
                del waiting, pending
        except BaseException as raised:
            error = raised
            # The capture thread may be waiting for room that nobody will make.
            self._waiting.abandon()
        finally:
            self._flying.finish(error)

    def _finish(self) -> None:
        """Body of the finishing thread: frames inside the engine -> results."""
        error: BaseException | None = None
        try:
            while (flying := self._flying.get()) is not None:
                try:
                    outputs = flying.pending.outputs()
                finally:
                    self._room.release()
                if not self._results.abandoned:
                    self._deliver(flying.waiting, outputs)
                del flying, outputs
        except BaseException as raised:
            error = raised
            self._waiting.abandon()
            self._forget_the_rest()
        finally:
            self._results.finish(error)

    def _deliver(self, waiting: _Waiting, outputs: AnyOutputs) -> None:
        """Outputs -> the caller."""
        started_ns = time.perf_counter_ns()
        result = result_of(
            outputs, waiting.frame, waiting.geometry, self._engine.spec, self._postprocessing
        )
        self._ledger.record("fit", waiting.prepare_ns + outputs.fit_ns)
        self._ledger.count_finished(result, time.perf_counter_ns() - started_ns)
        if self._results.put(result):
            self._ledger.count_superseded()

    def _forget_the_rest(self) -> None:
        """Takes what is still inside the engine, so that it may be closed, or used again."""
        while True:
            try:
                flying = self._flying.get()
                if flying is None:
                    return
                self._room.release()
                flying.pending.outputs()
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
    """A frame inside the engine."""

    waiting: _Waiting
    pending: Pending


class _Channel(Generic[_Item]):
    """A hand-over between two threads: holds at most ``capacity`` items.

    When it is full, ``put`` waits for room; with ``newest_only`` it replaces the oldest instead.
    """

    def __init__(self, capacity: int, newest_only: bool) -> None:
        self._items: deque[_Item] = deque()
        self._capacity = capacity
        self._newest_only = newest_only
        self._changed = threading.Condition()
        self._finished = False
        self._abandoned = False
        self._error: BaseException | None = None

    @property
    def abandoned(self) -> bool:
        """Whether nobody takes items any more."""
        return self._abandoned

    def put(self, item: _Item) -> bool:
        """Hands ``item`` over; True when it took the place of one that nobody had taken."""
        with self._changed:
            if self._newest_only:
                replaced = len(self._items) == self._capacity and not self._abandoned
                if replaced:
                    self._items.popleft()
            else:
                replaced = False
                while len(self._items) == self._capacity and not self._abandoned:
                    self._changed.wait(_SLICE_S)
            if not self._abandoned:
                self._items.append(item)
                self._changed.notify_all()
            return replaced

    def get(self) -> _Item | None:
        """The next item, waited for; None at the end. Raises what `finish` was given."""
        with self._changed:
            while not self._items and not self._finished and not self._abandoned:
                self._changed.wait(_SLICE_S)
            if self._abandoned:
                return None
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            # Handed on, not kept: an error holds its traceback, and that holds whole frames.
            error, self._error = self._error, None
        if error is None:
            return None
        try:
            raise error
        finally:
            del error

    def finish(self, error: BaseException | None) -> None:
        """No more items come; ``error``, if any, is raised after the last one was taken."""
        with self._changed:
            self._finished = True
            self._error = error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody takes items any more: drops what is there and wakes all who wait."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()
