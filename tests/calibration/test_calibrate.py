"""Ranges and scales of a whole graph, what is kept of them, and how they follow a training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx

from edgeseg.bundle import Bundle
from edgeseg.calibration.calibrate import Calibrated, Pictures, calibrate
from edgeseg.calibration.frames import open_frames
from edgeseg.calibration.graph import prepared
from edgeseg.calibration.ranges import weight_scales
from edgeseg.calibration.recipe import QuantizationRecipe
from edgeseg.errors import CalibrationError, RequestError

if TYPE_CHECKING:
    from tests.calibration.conftest import Fork, Workbench

PLAIN = QuantizationRecipe(ranges="minmax", equalize=0.0)


@dataclass(frozen=True)
class Setting:
    """A model and frames to calibrate it with."""

    model: onnx.ModelProto
    pictures: Pictures

    def calibrate(self, recipe: QuantizationRecipe) -> Calibrated:
        return calibrate(self.model, self.pictures, recipe)


@pytest.fixture(scope="module")
def setting(fork: Fork, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    bundle = Bundle.open(fork.folder)
    folder = tmp_path_factory.mktemp("frames")
    sets = [
        open_frames(str(fork.frames(folder / name, count, first)), bundle.spec)
        for name, count, first in (("one", 3, 10), ("other", 2, 50))
    ]
    model = onnx.load_model_from_string(bundle.model.content)
    return Setting(model, Pictures(sets))


@pytest.fixture(scope="module")
def evened(setting: Setting) -> Calibrated:
    """The model by the default recipe; not to be changed."""
    return setting.calibrate(QuantizationRecipe())


def test_pictures_of_several_sets_come_as_often_as_wanted(setting: Setting) -> None:
    once, again = list(setting.pictures), list(setting.pictures)
    assert len(setting.pictures) == len(once) == 5
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


def test_thresholds_are_those_of_the_tensors(setting: Setting, bench: Workbench) -> None:
    """Against the largest magnitudes that ONNX Runtime gives, frame by frame."""
    found = setting.calibrate(PLAIN)
    tensors = sorted(found.thresholds)
    largest = dict.fromkeys(tensors, 0.0)
    for pixels in setting.pictures:
        for name, values in bench.run(prepared(setting.model).model, pixels, *tensors).items():
            largest[name] = max(largest[name], float(np.abs(values).max()))
    assert found.thresholds == pytest.approx(largest, rel=1e-5)
    for layer in found.graph.layers():
        weight = found.graph.floats(layer.weight)
        np.testing.assert_allclose(
            found.weight_scales[layer.name], np.abs(weight).max(axis=(1, 2, 3)) / 127, rtol=1e-6
        )


def test_evened_channels_compute_the_same(
    setting: Setting, evened: Calibrated, bench: Workbench
) -> None:
    before = prepared(setting.model).model
    for pixels in setting.pictures:
        wanted = bench.run(before, pixels, "logits")["logits"]
        found = bench.run(evened.graph.model, pixels, "logits")["logits"]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    # And what was seen is of the evened graph.
    tensor = "wide.out"
    peaks = np.max(
        [
            np.abs(bench.run(evened.graph.model, pixels, tensor)[tensor]).max(axis=(0, 2, 3))
            for pixels in setting.pictures
        ],
        axis=0,
    )
    np.testing.assert_allclose(evened.observations[tensor].channel_peak, peaks, rtol=1e-5)


def test_any_set_of_layers_can_be_left_in_floats(evened: Calibrated, fork: Fork) -> None:
    """Every tensor that any of them needs was observed, and groups have their widest range."""
    for count in range(len(fork.LAYERS) + 1):
        for floats in itertools.combinations(fork.LAYERS, count):
            placement = evened.placement(floats)
            scales = evened.scales(placement)
            for group, tensors in placement.groups().items():
                widest = max(evened.thresholds[tensor] for tensor in tensors)
                assert scales.activations[group] == np.float32(widest / 127)
            assert set(scales.weights) == set(fork.LAYERS) - set(floats)
            names = {node.op_type for node in evened.model(floats).graph.node}
            assert ("QuantizeLinear" in names) == (count < len(fork.LAYERS))


@pytest.mark.parametrize(
    ("floats", "words"),
    [
        (("wide", "hide"), "no layer 'hide' to leave in floating point; the layers are first"),
        (("",), "no layer '' to leave"),
        (("first", "wide", "narrow", "left", "right", "classify"), "nothing is left to quantize"),
    ],
)
def test_layers_to_leave_out_are_checked_first(
    setting: Setting, floats: tuple[str, ...], words: str
) -> None:
    stages: list[str] = []

    @contextmanager
    def noted(title: str) -> Iterator[Callable[[int, int], None]]:
        stages.append(title)
        yield lambda done, total: None

    with pytest.raises(RequestError, match=words):
        calibrate(setting.model, setting.pictures, replace(PLAIN, floats=floats), stage=noted)
    assert stages == []


def test_no_frames(setting: Setting) -> None:
    with pytest.raises(CalibrationError, match="no frame"):
        calibrate(setting.model, Pictures([]), PLAIN)


# --- what is kept


def test_kept_calibrations_are_the_same_bit_by_bit(evened: Calibrated, tmp_path: Path) -> None:
    evened.save(tmp_path / "kept", "streets")
    found = Calibrated.load(tmp_path / "kept", "streets")
    assert found is not None
    assert found.thresholds == evened.thresholds
    assert found.graph.model == evened.graph.model
    assert set(found.weight_scales) == set(evened.weight_scales)
    for name, scales in evened.weight_scales.items():
        np.testing.assert_array_equal(found.weight_scales[name], scales)
    for name, seen in evened.observations.items():
        again = found.observations[name]
        assert again.histogram.to_dict() == seen.histogram.to_dict()
        np.testing.assert_array_equal(again.channel_mean, seen.channel_mean)
        np.testing.assert_array_equal(again.channel_peak, seen.channel_peak)
    for floats in ((), ("narrow",)):
        one, other = found.model(floats), evened.model(floats)
        assert one.SerializeToString(deterministic=True) == other.SerializeToString(
            deterministic=True
        )
    # Saved again over the old one; and nothing of something else is taken.
    evened.save(tmp_path / "kept", "fields")
    assert Calibrated.load(tmp_path / "kept", "streets") is None
    assert Calibrated.load(tmp_path / "kept", "fields") is not None
    assert Calibrated.load(tmp_path / "nowhere", "fields") is None
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["graph.onnx", "arrays.npz", "calibrated.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "changed", "other"])
def test_damaged_calibrations_are_made_again(
    evened: Calibrated, tmp_path: Path, name: str, damage: str
) -> None:
    evened.save(tmp_path / "kept", "streets")
    path = tmp_path / "kept" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :]
        path.write_bytes(
            {"empty": b"", "cut": content[:-7], "changed": changed, "other": b"[1, 2]"}[damage]
        )
    assert Calibrated.load(tmp_path / "kept", "streets") is None


def test_a_place_that_cannot_be_written(evened: Calibrated, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be written"):
        evened.save(tmp_path / "no" / "kept", "streets")


# --- after a training


def test_trained_numbers_replace_measured_ones(evened: Calibrated) -> None:
    placement = evened.placement(("narrow",))
    scales = evened.scales(placement)
    trained = replace(
        scales,
        activations={group: float(np.float32(1.1 * s)) for group, s in scales.activations.items()},
        weights={name: 2 * values for name, values in scales.weights.items()},
    )
    found = evened.trained(evened.graph, placement, trained)
    again = found.scales(placement)
    assert again.activations == trained.activations
    for name, values in trained.weights.items():
        np.testing.assert_array_equal(again.weights[name], values)
    # The layer that was left alone can still be quantized, as before.
    layer = next(each for each in evened.graph.layers() if each.name == "narrow")
    np.testing.assert_array_equal(
        found.scales(found.placement()).weights["narrow"],
        weight_scales(evened.graph.floats(layer.weight), layer.axis),
    )
