"""What TensorRT logs, and the one logger through which it does so.

TensorRT holds on to the logger of its first builder or runtime for as long as the process lives,
and some releases leave out every other one. So there is one logger for all, that is never let go,
and whoever works with TensorRT listens to it meanwhile.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Listener", "Log", "listening", "tidy"]

_NO_MEMORY = re.compile(
    r"out of memory|outofmemory|memoryallocation|bad_alloc|insufficient memory|"
    r"memory is insufficient|failed to allocate|could not allocate|could not be allocated|"
    r"failed_allocation|cannot allocate",
    re.IGNORECASE,
)
# What makes messages differ that say the same: addresses, sizes, numbers of tactics.
_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d+")
# "[graph.cpp::run::12] " and "IBuilder::buildSerializedNetwork: ", where they come first.
_SOURCE = re.compile(r"^(\[[\w.]+\.(cpp|h|cu)::[^\]]*\] |I\w+::\w+: )+")


class Listener(Protocol):
    """Who hears what TensorRT logs; called from any thread."""

    def error(self, message: str) -> None:
        """Takes an error."""

    def warn(self, message: str) -> None:
        """Takes a warning."""


@dataclass
class Log:
    """Errors in order, warnings once each. Safe to write to from any thread."""

    errors: list[str] = field(default_factory=list)
    _warnings: dict[str, str] = field(default_factory=dict)

    def error(self, message: str) -> None:
        """Takes an error."""
        self.errors.append(tidy(message))

    def warn(self, message: str) -> None:
        """Takes a warning; those that differ only in numbers count as one."""
        text = tidy(message)
        self._warnings.setdefault(_NUMBERS.sub("#", text), text)

    def warnings(self) -> list[str]:
        """The first of each kind, in order."""
        return list(self._warnings.values())

    def forget_errors(self) -> None:
        """Drops the errors of something that was tried and may fail."""
        self.errors.clear()

    def out_of_memory(self) -> bool:
        """Whether what went wrong is that memory ran out."""
        said = " ".join(self.errors)
        if _NO_MEMORY.search(said):
            return True
        # Without the memory to try any of a layer's tactics there is no implementation left.
        return "any implementation" in said and any(
            _NO_MEMORY.search(warning) for warning in self._warnings.values()
        )

    def cause(self) -> str:
        """The first error, which the later ones follow from; "" when there was none."""
        more = len(self.errors) - 1
        tail = f" (and {more} more)" if more > 0 else ""
        return self.errors[0] + tail if self.errors else ""


def tidy(message: str) -> str:
    """A message of TensorRT on one line, without the place in its source, or a full stop."""
    return _SOURCE.sub("", " ".join(message.split())).rstrip(". ")


_listeners: list[Listener] = []
_lock = threading.Lock()


@contextmanager
def listening(listener: Listener) -> Iterator[trt.ILogger]:
    """TensorRT's logger; while this lasts, what comes through it goes to ``listener``.

    All who listen hear everything, since TensorRT does not say for whom a message is.
    """
    import tensorrt as trt

    with _lock:
        _listeners.append(listener)
    try:
        yield _logger(trt)
    finally:
        with _lock:
            # By identity: logs that say the same are equal.
            del _listeners[next(at for at, one in enumerate(_listeners) if one is listener)]


@functools.cache
def _logger(module: Any) -> trt.ILogger:
    """The logger of ``module``, which is ``tensorrt``."""
    import tensorrt as trt

    severity_of = trt.ILogger.Severity

    class Logger(trt.ILogger):
        """Passes warnings and errors on; TensorRT calls it from several threads."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            with _lock:
                listeners = list(_listeners)
            for one in listeners:
                if severity in (severity_of.INTERNAL_ERROR, severity_of.ERROR):
                    one.error(msg)
                elif severity == severity_of.WARNING:
                    one.warn(msg)

    return Logger()
