"""The instances of a frame, in every form that a user can take them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.draw import draw_instances
from edgeseg.errors import FrameError, RequestError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.result import Result
from edgeseg.result import result_of as made_result
from edgeseg.spec import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="squares",
    architecture="none",
    task="instance",
    height=64,
    width=64,
    classes=("car", "person", "bus"),
    colours=((0, 0, 255), (0, 255, 0), (255, 0, 0)),
    ignore=255,
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr"),
    capacity=8,
    mask_height=16,
    mask_width=16,
)


def squares() -> InstanceOutputs:
    """A person over a car, and a second car at the lower right edge."""
    boxes = np.array([[16, 8, 32, 40], [8, 24, 56, 48], [48, 48, 72, 80]], np.float32)
    masks = np.zeros((3, 16, 16), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, (boxes / 4).astype(int), strict=True):
        mask[y1:y2, x1:x2] = 255
    return InstanceOutputs(
        boxes, np.array([0.9, 0.75, 0.5], np.float32), np.array([1, 0, 0], np.int32), masks
    )


def result_of(
    outputs: InstanceOutputs, height: int, width: int, spec: ModelSpec = SPEC
) -> InstanceResult:
    frame = Frame.of(np.full((height, width, 3), 100, np.uint8), 7)
    result = made_result(outputs, frame, Geometry.between(height, width, spec), spec)
    assert isinstance(result, InstanceResult)
    return result


def nothing() -> InstanceOutputs:
    return InstanceOutputs(
        np.empty((0, 4), np.float32),
        np.empty(0, np.float32),
        np.empty(0, np.int32),
        np.empty((0, 16, 16), np.uint8),
    )


def test_boxes_are_at_frame_size_and_clipped() -> None:
    result = result_of(squares(), 128, 192)
    assert result.index == 7 and len(result) == 3 and result.names == ["person", "car", "car"]
    np.testing.assert_allclose(
        result.boxes, [[48, 16, 96, 80], [24, 48, 168, 96], [144, 96, 192, 128]]
    )
    assert result.boxes.dtype == np.float32 and result.boxes is result.boxes
    assert result.finished_ns >= result.frame.captured_ns and result.age_ms >= 0


def test_boxes_of_letterboxed_frames() -> None:
    # 100 x 200 into 64 x 64: scaled by 0.32, 16 rows of padding above.
    result = result_of(squares(), 100, 200, replace(SPEC, fit="letterbox"))
    wanted = (squares().boxes - [0, 16, 0, 16]) / 0.32
    np.testing.assert_allclose(
        result.boxes, np.clip(wanted, 0, [200, 100, 200, 100]), rtol=1e-6, atol=1e-4
    )


def test_masks_in_every_form() -> None:
    result = result_of(squares(), 128, 192)
    assert "masks" not in vars(result)
    masks = result.masks
    assert masks.shape == (3, 128, 192) and masks.dtype == np.bool_ and result.masks is masks
    for mask, (x1, y1, x2, y2) in zip(masks, result.boxes.astype(int), strict=True):
        wanted = np.zeros_like(mask)
        wanted[y1:y2, x1:x2] = True
        # A corner is rounded by interpolation.
        assert np.mean(mask != wanted) < 0.002
    bits = result.mask_bits()
    assert bits.shape == (3, 128, 24)
    np.testing.assert_array_equal(np.unpackbits(bits, axis=-1, count=192).astype(bool), masks)
    numbers = result.instance_map
    assert numbers.dtype == np.uint8 and result.maps().keys() == {"instances"}
    by_loop = np.zeros((128, 192), int)
    for k in (2, 1, 0):
        by_loop[masks[k]] = k + 1
    np.testing.assert_array_equal(numbers, by_loop)
    wide = result_of(squares(), 128, 192, replace(SPEC, capacity=300))
    assert wide.instance_map.dtype == np.uint16


def test_masks_and_shares_of_classes() -> None:
    result = result_of(squares(), 128, 192)
    np.testing.assert_array_equal(result.mask("car"), result.masks[1] | result.masks[2])
    assert not result.mask("bus").any()
    with pytest.raises(RequestError, match="of squares are car, person, bus, and 'tram' came"):
        result.mask("tram")
    cars = (result.masks[1] | result.masks[2]) & ~result.masks[0]
    shares = {"car": cars.mean(), "person": result.masks[0].mean(), "bus": 0.0}
    assert result.shares() == pytest.approx(shares)


# pycocotools' own, with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
def test_run_lengths_can_be_read() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    result = result_of(squares(), 128, 192)
    decoded = coco.decode(result.rles()).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded, result.masks)


def test_polygons_outline_the_masks() -> None:
    outputs = squares()
    outputs.masks[2] = 0
    outputs.masks[1, 8, :] = 0  # two parts
    result = result_of(outputs, 128, 192)
    polygons = result.polygons()
    assert [len(parts) for parts in polygons] == [1, 2, 0]
    for parts, mask in zip(polygons, result.masks, strict=True):
        filled = np.zeros(mask.shape, np.uint8)
        for part in parts:
            assert part.ndim == 2 and part.shape[1] == 2 and part.dtype == np.int32
            cv2.fillPoly(filled, [part], 1)
        np.testing.assert_array_equal(filled, mask)


def test_coco_results() -> None:
    result = result_of(squares(), 128, 192)
    entries = result.to_coco(42, category_ids=[3, 1, 6])
    assert json.loads(json.dumps(entries)) == entries
    assert [entry["category_id"] for entry in entries] == [1, 3, 3]
    assert entries[0]["image_id"] == 42 and entries[0]["score"] == pytest.approx(0.9)
    assert entries[1]["bbox"] == pytest.approx([24, 48, 144, 48])
    assert entries[1]["segmentation"]["size"] == [128, 192]
    assert isinstance(entries[1]["segmentation"]["counts"], str)
    assert [entry["category_id"] for entry in result.to_coco(1)] == [2, 1, 1]
    with pytest.raises(RequestError, match="squares has 3 classes, and 2 category ids came"):
        result.to_coco(1, [1, 2])


def test_coco_evaluates_them() -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    result = result_of(squares(), 128, 192)
    entries = result.to_coco(1)
    truth = coco_module.COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1, "height": 128, "width": 192}],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(SPEC.classes)],
        "annotations": [
            {**entry, "id": index + 1, "iscrowd": 0, "area": int(result.masks[index].sum())}
            for index, entry in enumerate(entries)
        ],
    }
    truth.createIndex()
    for kind in ("segm", "bbox"):
        evaluator = evaluation.COCOeval(truth, truth.loadRes(entries), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        assert evaluator.stats[0] == pytest.approx(1.0)


def test_supervision_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(squares(), 128, 192)
    monkeypatch.setattr("edgeseg.instances.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"not installed; `pip install supervision` adds it"):
        result.to_supervision()


def test_supervision_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    double = ModuleType("supervision")
    double.Detections = lambda **values: given.update(values)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", double)
    monkeypatch.setattr("edgeseg.instances.importlib.util.find_spec", lambda name: double)
    result = result_of(squares(), 128, 192)
    result.to_supervision()
    assert given["xyxy"] is result.boxes and given["mask"] is result.masks
    assert given["class_id"].tolist() == [1, 0, 0] and given["class_id"].dtype == np.int64
    assert given["data"]["class_name"].tolist() == result.names


def test_supervision_itself() -> None:
    supervision = pytest.importorskip("supervision")
    detections = result_of(squares(), 128, 192).to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 3


def test_nothing_found() -> None:
    result: Result = result_of(nothing(), 40, 60)
    assert isinstance(result, InstanceResult)
    assert result.summary == "nothing found" and len(result) == 0
    assert result.masks.shape == (0, 40, 60) and result.polygons() == []
    assert result.to_coco(1) == [] and result.boxes.shape == (0, 4)
    np.testing.assert_array_equal(result.draw(), result.frame.pixels)
    assert not result.instance_map.any() and sum(result.shares().values()) == 0
    boxed = result_of(nothing(), 40, 60, replace(SPEC, mask_extent="box"))
    assert boxed.masks.shape == (0, 40, 60)


def test_boxes_without_numbers() -> None:
    outputs = squares()
    outputs.boxes[0] = [np.nan, 1, 9, 9]
    outputs.boxes[1] = [0, 0, np.inf, 4]
    outputs.boxes[2] = [-200, -300, -100, -90]
    for extent in ("image", "box"):
        result = result_of(outputs, 50, 70, replace(SPEC, mask_extent=extent))
        assert not result.masks[0].any() and not result.masks[2].any()
        assert result.draw().shape == (50, 70, 3)


def test_summary_counts() -> None:
    assert result_of(squares(), 64, 64).summary == "2 car, 1 person"


# --- pictures


def test_draw_puts_the_best_on_top() -> None:
    result = result_of(squares(), 128, 192)
    drawn = result.draw(opacity=1.0, legend=False)
    assert not np.shares_memory(drawn, result.frame.pixels)
    assert (result.frame.pixels == 100).all()
    inside = {
        "person over car": ((64, 70), (0, 255, 0)),
        "car alone": ((72, 130), (255, 0, 0)),
        "second car": ((120, 180), (255, 0, 0)),
        "nothing": ((5, 5), (100, 100, 100)),
    }
    for what, (at, colour) in inside.items():
        assert tuple(int(value) for value in drawn[at]) == colour, what
    blended = result.draw(opacity=0.5, legend=False)
    assert tuple(int(v) for v in blended[72, 130]) == (178, 50, 50)


def test_draw_changes_nothing_outside_of_boxes() -> None:
    result = result_of(squares(), 128, 192)
    far = np.ones((128, 192), np.bool_)
    for x1, y1, x2, y2 in result.boxes.astype(int):
        far[max(y1 - 20, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 90] = False
    assert far.any()
    np.testing.assert_array_equal(result.draw()[far], result.frame.pixels[far])
    assert (result.draw() != result.draw(legend=False)).any()


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (300, 8), (24, 24), (1080, 1920)])
def test_draw_any_size(size: tuple[int, int]) -> None:
    result = result_of(squares(), *size)
    drawn = result.draw()
    assert drawn.shape == (*size, 3) and (drawn != 100).any()


def drawn_with(**changes: Any) -> NDArray[np.uint8]:
    values: dict[str, Any] = {
        "windows": [(0, 0, np.ones((4, 4), np.bool_))],
        "boxes": np.array([[0, 0, 4, 4]], np.float32),
        "labels": np.array([0], np.int32),
        "scores": np.array([0.5], np.float32),
        "names": ("a",),
        "colours": ((1, 2, 3),),
    }
    return draw_instances(np.zeros((9, 9, 3), np.uint8), **{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"opacity": 1.5}, RequestError, "between 0 and 1, and 1.5 came"),
        ({"colours": ()}, RequestError, "1 class names came with 0 colours"),
        ({"windows": []}, RequestError, "0 masks, 1 boxes, 1 labels and 1 scores came"),
        (
            {"windows": [(7, 0, np.ones((4, 4), np.bool_))]},
            FrameError,
            r"a mask of 4x4 at \(7, 0\) does not lie in a frame of 9x9",
        ),
        ({"windows": [(-1, 0, np.ones((4, 4), np.bool_))]}, FrameError, "does not lie in"),
    ],
)
def test_draw_refuses(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    assert drawn_with().any()
    with pytest.raises(error, match=says):
        drawn_with(**changes)
