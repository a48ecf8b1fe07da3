"""A log of the results: JSON lines, one per frame, that other programs follow.

A line is an object of these keys, in this order; version 1 of the format:

``edgeseg``        1, the version; a key that changes its meaning raises it, a new one does not
``run``            when the run began, such as ``"2025-03-30T10:15:30.123456Z"``: one value per run
``source``         the source's name, where one was given
``model``          the name of the model
``index``          the number of the frame in its source; numbers of dropped frames are missing
``captured``       when the frame was taken, by the wall clock, ISO 8601 in UTC
``captured_ns``    the same by the monotonic clock, which never jumps: for differences in a run
``mask_age_ms``    milliseconds from then to the finished masks
``size``           [height, width] of the frame; all that follows is in its pixels

and one of

``classes``        of a semantic model: for every class in the frame ``class`` (its name),
                   ``label`` (its number), ``pixels``, ``share`` (of the frame, 0 to 1) and
                   ``segmentation``
``instances``      of an instance model, best first: ``class``, ``label``, ``score`` (0 to 1),
                   ``box`` ([x1, y1, x2, y2]) and ``segmentation``
``segments``       of a panoptic result: ``id``, ``class``, ``thing``, ``score``, ``pixels`` and
                   ``segmentation``

``segmentation`` is what COCO means by it: run lengths, ``{"size": [height, width], "counts":
"..."}``, which ``pycocotools.mask.decode`` takes as they are and which are exact; or polygons,
``[[x, y, x, y, ...], ...]``, the outer borders through the centres of border pixels, without the
holes; or it is left out.

The wall clock is read once, when the log is opened, and every ``captured`` is counted from there by
the monotonic clock. So no line is older than the one before it, whatever is done to the clock; one
that is corrected during a run shows in the next run. A number that is none (a network in trouble)
is null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import RequestError, SinkError
from edgeseg.instances import InstanceResult
from edgeseg.panoptic import PanopticResult
from edgeseg.result import Result, SemanticResult
from edgeseg.sink.base import Sink
from edgeseg.sink.part import reason_of
from edgeseg.sink.runlengths import runs_of

__all__ = ["FORMAT", "JSON_SUFFIXES", "SHAPES", "JsonLinesSink", "Shapes"]

#: version of the format
FORMAT = 1
#: endings of a log
JSON_SUFFIXES = (".jsonl", ".ndjson")

#: how masks are written: COCO's compressed run lengths, polygons, or not at all
Shapes = Literal["rle", "polygons", "none"]
SHAPES: tuple[Shapes, ...] = ("rle", "polygons", "none")


class JsonLinesSink(Sink):
    """A log of one JSON object per result; `edgeseg.sink.jsonlines` describes them.

    The file has its name from the start, so that ``tail -f`` can follow it, and each line is given
    to the system whole when it is written: a run that is killed leaves all of them, a power cut
    what the file system had saved (most keep all but the last seconds). A log that is there is
    continued, on a new line if its last one was cut off; ``run`` tells the runs apart. A log that
    is moved away meanwhile, as logrotate does it, is begun anew under its name.

    ``source``: a name for the lines. Raises RequestError for ``shapes`` that are not in `SHAPES`,
    SinkError, before the first frame, when the file cannot be written to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        source: str | None = None,
        shapes: Shapes = "rle",
    ) -> None:
        if shapes not in SHAPES:
            raise RequestError(f"masks are written as {', '.join(SHAPES)}, and {shapes!r} came")
        self._path = Path(path).expanduser()
        self._source = source
        self._shapes: Shapes = shapes
        # Between the two readings of the monotonic clock is the one that belongs to the wall's.
        before_ns, wall_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        self._offset_ns = wall_ns - (before_ns + after_ns) // 2
        self._run = _utc(wall_ns)
        self._notes: tuple[str, ...] = ()
        self._written = False
        self._descriptor: int | None = None
        self._made = False
        self._open(first=True)

    @property
    def notes(self) -> tuple[str, ...]:
        """That a log which was there is continued."""
        return self._notes

    def write(self, result: Result) -> None:
        """Appends the line of one result."""
        if self._descriptor is None:
            raise SinkError(f"{self._path} is finished, and one more frame came")
        if not isinstance(result, (SemanticResult, InstanceResult)):
            raise RequestError(
                "a log is of semantic and instance results, and a "
                f"{type(result).__name__} came; `to_line` takes panoptic ones"
            )
        line = (json.dumps(self.to_line(result), separators=_COMPACT) + "\n").encode()
        try:
            _write_whole(self._reopened(self._descriptor), line)
        except OSError as error:
            raise SinkError(f"{self._path} cannot be written ({reason_of(error)})") from error
        self._written = True

    def to_line(self, result: SemanticResult | InstanceResult | PanopticResult) -> dict[str, Any]:
        """What is written of a result, of plain types, ready for ``json.dumps``."""
        line: dict[str, Any] = {"edgeseg": FORMAT, "run": self._run}
        if self._source is not None:
            line["source"] = self._source
        if not isinstance(result, PanopticResult):
            line["model"] = result.spec.name
        line |= {
            "index": result.index,
            "captured": _utc(result.frame.captured_ns + self._offset_ns),
            "captured_ns": result.frame.captured_ns,
            "mask_age_ms": round(result.age_ms, 3),
            "size": [result.frame.height, result.frame.width],
        }
        if isinstance(result, SemanticResult):
            line["classes"] = self._classes(result)
        elif isinstance(result, InstanceResult):
            line["instances"] = self._instances(result)
        else:
            line["segments"] = self._segments(result)
        return line

    def close(self) -> None:
        """Closes the file; removes it again if it was made for nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.close(descriptor)
        except OSError as error:
            # Where a network's file system tells only now that it was full.
            raise SinkError(f"{self._path} cannot be written ({reason_of(error)})") from error
        finally:
            if self._made and not self._written:
                self._path.unlink(missing_ok=True)

    def abort(self) -> None:
        """Closes the file; its lines stay, each of them is true."""
        try:
            self.close()
        except SinkError:
            return

    def _open(self, *, first: bool) -> int:
        made = not self._path.exists()
        try:
            # Appending by the system: lines of two processes do not overwrite each other.
            descriptor = os.open(
                self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
            if first and not made:
                self._continue(descriptor)
        except OSError as error:
            raise SinkError(
                f"{self._path} cannot be written ({reason_of(error)}); choose another"
            ) from error
        if first:
            self._made = made
        self._descriptor = descriptor
        return descriptor

    def _continue(self, descriptor: int) -> None:
        """Ends a line that was cut off, and tells that the log is continued."""
        if not os.fstat(descriptor).st_size:
            return
        self._notes = (f"{self._path} was there and is continued; `run` tells the runs apart",)
        with self._path.open("rb") as log:
            log.seek(-1, os.SEEK_END)
            cut_off = log.read(1) != b"\n"
        if cut_off:
            _write_whole(descriptor, b"\n")

    def _reopened(self, descriptor: int) -> int:
        """The descriptor of the file that has the log's name now."""
        ours = os.fstat(descriptor)
        try:
            there = os.stat(self._path)  # noqa: PTH116 - compared with fstat
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return descriptor
        except FileNotFoundError:
            pass
        self._descriptor = None
        os.close(descriptor)
        return self._open(first=False)

    def _classes(self, result: SemanticResult) -> list[dict[str, Any]]:
        class_map = result.class_map
        if self._shapes == "rle":
            runs = runs_of(class_map)
            covered = [(label, found.pixels) for label, found in runs.items()]
        else:
            counts = np.bincount(class_map.ravel(), minlength=1)
            covered = [(label, int(counts[label])) for label in np.flatnonzero(counts).tolist()]
        entries = []
        for label, pixels in covered:
            # A label that the model has no name for is none of its classes.
            if label >= len(result.spec.classes):
                continue
            entry = {
                "class": result.spec.classes[label],
                "label": label,
                "pixels": pixels,
                "share": round(pixels / class_map.size, 6),
            }
            if self._shapes == "rle":
                entry["segmentation"] = _rle(class_map.shape, runs[label].counts)
            elif self._shapes == "polygons":
                entry["segmentation"] = _outlines(class_map == label)
            entries.append(entry)
        return entries

    def _instances(self, result: InstanceResult) -> list[dict[str, Any]]:
        if self._shapes == "rle":
            shapes: Sequence[Any] = [
                _rle(rle["size"], rle["counts"].decode("ascii")) for rle in result.rles()
            ]
        elif self._shapes == "polygons":
            shapes = [_flat(outlines) for outlines in result.polygons()]
        else:
            shapes = [None] * len(result)
        entries = []
        for label, name, score, box, shape in zip(
            result.labels.tolist(),
            result.names,
            result.scores.tolist(),
            result.boxes.tolist(),
            shapes,
            strict=True,
        ):
            entry = {
                "class": name,
                "label": label,
                "score": _number(score, 4),
                "box": [_number(side, 2) for side in box],
            }
            if shape is not None:
                entry["segmentation"] = shape
            entries.append(entry)
        return entries

    def _segments(self, result: PanopticResult) -> list[dict[str, Any]]:
        runs = runs_of(result.ids) if self._shapes == "rle" else {}
        entries = []
        for segment in result.segments:
            entry = {
                "id": segment.id,
                "class": segment.name,
                "thing": segment.is_thing,
                "score": _number(segment.score, 4),
                "pixels": segment.area,
            }
            if self._shapes == "rle":
                entry["segmentation"] = _rle(result.ids.shape, runs[segment.id].counts)
            elif self._shapes == "polygons":
                entry["segmentation"] = _outlines(result.ids == segment.id)
            entries.append(entry)
        return entries


_COMPACT = (",", ":")


def _write_whole(descriptor: int, content: bytes) -> None:
    """In one call to the system as a rule; in several where a disk is about to be full."""
    while content:
        content = content[os.write(descriptor, content) :]


def _utc(wall_ns: int) -> str:
    # By whole numbers: a float has no room for microseconds since 1970 and their rounding.
    seconds, rest_ns = divmod(wall_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest_ns // 1000:06d}Z"


def _number(value: float, places: int) -> float | None:
    return round(value, places) if math.isfinite(value) else None


def _rle(size: Sequence[int], counts: str) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


def _outlines(mask: NDArray[np.bool_]) -> list[list[int]]:
    found, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return _flat([outline.reshape(-1, 2) for outline in found])


def _flat(outlines: Sequence[NDArray[Any]]) -> list[list[int]]:
    """[x, y, x, y, ...] of each outline, of three points at least.

    Of one or two pixels an outline has as many points. They come again, because to COCO four
    numbers are a box.
    """
    flat = []
    for outline in outlines:
        points = outline.tolist()
        while len(points) < 3:
            points.append(points[-1])
        flat.append([int(value) for point in points for value in point])
    return flat
