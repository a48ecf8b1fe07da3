"""A soak: many frames of cameras that fail in every way, through to sinks that fail, and a verdict.

    python -m tests.soak [--frames 200000] [--seed 0] [--json FILE] [--quick]

Cameras of 30 pictures per second (`FaultyCamera`), each read by threads of its own, go through
`Streams` and a real engine into outlets: JSON lines, a video, and sinks that are slow, fail and
hang. All faults come in an order that the seed decides, while the engine stands still now and then.
What has to hold is listed by `checks`; the exit code is 1 when one of them does not.

What a picture shows says which one it is, so that its age is known whatever its time stamp says,
and the strongest colour says which mask belongs to it.

A mask is *stale* when it is older than two frame intervals and the time that its own frame was
inside the engine. Two things are taken off that this program did on purpose and knows exactly: the
delay of a picture that the fault "delay" handed over late, and a standstill of the engine that was
forced while the frame waited for it, if its camera gave no newer picture in that time.

Machines are shared, and a thread that gets no processor cannot be in time. So that this is told
apart and not guessed, the kernel is asked, every 50 ms, how long the threads of this process ran
and how long they stood in its run queue (/proc/self/task/*/schedstat). Time *denied* is the time
that they stood there, and no more of it than the time in which nothing of this process ran, because
threads that stand there together wait once. A suspect, a mask over the limit, is explained if it is
within the limit once the time denied in its life, and in the half second before, whose backlog it
found, is taken off; one that is not is stale, and fails the soak. A lock that is held too long, a
queue, a lost wake-up or a call that blocks others is nobody else's work, and explains nothing. All
suspects are told, and the share of the whole run that was denied. Pauses are judged likewise.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import cv2
import numpy as np
import psutil

from edgeseg.bundle import Bundle
from edgeseg.engine import open_engine
from edgeseg.engine.base import Engine
from edgeseg.errors import SinkError
from edgeseg.result import SemanticResult
from edgeseg.sink import Outlet, OutletStats, Sink, VideoSink
from edgeseg.sink.jsonlines import JsonLinesSink
from edgeseg.source import Backoff, LiveSource, Source
from edgeseg.streams import Streams
from tests.conftest import TINY_SPEC, Tiny
from tests.edgeseg.faults import (
    FAULTS,
    FailingSink,
    Fault,
    FaultyCamera,
    HangingSink,
    SlowSink,
    StallingEngine,
    WorldClock,
    number_in,
)

__all__ = ["Check", "Judge", "Plan", "Record", "checks", "main", "run", "schedule"]

SinkFault = Literal["slow, drop", "slow, wait", "failing", "hanging, drop", "hanging, wait"]
SINK_FAULTS: tuple[SinkFault, ...] = (
    "slow, drop", "slow, wait", "failing", "hanging, drop", "hanging, wait"
)  # fmt: skip

_SLICE_S = 0.05
_ROOM = 144_000
# What was denied before a picture was taken leaves others that it has to wait for, in seconds.
_BACKLOG_S = 0.5
_SAMPLE_S = 0.5
_TELL_S = 10.0
# How long nothing at all may come before the run is broken off, in seconds.
_DEAD_S = 30.0
# Threads that were told to end may take so long, in seconds.
_ENDING_S = 5.0
# Of how many suspects the details are kept.
_DETAILS = 8
_MOST_GROWTH = 0.01
# Tenths of a run in which all that is bounded becomes full: the latest hundred states of each
# source need a hundred losses of it.
_WARM_UP = 3


@dataclass(frozen=True)
class Plan:
    """What is run: ``frames`` masks, from ``cameras`` of ``fps`` pictures per second.

    ``timeout_s`` is the stall timeout of the sources, and so long, at most, nothing may come of a
    camera that gives pictures. Faults last one of ``fault_s``, with pauses of up to ``calm_s``.
    The engine stands still for one of ``stall_s``, each ``stall_every_s``. A sink that hangs is
    given up after ``patience_s``; between two bad sinks of one kind are ``sink_gap`` masks.
    """

    frames: int = 200_000
    seed: int = 0
    cameras: int = 24
    fps: float = 30.0
    timeout_s: float = 1.0
    backoff: Backoff = field(default=Backoff(0.05, 0.5))
    fault_s: tuple[float, ...] = (0.1, 0.4, 1.6)
    calm_s: float = 2.0
    stall_s: tuple[float, ...] = (0.1, 0.3, 0.6)
    stall_every_s: float = 5.0
    patience_s: float = 0.5
    sink_gap: int = 1500

    @classmethod
    def quick(cls, frames: int = 3000, seed: int = 0) -> Plan:
        """The same faults, shorter, in a few seconds."""
        return cls(
            frames=frames,
            seed=seed,
            timeout_s=0.6,
            backoff=Backoff(0.02, 0.2),
            fault_s=(0.08, 0.25, 0.8),
            calm_s=0.5,
            stall_s=(0.05, 0.15),
            stall_every_s=0.7,
            patience_s=0.2,
            sink_gap=150,
        )


def schedule(plan: Plan, camera: int) -> Iterator[Fault]:
    """The faults of one camera, without end: round after round of all there are, shuffled."""
    chance = random.Random(f"{plan.seed} {camera}")
    at_s, first = plan.calm_s, FAULTS[camera % len(FAULTS)]
    while True:
        # The first faults of all cameras are all faults.
        kinds = [first, *chance.sample(FAULTS, len(FAULTS))] if first else chance.sample(
            FAULTS, len(FAULTS)
        )  # fmt: skip
        first = None  # type: ignore[assignment]
        for kind in kinds:
            length_s = chance.choice(plan.fault_s)
            yield Fault(kind, at_s, at_s + length_s)
            at_s += length_s + chance.uniform(0.1, 1.0) * plan.calm_s


# --- what the machine does meanwhile


class Denial:
    """How long this process was denied a processor; the module's docstring says what that means."""

    def __init__(self) -> None:
        # Written once now, so that the process does not grow by what is measured of it.
        self._times, self._ran, self._queued = (array("q", bytes(8 * _ROOM)) for _ in range(3))
        self._count = 0
        self._total_ns = 0
        self._before: dict[str, int] = _queued_ns()
        self.sample()

    def sample(self) -> None:
        """To be called every 50 ms, for two hours at most."""
        queued = _queued_ns()
        self._total_ns += sum(ns - self._before.get(task, 0) for task, ns in queued.items())
        self._before = queued
        if self._count < _ROOM:
            self._ran[self._count] = time.process_time_ns()
            self._queued[self._count] = self._total_ns
            self._times[self._count] = time.monotonic_ns()
            self._count += 1

    def denied_ns(self, start_ns: int, end_ns: int) -> int:
        """From one time to another, rounded up to whole samples; 0 where the kernel is silent."""
        before = max(bisect.bisect_right(self._times, start_ns, hi=self._count) - 1, 0)
        after = bisect.bisect_left(self._times, end_ns, hi=self._count)
        after = min(after, self._count - 1)
        queued_ns = self._queued[after] - self._queued[before]
        idle_ns = self._times[after] - self._times[before] - (self._ran[after] - self._ran[before])
        return max(min(queued_ns, idle_ns), 0)

    @property
    def share(self) -> float:
        """Of all the time, what was denied."""
        first, last = self._times[0], self._times[self._count - 1]
        return self.denied_ns(first, last) / max(last - first, 1)


def _queued_ns() -> dict[str, int]:
    """How long each thread has stood in the run queue; empty where the kernel does not say."""
    found: dict[str, int] = {}
    try:
        # Twenty times a second, for each of 60 threads: without what is comfortable.
        for task in os.listdir("/proc/self/task"):  # noqa: PTH208
            try:
                descriptor = os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY)
            except FileNotFoundError:
                # That thread has ended.
                continue
            try:
                found[task] = int(os.read(descriptor, 100).split()[1])
            except ProcessLookupError:
                continue
            finally:
                os.close(descriptor)
    except (OSError, IndexError):
        return {}
    return found


@dataclass(frozen=True)
class Footprint:
    """What a process has open: threads that Python knows, all threads, and descriptors."""

    threads: int
    native_threads: int
    descriptors: int

    @classmethod
    def now(cls) -> Footprint:
        """Of this process; descriptors are 0 where they cannot be counted."""
        process = psutil.Process()
        descriptors = process.num_fds() if hasattr(process, "num_fds") else 0
        return cls(threading.active_count(), process.num_threads(), descriptors)


# --- what has to hold of each mask


@dataclass(frozen=True)
class Suspect:
    """Something that took ``taken_ns`` of the ``limit_ns`` that it had, from ``start_ns`` on."""

    taken_ns: int
    limit_ns: int
    start_ns: int
    end_ns: int
    what: str


@dataclass
class Seen:
    """What was last seen of a camera."""

    number: int = 0
    index: int = -1
    captured_ns: int = -1
    finished_ns: int = 0


class Judge:
    """Looks at every mask that is handed out; one thread calls `see`.

    ``ages_ms`` are those of all masks, ``over`` how much older each was than the time it was inside
    the engine, in frame intervals: 2 is the limit.
    """

    def __init__(self, plan: Plan, cameras: Mapping[str, FaultyCamera], stalls: Any) -> None:
        self._plan = plan
        self._cameras = cameras
        self._stalls = stalls
        self._interval_ns = round(1e9 / plan.fps)
        # Written once now, so that the process does not grow by what is measured of it.
        room = plan.frames + 10_000
        self._ages_ms = np.full(room, -1.0, np.float32)
        self._over = np.full(room, -1.0, np.float32)
        self._inside_ms = np.full(room, -1.0, np.float32)
        self.seen: dict[str, Seen] = {name: Seen() for name in cameras}
        self.masks = 0
        self.repeated = 0
        self.disordered = 0
        self.made_up = 0
        self.wrong_masks = 0
        self.longest_pause_s = 0.0
        self.longest_wait_s = 0.0
        self.stale: list[Suspect] = []
        self.silent: list[Suspect] = []

    @property
    def suspects(self) -> tuple[list[Suspect], list[Suspect]]:
        """Masks that came too late, and pauses that were too long."""
        return self.stale, self.silent

    @property
    def ages_ms(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """From a picture's moment to its finished mask."""
        return self._ages_ms[: min(self.masks, len(self._ages_ms))]

    @property
    def over(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Age without the time inside the engine, in frame intervals."""
        return self._over[: min(self.masks, len(self._over))]

    @property
    def inside_ms(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Time inside the engine."""
        return self._inside_ms[: min(self.masks, len(self._inside_ms))]

    def see(self, name: str, result: SemanticResult, asked_ns: int, now_ns: int) -> None:
        """A mask of the camera ``name``, asked for at one time and handed over at another."""
        camera, seen, frame = self._cameras[name], self.seen[name], result.frame
        number = number_in(frame.pixels)
        given = camera.given(number)
        if given is None or not self._is_whole(camera, number, frame.pixels):
            self.made_up += 1
            return
        if number == seen.number or frame.index == seen.index:
            self.repeated += 1
        elif (number, frame.index) < (seen.number, seen.index) or (
            frame.captured_ns <= seen.captured_ns
        ):
            self.disordered += 1
        if not self._fits(camera, number, result):
            self.wrong_masks += 1
        self._time(name, result, number, given)
        self.longest_wait_s = max(
            self.longest_wait_s, (now_ns - max(asked_ns, result.finished_ns)) / 1e9
        )
        seen.number, seen.index = number, frame.index
        seen.captured_ns, seen.finished_ns = frame.captured_ns, result.finished_ns

    def look(self, now_ns: int) -> None:
        """Looks for cameras that give pictures and of which nothing comes; any thread."""
        for name in self._cameras:
            self._pause(name, now_ns)

    def _time(self, name: str, result: SemanticResult, number: int, given: tuple[int, int]) -> None:
        camera, place = self._cameras[name], min(self.masks, len(self._ages_ms) - 1)
        self.masks += 1
        given_ns, delayed_ns = given
        taken_ns = camera.taken_ns(number)
        age_ns = result.finished_ns - taken_ns - delayed_ns
        inside_ns = result.outputs.network_ns
        self._ages_ms[place] = age_ns / 1e6
        self._inside_ms[place] = inside_ns / 1e6
        self._over[place] = (age_ns - inside_ns) / self._interval_ns
        waited_ns, limit_ns = age_ns - inside_ns, 2 * self._interval_ns
        if waited_ns > limit_ns:
            submitted_ns = result.finished_ns - inside_ns
            waited_ns -= self._stood_still_ns(camera, number, given_ns, submitted_ns)
        if waited_ns > limit_ns:
            what = (
                f"picture {number} of {name}, {age_ns / 1e6:.1f} ms old, of which "
                f"{inside_ns / 1e6:.1f} ms inside the engine"
            )
            start_ns = taken_ns + delayed_ns
            end_ns = result.finished_ns
            self.stale.append(Suspect(waited_ns, limit_ns, start_ns, end_ns, what))
        self._pause(name, result.finished_ns)

    def _stood_still_ns(
        self, camera: FaultyCamera, number: int, given_ns: int, submitted_ns: int
    ) -> int:
        """How long the engine was made to stand still while this picture was the newest."""
        for newer in range(number + 1, camera.latest + 1):
            given = camera.given(newer)
            if given is not None and given[0] < submitted_ns - self._interval_ns:
                return 0
        return sum(
            max(min(end_ns, submitted_ns) - max(start_ns, given_ns), 0)
            for start_ns, end_ns in tuple(self._stalls)
        )

    def _pause(self, name: str, now_ns: int) -> None:
        """Whether nothing came of that camera for too long, though it gave pictures."""
        camera, seen = self._cameras[name], self.seen[name]
        blind_ns = camera.clock.started_ns + round(camera.blind_until_s * 1e9)
        since_ns = max(seen.finished_ns or camera.clock.started_ns, blind_ns)
        pause_ns = now_ns - since_ns
        self.longest_pause_s = max(self.longest_pause_s, pause_ns / 1e9)
        limit_ns = round(self._plan.timeout_s * 1e9)
        if pause_ns > limit_ns:
            what = f"nothing of {name} for {pause_ns / 1e9:.2f} s"
            self.silent.append(Suspect(pause_ns, limit_ns, since_ns, now_ns, what))

    @staticmethod
    def _is_whole(camera: FaultyCamera, number: int, pixels: Any) -> bool:
        """Whether all of a picture is that picture's."""
        if pixels.shape[0] == 1:
            return True
        last = pixels[-1]
        wanted = camera.colour(number)
        grey = (wanted[0],) * 3
        return any((last == colour).all() for colour in (wanted, grey))

    @staticmethod
    def _fits(camera: FaultyCamera, number: int, result: SemanticResult) -> bool:
        """Whether a mask is that of its own frame."""
        pixels, class_map = result.frame.pixels, result.class_map
        if class_map.shape != pixels.shape[:2]:
            return False
        corner = pixels[-1, -1]
        strongest = int(corner.argmax())
        if (corner == corner[strongest]).sum() > 1:
            # A picture without colours has no strongest one.
            return True
        return bool((class_map[:: 1 + class_map.shape[0] // 64] == strongest).all())


# --- sinks


class Slot:
    """One kind of bad sink after another, each behind an outlet of its own."""

    def __init__(self, kind: SinkFault, plan: Plan, chance: random.Random) -> None:
        self._kind = kind
        self._plan = plan
        self._chance = chance
        self._outlet: Outlet | None = None
        self._sink: Sink | None = None
        self._offered = 0
        self._gap = chance.randrange(plan.sink_gap)
        self.ended = 0
        self.wrong: list[str] = []

    @property
    def outlets(self) -> tuple[Outlet, ...]:
        """The one that is there, if any."""
        return () if self._outlet is None else (self._outlet,)

    def write(self, result: SemanticResult) -> None:
        """Hands a result on, or waits for its turn."""
        if self._outlet is None:
            self._gap -= 1
            if self._gap > 0:
                return
            self._begin()
        assert self._outlet is not None
        self._outlet.write(result)
        self._offered += 1
        if self._offered == 60 if self._kind.startswith("slow") else self._outlet.error is not None:
            self.end()

    def end(self) -> None:
        """Closes what is there."""
        outlet, sink, self._outlet, self._sink = self._outlet, self._sink, None, None
        if outlet is None:
            return
        failed = outlet.error is not None
        if isinstance(sink, HangingSink):
            sink.go_on.set()
        try:
            outlet.close()
        except SinkError:
            if not failed:
                self.wrong.append(f"{self._kind}: it failed only when it was closed")
        stats = self._settled(outlet)
        if stats.written + stats.dropped != self._offered:
            self.wrong.append(
                f"{self._kind}: {self._offered} results were given, {stats.written} written and "
                f"{stats.dropped} dropped"
            )
        if failed and self._kind.startswith("slow"):
            self.wrong.append(f"{self._kind}: error is {stats.error}")
        if self._kind == "slow, wait" and stats.dropped:
            self.wrong.append(f"{self._kind}: {stats.dropped} results are missing")
        self.ended += failed or stats.dropped > 0 or self._kind == "slow, wait"
        self._gap = self._chance.randrange(self._plan.sink_gap // 2, self._plan.sink_gap)
        self._offered = 0

    def _begin(self) -> None:
        after = self._chance.randrange(20)
        if self._kind.startswith("slow"):
            self._sink = SlowSink(0.05 if self._kind == "slow, drop" else 0.002)
        elif self._kind == "failing":
            error = self._chance.choice(
                (SinkError("the disk is full"), OSError(28, "full"), ValueError("?"), MemoryError())
            )
            self._sink = FailingSink(error, after=after)
        else:
            self._sink = HangingSink(after=after)
        policy: Literal["wait", "drop"] = "drop"
        if self._kind.endswith("wait") or (self._kind == "failing" and after % 2):
            policy = "wait"
        # A machine that is busy must not make a slow sink a hanging one.
        patience_s = _DEAD_S if self._kind.startswith("slow") else self._plan.patience_s
        self._outlet = Outlet(self._sink, name=self._kind, policy=policy, patience_s=patience_s)

    @staticmethod
    def _settled(outlet: Outlet) -> OutletStats:
        """Its figures, when its thread has ended."""
        deadline = time.monotonic() + _ENDING_S
        name = f"edgeseg-outlet-{outlet.name}"
        while time.monotonic() < deadline:
            if not any(thread.name == name for thread in threading.enumerate()):
                break
            time.sleep(0.001)
        return outlet.stats


class Outputs:
    """Where all results go: two files of some cameras, and the bad sinks, which get all."""

    def __init__(self, plan: Plan, folder: Path, names: Sequence[str]) -> None:
        self._lines_path, self._video_path = folder / "masks.jsonl", folder / "masks.avi"
        self._lines = Outlet(JsonLinesSink(self._lines_path), name="lines", policy="wait")
        self._video = Outlet(VideoSink(self._video_path, fps=plan.fps), name="video", policy="wait")
        self._in_lines, self._in_video = frozenset(names[:4]), names[0]
        self._given = {"lines": 0, "video": 0}
        chance = random.Random(f"{plan.seed} sinks")
        self.slots = {kind: Slot(kind, plan, chance) for kind in SINK_FAULTS}
        self.wrong: list[str] = []

    @property
    def outlets(self) -> tuple[Outlet, ...]:
        """All that are open."""
        bad = [outlet for slot in self.slots.values() for outlet in slot.outlets]
        return (self._lines, self._video, *bad)

    def write(self, name: str, result: SemanticResult) -> None:
        """Hands one result to those that want it."""
        if name in self._in_lines:
            self._given["lines"] += 1
            self._lines.write(result)
        if name == self._in_video:
            self._given["video"] += 1
            self._video.write(result)
        for slot in self.slots.values():
            slot.write(result)

    def end(self) -> None:
        """Closes all, and looks at what they wrote."""
        for slot in self.slots.values():
            slot.end()
            self.wrong += slot.wrong
        for outlet in (self._lines, self._video):
            try:
                outlet.close()
            except SinkError as error:
                self.wrong.append(str(error))
            if outlet.stats.written != self._given[outlet.name]:
                self.wrong.append(
                    f"{outlet.name}: {outlet.stats.written} results of "
                    f"{self._given[outlet.name]} were written"
                )
        with self._lines_path.open(encoding="utf-8") as lines:
            count = sum(1 for line in lines if json.loads(line))
        if count != self._given["lines"]:
            self.wrong.append(f"{count} lines of {self._given['lines']} results")
        capture = cv2.VideoCapture(str(self._video_path))
        pictures = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if pictures < self._given["video"]:
            self.wrong.append(f"{pictures} pictures in a video of {self._given['video']} results")


# --- the run


@dataclass(frozen=True)
class Record:
    """What a run amounted to; `checks` says what of it has to hold."""

    plan: Plan
    seconds: float
    masks: int
    crashes: tuple[str, ...]
    longest_pause_s: float
    silent: tuple[str, ...]
    silent_explained: int
    ending_s: float
    age_ms: dict[str, float]
    inside_ms: dict[str, float]
    over: dict[str, float]
    stale_found: int
    stale_explained: int
    stale: tuple[str, ...]
    denied: float
    longest_wait_s: float
    repeated: int
    disordered: int
    made_up: int
    wrong_masks: int
    received: int
    delivered: int
    finished: int
    superseded: int
    dropped: int
    damaged: int
    old: int
    reconnects: int
    sums: tuple[str, ...]
    rss_mb: tuple[float, ...]
    before: Footprint
    after: Footprint
    faults: dict[str, int]
    sinks: tuple[str, ...]
    engine: str

    @property
    def growth(self) -> float:
        """By which share the memory grew, from the first tenth after the warm-up to the last."""
        return self.rss_mb[-1] / self.rss_mb[min(_WARM_UP, len(self.rss_mb) - 1)] - 1


@dataclass(frozen=True)
class Check:
    """Something that has to hold, whether it does, and the figure that says so."""

    name: str
    holds: bool
    figure: str


def checks(record: Record) -> tuple[Check, ...]:
    """What has to hold of a run."""
    plan, before, after = record.plan, record.before, record.after
    never = [fault for fault, times in record.faults.items() if times == 0]
    stale = record.stale_found - record.stale_explained
    return (
        Check("frames processed", record.masks >= plan.frames, f"{record.masks}"),
        Check(
            "no crash",
            not record.crashes,
            "; ".join(record.crashes[:3]) or "no error in any thread",
        ),
        Check(
            f"no hang over the stall timeout ({plan.timeout_s:g} s)",
            not record.silent and record.ending_s <= _ENDING_S,
            f"longest pause of a camera that gave pictures {record.longest_pause_s:.2f} s, "
            f"{record.silent_explained} explained; "
            f"all ended in {record.ending_s:.2f} s" + "".join(f"; {w}" for w in record.silent[:3]),
        ),
        Check(
            "no stale mask (2 frame intervals + its time in the engine)",
            stale == 0,
            f"{record.stale_found} suspects, {record.stale_explained} explained, {stale} stale"
            + "".join(f"; {what}" for what in record.stale[:3]),
        ),
        Check(
            "never twice, never out of order",
            record.repeated == record.disordered == 0,
            f"{record.repeated} repeated, {record.disordered} out of order",
        ),
        Check(
            "real pictures, and their own masks",
            record.made_up == record.wrong_masks == 0,
            f"{record.made_up} made up or in pieces, {record.wrong_masks} masks of another frame",
        ),
        Check(
            "every frame accounted for",
            not record.sums,
            f"{record.received} received = {record.delivered} delivered + "
            f"{record.received - record.delivered - record.damaged - record.old} dropped + "
            f"{record.damaged} damaged + {record.old} stale; {record.delivered} delivered = "
            f"{record.finished} finished + {record.dropped} dropped; {record.finished} finished = "
            f"{record.finished - record.superseded} handed over + {record.superseded} superseded"
            + "".join(f"; {what}" for what in record.sums[:3]),
        ),
        Check(
            f"memory grows by less than {_MOST_GROWTH:.0%} after warm-up",
            record.growth < _MOST_GROWTH,
            f"{record.growth:+.2%}; medians of tenths of the run, of which {_WARM_UP} are the "
            f"warm-up: {' '.join(f'{rss:.1f}' for rss in record.rss_mb)} MB",
        ),
        Check(
            "threads and descriptors back to the start",
            after.threads <= before.threads
            and after.native_threads <= before.native_threads
            and after.descriptors <= before.descriptors,
            f"{before.threads} / {before.native_threads} / {before.descriptors} before, "
            f"{after.threads} / {after.native_threads} / {after.descriptors} after "
            "(threads of Python, all threads, descriptors)",
        ),
        Check(
            "every fault was there",
            not never,
            f"{len(record.faults)} kinds" + (f"; never: {', '.join(never)}" if never else ""),
        ),
        Check(
            "sinks: nothing lost without being counted",
            not record.sinks,
            "; ".join(record.sinks[:3]) or "lines and video are whole",
        ),
    )


@dataclass
class Watch:
    """A thread that looks at the run from outside, twenty times a second."""

    judge: Judge
    streams: Streams
    outputs: Outputs
    denial: Denial
    memory: list[tuple[int, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak-watch", daemon=True)
        self._masks, self._masks_ns = 0, time.monotonic_ns()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def explains(self, suspect: Suspect) -> bool:
        """Whether it is within its limit without the time that was denied."""
        start_ns = suspect.start_ns - round(_BACKLOG_S * 1e9)
        denied_ns = self.denial.denied_ns(start_ns, suspect.end_ns)
        return suspect.taken_ns - denied_ns <= suspect.limit_ns

    def tenths(self, masks: int) -> tuple[float, ...]:
        """Memory in MB, the median of each tenth of the run."""
        samples: list[list[float]] = [[] for _ in range(10)]
        for at, rss_mb in self.memory:
            samples[min(10 * at // masks, 9)].append(rss_mb)
        return tuple(round(statistics.median(found), 2) for found in samples if found)

    def _run(self) -> None:
        process, sampled_ns, count = psutil.Process(), 0, 0
        while not self._done.wait(_SLICE_S):
            self.denial.sample()
            now_ns = time.monotonic_ns()
            if now_ns - sampled_ns < _SAMPLE_S * 1e9:
                continue
            sampled_ns, count = now_ns, count + 1
            self.memory.append((self.judge.masks, process.memory_info().rss / 1e6))
            self._look(now_ns)
            if count % 10 == 0:
                self._ask()

    def _look(self, now_ns: int) -> None:
        self.judge.look(now_ns)
        if self.judge.masks != self._masks:
            self._masks, self._masks_ns = self.judge.masks, now_ns
        elif now_ns - self._masks_ns > _DEAD_S * 1e9:
            self.errors.append(f"nothing came for {_DEAD_S:g} seconds; broken off")
            self.streams.close()
            self._done.set()

    def _ask(self) -> None:
        """What a web page asks all the time."""
        try:
            json.dumps(self.streams.stats(self.outputs.outlets).to_dict())
        except Exception as error:
            self.errors.append(f"stats: {error!r}")


def run(
    plan: Plan,
    *,
    streams_of: Callable[[Engine, Mapping[str, Source]], Streams] = Streams,
    tell: Callable[[str], None] = lambda line: None,
) -> Record:
    """Runs it; ``streams_of`` makes the streams, ``tell`` is given a line every ten seconds.

    A short run goes before, so that what libraries keep for good (threads, descriptors) is there
    when the counting begins.
    """
    with tempfile.TemporaryDirectory(prefix="edgeseg-soak-") as name:
        folder = Path(name)
        engine = open_engine(
            Bundle.open(Tiny(TINY_SPEC).write(folder / "tiny")), "openvino", threads=1
        )
        try:
            # The first fault of each camera, which are all there are, in half a second.
            warm_up = replace(
                plan, frames=300, seed=plan.seed + 1, fault_s=(0.3,), calm_s=0.1, sink_gap=100
            )
            (folder / "warm-up").mkdir()
            nothing = Footprint(0, 0, 0)
            _measured(warm_up, engine, folder / "warm-up", Streams, lambda line: None, nothing)
            before = _settled(nothing, 0.0)
            # What is there by now stays. A collector that goes through all of it stops every thread
            # for 50 ms, and several times that on a small board.
            gc.freeze()
            return _measured(plan, engine, folder, streams_of, tell, before)
        finally:
            gc.unfreeze()
            engine.close()


def _settled(wanted: Footprint, patience_s: float) -> Footprint:
    """The footprint, once it is what it should be, or when nothing more is to be expected."""
    deadline = time.monotonic() + patience_s
    gc.collect()
    while True:
        found = Footprint.now()
        if found == wanted or time.monotonic() >= deadline:
            return found
        time.sleep(0.01)


def _measured(
    plan: Plan,
    engine: Engine,
    folder: Path,
    streams_of: Callable[[Engine, Mapping[str, Source]], Streams],
    tell: Callable[[str], None],
    before: Footprint,
) -> Record:
    denial = Denial()
    cameras = {
        # They do not look all at the same moment.
        f"camera {number}": FaultyCamera(
            WorldClock(number / plan.cameras / plan.fps),
            schedule(plan, number),
            fps=plan.fps,
            size=(TINY_SPEC.height, TINY_SPEC.width),
            feeds=True,
            remembers=False,
        )
        for number in range(plan.cameras)
    }
    sources = {
        name: LiveSource(
            f"test://{name}",
            camera.connect,
            name=name,
            timeout_s=plan.timeout_s,
            waits=True,
            backoff=plan.backoff,
        )
        for name, camera in cameras.items()
    }
    stalling = StallingEngine(engine)
    judge = Judge(plan, cameras, stalling.stalls)
    outputs = Outputs(plan, folder, tuple(cameras))
    streams = streams_of(stalling, sources)
    watch = Watch(judge, streams, outputs, denial)
    crashes: list[str] = []

    def note(crash: threading.ExceptHookArgs) -> None:
        name = "a thread" if crash.thread is None else crash.thread.name
        crashes.append(f"{name}: {crash.exc_value!r}")

    hook, threading.excepthook = threading.excepthook, note
    started_ns = ending_ns = time.monotonic_ns()
    try:
        with watch, streams:
            try:
                ending_ns = _take_all(plan, streams, judge, outputs, stalling, watch, tell)
            except Exception as error:
                crashes.append(f"in the caller's loop: {error!r}")
    finally:
        threading.excepthook = hook
    ending_s = (time.monotonic_ns() - ending_ns) / 1e9
    outputs.end()
    crashes += [f"{name}: {error!r}" for name, error in streams.errors.items()]
    after = _settled(before, 0.0 if before.threads == 0 else _ENDING_S)
    ages, inside, over = judge.ages_ms, judge.inside_ms, judge.over
    tallies = {name: source.tally for name, source in streams.sources.items()}
    ledgers = streams.ledgers
    stale, silent = ([one for one in ones if not watch.explains(one)] for ones in judge.suspects)
    faults: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
    for camera in cameras.values():
        faults.update(camera.injected)
    faults["engine stands still"] = stalling.stalled
    faults.update({f"sink: {kind}": slot.ended for kind, slot in outputs.slots.items()})
    return Record(
        plan=plan,
        engine=engine.description,
        seconds=(ending_ns - started_ns) / 1e9,
        masks=judge.masks,
        crashes=tuple(crashes + watch.errors),
        longest_pause_s=judge.longest_pause_s,
        silent=tuple(one.what for one in silent),
        silent_explained=len(judge.silent) - len(silent),
        ending_s=ending_s,
        age_ms=_spread(ages),
        inside_ms=_spread(inside),
        over=_spread(over),
        stale_found=len(judge.stale),
        stale_explained=len(judge.stale) - len(stale),
        stale=tuple(one.what for one in stale[:_DETAILS]),
        denied=watch.denial.share,
        longest_wait_s=judge.longest_wait_s,
        repeated=judge.repeated,
        disordered=judge.disordered,
        made_up=judge.made_up,
        wrong_masks=judge.wrong_masks,
        received=sum(tally.received for tally in tallies.values()),
        delivered=sum(tally.delivered for tally in tallies.values()),
        finished=sum(ledger.frames for ledger in ledgers.values()),
        superseded=sum(ledger.superseded for ledger in ledgers.values()),
        dropped=sum(ledgers[name].dropped - tally.dropped for name, tally in tallies.items()),
        damaged=sum(tally.damaged for tally in tallies.values()),
        old=sum(tally.stale for tally in tallies.values()),
        reconnects=sum(tally.reconnects for tally in tallies.values()),
        sums=tuple(_sums(streams, cameras, judge)),
        rss_mb=watch.tenths(plan.frames),
        before=before,
        after=after,
        faults=dict(faults),
        sinks=tuple(outputs.wrong),
    )


def _take_all(
    plan: Plan,
    streams: Streams,
    judge: Judge,
    outputs: Outputs,
    engine: StallingEngine,
    watch: Watch,
    tell: Callable[[str], None],
) -> int:
    """The caller's loop; returns when the sources were closed.

    What is on its way then is seen through, so that the sums are exact.
    """
    chance = random.Random(f"{plan.seed} engine")
    started_s = told_s = stalled_s = time.monotonic()
    told = 0
    ending_ns: int | None = None
    asked_ns = time.monotonic_ns()
    for stream in streams:
        now_ns = time.monotonic_ns()
        result = stream.result
        assert isinstance(result, SemanticResult)
        judge.see(stream.name, result, asked_ns, now_ns)
        if ending_ns is None:
            outputs.write(stream.name, result)
            now_s = now_ns / 1e9
            if now_s - stalled_s > plan.stall_every_s:
                stalled_s = now_s
                engine.stall(chance.choice(plan.stall_s))
            if now_s - told_s > _TELL_S:
                rate = (judge.masks - told) / (now_s - told_s)
                left_s = (plan.frames - judge.masks) / judge.masks * (now_s - started_s)
                tell(
                    f"{judge.masks} of {plan.frames} masks, {rate:.0f} per second, about "
                    f"{left_s / 60:.1f} min left; {len(judge.stale)} suspects, "
                    f"{watch.memory[-1][1]:.0f} MB"
                )
                told_s, told = now_s, judge.masks
            if judge.masks + judge.made_up >= plan.frames:
                ending_ns = time.monotonic_ns()
                for source in streams.sources.values():
                    source.close()
        # Not kept while waiting for the next: it holds a whole frame.
        del stream, result
        asked_ns = time.monotonic_ns()
    return time.monotonic_ns() if ending_ns is None else ending_ns


def _sums(streams: Streams, cameras: Mapping[str, FaultyCamera], judge: Judge) -> Iterator[str]:
    """Sums that are not right."""
    handed = 0
    for name, source in streams.sources.items():
        tally, ledger, camera = source.tally, streams.ledgers[name], cameras[name]
        handed += ledger.frames - ledger.superseded
        if tally.received != camera.good + camera.bad:
            yield f"{name} gave {camera.good + camera.bad} pictures and {tally.received} came"
        if tally.delivered != ledger.frames + ledger.dropped - tally.dropped:
            yield (
                f"{tally.delivered} frames of {name}, {ledger.frames} masks, and "
                f"{ledger.dropped - tally.dropped} dropped before the engine"
            )
    if handed != judge.masks + judge.made_up:
        yield f"{handed} masks were finished and not superseded, and {judge.masks} came"


def _spread(values: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, float]:
    if not len(values):
        return {}
    p50, p99, p999 = np.percentile(values, (50, 99, 99.9))
    found = {"p50": p50, "p99": p99, "p99.9": p999, "max": values.max()}
    return {name: round(float(value), 3) for name, value in found.items()}


# --- the command


def give_memory_back() -> None:
    """Has glibc give large blocks back to the system at once, for the life of this process.

    It keeps them otherwise, as many as there were threads that ever had one, and small ones in as
    many heaps: what is kept by the allocator hides what is kept by the program.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_ARENA_MAX of malloc.h.
        libc.mallopt(-3, 1 << 18)
        libc.mallopt(-8, 1)


def summary(record: Record) -> str:
    """The run as a table for a person."""
    plan, rate = record.plan, record.masks / record.seconds

    def spread(values: Mapping[str, float], unit: str) -> str:
        return ", ".join(f"{name} {value:.2f}{unit}" for name, value in values.items())

    lines = [
        f"{record.masks} masks of {plan.cameras} cameras in {record.seconds:.0f} s "
        f"({rate:.0f} per second), seed {plan.seed}; {record.engine}",
        f"mask age             {spread(record.age_ms, ' ms')}",
        f"inside the engine    {spread(record.inside_ms, ' ms')}",
        f"age without that     {spread(record.over, '')} frame intervals of "
        f"{1000 / plan.fps:.1f} ms",
        f"to the caller        {1000 * record.longest_wait_s:.1f} ms at most after it asked",
        f"processors denied    {record.denied:.1%} of the time, by what else the machine did",
        f"reconnects           {record.reconnects}",
        "",
        "faults               times",
        *(f"  {fault:<18} {times}" for fault, times in record.faults.items()),
        "",
        *(
            f"{'ok  ' if check.holds else 'FAIL'} {check.name}: {check.figure}"
            for check in checks(record)
        ),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when everything held."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="Cameras, engine and sinks with all faults there are.",
    )
    parser.add_argument("--frames", type=int, help="masks to be made (200000; 3000 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="decides what fails when (0)")
    parser.add_argument("--quick", action="store_true", help="the same faults, in some seconds")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    asked = parser.parse_args(arguments)
    plan = Plan.quick() if asked.quick else Plan()
    plan = replace(plan, frames=asked.frames or plan.frames, seed=asked.seed)
    give_memory_back()
    record = run(plan, tell=lambda line: print(line, file=sys.stderr, flush=True))
    print(summary(record))
    if asked.json:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
        from rounds import machine, write_json

        content = {
            "machine": machine(("edgeseg", "openvino", "opencv-python", "numpy")),
            **asdict(record),
            "growth": record.growth,
            "checks": [asdict(check) for check in checks(record)],
        }
        write_json(asked.json, content)
    return 0 if all(check.holds for check in checks(record)) else 1


if __name__ == "__main__":
    sys.exit(main())
