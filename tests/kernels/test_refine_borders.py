"""The kernel of refine_borders against the rule in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import KernelError, RequestError

Pixels = NDArray[np.uint8]

PORTABLE_CODE, AVX2_CODE = 4, 8


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    if not kernels.available():
        try:
            kernels.build()
        except KernelError as error:
            pytest.skip(f"the CPU kernels are not here and cannot be built: {error}")


def by_hand(
    class_map: Pixels, frame: Pixels, uncertain: NDArray[np.int64], step: tuple[int, int]
) -> Pixels:
    """The rule as refine_borders.h words it, one vote after the other."""
    height, width = class_map.shape
    refined: Pixels = class_map.copy()
    for y, x in (divmod(int(place), width) for place in uncertain):
        votes: dict[int, int] = {}
        for i in range(-3, 4):
            for j in range(-3, 4):
                row, column = y + i * step[0], x + j * step[1]
                if 0 <= row < height and 0 <= column < width:
                    pair = zip(frame[row, column].tolist(), frame[y, x].tolist(), strict=True)
                    distance = sum(abs(a - b) for a, b in pair)
                    weight = max(60 - distance, 0) * (20 - i * i - j * j)
                    label = int(class_map[row, column])
                    votes[label] = votes.get(label, 0) + weight
        most = max(votes.values())
        best = sorted(label for label, count in votes.items() if count == most)
        before = int(class_map[y, x])
        refined[y, x] = before if before in best else best[0]
    return refined


@pytest.mark.parametrize("step", [(1, 1), (3, 3), (2, 5), (40, 40)])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 1), (7, 8), (19, 75)])
@pytest.mark.parametrize(("classes", "levels"), [(2, 8), (256, 40), (5, 256)])
def test_rule(size: tuple[int, int], step: tuple[int, int], classes: int, levels: int) -> None:
    random = np.random.default_rng(size[0] * 100 + size[1] + step[1])
    class_map = random.integers(0, classes, size).astype(np.uint8)
    # Few levels make like colours, and ties.
    frame = (random.integers(0, levels, (*size, 3)) * (255 // levels or 1)).astype(np.uint8)
    uncertain = np.flatnonzero(random.random(size) < 0.6)
    expected = by_hand(class_map, frame, uncertain, step)
    for flags in (0, PORTABLE_CODE, AVX2_CODE):
        found = kernels.refine_borders(class_map, frame, uncertain, step, flags=flags)
        np.testing.assert_array_equal(found, expected)
    # In any order, and some twice.
    shuffled = random.permutation(np.concatenate([uncertain, uncertain[::3]]))
    found = kernels.refine_borders(class_map, frame, shuffled, step)
    np.testing.assert_array_equal(found, expected)


def test_ties_keep_the_class_and_take_the_lowest_otherwise() -> None:
    # One colour, so that only places count: 3 and 9 are as close to the pixel in the middle.
    frame = np.zeros((1, 3, 3), np.uint8)
    for row, expected in (([3, 7, 9], 7), ([9, 7, 3], 7)):
        class_map = np.array([row], np.uint8)
        found = kernels.refine_borders(class_map, frame, np.array([1]), (1, 1))
        assert found[0, 1] == by_hand(class_map, frame, np.array([1]), (1, 1))[0, 1] == expected
    # 3 and 9 twice each, together more than the middle's own vote.
    frame = np.zeros((1, 5, 3), np.uint8)
    for row in ([9, 9, 7, 3, 3], [3, 3, 7, 9, 9]):
        class_map = np.array([row], np.uint8)
        assert kernels.refine_borders(class_map, frame, np.array([2]), (1, 1))[0, 2] == 3


def test_nothing_uncertain_and_inputs_unchanged() -> None:
    random = np.random.default_rng(1)
    class_map = random.integers(0, 3, (20, 30)).astype(np.uint8)
    frame = random.integers(0, 60, (20, 30, 3)).astype(np.uint8)
    kept = class_map.copy(), frame.copy()
    nothing = kernels.refine_borders(class_map, frame, np.empty(0, np.int64), (3, 3))
    np.testing.assert_array_equal(nothing, class_map)
    assert not np.shares_memory(nothing, class_map)
    changed = kernels.refine_borders(class_map, frame, np.arange(600), (3, 3))
    assert (changed != class_map).any()
    np.testing.assert_array_equal(class_map, kept[0])
    np.testing.assert_array_equal(frame, kept[1])


def test_threads_and_rows_apart_give_the_same() -> None:
    random = np.random.default_rng(2)
    wide = random.integers(0, 90, (70, 140, 3)).astype(np.uint8)
    class_map = random.integers(0, 4, (70, 100)).astype(np.uint8)
    frame = wide[:, 20:120]
    uncertain = np.arange(7000)
    one = kernels.refine_borders(class_map, frame.copy(), uncertain, (3, 3), threads=1)
    for flags in (PORTABLE_CODE, AVX2_CODE):
        found = kernels.refine_borders(class_map, frame, uncertain, (3, 3), threads=1, flags=flags)
        np.testing.assert_array_equal(found, one)
    for threads in (2, 7):
        found = kernels.refine_borders(class_map, frame, uncertain, (3, 3), threads=threads)
        np.testing.assert_array_equal(found, one)


GOOD_MAP = np.zeros((4, 5), np.uint8)
GOOD_FRAME = np.zeros((4, 5, 3), np.uint8)
GOOD_PLACES = np.array([0, 19])


@pytest.mark.parametrize(
    ("class_map", "frame", "uncertain", "step", "says"),
    [
        (GOOD_MAP.astype(np.int32), GOOD_FRAME, GOOD_PLACES, (1, 1), "class_map must be a uint8"),
        (GOOD_MAP[:, ::2], GOOD_FRAME[:, ::2], GOOD_PLACES, (1, 1), "one piece"),
        (np.zeros((4, 9), np.uint8)[:, :5], GOOD_FRAME, GOOD_PLACES, (1, 1), "C-contiguous"),
        (GOOD_MAP, GOOD_FRAME[:3], GOOD_PLACES, (1, 1), r"shape \(4, 5, 3\)"),
        (GOOD_MAP, GOOD_FRAME[..., ::-1], GOOD_PLACES, (1, 1), "one piece"),
        (GOOD_MAP, GOOD_FRAME, GOOD_PLACES.astype(np.int32), (1, 1), "int64"),
        (GOOD_MAP, GOOD_FRAME, np.array([[0]]), (1, 1), "int64"),
        (GOOD_MAP, GOOD_FRAME, [0], (1, 1), "int64"),
        (GOOD_MAP, GOOD_FRAME, np.array([20]), (1, 1), "positions from 0 to 19"),
        (GOOD_MAP, GOOD_FRAME, np.array([-1]), (1, 1), "positions from 0 to 19"),
        (GOOD_MAP, GOOD_FRAME, GOOD_PLACES, (1, 0), "step must be 1 or more"),
    ],
)
def test_wrong_arguments(
    class_map: Pixels, frame: Pixels, uncertain: NDArray[np.int64], step: tuple[int, int], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        kernels.refine_borders(class_map, frame, uncertain, step)
    with pytest.raises(RequestError, match="threads must be 0"):
        kernels.refine_borders(GOOD_MAP, GOOD_FRAME, GOOD_PLACES, (1, 1), threads=-1)


def test_flags_that_are_none() -> None:
    with pytest.raises(KernelError, match="out of bounds"):
        kernels.refine_borders(GOOD_MAP, GOOD_FRAME, GOOD_PLACES, (1, 1), flags=1)
