"""When two models say the same of a picture: tables of instances, and every pair tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from edgeseg.calibration.agreement import MINIMUM_SCORE, SAME_IOU, Agreement, agreement_of, partners
from edgeseg.instances import InstanceOutputs
from edgeseg.result import Outputs

SIDE = 24

Instance = tuple[tuple[float, float, float, float], float, int]


def outputs(instances: Sequence[Instance], *, empty: Sequence[int] = ()) -> InstanceOutputs:
    """Instances of (box, score, label), whose masks fill their boxes, or not if in ``empty``."""
    masks = np.zeros((len(instances), SIDE, SIDE), np.uint8)
    for row, ((x1, y1, x2, y2), _, _) in enumerate(instances):
        if row not in empty:
            masks[row, round(y1) : round(y2), round(x1) : round(x2)] = 200
    return InstanceOutputs(
        boxes=np.array([box for box, _, _ in instances], np.float32).reshape(-1, 4),
        scores=np.array([score for _, score, _ in instances], np.float32),
        labels=np.array([label for _, _, label in instances], np.int32),
        masks=masks,
    )


BOX, SHIFTED, FAR = (2.0, 2.0, 12.0, 12.0), (4.0, 2.0, 14.0, 12.0), (9.0, 2.0, 19.0, 12.0)


@pytest.mark.parametrize(
    ("one", "other", "same", "total"),
    [
        ([], [], 0, 0),
        ([(BOX, 0.9, 0)], [], 0, 1),
        ([(BOX, 0.9, 0)], [(BOX, 0.8, 0)], 2, 2),
        ([(BOX, 0.9, 0)], [(BOX, 0.9, 1)], 0, 2),
        # An IoU of 8/12, and one of 3/17.
        ([(BOX, 0.9, 0)], [(SHIFTED, 0.9, 0)], 2, 2),
        ([(BOX, 0.9, 0)], [(FAR, 0.9, 0)], 0, 2),
        # Faint ones are not asked for, and are good enough as partners.
        ([(BOX, 0.9, 0)], [(BOX, 0.1, 0)], 1, 1),
        ([(BOX, 0.2, 0)], [(FAR, 0.1, 0)], 0, 0),
        # Each is a partner once.
        ([(BOX, 0.9, 0), (BOX, 0.8, 0)], [(BOX, 0.9, 0)], 2, 3),
        ([(BOX, 0.9, 0), (SHIFTED, 0.8, 0)], [(SHIFTED, 0.9, 0), (BOX, 0.4, 0)], 4, 4),
    ],
)
def test_instances(one: list[Instance], other: list[Instance], same: int, total: int) -> None:
    assert MINIMUM_SCORE == 0.3 and SAME_IOU == 0.5
    for first, second in itertools.permutations((outputs(one), outputs(other))):
        assert agreement_of(first, second) == Agreement(same, total)


def test_masks_count_as_well_as_boxes() -> None:
    whole, none = outputs([(BOX, 0.9, 0)]), outputs([(BOX, 0.9, 0)], empty=[0])
    assert partners(whole, none) == [] and partners(none, none) == [(0, 0)]


def test_boxes_without_size_or_number() -> None:
    point, nothing = (3.0, 3.0, 3.0, 3.0), (math.nan,) * 4
    for box in (point, nothing):
        found = outputs([(point, 0.9, 0)])
        found.boxes[:] = box
        assert agreement_of(found, found) == Agreement(0, 2)


def test_the_same_outputs_agree_whatever_they_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        count = int(rng.integers(1, 8))
        corners = rng.uniform(0, 10, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(2, 12, (count, 2))], axis=1)
        instances = [
            (tuple(box), float(score), int(label))
            for box, score, label in zip(
                boxes, np.sort(rng.uniform(0, 1, count))[::-1], rng.integers(0, 2, count),
                strict=True,
            )
        ]  # fmt: skip
        found = outputs(instances)
        assert agreement_of(found, found).same == agreement_of(found, found).total
        assert sorted(partners(found, found)) == [(row, row) for row in range(count)]


def test_pixels_and_shares() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 3, (2, 7, 9)).astype(np.uint8)
    found = agreement_of(Outputs(one), Outputs(other))
    assert found == Agreement(int(np.sum(one == other)), 63)
    assert found.share == pytest.approx(float(np.mean(one == other)))
    assert Agreement.sum([found, Agreement(1, 2)]) == Agreement(found.same + 1, 65)
    assert math.isnan(Agreement.sum([]).share)
    assert agreement_of(Outputs(one), outputs([])).share == 0
