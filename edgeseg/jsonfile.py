"""JSON: texts of others read strictly, files of figures written whole or not at all."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from edgeseg.errors import SinkError

__all__ = ["json_text", "parse_json", "write_json"]

# What EdgeSeg writes has ten levels at most.
_DEEPEST = 64
_64_BITS = range(-(1 << 63), 1 << 64)
_MOST_DIGITS = 20  # of 64 bits


def parse_json(text: str | bytes) -> Any:
    """The value that ``text`` says in one way only; ValueError otherwise.

    JSON leaves open what a reader makes of a name that comes twice, of numbers beyond what fits,
    and of halves of surrogate pairs; Python takes NaN as well, and as many levels as its stack has.
    All of these are refused, so that what one program checked is what the next one reads.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_doubles,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError:
        raise ValueError(f"it has more than {_DEEPEST} levels") from None
    _check(value)
    return value


def _check(value: Any) -> None:
    """ValueError for too many levels, and for texts that are no Unicode."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                each.encode()
            elif isinstance(each, dict):
                below += each
                below += each.values()
            elif isinstance(each, list):
                below += each
        if not below:
            return
        level = below
    raise ValueError(f"it has more than {_DEEPEST} levels")


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]!r} comes twice")
        found[name] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _whole(text: str) -> int:
    # Python takes its time over long ones.
    if len(text) <= _MOST_DIGITS:
        value = int(text)
        if value in _64_BITS:
            return value
    raise ValueError(f"{text[:40]} is too large a number")


def json_text(content: Mapping[str, object]) -> str:
    """``content`` as people read it, with a line end."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes ``content`` to ``path``; SinkError, and nothing left behind, when that fails."""
    text = json_text(content)
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise SinkError(f"{path} cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            beside.unlink()
