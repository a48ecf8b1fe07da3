"""A bundle quantized from end to end: what is written, and what happens when something is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeseg.bundle import Bundle, write_manifest
from edgeseg.calibration import package
from edgeseg.calibration.accuracy import figure
from edgeseg.calibration.calibrate import Calibrated, Stage
from edgeseg.calibration.package import QuantizeRequest, layer_names, quantize_bundle
from edgeseg.calibration.recipe import Finetuning, QuantizationRecipe
from edgeseg.calibration.sensitivity import Laboratory
from edgeseg.dataset import open_dataset
from edgeseg.engine import available_engines, open_engine
from edgeseg.errors import CalibrationError, EdgeSegError, RequestError
from edgeseg.evaluate import evaluate
from edgeseg.frame import Pixels

if TYPE_CHECKING:
    from tests.calibration.conftest import Fork

COUNT = 10
#: without it the channels of `Fork` are not evened, and INT8 fails
UNEVEN = QuantizationRecipe(equalize=0.0)


@dataclass(frozen=True)
class Place:
    """A bundle, frames to calibrate it with, and labelled ones."""

    fork: Fork
    frames: str
    data: str

    def request(self, **changes: Any) -> QuantizeRequest:
        """A request with every measurement, on one thread."""
        request = QuantizeRequest(str(self.fork.folder), (self.frames,), data=self.data, threads=1)
        return replace(request, **changes)


@pytest.fixture(scope="module")
def place(fork: Fork, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("frames")
    frames = fork.frames(folder / "calibration", COUNT)
    return Place(fork, str(frames), fork.camvid(folder / "camvid"))


@pytest.fixture(scope="module")
def int8(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that a request gives; not to be changed."""
    target = tmp_path_factory.mktemp("once") / "int8"
    quantize_bundle(place.request(sensitivity=True), target)
    return target


def contents(folder: Path) -> dict[str, str]:
    """Name -> sha256 of everything below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    return content


@dataclass
class Stages:
    """A ``Stage`` that notes what is shown, and is interrupted at the ``at``-th update of
    ``title``."""

    title: str = ""
    at: int = 1
    seen: list[str] = field(default_factory=list)
    updates: list[tuple[str, int, int]] = field(default_factory=list)

    @contextmanager
    def __call__(self, title: str) -> Iterator[Callable[[int, int], None]]:
        self.seen.append(title)

        def update(done: int, total: int) -> None:
            self.updates.append((title, done, total))
            if self.title and title.startswith(self.title) and done >= self.at:
                raise KeyboardInterrupt

        yield update


# --- what is written


def test_bundle_keeps_the_contract_on_every_engine(place: Place, int8: Path) -> None:
    before, after = Bundle.open(place.fork.folder), Bundle.open(int8)
    assert after.spec == replace(before.spec, name="int8")
    model = onnx.load_model(int8 / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    # Inputs of six layers, of which two read the same, the residual, and six weights.
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (6, 12)
    original = onnx.load_model(place.fork.folder / "model.onnx")
    assert list(model.graph.input) == list(original.graph.input)
    assert list(model.graph.output) == list(original.graph.output)
    dataset = open_dataset(place.data, "val")
    steps = {entry["step"]: entry for entry in manifest_of(int8)["accuracy"]}
    assert set(available_engines()) >= {"onnxruntime"}
    for name in available_engines():
        # Opening compares with the golden pair.
        engine = open_engine(after, name, threads=1)
        found = evaluate(engine, dataset)
        engine.close()
        assert found.miou > 0.9
        if name == available_engines()[0]:
            assert found.miou == steps["int8"]["miou"] and steps["fp32"]["miou"] == 1.0


def test_manifest_has_all_that_the_file_was_made_from(place: Place, int8: Path) -> None:
    manifest = manifest_of(int8)
    said = manifest["quantization"]
    assert QuantizationRecipe.from_dict(said["recipe"]) == QuantizationRecipe()
    (calibration,) = said["calibration"]
    names = sorted(path.name for path in Path(place.frames).iterdir())
    assert calibration["sha256"] == {
        name: hashlib.sha256((Path(place.frames) / name).read_bytes()).hexdigest() for name in names
    }
    assert (calibration["frames"], calibration["skipped"], said["overlap"]) == (COUNT, [], [])
    original = (place.fork.folder / "model.onnx").read_bytes()
    assert manifest["provenance"]["quantized_from"] == {
        "name": "fork",
        "sha256": hashlib.sha256(original).hexdigest(),
    }
    assert set(manifest["files"]) == {"model.onnx", "report.html"}
    # Every scale in the graph is in the manifest, bit by bit.
    model = onnx.load_model(int8 / "model.onnx")
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert np.float32(said["scales"]["activations"][node.input[0]]) == arrays[node.input[1]]
    weights = {
        name: np.frombuffer(bytes.fromhex(text), "<f4")
        for name, text in said["scales"]["weights"].items()
    }
    assert set(weights) == set(place.fork.LAYERS)
    for name, scales in weights.items():
        np.testing.assert_array_equal(scales, arrays[f"{name}.weight.scale"])


def test_the_same_input_gives_the_same_bytes(place: Place, int8: Path, tmp_path: Path) -> None:
    quantize_bundle(place.request(sensitivity=True), tmp_path / "int8")
    assert contents(tmp_path / "int8") == contents(int8)


def test_half_is_in_the_types_and_engines_agree(place: Place, tmp_path: Path) -> None:
    recipe = QuantizationRecipe(half=True, floats=("narrow",))
    made = quantize_bundle(place.request(recipe=recipe), tmp_path / "half")
    assert made.floats == ("narrow",) and made.agreement > 0.95
    model = onnx.load_model(tmp_path / "half" / "model.onnx")
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert types["narrow.weight"] == TensorProto.FLOAT16
    assert types["first.weight.int8"] == TensorProto.INT8
    original = onnx.load_model(place.fork.folder / "model.onnx")
    assert list(model.graph.input) == list(original.graph.input)
    assert list(model.graph.output) == list(original.graph.output)
    for name in available_engines():
        open_engine(Bundle.open(tmp_path / "half"), name, threads=1).close()


def test_all_layers_may_be_half(place: Place, tmp_path: Path) -> None:
    names = layer_names(Bundle.open(place.fork.folder))
    assert set(names) == set(place.fork.LAYERS)
    recipe = QuantizationRecipe(half=True, floats=names, equalize=0.0)
    made = quantize_bundle(place.request(recipe=recipe), tmp_path / "half")
    assert made.floats == names and made.agreement > 0.99
    model = onnx.load_model(tmp_path / "half" / "model.onnx")
    assert not {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert all(types[f"{name}.weight"] == TensorProto.FLOAT16 for name in names)
    assert not Bundle.open(tmp_path / "half").model.is_quantized()


# --- a run that is cut off


def test_interrupted_runs_leave_nothing_half_written_and_go_on(
    place: Place, int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "int8"
    request = place.request(sensitivity=True)
    # An older bundle is there, and stays until the new one is whole.
    shutil.copytree(place.fork.folder, target)
    older, original = contents(target), contents(place.fork.folder)

    def stopped(stages: Stages) -> None:
        with pytest.raises(KeyboardInterrupt):
            quantize_bundle(request, target, stage=stages)
        assert contents(target) == older
        assert sorted(path.name for path in tmp_path.iterdir()) == [".int8.quantize", "int8"]

    first, second = Stages("watching evened"), Stages("measuring the damage", 3)
    stopped(first)
    stopped(second)
    assert "watching activations" in second.seen
    last = Stages()
    with monkeypatch.context() as patch:
        patch.setattr(package, "write_manifest", _interrupt)
        stopped(last)
    # Ranges were kept, and so were the layers that had been measured.
    assert "watching activations" not in last.seen
    after = Stages()
    with monkeypatch.context() as patch:
        patch.setattr(Laboratory, "disagreement", _once_more(Laboratory.disagreement))
        quantize_bundle(request, target, stage=after)
    assert contents(target) == contents(int8)
    assert contents(place.fork.folder) == original
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _once_more(method: Callable[..., float]) -> Callable[..., float]:
    """``disagreement``, where no model may be run for it."""

    def kept(self: Laboratory, floats: Collection[str]) -> float:
        opened, self.opened = self.opened, None  # type: ignore[assignment,method-assign]
        value = method(self, floats)
        self.opened = opened  # type: ignore[method-assign]
        return value

    return kept


def test_kept_measurements_are_of_the_same_input_only(place: Place, tmp_path: Path) -> None:
    """Changed labels under the same name are measured again."""
    folder = tmp_path / "camvid"
    shutil.copytree(place.data.removeprefix("camvid:"), folder)
    request = place.request(data=f"camvid:{folder}", max_drop=50.0)

    def kept() -> dict[str, float]:
        with pytest.raises(KeyboardInterrupt):
            quantize_bundle(request, tmp_path / "int8", stage=Stages("proving INT8"))
        content = json.loads((tmp_path / ".int8.quantize" / "trials.json").read_text())
        values: dict[str, float] = content["values"]
        return values

    assert kept() == {"accuracy fp32": 1.0}
    labels = sorted((folder / "labels" / "val").iterdir())
    cv2.imwrite(str(labels[0]), np.full((32, 48), 5, np.uint8))
    assert kept()["accuracy fp32"] < 0.9


def test_every_long_stage_shows_how_far_it_is(place: Place, tmp_path: Path) -> None:
    stages = Stages()
    quantize_bundle(place.request(sensitivity=True), tmp_path / "int8", stage=stages)
    assert stages.seen == [
        "watching activations",
        "watching evened activations",
        "measuring the damage of each layer",
        "proving fp32 with 6 layers in floating point",
        "proving INT8 with 0 layers in floating point",
    ]
    for title in stages.seen:
        *_, last = [update for update in stages.updates if update[0] == title]
        assert last[1] == last[2] > 0


# --- what cannot be done


@dataclass(frozen=True)
class Wrong:
    """A request that cannot be right: what is changed, the error, and words of its message."""

    changes: dict[str, Any]
    words: str
    kind: type[EdgeSegError] = CalibrationError


WRONG = {
    "an unknown engine": Wrong({"engine": "tensorflow"}, "the engines are", RequestError),
    "no such bundle": Wrong({"bundle": "nowhere"}, "there is no bundle nowhere", EdgeSegError),
    "no such frames": Wrong({"calibration": ("nowhere",)}, "nowhere does not exist"),
    "no such data": Wrong({"data": "camvid:nowhere"}, "there is no folder", EdgeSegError),
    "an unknown layer": Wrong(
        {"recipe": QuantizationRecipe(floats=("wde",))},
        "no layer 'wde' to leave in floating point; the layers are first, wide",
        RequestError,
    ),
    "nothing to quantize": Wrong(
        {"recipe": QuantizationRecipe(
            floats=("first", "wide", "narrow", "left", "right", "classify")
        )},
        "nothing is left to quantize",
        RequestError,
    ),
    "fine-tuning without torch": Wrong(
        {"recipe": QuantizationRecipe(finetune=Finetuning())}, "needs PyTorch", RequestError
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused_before_any_work(
    place: Place, tmp_path: Path, case: str
) -> None:
    wrong, stages = WRONG[case], Stages()
    original = contents(place.fork.folder)
    with pytest.raises(wrong.kind, match=wrong.words):
        quantize_bundle(place.request(**wrong.changes), tmp_path / "int8", stage=stages)
    assert stages.seen == [] and not (tmp_path / "int8").exists()
    assert contents(place.fork.folder) == original
    assert not list(tmp_path.glob(".*.quantize")), "a refusal leaves nothing behind"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": ()}, "--calibration"),
        ({"data": None, "max_drop": 0.3}, "--data"),
        ({"max_drop": -0.1}, "0 to 100, and -0.1 came"),
        ({"max_drop": 100.5}, "0 to 100, and 100.5 came"),
        ({"max_drop": float("nan")}, "0 to 100, and nan came"),
    ],
)
def test_requests_are_checked_when_they_are_made(
    place: Place, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        place.request(**changes)


def test_targets_that_are_something_else(place: Place, int8: Path, tmp_path: Path) -> None:
    source = tmp_path / "fork"
    shutil.copytree(place.fork.folder, source)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"a cat")
    before, stages = contents(tmp_path), Stages()
    (tmp_path / "link").symlink_to(source)
    for bundle, target, words in (
        (source, source, "is the bundle that is to be quantized"),
        (source, tmp_path / "link", "is the bundle that is to be quantized"),
        (source / "model.onnx", source, "is the bundle that is to be quantized"),
        (source, other, "exists and is no bundle"),
        (source, other / "cat.jpg", "exists and is no bundle"),
    ):
        with pytest.raises(RequestError, match=words):
            quantize_bundle(place.request(bundle=str(bundle)), target, stage=stages)
    with pytest.raises(CalibrationError, match="is quantized already"):
        quantize_bundle(place.request(bundle=str(int8)), tmp_path / "twice", stage=stages)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before and stages.seen == []


def test_frames_that_cannot_be_read_or_differ_are_named(place: Place, tmp_path: Path) -> None:
    frames = place.fork.frames(tmp_path / "frames", 4)
    (frames / "broken.png").write_bytes(b"no picture")
    cv2.imwrite(str(frames / "large.png"), cv2.resize(place.fork.picture(77), (96, 64)))
    request = place.request(calibration=(str(frames),), data=None)
    made = quantize_bundle(request, tmp_path / "int8")
    text = " ".join(made.notes)
    assert "1 of 6 frames could not be read and were skipped: broken.png" in text
    assert "aim at 100" in text and "4 of 32x48, 1 of 64x96" in text
    assert made.render().startswith(made.notes[0])
    (recorded,) = manifest_of(tmp_path / "int8")["quantization"]["calibration"]
    assert recorded["skipped"] == ["broken.png"] and recorded["frames"] == 5
    assert made.accuracy is None and manifest_of(tmp_path / "int8")["accuracy"] == []


def test_frames_that_will_not_do(place: Place, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "empty").mkdir()
    for kind in ("broken", "noise"):
        (tmp_path / kind).mkdir()
        for number in range(4):
            (tmp_path / kind / f"{number}.png").write_bytes(b"no picture")
            if kind == "noise":
                noise = rng.integers(0, 256, (96, 144, 3), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / kind / f"{number}.png"), noise)
    for kind, words in (
        ("empty", "no images"),
        ("broken", "none of the 4 frames"),
        ("noise", "4 show noise"),
    ):
        request = place.request(calibration=(str(tmp_path / kind),))
        with pytest.raises(CalibrationError, match=words):
            quantize_bundle(request, tmp_path / "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "noise"]


def test_overlap_is_refused_or_recorded(place: Place, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    shutil.copytree(place.frames, frames)
    # Stored again: another file with the same pixels.
    shared = cv2.imread(f"{place.data.removeprefix('camvid:')}/images/val/002.png")
    assert shared is not None
    cv2.imwrite(str(frames / "shared.bmp"), shared)
    request = place.request(calibration=(str(frames),))
    with pytest.raises(CalibrationError, match=r"evaluation set CamVid val \(shared.bmp\)"):
        quantize_bundle(request, tmp_path / "int8")
    made = quantize_bundle(replace(request, allow_overlap=True), tmp_path / "int8")
    assert "1 calibration frame is also an evaluation picture, which flatters" in made.notes[-1]
    assert manifest_of(tmp_path / "int8")["quantization"]["overlap"] == ["shared.bmp"]


def test_what_cannot_be_quantized_is_named(place: Place, tmp_path: Path) -> None:
    """A MatMul by a constant, which stays in floating point."""
    source = tmp_path / "fork"
    shutil.copytree(place.fork.folder, source)
    model = onnx.load_model(source / "model.onnx")
    nodes = list(model.graph.node)
    index = next(i for i, node in enumerate(nodes) if node.name == "relu")
    nodes[index].output[0] = "before"
    square = np.eye(6, dtype=np.float32)
    nodes.insert(index + 1, helper.make_node("MatMul", ["before", "square"], ["joined"], "mix"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(square, "square"))
    (source / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(source, {"name": "fork"})
    made = quantize_bundle(place.request(bundle=str(source), data=None), tmp_path / "int8")
    assert made.layers == 6
    assert made.notes[-1].startswith("in floating point is also what cannot be quantized")
    assert made.notes[-1].endswith("layer: MatMul mix")


# --- the budget


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds that each layer costs in floating point, in place of measured ones."""
    costs = dict.fromkeys(("first", "wide", "narrow", "left", "right", "classify"), 1.0)

    def extra_ms(self: Laboratory, floats: Collection[str]) -> float:
        return sum(costs[name] for name in floats)

    monkeypatch.setattr(Laboratory, "extra_ms", extra_ms)
    monkeypatch.setattr(Laboratory, "latency_ms", lambda self: 1.0)
    return costs


def test_budget_keeps_what_loses_it_and_is_proven(
    place: Place, tmp_path: Path, clock: dict[str, float]
) -> None:
    request = place.request(recipe=UNEVEN, max_drop=12.0)
    made = quantize_bundle(request, tmp_path / "int8")
    assert made.floats == ("narrow",) and made.accuracy is not None
    fp32, int8 = (figure(found) for found in made.accuracy)
    assert fp32 == 1.0 and 0 < fp32 - int8 <= 0.12
    # The promise is about the file: its accuracy, by another way.
    engine = open_engine(Bundle.open(tmp_path / "int8"), threads=1)
    assert evaluate(engine, open_dataset(place.data, "val")).miou == int8
    engine.close()
    said = manifest_of(tmp_path / "int8")["quantization"]
    assert (said["floats"], said["max_drop"]) == (["narrow"], 12.0)
    assert "budget: damage" in (tmp_path / "int8" / "report.html").read_text(encoding="utf-8")
    # What was chosen gives the same file again without the clock.
    again = replace(UNEVEN, floats=("narrow",))
    quantize_bundle(place.request(recipe=again), tmp_path / "again" / "int8")
    one, other = (tmp_path / name / "model.onnx" for name in ("int8", "again/int8"))
    assert one.read_bytes() == other.read_bytes()


def test_budget_that_cannot_be_met_shows_the_best(
    place: Place, tmp_path: Path, clock: dict[str, float]
) -> None:
    request = place.request(recipe=UNEVEN, max_drop=0.0)
    words = (
        r"no INT8 graph within 0 points .* the best loses \d\.\d\d \(9\d\.\d\d % instead of "
        r"100\.00 %\) with [123] of 6 layers in floating point; allow --max-drop"
    )
    with pytest.raises(CalibrationError, match=words):
        quantize_bundle(request, tmp_path / "int8")
    # What was measured is kept for a second try with a larger one.
    assert [path.name for path in tmp_path.iterdir()] == [".int8.quantize"]
    clock["narrow"] = 10.0
    slow = dict.fromkeys(clock, -5.0)
    clock.update(slow, narrow=10.0)
    with pytest.raises(CalibrationError, match="no faster than the model it was made from"):
        quantize_bundle(replace(request, max_drop=12.0), tmp_path / "int8")


# --- fine-tuning, which is done elsewhere


def test_frames_of_the_training_are_recorded_checked_and_its_result_kept(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    def trainer(
        calibrated: Calibrated,
        frames: Sequence[Pixels],
        settings: Finetuning,
        *,
        floats: Sequence[str],
        work: Path,
        stage: Stage,
    ) -> Calibrated:
        trained.append(len(frames))
        chosen = calibrated.placement(floats)
        scales = calibrated.scales(chosen)
        activations = {group: 1.5 * value for group, value in scales.activations.items()}
        return calibrated.trained(
            calibrated.graph, chosen, replace(scales, activations=activations)
        )

    recipe = QuantizationRecipe(frames=4, finetune=Finetuning(frames=8, steps=1))
    request = place.request(recipe=recipe)
    target = tmp_path / "int8"
    with monkeypatch.context() as patch:
        patch.setattr(package, "write_manifest", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_bundle(request, target, trainer=trainer)
    quantize_bundle(request, target, trainer=trainer)
    assert trained == [8]
    said = manifest_of(target)["quantization"]
    assert [said[key][0]["frames"] for key in ("calibration", "finetuning")] == [4, 8]
    quantize_bundle(place.request(recipe=replace(recipe, finetune=None)), tmp_path / "plain")
    plain = manifest_of(tmp_path / "plain")["quantization"]
    for name, value in said["scales"]["activations"].items():
        assert value == pytest.approx(1.5 * plain["scales"]["activations"][name], rel=1e-6)
    # Seen in training only, and yet refused: the last frame is an evaluation picture.
    frames = tmp_path / "frames"
    shutil.copytree(place.frames, frames)
    shared = Path(place.data.removeprefix("camvid:")) / "images" / "val" / "000.png"
    shutil.copy(shared, frames / "zzz.png")
    request = place.request(calibration=(str(frames),), recipe=replace(
        recipe, frames=2, finetune=Finetuning(frames=99)
    ))  # fmt: skip
    with pytest.raises(CalibrationError, match=r"\(zzz.png\)"):
        quantize_bundle(request, tmp_path / "int8", trainer=trainer)
