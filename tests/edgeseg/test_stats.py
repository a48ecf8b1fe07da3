"""The figures of one moment: what they are made of, and that taking them disturbs nobody."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from edgeseg.errors import EngineError, SourceError
from edgeseg.pipeline import Pipeline
from edgeseg.result import Result
from edgeseg.sensors import Reading
from edgeseg.sink import Sink
from edgeseg.sink.outlet import Outlet
from edgeseg.source import LiveSource, Source, Tally
from edgeseg.source.connection import Connection, Picture, Silence
from edgeseg.streams import Streams
from tests.edgeseg.faults import FakeClock
from tests.edgeseg.test_pipeline import PATIENCE_S, Flights, Numbers, Stripes, failing

READING = Reading(
    cpu_percent=85.0,
    rss_mb=120.5,
    gpu_percent=None,
    gpu_memory_mb=None,
    temperature_c=61.5,
    power_w=None,
    throttled=False,
    sources=("psutil",),
)


class Shelf(Sink):
    """A sink that counts."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, result: Result) -> None:
        self.written += 1


class _Dead(Connection):
    """A connection over which nothing comes."""

    def read(self, timeout_s: float) -> Picture | None:
        raise Silence

    def close(self) -> None:
        """Nothing to give back."""


def test_stats_before_during_and_after() -> None:
    sources: dict[str, Source] = {
        "door": Numbers(20),
        "yard": Numbers(9, before=failing(4, SourceError("the cable is out"))),
    }
    streams = Streams(Stripes(), sources)
    before = streams.stats()
    assert (before.model, before.engine, before.description) == (
        "stripes", "stripes", "a test's engine"
    )  # fmt: skip
    assert before.network_size == (32, 48) and before.threads == ()
    assert before.uptime_s == 0 == before.in_engine_s
    assert before.outlets == () and before.reading is None
    assert [(one.name, one.uri, one.size, one.error) for one in before.sources] == [
        ("door", "numbers", None, None), ("yard", "numbers", None, None)
    ]  # fmt: skip
    assert [one.status.state for one in before.sources] == ["opening", "opening"]

    with Outlet(Shelf(), name="shelf") as outlet:
        with streams:
            for taken, stream in enumerate(streams, 1):
                outlet.write(stream.result)
                if taken == 1:
                    during = streams.stats([outlet], READING)
        after = streams.stats([outlet])
    assert set(during.threads) >= {"edgeseg-inference", "edgeseg-finishing", "edgeseg-outlet-shelf"}
    assert during.reading is READING and during.uptime_s > 0
    (shelf,) = during.outlets
    assert (shelf.name, shelf.policy, shelf.error) == ("shelf", "wait", None)

    door, yard = after.sources
    assert door.summary == streams.ledgers["door"].summary()
    assert (door.summary.frames, door.tally, door.superseded) == (20, Tally(delivered=20), 0)
    assert (yard.summary.frames, yard.tally.delivered, yard.error) == (4, 4, "the cable is out")
    assert door.size == (24, 36) and door.error is None and door.fps > 0
    assert (door.status.state, yard.status.reason) == ("ended", "the cable is out")
    # The outlet is not the run's, and its thread lived when it was asked.
    assert after.threads == ("edgeseg-outlet-shelf",)
    assert streams.stats([outlet]).threads == ()
    assert after.uptime_s == streams.stats().uptime_s


def test_stats_of_a_pipeline_are_those_of_one_source() -> None:
    with Pipeline(Stripes(), Numbers(7)) as results:
        assert len(list(results)) == 7
    stats = results.stats(reading=READING)
    (source,) = stats.sources
    assert source.name == "source" and source.summary == results.ledger.summary()
    assert stats.reading is READING


def test_password_is_not_told() -> None:
    uri = "rtsp://guard:swordfish@10.0.0.7/stream1"
    source = LiveSource(uri, lambda frames, closed: _Dead(), name="the camera")
    with Streams(Stripes(), {"camera": source}) as streams:
        stats = streams.stats()
    assert stats.sources[0].uri == "rtsp://guard:***@10.0.0.7/stream1"
    assert "swordfish" not in json.dumps(stats.to_dict())


def test_time_inside_the_engine() -> None:
    clock, inside, go_on = FakeClock(), threading.Event(), threading.Event()

    def outputs(index: int) -> None:
        if index == 1:
            inside.set()
            assert go_on.wait(PATIENCE_S)

    with Streams(Flights(2, before_outputs=outputs), {"a": Numbers(5)}, clock=clock) as streams:
        results = iter(streams)
        next(results)
        assert inside.wait(PATIENCE_S)
        assert streams.stats().in_engine_s == 0
        clock.ns += 7_500_000_000
        assert streams.stats().in_engine_s == 7.5
        assert streams.stats().uptime_s == 7.5
        go_on.set()
        assert len(list(results)) == 4
        assert streams.stats().in_engine_s == 0


def test_stats_from_many_threads_at_once() -> None:
    streams = Streams(Stripes(), {"a": Numbers(200), "b": Numbers(200), "c": Numbers(200)})
    ended, wrong = threading.Event(), []

    def ask() -> None:
        frames = 0
        while not ended.wait(0.002):
            stats = streams.stats(reading=READING)
            now = sum(source.summary.frames for source in stats.sources)
            if now < frames or len(json.dumps(stats.to_dict())) < 100:
                wrong.append(stats)
            frames = now

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        with streams:
            assert len(list(streams)) == 600
    finally:
        ended.set()
        for asker in askers:
            asker.join()
    assert wrong == []


def test_to_dict_is_json_with_everything_in_it() -> None:
    with (
        Outlet(Shelf(), name="page", policy="drop") as outlet,
        Streams(Stripes(), {"a": Numbers(3)}) as streams,
    ):
        assert len(list(streams)) == 3
        stats = streams.stats([outlet], READING)
    time.sleep(0.002)
    found = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert set(found) == set(stats.__dataclass_fields__)
    assert found["network_size"] == [32, 48]
    assert found["reading"] == {
        "cpu_percent": 85.0, "rss_mb": 120.5, "gpu_percent": None, "gpu_memory_mb": None,
        "temperature_c": 61.5, "power_w": None, "throttled": False, "sources": ["psutil"],
    }  # fmt: skip
    (source,) = found["sources"]
    assert set(source) == set(stats.sources[0].__dataclass_fields__)
    assert source["summary"] == json.loads(json.dumps(stats.sources[0].summary.to_dict()))
    assert source["tally"]["delivered"] == 3 and source["size"] == [24, 36]
    assert (source["status"]["state"], source["status"]["reason"]) == ("ended", "it is at its end")
    assert source["status"]["for_s"] >= 0.002
    (page,) = found["outlets"]
    assert (page["name"], page["policy"], page["written"], page["error"]) == (
        "page",
        "drop",
        0,
        None,
    )


def test_stats_after_an_error_of_the_engine() -> None:
    streams = Streams(Stripes(failing(2, EngineError("gone"))), {"a": Numbers(9)})
    with pytest.raises(EngineError), streams:
        list(streams)
    stats = streams.stats()
    assert stats.threads == () and stats.in_engine_s == 0
    assert stats.sources[0].error is None and stats.sources[0].summary.frames == 2


def test_masks_that_were_not_taken_are_counted() -> None:
    done = threading.Event()

    def capture(index: int) -> None:
        if index == 250:
            done.set()

    source = Numbers(250, live=True, before=capture)
    with Streams(Stripes(), {"a": source}) as streams:
        taken = 0
        for stream in streams:
            taken += 1
            assert np.all(stream.result.frame.pixels == stream.result.index)
            assert done.wait(PATIENCE_S)
    (one,) = streams.stats().sources
    assert one.superseded == one.summary.frames - taken
    assert one.summary.frames + one.summary.dropped == 250
