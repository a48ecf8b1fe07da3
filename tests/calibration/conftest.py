"""Small networks written as a few lines of text, and INT8 graphs made of them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.bundle import Bundle
from edgeseg.synthetic import Street

if TYPE_CHECKING:
    import onnx

    from edgeseg.calibration.graph import Graph
    from edgeseg.calibration.placement import Placement
    from edgeseg.calibration.quantize import Scales
    from edgeseg.frame import Pixels
    from tests.conftest import Tiny

OPSET = 19
CHANNELS, SIDE = 4, 8


class Net:
    """The ONNX model of lines such as ``a = Conv(x, kernel=3); r = Relu(a); y = Conv(r)``.

    A call is an operator with its inputs and attributes, its node named after the tensor it makes.
    Where that is not enough, there are words:

    - ``Conv``, ``Deconv`` and ``Linear``: random weights for ``into`` and ``out`` channels (4),
      ``kernel`` (1), ``group`` (1), padded to keep the size unless ``pad=0``, with a ``bias``
      unless 0, all behind a Cast from fp16 if ``half=1``. ``weight=w`` takes what w is.
    - ``Norm``: a BatchNormalization of ``into`` channels.
    - ``Values([1, 4], low, high)``: a random initializer. ``Numbers([...])``: int64 as given.
    - ``Floats([...])``: float32 as given. ``Node([...])``: the same from a Constant node.
    - ``Head``: an operator of domain edgeseg that takes the argmax.

    The input ``image`` is (1, 8, 8, 4) uint8, and ``x`` the same as (1, 4, 8, 8) float32. Outputs
    are what nobody reads, and what ``outputs`` names.
    """

    def __init__(self, text: str, outputs: Sequence[str] = (), *, seed: int = 0) -> None:
        from onnx import TensorProto

        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, NDArray[Any]] = {}
        self._made: list[str] = []
        self._outputs = list(outputs)
        self._node("Cast", ["image"], "cast", to=TensorProto.FLOAT)
        self._node("Transpose", ["cast"], "x", perm=[0, 3, 1, 2])
        for statement in ast.parse("\n".join(map(str.strip, text.strip().splitlines()))).body:
            assert isinstance(statement, ast.Assign)
            (target,), call = statement.targets, statement.value
            assert isinstance(target, ast.Name) and isinstance(call, ast.Call)
            assert isinstance(call.func, ast.Name)
            options = {str(word.arg): _value(word.value) for word in call.keywords}
            self._word(call.func.id, target.id, [_value(entry) for entry in call.args], options)

    def model(self) -> onnx.ModelProto:
        """The whole, with its types and shapes, as ONNX's checker wants it."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        read = {name for node in self._nodes for name in node.input}
        ends = [name for name in self._made if name not in read]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("edgeseg", 1)]
        body = [helper.make_node("ArgMax", ["logits"], ["classes"], axis=1, keepdims=0)]
        model = helper.make_model(
            helper.make_graph(
                self._nodes,
                "net",
                [
                    helper.make_tensor_value_info(
                        "image", TensorProto.UINT8, [1, SIDE, SIDE, CHANNELS]
                    )
                ],
                [helper.make_empty_tensor_value_info(name) for name in [*ends, *self._outputs]],
                [numpy_helper.from_array(array, name) for name, array in self._constants.items()],
            ),
            functions=[
                helper.make_function("edgeseg", "Head", ["logits"], ["classes"], body, opsets[:1])
            ],
            opset_imports=opsets,
            ir_version=9,
        )
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(inferred, full_check=True)
        return inferred

    def _word(self, word: str, target: str, values: list[Any], options: dict[str, Any]) -> None:
        if word == "Values":
            shape, low, high = values
            self._constants[target] = self._rng.uniform(low, high, shape).astype(np.float32)
        elif word == "Numbers":
            self._constants[target] = np.array(values[0], np.int64)
        elif word == "Floats":
            self._constants[target] = np.array(values[0], np.float32)
        elif word == "Node":
            many = isinstance(values[0], list)
            self._node(
                "Constant", [], target, **{"value_floats" if many else "value_float": values[0]}
            )
        elif word == "Norm":
            self._made.append(target)
            count = options.get("into", CHANNELS)
            names = [f"{target}.{part}" for part in ("gamma", "beta", "mean", "variance")]
            for name, low in zip(names, (0.5, -1.0, -1.0, 0.5), strict=True):
                self._constants[name] = self._rng.uniform(low, 1.5, count).astype(np.float32)
            self._node("BatchNormalization", [*values, *names], target)
        elif word in ("Conv", "Deconv", "Linear"):
            self._made.append(target)
            self._layer(word, target, *values, **options)
        else:
            self._made.append(target)
            domain = "edgeseg" if word == "Head" else ""
            self._node(word, values, target, domain=domain, **options)

    def _layer(
        self,
        word: str,
        target: str,
        source: str,
        *,
        into: int = CHANNELS,
        out: int = CHANNELS,
        kernel: int = 1,
        group: int = 1,
        pad: int | None = None,
        bias: int = 1,
        half: int = 0,
        weight: str = "",
        **options: Any,
    ) -> None:
        sides = [kernel] * 2
        shape = [out, into // group, *sides]
        attributes: dict[str, Any] = {
            "group": group,
            "pads": [kernel // 2 if pad is None else pad] * 4,
        }
        if word == "Deconv":
            shape = [into, out // group, *sides]
        if word == "Linear":
            shape, attributes = [out, into], {"transB": options.pop("transB", 1)}
            shape = shape if attributes["transB"] else shape[::-1]
        spread = 1 / np.sqrt(np.prod(shape) / shape[0])
        values = {f"{target}.weight": self._rng.normal(0, spread, shape)}
        if weight:
            values = {}
        if bias:
            values[f"{target}.bias"] = self._rng.normal(0, 1, out)
        names = [weight] if weight else []
        for name, array in values.items():
            self._constants[name] = array.astype(np.float16 if half else np.float32)
            names.append(name)
            if half:
                self._node("Cast", [name], f"{name}.wide", to=1)
                names[-1] = f"{name}.wide"
        kind = {"Conv": "Conv", "Deconv": "ConvTranspose", "Linear": "Gemm"}[word]
        self._node(kind, [source, *names], target, **{**attributes, **options})

    def _node(self, kind: str, inputs: list[str], target: str, **attributes: Any) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node(kind, inputs, [target], target, **attributes))


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


@dataclass(frozen=True)
class Int8:
    """A graph, where and with what scales it was quantized, and what came out."""

    graph: Graph
    placement: Placement
    scales: Scales
    model: onnx.ModelProto


class Workbench:
    """What the tests of quantization do again and again."""

    def model(self, text: str, *outputs: str, seed: int = 0) -> onnx.ModelProto:
        """The model of some lines: see ``Net``."""
        return Net(text, outputs, seed=seed).model()

    def graph(self, text: str, *outputs: str, seed: int = 0) -> Graph:
        """The same, prepared."""
        from edgeseg.calibration.graph import prepared

        return prepared(self.model(text, *outputs, seed=seed))

    def pictures(self, count: int, seed: int = 0) -> list[Pixels]:
        """Frames for such a model."""
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 256, (SIDE, SIDE, CHANNELS)).astype(np.uint8) for _ in range(count)]

    def run(self, model: onnx.ModelProto, pixels: Pixels, *tensors: str) -> dict[str, NDArray[Any]]:
        """What ONNX Runtime gives for ``tensors``, or for the outputs, on one thread and without
        any rewriting of the graph."""
        import onnx
        import onnxruntime

        asked = onnx.ModelProto()
        asked.CopyFrom(model)
        if tensors:
            del asked.graph.output[:]
            asked.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, tensors))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            asked.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {"image": pixels[None]}), strict=True))

    def int8(
        self,
        graph: Graph,
        frames: Sequence[Pixels],
        floats: Sequence[str] = (),
        ranges: str = "minmax",
    ) -> Int8:
        """``graph`` quantized to the ``ranges`` of its tensors in ``frames``."""
        from edgeseg.calibration.observe import observe
        from edgeseg.calibration.placement import place
        from edgeseg.calibration.quantize import Scales, quantize
        from edgeseg.calibration.ranges import scale, threshold, weight_scales

        placement = place(graph, floats=floats)
        tensors = [site.tensor for site in placement.sites]
        seen = observe(graph.model, tensors, frames, total=len(frames))
        scales = Scales(
            {
                group: float(scale(max(threshold(seen[name].histogram, ranges) for name in names)))
                for group, names in placement.groups().items()
            },
            {
                layer.name: weight_scales(graph.floats(layer.weight), layer.axis)
                for layer in placement.layers
            },
        )
        return Int8(graph, placement, scales, quantize(graph, placement, scales))


@pytest.fixture(scope="session")
def bench() -> Workbench:
    """Small models and what is done with them; skips where ``onnx``, which writes them, is not."""
    pytest.importorskip("onnx", reason="the workstation side needs onnx")
    return Workbench()


@pytest.fixture(scope="session")
def streets(bench: Workbench) -> onnx.ModelProto:
    """The shipped model; not to be changed."""
    import onnx

    return onnx.load_from_string(Bundle.open("streets").model.content)


@pytest.fixture(scope="session")
def streets_graph(streets: onnx.ModelProto) -> Graph:
    """The shipped model, prepared; not to be changed."""
    from edgeseg.calibration.graph import prepared

    return prepared(streets)


@pytest.fixture(scope="session")
def street_pictures() -> list[Pixels]:
    """Frames of three generated streets at the shipped model's size."""
    spec = Bundle.open("streets").spec
    return [Street(spec.height, spec.width, seed=seed).frame(30).pixels for seed in range(3)]


@pytest.fixture(scope="session")
def streets_peaks(
    streets_graph: Graph, street_pictures: list[Pixels]
) -> dict[str, NDArray[np.float64]]:
    """Tensor that is quantized in the shipped model -> its channels' peaks in two of the frames."""
    from edgeseg.calibration.observe import observe
    from edgeseg.calibration.placement import place

    names = [site.tensor for site in place(streets_graph).sites]
    seen = observe(streets_graph.model, names, street_pictures[:2], total=2)
    return {name: seen[name].channel_peak for name in names}


@pytest.fixture(scope="session")
def streets_int8(
    bench: Workbench,
    streets_graph: Graph,
    streets_peaks: dict[str, NDArray[np.float64]],
    street_pictures: list[Pixels],
) -> Int8:
    """The shipped model evened and quantized with two of the generated frames; not to be
    changed."""
    from edgeseg.calibration.equalize import equalize

    evened, _ = equalize(streets_graph, streets_peaks, balance=0.65)
    return bench.int8(evened, street_pictures[:2], ranges="mse")


@dataclass(frozen=True)
class Fork:
    """A bundle of six convolutions with CamVid's classes, 32 x 48, and frames that it knows: their
    labels are its own masks, so fp32 has an mIoU of 100 %.

    A channel of ``wide`` is hundreds of times as large as the others, so that it loses much in int8
    unless its channels are evened, and nothing else does.
    """

    folder: Path
    height: int = 32
    width: int = 48

    LAYERS = ("first", "wide", "narrow", "left", "right", "classify")

    def picture(self, seed: int) -> Pixels:
        """A frame, (32, 48, 3): blocks of colour."""
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (self.height // 8, self.width // 8, 3), dtype=np.uint8)
        return blocks.repeat(8, axis=0).repeat(8, axis=1)

    def frames(self, folder: Path, count: int, first: int = 1000) -> Path:
        """A folder of ``count`` frames, as PNG."""
        import cv2

        folder.mkdir(parents=True)
        for number in range(count):
            cv2.imwrite(str(folder / f"{number:03}.png"), self.picture(first + number))
        return folder

    def camvid(self, folder: Path, count: int = 6, first: int = 0) -> str:
        """The URI of a data set of ``count`` labelled frames in ``folder``, split "val"."""
        import cv2

        from edgeseg.engine import open_engine

        self.frames(folder / "images" / "val", count, first)
        labels = folder / "labels" / "val"
        labels.mkdir(parents=True)
        engine = open_engine(Bundle.open(self.folder), "onnxruntime", threads=1)
        for number in range(count):
            class_map = engine.run(self.picture(first + number)).class_map
            cv2.imwrite(str(labels / f"{number:03}.png"), class_map)
        engine.close()
        return f"camvid:{folder}"


def _fork_model(tiny: Tiny) -> onnx.ModelProto:
    """``tiny`` with other arithmetic between the picture and the logits."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(5)
    model: onnx.ModelProto = tiny.model()
    nodes = list(model.graph.node)
    (conv,) = [node for node in nodes if node.op_type == "Conv"]
    constants: dict[str, NDArray[np.float32]] = {"mean": np.full((1, 3, 1, 1), 128, np.float32)}
    made = [helper.make_node("Sub", ["x", "mean"], ["centred"], "centre")]

    def layer(name: str, source: str, shape: tuple[int, ...], stride: int, relu: bool) -> str:
        fan = float(np.prod(shape[1:]))
        weight = rng.normal(0, (2 / fan) ** 0.5, shape)
        if name == "first":
            weight /= 64
        if name == "wide":
            weight[0] *= 400
        if name == "narrow":
            weight[:, 0] /= 400
        constants[f"{name}.weight"] = weight.astype(np.float32)
        constants[f"{name}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
        made.append(
            helper.make_node(
                "Conv", [source, f"{name}.weight", f"{name}.bias"], [f"{name}.raw"], name,
                strides=[stride] * 2, pads=[shape[2] // 2] * 4, kernel_shape=list(shape[2:]),
            )
        )  # fmt: skip
        if relu:
            made.append(helper.make_node("Relu", [f"{name}.raw"], [f"{name}.out"], f"{name}.relu"))
        return str(made[-1].output[0])

    out = layer("first", "centred", (8, 3, 3, 3), 2, True)
    out = layer("wide", out, (8, 8, 3, 3), 2, True)
    out = layer("narrow", out, (8, 8, 3, 3), 2, True)
    sides = [
        layer("left", out, (8, 8, 1, 1), 1, False),
        layer("right", out, (8, 8, 3, 3), 1, False),
    ]
    made.append(helper.make_node("Add", sides, ["sum"], "add"))
    made.append(helper.make_node("Relu", ["sum"], ["joined"], "relu"))
    layer("classify", "joined", (11, 8, 1, 1), 1, False)
    made[-1].output[0] = "logits"
    index = nodes.index(conv)
    nodes[index : index + 1] = made
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in constants.items()
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def fork(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Fork:
    """A small bundle to quantize; not to be changed."""
    from onnx import helper

    from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY, write_manifest
    from edgeseg.classes import CAMVID
    from edgeseg.engine.onnxruntime import recorded_golden

    spec = replace(
        tiny.spec, name="fork", classes=CAMVID.names, colours=CAMVID.colours, ignore=CAMVID.ignore
    )
    model = _fork_model(tiny)
    golden = recorded_golden(model.SerializeToString(), spec)
    del model.metadata_props[:]
    helper.set_model_props(model, {SPEC_KEY: spec.to_json(), GOLDEN_KEY: golden.to_json()})
    folder = tmp_path_factory.mktemp("fork") / "fork"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    write_manifest(folder, {"name": "fork", "accuracy": []})
    return Fork(folder)
