"""EdgeSegPyramidRoiAlign against float64 loops, the parity pack, ONNX's reference and PyTorch."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import KernelError, RequestError
from edgeseg.kernels import rois
from edgeseg.kernels.launchers import FLOAT16, FLOAT32, UINT8, Features, Pyramid, RoiPooling

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity"

Array = NDArray[Any]
Floats = NDArray[np.float32]

ALIGNED = 1
PORTABLE_CODE = 4
AVX2_CODE = 8


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    if not kernels.available():
        try:
            kernels.build()
        except KernelError as error:
            pytest.skip(f"the CPU kernels are not here and cannot be built: {error}")


@dataclass(frozen=True)
class Case:
    """One call: maps of random numbers, boxes of all kinds, and how to pool them."""

    maps: tuple[tuple[int, int], ...]  # height, width of each level
    scales: tuple[float, ...]
    bins: tuple[int, int]
    ratio: int = 0
    aligned: bool = False
    channels: int = 5
    images: int = 1
    boxes: int = 9
    stretch: float = 1.0  # of the boxes
    canonical: tuple[float, int, int] = (24.0, 4, 2)

    def levels(self, seed: int) -> list[Floats]:
        rng = np.random.default_rng(seed)
        shapes = [(self.images, self.channels, *size) for size in self.maps]
        return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def box_list(self, seed: int) -> tuple[Floats, NDArray[np.int32]]:
        """Boxes inside, across the border, outside, without size, inverted; and their images."""
        rng = np.random.default_rng(seed + 1)
        height, width = np.array(self.maps[0]) / self.scales[0]
        size = np.array([width, height])
        low = rng.uniform(-0.3, 0.9, (self.boxes, 2)) * size
        extent = np.exp(rng.uniform(math.log(0.02), math.log(1.2), (self.boxes, 2))) * size
        boxes = np.concatenate([low, low + extent * self.stretch], axis=1)
        # Fractions of the picture: low corner, extent. Shaken, so that no sample is on an edge.
        corner, reach = np.array(
            [
                [[0.1, 0.2], [0.0, 0.0]],
                [[0.3, 0.1], [0.0, 0.8]],
                [[0.7, 0.6], [-0.5, 0.3]],
                [[0.8, 0.9], [-0.5, -0.7]],
                [[1.5, 1.5], [0.4, 0.3]],
                [[-2.0, -0.5], [0.5, 1.0]],
                [[-1.1, -1.3], [3.4, 3.4]],
            ]
        ).swapaxes(0, 1)
        corner = corner + rng.uniform(0, 0.04, corner.shape)
        reach = reach * rng.uniform(0.95, 1, reach.shape)
        special = np.concatenate([corner * size, (corner + reach) * size], axis=1)
        every = np.concatenate([boxes, special]).astype(np.float32)
        return every, rng.integers(0, self.images, len(every)).astype(np.int32)

    def pool(
        self,
        levels: Sequence[Floats],
        boxes: Floats,
        image_of: NDArray[np.int32] | None = None,
        threads: int = 1,
    ) -> Floats:
        size, level, first = self.canonical
        return kernels.pyramid_roi_align(
            levels, boxes, output_size=self.bins, scales=self.scales, image_of=image_of,
            sampling_ratio=self.ratio, aligned=self.aligned, canonical_size=size,
            canonical_level=level, first_level=first, threads=threads,
        )  # fmt: skip


FPN = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
CASES = [
    pytest.param(Case(((32, 44), (16, 22), (8, 11), (4, 6)), FPN, (7, 7), 2), id="fpn"),
    pytest.param(
        Case(((32, 44), (16, 22), (8, 11), (4, 6)), FPN, (14, 14), 2, True, images=3),
        id="fpn-masks-aligned-three-images",
    ),
    pytest.param(Case(((30, 41), (15, 20)), (0.5, 0.25), (3, 5), 0, True), id="adaptive-aligned"),
    pytest.param(Case(((30, 41), (15, 20)), (0.5, 0.25), (5, 3), 0), id="adaptive"),
    pytest.param(Case(((40, 50),), (1.0,), (2, 2), 0, boxes=4), id="large-bins"),
    pytest.param(Case(((40, 50),), (1.0,), (1, 1), 0, True, 2, boxes=3), id="one-bin"),
    pytest.param(Case(((21, 17),), (1 / 3,), (7, 7), 1), id="one-sample"),
    pytest.param(Case(((21, 17),), (1 / 3,), (4, 3), 5, True), id="five-samples"),
    pytest.param(Case(((9, 9),), (1.0,), (20, 17), 2, boxes=3), id="more-bins-than-a-vector"),
    pytest.param(Case(((1, 1), (1, 1)), (1.0, 0.5), (3, 3), 2), id="one-pixel"),
    pytest.param(Case(((1, 23),), (1.0,), (3, 7), 0, True), id="one-row"),
    pytest.param(Case(((23, 1),), (1.0,), (7, 3), 0), id="one-column"),
    pytest.param(Case(((6, 70),), (1.0,), (2, 9), 2), id="wide"),
    pytest.param(Case(((6, 150),), (1.0,), (2, 3), 2), id="wider-than-a-warps-planes"),
    pytest.param(Case(((4, 600),), (1.0,), (2, 3), 2), id="wider-than-the-room-for-columns"),
    pytest.param(Case(((4, 20),), (1.0,), (1, 200), 1, boxes=2), id="more-bins-than-tables"),
    pytest.param(Case(((20, 20),), (1.0,), (40, 110), 1, channels=3, boxes=2), id="many-bins"),
    pytest.param(Case(((12, 14),), (0.5,), (3, 3), 2, channels=1), id="one-channel"),
    pytest.param(Case(((12, 14), (6, 7)), (0.5, 0.25), (7, 7), 2, channels=70), id="70-channels"),
    pytest.param(Case(((12, 14), (6, 7)), (0.5, 0.25), (7, 7), 2, channels=136), id="136-channels"),
    pytest.param(Case(((30, 30),), (1.0,), (2, 2), 0, True, boxes=2, stretch=9.0), id="outside"),
]


def float64_level(boxes: Floats, case: Case) -> NDArray[np.int64]:
    """Level of each box by the published formula."""
    size, level, first = case.canonical
    wide = boxes[:, 2] - boxes[:, 0]
    area = (wide * (boxes[:, 3] - boxes[:, 1])).astype(np.float64)
    target = np.full(len(boxes), -math.inf)
    has_area = area > 0
    target[has_area] = np.floor(level + np.log2(np.sqrt(area[has_area]) / size) + 1e-6)
    return (target.clip(first, first + len(case.maps) - 1) - first).astype(np.int64)


def bilinear(features: NDArray[np.float64], y: float, x: float) -> NDArray[np.float64]:
    """One sample of (channels, height, width)."""
    channels, height, width = features.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(channels)
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, along = y - top, x - left
    upper = features[:, top, left] * (1 - along) + features[:, top, right] * along
    lower = features[:, bottom, left] * (1 - along) + features[:, bottom, right] * along
    sample: NDArray[np.float64] = upper * (1 - down) + lower * down
    return sample


def is_on_edge(position: float, size: int) -> bool:
    return min(abs(position + 1), abs(position - size)) < 1e-4


def float64_align(features: Array, box: Array, scale: float, case: Case) -> NDArray[np.float64]:
    """RoIAlign of one box from (channels, height, width), sample by sample.

    NaN where a sample is on the edge beyond which samples are 0: rounding decides on which side.
    """
    offset = 0.5 if case.aligned else 0.0
    x1, y1, x2, y2 = box.astype(np.float64) * np.float64(np.float32(scale)) - offset
    height, width = y2 - y1, x2 - x1
    if not case.aligned:
        height, width = max(height, 1.0), max(width, 1.0)
    bin_height, bin_width = height / case.bins[0], width / case.bins[1]
    rows = case.ratio or math.ceil(bin_height)
    columns = case.ratio or math.ceil(bin_width)
    pooled = np.zeros((features.shape[0], *case.bins))
    values = features.astype(np.float64)
    for i in range(case.bins[0]):
        for j in range(case.bins[1]):
            for row in range(rows):
                y = y1 + bin_height * (i + (row + 0.5) / rows)
                if not -1.1 < y < features.shape[1] + 0.1:
                    continue
                for column in range(columns):
                    x = x1 + bin_width * (j + (column + 0.5) / columns)
                    pooled[:, i, j] += bilinear(values, y, x)
                    if is_on_edge(y, features.shape[1]) or is_on_edge(x, features.shape[2]):
                        pooled[:, i, j] = math.nan
    return pooled / max(rows * columns, 1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: Case, seed: int) -> None:
    levels = case.levels(seed)
    boxes, image_of = case.box_list(seed)
    got = case.pool(levels, boxes, image_of)
    chosen = float64_level(boxes, case)
    undecided = 0
    assert got.shape == (len(boxes), case.channels, *case.bins)
    for box, image, level, pooled in zip(boxes, image_of, chosen, got, strict=True):
        want = float64_align(levels[level][image], box, case.scales[level], case)
        # The positions' rounding, times the slope of standard normal numbers.
        reach = 1 + max(np.abs(box).max() * case.scales[level], *case.maps[level])
        decided = np.isfinite(want)
        np.testing.assert_allclose(pooled[decided], want[decided], rtol=1e-5, atol=1e-6 * reach)
        undecided += int((~decided).sum())
    assert np.isfinite(got).all()
    assert got.any()
    assert undecided <= got.size / 8


@pytest.mark.parametrize("seed", range(60))
def test_equals_float64_for_random_calls(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    count = int(rng.integers(1, 4))
    case = Case(
        maps=tuple((int(h), int(w)) for h, w in rng.integers(1, 40, (count, 2))),
        scales=tuple(float(scale) for scale in np.exp2(rng.uniform(-5, 1, count))),
        bins=(int(rng.integers(1, 7)), int(rng.integers(1, 7))),
        ratio=int(rng.integers(0, 4)),
        aligned=bool(rng.integers(2)),
        channels=int(rng.integers(1, 20)),
        images=int(rng.integers(1, 4)),
        boxes=5,
        canonical=(float(np.exp2(rng.uniform(2, 8))), int(rng.integers(-3, 8)), 2),
    )
    test_equals_float64(case, seed)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [f"case{i}" for i in range(10)])
def test_equals_the_parity_pack(name: str, channels_last: bool) -> None:
    if not (PARITY / "roi_align.npz").is_file():
        pytest.skip("the parity packs are not beside this checkout")
    entry = json.loads((PARITY / "roi_align.json").read_text())["outputs"][name]
    with np.load(PARITY / "roi_align.npz") as pack:
        features, image_of = pack["features"], pack["batch_index"]
        boxes, want = pack[entry["boxes"]], pack[name]
    if channels_last:
        features = as_channels_last(features)
    got = kernels.pyramid_roi_align(
        [features],
        boxes,
        output_size=tuple(entry["output_size"]),
        scales=[entry["spatial_scale"]],
        image_of=image_of,
        sampling_ratio=entry["sampling_ratio"],
        aligned=entry["aligned"],
    )
    assert np.abs(got - want).max() <= entry["max_abs"]


def as_channels_last(level: Floats) -> Floats:
    """The same numbers and shape, channels beside each other in memory."""
    turned: Floats = np.ascontiguousarray(level.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return turned


def onnx_model(case: Case, scale: float) -> Any:
    onnx = pytest.importorskip("onnx", reason="defines RoiAlign")
    node = onnx.helper.make_node(
        "RoiAlign",
        ["features", "boxes", "image_of"],
        ["pooled"],
        coordinate_transformation_mode="half_pixel" if case.aligned else "output_half_pixel",
        output_height=case.bins[0],
        output_width=case.bins[1],
        sampling_ratio=case.ratio,
        spatial_scale=scale,
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "roi_align",
        [value("features", 1, [None] * 4), value("boxes", 1, [None, 4]),
         value("image_of", 7, [None])],
        [value("pooled", 1, [None] * 4)],
    )  # fmt: skip
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 16)], ir_version=8
    )


def onnx_reference(model: Any, feeds: dict[str, Any]) -> Array:
    from onnx.reference import ReferenceEvaluator

    (pooled,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(pooled)


def onnx_runtime(model: Any, feeds: dict[str, Array]) -> Array:
    runtime = pytest.importorskip("onnxruntime", reason="compares with its RoiAlign")
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (pooled,) = session.run(None, feeds)
    return np.asarray(pooled)


@pytest.mark.parametrize("evaluate", [onnx_reference, onnx_runtime])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_equals_onnx(ratio: int, aligned: bool, evaluate: Callable[..., Array]) -> None:
    case = Case(((20, 26), (10, 13)), (0.5, 0.25), (4, 3), ratio, aligned, 3, images=2, boxes=12)
    levels = case.levels(5)
    boxes, image_of = case.box_list(5)
    # Boxes with one side inverted have no level that other implementations agree on.
    ordered = (boxes[:, 2] >= boxes[:, 0]) == (boxes[:, 3] >= boxes[:, 1])
    boxes, image_of = np.ascontiguousarray(boxes[ordered]), image_of[ordered]
    got = case.pool(levels, boxes, image_of)
    chosen = float64_level(boxes, case)
    assert set(chosen) == {0, 1}
    for level, scale in enumerate(case.scales):
        feeds = {
            "features": levels[level],
            "boxes": boxes[chosen == level],
            "image_of": image_of[chosen == level].astype(np.int64),
        }
        want = evaluate(onnx_model(case, scale), feeds)
        np.testing.assert_allclose(got[chosen == level], want, rtol=1e-5, atol=5e-5)


def levels_chosen(
    boxes: Floats, count: int = 4, canonical: tuple[float, int, int] = (224.0, 4, 2)
) -> NDArray[np.int64]:
    """The level each box came from: level i holds i everywhere, and every box is inside."""
    maps = [np.full((1, 4, 4), i, np.float32) for i in range(count)]
    size, level, first = canonical
    pooled = kernels.pyramid_roi_align(
        maps, boxes, output_size=(1, 1), scales=[2.0**-20] * count, sampling_ratio=1,
        canonical_size=size, canonical_level=level, first_level=first,
    )  # fmt: skip
    chosen: NDArray[np.int64] = pooled[:, 0, 0, 0].astype(np.int64)
    assert (pooled[:, 0, 0, 0] == chosen).all()
    return chosen


@pytest.mark.parametrize(
    ("count", "canonical"),
    [
        pytest.param(4, (224.0, 4, 2), id="fpn"),
        pytest.param(8, (56.0, 3, 0), id="eight-levels"),
        pytest.param(3, (101.7, 5, 4), id="odd-size"),
        pytest.param(2, (224.0, -3, -4), id="negative"),
    ],
)
def test_level_is_the_published_formula(count: int, canonical: tuple[float, int, int]) -> None:
    rng = np.random.default_rng(3)
    sides = np.exp2(rng.uniform(0, 13, (20000, 2)))
    # And areas as close to each boundary as float32 can be, on both sides.
    size, level, first = canonical
    for boundary in range(first, first + count + 1):
        side = np.float32(size * 2.0 ** (boundary - level - 1e-6))
        near = side + np.arange(-40, 41) * np.spacing(side)
        sides = np.concatenate([sides, np.stack([near, np.full_like(near, side)], axis=1)])
    boxes = np.zeros((len(sides), 4), np.float32)
    boxes[:, 2:] = sides
    case = Case(((4, 4),) * count, (1.0,) * count, (1, 1), canonical=canonical)
    chosen = levels_chosen(boxes, count, canonical)
    np.testing.assert_array_equal(chosen, float64_level(boxes, case))
    assert set(chosen) == set(range(count))


def test_level_is_torchvisions_away_from_rounding() -> None:
    torch = pytest.importorskip("torch", reason="computes the formula in its float32")
    rng = np.random.default_rng(4)
    boxes = np.zeros((50000, 4), np.float32)
    boxes[:, :2] = rng.uniform(-50, 1000, (50000, 2))
    boxes[:, 2:] = boxes[:, :2] + np.exp2(rng.uniform(2, 11, (50000, 2)))
    x1, y1, x2, y2 = torch.from_numpy(boxes).unbind(1)
    side = torch.sqrt((x2 - x1) * (y2 - y1))
    exact = 4 + torch.log2(side / 224) + torch.tensor(1e-6)
    want = (torch.floor(exact).clamp(2, 5) - 2).long().numpy()
    away = (torch.abs(exact - exact.round()) > 2e-6).numpy()
    np.testing.assert_array_equal(levels_chosen(boxes)[away], want[away])
    assert away.mean() > 0.99


def test_boxes_without_area_go_to_the_first_level() -> None:
    boxes = np.array(
        [[9, 9, 9, 9], [0, 5, 5000, 5], [5, 0, 5, 5000], [5000, 0, 0, 5000]], np.float32
    )
    assert not levels_chosen(boxes).any()


def test_both_sides_inverted_have_the_area_of_the_box() -> None:
    assert levels_chosen(np.array([[900, 700, 100, 100]], np.float32)) == 3


NAN, INF, HUGE = math.nan, math.inf, 3e38


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_box_that_is_not_finite_gives_zeros(
    value: float, place: int, ratio: int, aligned: bool
) -> None:
    case = Case(((8, 9), (4, 5)), (0.5, 0.25), (3, 3), ratio, aligned)
    boxes = np.array([[2, 2, 9, 9]] * 3, np.float32)
    boxes[1, place] = value
    got = case.pool(case.levels(0), boxes)
    assert not got[1].any()
    assert got[0].any()
    np.testing.assert_array_equal(got[0], got[2])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_a_box_that_overflows_gives_zeros(ratio: int, aligned: bool) -> None:
    case = Case(((8, 9),), (2.0,), (3, 3), ratio, aligned)
    boxes = np.array(
        [[-HUGE, 1, HUGE, 4], [1, -HUGE, 4, 2], [HUGE, 1, HUGE, 4], [1, HUGE, 4, -HUGE]], np.float32
    )
    assert not case.pool(case.levels(0), boxes).any()


def test_an_image_that_is_not_there_gives_zeros() -> None:
    case = Case(((8, 9), (4, 5)), (0.5, 0.25), (3, 3), 2, images=2)
    boxes = np.array([[2, 2, 9, 9]] * 5, np.float32)
    image_of = np.array([0, -1, 2, 1, 2**31 - 1], np.int32)
    got = case.pool(case.levels(0), boxes, image_of)
    assert not got[[1, 2, 4]].any()
    assert got[0].any()
    assert (got[0] != got[3]).any()


def test_without_images_given_all_boxes_are_of_the_first() -> None:
    case = Case(((8, 9),), (1.0,), (3, 3), 2, images=2)
    boxes, image_of = case.box_list(0)
    levels = case.levels(0)
    np.testing.assert_array_equal(
        case.pool(levels, boxes), case.pool(levels, boxes, np.zeros_like(image_of))
    )


def test_an_inverted_box_mirrors_a_fixed_number_of_samples() -> None:
    case = Case(((20, 20),), (1.0,), (4, 3), 2, True)
    levels = case.levels(0)
    boxes = np.array([[3, 4, 11, 17], [11, 4, 3, 17], [11, 17, 3, 4]], np.float32)
    straight, sideways, around = case.pool(levels, boxes)
    np.testing.assert_allclose(sideways, straight[:, :, ::-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(around, straight[:, ::-1, ::-1], rtol=1e-5, atol=1e-5)


def test_an_inverted_box_has_no_adaptive_samples() -> None:
    case = Case(((20, 20),), (1.0,), (4, 3), 0, True)
    boxes = np.array([[11, 4, 3, 17], [3, 17, 11, 4], [11, 17, 3, 4], [5, 5, 5, 9]], np.float32)
    assert not case.pool(case.levels(0), boxes).any()


@pytest.mark.parametrize("ratio", [0, 2])
def test_an_inverted_box_has_size_1_where_not_aligned(ratio: int) -> None:
    case = Case(((20, 20),), (1.0,), (4, 3), ratio)
    levels = case.levels(0)
    boxes = np.array([[11, 4, 3, 17], [11, 4, 12, 17]], np.float32)
    inverted, one_wide = case.pool(levels, boxes)
    np.testing.assert_array_equal(inverted, one_wide)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("side", [1e5, 3e6, 5e6, 1e7, 1e9, 1e15, 1e30])
def test_an_enormous_box_ends_and_is_right(side: float, aligned: bool) -> None:
    # The mean over n samples a pixel apart, of which the map has one for each pixel: the sum of
    # the map over n^2. A sample or two more at each border is what rounding can make of it.
    case = Case(((30, 40),), (1.0,), (1, 1), 0, aligned, 3)
    levels = [np.full((1, 3, 30, 40), 7.0, np.float32)]
    far = np.float32(-side / 3)
    box = np.array([[far, far, far + np.float32(side), far + np.float32(side)]], np.float32)
    got = case.pool(levels, box)
    most = 7.0 * (33 + 33 * side / 1e8) * (43 + 43 * side / 1e8) / side**2
    assert (got > 0).all() if side <= 1e7 else (got >= 0).all()
    assert (got <= max(most, 7.0 * 33 * 43 / 2.0**44)).all()
    if side == 1e5:
        np.testing.assert_allclose(got, 7.0 * 31 * 41 / side**2, rtol=0.05)


@pytest.mark.parametrize("case", CASES)
def test_threads_layouts_and_instruction_sets_give_the_same_bytes(case: Case) -> None:
    levels = case.levels(2)
    boxes, image_of = case.box_list(2)
    want = case.pool(levels, boxes, image_of)
    np.testing.assert_array_equal(case.pool(levels, boxes, image_of, threads=3), want)
    last = [as_channels_last(level) for level in levels]
    mixed = [
        level if i % 2 else turned
        for i, (level, turned) in enumerate(zip(levels, last, strict=True))
    ]
    for other in (last, mixed):
        np.testing.assert_array_equal(case.pool(other, boxes, image_of, threads=2), want)
    for code in (PORTABLE_CODE, AVX2_CODE):
        for maps in (levels, last):
            pyramid = described(case, maps)
            flags = code | (ALIGNED if case.aligned else 0)
            pooling = RoiPooling(*case.bins, case.ratio, flags)
            got = np.full_like(want, np.nan)
            rois._run(pyramid, boxes, image_of, pooling, got, 1)
            np.testing.assert_array_equal(got, want)


def described(case: Case, levels: Sequence[Floats]) -> Pyramid:
    """The levels as the library takes them."""
    pyramid = rois._pyramid(levels, case.scales)
    pyramid.canonical_size, pyramid.canonical_level, pyramid.first_level = case.canonical
    return pyramid


def test_what_is_not_finite_stays_where_it_is_read() -> None:
    case = Case(((12, 40),), (1.0,), (3, 8), 2, channels=2)
    levels = case.levels(0)
    boxes = np.array([[2, 1, 30, 10]], np.float32)
    clean = case.pool(levels, boxes)
    for value in (np.nan, np.inf):
        spoiled = levels[0].copy()
        spoiled[0, 1, 5, 12] = value
        got = case.pool([spoiled], boxes)
        want = float64_align(spoiled[0], boxes[0], 1.0, case)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got[0]), finite)
        np.testing.assert_array_equal(got[0][finite], clean[0][finite])
        assert 0 < (~finite).sum() < 4


def test_images_may_lie_apart() -> None:
    case = Case(((8, 9),), (1.0,), (3, 3), 2, images=4)
    levels = case.levels(0)
    boxes, _ = case.box_list(0)
    image_of = np.arange(len(boxes), dtype=np.int32) % 2
    every_second = case.pool([levels[0][::2]], boxes, image_of)
    np.testing.assert_array_equal(every_second, case.pool(levels, boxes, image_of * 2))


def test_a_level_without_images_is_one_image() -> None:
    case = Case(((8, 9), (4, 5)), (0.5, 0.25), (3, 3), 2)
    levels = case.levels(0)
    boxes, image_of = case.box_list(0)
    np.testing.assert_array_equal(
        case.pool([level[0] for level in levels], boxes), case.pool(levels, boxes, image_of)
    )


def test_no_boxes_give_no_output() -> None:
    case = Case(((8, 9),), (1.0,), (3, 3))
    assert case.pool(case.levels(0), np.zeros((0, 4), np.float32)).shape == (0, 5, 3, 3)


def test_out_is_used_in_place_and_nothing_outside_is_written() -> None:
    case = Case(((20, 30),), (1.0,), (7, 7), 2)
    levels, (boxes, image_of) = case.levels(0), case.box_list(0)
    room = np.full((3, len(boxes), 5, 7, 7), 77.0, np.float32)
    got = kernels.pyramid_roi_align(
        levels, boxes, output_size=(7, 7), scales=[1.0], sampling_ratio=2, out=room[1]
    )
    assert got is not None
    assert np.shares_memory(got, room)
    np.testing.assert_array_equal(room[1], case.pool(levels, boxes, image_of))
    assert (room[[0, 2]] == 77.0).all()


MAP = np.zeros((2, 3, 8, 9), np.float32)
BOXES = np.zeros((2, 4), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"levels": []}, "1 to 8", id="no-levels"),
        pytest.param({"levels": [MAP] * 9, "scales": [1.0] * 9}, "got 9", id="nine-levels"),
        pytest.param({"levels": [MAP, MAP]}, "1 for 2", id="scales-too-few"),
        pytest.param({"levels": [MAP.astype(np.float64)]}, "float64", id="float64"),
        pytest.param({"levels": [[1.0]]}, "list", id="list"),
        pytest.param({"levels": [MAP[0, 0]]}, r"\(8, 9\)", id="two-dimensions"),
        pytest.param({"levels": [MAP[:, :, :0]]}, "nothing empty", id="empty"),
        pytest.param({"levels": [MAP[:, :, ::2]]}, "contiguous", id="strided-rows"),
        pytest.param({"levels": [MAP[:, :2].swapaxes(1, 2)]}, "contiguous", id="swapped"),
        pytest.param({"levels": [MAP[::-1]]}, "backwards", id="images-reversed"),
        pytest.param(
            {"levels": [MAP, MAP[:, :2].copy()], "scales": [1.0, 0.5]}, "and 2", id="channels"
        ),
        pytest.param({"levels": [MAP, MAP[:1]], "scales": [1.0, 0.5]}, "has 1 and 3", id="images"),
        pytest.param({"scales": [0.0]}, "above 0", id="scale-0"),
        pytest.param({"scales": [math.nan]}, "above 0", id="scale-nan"),
        pytest.param({"scales": [1e300]}, "above 0", id="scale-too-large"),
        pytest.param({"boxes": BOXES.astype(np.float64)}, "float64", id="boxes-float64"),
        pytest.param({"boxes": [[0, 0, 1, 1]]}, "list", id="boxes-list"),
        pytest.param({"boxes": BOXES[:, :3]}, r"\(2, 3\)", id="boxes-of-three"),
        pytest.param({"boxes": np.zeros((4, 8), np.float32)[:, ::2]}, "contig", id="boxes-strided"),
        pytest.param({"image_of": [0, 0]}, "list", id="image-of-list"),
        pytest.param({"image_of": np.zeros(2, np.int64)}, "int64", id="image-of-int64"),
        pytest.param({"image_of": np.zeros(3, np.int32)}, r"\(3,\)", id="image-of-three"),
        pytest.param({"image_of": np.zeros(4, np.int32)[::2]}, "contig", id="image-of-strided"),
        pytest.param({"output_size": (0, 7)}, "1 to 1024", id="size-0"),
        pytest.param({"output_size": (7, 1025)}, "1 to 1024", id="size-too-large"),
        pytest.param({"output_size": 7}, "height, width", id="size-one-number"),
        pytest.param({"sampling_ratio": -1}, "adaptive", id="ratio-negative"),
        pytest.param({"sampling_ratio": 1025}, "1024", id="ratio-too-large"),
        pytest.param({"threads": -1}, "threads", id="threads"),
        pytest.param({"out": np.zeros((2, 3, 7, 7))}, "float64", id="out-dtype"),
        pytest.param({"out": np.zeros((2, 3, 7, 8), np.float32)}, "7, 8", id="out-shape"),
        pytest.param(
            {"out": np.zeros((2, 3, 7, 14), np.float32)[..., ::2]}, "contig", id="out-strided"
        ),
        pytest.param(
            {"levels": [MAP, MAP], "scales": [1.0, 0.5], "canonical_size": 0.0},
            "canonical_size",
            id="canonical-size",
        ),
        pytest.param(
            {"levels": [MAP, MAP], "scales": [1.0, 0.5], "first_level": 2**40},
            "first_level",
            id="first-level",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "levels": [MAP],
        "boxes": BOXES,
        "output_size": (7, 7),
        "scales": [1.0],
    }
    assert kernels.pyramid_roi_align(**good).shape == (2, 3, 7, 7)
    with pytest.raises(RequestError, match=message):
        kernels.pyramid_roi_align(**(good | arguments))


def good_pyramid(data: int = 0) -> Pyramid:
    pyramid = Pyramid(level_count=2, images=2, canonical_size=24.0, canonical_level=4)
    for i in range(2):
        pyramid.levels[i] = Features.channels_first(data or MAP.ctypes.data, FLOAT32, 3, 8, 9)
        pyramid.image_strides[i] = 3 * 8 * 9
        pyramid.scales[i] = 1.0
    return pyramid


def spoil(change: Callable[[Pyramid], None]) -> Pyramid:
    pyramid = good_pyramid()
    change(pyramid)
    return pyramid


def set_level(**values: Any) -> Pyramid:
    def change(pyramid: Pyramid) -> None:
        for name, value in values.items():
            setattr(pyramid.levels[1], name, value)

    return spoil(change)


BAD_PYRAMIDS = [
    pytest.param(set_level(data=None), id="no-data"),
    pytest.param(set_level(type=FLOAT16), id="types-differ"),
    pytest.param(set_level(channels=2), id="channels-differ"),
    pytest.param(set_level(height=0), id="no-rows"),
    pytest.param(set_level(width=(1 << 22) + 1), id="too-wide"),
    pytest.param(set_level(height=1 << 20, width=1 << 20), id="too-large"),
    pytest.param(set_level(channel_stride=1 << 30), id="channels-too-far"),
    pytest.param(set_level(pixel_stride=0), id="no-stride"),
    pytest.param(spoil(lambda p: setattr(p, "level_count", 0)), id="no-levels"),
    pytest.param(spoil(lambda p: setattr(p, "level_count", 9)), id="nine-levels"),
    pytest.param(spoil(lambda p: setattr(p, "images", 0)), id="no-images"),
    pytest.param(spoil(lambda p: setattr(p, "canonical_size", 0.0)), id="canonical-size"),
    pytest.param(spoil(lambda p: setattr(p, "canonical_size", NAN)), id="canonical-nan"),
    pytest.param(spoil(lambda p: p.scales.__setitem__(1, 0.0)), id="scale-0"),
    pytest.param(spoil(lambda p: p.scales.__setitem__(0, INF)), id="scale-infinite"),
    pytest.param(spoil(lambda p: p.image_strides.__setitem__(1, -1)), id="images-backwards"),
]
BAD_POOLINGS = [(0, 3, 2, 0), (3, 0, 2, 0), (1025, 3, 2, 0), (3, 3, -1, 0), (3, 3, 1025, 0)]


@pytest.mark.parametrize("pyramid", BAD_PYRAMIDS)
def test_entry_points_check_pyramids(emulated_cuda: ctypes.CDLL, pyramid: Pyramid) -> None:
    out = np.full((2, 3, 3, 3), 77.0, np.float32)
    pooling = ctypes.byref(RoiPooling(3, 3, 2, 0))
    shared = [BOXES.ctypes.data, None, 2, pooling, out.ctypes.data]
    for function, last in entry_points(emulated_cuda):
        assert function(ctypes.byref(good_pyramid()), *shared, last) == 0
        assert not out.any()
        out[:] = 77.0
        assert function(ctypes.byref(pyramid), *shared, last) == 1
        assert (out == 77.0).all()


def entry_points(emulated_cuda: ctypes.CDLL) -> list[tuple[Any, Any]]:
    """Both functions, and their last argument: threads, stream."""
    return [
        (kernels.load().edgeseg_pyramid_roi_align, 1),
        (emulated_cuda.edgeseg_cuda_pyramid_roi_align, None),
    ]


def test_entry_points_check_the_rest(emulated_cuda: ctypes.CDLL) -> None:
    out = np.full((2, 3, 3, 3), 77.0, np.float32)
    for function, last in entry_points(emulated_cuda):
        pyramid, pooling = ctypes.byref(good_pyramid()), ctypes.byref(RoiPooling(3, 3, 2, 0))
        good = [pyramid, BOXES.ctypes.data, None, 2, pooling, out.ctypes.data]
        for index, bad in [(0, None), (1, None), (3, -1), (4, None), (5, None)]:
            assert function(*good[:index], bad, *good[index + 1 :], last) == 1
        for values in [*BAD_POOLINGS, (3, 3, 2, 16)]:
            assert function(*good[:4], ctypes.byref(RoiPooling(*values)), good[5], last) == 1
        nothing = [pyramid, None, None, 0, pooling, None, last]
        assert function(*nothing) == 0
    bytes_type = set_level(type=UINT8)
    bytes_type.levels[0].type = UINT8
    for function, last in entry_points(emulated_cuda):
        assert function(ctypes.byref(bytes_type), *good[1:], last) == 1
    assert (out == 77.0).all()
    (cpu, _), _ = entry_points(emulated_cuda)
    neither = set_level(pixel_stride=2, channel_stride=200)
    assert cpu(ctypes.byref(neither), *good[1:], 1) == 1
    assert cpu(*good, 0) == 1


# How a level lies in device memory: channels first or last, and how many channels apart pixels are.
LAYOUTS = [
    pytest.param("first", 0, id="channels-first"),
    pytest.param("last", 0, id="channels-last"),
    pytest.param("last", 8, id="padded-to-8"),
    pytest.param("last", 1, id="one-more"),
]
TYPES = [
    pytest.param(np.float32, id="float32"),
    pytest.param(np.float16, id="float16"),
]


class Host:
    """Memory of the emulated GPU: numpy's."""

    stream = None

    def __init__(self) -> None:
        self.kept: list[Array] = []

    def put(self, array: Array) -> int:
        # A GPU's allocations are aligned; numpy's need not be.
        room = np.empty(array.nbytes + 256, np.uint8)
        start = -room.ctypes.data % 256
        copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        self.kept.append(copy)
        return copy.ctypes.data

    def get(self, index: int) -> Array:
        return self.kept[index]


class Gpu:
    """Memory of the GPU: PyTorch's."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.kept: list[Any] = []
        self.stream = torch.cuda.current_stream().cuda_stream

    def put(self, array: Array) -> int:
        self.kept.append(self.torch.from_numpy(array).cuda())
        return int(self.kept[-1].data_ptr())

    def get(self, index: int) -> Array:
        return np.asarray(self.kept[index].cpu().numpy())


def run_cuda(
    library: ctypes.CDLL,
    memory: Host | Gpu,
    case: Case,
    levels: Sequence[Array],
    boxes: Floats,
    image_of: NDArray[np.int32],
    layout: str,
    padding: int,
) -> Array:
    """What the launcher writes; outputs and padding are poisoned before."""
    element_type = FLOAT16 if levels[0].dtype == np.float16 else FLOAT32
    pyramid = Pyramid(level_count=len(levels), images=case.images)
    pyramid.canonical_size, pyramid.canonical_level, pyramid.first_level = case.canonical
    for i, level in enumerate(levels):
        height, width = case.maps[i]
        if layout == "first":
            data = memory.put(level)
            pyramid.levels[i] = Features.channels_first(
                data, element_type, case.channels, height, width
            )
            pyramid.image_strides[i] = level[0].size
        else:
            pitch = case.channels + padding
            if padding == 8:
                pitch = -(-case.channels // 8) * 8
            padded = np.full((case.images, height, width, pitch), np.nan, level.dtype)
            padded[..., : case.channels] = level.transpose(0, 2, 3, 1)
            pyramid.levels[i] = Features.channels_last(
                memory.put(padded), element_type, case.channels, height, width, pitch
            )
            pyramid.image_strides[i] = padded[0].size
        pyramid.scales[i] = case.scales[i]
    pooling = RoiPooling(*case.bins, case.ratio, ALIGNED if case.aligned else 0)
    box_data, image_data = memory.put(boxes), memory.put(image_of)
    out = memory.put(np.full((len(boxes) + 1, case.channels, *case.bins), 77.0, levels[0].dtype))
    status = library.edgeseg_cuda_pyramid_roi_align(
        ctypes.byref(pyramid), box_data, image_data, len(boxes), ctypes.byref(pooling), out,
        memory.stream,
    )  # fmt: skip
    assert status == 0
    written = memory.get(-1)
    assert (written[-1] == 77.0).all()
    return written[:-1]


def check_cuda(
    library: ctypes.CDLL,
    memory: Host | Gpu,
    case: Case,
    element: type,
    layout: str,
    padding: int,
    seed: int,
) -> None:
    levels: list[Array] = [level.astype(element) for level in case.levels(seed)]
    boxes, image_of = case.box_list(seed)
    boxes[0, 1] = np.nan
    image_of[1] = case.images
    got = run_cuda(library, memory, case, levels, boxes, image_of, layout, padding)
    # The same sums in the same order: equal to the last bit, rounded once more for float16.
    want = case.pool([level.astype(np.float32) for level in levels], boxes, image_of)
    np.testing.assert_array_equal(got, want.astype(element))


@pytest.mark.parametrize(("layout", "padding"), LAYOUTS)
@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_cuda_kernel_on_an_emulated_gpu_gives_the_cpu_bytes(
    emulated_cuda: ctypes.CDLL, case: Case, element: type, layout: str, padding: int
) -> None:
    check_cuda(emulated_cuda, Host(), replace(case, boxes=3), element, layout, padding, 6)


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "padding"), LAYOUTS)
@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_cuda_gives_the_cpu_bytes(
    cuda_library: ctypes.CDLL, case: Case, element: type, layout: str, padding: int
) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")  # shown where the test fails
    check_cuda(cuda_library, Gpu(), replace(case, boxes=60), element, layout, padding, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("element", TYPES)
def test_cuda_equals_the_cpu_at_full_size(
    cuda_library: ctypes.CDLL, element: type, layout: str
) -> None:
    maps = ((200, 272), (100, 136), (50, 68), (25, 34))
    case = Case(maps, FPN, (14, 14), 2, channels=256, boxes=200, canonical=(224.0, 4, 2))
    check_cuda(cuda_library, Gpu(), case, element, layout, 0, 7)
