"""One run of `edgeseg run`: sources through a model, and the results to files, streams, a page."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from edgeseg.errors import SinkError
from edgeseg.ledger import Ledger, Summary
from edgeseg.model import Model
from edgeseg.result import AnyResult, Result
from edgeseg.sensors import Reading, Sensors
from edgeseg.serve import WebPage
from edgeseg.sink import (
    Outlet,
    OutletStats,
    Policy,
    Sink,
    Target,
    WindowSink,
    open_sink,
    target_of_source,
)
from edgeseg.source import Source
from edgeseg.stats import Stats
from edgeseg.streams import Streams

__all__ = ["Look", "Outcome", "Page", "Session", "SourceOutcome"]

# How many results wait for an output: of a file, which loses nothing, and of a camera, where a few
# ride out a disk that thinks.
_WAITING, _RECENT = 2, 8
_READ_EVERY_S = 1.0
# What is there after the run.
_KEPT = ("video", "images", "jsonlines")


@dataclass(frozen=True)
class Look:
    """How results are drawn and written: see `open_sink`."""

    opacity: float = 0.5
    legend: bool = True
    masks: bool = False


@dataclass(frozen=True)
class Page:
    """The web page of a run: see `WebPage`."""

    address: str
    token: str | None = None
    recordings: Path | None = None


@dataclass(frozen=True)
class SourceOutcome:
    """What became of one source, and where its results are; ``error`` says how it broke."""

    name: str
    summary: Summary
    notes: tuple[str, ...]
    saved: tuple[str, ...]
    error: str | None


@dataclass(frozen=True)
class Outcome:
    """What a run amounted to. ``stopped``: the user ended it."""

    sources: tuple[SourceOutcome, ...]
    outlets: tuple[OutletStats, ...]
    stopped: bool


@dataclass(eq=False)
class _Outputs:
    """Where the results of one source go."""

    direct: list[Sink] = field(default_factory=list)
    saved: list[tuple[Target, Outlet]] = field(default_factory=list)


class Session:
    """Sources through ``model`` into outputs of their own, until they end or somebody stops it.

    Each of the targets ``save`` (see `open_sink`) is opened for each source, under a name of its
    own where there are several, and written to in a thread of its own: results of a file wait
    until it has room, those of a camera give way to newer ones, and both are counted. An output
    that fails is given up and the others go on; the run ends when the last one of them has failed.
    ``named``: whether outputs are named after their source; if there are several, when None.
    ``show`` opens windows, ``page`` a web page; ``frames`` is for each source. ``tell`` gets what
    the user should know meanwhile, a line at a time.

    SIGINT and SIGTERM end it in peace, if it runs in the main thread: every output is finished. An
    error of the engine takes back what is not. The sources are closed at the end, the model is not.
    """

    def __init__(
        self,
        model: Model,
        sources: Mapping[str, Source],
        *,
        save: Sequence[str] = (),
        show: bool = False,
        page: Page | None = None,
        frames: int | None = None,
        named: bool | None = None,
        look: Look | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self._model = model
        self._sources = dict(sources)
        self._save = tuple(save)
        self._show = show
        self._page = page
        self._named = len(self._sources) > 1 if named is None else named
        self._look = look or Look()
        self._tell = tell
        self._streams = Streams(
            model.engine, sources, max_frames=frames, postprocessing=model.postprocessing
        )
        self._outlets: list[Outlet] = []
        self._reading: Reading | None = None
        self._told: set[str] = set()
        self._stopped = False

    def stats(self) -> Stats:
        """How everything is doing; any thread."""
        return self._streams.stats(tuple(self._outlets), self._reading)

    def stop(self) -> None:
        """Ends the run in peace; any thread, or a signal's handler."""
        self._stopped = True
        self._streams.stop()

    def run(self, progress: Callable[[int, int], None] | None = None) -> Outcome:
        """Runs to the end; ``progress(results, in all or 0)`` is called after each result.

        Raises what the engine raises, SinkError when an output cannot be opened or the last one
        has failed.
        """
        outputs = {name: _Outputs() for name in self._sources}
        with self._streams as streams:
            with ExitStack() as stack:
                for name, source in self._sources.items():
                    self._open(stack, name, source, outputs[name])
                if self._page is not None:
                    self._serve(stack, self._page, outputs)
                stack.enter_context(self._stoppable())
                try:
                    self._loop(streams, outputs, progress)
                except KeyboardInterrupt:
                    # What is finished is kept: leaving the block in peace closes the outputs.
                    self._stopped = True
            streams.close()
            errors = [outlet.error for outlet in self._outlets if outlet.error is not None]
            if errors and not self._has_output(outputs):
                raise errors[0]
            self._tell_failures()
            return Outcome(
                tuple(self._outcome(name, outputs[name]) for name in self._sources),
                tuple(outlet.stats for outlet in self._outlets),
                self._stopped,
            )

    def _loop(
        self,
        streams: Streams,
        outputs: Mapping[str, _Outputs],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        lengths = [source.length for source in self._sources.values()]
        total = lengths[0] or 0 if len(lengths) == 1 else 0
        for done, stream in enumerate(streams, 1):
            self._write(outputs[stream.name], stream.result, streams.ledgers[stream.name])
            if progress is not None:
                progress(done, total)
            if any(sink.stopped for each in outputs.values() for sink in each.direct):
                self._stopped = True
                return
            if not self._has_output(outputs):
                return
            self._tell_failures()
            # Not kept while waiting for the next: a result holds a whole frame.
            del stream

    def _tell_failures(self) -> None:
        """Says of each output once that it failed, when it does: a run may last for months."""
        for outlet in self._outlets:
            if outlet.error is not None and outlet.name not in self._told:
                self._told.add(outlet.name)
                self._tell(f"{outlet.error}; the other outputs go on")

    @staticmethod
    def _write(outputs: _Outputs, result: AnyResult, ledger: Ledger) -> None:
        for _, outlet in outputs.saved:
            outlet.write(result)
        for sink in outputs.direct:
            started_ns = time.perf_counter_ns()
            sink.write(result)
            ledger.record("output", time.perf_counter_ns() - started_ns)

    def _has_output(self, outputs: Mapping[str, _Outputs]) -> bool:
        """Whether results are still of use: an output takes them, or none was asked for."""
        every = outputs.values()
        asked = any(each.direct or each.saved for each in every)
        alive = any(
            each.direct or any(not outlet.error for _, outlet in each.saved) for each in every
        )
        return alive or not asked

    def _open(self, stack: ExitStack, name: str, source: Source, outputs: _Outputs) -> None:
        """Opens the window and the targets of one source."""
        named, look = self._named, self._look
        # The window first: that it cannot be shown should not leave a file behind.
        if self._show:
            window = WindowSink(
                f"EdgeSeg: {name}" if named else "EdgeSeg",
                opacity=look.opacity,
                legend=look.legend,
            )
            outputs.direct.append(stack.enter_context(window))
        ledger = self._streams.ledgers[name]
        for asked in self._save:
            target = Target.of(target_of_source(asked, name) if named else asked)
            sink = open_sink(
                target.text,
                source=name,
                fps=source.fps,
                opacity=look.opacity,
                legend=look.legend,
                masks=look.masks,
            )
            policy: Policy = "drop" if source.live else sink.policy
            outlet = Outlet(
                _Timed(sink, ledger),
                name=target.shown,
                policy=policy,
                depth=_RECENT if source.live else _WAITING,
            )
            stack.enter_context(_on_its_own(outlet))
            self._outlets.append(outlet)
            outputs.saved.append((target, outlet))

    def _serve(self, stack: ExitStack, page: Page, outputs: Mapping[str, _Outputs]) -> None:
        """Opens the web page and lets the machine be watched for it."""
        sensors = Sensors()
        stack.callback(sensors.close)
        self._reading = sensors.read()
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_READ_EVERY_S):
                self._reading = sensors.read()

        watcher = threading.Thread(target=watch, name="edgeseg-sensors", daemon=True)
        watcher.start()
        stack.callback(watcher.join)
        stack.callback(ended.set)
        spec, look = self._model.spec, self._look
        opened = stack.enter_context(
            WebPage(
                page.address,
                stats=self.stats,
                names=list(self._sources),
                legend=dict(zip(spec.classes, spec.colours, strict=True)),
                token=page.token,
                recordings=page.recordings,
                opacity=look.opacity,
            )
        )
        for name, source in self._sources.items():
            outputs[name].direct.append(opened.sink(name, fps=source.fps))
        if opened.warning is not None:
            self._tell(opened.warning)
        self._tell(f"open {opened.url} in a browser")

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Has the first SIGINT or SIGTERM end the run in peace; the next one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

        def stop(number: int, frame: FrameType | None) -> None:
            self.stop()
            restore()

        for number, handler in before.items():
            # A program that is to ignore Ctrl-C goes on doing so.
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        try:
            yield
        finally:
            restore()

    def _outcome(self, name: str, outputs: _Outputs) -> SourceOutcome:
        source, error = self._sources[name], self._streams.errors.get(name)
        return SourceOutcome(
            name=name,
            summary=self._streams.ledgers[name].summary(),
            notes=(*source.notes, *(note for _, outlet in outputs.saved for note in outlet.notes)),
            # A live stream is nothing that stays.
            saved=tuple(
                target.shown
                for target, outlet in outputs.saved
                if outlet.stats.written and not outlet.error and target.kind in _KEPT
            ),
            error=None if error is None else str(error),
        )


@contextmanager
def _on_its_own(outlet: Outlet) -> Iterator[None]:
    """Closes, or aborts, an outlet at the end; what it failed of is left in its `error`."""
    try:
        with outlet:
            yield
    except SinkError as error:
        if error is not outlet.error:
            raise


class _Timed(Sink):
    """A sink whose writing is the last stage of its source's ledger."""

    def __init__(self, sink: Sink, ledger: Ledger) -> None:
        self._sink = sink
        self._ledger = ledger

    @property
    def notes(self) -> tuple[str, ...]:
        return self._sink.notes

    @property
    def stopped(self) -> bool:
        return self._sink.stopped

    def write(self, result: Result) -> None:
        started_ns = time.perf_counter_ns()
        self._sink.write(result)
        self._ledger.record("output", time.perf_counter_ns() - started_ns)

    def close(self) -> None:
        self._sink.close()

    def abort(self) -> None:
        self._sink.abort()
