"""What is seen of a graph's tensors, against ONNX Runtime asked for them directly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
from numpy.typing import NDArray

from edgeseg.calibration import observe as module
from edgeseg.calibration.observe import Observation, observe, opened, run
from edgeseg.errors import CalibrationError
from edgeseg.frame import Pixels

if TYPE_CHECKING:
    from tests.calibration.conftest import Workbench

NET = """
    a = Conv(x, kernel=3)
    r = Relu(a)
    b = Conv(r, out=6)
    p = GlobalAveragePool(b)
    f = Flatten(p)
    y = Linear(f, into=6, out=3)
    h = Head(b)
"""
TENSORS = ["x", "a", "r", "b", "p", "f", "y"]


@pytest.fixture(scope="module")
def model(bench: Workbench) -> onnx.ModelProto:
    return bench.graph(NET).model


def test_run_gives_what_the_runtime_gives(bench: Workbench, model: onnx.ModelProto) -> None:
    frames = bench.pictures(3)
    before = model.SerializeToString()
    found = list(run(model, TENSORS, frames))
    assert model.SerializeToString() == before
    for values, pixels in zip(found, frames, strict=True):
        wanted = bench.run(model, pixels, *TENSORS)
        assert list(values) == TENSORS
        for name in TENSORS:
            assert values[name].dtype == np.float32
            assert np.allclose(values[name], wanted[name], rtol=1e-5, atol=1e-4), name


def test_run_keeps_what_it_gave(bench: Workbench, model: onnx.ModelProto) -> None:
    one, other = run(model, ["a"], bench.pictures(2))
    assert not np.array_equal(one["a"], other["a"])


def test_only_what_is_asked_for_is_run(model: onnx.ModelProto) -> None:
    session = opened(model, ["r"])
    assert [output.name for output in session.get_outputs()] == ["r"]


def check(
    bench: Workbench,
    model: onnx.ModelProto,
    frames: list[Pixels],
    found: dict[str, Observation],
) -> None:
    assert list(found) == TENSORS
    for name, seen in found.items():
        values = np.stack([bench.run(model, pixels, name)[name][0] for pixels in frames])
        assert seen.histogram.count == values.size
        assert seen.histogram.minimum == pytest.approx(values.min(), rel=1e-5)
        assert seen.histogram.maximum == pytest.approx(values.max(), rel=1e-5)
        channels = np.moveaxis(values.astype(np.float64), 1, 0).reshape(values.shape[1], -1)
        assert seen.channel_peak == pytest.approx(np.abs(channels).max(axis=1), rel=1e-5)
        assert seen.channel_mean == pytest.approx(channels.mean(axis=1), rel=1e-4, abs=1e-4)
        assert seen.positions == channels.shape[1]


def test_observations(bench: Workbench, model: onnx.ModelProto) -> None:
    frames = bench.pictures(3)
    steps: list[tuple[int, int]] = []
    found = observe(
        model, TENSORS, frames, total=3, progress=lambda done, total: steps.append((done, total))
    )
    check(bench, model, frames, found)
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("limit", "passes"), [(1, 7), (1 << 10, 5), (1 << 11, 3), (1 << 20, 1)])
def test_passes(
    bench: Workbench,
    model: onnx.ModelProto,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    passes: int,
) -> None:
    frames = bench.pictures(2)
    whole = observe(model, TENSORS, frames, total=2)
    monkeypatch.setattr(module, "_BYTES_A_PASS", limit)
    steps: list[tuple[int, int]] = []
    found = observe(
        model, TENSORS, frames, total=2, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(done + 1, 2 * passes) for done in range(2 * passes)]
    for name in TENSORS:
        assert found[name].histogram.to_dict() == whole[name].histogram.to_dict()
        assert np.array_equal(found[name].channel_peak, whole[name].channel_peak)
        assert np.array_equal(found[name].channel_sum, whole[name].channel_sum)


def test_no_tensors(bench: Workbench, model: onnx.ModelProto) -> None:
    assert observe(model, [], bench.pictures(1), total=1) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number(bench: Workbench, value: float) -> None:
    graph = bench.graph("a = Conv(x); b = Conv(a); c = Conv(b)")
    bias = graph.floats("b.bias")
    bias[2] = value
    graph.put("b.bias", bias)
    with pytest.raises(CalibrationError, match=r"^b cannot be calibrated: .*in floating point$"):
        observe(graph.model, ["a", "b", "c"], bench.pictures(1), total=1)


def test_no_frames(
    bench: Workbench, model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalibrationError, match=r"there is no frame .* where 2 were promised"):
        observe(model, TENSORS, [], total=2)

    def once() -> Iterator[Pixels]:
        yield from bench.pictures(2)

    # A generator is used up by the first pass.
    monkeypatch.setattr(module, "_BYTES_A_PASS", 1)
    with pytest.raises(CalibrationError, match=r"there is no frame .* where 2 were promised"):
        observe(model, TENSORS, once(), total=2)


# shapes of the frames' tensor, channels that are kept of it
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((1, 5, 4, 3), 5),
    ((2, 5, 4, 3), 5),
    ((1, 5, 7), 5),
    ((3, 5), 5),
    ((5,), 0),
    ((), 0),
    ((1, 5, 0, 3), 0),
]


@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_channels(shape: tuple[int, ...], channels: int) -> None:
    rng = np.random.default_rng(0)
    frames: list[NDArray[np.float32]] = [
        np.asarray(rng.normal(1, 2, shape), np.float32) for _ in range(3)
    ]
    seen = Observation()
    for values in frames:
        seen.add(values)
    assert seen.histogram.count == sum(values.size for values in frames)
    assert seen.channel_peak.shape == seen.channel_mean.shape == (channels,)
    if channels:
        rows = np.concatenate([np.moveaxis(v, 1, 0).reshape(channels, -1) for v in frames], axis=1)
        assert np.array_equal(seen.channel_peak, np.abs(rows).max(axis=1))
        assert seen.channel_mean == pytest.approx(rows.mean(axis=1, dtype=np.float64))
