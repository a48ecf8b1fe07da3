"""Borders that follow the picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.borders import border_step, influence, refine_borders
from edgeseg.geometry import Geometry

WAYS = [
    pytest.param(False, id="numpy"),
    pytest.param(
        True, id="kernel", marks=pytest.mark.skipif(not kernels.available(), reason="not built")
    ),
]


def blobs(size: tuple[int, int], classes: int, seed: int) -> NDArray[np.uint8]:
    """A class map with regions as those of a network, (height, width) uint8."""
    random = np.random.default_rng(seed)
    planes = random.normal(size=(classes, *size)).astype(np.float32)
    smooth = [cv2.GaussianBlur(plane, (0, 0), 3) for plane in planes]
    labels: NDArray[np.uint8] = np.argmax(smooth, axis=0).astype(np.uint8)
    return labels


@pytest.mark.parametrize(
    ("frame", "network", "expected"),
    [
        ((360, 480), (384, 480), (3, 3)),
        ((384, 480), (384, 480), (3, 3)),
        ((720, 1280), (384, 480), (6, 8)),
        ((90, 100), (384, 480), (1, 1)),
    ],
)
def test_step_grows_with_the_frame(
    frame: tuple[int, int], network: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert border_step(Geometry.fitting(*frame, *network, fit="stretch")) == expected


def test_step_of_a_letterboxed_frame_is_square() -> None:
    assert border_step(Geometry.fitting(720, 1280, 512, 512, fit="letterbox")) == (8, 8)


@pytest.mark.parametrize("step", [(1, 1), (3, 3), (4, 2)])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (24, 37), (61, 80)])
def test_both_ways_give_the_same_bytes(size: tuple[int, int], step: tuple[int, int]) -> None:
    if not kernels.available():
        pytest.skip("the compiled kernels are not here")
    random = np.random.default_rng(size[1])
    class_map = blobs(size, 4, seed=5)
    pixels = cv2.blur(random.integers(0, 256, (*size, 3)).astype(np.uint8), (3, 3))
    pixels = np.asarray(pixels, np.uint8).reshape(*size, 3)
    found = refine_borders(class_map, pixels, step, compiled=True)
    np.testing.assert_array_equal(refine_borders(class_map, pixels, step, compiled=False), found)
    # A frame that is not contiguous, as a mirrored view, and one without holes are the same.
    mirrored = refine_borders(class_map[:, ::-1], pixels[:, ::-1], step, compiled=True)
    copied = refine_borders(class_map[:, ::-1].copy(), pixels[:, ::-1].copy(), step, compiled=True)
    np.testing.assert_array_equal(mirrored, copied)


@pytest.mark.parametrize("compiled", WAYS)
def test_a_coarse_border_moves_to_the_edge_of_the_picture(compiled: bool) -> None:
    y, x = np.mgrid[:96, :128]
    truth = ((y - 50) ** 2 + (x - 60) ** 2 < 30**2).astype(np.uint8)
    random = np.random.default_rng(7)
    colours = np.array([[60, 90, 60], [150, 140, 170]])[truth]
    pixels = np.clip(colours + random.normal(0, 4, colours.shape), 0, 255).astype(np.uint8)
    coarse = cv2.resize(truth[4::8, 4::8], (128, 96), interpolation=cv2.INTER_NEAREST)
    refined = refine_borders(coarse, pixels, (3, 3), compiled=compiled)
    before, after = (coarse != truth).sum(), (refined != truth).sum()
    assert before > 200
    assert after < before / 10


@pytest.mark.parametrize("compiled", WAYS)
def test_what_is_far_from_a_border_stays(compiled: bool) -> None:
    random = np.random.default_rng(8)
    class_map = blobs((80, 90), 3, seed=2)
    pixels = random.integers(0, 256, (80, 90, 3)).astype(np.uint8)
    kept = class_map.copy()
    refined = refine_borders(class_map, pixels, (3, 2), compiled=compiled)
    np.testing.assert_array_equal(class_map, kept)
    for y, x in np.argwhere(refined != class_map).tolist():
        near = class_map[max(y - 4, 0) : y + 5, max(x - 2, 0) : x + 3]
        assert len(np.unique(near)) > 1
    assert set(np.unique(refined)) <= set(np.unique(class_map))


def test_one_class_comes_back_as_it_is() -> None:
    class_map = np.full((30, 40), 7, np.uint8)
    assert refine_borders(class_map, np.zeros((30, 40, 3), np.uint8), (3, 3)) is class_map


def test_influence_is_as_far_as_a_change_can_be_seen() -> None:
    step = (3, 2)
    rows, columns = influence(step)
    assert (rows, columns) == (13, 8)
    random = np.random.default_rng(9)
    pixels = random.integers(0, 40, (61, 61, 3)).astype(np.uint8)
    class_map = np.zeros((61, 61), np.uint8)
    class_map[30:33, 30:33] = 1
    whole = refine_borders(class_map, pixels, step)
    window = (slice(30 - rows, 33 + rows), slice(30 - columns, 33 + columns))
    np.testing.assert_array_equal(
        refine_borders(class_map[window], pixels[window], step), whole[window]
    )
