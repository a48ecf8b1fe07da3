"""What a user gets for one frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import RequestError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.spec import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="quarters",
    architecture="none",
    task="semantic",
    height=32,
    width=48,
    classes=("sky", "tree", "road", "absent"),
    colours=((0, 0, 255), (0, 255, 0), (255, 0, 0), (9, 9, 9)),
    ignore=255,
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr"),
)


def quarters() -> NDArray[np.uint8]:
    """Sky above; below it, tree on the left and road on the right."""
    class_map = np.zeros((32, 48), np.uint8)
    class_map[16:, :24] = 1
    class_map[16:, 24:] = 2
    return class_map


def result_of(height: int, width: int, *, confidence: bool = False) -> SemanticResult:
    frame = Frame.of(np.full((height, width, 3), 100, np.uint8), 7)
    outputs = Outputs(quarters(), quarters() * 50 if confidence else None)
    return SemanticResult.from_outputs(outputs, frame, Geometry.between(height, width, SPEC), SPEC)


@pytest.mark.parametrize("size", [(32, 48), (64, 96), (16, 24), (120, 60)])
def test_maps_are_at_frame_size(size: tuple[int, int]) -> None:
    result = result_of(*size, confidence=True)
    assert result.index == 7
    assert result.class_map.shape == size and result.class_map.dtype == np.uint8
    assert result.confidence is not None
    np.testing.assert_array_equal(result.confidence, result.class_map * 50)
    assert result.class_map is result.class_map
    half, middle = size[0] // 2, size[1] // 2
    corners = [result.class_map[at] for at in ((0, 0), (half, 0), (half, middle), (-1, -1))]
    assert corners == [0, 1, 2, 2]
    assert result.shares() == pytest.approx({"sky": 0.5, "tree": 0.25, "road": 0.25, "absent": 0.0})


def test_masks_by_name() -> None:
    result = result_of(64, 96)
    masks = [result.mask(name) for name in SPEC.classes]
    assert [mask.dtype == np.bool_ and mask.shape == (64, 96) for mask in masks] == [True] * 4
    assert [int(mask.sum()) for mask in masks] == [3072, 1536, 1536, 0]
    assert (np.sum(masks, axis=0) == 1).all()
    with pytest.raises(RequestError, match="of quarters are sky, tree, road, absent, and 'car'"):
        result.mask("car")


def test_no_confidence_was_exported() -> None:
    assert result_of(32, 48).confidence is None


def test_age_counts_to_the_finished_mask() -> None:
    result = result_of(64, 96)
    assert result.finished_ns >= result.frame.captured_ns
    aged = replace(result, finished_ns=result.frame.captured_ns + 12_500_000)
    assert aged.age_ms == 12.5


@pytest.mark.parametrize(("opacity", "expected"), [(0.0, (100, 100, 100)), (1.0, (255, 0, 0))])
def test_draw_leaves_the_frame_alone(opacity: float, expected: tuple[int, int, int]) -> None:
    result = result_of(64, 96)
    drawn = result.draw(opacity=opacity, legend=False)
    assert drawn.shape == (64, 96, 3) and drawn.dtype == np.uint8
    # Colours are red, green, blue; pixels are blue, green, red.
    assert tuple(int(value) for value in drawn[5, 5]) == expected
    assert (result.frame.pixels == 100).all() and not np.shares_memory(drawn, result.frame.pixels)
    assert (result.draw() != result.draw(legend=False)).any()
