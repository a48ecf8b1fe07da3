"""Ranges against the raw values in float64: every histogram, threshold and scale anew."""

from __future__ import annotations

import base64
import json
import math
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.calibration.ranges import (
    METHODS,
    ZERO_SCALE,
    Histogram,
    quantized,
    scale,
    sqnr_db,
    threshold,
    weight_scales,
)
from edgeseg.errors import CalibrationError, RequestError

Floats = NDArray[np.float32]
BINS = 8192

RANDOM = np.random.default_rng


def floats(*values: float) -> Floats:
    return np.array(values, np.float32)


def with_outliers(random: np.random.Generator) -> NDArray[np.float64]:
    values = random.normal(0, 1, 20_000)
    values[:20] *= 15
    return values


# What layers of a network give, and worse.
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    "normal": lambda random: random.normal(0.3, 2, 20_000),
    "laplace": lambda random: random.laplace(0, 1e-3, 20_000),
    "after a ReLU": lambda random: np.maximum(random.normal(-1, 1, 30_000), 0),
    "ReLU6": lambda random: np.clip(random.normal(1, 4, 20_000), 0, 6),
    "uniform": lambda random: random.uniform(0, 1, 20_000),
    "sigmoid": lambda random: 1 / (1 + np.exp(-random.normal(0, 3, 20_000))),
    "heavy tail": lambda random: random.standard_t(2.5, 20_000),
    "a few outliers": with_outliers,
    "one outlier": lambda random: np.append(random.normal(0, 1, 10_000), 60),
    "far from 0": lambda random: random.normal(10, 1, 20_000),
    "negative": lambda random: -random.gamma(2, 100, 20_000),
}


def values_of(name: str) -> Floats:
    return DISTRIBUTIONS[name](RANDOM(5)).astype(np.float32)


def histogram_of(*frames: Floats) -> Histogram:
    histogram = Histogram()
    for frame in frames:
        histogram.add(frame)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    return one.to_dict() == other.to_dict() and one.count == other.count


GROWTH: dict[str, list[Floats]] = {
    "one frame": [values_of("normal")],
    "nothing but zeros": [np.zeros((3, 4), np.float32)],
    "zeros first": [np.zeros(7, np.float32), values_of("laplace")],
    "growing": [values_of("normal") * np.float32(1.7**step) for step in range(12)],
    "shrinking": [values_of("normal") * np.float32(0.3**step) for step in range(8)],
    "from the least to the greatest": [
        floats(1e-45, -1e-40),
        floats(1e-20, -1e-20),
        floats(3.4e38, -3.4e38, 0),
    ],
    "powers of two": [floats(0.5, -0.5), floats(1, -1), floats(-2), floats(2, 4, -4)],
    "more than a chunk": [RANDOM(1).normal(0, 1, (3, 257, 260)).astype(np.float32)],
    "growing within a frame": [np.linspace(-1, 300, 400_000, dtype=np.float32)],
    "not contiguous": [RANDOM(2).normal(0, 1, (60, 50, 70)).astype(np.float32)[::-2, :, 1::3]],
    "transposed": [RANDOM(3).normal(0, 1, (300, 700)).astype(np.float32).T],
    "one number": [np.array(-3.5, np.float32)],
    "an empty frame between": [floats(1, 2), np.zeros((0, 4), np.float32), floats(3)],
}


@pytest.mark.parametrize("case", GROWTH)
def test_counts_are_those_of_numpy(case: str) -> None:
    frames = GROWTH[case]
    histogram = histogram_of(*frames)
    values = np.concatenate([frame.ravel() for frame in frames]).astype(np.float64)
    assert histogram.edges.shape == (2 * BINS + 1,)
    np.testing.assert_array_equal(
        histogram.counts, np.histogram(values, histogram.edges)[0], strict=True
    )
    assert histogram.count == values.size
    assert histogram.minimum == values.min()
    assert histogram.maximum == values.max()
    assert histogram.amax == np.abs(values).max()
    # The smallest power of two that holds all, so at least half of the bins are in use.
    assert histogram.edges[-1] == -histogram.edges[0] > histogram.amax
    assert histogram.amax >= histogram.edges[-1] / 2 or histogram.edges[-1] == 2.0**-100


@pytest.mark.parametrize("case", GROWTH)
def test_magnitudes_are_the_folded_counts(case: str) -> None:
    histogram = histogram_of(*GROWTH[case])
    values = np.concatenate([frame.ravel() for frame in GROWTH[case]]).astype(np.float64)
    counts, uppers = histogram.magnitudes()
    width = uppers[0]
    # A negative value on an edge is below it, and a positive one above.
    places = np.where(values < 0, np.ceil(-values / width) - 1, np.floor(values / width))
    expected = np.bincount(places.astype(np.int64), minlength=BINS)
    np.testing.assert_array_equal(counts, expected, strict=True)
    np.testing.assert_array_equal(uppers, histogram.edges[BINS + 1 :])


@pytest.mark.parametrize("seed", range(4))
def test_neither_order_nor_grouping_of_the_frames_counts(seed: int) -> None:
    random = RANDOM(seed)
    frames = [
        random.normal(0, spread, 500).astype(np.float32) for spread in (0, 1e-8, 1e-3, 1, 3, 5, 400)
    ]
    straight = histogram_of(*frames)
    shuffled = histogram_of(*(frames[place] for place in random.permutation(len(frames))))
    values = random.permutation(np.concatenate(frames))
    regrouped = histogram_of(*np.array_split(values, 5))
    for other in (shuffled, regrouped):
        np.testing.assert_array_equal(straight.counts, other.counts)
        for method in set(METHODS) - {"average"}:
            assert threshold(straight, method) == threshold(other, method), method


def test_memory_does_not_grow() -> None:
    histogram = histogram_of(values_of("normal"))
    before = histogram.counts.nbytes
    frame = RANDOM(1).normal(0, 1, 4_000_000).astype(np.float32)
    tracemalloc.start()
    try:
        for spread in (1, 10, 100):
            histogram.add(frame * np.float32(spread) if spread > 1 else frame)
            if spread == 1:
                assert tracemalloc.get_traced_memory()[1] < 4e6
        assert tracemalloc.get_traced_memory()[0] < 1e6
    finally:
        tracemalloc.stop()
    assert histogram.counts.nbytes == before


def test_average_is_the_moving_average_of_the_frames_maxima() -> None:
    maxima = [3.0, 5.0, 1.0, 0.0, 8.0]
    expected = maxima[0]
    for amax in maxima[1:]:
        expected += (amax - expected) / 10
    histogram = histogram_of(*(floats(amax / 3, -amax, 0) for amax in maxima))
    assert histogram.average == pytest.approx(expected, rel=1e-12)
    assert threshold(histogram, "average") == histogram.average


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_minmax_clips_nothing(name: str) -> None:
    values = values_of(name)
    assert threshold(histogram_of(values), "minmax") == np.abs(values).max()


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("name", sorted(set(DISTRIBUTIONS) - {"after a ReLU"}))
def test_percentile_is_that_of_the_values_within_a_bin(name: str, percentile: float) -> None:
    values = np.abs(values_of(name)).astype(np.float64)
    histogram = histogram_of(*np.array_split(values_of(name), 7))
    expected = np.quantile(values, percentile / 100, method="inverted_cdf")
    width = histogram.magnitudes()[1][0]
    assert threshold(histogram, "percentile", percentile=percentile) == pytest.approx(
        expected, rel=0, abs=width
    )


def test_percentile_is_interpolated_in_its_bin() -> None:
    values = RANDOM(3).uniform(0, 1, 1_000_000).astype(np.float32)
    histogram = histogram_of(values)
    width = histogram.magnitudes()[1][0]
    for percentile in (5, 50, 99.99):
        found = threshold(histogram, "percentile", percentile=percentile)
        assert found == pytest.approx(np.quantile(values, percentile / 100), rel=0, abs=width / 5)


def test_percentile_of_zeros_clips_nothing() -> None:
    values = np.zeros(100_000, np.float32)
    values[:5] = [1, 2, 3, 4, 5]
    assert threshold(histogram_of(values), "percentile", percentile=99.9) == 5
    values[5:500] = 1.5
    assert threshold(histogram_of(values), "percentile", percentile=99.9) == pytest.approx(
        1.5, abs=1e-3
    )


def divergences(values: Floats) -> dict[float, float]:
    """Threshold -> divergence, from the definition, bin by bin."""
    magnitudes = np.abs(values).astype(np.float64)
    limit = 2.0 ** (math.floor(math.log2(magnitudes.max())) + 1)
    bins, edges = np.histogram(magnitudes, 2048, (0, limit))
    bins[0] = min(bins[0], bins[1])
    found = {}
    for candidate in range(128, int(np.flatnonzero(bins)[-1]) + 2):
        true = bins[:candidate].astype(np.float64)
        levels = np.arange(candidate) * 128 // candidate
        filled = true > 0
        sums = np.bincount(levels, true)
        sizes = np.bincount(levels, filled)
        near = np.where(filled, sums[levels] / np.maximum(sizes[levels], 1), 0)
        if true.sum() < 0.9 * bins.sum():
            continue
        true[-1] += bins[candidate:].sum()
        if near[-1] == 0:
            near[-1] = 1 if true[-1] else 0
        true /= true.sum()
        near /= near.sum()
        both = true > 0
        found[float(edges[candidate])] = float((true[both] * np.log(true[both] / near[both])).sum())
    return found


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_entropy_has_the_least_divergence(name: str) -> None:
    values = values_of(name)
    by_threshold = divergences(values)
    least = min(by_threshold.values())
    best = max(t for t, divergence in by_threshold.items() if divergence < least + 1e-12)
    found = threshold(histogram_of(*np.array_split(values, 3)), "entropy")
    assert found == min(best, float(np.abs(values).max()))


def test_entropy_of_values_far_from_zero() -> None:
    # As after an average over a whole map: nothing near 0, and few small values.
    values = RANDOM(2).normal(10, 1, 50_000).astype(np.float32)
    assert threshold(histogram_of(values), "entropy") > 12


def test_entropy_clips_a_single_value_far_away() -> None:
    values = RANDOM(2).normal(0, 1, 50_000).astype(np.float32)
    values[7] = 40
    assert threshold(histogram_of(values), "entropy") < 5


def true_error(values: NDArray[np.float64], limit: float) -> float:
    """Mean squared error of the values in int8 with this threshold."""
    step = limit / 127
    return float(np.mean((np.clip(np.round(values / step), -127, 127) * step - values) ** 2))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_has_the_least_error_of_2000_thresholds(name: str) -> None:
    values = values_of(name).astype(np.float64)
    amax = np.abs(values).max()
    # Zeros have no error at any threshold.
    nonzero = values[values != 0]
    least = min(true_error(nonzero, amax * part / 2000) for part in range(1, 2001))
    found = threshold(histogram_of(*np.array_split(values_of(name), 3)), "mse")
    assert true_error(nonzero, found) <= 1.01 * least
    assert 0 < found <= amax


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_zeros_are_not_fitted(method: str) -> None:
    # Many more values than a test can add, and one so large that the rest is in a few bins.
    counts = np.zeros(2 * BINS, np.int64)
    counts[BINS : BINS + 200] = 10**9
    counts[-1] = 1
    found = []
    for zeros in (0, 10**13):
        with_zeros = counts.copy()
        with_zeros[BINS] += zeros
        packed = base64.b64encode(zlib.compress(with_zeros.astype("<i8").tobytes())).decode()
        cached = {"bins": 2 * BINS, "minimum": 0.0, "maximum": 1 - 1e-6, "average": 1.0}
        found.append(threshold(Histogram.from_dict(cached | {"counts": packed}), method))
    assert found[0] == found[1]
    assert method == "entropy" or found[0] < 0.07


def test_methods_that_clip_do_clip_outliers() -> None:
    histogram = histogram_of(values_of("a few outliers"))
    for method, most in (("percentile", 0.2), ("entropy", 0.2), ("mse", 0.95)):
        assert threshold(histogram, method, percentile=99.8) < most * histogram.amax, method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_threshold_scales_with_the_values(name: str, method: str) -> None:
    frames = np.array_split(values_of(name), 3)
    near = threshold(histogram_of(*frames), method)
    # By a power of two nothing at all changes, also not the bins.
    for factor in (2.0**-60, 2.0**60):
        far = histogram_of(*(frame * np.float32(factor) for frame in frames))
        assert threshold(far, method) == pytest.approx(near * factor, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frames", [[floats(0)], [np.zeros((1, 64, 9, 9), np.float32)] * 3])
def test_zeros_have_a_defined_threshold(frames: list[Floats], method: str) -> None:
    found = threshold(histogram_of(*frames), method)
    assert found == 127 * 2.0**-14
    assert scale(found) == ZERO_SCALE
    assert np.float16(ZERO_SCALE) == np.finfo(np.float16).tiny


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values",
    [
        floats(1e-45),
        floats(-1e-38, 1e-39),
        floats(2.0**-101),
        floats(2.0**-100),
        floats(3.4028235e38, -3.4028235e38),
        floats(5, 5, 5),
        floats(-5, 0, 0),
        floats(0, 0, 1),
        floats(1, 1024),
        floats(-(2.0**10)),
    ],
)
def test_any_tensor_has_a_usable_scale(values: Floats, method: str) -> None:
    histogram = histogram_of(values, values)
    found = scale(threshold(histogram, method))
    assert found.dtype == np.float32
    assert np.finfo(np.float32).tiny <= found <= np.finfo(np.float32).max
    assert quantized(values, found).dtype == np.int8


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_keeps_its_value(method: str) -> None:
    found = threshold(histogram_of(floats(*[3.1] * 50)), method)
    assert found == pytest.approx(3.1, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (floats(1, math.nan, 2), "1 of 3 are NaN or infinite"),
        (floats(math.inf, -math.inf), "2 of 2 are NaN or infinite"),
        (np.where(np.arange(200_000) > 199_990, np.nan, 5).astype(np.float32), "9 of 200000"),
        (np.zeros(3, np.float64), "float64 came"),
        (np.zeros(3, np.int32), "int32 came"),
    ],
)
def test_values_that_do_not_count(values: Floats, message: str) -> None:
    histogram = histogram_of(values_of("normal"))
    before = histogram_of(values_of("normal"))
    with pytest.raises(CalibrationError, match=message):
        histogram.add(values)
    assert same(histogram, before), "the frame that failed must not be half counted"


@pytest.mark.parametrize("case", GROWTH)
def test_cached_and_read_again(case: str) -> None:
    histogram = histogram_of(*GROWTH[case])
    text = json.dumps(histogram.to_dict())
    again = Histogram.from_dict(json.loads(text))
    assert same(histogram, again)
    np.testing.assert_array_equal(histogram.counts, again.counts)
    np.testing.assert_array_equal(histogram.edges, again.edges)
    for method in METHODS:
        assert threshold(histogram, method) == threshold(again, method)
    more = values_of("heavy tail")
    histogram.add(more)
    again.add(more)
    assert same(histogram, again)


def test_cached_before_the_first_frame() -> None:
    again = Histogram.from_dict(json.loads(json.dumps(Histogram().to_dict())))
    assert same(again, Histogram())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": 4096}, "has 4096 bins"),
        ({"bins": None}, "has None bins"),
        ({"counts": 7}, "its counts are no text"),
        ({"counts": "no base64!"}, "cannot be unpacked"),
        ({"counts": "AAAA"}, "cannot be unpacked"),
        ({"counts": "eJxjYGBgAAAABAAB"}, "unpack to 4 bytes"),
        ({"minimum": None}, "minimum, maximum and average are"),
        ({"minimum": math.nan}, "minimum, maximum and average are"),
        ({"minimum": 1e9}, "minimum, maximum and average are"),
        ({"maximum": 1e9}, "not where its counts are"),
        ({"average": "much"}, "minimum, maximum and average are"),
        ({"counts": Histogram().to_dict()["counts"]}, "not where its counts are"),
    ],
)
def test_a_damaged_cache_is_refused(change: dict[str, object], message: str) -> None:
    content = histogram_of(values_of("normal")).to_dict() | change
    with pytest.raises(CalibrationError, match=message):
        Histogram.from_dict(content)


@pytest.mark.parametrize(
    ("method", "percentile", "message"),
    [
        ("median", 99.0, "minmax, average, percentile, entropy, mse, and median was asked for"),
        ("percentile", 0.0, "above 0 and at most 100, and 0 came"),
        ("percentile", 100.5, "and 100.5 came"),
        ("percentile", math.nan, "and nan came"),
    ],
)
def test_wrong_requests(method: str, percentile: float, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        threshold(histogram_of(floats(1)), method, percentile=percentile)


@pytest.mark.parametrize("method", METHODS)
def test_no_values_no_threshold(method: str) -> None:
    histogram = histogram_of(np.zeros((0, 3), np.float32))
    with pytest.raises(CalibrationError, match="at least one frame"):
        threshold(histogram, method)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_scale_of_no_threshold(limit: float) -> None:
    with pytest.raises(CalibrationError):
        scale(limit)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(127, 1.0), (1, 1 / 127), (6.35, 0.05), (1e-45, np.finfo(np.float32).tiny)],
)
def test_scale_is_a_127th(limit: float, expected: float) -> None:
    assert scale(limit) == np.float32(expected)


# Shape of the weight, axis of its output channels.
WEIGHTS = {
    "Conv": ((24, 16, 3, 3), 0),
    "depthwise": ((32, 1, 3, 3), 0),
    "ConvTranspose": ((16, 24, 4, 4), 1),
    "depthwise ConvTranspose": ((16, 1, 4, 4), 1),
    "Gemm": ((10, 700), 0),
    "Gemm, from the back": ((700, 10), -1),
    "long": ((3, 40_000), 0),
}


def weight_of(name: str) -> tuple[Floats, int, list[NDArray[np.float64]]]:
    """The weight, its axis, and its channels one by one."""
    shape, axis = WEIGHTS[name]
    weight = (RANDOM(9).standard_t(4, shape) * 0.05).astype(np.float32)
    channels = [
        np.take(weight, channel, axis).ravel().astype(np.float64) for channel in range(shape[axis])
    ]
    return weight, axis, channels


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_scales_cover_each_channel(name: str) -> None:
    weight, axis, channels = weight_of(name)
    scales = weight_scales(weight, axis)
    expected = floats(*(max(abs(x) for x in channel.tolist()) / 127 for channel in channels))
    np.testing.assert_array_equal(scales, expected, strict=True)
    assert np.abs(quantized(weight, scales, axis)).max(initial=0) == 127


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_scales_with_the_least_error(name: str) -> None:
    weight, axis, channels = weight_of(name)
    scales = weight_scales(weight, axis, "mse")
    assert scales.shape == (len(channels),)
    for channel, found in zip(channels, scales.tolist(), strict=True):
        amax = float(np.abs(channel).max())
        errors = [true_error(channel, amax * part / 300) for part in range(120, 301)]
        assert true_error(channel, 127 * found) <= errors[-1] * (1 + 1e-4)
        # The fewer weights, the more the error jumps from one threshold to the next.
        if channel.size > 100:
            most = 1.01 if channel.size > 500 else 1.05
            assert true_error(channel, 127 * found) <= most * min(errors)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_channels_of_zeros(method: str) -> None:
    weight = RANDOM(1).normal(0, 1, (4, 3, 3, 3)).astype(np.float32)
    weight[1] = 0
    weight[3] = 1e-44
    scales = weight_scales(weight, 0, method)
    assert scales[1] == ZERO_SCALE
    assert scales[3] == np.finfo(np.float32).tiny
    assert not quantized(weight, scales, 0)[[1, 3]].any()
    assert weight_scales(np.zeros((2, 5), np.float32), 0, method).tolist() == [2.0**-14] * 2


@pytest.mark.parametrize(
    ("weight", "axis", "message"),
    [
        (np.zeros((2, 3), np.float64), 0, "float64 came"),
        (np.zeros((2, 3), np.float32), 2, r"axis 2, and one of shape \(2, 3\)"),
        (np.zeros((2, 3), np.float32), -3, "axis -3"),
        (np.zeros((2, 0), np.float32), 0, r"shape \(2, 0\)"),
        (np.zeros((0, 2), np.float32), 0, r"shape \(0, 2\)"),
        (floats(1, math.nan, 2, 3).reshape(2, 2), 0, "1 of 4 are NaN"),
        (floats(1, 2, -math.inf, math.inf).reshape(2, 2), 1, "2 of 4 are NaN"),
    ],
)
def test_weights_without_scales(weight: Floats, axis: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        weight_scales(weight, axis)


def test_weights_have_two_methods() -> None:
    with pytest.raises(RequestError, match="minmax and mse, and entropy came"):
        weight_scales(np.ones((2, 2), np.float32), 0, "entropy")


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_levels_are_those_of_onnx(axis: int | None) -> None:
    pytest.importorskip("onnx", reason="compares with ONNX's reference evaluator")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    random = RANDOM(4)
    values = random.normal(0, 40, (6, 5, 7)).astype(np.float32)
    values.flat[:6] = [0.5, 1.5, 2.5, -0.5, -1.5, -1e6]
    scales = np.float32(1 if axis is None else random.uniform(0.2, 2, values.shape[axis]))
    node = helper.make_node(
        "QuantizeLinear", ["x", "s", "z"], ["y"], axis=1 if axis is None else axis
    )
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, np.shape(scales)),
            helper.make_tensor_value_info("z", TensorProto.INT8, np.shape(scales)),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT8, values.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    zero = np.zeros(np.shape(scales), np.int8)
    (expected,) = ReferenceEvaluator(model).run(
        None, {"x": values, "s": np.array(scales), "z": zero}
    )
    assert np.min(expected) == -128
    # For weights the most negative level is left out.
    np.testing.assert_array_equal(
        quantized(values, scales, axis), np.maximum(expected, -127), strict=True
    )


@pytest.mark.parametrize(
    ("values", "scale", "axis", "message"),
    [
        (floats(1, 2), floats(1, 2, 3), 0, r"shape \(2,\), and \(3,\) came"),
        (floats(1, 2), floats(1, 2), None, r"shape \(\), and \(2,\) came"),
        (floats(1, 2), np.float32(1), 3, "axis 3"),
        (floats(1, 2), floats(1, 0), 0, "positive"),
        (floats(1, 2), np.float32(-1), None, "positive"),
        (floats(1, 2), np.float32(math.nan), None, "positive"),
        (floats(1, math.nan), np.float32(1), None, "1 of 2 are NaN"),
    ],
)
def test_values_that_have_no_levels(
    values: Floats, scale: np.float32 | Floats, axis: int | None, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        quantized(values, scale, axis)


@pytest.mark.parametrize("shape", [(1000,), (3, 50, 2, 700)])
def test_sqnr_is_that_of_exact_sums(shape: tuple[int, ...]) -> None:
    reference = RANDOM(1).normal(0, 3, shape).astype(np.float32)
    step = scale(9)
    near = quantized(reference, step).astype(np.float32) * step
    signal = math.fsum(x * x for x in reference.ravel().tolist())
    noise = math.fsum(
        (x - y) ** 2 for x, y in zip(reference.ravel().tolist(), near.ravel().tolist(), strict=True)
    )
    expected = 10 * math.log10(signal / noise)
    assert sqnr_db(reference, near) == pytest.approx(expected, rel=1e-9)
    # The two may lie differently in memory.
    assert sqnr_db(reference, np.asfortranarray(near)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("reference", "near", "expected"),
    [
        (floats(1, 2), floats(1, 2), math.inf),
        (floats(0, 0), floats(0, 0), math.inf),
        (floats(), floats(), math.inf),
        (floats(0, 0), floats(0, 1), -math.inf),
        (floats(10, 0), floats(9, 0), 20.0),
        (floats(3e38), floats(0), 0.0),
    ],
)
def test_sqnr_at_its_ends(reference: Floats, near: Floats, expected: float) -> None:
    assert sqnr_db(reference, near) == expected


def test_sqnr_of_other_shapes() -> None:
    with pytest.raises(CalibrationError, match=r"\(2,\) against \(3,\)"):
        sqnr_db(floats(1, 2), floats(1, 2, 3))
