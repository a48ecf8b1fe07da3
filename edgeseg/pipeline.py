"""Frames in, results out: reading, inference and the caller's loop overlap, each in its thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from edgeseg.engine.base import Engine
from edgeseg.errors import RequestError
from edgeseg.ledger import Ledger
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.result import AnyResult
from edgeseg.source import Source
from edgeseg.stats import Stats
from edgeseg.streams import Streams

if TYPE_CHECKING:
    from edgeseg.sensors import Reading
    from edgeseg.sink.outlet import Outlet

__all__ = ["Pipeline"]

# What the one source is called in statistics and in the name of its thread.
_NAME = "source"


class Pipeline:
    """The results of a source's frames, in order; iterate it once. `Streams` of one source.

    A capture thread reads frames and prepares them, an inference thread hands them to the engine,
    as many as it takes at once, a third waits for the masks and brings them to frame size, the
    caller's loop draws and writes. From a file or a folder nothing is dropped: at most ``depth``
    frames wait between two stages. From a live source the newest frame wins: one that was not
    processed when the next came is dropped and counted, and so is a mask that the caller did not
    take in time. A mask is given out when it is finished, whether or not another frame comes.

    ``max_frames`` ends the iteration after so many results. ``postprocessing`` is what is done to
    the outputs on their way to a result. What goes wrong in a thread is raised in the caller's
    loop, after the results that were finished before; a source's mistake (any error that is not of
    edgeseg.errors) as a SourceError with the mistake as its cause. So is an EngineError when the
    engine takes longer than ``patience_s`` over one frame. Use it in ``with``: leaving the block,
    however that happens, ends the threads and closes the source (not the engine)::

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
        patience_s: float = 60.0,
    ) -> None:
        self._streams = Streams(
            engine,
            {_NAME: source},
            depth=depth,
            max_frames=max_frames,
            postprocessing=postprocessing,
            patience_s=patience_s,
        )
        self._source = source
        self._ledger = self._streams.ledgers[_NAME]
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

    def stats(self, outlets: Sequence[Outlet] = (), reading: Reading | None = None) -> Stats:
        """How everything is doing now; see `Streams.stats`."""
        return self._streams.stats(outlets, reading)

    def __iter__(self) -> Iterator[AnyResult]:
        """Starts the threads at the first result; raises RequestError the second time."""
        if self._started or self._closed:
            raise RequestError("a pipeline runs once; make a new one, with a newly opened source")
        self._started = True
        return self._run()

    def stop(self) -> None:
        """Has the iteration end in peace; see `Streams.stop`. Safe in a signal handler."""
        self._streams.stop()

    def close(self) -> None:
        """Ends the threads and closes the source; any thread may call it, several times.

        Waits three seconds at most for a source that hangs, and half a minute for a frame inside
        the engine; a thread that takes longer ends by itself when the driver lets go, and never
        keeps the program from ending.
        """
        self._closed = True
        self._streams.close()

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
        try:
            for stream in self._streams:
                yield stream.result
                # Not kept while waiting for the next: it holds a whole frame.
                del stream
            error = None if self._closed else self._streams.errors.get(_NAME)
        finally:
            self.close()
        if error is None:
            return
        try:
            raise error
        finally:
            # Its traceback holds this frame, which would hold it.
            del error
