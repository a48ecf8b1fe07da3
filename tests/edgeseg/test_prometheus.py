"""The page for Prometheus, read back with the parser of prometheus_client."""

from __future__ import annotations

import builtins
import re
import sys
from dataclasses import replace
from typing import Any

import pytest

from edgeseg.errors import RequestError
from edgeseg.ledger import MaskAge, StageTimes, Summary
from edgeseg.prometheus import CONTENT_TYPE, exposition
from edgeseg.sensors import Reading
from edgeseg.sink.outlet import OutletStats
from edgeseg.source import Status, Tally
from edgeseg.stats import SourceStats, Stats

NOTHING = Reading(None, None, None, None, None, None, None, ())

DOOR = SourceStats(
    name='the "door"\\',
    uri="rtsp://guard:***@10.0.0.7/1",
    status=Status("stalled", 1_000_000_000, "nothing new came"),
    tally=Tally(delivered=900, dropped=40, damaged=3, stale=2, reconnects=7),
    size=(1080, 1920),
    fps=29.75,
    summary=Summary(
        fps=28.5,
        frames=870,
        dropped=70,
        stages={"capture": StageTimes(33.0, 34.0, 40.0), "network": StageTimes(8.0, 9.5, 12.0)},
        mask_age_ms=MaskAge(21.0, 48.0),
    ),
    superseded=5,
    error=None,
)
YARD = SourceStats(
    name="yard",
    uri="1",
    status=Status("ended", 5, "it is gone"),
    tally=Tally(),
    size=None,
    fps=0.0,
    summary=Summary(0.0, 0, 0, {}, MaskAge(0.0, 0.0)),
    superseded=0,
    error="it is gone",
)
STATS = Stats(
    model="streets",
    engine="openvino",
    description="OpenVINO 2026.1, CPU, 2 threads,\nhead compiled",
    network_size=(360, 480),
    uptime_s=3600.5,
    in_engine_s=0.01,
    threads=("edgeseg-capture-door", "edgeseg-inference"),
    sources=(DOOR, YARD),
    outlets=(
        OutletStats("video", "wait", 800, 0, 1, 0.25, None),
        OutletStats("page", "drop", 700, 100, 0, 0.0, "it took too long"),
    ),
    reading=Reading(150.0, 512.0, 70.0, 1024.0, 65.5, 9.75, True, ("psutil", "NVML")),
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(page: bytes) -> Samples:
    """Every sample of a page by its name and labels; no two alike."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Samples = {}
    for family in text_string_to_metric_families(page.decode()):
        assert family.documentation.endswith(".") and family.name.startswith("edgeseg_")
        assert family.samples
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_page_says_what_the_stats_say() -> None:
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    found = parsed(exposition(STATS))
    run = {
        "model": "streets", "engine": "openvino", "description": STATS.description,
        "network_height": "360", "network_width": "480",
    }  # fmt: skip
    assert value(found, "edgeseg_run_info", **run) == 1
    assert value(found, "edgeseg_uptime_seconds") == 3600.5
    assert value(found, "edgeseg_in_engine_seconds") == 0.01
    assert value(found, "edgeseg_threads") == 2

    door = DOOR.name
    assert value(found, "edgeseg_source_info", source=door, uri=DOOR.uri) == 1
    states = {
        state: value(found, "edgeseg_source_state", source=door, state=state)
        for state in ("opening", "live", "stalled", "reconnecting", "ended")
    }
    assert states == {"opening": 0, "live": 0, "stalled": 1, "reconnecting": 0, "ended": 0}
    assert value(found, "edgeseg_source_state_seconds", source=door) > 0
    fates = {
        fate: value(found, "edgeseg_source_frames_total", source=door, fate=fate)
        for fate in ("delivered", "dropped", "damaged", "stale")
    }
    assert fates == {"delivered": 900, "dropped": 40, "damaged": 3, "stale": 2}
    assert value(found, "edgeseg_source_reconnects_total", source=door) == 7
    assert value(found, "edgeseg_source_size_pixels", source=door, side="height") == 1080
    assert value(found, "edgeseg_source_size_pixels", source=door, side="width") == 1920
    assert value(found, "edgeseg_source_failed", source=door) == 0
    assert value(found, "edgeseg_source_failed", source="yard") == 1

    assert value(found, "edgeseg_masks_total", source=door) == 870
    assert value(found, "edgeseg_masks_superseded_total", source=door) == 5
    assert value(found, "edgeseg_frames_dropped_total", source=door) == 70
    assert value(found, "edgeseg_masks_per_second", source=door) == 29.75
    for stage, times in DOOR.summary.stages.items():
        for quantile, ms in (("0.5", times.p50_ms), ("0.95", times.p95_ms), ("0.99", times.p99_ms)):
            seconds = value(
                found, "edgeseg_stage_seconds", source=door, stage=stage, quantile=quantile
            )
            assert seconds == pytest.approx(ms / 1000)
    for quantile, seconds in (("0.5", 0.021), ("0.99", 0.048)):
        assert value(
            found, "edgeseg_mask_age_seconds", source=door, quantile=quantile
        ) == pytest.approx(seconds)

    assert value(found, "edgeseg_outlet_written_total", outlet="video") == 800
    assert value(found, "edgeseg_outlet_dropped_total", outlet="page") == 100
    assert value(found, "edgeseg_outlet_waiting", outlet="video") == 1
    assert value(found, "edgeseg_outlet_busy_seconds", outlet="video") == 0.25
    assert value(found, "edgeseg_outlet_failed", outlet="video") == 0
    assert value(found, "edgeseg_outlet_failed", outlet="page") == 1

    assert value(found, "edgeseg_cpu_cores") == 1.5
    assert value(found, "edgeseg_resident_memory_bytes") == 512e6
    assert value(found, "edgeseg_gpu_usage_ratio") == pytest.approx(0.7)
    assert value(found, "edgeseg_gpu_memory_bytes") == 1024e6
    assert value(found, "edgeseg_temperature_celsius") == 65.5
    assert value(found, "edgeseg_power_watts") == 9.75
    assert value(found, "edgeseg_throttled") == 1


def test_types_are_those_of_the_names() -> None:
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    page = exposition(STATS).decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    assert len(types) == page.count("# TYPE") == page.count("# HELP")
    for name, kind in types.items():
        assert (kind == "counter") == name.endswith("_total"), name
    assert {name for name, kind in types.items() if kind == "summary"} == {
        "edgeseg_stage_seconds", "edgeseg_mask_age_seconds"
    }  # fmt: skip
    assert set(types.values()) == {"counter", "gauge", "summary"}


def test_what_is_not_known_is_absent() -> None:
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    found = parsed(exposition(replace(STATS, sources=(YARD,), outlets=(), reading=NOTHING)))
    names = {name for name, _ in found}
    machine = {"cpu_cores", "memory_bytes", "ratio", "celsius", "watts", "throttled"}
    assert not any(name.endswith(end) for name in names for end in machine)
    assert not any("outlet" in name for name in names)
    # No frame yet: no time of a stage, no age, no size; counts are 0, which is known.
    absent = {"edgeseg_stage_seconds", "edgeseg_mask_age_seconds", "edgeseg_source_size_pixels"}
    assert not names & absent
    assert value(found, "edgeseg_masks_total", source="yard") == 0
    assert {name for name, _ in parsed(exposition(replace(STATS, reading=None)))} == {
        name for name, _ in parsed(exposition(replace(STATS, reading=NOTHING)))
    }
    part = replace(NOTHING, temperature_c=0.0, throttled=False)
    found = parsed(exposition(replace(STATS, reading=part)))
    assert value(found, "edgeseg_temperature_celsius") == 0
    assert value(found, "edgeseg_throttled") == 0


def test_outlets_of_one_name_are_told_apart() -> None:
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    video = STATS.outlets[0]
    outlets = (video, replace(video, written=5), replace(video, written=6))
    found = parsed(exposition(replace(STATS, outlets=outlets)))
    assert [
        value(found, "edgeseg_outlet_written_total", outlet=name)
        for name in ("video", "video (2)", "video (3)")
    ] == [800, 5, 6]


def test_registry_is_its_own() -> None:
    client = pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    gauge = client.Gauge("not_of_edgeseg", "An application's own.")
    try:
        assert b"not_of_edgeseg" not in exposition(STATS)
        assert b"edgeseg_up" not in client.generate_latest()
    finally:
        client.REGISTRY.unregister(gauge)


def test_content_type_is_one_that_prometheus_reads() -> None:
    # https://prometheus.io/docs/instrumenting/exposition_formats/
    assert re.fullmatch(r"text/plain; version=0\.0\.4; charset=utf-8", CONTENT_TYPE)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *others)

    for name in list(sys.modules):
        if name.startswith("prometheus_client"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"pip install 'edgeseg\[serve\]'"):
        exposition(STATS)
