"""Run lengths and outlines, against pycocotools."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.annotation import Annotation, run_lengths
from edgeseg.errors import DataError, RequestError


def annotation(segmentation: Any, box: Any = (0, 0, 1, 1)) -> Annotation:
    return Annotation(0, box, 1.0, False, segmentation)


def decoded(packed: dict[str, Any]) -> NDArray[np.bool_]:
    """What pycocotools reads."""
    masks = pytest.importorskip("pycocotools.mask")
    with warnings.catch_warnings():
        # Its arrays are older than numpy 2.
        warnings.simplefilter("ignore", DeprecationWarning)
        pixels: NDArray[np.uint8] = masks.decode(packed)
    return pixels.astype(np.bool_)


def mask(seed: int, height: int, width: int) -> NDArray[np.bool_]:
    """Runs of all lengths, from single pixels to most of the picture."""
    random = np.random.default_rng(seed)
    share = (0.0, 0.02, 0.5, 0.98, 1.0)[seed % 5]
    found: NDArray[np.bool_] = random.random((height, width)) < share
    return found


SIZES = [(1, 1), (1, 9), (9, 1), (7, 5), (48, 64), (300, 200)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_masks_survive_every_form(height: int, width: int) -> None:
    masks = pytest.importorskip("pycocotools.mask")
    for seed in range(10):
        true = mask(seed, height, width)
        plain = run_lengths(true)
        assert plain["size"] == [height, width] and sum(plain["counts"]) == height * width
        assert all(count > 0 for count in plain["counts"][1:])
        reference = masks.encode(np.asfortranarray(true.view(np.uint8)))
        text = {"size": [height, width], "counts": reference["counts"].decode()}
        for form in (plain, reference, text):
            one = annotation(form)
            np.testing.assert_array_equal(one.mask(height, width), true)
            np.testing.assert_array_equal(decoded(one.packed(height, width)), true)


def test_run_lengths_need_no_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    true = mask(2, 12, 7)
    np.testing.assert_array_equal(annotation(run_lengths(true)).mask(12, 7), true)
    with pytest.raises(RequestError, match=r"pip install 'edgeseg\[eval\]'"):
        annotation([[0, 0, 4, 0, 4, 4]]).mask(12, 7)


def test_polygons_are_filled_as_coco_fills_them() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(2)
    for _ in range(20):
        polygons = [(random.random(2 * random.integers(3, 9)) * 50).tolist() for _ in range(3)]
        expected = np.zeros((40, 45), np.bool_)
        for polygon in polygons:
            expected |= decoded(masks.frPyObjects([polygon], 40, 45)[0])
        np.testing.assert_array_equal(annotation(polygons).mask(40, 45), expected)


def test_without_an_outline_it_is_the_box() -> None:
    pytest.importorskip("pycocotools.mask")
    expected = np.zeros((10, 12), np.bool_)
    expected[2:5, 3:9] = True
    np.testing.assert_array_equal(annotation(None, (3, 2, 6, 3)).mask(10, 12), expected)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 2], "add up to 6, and these add up to 5"),
        ([3, 7, -4], "zero or more"),
        ([], "add up to 6, and these add up to 0"),
    ],
)
def test_run_lengths_that_cannot_be(counts: list[int], message: str) -> None:
    pytest.importorskip("pycocotools.mask")
    one = annotation({"size": [2, 3], "counts": counts})
    for asked in (one.mask, one.packed):
        with pytest.raises(DataError, match=message):
            asked(2, 3)
        with pytest.raises(DataError, match="size of their picture, 3x2, and those of 2x3"):
            asked(3, 2)


def test_cut_short_packed_run_lengths() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    packed = masks.encode(np.asfortranarray(mask(2, 20, 30).view(np.uint8)))
    one = annotation({"size": [20, 30], "counts": packed["counts"][:-6].decode()})
    with pytest.raises(DataError, match="add up to 600"):
        one.mask(20, 30)


@pytest.mark.parametrize(
    ("box", "area"),
    [
        ((0, 0, -1, 2), 1.0),
        ((0, math.nan, 1, 2), 1.0),
        ((0, 0, 1, 2), -1.0),
        ((0, 0, 1, 1), math.inf),
    ],
)
def test_boxes_that_cannot_be(box: Any, area: float) -> None:
    with pytest.raises(DataError, match="a box and an area"):
        Annotation(0, box, area, False, None)
