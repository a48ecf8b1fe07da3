"""A YOLACT of a few channels with random weights: two levels, one head for both, prototypes.

Its weights are such that it finds something in most pictures. What it finds counts as the truth of
a data set, so that its own average precision is 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY, Bundle, write_manifest
from edgeseg.engine import open_engine
from edgeseg.engine.onnxruntime import recorded_golden
from edgeseg.export.instance import append_yolact_head
from edgeseg.export.models.selection import Selection
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceResult
from edgeseg.spec import ModelSpec, Preprocessing

WIDTH, PROTOTYPES, ANCHORS = 8, 4, 3
LEVELS = ((8, 12), (4, 6))

SPEC = ModelSpec(
    name="small",
    architecture="small-yolact",
    task="instance",
    height=32,
    width=48,
    classes=("blue", "green"),
    colours=((0, 0, 255), (0, 255, 0)),
    ignore=255,
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr"),
    capacity=12,
    mask_height=16,
    mask_width=24,
)

#: layers with weights, in the order of the graph: the head once for each level
LAYERS = (
    "stem", "down", "up", "box", "score", "coefficient", "up.2", "box.2", "score.2",
    "coefficient.2", "smooth", "prototype",
)  # fmt: skip
HEADS = ("loc", "conf", "mask", "proto")


def picture(seed: int) -> Pixels:
    """A frame of network size: blocks of colour."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def priors() -> NDArray[np.float32]:
    """(A, 4) centre x, centre y, width, height, relative to the picture."""
    found = []
    for (rows, columns), size in zip(LEVELS, (0.3, 0.5), strict=True):
        for row in range(rows):
            for column in range(columns):
                for ratio in (1.0, 0.7, 1.4):
                    centre = ((column + 0.5) / columns, (row + 0.5) / rows)
                    found.append([*centre, size * ratio, size / ratio])
    return np.array(found, np.float32)


def model(seed: int = 0) -> onnx.ModelProto:
    """The network as exported: with its head, its spec and its golden pair."""
    rng = np.random.default_rng(seed)
    nodes: list[NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def conv(
        source: str, output: str, name: str, shape: tuple[int, ...], scale: float, stride: int = 1
    ) -> str:
        weight, bias = f"{name}.weight", f"{name}.bias"
        if weight not in constants:
            spread = scale / np.sqrt(np.prod(shape[1:]))
            constants[weight] = rng.normal(0, spread, shape).astype(np.float32)
            constants[bias] = rng.normal(0, 0.1 * scale, shape[0]).astype(np.float32)
        side = shape[2] // 2
        return node("Conv", [source, weight, bias], output, pads=[side] * 4, strides=[stride] * 2)

    node("Cast", ["image"], "cast", to=TensorProto.FLOAT)
    node("Transpose", ["cast"], "planes", perm=[0, 3, 1, 2])
    constants["grey"] = np.full((1, 3, 1, 1), 128, np.float32)
    constants["steps"] = np.full((1, 3, 1, 1), 1 / 64, np.float32)
    node("Sub", ["planes", "grey"], "centred")
    node("Mul", ["centred", "steps"], "x")
    conv("x", "stem_out", "stem", (WIDTH, 3, 5, 5), 1.5, 4)
    first = node("Relu", ["stem_out"], "p3")
    conv(first, "down_out", "down", (WIDTH, WIDTH, 3, 3), 1.5, 2)
    second = node("Relu", ["down_out"], "p4")
    parts: dict[str, list[str]] = {"loc": [], "conf": [], "mask": []}
    for number, level in enumerate((first, second)):
        conv(level, f"up_out{number}", "up", (WIDTH, WIDTH, 3, 3), 1.5)
        source = node("Relu", [f"up_out{number}"], f"up{number}")
        for head, name, width, scale in (
            ("loc", "box", 4, 1.0),
            ("conf", "score", len(SPEC.classes) + 1, 1.0),
            ("mask", "coefficient", PROTOTYPES, 1.5),
        ):
            shape = (ANCHORS * width, WIDTH, 3, 3)
            raw = conv(source, f"{name}_out{number}", name, shape, scale)
            rows = node("Transpose", [raw], f"{head}_planes{number}", perm=[0, 2, 3, 1])
            constants[f"{head}_rows"] = np.array([1, -1, width], np.int64)
            part = node("Reshape", [rows, f"{head}_rows"], f"{head}{number}")
            parts[head].append(
                node("Tanh", [part], f"{head}_tanh{number}") if head == "mask" else part
            )
    for head, found in parts.items():
        node("Concat", found, head, axis=1)
    conv(first, "smooth_out", "smooth", (WIDTH, WIDTH, 3, 3), 1.5)
    node("Relu", ["smooth_out"], "smoothed")
    constants["twice"] = np.array([1, 1, 2, 2], np.float32)
    node("Resize", ["smoothed", "", "twice"], "enlarged", mode="linear")
    conv("enlarged", "prototype_out", "prototype", (PROTOTYPES, WIDTH, 1, 1), 2.0)
    node("Relu", ["prototype_out"], "proto")

    graph = helper.make_graph(
        nodes,
        "small_yolact",
        [
            helper.make_tensor_value_info(
                "image", TensorProto.UINT8, [1, SPEC.height, SPEC.width, 3]
            )
        ],
        [helper.make_empty_tensor_value_info(name) for name in HEADS],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    functions = append_yolact_head(graph, priors(), SPEC, Selection(capacity=SPEC.capacity))
    made = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("edgeseg", 1)],
        ir_version=8,
    )
    golden = recorded_golden(made.SerializeToString(), SPEC)
    helper.set_model_props(made, {SPEC_KEY: SPEC.to_json(), GOLDEN_KEY: golden.to_json()})
    onnx.checker.check_model(made, full_check=True)
    return made


@dataclass(frozen=True)
class SmallYolact:
    """The bundle of ``model`` in ``folder``."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> SmallYolact:
        """Makes the bundle ``folder``."""
        folder.mkdir()
        (folder / "model.onnx").write_bytes(model().SerializeToString(deterministic=True))
        write_manifest(folder, {"name": SPEC.name, "accuracy": []})
        return cls(folder)

    def frames(self, folder: Path, count: int, first: int = 1000) -> Path:
        """A folder of ``count`` frames, as PNG."""
        folder.mkdir(parents=True)
        for number in range(count):
            cv2.imwrite(str(folder / f"{number:03}.png"), picture(first + number))
        return folder

    def coco(self, folder: Path, count: int = 6, classes: Sequence[str] = SPEC.classes) -> str:
        """The URI of a data set of ``count`` frames, split "val", with what the bundle finds."""
        self.frames(folder / "val", count, 0)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        engine = open_engine(Bundle.open(self.folder), "onnxruntime", threads=1)
        for number in range(count):
            pixels = picture(number)
            geometry = Geometry.between(SPEC.height, SPEC.width, SPEC)
            outputs = engine.run(pixels)
            result = InstanceResult.from_outputs(outputs, Frame.of(pixels), geometry, SPEC)  # type: ignore[arg-type]
            images.append(
                {
                    "id": number,
                    "file_name": f"{number:03}.png",
                    "height": SPEC.height,
                    "width": SPEC.width,
                }
            )
            areas = result.frame_masks.areas().tolist()
            for entry, area in zip(result.to_coco(number), areas, strict=True):
                # Without pixels there is nothing to find.
                if area:
                    annotations.append(
                        {**entry, "id": len(annotations) + 1, "area": area, "iscrowd": 0}
                    )
        engine.close()
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        (folder / "annotations").mkdir()
        (folder / "annotations" / "instances_val.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
        return f"coco:{folder}"
