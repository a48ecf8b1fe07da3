"""An instance bundle quantized from end to end."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")
pytest.importorskip("torch", reason="the head of an instance model is written by the export side")
pytest.importorskip("pycocotools", reason="AP is pycocotools'")

import onnx
from onnx import TensorProto

from edgeseg.bundle import Bundle
from edgeseg.calibration.graph import prepared, share_constants
from edgeseg.calibration.package import Quantized, QuantizeRequest, layer_names, quantize_bundle
from edgeseg.calibration.recipe import Finetuning, QuantizationRecipe
from edgeseg.calibration.sensitivity import Laboratory
from edgeseg.engine import cpu_engines, open_engine
from edgeseg.errors import DataError, RequestError
from edgeseg.evaluate import InstanceEvaluation, evaluate_instances
from edgeseg.golden import InstanceGolden
from edgeseg.instance_dataset import open_instances
from tests.calibration import small_yolact
from tests.calibration.small_yolact import HEADS, LAYERS, SmallYolact


@dataclass(frozen=True)
class Place:
    """A bundle, frames to calibrate it with, and labelled ones."""

    bundle: SmallYolact
    frames: str
    data: str

    def request(self, **changes: Any) -> QuantizeRequest:
        """A request with every measurement, on one thread."""
        folder = str(self.bundle.folder)
        request = QuantizeRequest(folder, (self.frames,), data=self.data, threads=1)
        return replace(request, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("small")
    bundle = SmallYolact.write(folder / "bundle")
    return Place(bundle, str(bundle.frames(folder / "frames", 12)), bundle.coco(folder / "coco"))


@pytest.fixture(scope="module")
def int8(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """What a request with all measurements gives; not to be changed."""
    target = tmp_path_factory.mktemp("once") / "int8"
    return quantize_bundle(place.request(sensitivity=True), target)


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    return content


def test_network_is_int8_and_the_head_is_not(place: Place, int8: Quantized) -> None:
    assert (int8.layers, int8.floats) == (len(LAYERS), ())
    assert (int8.placement.quantized, int8.placement.weighted) == (len(LAYERS), len(LAYERS))
    assert int8.placement.findings == ()
    model = onnx.load_model(int8.path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    original = onnx.load_model(place.bundle.folder / "model.onnx")
    assert list(model.graph.input) == list(original.graph.input)
    assert list(model.graph.output) == list(original.graph.output)
    assert [each.SerializeToString() for each in model.functions] == [
        each.SerializeToString() for each in original.functions
    ]

    def head(graph: onnx.GraphProto) -> list[bytes]:
        ours = [each for each in graph.node if each.output[0].startswith("edgeseg.head.")]
        return [each.SerializeToString() for each in ours]

    assert head(model.graph) == head(original.graph) != []
    reads = {name for each in model.graph.node for name in each.input}
    assert not {f"{name}.dequantized" for name in HEADS} & reads


def test_accuracy_is_that_of_the_file(place: Place, int8: Quantized) -> None:
    assert int8.accuracy is not None
    fp32, after = int8.accuracy
    assert isinstance(fp32, InstanceEvaluation) and isinstance(after, InstanceEvaluation)
    assert fp32.mask is not None and after.mask is not None
    # The truth is what fp32 finds, but for masks without a pixel.
    assert fp32.mask.ap > 0.95 and fp32.box.ap > 0.95
    assert 0.5 < after.mask.ap <= 1
    dataset = open_instances(place.data, "val")
    for name in cpu_engines():
        # Opening compares with the golden pair.
        engine = open_engine(Bundle.open(int8.path), name, threads=1)
        found = evaluate_instances(engine, dataset)
        engine.close()
        assert found.mask is not None
        if name == cpu_engines()[0]:
            assert found.mask.ap == after.mask.ap
        assert found.mask.ap == pytest.approx(after.mask.ap, abs=0.2)
    steps = {entry["step"]: entry for entry in manifest_of(int8.path)["accuracy"]}
    assert steps["int8"]["mask_ap"] == after.mask.ap and "seconds" not in steps["int8"]


def test_closeness_is_in_words_and_in_the_manifest(int8: Quantized) -> None:
    assert set(int8.heads) == set(HEADS)
    assert all(0 < error < 0.05 for error in int8.heads.values())
    assert 0.5 < int8.agreement <= 1
    manifest = manifest_of(int8.path)
    assert manifest["quantization"]["heads"] == int8.heads
    assert manifest["quantization"]["agreement"] == int8.agreement
    agreement = manifest["verification"]["agreement"]
    assert agreement[cpu_engines()[0]] == 1 and all(share > 0.5 for share in agreement.values())
    assert int8.to_dict()["heads"] == int8.heads
    text = int8.render()
    assert "12 of 12 layers with weights in INT8" in text
    assert "of the instances are found by both" in text
    assert "the raw heads are off by" in text and "mask AP on COCO val, 6 pictures" in text


def test_report_speaks_of_instances(int8: Quantized) -> None:
    page = (int8.path / "report.html").read_text(encoding="utf-8")
    for words in ("mask AP in INT8", "of instances found by both", "raw head", "error of the raw"):
        assert words in page
    assert "mIoU" not in page and "pixels whose class" not in page


def test_golden_pair_is_one_of_instances(int8: Quantized) -> None:
    golden = Bundle.open(int8.path).golden
    assert isinstance(golden, InstanceGolden) and golden.is_proof
    # Swapped channels are another model.
    model = onnx.load_model(int8.path / "model.onnx")
    (cast,) = [each for each in model.graph.node if each.input[0] == "image"]
    kept = list(model.graph.node)
    order = onnx.numpy_helper.from_array(np.array([2, 1, 0], np.int64), "order")
    swap = onnx.helper.make_node("Gather", ["image", "order"], ["swapped"], "swap", axis=3)
    cast.input[0] = "swapped"
    del model.graph.node[:]
    model.graph.node.extend([swap, *kept])
    model.graph.initializer.append(order)
    from edgeseg.onnxfile import OnnxFile

    other = replace(
        Bundle.open(int8.path), model=OnnxFile(model.SerializeToString(), "swapped channels")
    )
    engine = open_engine(other, "onnxruntime", threads=1, check=False)
    found = engine.run(_golden_image(golden))
    engine.close()
    assert golden.agreement_of(found) < golden.promised


def _golden_image(golden: InstanceGolden) -> Any:
    from edgeseg.golden import golden_image

    return golden_image(golden.seed, small_yolact.SPEC.height, small_yolact.SPEC.width)


def test_all_of_it_in_fp16(place: Place, tmp_path: Path) -> None:
    names = layer_names(Bundle.open(place.bundle.folder))
    recipe = QuantizationRecipe(half=True, floats=names, equalize=0.0)
    made = quantize_bundle(place.request(recipe=recipe), tmp_path / "half")
    assert made.floats == names and made.agreement > 0.95
    assert max(made.heads.values()) < 1e-5
    assert made.accuracy is not None and made.accuracy[1].to_dict()["mask_ap"] > 0.95  # type: ignore[operator]
    model = onnx.load_model(tmp_path / "half" / "model.onnx")
    kinds = {entry.name: entry.data_type for entry in model.graph.initializer}
    # One head for both levels, as in the original.
    weights = [name for name in kinds if name.endswith(".weight")]
    assert sorted(weights) == sorted(f"{name}.weight" for name in LAYERS if "." not in name)
    assert {kinds[name] for name in weights} == {TensorProto.FLOAT16}
    for name in cpu_engines():
        open_engine(Bundle.open(tmp_path / "half"), name, threads=1).close()


def test_int8_with_the_rest_in_fp16(place: Place, tmp_path: Path) -> None:
    recipe = QuantizationRecipe(half=True, floats=("prototype",))
    made = quantize_bundle(place.request(recipe=recipe), tmp_path / "mixed")
    assert made.floats == ("prototype",) and max(made.heads.values()) < 0.05
    for name in cpu_engines():
        open_engine(Bundle.open(tmp_path / "mixed"), name, threads=1).close()


def test_budget_is_in_points_of_ap(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Laboratory, "extra_ms", lambda self, floats: float(len(floats)))
    monkeypatch.setattr(Laboratory, "latency_ms", lambda self: 1.0)
    made = quantize_bundle(place.request(max_drop=60.0), tmp_path / "int8")
    assert made.floats == () and made.accuracy is not None
    assert manifest_of(made.path)["quantization"]["max_drop"] == 60.0
    report = (made.path / "report.html").read_text(encoding="utf-8")
    assert "the budget is met with all of them in INT8" in report


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (
            {"recipe": QuantizationRecipe(finetune=Finetuning())},
            RequestError,
            "fine-tuning learns the classes of pixels",
        ),
        ({"data": "camvid:nowhere"}, RequestError, "for an instance model use coco:DIR"),
        ({"data": "synthetic:?frames=2"}, DataError, "lack car, pedestrian, bicyclist"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(
    place: Place, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    def trainer(*_: object, **__: object) -> Any:
        raise AssertionError("nothing is to be trained")

    with pytest.raises(kind, match=words):
        quantize_bundle(place.request(**changes), tmp_path / "int8", trainer=trainer)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_finds_nothing_has_no_agreement(place: Place, tmp_path: Path) -> None:
    """Scores below 0.3 are not worth a look."""
    model = onnx.load_model(place.bundle.folder / "model.onnx")
    for entry in model.graph.initializer:
        if entry.name == "score.bias":
            bias = onnx.numpy_helper.to_array(entry).reshape(3, -1).copy()
            bias[:, 0] += 50
            entry.CopyFrom(onnx.numpy_helper.from_array(bias.ravel(), entry.name))
    bundle = tmp_path / "blind"
    bundle.mkdir()
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    made = quantize_bundle(
        place.request(bundle=str(_with_golden(bundle)), data=None), tmp_path / "int8"
    )
    assert math.isnan(made.agreement) and made.to_dict()["agreement"] is None
    assert "found by both" not in made.render()
    page = (tmp_path / "int8" / "report.html").read_text(encoding="utf-8")
    assert "Neither found an instance" in page


def _with_golden(folder: Path) -> Path:
    """``folder`` with the golden pair of the model that is in it."""
    from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY, write_manifest
    from edgeseg.engine.onnxruntime import recorded_golden

    model = onnx.load_model(folder / "model.onnx")
    golden = recorded_golden(model.SerializeToString(), small_yolact.SPEC)
    del model.metadata_props[:]
    onnx.helper.set_model_props(
        model, {SPEC_KEY: small_yolact.SPEC.to_json(), GOLDEN_KEY: golden.to_json()}
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, {"name": "blind"})
    return folder


def test_constants_that_are_the_same_are_stored_once() -> None:
    model = small_yolact.model()
    separate = prepared(model).model
    shared = onnx.ModelProto()
    shared.CopyFrom(separate)
    share_constants(shared)
    onnx.checker.check_model(shared, full_check=True)

    def weights(made: onnx.ModelProto) -> list[str]:
        return [e.name for e in made.graph.initializer if e.name.endswith(".weight")]

    assert len(weights(separate)) == len(LAYERS)
    # Small ones are left alone.
    large = [name for name in weights(shared) if name.endswith(".2.weight")]
    assert large == []
    import onnxruntime

    for pixels in map(small_yolact.picture, range(2)):
        found = []
        for made in (separate, shared):
            session = onnxruntime.InferenceSession(made.SerializeToString())
            found.append(session.run(None, {"image": pixels[None]}))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)
    once = shared.SerializeToString()
    share_constants(shared)
    assert shared.SerializeToString() == once
