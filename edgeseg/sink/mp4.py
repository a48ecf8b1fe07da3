"""A finished Matroska file made into an MP4, in place: the pictures stay where they are.

An MP4 is unreadable until its last bytes are written, Matroska is readable at any time. So a
recording is written as Matroska, of which a killed run leaves all but the last moment, and becomes
an MP4 when it is closed: what an MP4 needs to know of each picture (ISO/IEC 14496-12) is appended,
and the file's first bytes say that everything before that is the pictures' data. Both kinds hold
H.264 and MPEG-4 in the same form, so that no picture is copied or encoded again, and the time does
not depend on the size of the file. (OpenCV offers no way to FFmpeg's fragmented MP4.)
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgeseg.errors import SinkError

__all__ = ["matroska_to_mp4"]

# Elements of Matroska (RFC 9559) that matter here, by their numbers.
_EBML = 0x1A45DFA3
_SEGMENT = 0x18538067
_TRACKS = 0x1654AE6B
_TRACK = 0xAE
_CODEC_ID = 0x86
_CODEC_PRIVATE = 0x63A2
_VIDEO = 0xE0
_WIDTH = 0xB0
_HEIGHT = 0xBA
_ENCODINGS = 0x6D80
_CLUSTER = 0x1F43B675
_CLUSTER_TIME = 0xE7
_SIMPLE_BLOCK = 0xA3
_BLOCK_GROUP = 0xA0
_BLOCK = 0xA1
_REFERENCE = 0xFB

_H264 = b"V_MPEG4/ISO/AVC"
_MPEG4 = b"V_MPEG4/ISO/ASP"

# Ticks per picture. The rate is then exact to a thousandth of a picture per second.
_TICKS = 1000
# 1, 0, 0; 0, 1, 0; 0, 0, 1: shown as it is.
_UNITY = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


@dataclass
class _Recording:
    """What a Matroska file with one video track says of it."""

    codec: bytes = b""
    private: bytes = b""
    width: int = 0
    height: int = 0
    begins: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)


def matroska_to_mp4(path: Path, fps: float) -> None:
    """Makes the Matroska file at ``path`` an MP4 of ``fps`` pictures per second, each as long.

    It is a whole Matroska file until the last write, of 48 bytes. Raises SinkError, with the file
    as it was, when it is none that FFmpeg writes through OpenCV: one track of H.264 or MPEG-4.
    OSError when it cannot be read or written.
    """
    with path.open("r+b") as file:
        recording = _read(path, file)
        end = file.seek(0, os.SEEK_END)
        file.write(_moov(recording, fps))
        file.flush()
        # Should the power fail, the new beginning must not be there without the new end.
        os.fsync(file.fileno())
        kind = _box(b"ftyp", b"isom", _u32(512), b"isomiso2avc1mp41")
        data = struct.pack(">I4sQ", 1, b"mdat", end - len(kind))
        file.seek(0)
        file.write(kind + data)


# --- Matroska


def _read(path: Path, file: BinaryIO) -> _Recording:
    recording = _Recording()
    length = path.stat().st_size
    problem = SinkError(f"{path} is not a Matroska file of one H.264 or MPEG-4 track")
    try:
        number, size = _element(file)
        if number != _EBML:
            raise problem
        file.seek(size, os.SEEK_CUR)
        number, size = _element(file)
        if number != _SEGMENT:
            raise problem
        end = file.tell() + size
        while file.tell() < end:
            number, size = _element(file)
            after = file.tell() + size
            if number == _TRACKS:
                _read_track(recording, file.read(size))
            elif number == _CLUSTER:
                _read_cluster(recording, file, after)
            file.seek(after)
    except (EOFError, IndexError, struct.error):
        raise problem from None
    known = recording.codec in (_H264, _MPEG4) and recording.private and recording.begins
    if not known or not (0 < recording.width < 1 << 16 and 0 < recording.height < 1 << 16):
        raise problem
    # The new beginning must not reach into the pictures, nor they beyond the end.
    ends = (begin + size for begin, size in zip(recording.begins, recording.sizes, strict=True))
    if min(recording.begins) < 64 or max(end, *ends) > length:
        raise problem
    return recording


def _element(file: BinaryIO) -> tuple[int, int]:
    """Number and size of the element that begins here; the file is then at its content."""
    first = file.read(1)
    if not first or not first[0]:
        raise EOFError
    length = 9 - first[0].bit_length()
    number = int.from_bytes(first + file.read(length - 1), "big")
    first = file.read(1)
    if not first or not first[0]:
        raise EOFError
    length = 9 - first[0].bit_length()
    size = int.from_bytes(first + file.read(length - 1), "big") - (1 << 7 * length)
    if size == (1 << 7 * length) - 1:
        # Of unknown size: it was never finished.
        raise EOFError
    return number, size


def _elements(content: bytes) -> list[tuple[int, bytes]]:
    """The elements inside another."""
    found, at = [], 0
    while at < len(content):
        numbers = []
        for keeps_marker in (True, False):
            if not content[at]:
                raise EOFError
            length = 9 - content[at].bit_length()
            value = int.from_bytes(content[at : at + length], "big")
            numbers.append(value if keeps_marker else value - (1 << 7 * length))
            at += length
        found.append((numbers[0], content[at : at + numbers[1]]))
        at += numbers[1]
    return found


def _read_track(recording: _Recording, content: bytes) -> None:
    tracks = [inside for number, inside in _elements(content) if number == _TRACK]
    if len(tracks) != 1:
        raise EOFError
    for number, inside in _elements(tracks[0]):
        if number == _CODEC_ID:
            recording.codec = inside.rstrip(b"\0")
        elif number == _CODEC_PRIVATE:
            recording.private = inside
        elif number == _ENCODINGS:
            # Pictures that are compressed once more are not what an MP4 holds.
            raise EOFError
        elif number == _VIDEO:
            for side, value in _elements(inside):
                if side == _WIDTH:
                    recording.width = int.from_bytes(value, "big")
                elif side == _HEIGHT:
                    recording.height = int.from_bytes(value, "big")


def _read_cluster(recording: _Recording, file: BinaryIO, end: int) -> None:
    time = 0
    while file.tell() < end:
        number, size = _element(file)
        after = file.tell() + size
        if number == _CLUSTER_TIME:
            time = int.from_bytes(file.read(size), "big")
        elif number == _SIMPLE_BLOCK:
            _read_block(recording, file, after, time, key=None)
        elif number == _BLOCK_GROUP:
            begin = file.tell()
            numbers = []
            while file.tell() < after:
                inside, inside_size = _element(file)
                numbers.append((inside, file.tell(), file.tell() + inside_size))
                file.seek(inside_size, os.SEEK_CUR)
            key = all(inside != _REFERENCE for inside, _, _ in numbers)
            for inside, begin, inside_end in numbers:
                if inside == _BLOCK:
                    file.seek(begin)
                    _read_block(recording, file, inside_end, time, key=key)
        file.seek(after)


def _read_block(
    recording: _Recording, file: BinaryIO, end: int, time: int, *, key: bool | None
) -> None:
    track, since, flags = struct.unpack(">BhB", file.read(4))
    # Track 1 in one byte; no lacing, which puts several pictures into one block.
    if track != 0x81 or flags & 0x06:
        raise EOFError
    recording.begins.append(file.tell())
    recording.sizes.append(end - file.tell())
    recording.times.append(time + since)
    recording.keys.append(bool(flags & 0x80) if key is None else key)


# --- MP4


def _moov(recording: _Recording, fps: float) -> bytes:
    """The index: how long each picture is shown, which stand alone, and where they are."""
    count = len(recording.begins)
    scale = max(round(fps * _TICKS), 1)
    ticks = count * _TICKS
    milliseconds = round(ticks * 1000 / scale)
    # Version 1 of the boxes below has 64 bits for times, which is all that it changes.
    movie = _full(
        b"mvhd",
        struct.pack(">QQIQ", 0, 0, 1000, milliseconds),
        struct.pack(">IH10x", 0x10000, 0x100),
        _UNITY,
        bytes(24),
        _u32(2),
        version=1,
    )
    track = _full(
        b"tkhd",
        struct.pack(">QQIIQ", 0, 0, 1, 0, milliseconds),
        struct.pack(">8xHHHH", 0, 0, 0, 0),
        _UNITY,
        struct.pack(">II", recording.width << 16, recording.height << 16),
        version=1,
        flags=3,
    )
    order, delay = _order(recording)
    # Times of showing are delayed so that none is before its time of decoding; this undoes it.
    edits = _full(b"elst", struct.pack(">IQqHH", 1, milliseconds, delay, 1, 0), version=1)
    media = _full(b"mdhd", struct.pack(">QQIQHH", 0, 0, scale, ticks, 0x55C4, 0), version=1)
    handler = _full(b"hdlr", struct.pack(">4x4s12x", b"vide"), b"VideoHandler\0")
    source = _box(b"dinf", _full(b"dref", _u32(1), _full(b"url ", flags=1)))
    table = _box(
        b"stbl",
        _full(b"stsd", _u32(1), _sample_entry(recording)),
        _full(b"stts", struct.pack(">III", 1, count, _TICKS)),
        order,
        _whole_pictures(recording),
        # Every chunk is one picture: their places are all that differs.
        _full(b"stsc", struct.pack(">IIII", 1, 1, 1, 1)),
        _full(b"stsz", struct.pack(">II", 0, count), _numbers(recording.sizes, ">u4")),
        _full(b"co64", _u32(count), _numbers(recording.begins, ">u8")),
    )
    information = _box(b"minf", _full(b"vmhd", bytes(8), flags=1), source, table)
    return _box(
        b"moov",
        movie,
        _box(
            b"trak",
            track,
            _box(b"edts", edits),
            _box(b"mdia", media, handler, information),
        ),
    )


def _order(recording: _Recording) -> tuple[bytes, int]:
    """The box that says when each is shown, empty where that is when it is decoded; the delay.

    Pictures lie in the order of decoding. That of showing differs where some are predicted from
    later ones. It is the order of Matroska's times, which are rounded and not used otherwise.
    """
    decoded = np.arange(len(recording.times))
    shown = np.empty_like(decoded)
    shown[np.argsort(np.array(recording.times), kind="stable")] = decoded
    delay = int((decoded - shown).max())
    if delay == 0:
        return b"", 0
    offsets = (shown - decoded + delay) * _TICKS
    pairs = np.stack([np.ones_like(offsets), offsets], axis=1)
    return (
        _full(b"ctts", _u32(len(pairs)), pairs.astype(">u4").tobytes()),
        delay * _TICKS,
    )


def _whole_pictures(recording: _Recording) -> bytes:
    """The box that says which pictures stand alone; empty where all do."""
    if all(recording.keys):
        return b""
    numbers = (np.flatnonzero(recording.keys) + 1).tolist()
    return _full(b"stss", _u32(len(numbers)), _numbers(numbers, ">u4"))


def _sample_entry(recording: _Recording) -> bytes:
    """What the decoder has to know (ISO/IEC 14496-14 and -15)."""
    name = b"OpenCV"
    picture = struct.pack(
        ">6xH16xHHII4xHB31sHh",
        1,
        recording.width,
        recording.height,
        72 << 16,
        72 << 16,
        1,
        len(name),
        name,
        24,
        -1,
    )
    if recording.codec == _H264:
        return _box(b"avc1", picture, _box(b"avcC", recording.private))
    # Object type 0x20 is MPEG-4 video, stream type 4 is video.
    largest = max(recording.sizes)
    settings = _descriptor(
        4,
        struct.pack(">BB", 0x20, 4 << 2 | 1),
        min(largest, 0xFFFFFF).to_bytes(3, "big"),
        struct.pack(">II", 0, 0),
        _descriptor(5, recording.private),
    )
    stream = _descriptor(3, struct.pack(">HB", 1, 0), settings, _descriptor(6, b"\x02"))
    return _box(b"mp4v", picture, _full(b"esds", stream))


def _descriptor(tag: int, *content: bytes) -> bytes:
    size = sum(len(part) for part in content)
    digits = [size >> shift & 0x7F | 0x80 for shift in (21, 14, 7)]
    return bytes([tag, *digits, size & 0x7F]) + b"".join(content)


def _numbers(values: list[int], element: str) -> bytes:
    return np.array(values, np.uint64).astype(element).tobytes()


def _box(kind: bytes, *content: bytes) -> bytes:
    size = 8 + sum(len(part) for part in content)
    return struct.pack(">I4s", size, kind) + b"".join(content)


def _full(kind: bytes, *content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, _u32(version << 24 | flags), *content)


def _u32(value: int) -> bytes:
    return struct.pack(">I", value)
