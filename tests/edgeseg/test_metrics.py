"""The confusion matrix, against sets of pixels and against loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import DataError, RequestError
from edgeseg.metrics import ConfusionMatrix

Labels = NDArray[np.uint8]


def labels(rows: list[list[int]]) -> Labels:
    return np.array(rows, np.uint8)


def random_pair(seed: int, classes: int, ignore: int) -> tuple[Labels, Labels]:
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, (23, 37)).astype(np.uint8)
    prediction = random.integers(0, classes, (23, 37)).astype(np.uint8)
    prediction[random.random(truth.shape) < 0.6] = 0
    truth[random.random(truth.shape) < 0.2] = ignore
    return prediction, truth


def iou_by_sets(pairs: list[tuple[Labels, Labels]], classes: int, ignore: int) -> list[float]:
    """Intersection over union of sets of pixel positions, the definition taken literally."""
    result = []
    for label in range(classes):
        predicted, true = set(), set()
        for frame, (prediction, truth) in enumerate(pairs):
            for place in np.ndindex(truth.shape):
                if truth[place] == ignore:
                    continue
                if prediction[place] == label:
                    predicted.add((frame, *place))
                if truth[place] == label:
                    true.add((frame, *place))
        either = predicted | true
        result.append(len(predicted & true) / len(either) if either else math.nan)
    return result


@pytest.mark.parametrize(("classes", "ignore"), [(1, 255), (2, 2), (11, 11), (19, 255)])
def test_iou_is_that_of_the_sets_of_pixels(classes: int, ignore: int) -> None:
    pairs = [random_pair(seed, classes, ignore) for seed in range(3)]
    matrix = ConfusionMatrix(classes, ignore)
    for prediction, truth in pairs:
        matrix.update(prediction, truth)
    expected = iou_by_sets(pairs, classes, ignore)
    np.testing.assert_allclose(matrix.per_class_iou(), expected, rtol=0, atol=1e-15)
    assert matrix.miou() == pytest.approx(math.fsum(expected) / classes, abs=1e-15)


@pytest.mark.parametrize(("classes", "ignore"), [(1, 255), (2, 2), (11, 11), (19, 255)])
def test_dice_is_the_f1_score_of_the_pixels(classes: int, ignore: int) -> None:
    pairs = [random_pair(seed, classes, ignore) for seed in range(3)]
    matrix = ConfusionMatrix(classes, ignore)
    for prediction, truth in pairs:
        matrix.update(prediction, truth)
    expected = []
    for label in range(classes):
        right = wrong = missed = 0
        for prediction, truth in pairs:
            for place in np.ndindex(truth.shape):
                if truth[place] != ignore:
                    said, is_so = prediction[place] == label, truth[place] == label
                    right += bool(said and is_so)
                    wrong += bool(said and not is_so)
                    missed += bool(is_so and not said)
        precision, recall = right / (right + wrong), right / (right + missed)
        expected.append(2 * precision * recall / (precision + recall) if right else 0.0)
    np.testing.assert_allclose(matrix.per_class_dice(), expected, rtol=1e-12)
    assert matrix.dice() == pytest.approx(math.fsum(expected) / classes, rel=1e-12)
    iou = matrix.per_class_iou()
    np.testing.assert_allclose(matrix.per_class_dice(), 2 * iou / (1 + iou), rtol=1e-12)


def test_dice_leaves_out_absent_classes() -> None:
    matrix = ConfusionMatrix(3, 9)
    assert math.isnan(matrix.dice())
    matrix.update(labels([[0, 0, 1]]), labels([[0, 1, 9]]))
    np.testing.assert_array_equal(matrix.per_class_dice(), [2 / 3, 0, np.nan])
    assert matrix.dice() == pytest.approx(1 / 3)


def test_counts_and_accuracy_are_those_of_a_loop() -> None:
    prediction, truth = random_pair(7, 5, 200)
    expected = np.zeros((5, 5), np.int64)
    for place in np.ndindex(truth.shape):
        if truth[place] != 200:
            expected[truth[place], prediction[place]] += 1
    matrix = ConfusionMatrix(5, 200)
    matrix.update(prediction, truth)
    np.testing.assert_array_equal(matrix.counts, expected)
    right = sum(int(expected[label, label]) for label in range(5))
    assert matrix.pixel_accuracy() == right / int(expected.sum())


@pytest.mark.parametrize(
    ("case", "prediction", "truth", "iou", "miou"),
    [
        ("all right", [[0, 1]], [[0, 1]], [1, 1, None], 1.0),
        ("half of one", [[0, 0]], [[0, 1]], [0.5, 0, None], 0.25),
        ("predicted, never true", [[0, 2]], [[0, 0]], [0.5, None, 0], 0.25),
        ("only where unlabelled", [[0, 2]], [[0, 9]], [1, None, None], 1.0),
        ("class 255 where unlabelled", [[0, 255]], [[0, 9]], [1, None, None], 1.0),
    ],
)
def test_what_counts(
    case: str,
    prediction: list[list[int]],
    truth: list[list[int]],
    iou: list[float | None],
    miou: float,
) -> None:
    matrix = ConfusionMatrix(3, 9)
    matrix.update(labels(prediction), labels(truth))
    assert [None if math.isnan(x) else x for x in matrix.per_class_iou()] == iou, case
    assert matrix.miou() == miou, case


@pytest.mark.parametrize("truth", [None, [[9, 9]]])
def test_nothing_counted_is_nan(truth: list[list[int]] | None) -> None:
    matrix = ConfusionMatrix(3, 9)
    if truth is not None:
        matrix.update(labels([[0, 1]]), labels(truth))
    assert math.isnan(matrix.miou())
    assert math.isnan(matrix.pixel_accuracy())
    assert np.isnan(matrix.per_class_iou()).all()


def test_merged_is_as_counted_together() -> None:
    together, first, second = (ConfusionMatrix(11, 11) for _ in range(3))
    for seed, part in ((1, first), (2, second)):
        pair = random_pair(seed, 11, 11)
        together.update(*pair)
        part.update(*pair)
    first.merge(second)
    np.testing.assert_array_equal(first.counts, together.counts)


@pytest.mark.parametrize(("classes", "ignore"), [(10, 11), (11, 255)])
def test_other_classes_do_not_merge(classes: int, ignore: int) -> None:
    with pytest.raises(RequestError, match="same classes"):
        ConfusionMatrix(11, 11).merge(ConfusionMatrix(classes, ignore))


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([[0, 1]], [[0], [1]], "1x2 against 2x1"),
        ([[0, 3]], [[0, 1]], "of the prediction are 0 to 2, and 3 came"),
        ([[0, 1]], [[0, 7]], "of the truth are 0 to 2, or 9 for no label, and 7 came"),
    ],
)
def test_labels_that_cannot_be(
    prediction: list[list[int]], truth: list[list[int]], message: str
) -> None:
    matrix = ConfusionMatrix(3, 9)
    with pytest.raises(DataError, match=message):
        matrix.update(labels(prediction), labels(truth))
    assert not matrix.counts.any()


def test_other_dtypes_are_refused() -> None:
    good = labels([[0, 1]])
    with pytest.raises(DataError, match="prediction is a map of uint8, and one of int64"):
        ConfusionMatrix(3, 9).update(good.astype(np.int64), good)


@pytest.mark.parametrize(("classes", "ignore"), [(0, 255), (256, 255), (3, 2), (3, -1), (3, 256)])
def test_classes_that_cannot_be(classes: int, ignore: int) -> None:
    with pytest.raises(RequestError):
        ConfusionMatrix(classes, ignore)


def test_counts_are_a_copy() -> None:
    matrix = ConfusionMatrix(3, 9)
    matrix.update(labels([[0]]), labels([[0]]))
    matrix.counts[:] = 5
    assert matrix.counts.sum() == 1
