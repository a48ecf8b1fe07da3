"""Inputs that are nearly right: bytes, JSON trees, Protocol Buffers and texts, changed a little.

Every function takes a `random.Random` and gives the same for the same state of it. Nothing of
EdgeSeg is used, so that a mistake in its readers is not made twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

__all__ = ["mutated_bytes", "mutated_json", "mutated_protobuf", "mutated_text"]

_EDGES = (
    0, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 63, 64, 65, 99, 100, 127, 128, 255, 256, 257, 1000, 1023,
    4096, 16383, 16384, 16385, 65535, 65536, (1 << 24) - 1, 1 << 26, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_TEXTS = (
    "", " ", "\0", "\n", "\r\n", "\t", "\x1b]0;title\x07", "\x7f", "\x85", "\u00e9", "e\u0301",
    "\u202e\u202dabc", "\u2028", "\u200b", "\ufeff", "\uff0e\uff0e", "\u2044", "\uff10\uff11",
    "\u0660\u0661", "\U0001f697", "\ud800", "\udfff\ud800", "..", ".", "/", "//", "\\", "../x",
    "/etc/passwd", "C:\\x", "~root/x", "con", "AUX.txt", "model.onnx", "MODEL.ONNX", "model.onnx.",
    "bundle.json", "report.html", "engines", "model.sig", "pipe", "link", "out", "folder", "nan",
    "inf", "-1", "1e999", "0x10", "1_000", "9" * 25, "9" * 5000, "true", "null", "%00", "%2e%2e%2f",
    "a" * 300, "\u00e9" * 300, "{}{}{}", "%s%n", "${HOME}", "$(id)", "instance", "semantic", "rgb",
    "letterbox", "box", "image",
)  # fmt: skip
_NUMBERS = (
    "-0", "-0.0", "0.1", "1e-400", "1e308", "1e309", "-1e999", "NaN", "Infinity", "-Infinity",
    "01", "+1", "1.", ".5", "1e", "0x1", "9" * 20, "9" * 5000,
    "1" + "0" * 400 + ".0", "1e" + "9" * 400,
)  # fmt: skip


# --- bytes


def mutated_bytes(rng: Random, corpus: Sequence[bytes], *, times: int = 0) -> bytes:
    """One of ``corpus`` with a few changes that know nothing of its format."""
    data = bytearray(rng.choice(corpus))
    for _ in range(times or _few(rng)):
        rng.choice(_BYTE_CHANGES)(rng, data, corpus)
    return bytes(data)


def _few(rng: Random) -> int:
    return rng.choice((1, 1, 1, 2, 2, 3, 5, 8))


def _span(rng: Random, data: bytearray) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 1, 2, 4, 8, 30, 200)))


def _flip(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    size = rng.choice((1, 2, 4, 8))
    start = rng.randrange(len(data) + 1)
    value = rng.choice(_EDGES) & ((1 << 8 * size) - 1)
    data[start : start + size] = value.to_bytes(size, rng.choice(("big", "little")))


def _truncate(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _delete(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    start, end = _span(rng, data)
    del data[start:end]


def _repeat(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    start, end = _span(rng, data)
    data[end:end] = data[start:end] * rng.choice((1, 2, 10, 100))


def _insert(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 8, 64)))


def _splice(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    other = bytearray(rng.choice(corpus))
    start, end = _span(rng, data)
    begin, stop = sorted((rng.randrange(len(other) + 1), rng.randrange(len(other) + 1)))
    data[start:end] = other[begin:stop]


def _word(rng: Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    start, end = _span(rng, data)
    word = rng.choice((*_TEXTS, *_NUMBERS)).encode("utf-8", "surrogatepass")
    data[start : rng.choice((start, end))] = word


_BYTE_CHANGES: tuple[Callable[[Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip, _flip, _set, _set, _number, _truncate, _delete, _repeat, _insert, _splice, _word,
)  # fmt: skip


# --- JSON


def mutated_json(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """One of ``corpus``, JSON texts, with changed values, names and structure."""
    if rng.random() < 0.15:
        return mutated_bytes(rng, corpus)
    tree: Any = json.loads(rng.choice(corpus))
    for _ in range(_few(rng)):
        holders = list(_holders(tree))
        holder, key = rng.choice(holders)
        _change_entry(rng, holder, key, holders)
    text = json.dumps(tree[0] if rng.random() < 0.01 and isinstance(tree, list) else tree)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        text = rng.choice(_TEXT_CHANGES)(rng, text)
    return text.encode("utf-8", "surrogatepass")


def _holders(tree: Any) -> list[tuple[Any, Any]]:
    """(list or dict, index or name) of every value below ``tree``."""
    found: list[tuple[Any, Any]] = []
    level = [tree]
    while level:
        below: list[Any] = []
        for each in level:
            keys: Any = each if isinstance(each, dict) else range(len(each))
            for key in keys:
                found.append((each, key))
                if isinstance(each[key], (dict, list)):
                    below.append(each[key])
        level = below
    return found or [([tree], 0)]


def _json_value(rng: Random) -> Any:
    nested: Any = rng.choice((1, "x", None))
    for _ in range(rng.choice((1, 3, 30, 62, 63, 64, 65, 200))):
        nested = rng.choice(([nested], {"a": nested}))
    return rng.choice(
        (
            None, True, False, -1, rng.choice(_EDGES), -rng.choice(_EDGES), 1 << 70, 0.5, -0.5,
            1e308, float("nan"), float("inf"), rng.choice(_TEXTS), rng.choice(_TEXTS), [], {}, [[]],
            [1] * rng.choice((3, 300)), ["x"] * rng.choice((3, 300)), {"a": 1}, nested,
            "a" * rng.choice((200, 201, 70_000)), "0" * 64,
        )
    )  # fmt: skip


def _change_entry(rng: Random, holder: Any, key: Any, holders: list[tuple[Any, Any]]) -> None:
    if isinstance(holder, dict) and key not in holder:
        return
    if isinstance(holder, list) and key >= len(holder):
        return
    what = rng.randrange(10)
    if what == 0:
        del holder[key]
    elif what == 1:
        other, name = rng.choice(holders)
        if name in other if isinstance(other, dict) else name < len(other):
            # A copy: what holds itself is no JSON.
            holder[key] = json.loads(json.dumps(other[name]))
    elif what == 2:
        holder[key] = [holder[key]]
    elif what == 3 and isinstance(holder, dict):
        holder[rng.choice((*_TEXTS, key.upper(), key + " ", key + "\u0301"))] = holder.pop(key)
    elif what == 4 and isinstance(holder, dict):
        holder[rng.choice(_TEXTS)] = _json_value(rng)
    elif what == 5 and isinstance(holder, list):
        holder.insert(key, _json_value(rng))
    elif what == 6 and isinstance(holder[key], str):
        at = rng.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:at] + rng.choice(_TEXTS) + holder[key][at:]
    elif what == 7 and isinstance(holder[key], (int, float)):
        holder[key] = rng.choice((-1, 0, 1)) * rng.choice(_EDGES)
    else:
        holder[key] = _json_value(rng)


# --- texts, JSON as it is written among them


def mutated_text(rng: Random, corpus: Sequence[str], words: Sequence[str] = ()) -> str:
    """One of ``corpus`` with changes of letters, numbers and words, some out of ``words``."""
    text = rng.choice(corpus)
    for _ in range(_few(rng)):
        if words and rng.random() < 0.3:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(words) + text[at + rng.choice((0, 0, 1, 3)) :]
        else:
            text = rng.choice(_TEXT_CHANGES)(rng, text)
    return text[:200_000]


def _other_number(rng: Random, text: str) -> str:
    places = list(re.finditer(r"-?[0-9][0-9.eE+-]*", text))
    if not places:
        return text
    place = rng.choice(places)
    return (
        text[: place.start()]
        + rng.choice((*_NUMBERS, str(rng.choice(_EDGES))))
        + text[place.end() :]
    )


def _other_letters(rng: Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(_TEXTS) + text[at + rng.choice((0, 1, 4)) :]


def _doubled(rng: Random, text: str) -> str:
    begin, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
    return text[:end] + text[begin:end] + text[end:]


def _cut(rng: Random, text: str) -> str:
    begin, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
    return text[:begin] + text[end:] if rng.random() < 0.5 else text[:end]


def _repeated_sign(rng: Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    sign = rng.choice(
        ("[", "{", "(", '{"a":', "[[", "?", "&", "=", "/", "~", "#", "\\", '"', "'", " ", "@", ":")
    )
    return text[:at] + sign * rng.choice((1, 2, 50, 3000)) + text[at:]


_TEXT_CHANGES: tuple[Callable[[Random, str], str], ...] = (
    _other_number, _other_number, _other_letters, _other_letters, _doubled, _cut, _repeated_sign,
)  # fmt: skip


# --- Protocol Buffers

_LARGEST = 1 << 22

#: number, wire type, value
_Part = tuple[int, int, "int | bytes"]


def mutated_protobuf(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """One of ``corpus``, messages, with changed fields somewhere inside, lengths made to fit."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, corpus)
    data = rng.choice(corpus)
    for _ in range(_few(rng)):
        changed = _with_changed_field(rng, data, rng.choice((0, 1, 2, 2, 3, 3, 4, 5)), corpus)
        # A thousand times a thousand times the same is as much for the fuzzer as for the fuzzed.
        data = changed if len(changed) <= _LARGEST else data
    if rng.random() < 0.2:
        # Lengths that no longer fit.
        data = mutated_bytes(rng, [data], times=1)
    return data


def _with_changed_field(rng: Random, data: bytes, depth: int, corpus: Sequence[bytes]) -> bytes:
    parts = _parts(data)
    if not parts:
        return mutated_bytes(rng, [data], times=1)
    index = rng.randrange(len(parts))
    number, wire, value = parts[index]
    sizes = {
        at: len(part[2])
        for at, part in enumerate(parts)
        if isinstance(part[2], bytes) and part[1] == 2 and _parts(part[2])
    }
    if depth and sizes:
        # Names and nodes outnumber the messages with others inside: the largest are chosen as well.
        largest = max(sizes, key=lambda at: sizes[at])
        index = largest if rng.random() < 0.5 else rng.choice(list(sizes))
        number, wire, value = parts[index]
        assert isinstance(value, bytes)
        parts[index] = (number, wire, _with_changed_field(rng, value, depth - 1, corpus))
        return _written(parts)
    what = rng.randrange(12)
    if what == 0:
        del parts[index]
    elif what == 1:
        size = 1 if isinstance(value, int) else len(value) + 1
        parts[index:index] = [parts[index]] * min(rng.choice((1, 1, 2, 70, 1000)), _LARGEST // size)
    elif what == 2:
        other = rng.randrange(len(parts))
        parts[index], parts[other] = parts[other], parts[index]
    elif what == 3:
        parts[index] = (
            rng.choice((0, 1, 2, 5, 6, 7, 13, 14, 20, 25, 1 << 28, 1 << 29)),
            wire,
            value,
        )
    elif what == 4:
        parts[index] = (number, rng.randrange(8), value)
    elif what == 5:
        nested = b""
        for _ in range(rng.choice((1, 10, 99, 101, 3000))):
            nested = _written([(rng.choice((1, 5, 6, 7)), 2, nested)])
        parts[index] = (number, 2, nested)
    elif what == 6:
        parts.append((number, 2, rng.choice(corpus)))
    elif isinstance(value, int):
        parts[index] = (number, wire, rng.choice(_EDGES))
    elif what == 7:
        parts[index] = (number, wire, rng.choice(_TEXTS).encode("utf-8", "surrogatepass"))
    elif what == 8:
        parts[index] = (
            number,
            wire,
            b"".join(_varint(rng.choice(_EDGES)) for _ in range(rng.choice((1, 4, 100)))),
        )
    elif what == 9:
        same = [part for part in parts if part[:2] == (number, wire)]
        parts[index] = (number, wire, rng.choice(same)[2])
    elif what == 10:
        # An attribute, or an entry of metadata, in the place of whatever it is.
        entry = [(1, 2, rng.choice(("to", "axis", "axes", "value", "height", "location")).encode())]
        parts[index] = (
            number,
            wire,
            _written([*entry, (rng.choice((2, 3, 8)), 0, rng.choice(_EDGES))]),
        )
    else:
        parts[index] = (number, wire, mutated_bytes(rng, [value], times=1))
    return _written(parts)


def _parts(data: bytes) -> list[_Part]:
    """The fields of a message, empty where it is none."""
    parts: list[_Part] = []
    position = 0
    try:
        while position < len(data):
            key, position = _read_varint(data, position)
            value: int | bytes
            if key & 7 == 0:
                value, position = _read_varint(data, position)
            else:
                size = {1: 8, 5: 4}.get(key & 7, -1)
                if key & 7 == 2:
                    size, position = _read_varint(data, position)
                if size < 0 or position + size > len(data) or not 0 < key >> 3 < 100:
                    return []
                value = data[position : position + size]
                position += size
            parts.append((key >> 3, key & 7, value))
    except IndexError:
        return []
    return parts


def _written(parts: Sequence[_Part]) -> bytes:
    out = bytearray()
    for number, wire, value in parts:
        out += _varint(number << 3 | wire)
        if isinstance(value, int):
            out += _varint(value)
        else:
            if wire == 2:
                out += _varint(len(value))
            out += value
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            return value, position
