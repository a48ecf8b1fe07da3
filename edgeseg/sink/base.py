"""A sink: where results go, whatever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, TypeVar

from edgeseg.errors import RequestError, SinkError, SourceError
from edgeseg.result import Result

__all__ = ["MultiSink", "NullSink", "Policy", "Sink", "check_opacity"]

#: what a sink that is too slow does: wait: whoever writes waits, and nothing is lost; drop: the
#: newest result wins, and the one it replaces is counted
Policy = Literal["wait", "drop"]

_Sink = TypeVar("_Sink", bound="Sink")


class Sink(ABC):
    """Takes results, one after the other, in one thread.

    ``with`` closes it at the end. An error inside the block aborts it instead, so that nothing
    half-written stays. Ctrl-C, or a source that breaks off, closes it: what was written by then
    is whole, and may not come again.
    """

    @abstractmethod
    def write(self, result: Result) -> None:
        """Takes one result; raises SinkError when it cannot be written."""

    @property
    def policy(self) -> Policy:
        """What it is made for: ``"wait"``, a file that holds everything, or ``"drop"``, a viewer.

        It is what an `edgeseg.sink.Outlet` around it should be told.
        """
        return "wait"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it, one sentence each; empty as a rule."""
        return ()

    @property
    def stopped(self) -> bool:
        """Whether the user asked to end here (in a window); the loop that writes should end."""
        return False

    def close(self) -> None:  # noqa: B027 - some sinks have nothing to finish
        """Finishes what was written; raises SinkError if that fails. A second call does nothing."""

    def abort(self) -> None:
        """Takes back what is not finished; never raises SinkError. Does nothing when closed."""
        self.close()

    def __enter__(self: _Sink) -> _Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, (KeyboardInterrupt, GeneratorExit, SourceError)):
            self.close()
        else:
            self.abort()


class NullSink(Sink):
    """Takes results and does nothing with them."""

    def write(self, result: Result) -> None:
        """Does nothing."""


class MultiSink(Sink):
    """Several sinks as one: each gets every result, in their order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of each."""
        return tuple(note for sink in self._sinks for note in sink.notes)

    @property
    def stopped(self) -> bool:
        """Whether any of them was stopped."""
        return any(sink.stopped for sink in self._sinks)

    def write(self, result: Result) -> None:
        """Writes to each."""
        for sink in self._sinks:
            sink.write(result)

    def close(self) -> None:
        """Closes each, also when one fails; the first failure is raised then."""
        failure: SinkError | None = None
        for sink in self._sinks:
            try:
                sink.close()
            except SinkError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def abort(self) -> None:
        """Aborts each."""
        for sink in self._sinks:
            sink.abort()


def check_opacity(opacity: float) -> None:
    """Raises RequestError for an opacity that is none."""
    if not 0.0 <= opacity <= 1.0:
        raise RequestError(f"an opacity is between 0 and 1, and {opacity} came")
