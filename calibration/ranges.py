"""What values a tensor takes, the range of them that int8 is to cover, and the rounding itself.

Everything here is symmetric: zero point 0, and a scale that maps the threshold to 127. For
activations a range comes from a ``Histogram``, which sees one frame at a time and does not grow
with their number; for weights it comes from the weights.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import CalibrationError, RequestError

__all__ = [
    "METHODS",
    "ZERO_SCALE",
    "Histogram",
    "quantized",
    "scale",
    "sqnr_db",
    "threshold",
    "weight_scales",
]

#: The ways to a threshold, see ``threshold``.
METHODS = ("minmax", "average", "percentile", "entropy", "mse")

#: The scale of what is 0 everywhere. Any would do for the zeros themselves. This one is the
#: smallest normal number of float16, so that it survives in a graph of half precision, and large
#: enough that a bias in units of (input scale x weight scale) stays far from the end of int32.
ZERO_SCALE = np.float32(2.0**-14)

_LEVELS = 127  # on each side of 0
_BINS = 8192  # on each side of 0
_LEAST_EXPONENT = -100  # the range of a tensor of zeros, far from where float32 loses digits
_CHUNK = 1 << 16  # values binned at once; their temporaries of 1 MB fit the second cache level
_MOMENTUM = 0.9  # of the moving average over the frames
_ENTROPY_BINS = 2048  # bins of |x| that the divergence is computed with, as in the talk
_ENTROPY_LEVELS = 128
_ENTROPY_KEPT = 0.9  # the least part of the values that a threshold may leave unclipped
_MSE_CANDIDATES = 1024
_MSE_LEAST = 1 / 256  # the smallest threshold tried, as a part of amax
_MSE_REFINED = 65  # thresholds tried around the best of these
_WEIGHT_PARTS = np.linspace(1.0, 0.4, 121)  # thresholds tried for weights, as parts of amax

Floats = NDArray[np.float32]


class Histogram:
    """A histogram of one float32 tensor over any number of frames, in memory that stays the same.

    8192 bins of equal width on each side of 0 cover [-R, R), where R is the smallest power of two
    above every magnitude so far (at least 2**-100). When a value falls outside, pairs of bins are
    merged until R holds it. Bins are half open, ``low <= x < high``, and their edges are multiples
    of a power of two, so merging is exact: counts, minimum and maximum depend on the values alone,
    never on the order or the grouping of the frames. Only ``average`` depends on them.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(2 * _BINS, np.int64)
        self._count = 0
        self._minimum = 0.0
        self._maximum = 0.0
        self._average = 0.0

    @property
    def count(self) -> int:
        """How many values were added."""
        return self._count

    @property
    def minimum(self) -> float:
        """The smallest value, exact; 0 before the first."""
        return self._minimum

    @property
    def maximum(self) -> float:
        """The largest value, exact; 0 before the first."""
        return self._maximum

    @property
    def amax(self) -> float:
        """The largest magnitude, exact; 0 before the first value."""
        return max(-self._minimum, self._maximum)

    @property
    def average(self) -> float:
        """The moving average of the frames' largest magnitudes, one frame per ``add``.

        It starts at that of the first frame; each later one enters with weight 0.1.
        """
        return self._average

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many values each bin has: (16384,) int64, a copy."""
        counts: NDArray[np.int64] = self._counts.copy()
        return counts

    @property
    def edges(self) -> NDArray[np.float64]:
        """The edges of the bins, rising: (16385,) float64, exact."""
        return _multiples(-_BINS, _BINS, self._width)

    def magnitudes(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The histogram of ``|x|``: counts (8192,) int64, and upper edges (8192,) float64.

        A negative value on an edge is counted below that edge, a positive one above it.
        """
        folded: NDArray[np.int64] = self._counts[:_BINS][::-1] + self._counts[_BINS:]
        return folded, _multiples(1, _BINS, self._width)

    def add(self, values: Floats) -> None:
        """Adds the tensor of one frame: float32 of any shape and strides.

        An empty array adds nothing. Raises CalibrationError, and adds nothing, for another dtype
        and for values that are NaN or infinite; the message has their number, and the caller knows
        the tensor's name.
        """
        if values.dtype != np.float32:
            raise CalibrationError(f"a range is taken of float32 values, and {values.dtype} came")
        if not values.size:
            return
        counts = self._counts
        exponent = _exponent(self.amax)
        low, high = math.inf, -math.inf
        scratch = np.empty(min(_CHUNK, values.size), np.float32)
        places = np.empty(scratch.size, np.intp)
        for part in _chunks(values):
            # NaN takes the place of the minimum, and infinities that of either.
            with np.errstate(invalid="ignore"):
                part_low, part_high = float(part.min()), float(part.max())
            if not (math.isfinite(part_low) and math.isfinite(part_high)):
                raise _not_finite(values)
            low, high = min(low, part_low), max(high, part_high)
            needed = _exponent(max(-part_low, part_high))
            if needed > exponent:
                counts = _merged(counts, needed - exponent)
                exponent = needed
            indices, whole = places[: part.size], scratch[: part.size]
            # The width is a power of two, and the bins fewer than 2**24: exact in float32.
            np.multiply(part, np.float32(1 / _width(exponent)), out=whole)
            np.floor(whole, out=whole)
            whole += np.float32(_BINS)
            indices[:] = whole
            counts = counts + np.bincount(indices, minlength=2 * _BINS)
        largest = max(-low, high)
        if self._count:
            self._average = _MOMENTUM * self._average + (1 - _MOMENTUM) * largest
            self._minimum, self._maximum = min(self._minimum, low), max(self._maximum, high)
        else:
            self._average, self._minimum, self._maximum = largest, low, high
        self._counts = counts
        self._count += values.size

    def to_dict(self) -> dict[str, object]:
        """Everything it holds, as JSON takes it; ``from_dict`` gives an equal histogram."""
        packed = zlib.compress(self._counts.astype("<i8").tobytes(), 6)
        return {
            "bins": 2 * _BINS,
            "minimum": self._minimum,
            "maximum": self._maximum,
            "average": self._average,
            "counts": base64.b64encode(packed).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, object]) -> Histogram:
        """The histogram that ``to_dict`` wrote; CalibrationError for anything else."""
        figures = [content.get(name) for name in ("minimum", "maximum", "average")]
        packed = content.get("counts")
        if content.get("bins") != 2 * _BINS:
            raise _damaged(f"it has {content.get('bins')} bins, not {2 * _BINS}")
        if not isinstance(packed, str):
            raise _damaged("its counts are no text")
        try:
            # Bounded, so that a damaged file cannot ask for all memory there is.
            unpacked = zlib.decompressobj().decompress(
                base64.b64decode(packed, validate=True), 16 * _BINS + 1
            )
        except (binascii.Error, ValueError, zlib.error) as error:
            raise _damaged(f"its counts cannot be unpacked ({error})") from error
        if len(unpacked) != 16 * _BINS:
            raise _damaged(f"its counts unpack to {len(unpacked)} bytes, not {16 * _BINS}")
        numbers = [float(x) for x in figures if isinstance(x, (int, float)) and math.isfinite(x)]
        if len(numbers) != 3 or numbers[0] > numbers[1]:
            raise _damaged(f"minimum, maximum and average are {figures}")
        histogram = cls()
        histogram._minimum, histogram._maximum, histogram._average = numbers
        histogram._counts = np.frombuffer(unpacked, "<i8").astype(np.int64)
        if int(histogram._counts.min()) < 0:
            raise _damaged("it has negative counts")
        histogram._count = int(histogram._counts.sum())
        # The range follows from minimum and maximum, so these have to be where the counts end.
        used = np.flatnonzero(histogram._counts)
        ends = [int(place) - _BINS for place in (used[0], used[-1])] if used.size else [0, 0]
        if [math.floor(x / histogram._width) for x in numbers[:2]] != ends:
            raise _damaged(f"{numbers[0]} to {numbers[1]} is not where its counts are")
        return histogram

    @property
    def _width(self) -> float:
        """The width of a bin, a power of two."""
        return _width(_exponent(self.amax))


def threshold(histogram: Histogram, method: str, *, percentile: float = 99.99) -> float:
    """The magnitude at which to clip the tensor: above 0, and never above the largest seen.

    ``method`` is one of ``METHODS``:

    - ``minmax``: the largest magnitude; nothing is clipped.
    - ``average``: the moving average of the frames' largest magnitudes.
    - ``percentile``: the magnitude that ``percentile`` % (above 0, at most 100) of all values do
      not exceed, interpolated in its bin. Where that is in the first of the 8192 bins, almost
      all values are 0, a threshold there would clip all others, and ``minmax`` is taken.
    - ``entropy``: the least Kullback-Leibler divergence between the clipped distribution of
      magnitudes, in 2048 bins, and its version in 128 levels (S. Migacz, "8-bit inference with
      TensorRT", GTC 2017). Thresholds are bin edges, from the 128th on, that clip at most a tenth
      of the values. Two equal divergences give the larger threshold.
    - ``mse``: the least expected squared error of clipping and rounding to multiples of
      threshold / 127, with the values spread evenly over their bin. 1024 thresholds are tried,
      from 1/256 of the largest magnitude on in steps of 0.5 %, and then 65 around the best.

    int8 has an exact 0, so a tensor that is mostly zeros, as after a ReLU, must not be fitted to
    them: ``entropy`` and ``mse`` count no more values in the first bin than in the second.

    A tensor that is 0 everywhere (or below 2**-100) gives 127 * 2**-14, see ``ZERO_SCALE``.
    CalibrationError when nothing was added; RequestError for another method or percentile.
    """
    if method not in METHODS:
        raise RequestError(f"the methods are {', '.join(METHODS)}, and {method} was asked for")
    if not 0 < percentile <= 100:
        raise RequestError(f"a percentile is above 0 and at most 100, and {percentile:g} came")
    if not histogram.count:
        raise CalibrationError(
            "a range is taken from the values of at least one frame, and none came; "
            "calibrate with more frames"
        )
    if histogram.amax < 2.0**_LEAST_EXPONENT:
        return _LEVELS * float(ZERO_SCALE)
    if method == "average":
        # Many frames of zeros after one that was not bring it down without end.
        found = max(histogram.average, 2.0**_LEAST_EXPONENT)
    elif method == "percentile":
        found = _percentile(histogram, percentile / 100)
    elif method == "entropy":
        found = _entropy(histogram)
    elif method == "mse":
        found = _mse(histogram)
    else:
        found = histogram.amax
    return min(found, histogram.amax)


def scale(threshold: float) -> np.float32:
    """threshold / 127, a positive normal float32; CalibrationError unless threshold is positive."""
    if not (math.isfinite(threshold) and threshold > 0):
        raise CalibrationError(f"a threshold is a positive number, and {threshold} came")
    if threshold > _LEVELS * float(np.finfo(np.float32).max):
        raise CalibrationError(f"the threshold {threshold:g} is beyond what float32 holds")
    return max(np.float32(threshold / _LEVELS), np.finfo(np.float32).tiny)


def weight_scales(weight: Floats, axis: int, method: str = "minmax") -> Floats:
    """The scale of each output channel: (channels,) float32, positive and normal.

    ``weight``: float32 of any shape. ``axis``: where its output channels are, 0 for Conv (also
    depthwise), 1 for ConvTranspose. ``method``: ``minmax`` covers the largest magnitude of the
    channel; ``mse`` takes the one of 121 thresholds, from that magnitude down to 0.4 of it, with
    the least squared error of ``quantized`` weights. A channel that is 0 everywhere gets
    ``ZERO_SCALE``.

    CalibrationError for another dtype, an axis that is not there, an empty weight, and values
    that are NaN or infinite; RequestError for another method.
    """
    if method not in ("minmax", "mse"):
        raise RequestError(f"the methods for weights are minmax and mse, and {method} came")
    if weight.dtype != np.float32:
        raise CalibrationError(f"a weight is an array of float32, and one of {weight.dtype} came")
    if not -weight.ndim <= axis < weight.ndim or not weight.size:
        raise CalibrationError(
            f"a weight has output channels along axis {axis}, and one of shape {weight.shape} came"
        )
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    amax = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64)
    if not np.isfinite(amax).all():
        raise _not_finite(weight)
    if method == "mse":
        together = max(1, _CHUNK // rows.shape[1])
        for first in range(0, rows.shape[0], together):
            block = slice(first, first + together)
            amax[block] *= _best_parts(rows[block], amax[block])
    scales = _normal_scales(amax)
    scales[amax == 0] = ZERO_SCALE
    return scales


def quantized(
    values: Floats, scale: float | np.float32 | Floats, axis: int | None = None
) -> NDArray[np.int8]:
    """``values / scale`` in float32, rounded half to even, clipped to [-127, 127]: int8.

    The arithmetic is that of ONNX QuantizeLinear with zero point 0, which for activations clips
    to [-128, 127]. For weights -128 is left out: both signs then have the same range, and the sum
    of two products with int8 activations fits int16, as some kernels need. The same levels come
    from QuantizeLinear where nothing is clipped.

    ``scale``: one, or (channels,) along ``axis``. CalibrationError for values that are NaN or
    infinite, for scales that are not positive, and for a number of scales that is not that of
    the channels.
    """
    scales = np.asarray(scale, np.float32)
    expected = () if axis is None else values.shape[axis : axis + 1 or None]
    if scales.shape != expected or (axis is not None and not expected):
        raise CalibrationError(
            f"values of shape {values.shape} with axis {axis} have scales of shape {expected}, "
            f"and {scales.shape} came"
        )
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise CalibrationError("a scale is a positive number, and others came")
    if not np.isfinite(values).all():
        raise _not_finite(values)
    if axis is not None:
        shape = [1] * values.ndim
        shape[axis] = -1
        scales = scales.reshape(shape)
    # A quotient beyond float32 is infinite, and is clipped as any other.
    with np.errstate(over="ignore"):
        levels = np.rint(values / scales)
    within: NDArray[np.int8] = np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8)
    return within


def sqnr_db(reference: Floats, quantized: Floats) -> float:
    """Signal to quantization noise, in dB: 10 log10(sum of squares / sum of squared differences).

    ``quantized``: the values that stand for ``reference``, of the same shape, not int8 levels.
    Infinite when both are equal; minus infinite when only the reference is 0. CalibrationError
    when the shapes differ.
    """
    if reference.shape != quantized.shape:
        raise CalibrationError(
            "values and their quantized version have the same shape, "
            f"and {reference.shape} against {quantized.shape} came"
        )
    if not reference.size:
        return math.inf
    signal = noise = 0.0
    flat, near = reference.reshape(-1), quantized.reshape(-1)
    for first in range(0, flat.size, _CHUNK):
        wide = flat[first : first + _CHUNK].astype(np.float64)
        signal += float(wide @ wide)
        wide -= near[first : first + _CHUNK]
        noise += float(wide @ wide)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _chunks(values: Floats) -> Iterator[Floats]:
    """The values in C order, in pieces of one dimension; views where the strides allow it."""
    # Without a copy of the whole, also of arrays that are not contiguous.
    flags: tuple[Literal["external_loop", "buffered"], ...] = ("external_loop", "buffered")
    pieces: Iterator[Floats] = iter(np.nditer(values, flags, buffersize=_CHUNK, order="C"))
    return pieces


def _multiples(first: int, last: int, width: float) -> NDArray[np.float64]:
    """first * width, ..., last * width."""
    multiples: NDArray[np.float64] = np.arange(first, last + 1, dtype=np.float64)
    multiples *= width
    return multiples


def _exponent(amax: float) -> int:
    """The exponent of the smallest power of two above ``amax``, at least the least one."""
    return max(math.frexp(amax)[1], _LEAST_EXPONENT) if amax else _LEAST_EXPONENT


def _width(exponent: int) -> float:
    """The width of a bin when the bins cover magnitudes below 2**exponent."""
    return 2.0**exponent / _BINS


def _merged(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The counts when the range doubles so many times."""
    together = 2 ** min(doublings, _BINS.bit_length() - 1)
    sums = counts.reshape(-1, together).sum(axis=1)
    merged = np.zeros_like(counts)
    merged[_BINS - sums.size // 2 : _BINS + sums.size // 2] = sums
    return merged


def _percentile(histogram: Histogram, part: float) -> float:
    counts, uppers = histogram.magnitudes()
    below = np.cumsum(counts)
    wanted = part * histogram.count
    place = min(int(np.searchsorted(below, wanted)), _BINS - 1)
    if place == 0:
        return histogram.amax
    missing = float(below[place]) - wanted
    return float(uppers[place] - uppers[0] * missing / counts[place])


def _entropy(histogram: Histogram) -> float:
    """The threshold with the least divergence.

    Sums over a level are differences of sums from 0 on, so that each candidate costs its 128
    levels, and not all its bins.
    """
    counts, uppers = histogram.magnitudes()
    bins = counts.reshape(_ENTROPY_BINS, -1).sum(axis=1).astype(np.float64)
    bins[0] = min(bins[0], bins[1])
    used = int(np.flatnonzero(bins)[-1]) + 1
    candidates = np.arange(_ENTROPY_LEVELS, used + 1)
    mass = _running(bins)
    filled = _running(bins > 0)
    own = _running(_times_log(bins))

    # Bin j is in level floor(128 j / candidate); (candidates, 129) first bins of the levels.
    starts = -(-candidates[:, None] * np.arange(_ENTROPY_LEVELS + 1) // _ENTROPY_LEVELS)
    sums = np.diff(mass[starts], axis=1)
    # A level stands for its mean over those of its bins that have values.
    means = sums / np.maximum(np.diff(filled[starts], axis=1), 1)
    kept, last = mass[candidates], bins[candidates - 1]
    # What is clipped is added to the last bin of the reference, and to no level.
    clipped = mass[-1] - kept
    reference = own[candidates] - _times_log(last) + _times_log(last + clipped)
    # Where that bin is empty, as between most values and a few far from them, the divergence
    # would be infinite: one value is taken to be there.
    empty = (last == 0) & (clipped > 0)
    end = np.where(empty, 1.0, means[:, -1])
    levels = (sums * _log(means)).sum(axis=1) + clipped * _log(end)
    divergence = (reference - levels) / mass[-1] + _log((kept + empty) / mass[-1])
    # With all but the smallest values clipped, both distributions are the same single bin.
    divergence[kept < _ENTROPY_KEPT * mass[-1]] = np.inf
    # From the back, so that of equal ones the larger is found.
    best = candidates[::-1][np.argmin(divergence[::-1])]
    return float(uppers[-1]) * int(best) / _ENTROPY_BINS


def _mse(histogram: Histogram) -> float:
    """The threshold with the least expected squared error."""
    candidates = histogram.amax * np.geomspace(1.0, _MSE_LEAST, _MSE_CANDIDATES)
    best = int(np.argmin(_squared_errors(histogram, candidates)))
    above, below = candidates[max(best - 1, 0)], candidates[min(best + 1, _MSE_CANDIDATES - 1)]
    # Where the largest values are the most frequent ones, as after a Sigmoid, the steps so far
    # are too wide.
    refined = np.linspace(above, below, _MSE_REFINED)
    return float(refined[np.argmin(_squared_errors(histogram, refined))])


def _squared_errors(histogram: Histogram, candidates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The expected sum of squared errors with each threshold, less the values' sum of squares.

    The error of a level is its values' second moment about the level, and moments of an interval
    are differences of moments from 0 on: each candidate costs its 127 levels, and not all bins.
    """
    counts, uppers = histogram.magnitudes()
    width = float(uppers[0])
    density = np.append(counts, 0) / width
    density[0] = min(density[0], density[1])
    edges = np.append(0.0, uppers)
    mass = _running(density[:-1] * width)
    moment = _running(density[:-1] * np.diff(edges**2) / 2)

    steps = candidates[:, None] / _LEVELS
    levels = np.arange(1, _LEVELS + 1)
    starts = (levels - 0.5) * steps
    places = (starts / width).astype(np.intp)
    low = edges[places]
    up_to = mass[places] + density[places] * (starts - low)
    moment_up_to = moment[places] + density[places] * (starts**2 - low**2) / 2
    within = np.diff(up_to, axis=1, append=mass[-1])
    moment_within = np.diff(moment_up_to, axis=1, append=moment[-1])
    values = levels * steps
    errors: NDArray[np.float64] = (values**2 * within - 2 * values * moment_within).sum(axis=1)
    return errors


def _best_parts(rows: Floats, amax: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each row the part of its amax that is the best threshold: (rows,)."""
    best = np.ones(rows.shape[0])
    least = np.full(rows.shape[0], np.inf)
    for part in _WEIGHT_PARTS:
        scales = _normal_scales(amax * part)[:, None]
        rounded = rows / scales
        np.rint(rounded, out=rounded)
        np.clip(rounded, -_LEVELS, _LEVELS, out=rounded)
        rounded *= scales
        rounded -= rows
        np.square(rounded, out=rounded)
        error = rounded.sum(axis=1, dtype=np.float64)
        better = error < least
        least[better] = error[better]
        best[better] = part
    return best


def _normal_scales(amax: NDArray[np.float64]) -> Floats:
    scales: Floats = np.maximum((amax / _LEVELS).astype(np.float32), np.finfo(np.float32).tiny)
    return scales


def _running(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, ... values."""
    return np.append(0.0, np.cumsum(values, dtype=np.float64))


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm where it is multiplied by something, 0 for 0."""
    logs = np.zeros_like(values)
    np.log(values, out=logs, where=values > 0)
    return logs


def _times_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values * _log(values)


def _not_finite(values: Floats) -> CalibrationError:
    bad = sum(int(np.count_nonzero(~np.isfinite(part))) for part in _chunks(values))
    return CalibrationError(
        f"int8 is for finite values, and {bad} of {values.size} are NaN or infinite"
    )


def _damaged(what: str) -> CalibrationError:
    return CalibrationError(
        f"a cached histogram is not as it was written: {what}; delete the cache and calibrate again"
    )
