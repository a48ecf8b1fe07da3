"""An instance model small enough to run in no time, with arithmetic of its own beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY
from edgeseg.engine.onnxruntime import recorded_golden
from edgeseg.golden import AnyGolden
from edgeseg.instances import InstanceOutputs
from edgeseg.onnxfile import MASK_HEAD
from edgeseg.spec import ModelSpec, Preprocessing

OPSET = 18
CELL, STRIDE = 16, 2
# A cell is an instance of its strongest channel where that is, on average, above this.
THRESHOLD = 0.5
# Masks are where a channel, over 16, is stronger than the others, around 128 / 16.
COEFFICIENTS = np.array([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]], np.float32)

SPEC = ModelSpec(
    name="tiny-instances",
    architecture="strongest-cells",
    task="instance",
    height=32,
    width=48,
    classes=("blue", "green", "red"),
    colours=((0, 0, 255), (0, 255, 0), (255, 0, 0)),
    ignore=255,
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr"),
    capacity=6,
    mask_height=16,
    mask_width=24,
)


def cell_boxes() -> NDArray[np.float32]:
    """(6, 4) boxes of the cells, row by row, a little larger than these."""
    rows, columns = SPEC.height // CELL, SPEC.width // CELL
    boxes = []
    for row in range(rows):
        for column in range(columns):
            x, y = column * CELL, row * CELL
            boxes.append([x - 2.25, y - 1.5, x + CELL + 1.75, y + CELL + 3.0])
    return np.array(boxes, np.float32)


@dataclass(frozen=True)
class TinyInstances:
    """A network whose instances are cells of 16 x 16 pixels in which one channel is strong."""

    spec: ModelSpec = SPEC
    threshold: float = THRESHOLD
    golden: AnyGolden | None = None

    def outputs(self, pixels: NDArray[np.uint8]) -> InstanceOutputs:
        """What every engine has to give, by float64 arithmetic."""
        height, width = pixels.shape[:2]
        values = pixels.astype(np.float64)
        cells = values.reshape(height // CELL, CELL, width // CELL, CELL, 3).mean(axis=(1, 3))
        means = cells.reshape(-1, 3) / 255
        order = np.argsort(-means.max(axis=1), kind="stable")
        order = order[means.max(axis=1)[order] > self.threshold]
        labels = means.argmax(axis=1)[order]
        boxes = cell_boxes()[order]
        blocks = values.reshape(height // STRIDE, STRIDE, width // STRIDE, STRIDE, 3)
        prototypes = blocks.mean(axis=(1, 3)) / 16
        logits = np.einsum("yxc,kc->kyx", prototypes, COEFFICIENTS[labels].astype(np.float64))
        levels = np.rint(255 / (1 + np.exp(-logits)))
        y, x = np.mgrid[: height // STRIDE, : width // STRIDE]
        for level, box in zip(levels, boxes / STRIDE, strict=True):
            inside = (x >= max(box[0] - 1, 0)) & (x < min(box[2] + 1, width // STRIDE))
            inside &= (y >= max(box[1] - 1, 0)) & (y < min(box[3] + 1, height // STRIDE))
            level[~inside] = 0
        return InstanceOutputs(
            boxes=boxes,
            scores=means.max(axis=1)[order].astype(np.float32),
            labels=labels.astype(np.int32),
            masks=levels.astype(np.uint8),
        )

    def picture(self, seed: int) -> NDArray[np.uint8]:
        """A frame of network size with an instance in most cells, of random classes."""
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 120, (32, 48, 3), dtype=np.uint8)
        for row in range(2):
            for column in range(3):
                cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                cell[2:-1, 1:-2, rng.integers(3)] = rng.integers(140, 256)
        return pixels

    def model(self) -> Any:
        """The network as an ``onnx.ModelProto`` that keeps EdgeSeg's contract."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        from edgeseg.export.instance import mask_assembly_function

        spec = self.spec
        cells = np.zeros((3, 3, CELL, CELL), np.float32)
        samples = np.zeros((3, 3, STRIDE, STRIDE), np.float32)
        for channel in range(3):
            cells[channel, channel] = 1 / (255 * CELL * CELL)
            samples[channel, channel] = 1 / (16 * STRIDE * STRIDE)
        constants = {
            "cell_kernel": cells,
            "sample_kernel": samples,
            "cell_boxes": cell_boxes(),
            "by_label": COEFFICIENTS,
            "threshold": np.float32(self.threshold),
            "flat": np.array([3, -1], np.int64),
            "all": np.array([spec.capacity], np.int64),
            "first": np.array([0], np.int64),
            "last": np.array([1], np.int64),
        }
        node = helper.make_node
        nodes = [
            node("Cast", ["image"], ["cast"], "cast", to=TensorProto.FLOAT),
            node("Transpose", ["cast"], ["x"], "planes", perm=[0, 3, 1, 2]),
            node("Conv", ["x", "cell_kernel"], ["cells"], "cells", strides=[CELL, CELL]),
            node(
                "Conv", ["x", "sample_kernel"], ["prototypes"], "samples", strides=[STRIDE, STRIDE]
            ),
            node("Reshape", ["cells", "flat"], ["means"], "means"),
            node("ReduceMax", ["means", "first"], ["best"], "best", keepdims=0),
            node("ArgMax", ["means"], ["label_of"], "label_of", axis=0, keepdims=0),
            node("TopK", ["best", "all"], ["sorted", "order"], "topk"),
            node("Greater", ["sorted", "threshold"], ["kept"], "kept"),
            node("Cast", ["kept"], ["kept_int"], "kept_int", to=TensorProto.INT32),
            node("Cast", ["kept"], ["kept_float"], "kept_float", to=TensorProto.FLOAT),
            node("Unsqueeze", ["kept_float", "last"], ["kept_rows"], "kept_rows"),
            node("ReduceSum", ["kept_int", "first"], ["count"], "count", keepdims=1),
            node("Gather", ["label_of", "order"], ["labels_wide"], "labels_wide"),
            node("Cast", ["labels_wide"], ["labels_all"], "labels_all", to=TensorProto.INT32),
            node("Mul", ["labels_all", "kept_int"], ["labels_flat"], "labels_flat"),
            node("Unsqueeze", ["labels_flat", "first"], ["labels"], "labels"),
            node("Mul", ["sorted", "kept_float"], ["scores_flat"], "scores_flat"),
            node("Unsqueeze", ["scores_flat", "first"], ["scores"], "scores"),
            node("Gather", ["cell_boxes", "order"], ["boxes_all"], "boxes_all"),
            node("Mul", ["boxes_all", "kept_rows"], ["boxes_flat"], "boxes_flat"),
            node("Unsqueeze", ["boxes_flat", "first"], ["boxes"], "boxes"),
            node("Gather", ["by_label", "labels_flat"], ["weights"], "weights"),
            node("Unsqueeze", ["weights", "first"], ["coefficients"], "coefficients"),
            node(
                MASK_HEAD,
                ["prototypes", "coefficients", "boxes", "count"],
                ["levels"],
                "head",
                domain="edgeseg",
                network_height=spec.height,
                network_width=spec.width,
            ),
            node("Cast", ["levels"], ["masks"], "masks", to=TensorProto.UINT8),
        ]
        k = spec.capacity
        outputs = [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, k, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, k]),
            helper.make_tensor_value_info("labels", TensorProto.INT32, [1, k]),
            helper.make_tensor_value_info("count", TensorProto.INT32, [1]),
            helper.make_tensor_value_info(
                "masks", TensorProto.UINT8, [1, k, spec.mask_height, spec.mask_width]
            ),
        ]
        graph = helper.make_graph(
            nodes,
            "tiny_instances",
            [
                helper.make_tensor_value_info(
                    "image", TensorProto.UINT8, [1, spec.height, spec.width, 3]
                )
            ],
            outputs,
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        model = helper.make_model(
            graph,
            functions=[mask_assembly_function()],
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("edgeseg", 1)],
            ir_version=8,
        )
        golden = self.golden or recorded_golden(model.SerializeToString(), spec)
        helper.set_model_props(model, {SPEC_KEY: spec.to_json(), GOLDEN_KEY: golden.to_json()})
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
        manifest = {
            "files": {"model.onnx": hashlib.sha256(content).hexdigest()},
            "name": self.spec.name,
            "accuracy": [],
        }
        (folder / "bundle.json").write_text(json.dumps(manifest))
        return folder
