"""Profiling: what is counted, and the keys that others rely on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edgeseg.engine import Engine
from edgeseg.engine.layers import LayerTime
from edgeseg.errors import RequestError, SourceError
from edgeseg.frame import Pixels
from edgeseg.model import Model, load
from edgeseg.profile import MachineUse, peak_rss_mb, profile
from edgeseg.profile.machine import Sample, SensorWatch
from edgeseg.profile.timeline import Timeline
from edgeseg.sensors import Reading, Sensors

STREET = "synthetic:?size=48x64&frames=0"


@pytest.fixture
def model(bundle_folder: Path) -> Iterator[Model]:
    with load(bundle_folder) as model:
        yield model


def test_profile(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    found = profile(
        model, STREET, frames=12, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 12) for done in range(1, 13)]
    summary = found.summary
    assert (summary.frames, summary.dropped, found.live) == (12, 0, False)
    assert (found.frame_size, found.network_size) == ((48, 64), (32, 48))
    assert list(summary.stages) == ["capture", "fit", "network", "head", "restore"]
    for times in summary.stages.values():
        assert 0 <= times.p50_ms <= times.p95_ms <= times.p99_ms
    assert 0 < summary.mask_age_ms.p50 <= summary.mask_age_ms.p99
    assert summary.fps > 0
    assert found.last.index == 11
    # Tests may share their machine.
    assert [note for note in found.notes if not note.startswith("Other programs")] == []
    assert 20 < found.peak_rss_mb <= peak_rss_mb()


def test_json(model: Model) -> None:
    found = profile(model, STREET, frames=3)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {
        "fps",
        "frames",
        "dropped",
        "engine",
        "stages",
        "mask_age_ms",
        "peak_rss_mb",
    } <= content.keys()
    assert content["engine"] == model.engine.name
    assert content["stages"].keys() == {"capture", "fit", "network", "head", "restore"}
    assert all(
        times.keys() == {"p50_ms", "p95_ms", "p99_ms"} for times in content["stages"].values()
    )
    assert content["mask_age_ms"].keys() == {"p50", "p99"}
    assert (content["frames"], content["dropped"]) == (3, 0)
    assert (content["frame_size"], content["network_size"]) == ([48, 64], [32, 48])


def test_text_and_page(model: Model) -> None:
    found = profile(model, STREET, frames=3)
    text = found.render()
    for part in ("tiny on ", STREET, "64x48 frames, network 48x32", "3  frames, 0 dropped"):
        assert part in text
    for stage in found.summary.stages:
        assert f"\n{stage} " in text
    page = found.report().to_html()
    for part in ("tiny: ", "frames per second", "Where the time of a frame goes", "restore"):
        assert part in page
    assert page.count("data:image/") == 2


def test_live_source(model: Model) -> None:
    found = profile(model, "synthetic:?size=48x64&frames=0&live=1&fps=100", frames=3)
    assert found.live and found.summary.frames >= 3


def test_too_little_to_measure(model: Model) -> None:
    with pytest.raises(SourceError, match="gave 1 frames, and a profile needs two or more"):
        profile(model, "synthetic:?size=48x64&frames=1", frames=5)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_seconds_that_cannot_be(model: Model, seconds: float) -> None:
    with pytest.raises(RequestError, match="more than 0 seconds"):
        profile(model, STREET, seconds=seconds)


def test_one_frame_is_no_profile(model: Model) -> None:
    with pytest.raises(RequestError, match="2 frames or more, and 1 came"):
        profile(model, STREET, frames=1)


def test_a_hundred_frames_when_nothing_is_said(model: Model) -> None:
    assert profile(model, STREET).summary.frames == 100


def test_for_seconds(model: Model) -> None:
    began = time.monotonic()
    found = profile(model, STREET, seconds=0.3)
    assert time.monotonic() - began >= 0.3
    # The frames that were on their way at the end were not dropped by a source that drops none.
    assert found.summary.dropped == 0
    assert found.notes == () or "Other programs" in found.notes[0]
    assert profile(model, STREET, seconds=60, frames=5).summary.frames == 5


def test_the_end_of_the_time_is_not_the_end_of_the_source(model: Model) -> None:
    # The last mask was finished long before the time was over, and taken late.
    late = profile(
        model, STREET, seconds=0.3, progress=lambda done, _: time.sleep(0.4 if done == 2 else 0)
    )
    assert not [note for note in late.notes if "ended" in note]


def test_a_source_that_ends_early_is_told(model: Model) -> None:
    source = "synthetic:?size=48x64&frames=4"
    found = profile(model, source, frames=9)
    assert found.notes[0] == "The source ended after 4 of the 9 frames asked for."
    assert "4 of the 9" in found.render() and "4 of the 9" in found.report().to_html()
    found = profile(model, source, seconds=600)
    assert found.notes[0].startswith("The source ended after 0.")


def test_warm_up_does_not_count(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    plain = type(model.engine).run

    def counted(engine: Any, pixels: Pixels) -> Any:
        runs.append(1)
        return plain(engine, pixels)

    monkeypatch.setattr(type(model.engine), "run", counted)
    found = profile(model, STREET, frames=4, warm_up=7)
    assert found.summary.frames == 4
    assert 11 <= len(runs) <= 11 + 4


# --- stopping


def interrupted_after(frames: int) -> Any:
    def update(done: int, total: int) -> None:
        if done == frames:
            raise KeyboardInterrupt

    return update


def test_ctrl_c_gives_what_was_measured(model: Model) -> None:
    found = profile(model, STREET, frames=500, progress=interrupted_after(6))
    assert found.stopped and found.to_dict()["stopped"] is True
    assert len(found.timeline) == 6 and 6 <= found.summary.frames < 500
    assert "It was stopped after 6 frames" in found.render()


def test_ctrl_c_before_anything_was_measured(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Model, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        profile(model, STREET)


# --- the timeline


class Finished:
    """A result with nothing but its times."""

    def __init__(self, captured_ms: float, finished_ms: float) -> None:
        self.finished_ns = round(finished_ms * 1e6)
        self.frame = self
        self.captured_ns = round(captured_ms * 1e6)


def test_timeline() -> None:
    timeline = Timeline()
    ends = np.cumsum([50.0, 10, 10, 10, 30, 10])
    for end in ends:
        timeline.add(cast(Any, Finished(end - 25, end)))
    np.testing.assert_allclose(timeline.seconds, (ends - 50) / 1e3)
    np.testing.assert_allclose(timeline.intervals_ms, [10, 10, 10, 30, 10])
    np.testing.assert_allclose(timeline.ages_ms, 25)
    found = timeline.intervals()
    assert found.p50_ms == 10
    assert found.deviation_ms == pytest.approx(8.0)
    assert found.p99_minus_p50_ms == pytest.approx(np.percentile([10, 10, 10, 30, 10], 99) - 10)
    assert Timeline().intervals().p99_ms == 0


# --- the machine


NOTHING = Reading(None, None, None, None, None, None, None, ("psutil",))


def at(seconds: float, **values: Any) -> Sample:
    return Sample(seconds, Reading(**{**vars(NOTHING), **values}))


def test_use_of_the_machine() -> None:
    first = Reading(5.0, 100.0, None, None, 40.0, 99.0, False, ("psutil", "RAPL"))
    samples = [
        at(1.0, power_w=10.0, cpu_percent=100.0, temperature_c=50.0, throttled=False),
        # A reading that lacks it stands for no time.
        at(2.0, cpu_percent=100.0, temperature_c=60.0, throttled=True, gpu_memory_mb=7.0),
        at(5.0, power_w=20.0, cpu_percent=200.0, temperature_c=55.0, rss_mb=120.0, throttled=False),
    ]
    use = MachineUse.of(first, samples, 8.0, busy_percent=260.0)
    # 10 W for 1 s and 20 W for 3 s.
    assert use.power_w == pytest.approx(17.5)
    assert use.joules_per_frame == pytest.approx(17.5 / 8)
    assert use.cpu_percent == pytest.approx(160)
    assert use.others_percent == pytest.approx(100)
    assert (use.temperature_start_c, use.temperature_end_c, use.temperature_max_c) == (40, 55, 60)
    assert (use.throttled, use.rss_mb, use.gpu_memory_mb, use.gpu_percent) == (True, 120, 7, None)
    assert use.sources == ("psutil", "RAPL")
    rows = dict(use.rows(150.0))
    assert rows["energy"].startswith("2.188 J per frame")
    assert rows["throttling"].startswith("yes") and rows["GPU"] == "not available"
    assert rows["temperature"] == "40 °C at the start, 55 °C at the end, 60 °C at most"
    json.dumps(use.to_dict(), allow_nan=False)


def test_what_is_not_available_is_said(model: Model) -> None:
    class Blind(Sensors):
        def read(self) -> Reading:
            return NOTHING

    found = profile(model, STREET, frames=3, sensors=Blind())
    text = found.render()
    for name in ("GPU", "GPU memory", "power", "energy", "temperature", "throttling"):
        assert f"\n{name:<12} not available" in text
    machine = cast("dict[str, object]", found.to_dict()["machine"])
    assert machine["power_w"] is None and machine["throttled"] is None
    assert "not available" in found.report().to_html()


def test_a_throttled_run_says_so_first(model: Model) -> None:
    class Hot(Sensors):
        def read(self) -> Reading:
            return Reading(50.0, 80.0, None, None, 96.0, 12.0, True, ("psutil", "sysfs"))

    found = profile(model, STREET, frames=40, sensors=Hot())
    assert found.use.throttled and found.use.temperature_max_c == 96.0
    page = found.report().to_html()
    assert page.index("slowed itself down") < page.index("Over time")


def test_readings_of_a_long_run_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeseg.profile.machine._REMEMBERED", 30)

    class Quick(Sensors):
        def __init__(self) -> None:
            self.reads = 0

        def read(self) -> Reading:
            self.reads += 1
            return NOTHING

        def close(self) -> None:
            raise AssertionError("they are somebody else's")

    sensors = Quick()
    with SensorWatch(sensors, period_s=1e-4) as watch:
        while sensors.reads < 100:
            time.sleep(1e-3)
    assert 10 <= len(watch.samples) <= 30
    seconds = [sample.seconds for sample in watch.samples]
    assert seconds == sorted(seconds)


def test_source_that_is_not_there(model: Model) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        profile(model, "none.mp4")


class Layered:
    """An engine that also times its layers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seen: list[Sequence[Pixels]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def layer_times(self, images: Sequence[Pixels]) -> list[tuple[str, float]]:
        self.seen.append(images)
        return [("stem", 0.25), ("head + argmax", 1.5), ("middle", 0.5)]


LAYERS = (LayerTime("stem", 0.25), LayerTime("head + argmax", 1.5), LayerTime("middle", 0.5))


def test_layers(model: Model) -> None:
    engine = Layered(model.engine)
    found = profile(Model(model.bundle, cast(Engine, engine)), STREET, frames=3, layers=True)
    assert found.layers == LAYERS
    assert found.to_dict()["layers"] == [
        {"name": "stem", "ms": 0.25, "kind": ""},
        {"name": "head + argmax", "ms": 1.5, "kind": ""},
        {"name": "middle", "ms": 0.5, "kind": ""},
    ]
    lines = found.render().splitlines()
    at = next(i for i, line in enumerate(lines) if "slowest of 3 layers" in line)
    assert [line.split(None, 4)[2:] for line in lines[at + 1 : at + 4]] == [
        ["66.7", "%", "head + argmax"],
        ["22.2", "%", "middle"],
        ["11.1", "%", "stem"],
    ]
    page = found.report().to_html()
    assert "head + argmax" in page and "66.7 %" in page
    (images,) = engine.seen
    for image in images:
        np.testing.assert_array_equal(image, found.last.geometry.fit(found.last.frame.pixels))


class Plain:
    """An engine without times of layers."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.spec = engine.name, engine.spec


def test_an_engine_that_cannot_time_layers_says_so(model: Model) -> None:
    with pytest.raises(RequestError, match="openvino cannot time the single layers of tiny"):
        plain = cast(Engine, Plain(model.engine))
        profile(Model(model.bundle, plain), STREET, frames=3, layers=True)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("head", [True, False])
def test_layers_of_the_engines_here(bundle_folder: Path, engine: str, head: bool) -> None:
    pytest.importorskip(engine)
    with load(bundle_folder, engine=engine, threads=1, compiled_head=head) as model:
        pixels = np.zeros((32, 48, 3), np.uint8)
        before = model.engine.run(pixels)
        found = profile(model, STREET, frames=2, layers=True)
        # Both name what they run; the convolution is the graph's only one.
        kinds = ("Convolution f32", "Conv f32")
        (convolution,) = (layer for layer in found.layers if layer.kind in kinds)
        # OpenVINO keeps the node's name, ONNX Runtime that of what it gives.
        assert convolution.name in ("conv", "logits")
        assert all(layer.ms >= 0 for layer in found.layers)
        # The upsampling is a layer only where it runs in the graph.
        upsampling = [
            layer for layer in found.layers if layer.kind.split()[0] in ("Upsample", "Interpolate")
        ]
        assert len(upsampling) == (0 if head else 1)
        after = model.engine.run(pixels)
        np.testing.assert_array_equal(cast(Any, before).class_map, cast(Any, after).class_map)
        with pytest.raises(RequestError, match="none came"):
            cast(Any, model.engine).layer_times([])
