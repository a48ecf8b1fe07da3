"""Boundary IoU, against the definition pixel by pixel and against PyTorch's pooling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.boundary import BoundaryOverlap, boundary_of, boundary_width
from edgeseg.errors import DataError, RequestError
from edgeseg.metrics import Labels

IGNORE = 9


def blocks(seed: int, height: int, width: int, classes: int, side: int = 4) -> Labels:
    """Rectangles of classes, so that there are insides as well as boundaries."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, classes, (-(-height // side), -(-width // side)))
    fine = coarse.repeat(side, axis=0).repeat(side, axis=1)[:height, :width].astype(np.uint8)
    fine[random.random(fine.shape) < 0.01] = 0
    return fine


def boundary_by_loops(mask: NDArray[np.bool_], width: int) -> set[tuple[int, int]]:
    """Pixels of the mask with one that is not of it, or outside, at most ``width`` steps off."""
    found = set()
    height, breadth = mask.shape
    for row, column in zip(*np.nonzero(mask), strict=True):
        around = [
            (row + down, column + right)
            for down in range(-width, width + 1)
            for right in range(-width, width + 1)
        ]
        if any(not (0 <= y < height and 0 <= x < breadth) or not mask[y, x] for y, x in around):
            found.add((int(row), int(column)))
    return found


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [(1, 1, 0.02), (1, 40, 0.02), (40, 1, 0.1), (24, 31, 0.02), (24, 31, 0.08), (11, 14, 0.6)],
)
def test_it_is_the_iou_of_the_sets_of_boundary_pixels(
    height: int, width: int, ratio: float
) -> None:
    score = BoundaryOverlap(4, IGNORE, ratio=ratio)
    steps = max(1, round(ratio * math.sqrt(height**2 + width**2)))
    both, either = [0] * 4, [0] * 4
    for seed in range(3):
        truth, prediction = blocks(seed, height, width, 4), blocks(seed, height, width, 4)
        prediction = np.roll(prediction, (1, 2), axis=(0, 1))
        truth[np.random.default_rng(seed).random(truth.shape) < 0.02] = IGNORE
        score.update(prediction, truth)
        for label in range(4):
            true = boundary_by_loops(truth == label, steps)
            predicted = boundary_by_loops((prediction == label) & (truth != IGNORE), steps)
            both[label] += len(true & predicted)
            either[label] += len(true | predicted)
    expected = [a / b if b else math.nan for a, b in zip(both, either, strict=True)]
    np.testing.assert_array_equal(score.per_class(), expected)
    assert score.mean() == pytest.approx(np.nanmean(expected), abs=1e-15)


def test_it_is_what_pooling_gives_at_the_size_of_a_picture() -> None:
    torch = pytest.importorskip("torch")
    height, width, steps = 180, 240, 6
    truth, prediction = blocks(1, height, width, 5, side=31), blocks(2, height, width, 5, side=29)

    def edge(labels: Labels, label: int) -> NDArray[np.bool_]:
        mask = torch.from_numpy((labels == label).astype(np.float32))[None, None]
        padded = torch.nn.functional.pad(mask, (steps,) * 4)
        inside = -torch.nn.functional.max_pool2d(-padded, 2 * steps + 1, stride=1)
        found: NDArray[np.bool_] = (mask > inside)[0, 0].numpy()
        return found

    score = BoundaryOverlap(5, IGNORE)
    assert boundary_width(height, width) == steps
    score.update(prediction, truth)
    for label, iou in enumerate(score.per_class()):
        true, predicted = edge(truth, label), edge(prediction, label)
        assert iou == (true & predicted).sum() / (true | predicted).sum()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (5, 3), (7, 7), (20, 8)])
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_all_labels_at_once_are_each_by_itself(height: int, width: int, steps: int) -> None:
    labels = blocks(4, height, width, 3, side=5)
    found = boundary_of(labels, steps)
    for label in range(3):
        expected = boundary_by_loops(labels == label, steps)
        assert {(int(y), int(x)) for y, x in np.argwhere(found & (labels == label))} == expected


def test_what_is_right_scores_one_whatever_is_unlabelled() -> None:
    truth = blocks(5, 60, 80, 4, side=20)
    prediction = truth.copy()
    truth[10:30, 20:50] = IGNORE
    score = BoundaryOverlap(4, IGNORE)
    score.update(prediction, truth)
    np.testing.assert_array_equal(score.per_class(), np.ones(4))


def test_it_sees_the_outline_where_the_area_does_not() -> None:
    truth = np.zeros((200, 200), np.uint8)
    truth[20:180, 20:180] = 1
    prediction = np.zeros_like(truth)
    prediction[24:176, 24:176] = 1
    score = BoundaryOverlap(2, IGNORE)
    score.update(prediction, truth)
    # The boundary is 6 pixels wide: frames of 160 and of 152 a side share a ring of two pixels.
    true, predicted, both = (160**2 - 148**2, 152**2 - 140**2, 152**2 - 148**2)
    assert score.per_class()[1] == both / (true + predicted - both)


def test_absent_classes_are_nan_and_invented_ones_zero() -> None:
    score = BoundaryOverlap(3, IGNORE)
    assert math.isnan(score.mean())
    score.update(np.full((8, 8), IGNORE, np.uint8), np.full((8, 8), IGNORE, np.uint8))
    assert math.isnan(score.mean())
    truth = np.zeros((8, 8), np.uint8)
    prediction = truth.copy()
    prediction[4, 4] = 2
    score.update(prediction, truth)
    ring = 8 * 8 - 6 * 6
    # The pixel that is wrong makes its eight neighbours boundary in the prediction.
    np.testing.assert_array_equal(score.per_class(), [ring / (ring + 8), np.nan, 0])


def test_what_cannot_be() -> None:
    score = BoundaryOverlap(3, IGNORE)
    with pytest.raises(DataError, match="same size"):
        score.update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))
    with pytest.raises(DataError, match="of the prediction are 0 to 2, and 3 came"):
        score.update(np.full((2, 3), 3, np.uint8), np.zeros((2, 3), np.uint8))
    assert math.isnan(score.mean())
    for ratio in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(RequestError, match="diagonals wide"):
            BoundaryOverlap(3, IGNORE, ratio=ratio)
    for classes, ignore in ((0, 255), (3, 2)):
        with pytest.raises(RequestError):
            BoundaryOverlap(classes, ignore)
