"""YOLACT++ against the published network, loops in float64, and the engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import onnx
import torch
from onnx import numpy_helper, shape_inference
from torch import Tensor, nn
from torch.nn import functional

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.classes import class_list
from edgeseg.engine import available_engines
from edgeseg.engine.graph import Graph
from edgeseg.errors import EngineError, RequestError
from edgeseg.export.models import create, definition
from edgeseg.export.models.backbones import Backbone
from edgeseg.export.models.deformable import DeformableConvolution
from edgeseg.export.models.instance import FoundInstances
from edgeseg.export.models.yolact import Priors, Yolact
from edgeseg.export.models.yolactplus import MaskIoU, YolactPlus
from edgeseg.export.onnx import export_network, weights_of_bundle
from edgeseg.export.preprocess import network_input
from edgeseg.export.verify import InstanceComparison, verify
from edgeseg.export.weights import load_weights
from edgeseg.spec import ModelSpec

if TYPE_CHECKING:
    from tests.export.conftest import Parity

Packs = Callable[[str], "Parity"]

NAME: Final = "yolact_plus_resnet50"
HEIGHT, WIDTH = 256, 264
CLASSES = 5


class SmallBackbone(Backbone):
    """Three deformable convolutions, which read beside their places from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = (16, 24, 32)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, padding=1)
        )
        self.stages = nn.ModuleList(
            DeformableConvolution(before, after, 2)
            for before, after in ((16, 16), (16, 24), (24, 32))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Backbone.forward``."""
        first, second, third = self.stages
        c3 = first(torch.relu(self.stem(x)))
        c4 = second(torch.relu(c3))
        return c3, c4, third(torch.relu(c4))


class SmallPlus(YolactPlus):
    """YOLACT++ with everything but its size."""

    width: ClassVar[int] = 24
    image_convolutions: ClassVar[tuple[str, ...]] = ("backbone.stem.0.weight",)

    def __init__(self) -> None:
        super().__init__(SmallBackbone(), CLASSES + 1)


def a_network() -> SmallPlus:
    """Random weights, and raw heads, offsets and overlaps of a useful range."""
    torch.manual_seed(4)
    network = SmallPlus().eval()
    head = cast(Any, network.prediction_layers[0])
    x = network_input(pictures(1)[0], definition(NAME).preprocessing)
    with torch.no_grad():
        for module in network.backbone.modules():
            if isinstance(module, DeformableConvolution):
                nn.init.normal_(cast(Tensor, module.conv_offset_mask.bias))
                nn.init.kaiming_normal_(module.conv_offset_mask.weight)
        for module in network.maskiou_net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.uniform_(cast(Tensor, module.bias), 0.4, 0.9)
        cast(Any, network.maskiou_net.maskiou_net)[10].weight *= 0.1
        heads = network(x)
        head.conf_layer.weight *= 2.5 / heads["conf"].std()
        head.bbox_layer.weight *= 1.0 / heads["loc"].std()
        head.mask_layer.weight *= 1.0 / heads["mask"].atanh().std()
    return network


def a_spec(network: Yolact) -> ModelSpec:
    listed = class_list(CLASSES)
    rows, columns = network.mask_size(HEIGHT, WIDTH)
    return ModelSpec(
        name="small",
        architecture=NAME,
        task="instance",
        height=HEIGHT,
        width=WIDTH,
        classes=listed.names,
        colours=listed.colours,
        ignore=listed.ignore,
        preprocessing=definition(NAME).preprocessing,
        capacity=40,
        mask_height=rows,
        mask_width=columns,
    )


def pictures(count: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (16, 12, 3)).astype(np.uint8) for _ in range(count)]
    return [picture.repeat(16, axis=0).repeat(22, axis=1) for picture in small]


def test_the_state_dict_is_that_of_published_checkpoints(parity: Packs) -> None:
    pack = parity(NAME).pack
    with torch.device("meta"):
        network = create(NAME, 81, auxiliary_heads=True)
        bare = create(NAME, 81)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes == {**pack["keys"], **pack["train_only_keys"]}
    assert {key: list(value.shape) for key, value in bare.state_dict().items()} == pack["keys"]
    assert bare.parameter_count() == pack["n_parameters"]
    assert bare.classes_in(bare.state_dict()) == 81


def test_every_third_block_of_resnet101_is_deformable() -> None:
    with torch.device("meta"):
        network = create("yolact_plus_resnet101", 81)
    found = {
        key.removesuffix(".conv2.conv_offset_mask.bias")
        for key in network.state_dict()
        if key.endswith("conv_offset_mask.bias")
    }
    wanted = {
        f"backbone.layers.{stage}.{block}"
        for stage, blocks in ((1, 4), (2, 23), (3, 3))
        for block in range(0, blocks, 3)
    }
    assert found == wanted


def test_a_new_network_moves_no_tap() -> None:
    with torch.device("meta"):
        deformable = [
            name
            for name, module in create(NAME, 3).named_modules()
            if isinstance(module, DeformableConvolution)
        ]
    assert len(deformable) == 13
    for module in SmallPlus().modules():
        if isinstance(module, DeformableConvolution):
            assert not any(values.any() for values in module.conv_offset_mask.parameters())


def test_priors_are_nine_a_cell() -> None:
    with torch.device("meta"):
        network = create(NAME, 3)
    assert network.boxes == Priors(scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)))
    found = network.priors(550, 550)
    assert found.shape == (57744, 4)
    # The first cell of the third level, 18 cells a side, with a base size of 96.
    cell = found[(69 * 69 + 35 * 35) * 9 :][:9].double()
    wanted = [
        (
            0.5 / 18,
            0.5 / 18,
            96 * 2 ** (step / 3) * ratio**0.5 / 550,
            96 * 2 ** (step / 3) / ratio**0.5 / 550,
        )
        for step in range(3)
        for ratio in (1, 0.5, 2)
    ]
    torch.testing.assert_close(cell, torch.tensor(wanted, dtype=torch.float64), atol=1e-7, rtol=0)


def test_overlaps_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    network = MaskIoU(3)
    masks = torch.rand(2, 1, 63, 67)
    wanted = np.zeros((2, 3))
    layers = [layer for layer in network.maskiou_net if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 6
    for n in range(2):
        x = masks[n].double().numpy()
        for layer in layers:
            weight, bias = (v.detach().double().numpy() for v in layer.parameters())
            side = weight.shape[2]
            step = 2 if side == 3 else 1
            rows, columns = ((length - side) // step + 1 for length in x.shape[1:])
            y = np.empty((len(weight), rows, columns))
            for row, column in np.ndindex(rows, columns):
                window = x[:, row * step : row * step + side, column * step : column * step + side]
                y[:, row, column] = np.tensordot(weight, window, axes=3) + bias
            x = np.maximum(y, 0)
        wanted[n] = x.max(axis=(1, 2))
    with torch.no_grad():
        np.testing.assert_allclose(network(masks).numpy(), wanted, atol=1e-6)


@torch.no_grad()
def test_detections_are_ranked_by_class_and_mask() -> None:
    network = a_network()
    torch.manual_seed(1)
    boxes, masks = torch.rand(9, 4), torch.rand(9, 64, 66)
    scores = torch.linspace(0.9, 0.1, 9)
    labels = torch.tensor([0, 4, 2, 2, 1, 3, 0, 4, 1])
    found = network.rescored(FoundInstances(boxes, scores, labels, masks))
    overlaps = network.maskiou_net(masks[:, None])
    rows = sorted(range(9), key=lambda row: -float(scores[row] * overlaps[row, labels[row]]))
    assert rows != list(range(9))
    for name, value in (("boxes", boxes), ("labels", labels), ("masks", masks)):
        assert torch.equal(getattr(found, name), value[rows])
    wanted = torch.stack([scores[row] * overlaps[row, labels[row]] for row in rows])
    torch.testing.assert_close(found.scores, wanted)


@torch.no_grad()
def test_nothing_found_and_a_mask_that_is_no_number() -> None:
    network = a_network()
    nothing = FoundInstances(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 64, 66)
    )
    assert network.rescored(nothing).masks.shape == (0, 64, 66)
    masks = torch.rand(2, 64, 66)
    masks[0] = float("nan")
    given = FoundInstances(torch.rand(2, 4), torch.tensor([0.9, 0.5]), torch.tensor([1, 1]), masks)
    found = network.rescored(given)
    assert found.scores[1] == 0
    assert found.scores[0] > 0
    assert torch.equal(found.boxes, given.boxes[[1, 0]])


@pytest.mark.slow
def test_it_is_the_published_network(parity: Packs) -> None:
    """The outputs where they are here, and the number of good detections, which the pack tells."""
    pack = parity(NAME)
    network = create(NAME, 81, auxiliary_heads=True)
    arrays = pack.arrays(training=True)
    load_weights(network, {key: torch.from_numpy(array) for key, array in arrays.items()})
    with torch.inference_mode():
        heads = network(torch.from_numpy(pack.input("tensor")))
    for name, value in heads.items():
        assert list(cast(Tensor, value).shape) == pack.pack["outputs"][f"tensor.{name}"]["shape"]
        if pack.wanted:
            pack.check(f"tensor.{name}", cast(Tensor, value).numpy())
    image = torch.from_numpy(pack.input("image").astype(np.float32)).permute(2, 0, 1)[None]
    fitted = functional.interpolate(image, size=(550, 550), mode="bilinear")
    folded = definition(NAME).preprocessing
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (folded.mean, folded.std))
    x = (fitted.flip(1) / 255 - mean) / std
    by_class = Yolact.detect(network, x, 100)
    threshold = pack.pack["input"]["image"]["score_threshold"]
    good = int((by_class.scores > threshold).sum())
    assert [good] == pack.pack["outputs"]["image.post.mask_score"]["shape"]
    assert len(network.detect(x, 100).scores) == 100


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallPlus, Path]:
    network = a_network()
    path = tmp_path_factory.mktemp("yolactplus") / "model.onnx"
    export_network(network, a_spec(network)).write(path)
    return network, path


def test_every_engine_finds_what_pytorch_finds(exported: tuple[SmallPlus, Path]) -> None:
    network, path = exported
    found = verify(network, Bundle.open(path), pictures(2), "blocks")
    heads = 2 if kernels.available() else 1
    assert len(found.comparisons) == heads * len(available_engines())
    for entry in found.comparisons:
        assert isinstance(entry, InstanceComparison)
        assert entry.expected > 20
        assert entry.matched >= 0.98 * entry.expected
        assert entry.largest_score_difference < 1e-3


def test_the_graph_is_standard_static_and_suits_tensorrt(exported: tuple[SmallPlus, Path]) -> None:
    proto = onnx.load(exported[1])
    assert [node.op_type for node in proto.graph.node if node.domain] == ["EdgeSegMaskAssembly"]
    assert [node.op_type for node in proto.graph.node].count("DeformConv") == 3
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in shape_inference.infer_shapes(proto, data_prop=True).graph.value_info
    }
    for node in proto.graph.node:
        assert node.op_type not in ("NonZero", "Loop", "If", "NonMaxSuppression")
        if node.op_type == "TopK":
            assert shapes[node.output[0]][-1] <= 3840
        for output in node.output:
            assert min(shapes.get(output, [1]), default=1) > 0
    # What the device knows of sizes reaches through the deformable convolutions.
    sizes = Graph.read(exported[1].read_bytes()).shapes
    assert sizes["edgeseg.proto"] == (1, 32, 64, 66)


def test_the_file_is_a_checkpoint_too(exported: tuple[SmallPlus, Path]) -> None:
    network, path = exported
    stored = weights_of_bundle(path)
    assert stored is not None
    assert stored.keys() == network.state_dict().keys()
    assert all(torch.equal(stored[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "key", ["maskiou_net.maskiou_net.10.bias", "backbone.stages.0.conv_offset_mask.bias"]
)
def test_another_weight_in_the_graph_is_found(
    exported: tuple[SmallPlus, Path], key: str, tmp_path: Path
) -> None:
    network, path = exported
    proto = onnx.load(path)
    (tensor,) = (t for t in proto.graph.initializer if t.name == key)
    values = numpy_helper.to_array(tensor)
    changed = values + np.linspace(0.2, 1, values.size, dtype=np.float32)
    tensor.CopyFrom(numpy_helper.from_array(changed, key))
    onnx.save(proto, tmp_path / "tampered.onnx")
    with pytest.raises(EngineError):
        verify(network, Bundle.open(tmp_path / "tampered.onnx"), pictures(1), "blocks")


def test_half_weights_find_the_same(exported: tuple[SmallPlus, Path], tmp_path: Path) -> None:
    network = a_network()
    with torch.no_grad():
        for values in network.parameters():
            if values.dim() > 1:
                values.copy_(values.half().float())
    export_network(network, a_spec(network), half_weights=True).write(tmp_path / "half.onnx")
    found = verify(network, Bundle.open(tmp_path / "half.onnx"), pictures(1), "blocks")
    for entry in found.comparisons:
        assert isinstance(entry, InstanceComparison)
        assert entry.matched >= 0.98 * entry.expected


def test_masks_must_be_large_enough_to_be_judged() -> None:
    network = SmallPlus()
    with torch.no_grad():
        # 249 is where the export begins: the masks there are just large enough.
        rows, columns = network.mask_size(249, 249)
        assert network.maskiou_net(torch.zeros(1, 1, rows, columns)).shape == (1, CLASSES)
        rows, columns = network.mask_size(248, 248)
        with pytest.raises(RuntimeError, match=r"[Kk]ernel"):
            network.maskiou_net(torch.zeros(1, 1, rows, columns))
    small = ModelSpec(**{**vars(a_spec(network)), "height": 240, "mask_height": 60})
    with pytest.raises(RequestError, match="from 249x249 on, and 240x264 came"):
        export_network(network, small)
