"""A model small enough to run in no time, made by hand, with arithmetic of its own beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY
from edgeseg.golden import Golden, golden_image
from edgeseg.onnxfile import HEAD
from edgeseg.spec import ModelSpec, Preprocessing

OPSET = 18
STRIDE = 8


@dataclass(frozen=True)
class Tiny:
    """A network whose class is the strongest channel: the mean of 8x8 blocks, upsampled.

    Classes "blue", "green" and "red", frames 32 x 48. Logits are the channels over 32, so that
    confidences differ.
    """

    spec: ModelSpec
    align_corners: bool = False
    golden: Golden | None = None

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(3, height / 8, width / 8) means of the blocks of (height, width, 3) ``pixels``."""
        height, width = pixels.shape[:2]
        blocks = pixels.reshape(height // STRIDE, STRIDE, width // STRIDE, STRIDE, 3)
        means: NDArray[np.float64] = blocks.astype(np.float64).mean(axis=(1, 3))
        logits: NDArray[np.float64] = means.transpose(2, 0, 1) / 32
        return logits

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The logits at network size, (3, height, width), by float64 arithmetic."""
        rows = _weights(self.spec.height, self.spec.height // STRIDE, self.align_corners)
        columns = _weights(self.spec.width, self.spec.width // STRIDE, self.align_corners)
        scores: NDArray[np.float64] = rows @ self.logits(pixels) @ columns.T
        return scores

    def class_map(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(height, width) uint8: what every engine has to give."""
        class_map: NDArray[np.uint8] = self.scores(pixels).argmax(axis=0).astype(np.uint8)
        return class_map

    def confidence(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(height, width) uint8: the winner's softmax times 255."""
        scores = self.scores(pixels)
        odds = np.exp(scores - scores.max(axis=0))
        levels: NDArray[np.uint8] = np.rint(255 / odds.sum(axis=0)).astype(np.uint8)
        return levels

    def picture(self, seed: int) -> NDArray[np.uint8]:
        """A frame of network size, random blocks of colour: all three classes are in it."""
        rng = np.random.default_rng(seed)
        size = (self.spec.height // 4, self.spec.width // 4, 3)
        colours: NDArray[np.uint8] = rng.integers(0, 256, size, dtype=np.uint8)
        return colours.repeat(4, axis=0).repeat(4, axis=1)

    def model(self) -> Any:
        """The network as an ``onnx.ModelProto`` that keeps EdgeSeg's contract."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        outputs = ["class_map", *(["confidence"] if self.spec.confidence else [])]
        kernel = np.zeros((3, 3, STRIDE, STRIDE), np.float32)
        for channel in range(3):
            kernel[channel, channel] = 1 / (32 * STRIDE * STRIDE)
        head = helper.make_node(
            HEAD,
            ["logits"],
            [f"raw_{name}" for name in outputs],
            "head",
            domain="edgeseg",
            height=self.spec.height,
            width=self.spec.width,
            align_corners=int(self.align_corners),
        )
        shape = [1, self.spec.height, self.spec.width]
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["image"], ["cast"], "cast", to=TensorProto.FLOAT),
                helper.make_node("Transpose", ["cast"], ["x"], "planes", perm=[0, 3, 1, 2]),
                helper.make_node(
                    "Conv", ["x", "kernel"], ["logits"], "conv", strides=[STRIDE, STRIDE]
                ),
                head,
                *(
                    helper.make_node("Cast", [f"raw_{name}"], [name], name, to=TensorProto.UINT8)
                    for name in outputs
                ),
            ],
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, [*shape, 3])],
            [helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name in outputs],
            [numpy_helper.from_array(kernel, "kernel")],
        )
        model = helper.make_model(
            graph,
            functions=[_head_function(self.spec.confidence, self.align_corners)],
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("edgeseg", 1)],
            ir_version=8,
        )
        seed = 3
        image = golden_image(seed, self.spec.height, self.spec.width)
        golden = self.golden or Golden.of(seed, self.class_map(image))
        helper.set_model_props(model, {SPEC_KEY: self.spec.to_json(), GOLDEN_KEY: golden.to_json()})
        onnx.checker.check_model(model, full_check=True)
        return model

    def content(self) -> bytes:
        """The model's file."""
        content: bytes = self.model().SerializeToString(deterministic=True)
        return content

    def write(self, folder: Path) -> Path:
        """Makes the bundle ``folder``; returns it."""
        folder.mkdir()
        content = self.content()
        (folder / "model.onnx").write_bytes(content)
        (folder / "report.html").write_text("<p>a report")
        files = {
            "model.onnx": hashlib.sha256(content).hexdigest(),
            "report.html": hashlib.sha256(b"<p>a report").hexdigest(),
        }
        manifest = {"files": files, "name": self.spec.name, "accuracy": []}
        (folder / "bundle.json").write_text(json.dumps(manifest))
        return folder


def _weights(size: int, source: int, align_corners: bool) -> NDArray[np.float64]:
    """(size, source) weights of linear interpolation, as ONNX's Resize defines it."""
    at = np.arange(size, dtype=np.float64)
    position = at * (source - 1) / (size - 1) if align_corners else (at + 0.5) * source / size - 0.5
    position = position.clip(0, source - 1)
    low = np.minimum(np.floor(position).astype(np.int64), source - 2)
    weights = np.zeros((size, source))
    weights[np.arange(size), low] = 1 - (position - low)
    weights[np.arange(size), low + 1] = position - low
    return weights


def _head_function(confidence: bool, align_corners: bool) -> Any:
    """The head in standard operators, for one convention."""
    import onnx
    from onnx import TensorProto, helper

    def attribute(name: str) -> Any:
        node = helper.make_node("Constant", [], [f"{name}_scalar"], f"{name}_scalar")
        reference = onnx.AttributeProto()
        reference.name = "value_int"
        reference.type = onnx.AttributeProto.INT
        reference.ref_attr_name = name
        node.attribute.append(reference)
        return node

    nodes = [
        helper.make_node("Shape", ["logits"], ["outer"], "outer", start=0, end=2),
        helper.make_node("Constant", [], ["one"], "one", value_ints=[1]),
        attribute("height"),
        attribute("width"),
        helper.make_node("Reshape", ["height_scalar", "one"], ["rows"]),
        helper.make_node("Reshape", ["width_scalar", "one"], ["columns"]),
        helper.make_node("Concat", ["outer", "rows", "columns"], ["sizes"], "sizes", axis=0),
        helper.make_node(
            "Resize",
            ["logits", "", "", "sizes"],
            ["scores"],
            "upsample",
            mode="linear",
            coordinate_transformation_mode="align_corners" if align_corners else "half_pixel",
        ),
        helper.make_node("ArgMax", ["scores"], ["winner"], "argmax", axis=1, keepdims=0),
        helper.make_node("Cast", ["winner"], ["class_map"], "to_int32", to=TensorProto.INT32),
    ]
    outputs = ["class_map"]
    if confidence:
        outputs.append("confidence")
        nodes += [
            helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=1),
            helper.make_node("ReduceMax", ["shares", "one"], ["best"], "best", keepdims=0),
            helper.make_node("Constant", [], ["full"], "full", value_float=255.0),
            helper.make_node("Mul", ["best", "full"], ["scaled"], "scaled"),
            helper.make_node("Round", ["scaled"], ["rounded"], "rounded"),
            helper.make_node("Cast", ["rounded"], ["confidence"], "level", to=TensorProto.INT32),
        ]
    return helper.make_function(
        "edgeseg",
        HEAD,
        ["logits"],
        outputs,
        nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=["height", "width", "align_corners"],
    )


TINY_SPEC = ModelSpec(
    name="tiny",
    architecture="strongest-channel",
    task="semantic",
    height=32,
    width=48,
    classes=("blue", "green", "red"),
    colours=((0, 0, 255), (0, 255, 0), (255, 0, 0)),
    ignore=255,
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr"),
)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """The tiny network; skips where the ``onnx`` package, which writes it, is missing."""
    pytest.importorskip("onnx")
    return Tiny(TINY_SPEC)


@pytest.fixture(scope="session")
def sure_tiny(tiny: Tiny) -> Tiny:
    """The tiny network with a confidence map."""
    return replace(tiny, spec=replace(tiny.spec, confidence=True))


@pytest.fixture
def bundle_folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A bundle of the tiny network, the test's own to spoil."""
    return tiny.write(tmp_path / "tiny")


@pytest.fixture
def leftovers() -> Callable[[Path], list[str]]:
    """Names below a folder that only half-written files have."""

    def found(folder: Path) -> list[str]:
        return sorted(
            path.name
            for path in folder.rglob("*")
            if ".part" in path.name or path.name.startswith(".")
        )

    return found
