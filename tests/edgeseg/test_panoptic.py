"""A semantic and an instance result become one, against loops over pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.panoptic import Fusion, PanopticResult
from edgeseg.result import Outputs, Result, SemanticResult
from tests.edgeseg.test_instances import SPEC, nothing, result_of

SEMANTIC = replace(
    SPEC,
    task="semantic",
    classes=("sky", "car", "road"),
    colours=((70, 130, 180), (0, 0, 142), (128, 64, 128)),
    capacity=0,
    mask_height=0,
    mask_width=0,
)


def semantic_of(class_map: NDArray[np.uint8], *, sure: bool = False) -> SemanticResult:
    height, width = class_map.shape
    spec = replace(SEMANTIC, height=height, width=width)
    frame = Frame.of(np.full((height, width, 3), 90, np.uint8), 3)
    confidence = np.full_like(class_map, 204) if sure else None
    at = Geometry.between(height, width, spec)
    return SemanticResult.from_outputs(Outputs(class_map, confidence), frame, at, spec)


def random_instances(rng: np.random.Generator, count: int, size: tuple[int, int]) -> InstanceResult:
    start = rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([start, start + rng.uniform(2, 30, (count, 2))], axis=1)
    outputs = InstanceOutputs(
        boxes.astype(np.float32),
        np.sort(rng.random(count).astype(np.float32))[::-1].copy(),
        rng.integers(0, 3, count).astype(np.int32),
        np.where(rng.random((count, 16, 16)) < 0.85, 255, 0).astype(np.uint8),
    )
    return result_of(outputs, *size, replace(SPEC, capacity=count))


@pytest.mark.parametrize("seed", range(4))
def test_fusion_by_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (48, 70)
    class_map = rng.integers(0, 3, (6, 7)).repeat(8, 0).repeat(10, 1).astype(np.uint8)
    semantic, instances = semantic_of(class_map), random_instances(rng, 12, size)
    fusion = Fusion(score=0.3, remains=0.6, stuff_area=0.1)
    found = PanopticResult.fuse(semantic, instances, fusion)
    ids = np.zeros(size, np.int32)
    names = []
    for k, mask in enumerate(instances.masks):
        free = mask & (ids == 0)
        if instances.scores[k] < 0.3 or free.sum() < max(0.6 * mask.sum(), 1):
            continue
        names.append(instances.names[k])
        ids[free] = len(names)
    things = len(names)
    for label, name in ((0, "sky"), (2, "road")):
        covered = (ids == 0) & (class_map == label)
        if covered.sum() >= max(0.1 * ids.size, 1):
            names.append(name)
            ids[covered] = len(names)
    np.testing.assert_array_equal(found.ids, ids)
    assert [segment.name for segment in found.segments] == names and 1 < things < 12
    assert [segment.is_thing for segment in found.segments] == [
        index < things for index in range(len(names))
    ]
    assert [segment.area for segment in found.segments] == np.bincount(ids.ravel())[1:].tolist()
    for segment, box in zip(found.segments, found.boxes, strict=True):
        y, x = np.nonzero(ids == segment.id)
        assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]


def test_a_class_of_both_is_a_thing() -> None:
    class_map = np.ones((48, 70), np.uint8)
    empty = PanopticResult.fuse(semantic_of(class_map), result_of(nothing(), 48, 70))
    assert not empty.ids.any() and empty.segments == () and empty.summary == "nothing found"
    assert empty.boxes.shape == (0, 4) and empty.segments_info({}) == []
    np.testing.assert_array_equal(empty.draw(), empty.frame.pixels)


def test_stuff_alone() -> None:
    class_map = np.zeros((48, 70), np.uint8)
    class_map[24:] = 2
    both = PanopticResult.fuse(semantic_of(class_map, sure=True), result_of(nothing(), 48, 70))
    assert both.summary == "sky, road" and both.index == 7 and both.age_ms >= 0
    assert [segment.score for segment in both.segments] == pytest.approx([0.8, 0.8])
    plain = PanopticResult.fuse(semantic_of(class_map), result_of(nothing(), 48, 70))
    assert [segment.score for segment in plain.segments] == [1.0, 1.0]
    drawn = both.draw(opacity=1.0, legend=False)
    assert drawn[5, 5].tolist() == [180, 130, 70] and drawn[40, 5].tolist() == [128, 64, 128]
    assert both.maps()["segments"].dtype == np.uint16


def test_coco_entries() -> None:
    rng = np.random.default_rng(1)
    class_map = np.full((48, 70), 2, np.uint8)
    found = PanopticResult.fuse(semantic_of(class_map), random_instances(rng, 5, (48, 70)))
    numbers = {"car": 3, "person": 1, "bus": 6, "road": 100}
    entries = found.segments_info(numbers)
    assert [entry["category_id"] for entry in entries] == [
        numbers[segment.name] for segment in found.segments
    ]
    assert entries[-1]["bbox"] == [0, 0, 70, 48] and entries[-1]["iscrowd"] == 0
    with pytest.raises(RequestError, match="has a category id, and road came without one"):
        found.segments_info({"car": 3, "person": 1, "bus": 6})
    large = replace(found, ids=found.ids + 70_000)
    blue, green, red = (large.id_picture()[..., channel].astype(int) for channel in range(3))
    np.testing.assert_array_equal(red + 256 * green + 65536 * blue, large.ids)


def test_things_have_a_rim() -> None:
    rng = np.random.default_rng(1)
    found = PanopticResult.fuse(
        semantic_of(np.full((48, 70), 2, np.uint8)), random_instances(rng, 3, (48, 70))
    )
    drawn = found.draw(opacity=1.0, legend=False)
    things = {segment.id for segment in found.segments if segment.is_thing}
    rims = 0
    for y in range(48):
        for x in range(70):
            own = int(found.ids[y, x])
            around = found.ids[max(y - 1, 0) : y + 2, x].tolist()
            around += found.ids[y, max(x - 1, 0) : x + 2].tolist()
            is_rim = own in things and any(other != own for other in around)
            rims += is_rim
            red, green, blue = found.segments[own - 1].colour
            wanted = [245, 245, 245] if is_rim else [blue, green, red]
            assert drawn[y, x].tolist() == wanted
    assert rims > 20
    assert found.draw().shape == (48, 70, 3)


def test_frames_of_two_sizes() -> None:
    with pytest.raises(RequestError, match=r"frames of \(48, 70\) and \(64, 64\) came"):
        PanopticResult.fuse(semantic_of(np.zeros((48, 70), np.uint8)), result_of(nothing(), 64, 64))


@pytest.mark.parametrize("name", ["score", "remains", "stuff_area"])
def test_fusions_that_cannot_be(name: str) -> None:
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(RequestError, match=f"{name} of a fusion is between 0 and 1"):
            replace(Fusion(), **{name: value})


def test_results_of_all_tasks_have_one_protocol() -> None:
    results: list[Result] = [
        semantic_of(np.zeros((48, 70), np.uint8)),
        result_of(nothing(), 48, 70),
    ]
    for result in results:
        assert result.draw().shape == (48, 70, 3) and result.maps() and result.summary
