"""Instance masks at frame size, against loops in float64, torchvision and the parity pack."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import RequestError
from edgeseg.framemasks import FrameMasks, encoded_rle
from edgeseg.geometry import Geometry
from edgeseg.kernels import CocoRle, MaskGrid
from edgeseg.spec import Fit

PACKS = Path(__file__).resolve().parents[2].parent / "shared" / "parity"

compiled_only = pytest.mark.skipif(not kernels.available(), reason="the CPU library is not built")
WAYS = (pytest.param(True, id="compiled", marks=compiled_only), pytest.param(False, id="numpy"))

# Frame height and width, network height and width, fit.
SIZES: tuple[tuple[int, int, int, int, Fit], ...] = (
    (72, 128, 55, 55, "stretch"),
    (480, 641, 55, 55, "letterbox"),
    (33, 17, 64, 96, "letterbox"),
    (1, 1, 5, 7, "stretch"),
    (1, 300, 40, 40, "letterbox"),
    (257, 3, 20, 30, "stretch"),
    (40, 40, 40, 40, "stretch"),
)


def blobs(rng: np.random.Generator, count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Masks with smooth borders, hard ones, and noise."""
    y, x = np.mgrid[:height, :width]
    masks = []
    for index in range(count):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(0.1, 0.6) * max(height, width)
        distance = radius - np.hypot(y - cy, x - cx)
        smooth = 255 / (1 + np.exp(-np.clip(distance * rng.uniform(0.3, 9), -30, 30)))
        masks.append([smooth, 255.0 * (distance > 0), rng.integers(0, 256, y.shape)][index % 3])
    levels: NDArray[np.uint8] = np.rint(masks).reshape(count, height, width).astype(np.uint8)
    return levels


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> Any:
    """(n, 4) float32: inside, reaching out, of no size, with corners swapped, outside, NaN."""
    x, y = rng.uniform(-0.3, 1.1, (2, count, 2)) * [[[width]], [[height]]]
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    boxes[::2] = np.concatenate([boxes[::2, :2], boxes[::2, :2] + np.abs(boxes[::2, 2:])], axis=1)
    if count > 4:
        boxes[1, 2:] = boxes[1, :2]
        boxes[3] = [-50, -60, -9, -8]
        boxes[4, 2] = np.nan
    return boxes.astype(np.float32)


def by_loops(grid: MaskGrid, at: Geometry) -> NDArray[np.float64]:
    """The interpolated level of every pixel, from the definition, one at a time."""
    assert grid.boxes is not None
    values = np.zeros((len(grid.levels), at.frame_height, at.frame_width))
    _, height, width = grid.levels.shape
    for k, (levels, box) in enumerate(zip(grid.levels, grid.boxes, strict=True)):
        if np.isnan(box).any():
            continue
        kept = np.zeros((height, width))
        low_x, high_x = sorted((float(box[0]) * width / at.width, float(box[2]) * width / at.width))
        low_y, high_y = sorted(
            (float(box[1]) * height / at.height, float(box[3]) * height / at.height)
        )
        for y in range(height):
            for x in range(width):
                if max(low_y - 1, 0) <= y < min(high_y + 1, height) and (
                    max(low_x - 1, 0) <= x < min(high_x + 1, width)
                ):
                    kept[y, x] = levels[y, x]
        for i in range(at.frame_height):
            y = (at.top + (i + 0.5) * at.inner_height / at.frame_height) * height / at.height - 0.5
            y = min(max(y, 0.0), height - 1.0)
            y0 = int(y)
            y1 = min(y0 + 1, height - 1)
            for j in range(at.frame_width):
                x = (at.left + (j + 0.5) * at.inner_width / at.frame_width) * width / at.width - 0.5
                x = min(max(x, 0.0), width - 1.0)
                x0 = int(x)
                x1 = min(x0 + 1, width - 1)
                upper = kept[y0, x0] * (x0 + 1 - x) + kept[y0, x1] * (x - x0)
                lower = kept[y1, x0] * (x0 + 1 - x) + kept[y1, x1] * (x - x0)
                values[k, i, j] = upper * (y0 + 1 - y) + lower * (y - y0)
    return values


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("size", [SIZES[0], *SIZES[2:]], ids=str)
def test_masks_over_the_image(size: tuple[int, int, int, int, Fit], compiled: bool) -> None:
    rng = np.random.default_rng(sum(size[:4]))
    frame_height, frame_width, height, width, fit = size
    at = Geometry.fitting(frame_height, frame_width, height, width, fit=fit)
    for samples in ((14, 14), (1, 9), (height, width)):
        grid = MaskGrid(blobs(rng, 6, *samples), boxes=random_boxes(rng, 6, height, width))
        found = FrameMasks.of(grid, at, compiled=compiled)
        values = by_loops(grid, at)
        masks = found.arrays()
        assert masks.shape == values.shape
        sure = np.abs(values - 127.5) > 1e-3
        np.testing.assert_array_equal(masks[sure], values[sure] > 127.5)
        np.testing.assert_array_equal(found.all_bits(), np.packbits(masks, axis=-1))
        np.testing.assert_array_equal(found.areas(), masks.sum(axis=(1, 2)))


def both_ways(grid: MaskGrid, at: Geometry) -> FrameMasks:
    fast, slow = (FrameMasks.of(grid, at, compiled=way) for way in (True, False))
    np.testing.assert_array_equal(fast.regions, slow.regions)
    np.testing.assert_array_equal(fast.begins, slow.begins)
    np.testing.assert_array_equal(fast.bits, slow.bits)
    return fast


@compiled_only
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_and_numpy_give_the_same_bytes(size: tuple[int, int, int, int, Fit]) -> None:
    rng = np.random.default_rng(sum(size[:4]))
    frame_height, frame_width, height, width, fit = size
    at = Geometry.fitting(frame_height, frame_width, height, width, fit=fit)
    for samples in ((14, 14), (138, 138), (1, 1), (3, 40)):
        levels = blobs(rng, 9, *samples)
        both_ways(MaskGrid(levels, boxes=random_boxes(rng, 9, height, width)), at)
        corners = rng.integers(-60, 700, (9, 4)).astype(np.int32)
        corners[::2, 2:] = corners[::2, :2] + rng.integers(0, 200, (5, 2))
        both_ways(MaskGrid(levels, pastes=corners), at)


@compiled_only
@pytest.mark.parametrize("flags", [0, 2, 4, 8, 2 | 4, 2 | 8])
def test_code_for_every_processor_gives_the_same(flags: int) -> None:
    rng = np.random.default_rng(3)
    at = Geometry.fitting(123, 211, 64, 64, fit="letterbox")
    grid = MaskGrid(blobs(rng, 8, 32, 32), boxes=random_boxes(rng, 8, 64, 64))
    wanted = FrameMasks.of(grid, at, compiled=False)
    bits = np.zeros_like(wanted.bits)
    kernels.level_bits(grid, at, wanted.begins, bits, flags=flags)
    np.testing.assert_array_equal(bits, wanted.bits)
    for threads in (1, 3):
        rles = kernels.level_rles(grid, at, flags=flags, threads=threads, room=1)
        assert rles == [encoded_rle(mask) for mask in wanted.arrays()]


def pasted_by_torch(levels: NDArray[np.uint8], boxes: Any, size: tuple[int, int]) -> Any:
    """Padded, enlarged, cut off to integers, resized by torch, and put into the frame."""
    torch = pytest.importorskip("torch")
    height, width = size
    whole = np.zeros((len(levels), height, width))
    for k, box in enumerate(boxes):
        padded = torch.nn.functional.pad(torch.from_numpy(levels[k].astype(np.float64)), [1] * 4)
        centre = (box[2:] + box[:2]) * np.float32(0.5)
        reach = (box[2:] - box[:2]) * np.float32(0.5) * np.float32(30 / 28)
        x1, y1, x2, y2 = (int(v) for v in (*(centre - reach), *(centre + reach)))
        resized = torch.nn.functional.interpolate(
            padded[None, None],
            size=(max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)),
            mode="bilinear",
            align_corners=False,
        )[0, 0].numpy()
        left, right = max(x1, 0), max(min(x2 + 1, width), 0)
        top, bottom = max(y1, 0), max(min(y2 + 1, height), 0)
        if top < bottom and left < right:
            part = resized[top - y1 : bottom - y1, left - x1 : right - x1]
            whole[k, top:bottom, left:right] = part
    return whole


@pytest.mark.parametrize("compiled", WAYS)
def test_pastes_are_those_of_mask_rcnn(compiled: bool) -> None:
    from edgeseg.instances import InstanceOutputs, InstanceResult
    from tests.edgeseg.test_instances import SPEC, result_of

    rng = np.random.default_rng(5)
    height, width = 97, 143
    spec = replace(
        SPEC, mask_extent="box", mask_height=28, mask_width=28, capacity=99, height=97, width=143
    )
    count = 24
    start = rng.uniform(-5, 120, (count, 2))
    boxes = np.concatenate([start, start + rng.uniform(0, 70, (count, 2))], axis=1)
    boxes[0, 2:] = boxes[0, :2] + 0.2
    boxes = boxes.astype(np.float32)
    levels = blobs(rng, count, 28, 28)
    outputs = InstanceOutputs(boxes, np.ones(count, np.float32), np.zeros(count, np.int32), levels)
    result = result_of(outputs, height, width, spec)
    assert isinstance(result, InstanceResult)
    grid = result.frame_masks.grid
    assert grid is not None
    found = FrameMasks.of(grid, result.geometry, compiled=compiled).arrays()
    # Levels stand for probabilities; a half is between 127 and 128.
    pasted = pasted_by_torch(levels, boxes, (height, width))
    sure = np.abs(pasted - 127.5) > 1e-3
    assert sure.mean() > 0.999 and (pasted > 127.5).any(axis=(1, 2)).sum() > 15
    np.testing.assert_array_equal(found[sure], pasted[sure] > 127.5)


@pytest.mark.parametrize("kind", ["noise", "full", "empty", "bottom", "blob"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 33), (300, 2)])
def test_run_lengths_are_those_of_pycocotools(size: tuple[int, int], kind: str) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(7)
    mask = {
        "noise": rng.random(size) > 0.5,
        "full": np.ones(size, np.bool_),
        "empty": np.zeros(size, np.bool_),
        "bottom": np.arange(size[0])[:, None] + np.zeros(size) >= size[0] / 2,
        "blob": blobs(rng, 1, *size)[0] > 127,
    }[kind]
    wanted = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encoded_rle(mask) == wanted


@compiled_only
def test_run_lengths_of_masks() -> None:
    rng = np.random.default_rng(9)
    at = Geometry.fitting(90, 161, 64, 64, fit="letterbox")
    grid = MaskGrid(blobs(rng, 7, 20, 20), boxes=random_boxes(rng, 7, 64, 64))
    masks = FrameMasks.of(grid, at)
    assert masks.rles() == [encoded_rle(mask) for mask in masks.arrays()]
    square = MaskGrid(
        np.full((2, 5, 5), 255, np.uint8),
        pastes=np.array([[0, 0, 160, 89], [3, -9, 3, 400]], np.int32),
    )
    pasted = FrameMasks.of(square, at)
    assert pasted.rles() == [encoded_rle(mask) for mask in pasted.arrays()]
    assert pasted.areas().min() > 30


def test_rle_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeseg.framemasks.kernels.available", lambda: False)
    at = Geometry.fitting(9, 13, 8, 8, fit="stretch")
    grid = MaskGrid(np.full((1, 8, 8), 255, np.uint8), np.array([[2, 2, 4, 4]], np.float32))
    masks = FrameMasks.of(grid, at)
    assert masks.rles() == [encoded_rle(masks.arrays()[0])] and masks.areas()[0] > 4


def test_no_masks() -> None:
    at = Geometry.fitting(9, 13, 8, 8, fit="stretch")
    for way in (True, False):
        if way and not kernels.available():
            continue
        none = FrameMasks.of(
            MaskGrid(np.empty((0, 4, 4), np.uint8), np.empty((0, 4), np.float32)), at, compiled=way
        )
        assert len(none) == 0 and none.arrays().shape == (0, 9, 13) and none.rles() == []
        assert none.all_bits().shape == (0, 9, 2) and none.areas().shape == (0,)


def test_work_stays_in_the_boxes() -> None:
    # 16 pixels at most on either side of what one sample more each way covers.
    at = Geometry.fitting(1080, 1920, 544, 544, fit="stretch")
    boxes = np.array([[100, 100, 130, 130]], np.float32)
    masks = FrameMasks.of(MaskGrid(np.full((1, 136, 136), 255, np.uint8), boxes), at)
    assert masks.bits.size * 8 < (30 + 4 * 4) * 1080 / 544 * ((30 + 4 * 4) * 1920 / 544 + 32)
    left, right = (int(value) * 8 for value in masks.regions[0, 2:])
    assert left < 100 * 1920 / 544 and right > 130 * 1920 / 544


LEVELS = np.zeros((2, 4, 4), np.uint8)
BOXES = np.zeros((2, 4), np.float32)


@pytest.mark.parametrize(
    ("levels", "boxes", "pastes", "says"),
    [
        (LEVELS, None, None, "either boxes or pastes"),
        (LEVELS, BOXES, np.zeros((2, 4), np.int32), "either boxes or pastes"),
        (LEVELS.astype(np.float32), BOXES, None, "levels must be a uint8 array, got float32"),
        (LEVELS[0], BOXES, None, "levels must have 3 axes"),
        (LEVELS[:, ::2], BOXES, None, "levels must be C-contiguous"),
        (np.zeros((2, 0, 4), np.uint8), BOXES, None, "levels must be 1 to"),
        (LEVELS, BOXES[:1], None, "2 masks came with 1 boxes"),
        (LEVELS, BOXES[:, :3], None, r"boxes must have 2 axes, the last of 4, got \(2, 3\)"),
        (LEVELS, BOXES.astype(np.float64), None, "boxes must be a float32 array, got float64"),
        (LEVELS, None, np.full((2, 4), 1 << 25, np.int32), "pastes must lie within"),
    ],
)
def test_grids_that_cannot_be(levels: Any, boxes: Any, pastes: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        MaskGrid(levels, boxes, pastes)


@compiled_only
def test_bits_that_do_not_fit() -> None:
    at = Geometry.fitting(9, 13, 8, 8, fit="stretch")
    grid = MaskGrid(np.full((1, 8, 8), 255, np.uint8), np.array([[0, 0, 8, 8]], np.float32))
    for begins, room in ((0, 17), (1, 18), (-1, 40)):
        with pytest.raises(RequestError, match="regions must lie in the"):
            kernels.level_bits(grid, at, np.array([begins]), np.empty(room, np.uint8))
    kernels.level_bits(grid, at, np.array([0]), np.empty(18, np.uint8))


@compiled_only
def test_masks_of_the_parity_pack() -> None:
    """Levels rounded to 8 bits, brought to 480 x 640, are the reference's masks."""
    if not (PACKS / "yolact_resnet50.npz").is_file():
        pytest.skip("the parity packs are not beside the checkout")
    pack = json.loads((PACKS / "yolact_resnet50.json").read_text())
    arrays = np.load(PACKS / "yolact_resnet50.npz")
    size = (pack["input"]["detection"]["height"], pack["input"]["detection"]["width"])
    order = np.flatnonzero(
        arrays["detection.det.score"] > pack["input"]["detection"]["score_threshold"]
    )
    boxes = arrays["detection.det.box"][order].astype(np.float32) * np.float32(550)
    wanted = np.unpackbits(arrays["detection.post.masks_packed"], axis=-1, count=size[1])
    assert len(order) == len(wanted) > 30
    levels = kernels.assemble_masks(
        arrays["heads.proto"].astype(np.float32).transpose(2, 0, 1),
        np.ascontiguousarray(arrays["detection.det.mask"][order].astype(np.float32)),
        np.ascontiguousarray(boxes),
        (550, 550),
    )
    at = Geometry.fitting(*size, 550, 550, fit="stretch")
    found = both_ways(MaskGrid(levels, np.ascontiguousarray(boxes)), at).arrays()
    differ = np.mean(found != wanted.astype(np.bool_), axis=(1, 2))
    assert differ.max() <= pack["outputs"]["detection.post.masks_packed"]["max_differing_fraction"]
    assert wanted.any(axis=(1, 2)).sum() > 20


def test_rle_letters_by_hand() -> None:
    # Columns of 3: two off, one on; then the rest on. Counts 2, 4: "24".
    mask = np.array([[0, 1], [0, 1], [1, 1]], np.bool_)
    assert encoded_rle(mask) == CocoRle(size=[3, 2], counts=b"24")


def test_bytes_of_regions_follow_each_other() -> None:
    rng = np.random.default_rng(11)
    at = Geometry.fitting(61, 83, 32, 32, fit="stretch")
    masks = FrameMasks.of(
        MaskGrid(blobs(rng, 5, 16, 16), boxes=random_boxes(rng, 5, 32, 32)), at, compiled=False
    )
    sizes = [masks.packed(index).size for index in range(5)]
    assert [int(b - a) for a, b in pairwise([*masks.begins, masks.bits.size])] == sizes
    assert all(masks.window(k)[2].shape[1] <= 8 * ceil(83 / 8) for k in range(5))
