"""The wire format of Protocol Buffers, as far as reading and rewriting an ONNX file needs it.

Every length is checked against the bytes that are there before anything is taken, and what is taken
is a view of them: a message that lies about its size costs an exception and no memory.

Source: the Protocol Buffers encoding guide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import TypeAlias

__all__ = [
    "BYTES",
    "FIXED32",
    "FIXED64",
    "VARINT",
    "Buffer",
    "Field",
    "WireError",
    "fields",
    "floats_of",
    "integers_of",
    "joined",
    "text_of",
    "texts_of",
]

#: wire types
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Buffer: TypeAlias = "bytes | memoryview"
#: one field: its number, its wire type, and its value: an integer, or the bytes
Field: TypeAlias = "tuple[int, int, int, Buffer]"

_HIGHEST_NUMBER = (1 << 29) - 1
_64_BITS = (1 << 64) - 1


class WireError(ValueError):
    """Bytes that are no message."""


def fields(message: Buffer) -> Iterator[Field]:
    """The fields of ``message``, in order; WireError at the first that is none.

    Bytes are views of ``message``. Groups (wire types 3 and 4) are refused: ONNX has none.
    """
    view = memoryview(message)
    position, end = 0, len(view)
    while position < end:
        key, position = _varint(view, position)
        number, wire = key >> 3, key & 7
        if not 1 <= number <= _HIGHEST_NUMBER:
            raise WireError(f"field number {number}")
        if wire == VARINT:
            integer, position = _varint(view, position)
            yield number, wire, integer, b""
            continue
        if wire == BYTES:
            size, position = _varint(view, position)
        elif wire == FIXED64:
            size = 8
        elif wire == FIXED32:
            size = 4
        else:
            raise WireError(f"wire type {wire}")
        if size > end - position:
            raise WireError(f"a field of {size} bytes where {end - position} are left")
        yield number, wire, 0, view[position : position + size]
        position += size


def joined(message: Iterable[Field]) -> bytes:
    """The message that `fields` reads as ``message``."""
    pieces: list[Buffer] = []
    for number, wire, integer, value in message:
        pieces.append(_encoded(number << 3 | wire))
        if wire == VARINT:
            pieces.append(_encoded(integer))
        else:
            if wire == BYTES:
                pieces.append(_encoded(len(value)))
            pieces.append(value)
    return b"".join(pieces)


def texts_of(message: Buffer, number: int) -> list[str]:
    """The texts of the fields ``number``; what is no UTF-8 in them is replaced."""
    return [
        str(value, "utf-8", "replace")
        for found, wire, _, value in fields(message)
        if (found, wire) == (number, BYTES)
    ]


def text_of(message: Buffer, number: int) -> str:
    """The first text of the fields ``number``, empty where there is none."""
    for found, wire, _, value in fields(message):
        if (found, wire) == (number, BYTES):
            return str(value, "utf-8", "replace")
    return ""


def integers_of(message: Buffer, *numbers: int) -> tuple[int, ...]:
    """All integers of the fields ``numbers``, packed or not, as int64."""
    found: list[int] = []
    for number, wire, integer, value in fields(message):
        if number not in numbers:
            continue
        if wire == VARINT:
            found.append(integer)
        elif wire == BYTES:
            view, position = memoryview(value), 0
            while position < len(view):
                integer, position = _varint(view, position)
                found.append(integer)
    return tuple(value - (1 << 64) if value >> 63 else value for value in found)


def floats_of(message: Buffer, *numbers: int) -> tuple[float, ...]:
    """All float32 of the fields ``numbers``, packed or not."""
    found: list[float] = []
    for number, wire, _, value in fields(message):
        if number in numbers and wire in (BYTES, FIXED32):
            if len(value) % 4:
                raise WireError(f"floats in {len(value)} bytes")
            found.extend(struct.unpack(f"<{len(value) // 4}f", value))
    return tuple(found)


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The integer at ``position``, unsigned, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise WireError("an integer that is cut short")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            # The tenth byte has bits beyond the 64th, which readers drop.
            return value & _64_BITS, position
    raise WireError("an integer of more than ten bytes")


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
