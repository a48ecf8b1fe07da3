"""Hausdorff distances, against all pairs of outline pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import DataError, RequestError
from edgeseg.hausdorff import HausdorffDistance, hausdorff

Mask = NDArray[np.bool_]


def outline_by_loops(mask: Mask) -> list[tuple[int, int]]:
    height, width = mask.shape
    found = []
    for row, column in np.argwhere(mask).tolist():
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if not (0 <= y < height and 0 <= x < width) or not mask[y, x]:
                found.append((row, column))
                break
    return found


def by_pairs(first: Mask, second: Mask, percentile: float) -> float:
    """The definition: nearest of the other outline for each pixel, in float64, both ways."""
    outlines = [outline_by_loops(mask) for mask in (first, second)]
    if not all(outlines):
        return math.hypot(*first.shape) if any(outlines) else math.nan
    ways = []
    for here, there in (outlines, outlines[::-1]):
        nearest = sorted(min(math.dist(a, b) for b in there) for a in here)
        # Linear between the two ranks that the percentile falls between.
        rank = (len(nearest) - 1) * percentile / 100
        low, high = math.floor(rank), math.ceil(rank)
        ways.append(nearest[low] + (nearest[high] - nearest[low]) * (rank - low))
    return max(ways)


def mask(seed: int, height: int, width: int, share: float) -> Mask:
    """Blobs of that share of the picture, more or less."""
    random = np.random.default_rng(seed)
    coarse = random.random((-(-height // 3), -(-width // 3))) < share
    return coarse.repeat(3, axis=0).repeat(3, axis=1)[:height, :width]


@pytest.mark.parametrize("percentile", [0, 50, 95, 100])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 17), (17, 1), (2, 2), (13, 19), (24, 9)])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_it_is_that_of_all_pairs(height: int, width: int, share: float, percentile: float) -> None:
    for seed in range(4):
        first, second = mask(seed, height, width, share), mask(seed + 50, height, width, share)
        found = hausdorff(first, second, percentile=percentile)
        expected = by_pairs(first, second, percentile)
        # Distances are float32.
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert found == hausdorff(second, first, percentile=percentile) or math.isnan(found)


def test_it_is_that_of_all_pairs_in_a_picture() -> None:
    torch = pytest.importorskip("torch")
    first, second = (np.zeros((120, 160), np.bool_) for _ in range(2))
    first[10:70, 20:90] = True
    second[14:80, 15:150] = True
    second[5, 5] = True
    points = [
        torch.tensor(outline_by_loops(found), dtype=torch.float64) for found in (first, second)
    ]
    distances = torch.cdist(*points, compute_mode="donot_use_mm_for_euclid_dist")
    ways = [distances.amin(dim=axis).quantile(0.95) for axis in (0, 1)]
    assert hausdorff(first, second) == pytest.approx(float(max(ways)), rel=1e-6)


@pytest.mark.parametrize(
    ("case", "first", "second", "distance"),
    [
        ("the same", [[0, 1, 1]], [[0, 1, 1]], 0),
        ("one pixel each", [[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]], math.sqrt(5)),
        ("both empty", [[0, 0]], [[0, 0]], math.nan),
        ("nothing found", [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], [[1, 0, 0, 0]] * 3, 5),
        ("all of it", [[1, 1], [1, 1]], [[1, 1], [1, 1]], 0),
        # Five outline pixels against one: 95 % of the way from 3 to 4.
        ("a bar", [[1, 1, 1, 1, 1]], [[1, 0, 0, 0, 0]], 3.8),
    ],
)
def test_known_distances(
    case: str, first: list[list[int]], second: list[list[int]], distance: float
) -> None:
    found = hausdorff(np.array(first, np.bool_), np.array(second, np.bool_))
    assert found == pytest.approx(distance, nan_ok=True), case


def test_a_frame_counts_once_for_each_class_in_it() -> None:
    random = np.random.default_rng(6)
    score = HausdorffDistance(4, 9)
    sums: list[list[float]] = [[] for _ in range(4)]
    for _ in range(5):
        # Class 3 never occurs, and class 2 not in every frame.
        truth, prediction = (
            random.integers(0, 2, (5, 6)).repeat(3, axis=0).repeat(3, axis=1).astype(np.uint8)
            for _ in range(2)
        )
        if random.random() < 0.5:
            prediction[3:5, 4:6] = 2
        truth[random.random(truth.shape) < 0.1] = 9
        score.update(prediction, truth)
        for label in range(4):
            found = by_pairs((prediction == label) & (truth != 9), truth == label, 95)
            if not math.isnan(found):
                sums[label].append(found)
    expected = [math.fsum(one) / len(one) if one else math.nan for one in sums]
    np.testing.assert_allclose(score.per_class(), expected, rtol=1e-6)
    assert math.isnan(expected[3]) and expected[2] == pytest.approx(math.hypot(15, 18))
    assert score.mean() == pytest.approx(np.nanmean(expected), rel=1e-6)


def test_nothing_labelled_is_nan() -> None:
    score = HausdorffDistance(2, 9)
    score.update(np.ones((3, 3), np.uint8), np.full((3, 3), 9, np.uint8))
    assert math.isnan(score.mean()) and np.isnan(score.per_class()).all()


def test_what_cannot_be() -> None:
    score = HausdorffDistance(3, 9)
    with pytest.raises(DataError, match="same size"):
        score.update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))
    with pytest.raises(DataError, match="of the truth are 0 to 2, or 9 for no label, and 4 came"):
        score.update(np.zeros((2, 3), np.uint8), np.full((2, 3), 4, np.uint8))
    assert math.isnan(score.mean())
    for percentile in (-1.0, 101.0, math.nan):
        with pytest.raises(RequestError, match="0 to 100"):
            HausdorffDistance(3, 9, percentile=percentile)
    for classes, ignore in ((0, 255), (3, 2)):
        with pytest.raises(RequestError):
            HausdorffDistance(classes, ignore)
