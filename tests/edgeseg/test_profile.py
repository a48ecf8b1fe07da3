"""Profiling: what is counted, and the keys that others rely on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edgeseg.engine import Engine
from edgeseg.errors import RequestError, SourceError
from edgeseg.frame import Pixels
from edgeseg.model import Model, load
from edgeseg.profile import peak_rss_mb, profile

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
    assert (found.last.index, found.notes) == (11, ())
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


@pytest.mark.parametrize("frames", [1, 5])
def test_too_little_to_measure(model: Model, frames: int) -> None:
    with pytest.raises(SourceError, match="gave 1 frames, and a profile needs two or more"):
        profile(model, "synthetic:?size=48x64&frames=1", frames=frames)


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


def test_layers(model: Model) -> None:
    engine = Layered(model.engine)
    found = profile(Model(model.bundle, cast(Engine, engine)), STREET, frames=3, layers=True)
    assert found.layers == (("stem", 0.25), ("head + argmax", 1.5), ("middle", 0.5))
    assert found.to_dict()["layers"] == [
        {"name": "stem", "ms": 0.25},
        {"name": "head + argmax", "ms": 1.5},
        {"name": "middle", "ms": 0.5},
    ]
    lines = found.render().splitlines()
    at = next(i for i, line in enumerate(lines) if "slowest of 3 layers" in line)
    assert [line.split("ms  ")[1] for line in lines[at + 1 : at + 4]] == [
        "head + argmax",
        "middle",
        "stem",
    ]
    assert "head + argmax" in found.report().to_html()
    (images,) = engine.seen
    for image in images:
        np.testing.assert_array_equal(image, found.last.geometry.fit(found.last.frame.pixels))


def test_an_engine_that_cannot_time_layers_says_so(model: Model) -> None:
    with pytest.raises(RequestError, match="timed by TensorRT only, and tiny is on openvino"):
        profile(model, STREET, frames=3, layers=True)
