"""Panoptic quality, against a loop over pairs of segments made of sets of pixels."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import DataError, RequestError
from edgeseg.panoptic_quality import LabelledSegment, PanopticQuality

Ids = NDArray[np.int32]
Side = tuple[Ids, list[LabelledSegment]]
THINGS = frozenset({0, 1})


def ids(rows: list[list[int]]) -> Ids:
    return np.array(rows, np.int32)


def random_side(seed: int, coarse: Ids, *, crowds: bool, moved: float) -> Side:
    """Segments of the given map, some of it painted over, with ids and labels of their own."""
    random = np.random.default_rng(seed)
    found = coarse.copy()
    for _ in range(round(moved * 30)):
        y, x = random.integers(0, found.shape[0]), random.integers(0, found.shape[1])
        found[y : y + random.integers(1, 9), x : x + random.integers(1, 9)] = random.integers(0, 14)
    names = np.concatenate([[0], 1 + random.permutation(500)[:13]])
    segments = [
        LabelledSegment(
            int(names[number]),
            # Mostly the same label on both sides.
            int(number % 5 if random.random() < 0.9 else random.integers(0, 5)),
            crowd=crowds and bool(random.random() < 0.15),
        )
        for number in range(1, 14)
    ]
    return names[found].astype(np.int32), segments


def naive(frames: list[tuple[Side, Side]], classes: int) -> list[tuple[float, float, float]]:
    """PQ, SQ and RQ of each class: the paper's sums, one pair of segments after another."""
    overlap: dict[int, list[float]] = defaultdict(list)
    wrong: dict[int, int] = defaultdict(int)
    missed: dict[int, int] = defaultdict(int)
    for (prediction, predicted), (truth, true) in frames:

        def pixels(found: Ids, number: int) -> set[int]:
            return set(np.flatnonzero(found == number).tolist())

        void = pixels(truth, 0)
        used: set[int] = set()
        for real in true:
            area = pixels(truth, real.id)
            if real.crowd or not area:
                continue
            for ours in predicted:
                mine = pixels(prediction, ours.id)
                if ours.label != real.label:
                    continue
                iou = len(mine & area) / len((mine | area) - (mine & void))
                if iou > 0.5:
                    assert ours.id not in used
                    used.add(ours.id)
                    overlap[real.label].append(iou)
                    break
            else:
                missed[real.label] += 1
        for ours in predicted:
            mine = pixels(prediction, ours.id)
            if ours.id in used or not mine:
                continue
            nowhere = set(void)
            for real in true:
                if real.crowd and real.label == ours.label:
                    nowhere |= pixels(truth, real.id)
            if len(mine & nowhere) / len(mine) <= 0.5:
                wrong[ours.label] += 1
    figures = []
    for label in range(classes):
        right = len(overlap[label])
        weight = right + (wrong[label] + missed[label]) / 2
        if not weight:
            figures.append((math.nan,) * 3)
            continue
        total = math.fsum(overlap[label])
        figures.append((total / weight, total / right if right else 0.0, right / weight))
    return figures


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("moved", [0.0, 0.3, 1.0])
def test_it_is_what_a_loop_over_segments_gives(moved: float, crowds: bool) -> None:
    frames = []
    quality = PanopticQuality(6, THINGS)
    for seed in range(6):
        random = np.random.default_rng(seed)
        blocks = random.integers(0, 14, (4, 6)).repeat(7, axis=0).repeat(6, axis=1)
        coarse = blocks.astype(np.int32)
        ours = random_side(100 + seed, coarse, crowds=False, moved=moved)
        theirs = random_side(200 + seed, coarse, crowds=crowds, moved=moved / 3)
        quality.update(*ours, *theirs)
        frames.append((ours, theirs))
    expected = naive(frames, 6)
    found = [(one.pq, one.sq, one.rq) for one in quality.per_class()]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # Class 5 never occurs.
    assert math.isnan(expected[5][0]) and not np.isnan(expected[:5]).any()
    for figures, rows in (
        (quality.all(), expected[:5]),
        (quality.things(), expected[:2]),
        (quality.stuff(), expected[2:5]),
    ):
        means = np.mean(rows, axis=0)
        assert (figures.pq, figures.sq, figures.rq) == pytest.approx(tuple(means), rel=1e-12)
        assert figures.classes == len(rows)
        assert 0 < figures.pq <= 1


CAR, DOG = LabelledSegment(1, 0), LabelledSegment(2, 1)


@pytest.mark.parametrize(
    ("case", "prediction", "predicted", "truth", "true", "expected"),
    [
        ("perfect", [[5, 5, 0]], [LabelledSegment(5, 0)], [[1, 1, 0]], [CAR], (1, 1, 1)),
        ("two of three", [[1, 1, 0]], [CAR], [[1, 1, 1]], [CAR], (2 / 3, 2 / 3, 1)),
        # One half is not enough.
        ("half", [[1, 0]], [CAR], [[1, 1]], [CAR], (0, 0, 0)),
        ("another class", [[2, 2]], [DOG], [[1, 1]], [CAR], (0, 0, 0)),
        ("missed", [[0, 0]], [], [[1, 1]], [CAR], (0, 0, 0)),
        ("invented", [[1, 1, 0]], [CAR], [[2, 2, 2]], [DOG], (0, 0, 0)),
        # What is predicted where there is no truth is no part of the union.
        ("over void", [[1, 1, 1]], [CAR], [[1, 1, 0]], [CAR], (1, 1, 1)),
        ("in void", [[1, 1, 1]], [CAR], [[2, 0, 0]], [DOG], None),
        ("half in void", [[1, 1]], [CAR], [[2, 0]], [DOG], (0, 0, 0)),
        ("in a crowd", [[1, 1, 1]], [CAR], [[9, 9, 2]], [DOG, LabelledSegment(9, 0, True)], None),
        ("all of a crowd", [[1, 1]], [CAR], [[9, 9]], [LabelledSegment(9, 0, True)], None),
        ("another crowd", [[1, 1]], [CAR], [[9, 9]], [LabelledSegment(9, 1, True)], (0, 0, 0)),
        (
            "void and crowd together",
            [[1, 1, 1]],
            [CAR],
            [[9, 0, 2]],
            [DOG, LabelledSegment(9, 0, True)],
            None,
        ),
        ("no pixel of it", [[0, 0]], [CAR], [[0, 0]], [CAR], None),
        ("one pixel", [[1]], [CAR], [[1]], [CAR], (1, 1, 1)),
        ("no segments", [[0]], [], [[0]], [], None),
    ],
)
def test_known_answers_for_cars(
    case: str,
    prediction: list[list[int]],
    predicted: list[LabelledSegment],
    truth: list[list[int]],
    true: list[LabelledSegment],
    expected: tuple[float, float, float] | None,
) -> None:
    quality = PanopticQuality(2, THINGS)
    quality.update(ids(prediction), predicted, ids(truth), true)
    cars = quality.per_class()[0]
    found = None if math.isnan(cars.pq) else (cars.pq, cars.sq, cars.rq)
    assert found == (None if expected is None else pytest.approx(expected)), case


def test_two_halves_of_an_object_find_nothing() -> None:
    quality = PanopticQuality(1, frozenset({0}))
    halves = [LabelledSegment(1, 0), LabelledSegment(2, 0)]
    quality.update(ids([[1, 1, 2, 2]]), halves, ids([[7] * 4]), [LabelledSegment(7, 0)])
    assert quality.all().pq == 0
    quality.update(ids([[1, 1, 1, 2]]), halves, ids([[7] * 4]), [LabelledSegment(7, 0)])
    # One found at 3/4; three predicted and one true are left.
    assert quality.all().pq == pytest.approx(0.75 / (1 + 4 / 2))


def test_nothing_added_is_nan() -> None:
    quality = PanopticQuality(3, frozenset({0}))
    for figures in (quality.all(), quality.things(), quality.stuff(), *quality.per_class()):
        assert math.isnan(figures.pq) and math.isnan(figures.sq) and math.isnan(figures.rq)
    assert quality.all().classes == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int64, np.uint64])
def test_ids_are_of_any_integer_type(kind: type[np.integer]) -> None:
    quality = PanopticQuality(2, THINGS)
    found = ids([[1, 2, 2]]).astype(kind)
    quality.update(found, [CAR, DOG], found, [DOG, CAR])
    assert quality.all().pq == 1


@pytest.mark.parametrize(
    ("prediction", "predicted", "message"),
    [
        ([[1], [1]], [CAR], "same size, and 2x1 against 1x2 came"),
        ([[1, 3]], [CAR], "every id in the prediction is that of a segment, and 3 is not"),
        ([[1, -1]], [CAR], "every id in the prediction is that of a segment, and -1 is not"),
        ([[1, 1]], [], "every id in the prediction is that of a segment, and 1 is not"),
        ([[1, 1]], [CAR, CAR], "have ids of their own"),
        ([[1, 1]], [CAR, LabelledSegment(0, 1)], "have ids of their own, 1 or more"),
        ([[1, 1]], [CAR, LabelledSegment(-4, 1)], "have ids of their own, 1 or more"),
        ([[1, 1]], [LabelledSegment(1, 2)], "labels of the prediction are 0 to 1, and 2 came"),
        ([[1, 1]], [LabelledSegment(1, -1)], "labels of the prediction are 0 to 1, and -1 came"),
    ],
)
def test_what_cannot_be(
    prediction: list[list[int]], predicted: list[LabelledSegment], message: str
) -> None:
    quality = PanopticQuality(2, THINGS)
    with pytest.raises(DataError, match=message):
        quality.update(ids(prediction), predicted, ids([[1, 1]]), [CAR])
    assert math.isnan(quality.all().pq)


@pytest.mark.parametrize(("classes", "things"), [(0, frozenset()), (2, {2}), (2, {-1, 0})])
def test_classes_that_cannot_be(classes: int, things: set[int]) -> None:
    with pytest.raises(RequestError):
        PanopticQuality(classes, frozenset(things))
