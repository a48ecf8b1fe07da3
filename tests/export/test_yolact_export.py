"""A small YOLACT from checkpoint to bundle, and what is refused on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import torch
from onnx import numpy_helper

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.classes import COCO, class_list
from edgeseg.engine import available_engines, open_engine
from edgeseg.errors import EngineError, RequestError
from edgeseg.export.models import Yolact, create, definition
from edgeseg.export.onnx import export_network, weights_of_bundle
from edgeseg.export.package import ExportRequest, export_bundle
from edgeseg.export.preprocess import network_input
from edgeseg.export.torchengine import TorchEngine
from edgeseg.export.verify import InstanceComparison, verify
from edgeseg.instances import InstanceOutputs
from edgeseg.spec import ModelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEIGHT, WIDTH = 74, 106
CLASSES = 5


def a_network() -> Yolact:
    """YOLACT over ResNet-18 with random weights, and raw heads of a useful range.

    Scores must differ: equal ones may come in any order.
    """
    torch.manual_seed(4)
    network = create("yolact_resnet18", CLASSES + 1, auxiliary_heads=True)
    head = cast(Any, network.prediction_layers[0])
    x = network_input(pictures(1)[0][:HEIGHT, :WIDTH], definition("yolact_resnet18").preprocessing)
    with torch.no_grad():
        heads = network(x)
        head.conf_layer.weight *= 1.5 / heads["conf"].std()
        head.bbox_layer.weight *= 1.0 / heads["loc"].std()
        head.mask_layer.weight *= 1.0 / heads["mask"].atanh().std()
    return network


def a_spec(network: Yolact) -> ModelSpec:
    listed = class_list(CLASSES)
    rows, columns = network.mask_size(HEIGHT, WIDTH)
    return ModelSpec(
        name="small",
        architecture="yolact_resnet18",
        task="instance",
        height=HEIGHT,
        width=WIDTH,
        classes=listed.names,
        colours=listed.colours,
        ignore=listed.ignore,
        preprocessing=definition("yolact_resnet18").preprocessing,
        capacity=40,
        mask_height=rows,
        mask_width=columns,
    )


def pictures(count: int) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    small = [random.integers(0, 256, (10, 14, 3)).astype(np.uint8) for _ in range(count)]
    return [picture.repeat(9, axis=0).repeat(8, axis=1) for picture in small]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Yolact, Path]:
    network = a_network()
    path = tmp_path_factory.mktemp("yolact") / "model.onnx"
    export_network(network, a_spec(network)).write(path)
    return network, path


def test_every_engine_finds_what_pytorch_finds(exported: tuple[Yolact, Path]) -> None:
    network, path = exported
    found = verify(network, Bundle.open(path), pictures(3), "blocks")
    heads = 2 if kernels.available() else 1
    assert len(found.comparisons) == heads * len(available_engines())
    for entry in found.comparisons:
        assert isinstance(entry, InstanceComparison)
        assert entry.expected > 20
        assert entry.matched >= 0.98 * entry.expected
        assert entry.largest_score_difference < 1e-3
    assert "instances found again" in found.render()
    assert json.loads(json.dumps(found.to_dict()))["images"] == 3


def test_the_contract_is_kept(exported: tuple[Yolact, Path]) -> None:
    proto = onnx.load(exported[1])
    assert [output.name for output in proto.graph.output] == [
        "boxes",
        "scores",
        "labels",
        "count",
        "masks",
    ]
    assert [node.op_type for node in proto.graph.node if node.domain == "edgeseg"] == [
        "EdgeSegMaskAssembly"
    ]
    assert [function.name for function in proto.functions] == ["EdgeSegMaskAssembly"]


def test_the_file_is_a_checkpoint_too(exported: tuple[Yolact, Path]) -> None:
    network, path = exported
    stored = weights_of_bundle(path)
    assert stored is not None
    wanted = {
        key: value
        for key, value in network.state_dict().items()
        if not key.endswith("num_batches_tracked") and not key.startswith("semantic_seg_conv.")
    }
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(
    "key",
    [
        "prediction_layers.0.bbox_layer.bias",
        "prediction_layers.0.mask_layer.bias",
    ],
)
def test_another_weight_in_the_network_is_found(exported: tuple[Yolact, Path], key: str) -> None:
    network, path = exported
    other = a_network()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        values = other.state_dict()[key]
        values += torch.linspace(-1, 1, values.numel())
    with pytest.raises(EngineError, match="does not give PyTorch's instances"):
        verify(other, Bundle.open(path), pictures(1), "blocks")


@pytest.mark.parametrize("constant", ["network_size", "threshold", "priors"])
def test_another_number_in_the_graph_is_found(
    exported: tuple[Yolact, Path], constant: str, tmp_path: Path
) -> None:
    network, path = exported
    proto = onnx.load(path)
    (tensor,) = (t for t in proto.graph.initializer if t.name == f"edgeseg.head.{constant}")
    changed = numpy_helper.to_array(tensor) * np.float32(1.5 if constant != "threshold" else 19)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(proto, tmp_path / "tampered.onnx")
    with pytest.raises(EngineError, match=r"(?i)openvino|onnx ?runtime"):
        verify(network, Bundle.open(tmp_path / "tampered.onnx"), pictures(2), "blocks")


def test_pytorch_in_the_place_of_an_engine(exported: tuple[Yolact, Path]) -> None:
    network, path = exported
    bundle = Bundle.open(path)
    eager = TorchEngine(network, bundle.spec)
    engine = open_engine(bundle, "onnxruntime")
    (picture,) = pictures(1)
    pixels = picture[:HEIGHT, :WIDTH]
    wanted, found = eager.run(pixels), engine.run(pixels)
    engine.close()
    assert isinstance(found, InstanceOutputs)
    assert wanted.labels.dtype == np.int32
    assert wanted.masks.dtype == np.uint8
    assert wanted.masks.shape[1:] == (bundle.spec.mask_height, bundle.spec.mask_width)
    assert len(wanted.scores) == len(found.scores)
    np.testing.assert_allclose(wanted.scores, found.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask_height": 10}, "masks of 20x28 .* masks of 10x28"),
        ({"mask_extent": "box"}, "span the image, .* span the box"),
        ({"height": 40, "mask_height": 10}, "from 64x64 on, and 40x106 came"),
        ({"classes": ("a",), "colours": ((0, 0, 0),)}, "5 classes and the background .* 1 names"),
    ],
)
def test_a_spec_that_does_not_suit_the_network(change: dict[str, Any], words: str) -> None:
    network = a_network()
    with pytest.raises(RequestError, match=words):
        export_network(network, replace(a_spec(network), **change))


@pytest.mark.slow
def test_from_checkpoint_to_bundle(tmp_path: Path) -> None:
    network = a_network()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    request = ExportRequest(
        model="yolact_resnet18", weights=str(tmp_path / "weights.pth"), size=f"{HEIGHT}x{WIDTH}"
    )
    made = export_bundle(request, tmp_path / "bundle")
    bundle = Bundle.open(made.bundle)
    assert (bundle.spec.task, bundle.spec.capacity) == ("instance", 100)
    assert (bundle.spec.mask_height, bundle.spec.mask_width) == network.mask_size(HEIGHT, WIDTH)
    assert bundle.spec.classes == class_list(CLASSES).names
    assert (tmp_path / "bundle" / "report.html").is_file()
    with pytest.raises(RequestError, match="5 classes without the background, and 2 names"):
        export_bundle(replace(request, classes=("a", "b")), tmp_path / "other")


def test_80_classes_are_those_of_coco() -> None:
    assert class_list(80) is COCO
    assert (COCO.names[0], COCO.names[79], len(set(COCO.names))) == ("person", "toothbrush", 80)
    assert len(set(COCO.colours)) == 80
