"""EdgeSegUpsampleArgmax against float64 arithmetic, PyTorch and ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import KernelError, RequestError
from edgeseg.kernels import argmax
from edgeseg.kernels.launchers import FLOAT16, FLOAT32, INT32, UINT8, Features

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
HERE = Path(__file__).resolve().parent

Logits = NDArray[np.float32]
Map = NDArray[np.uint8]

ALIGN_CORNERS = 1
NO_SHORT_CUT = 2
PORTABLE_CODE = 4
AVX2_CODE = 8

# classes, source height and width, target height and width
CASES = [
    pytest.param(19, 16, 32, 128, 256, id="x8"),
    pytest.param(19, 16, 32, 64, 128, id="x4"),
    pytest.param(11, 24, 30, 48, 60, id="x2"),
    pytest.param(5, 6, 5, 96, 80, id="x16"),
    pytest.param(3, 3, 2, 150, 140, id="x50-x70"),
    pytest.param(19, 13, 17, 13, 17, id="x1"),
    pytest.param(7, 11, 13, 33, 65, id="x3-x5"),
    pytest.param(21, 9, 21, 50, 47, id="odd-factors"),
    pytest.param(4, 1, 9, 16, 40, id="one-row"),
    pytest.param(4, 9, 1, 40, 16, id="one-column"),
    pytest.param(4, 1, 1, 5, 6, id="one-sample"),
    pytest.param(1, 5, 6, 20, 24, id="one-class"),
    pytest.param(2, 8, 8, 64, 64, id="two-classes"),
    pytest.param(255, 5, 18, 21, 72, id="255-classes"),
    pytest.param(6, 20, 30, 7, 11, id="smaller"),
    pytest.param(6, 20, 8, 7, 64, id="smaller-and-larger"),
    pytest.param(6, 12, 12, 1, 1, id="to-one-pixel"),
    pytest.param(6, 12, 12, 1, 30, id="to-one-row"),
]
CONVENTIONS = [
    pytest.param(False, id="half-pixel"),
    pytest.param(True, id="align-corners"),
]


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    if not kernels.available():
        try:
            kernels.build()
        except KernelError as error:
            pytest.skip(f"the CPU kernels are not here and cannot be built: {error}")


def random_logits(classes: int, height: int, width: int, seed: int = 0) -> Logits:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((classes, height, width)).astype(np.float32)


def smooth_logits(classes: int, height: int, width: int, seed: int = 0) -> Logits:
    """Random waves: regions of one class with soft borders, some winners beyond doubt."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    fields: NDArray[np.float64] = np.zeros((classes, height, width))
    for _ in range(3):
        frequency_y, frequency_x, phase = rng.uniform(-0.4, 0.4, (3, classes, 1, 1))
        fields += rng.normal(0, 6, (classes, 1, 1)) * np.cos(
            frequency_y * y + frequency_x * x + 8 * phase
        )
    return np.asarray(fields, dtype=np.float32)


def quantized_logits(classes: int, height: int, width: int, seed: int = 0) -> Logits:
    """Few distinct values, as from an INT8 layer: ties everywhere."""
    logits = smooth_logits(classes, height, width, seed) * np.float32(0.25)
    return np.asarray(np.round(logits) * np.float32(0.37), dtype=np.float32)


KINDS = [random_logits, smooth_logits, quantized_logits]


def upsampled(logits: Logits, size: tuple[int, int], align_corners: bool) -> NDArray[np.float64]:
    """Independent float64 bilinear upsampling."""

    def axis(source: int, target: int) -> tuple[Any, Any, Any]:
        position = np.arange(target, dtype=np.float64)
        if align_corners:
            at = position * (source - 1) / max(target - 1, 1)
        else:
            at = np.clip((position + 0.5) * source / target - 0.5, 0, source - 1)
        near = np.floor(at).astype(int)
        return near, np.minimum(near + 1, source - 1), at - near

    values = logits.astype(np.float64)
    top, bottom, down = axis(values.shape[1], size[0])
    left, right, along = axis(values.shape[2], size[1])
    rows = values[:, top] * (1 - down[:, None]) + values[:, bottom] * down[:, None]
    return np.asarray(rows[:, :, left] * (1 - along) + rows[:, :, right] * along)


def assert_wins(class_map: Map, values: NDArray[np.float64], tie: float) -> None:
    """Each pixel has the winning class, or one whose value is within ``tie`` of the winner's."""
    chosen = np.take_along_axis(values, class_map[None].astype(int), axis=0)[0]
    behind = values.max(axis=0) - chosen
    differs = class_map != values.argmax(axis=0)
    assert class_map.shape == values.shape[1:]
    assert behind[differs].max(initial=0.0) <= tie, f"{int((behind > tie).sum())} wrong pixels"


def run(logits: Logits, size: tuple[int, int], flags: int = 0, threads: int = 1) -> Map:
    """Class map and confidence, stacked, with raw flags."""
    result = np.full((2, *size), 254, np.uint8)
    argmax._run(np.ascontiguousarray(logits), result[0], result[1], flags, threads)
    return result


@pytest.mark.parametrize("align_corners", CONVENTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "height", "width", "target_height", "target_width"), CASES)
def test_equals_float64(
    kind: Callable[..., Logits],
    classes: int,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    align_corners: bool,
) -> None:
    logits = kind(classes, height, width)
    size = (target_height, target_width)
    values = upsampled(logits, size, align_corners)

    class_map = kernels.upsample_argmax(logits, size, align_corners=align_corners)
    same_map, confidence = kernels.upsample_argmax_confidence(
        logits, size, align_corners=align_corners
    )

    # A float32 step at the size of the largest logit, where that is more than 1e-6.
    tie = max(1e-6, 4 * 2**-24 * float(np.abs(logits).max()))
    assert_wins(class_map, values, tie)
    np.testing.assert_array_equal(same_map, class_map)
    probability = 1 / np.exp(values - values.max(axis=0)).sum(axis=0)
    assert np.abs(confidence - 255 * probability).max() <= 1.0
    full = run(logits, size, NO_SHORT_CUT | (ALIGN_CORNERS if align_corners else 0))
    np.testing.assert_array_equal(full[0], class_map)
    np.testing.assert_array_equal(full[1], confidence)


@pytest.mark.parametrize("align_corners", CONVENTIONS)
@pytest.mark.parametrize(("classes", "height", "width", "target_height", "target_width"), CASES)
def test_equals_torch(
    classes: int,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    align_corners: bool,
) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's interpolate")
    logits = random_logits(classes, height, width, seed=1)
    size = (target_height, target_width)
    values = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None].double(), size, mode="bilinear", align_corners=align_corners
    )[0].numpy()
    class_map = kernels.upsample_argmax(logits, size, align_corners=align_corners)
    assert_wins(class_map, values, 2e-6)


@pytest.mark.parametrize(
    ("convention", "align_corners"),
    [
        pytest.param("half_pixel", False, id="half-pixel"),
        pytest.param("align_corners", True, id="align-corners"),
    ],
)
@pytest.mark.parametrize(("classes", "height", "width", "target_height", "target_width"), CASES)
def test_equals_onnxruntime(
    classes: int,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    convention: Literal["half_pixel", "align_corners"],
    align_corners: bool,
) -> None:
    onnx = pytest.importorskip("onnx", reason="builds the Resize + ArgMax graph")
    runtime = pytest.importorskip("onnxruntime", reason="compares with Resize + ArgMax")
    sizes = np.array([1, classes, target_height, target_width], np.int64)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                "Resize",
                ["logits", "", "", "sizes"],
                ["values"],
                mode="linear",
                coordinate_transformation_mode=convention,
            ),
            onnx.helper.make_node("ArgMax", ["values"], ["class_map"], axis=1, keepdims=0),
        ],
        "resize_argmax",
        [onnx.helper.make_tensor_value_info("logits", 1, [1, classes, height, width])],
        [onnx.helper.make_tensor_value_info("class_map", 7, [1, target_height, target_width])],
        [onnx.numpy_helper.from_array(sizes, "sizes")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    logits = random_logits(classes, height, width, seed=2)
    (expected,) = session.run(None, {"logits": logits[None]})

    size = (target_height, target_width)
    class_map = kernels.upsample_argmax(logits[None], size, align_corners=align_corners)

    # ONNX Runtime computes source positions in float32, so pixels close to a tie may fall to
    # either side; by how much depends on the position's error times the slope of the logits.
    values = upsampled(logits, size, align_corners)
    assert_wins(class_map, values, 2e-6)
    assert_wins(expected[0].astype(np.uint8), values, 1e-4)
    assert np.mean(expected[0] != class_map) < 1e-3


@pytest.mark.parametrize("threads", [2, 3, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_give_the_same_bytes(kind: Callable[..., Logits], threads: int) -> None:
    logits = kind(19, 23, 37)
    one = run(logits, (101, 200), threads=1)
    np.testing.assert_array_equal(run(logits, (101, 200), threads=threads), one)


@pytest.mark.parametrize("align_corners", CONVENTIONS)
@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e-20, 1e4, 1e20, 1e37, 3e38])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(72, 104), (31, 95), (27, 39)])
def test_short_cut_equals_every_class_at_every_pixel(
    kind: Callable[..., Logits], scale: float, size: tuple[int, int], align_corners: bool
) -> None:
    logits = kind(9, 9, 13)
    logits = (logits / np.abs(logits).max() * np.float64(scale)).astype(np.float32)
    flags = ALIGN_CORNERS if align_corners else 0
    short, full = run(logits, size, flags), run(logits, size, flags | NO_SHORT_CUT)
    np.testing.assert_array_equal(short, full)


def test_short_cut_keeps_ties_that_rounding_makes() -> None:
    # One class is above another by the least that float32 can show: rounding makes them equal
    # inside some cells, and there the lower class has to win in both paths.
    rng = np.random.default_rng(5)
    base = rng.uniform(1, 2, (1, 40, 40)).astype(np.float32)
    logits = np.concatenate([base, np.nextafter(base, np.float32(3))])
    short, full = run(logits, (275, 275)), run(logits, (275, 275), NO_SHORT_CUT)
    np.testing.assert_array_equal(short, full)
    assert 0 < np.mean(full[0] == 0) < 1


@pytest.mark.parametrize("code", [PORTABLE_CODE, AVX2_CODE], ids=["portable", "avx2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "height", "width", "target_height", "target_width"), CASES)
def test_instruction_sets_give_the_same_bytes(
    kind: Callable[..., Logits],
    classes: int,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    code: int,
) -> None:
    logits = kind(classes, height, width)
    size = (target_height, target_width)
    for flags in (0, NO_SHORT_CUT, ALIGN_CORNERS):
        np.testing.assert_array_equal(run(logits, size, flags | code), run(logits, size, flags))


def test_concurrent_calls_do_not_mix() -> None:
    jobs = [(kind(19, 20, 30, seed), 160 + 8 * seed) for seed in range(3) for kind in KINDS]
    expected = [kernels.upsample_argmax(logits, (side, side), threads=1) for logits, side in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            maps = pool.map(
                lambda job: kernels.upsample_argmax(job[0], (job[1], job[1]), threads=3), jobs
            )
            for got, want in zip(maps, expected, strict=True):
                np.testing.assert_array_equal(got, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_a_forked_child() -> None:
    # In a process of its own, where no other thread makes the fork unsafe.
    program = (
        "import os, numpy as np, edgeseg.kernels as k\n"
        "logits = np.arange(48, dtype=np.float32).reshape(3, 4, 4)\n"
        "parent = k.upsample_argmax(logits, (64, 64), threads=4)\n"
        "pid = os.fork()\n"
        "same = (k.upsample_argmax(logits, (64, 64), threads=4) == parent).all()\n"
        "if pid == 0: os._exit(0 if same else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=KERNELS.parent, timeout=60, check=False
    )
    assert result.returncode == 0


def test_equal_logits_give_class_0() -> None:
    class_map, confidence = kernels.upsample_argmax_confidence(
        np.full((4, 3, 5), 1.7, np.float32), (24, 40)
    )
    assert not class_map.any()
    assert set(np.unique(confidence)) == {64}  # 255 / 4 rounded


def test_a_tie_goes_to_the_lower_class() -> None:
    logits = np.zeros((5, 4, 4), np.float32)
    logits[[2, 4]] = 3
    assert (kernels.upsample_argmax(logits, (32, 32)) == 2).all()


NOT_FINITE = [
    pytest.param([np.nan], id="nan"),
    pytest.param([-np.inf], id="minus-infinity"),
    pytest.param([np.inf], id="infinity"),
    pytest.param([np.nan, np.inf, -np.inf], id="all"),
]


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("poison", NOT_FINITE)
@pytest.mark.parametrize("kind", KINDS)
def test_short_cut_agrees_where_logits_are_not_finite(
    kind: Callable[..., Logits], poison: list[float], share: float
) -> None:
    logits = kind(6, 10, 14)
    rng = np.random.default_rng(3)
    where = rng.random(logits.shape) < share
    logits[where] = rng.choice(poison, int(where.sum()))
    np.testing.assert_array_equal(run(logits, (80, 112)), run(logits, (80, 112), NO_SHORT_CUT))


def test_nan_never_wins() -> None:
    logits = smooth_logits(6, 10, 14)
    logits[0], logits[3] = np.nan, np.nan
    without = np.delete(logits, [0, 3], axis=0)
    class_map, confidence = kernels.upsample_argmax_confidence(logits, (80, 112))
    expected, expected_confidence = kernels.upsample_argmax_confidence(without, (80, 112))
    np.testing.assert_array_equal(class_map, np.array([1, 2, 4, 5])[expected])
    np.testing.assert_array_equal(confidence, expected_confidence)


@pytest.mark.parametrize("nothing", [np.nan, -np.inf])
def test_nothing_finite_gives_class_0_and_confidence_0(nothing: float) -> None:
    class_map, confidence = kernels.upsample_argmax_confidence(
        np.full((3, 4, 4), nothing, np.float32), (16, 16)
    )
    assert not class_map.any()
    assert not confidence.any()


def test_out_is_used_in_place() -> None:
    logits = smooth_logits(19, 8, 8)
    out = np.empty((64, 64), np.uint8)
    levels = np.empty((64, 64), np.uint8)
    assert kernels.upsample_argmax(logits, (64, 64), out=out) is out
    expected = out.copy()
    out[:] = 0
    class_map, confidence = kernels.upsample_argmax_confidence(
        logits, (64, 64), out=out, confidence=levels
    )
    assert class_map is out
    assert confidence is levels
    np.testing.assert_array_equal(out, expected)


def test_writes_nothing_outside_out() -> None:
    room = np.full((3, 37, 41), 77, np.uint8)
    kernels.upsample_argmax(random_logits(5, 9, 11), (37, 41), out=room[1])
    assert (room[[0, 2]] == 77).all()


def test_logits_may_have_a_batch_of_one() -> None:
    logits = random_logits(5, 6, 7)
    np.testing.assert_array_equal(
        kernels.upsample_argmax(logits[None], (24, 28)), kernels.upsample_argmax(logits, (24, 28))
    )


def test_sizes_may_change_from_call_to_call() -> None:
    for height, width, size in [(4, 4, (9, 9)), (40, 90, (80, 99)), (4, 4, (9, 9)), (2, 3, (9, 9))]:
        logits = random_logits(7, height, width)
        assert_wins(kernels.upsample_argmax(logits, size), upsampled(logits, size, False), 1e-6)


GOOD = np.zeros((3, 4, 5), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"logits": GOOD.astype(np.float64)}, "float32", id="float64"),
        pytest.param({"logits": [[1.0]]}, "list", id="list"),
        pytest.param({"logits": GOOD[0]}, r"\(4, 5\)", id="two-dimensions"),
        pytest.param({"logits": np.zeros((2, 3, 4, 5), np.float32)}, r"\(2, 3", id="batch-of-two"),
        pytest.param({"logits": np.zeros((256, 2, 2), np.float32)}, "256", id="256-classes"),
        pytest.param({"logits": np.zeros((0, 2, 2), np.float32)}, "got 0", id="no-classes"),
        pytest.param({"logits": np.zeros((3, 0, 2), np.float32)}, "high and wide", id="empty"),
        pytest.param({"logits": GOOD.transpose(0, 2, 1)}, "contiguous", id="transposed"),
        pytest.param({"size": (0, 8)}, "1 to", id="size-0"),
        pytest.param({"size": (8, -1)}, "1 to", id="size-negative"),
        pytest.param({"size": (8, 8, 8)}, "height, width", id="size-of-three"),
        pytest.param({"size": None}, "height, width", id="size-none"),
        pytest.param({"size": (1 << 23, 8)}, "1 to", id="size-too-large"),
        pytest.param({"threads": -1}, "threads", id="threads"),
        pytest.param({"out": np.zeros((8, 8), np.int64)}, "uint8", id="out-dtype"),
        pytest.param({"out": np.zeros((8, 9), np.uint8)}, r"\(8, 9\)", id="out-shape"),
        pytest.param({"out": np.zeros((8, 16), np.uint8)[:, ::2]}, "contig", id="out-strided"),
        pytest.param(
            {"out": np.frombuffer(bytes(64), np.uint8).reshape(8, 8)},
            "writable",
            id="out-read-only",
        ),
        pytest.param({"confidence": np.zeros((8, 9), np.uint8)}, "confidence", id="confidence"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"logits": GOOD, "size": (8, 8)}
    with pytest.raises(RequestError, match=message):
        kernels.upsample_argmax_confidence(**(good | arguments))


def test_the_same_memory_cannot_take_both_outputs() -> None:
    both = np.zeros((8, 8), np.uint8)
    with pytest.raises(RequestError, match="same memory"):
        kernels.upsample_argmax_confidence(GOOD, (8, 8), out=both, confidence=both)


def test_the_library_checks_its_own_arguments() -> None:
    function = kernels.load().edgeseg_upsample_argmax
    out = np.empty((8, 8), np.uint8)
    good = [GOOD.ctypes.data, 3, 4, 5, out.ctypes.data, None, 8, 8, 0, 1]
    assert function(*good) == 0
    for index, bad in [
        (0, None),
        (1, 0),
        (1, 256),
        (2, 0),
        (3, -1),
        (4, None),
        (6, 0),
        (8, 16),
        (9, 0),
    ]:
        assert function(*good[:index], bad, *good[index + 1 :]) == 1


# --- the CUDA kernel, on an emulation of CUDA and on a GPU


@dataclass(frozen=True)
class Layout:
    """How logits lie in memory: strides of (classes, height, width) in elements."""

    channels_last: bool
    padding: int = 0  # elements after each pixel's classes, or after each class's plane
    multiple: int = 1  # the pitch of a pixel's classes is rounded up to it
    offset: int = 0  # elements before the first

    def place(self, logits: NDArray[Any]) -> tuple[NDArray[Any], int, int]:
        """(memory, channel stride, pixel stride); what lies between would win if it was read."""
        classes, height, width = logits.shape
        pixels = height * width
        if self.channels_last:
            pitch = classes + self.padding
            strides = (1, -(-pitch // self.multiple) * self.multiple)
        else:
            strides = (pixels + self.padding, 1)
        last = (classes - 1) * strides[0] + (pixels - 1) * strides[1]
        # A whole number of pixels, or planes: the last one's padding is memory too.
        length = max(last + 1, strides[1] * pixels, strides[0] * classes)
        memory = np.full(self.offset + length, 60000, logits.dtype)
        view = np.lib.stride_tricks.as_strided(
            memory[self.offset :],
            (classes, pixels),
            tuple(stride * memory.itemsize for stride in strides),
        )
        view[:] = logits.reshape(classes, pixels)
        return memory, *strides


CHANNELS_FIRST = Layout(channels_last=False)
HWC8 = Layout(channels_last=True, multiple=8)  # TensorRT's kHWC8
LAYOUTS = [
    pytest.param(CHANNELS_FIRST, id="channels-first"),
    pytest.param(Layout(channels_last=False, padding=5), id="padded-planes"),
    pytest.param(Layout(channels_last=True), id="channels-last"),
    pytest.param(Layout(channels_last=True, padding=3), id="padded-pixels"),
    pytest.param(HWC8, id="hwc8"),
    pytest.param(Layout(channels_last=True, multiple=8, padding=9), id="hwc8-wide"),
    pytest.param(Layout(channels_last=True, multiple=8, offset=1), id="hwc8-unaligned"),
]
OUTPUTS = [
    pytest.param(UINT8, np.uint8, id="uint8"),
    pytest.param(FLOAT16, np.float16, id="float16"),
    pytest.param(INT32, np.int32, id="int32"),
]
GUARD = 64  # elements before and behind each output, which must stay as they are
POISON = 113


class Device:
    """Where a CUDA library runs: the emulation, whose pointers are numpy's, or a GPU."""

    def __init__(self, library: ctypes.CDLL, torch: Any) -> None:
        self.library = library
        self.torch = torch  # None for the emulation

    def put(self, array: NDArray[Any]) -> Any:
        return array.copy() if self.torch is None else self.torch.from_numpy(array).cuda()

    def pointer(self, buffer: Any) -> int:
        return int(buffer.ctypes.data if self.torch is None else buffer.data_ptr())

    def get(self, buffer: Any) -> NDArray[Any]:
        """Waits for the GPU."""
        array: NDArray[Any] = buffer if self.torch is None else buffer.cpu().numpy()
        return array

    def run(
        self,
        logits: NDArray[Any],
        size: tuple[int, int],
        flags: int = 0,
        *,
        with_confidence: bool = True,
        layout: Layout = CHANNELS_FIRST,
        output_type: int = UINT8,
        dtype: Any = np.uint8,
        output_offset: int = 0,
    ) -> list[NDArray[Any]]:
        """The class map, and the confidence if asked for; checks that nothing else is written."""
        memory, channel_stride, pixel_stride = layout.place(logits)
        on_device = self.put(memory)
        element_type = FLOAT16 if logits.dtype == np.float16 else FLOAT32
        features = Features(
            self.pointer(on_device) + layout.offset * memory.itemsize,
            element_type,
            *logits.shape,
            channel_stride,
            pixel_stride,
        )
        pixels = size[0] * size[1]
        start = GUARD + output_offset
        length = start + pixels + GUARD
        outputs = [self.put(np.full(length, POISON, dtype)) for _ in range(1 + with_confidence)]
        pointers = [self.pointer(output) + start * np.dtype(dtype).itemsize for output in outputs]
        stream = None if self.torch is None else self.torch.cuda.current_stream().cuda_stream
        status = self.library.edgeseg_cuda_upsample_argmax(
            ctypes.byref(features), pointers[0], pointers[1] if with_confidence else None,
            output_type, *size, flags, stream,
        )  # fmt: skip
        assert status == 0
        maps = []
        for output in map(self.get, outputs):
            assert (output[:start] == POISON).all()
            assert (output[start + pixels :] == POISON).all()
            maps.append(output[start : start + pixels].reshape(size))
        return maps


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "emulated":
        return Device(request.getfixturevalue("emulated_cuda"), None)
    library = request.getfixturevalue("cuda_library")
    return Device(library, pytest.importorskip("torch"))


def assert_same(maps: list[NDArray[Any]], expected: Map) -> None:
    """``maps`` are the first of ``expected``: class map, confidence."""
    for found, wanted in zip(maps, expected, strict=False):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("align_corners", CONVENTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "height", "width", "target_height", "target_width"), CASES)
def test_cuda_gives_the_cpu_bytes(
    device: Device,
    kind: Callable[..., Logits],
    classes: int,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    align_corners: bool,
) -> None:
    logits = kind(classes, height, width)
    size = (target_height, target_width)
    flags = ALIGN_CORNERS if align_corners else 0
    expected = run(logits, size, flags)
    assert_same(device.run(logits, size, flags), expected)
    assert_same(device.run(logits, size, flags, with_confidence=False), expected)
    assert_same(device.run(logits, size, flags | NO_SHORT_CUT), expected)
    # float16 logits as a plugin gets them, to what a plugin may put out
    half = logits.astype(np.float16)
    found = device.run(half, size, flags, layout=HWC8, output_type=INT32, dtype=np.int32)
    assert_same(found, run(half.astype(np.float32), size, flags))


# Tiles of 256 columns and up to 32 rows, with cells across their borders: source, target.
TILED = [
    pytest.param((9, 66), (72, 528), id="x8"),
    pytest.param((17, 131), (34, 262), id="x2-two-tiles"),
    pytest.param((20, 90), (81, 361), id="x4-and-a-bit"),
    pytest.param((3, 5), (150, 603), id="x50-x120"),
    pytest.param((2, 270), (70, 271), id="x35-x1"),
    pytest.param((6, 5), (300, 603), id="more-tiles-than-blocks"),
]


@pytest.mark.parametrize("align_corners", CONVENTIONS)
@pytest.mark.parametrize(("source", "size"), TILED)
def test_cuda_joins_tiles(
    device: Device, source: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> None:
    flags = ALIGN_CORNERS if align_corners else 0
    logits = smooth_logits(6, *source, seed=7)
    assert_same(device.run(logits, size, flags), run(logits, size, flags))


@pytest.mark.parametrize("classes", [1, 3, 8, 19, 24, 25, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_reads_any_layout(device: Device, layout: Layout, dtype: Any, classes: int) -> None:
    logits = smooth_logits(classes, 5, 9, seed=classes).astype(dtype)
    for size in ((40, 72), (6, 13)):  # by tiles, by pixels
        expected = run(logits.astype(np.float32), size)
        assert_same(device.run(logits, size, layout=layout), expected)


@pytest.mark.parametrize(("output_type", "dtype"), OUTPUTS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [80, 72, 71])
def test_cuda_writes_any_type_at_any_address(
    device: Device, output_type: int, dtype: Any, offset: int, width: int
) -> None:
    # 80 and 72 are whole packs of 16 bytes for some types, 71 for none.
    logits = smooth_logits(19, 5, 9)
    for size in ((40, width), (6, width // 8)):
        expected = run(logits, size)
        found = device.run(logits, size, output_type=output_type, dtype=dtype, output_offset=offset)
        assert_same(found, expected)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 1e37, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_short_cut_holds_at_any_scale(
    device: Device, kind: Callable[..., Logits], scale: float
) -> None:
    logits = kind(9, 9, 13)
    logits = (logits / np.abs(logits).max() * np.float64(scale)).astype(np.float32)
    assert_same(device.run(logits, (72, 104)), run(logits, (72, 104), NO_SHORT_CUT))


def test_cuda_keeps_ties_that_rounding_makes(device: Device) -> None:
    rng = np.random.default_rng(5)
    base = rng.uniform(1, 2, (1, 12, 12)).astype(np.float32)
    logits = np.concatenate([base, np.nextafter(base, np.float32(3))])
    expected = run(logits, (83, 83), NO_SHORT_CUT)
    assert 0 < np.mean(expected[0] == 0) < 1
    assert_same(device.run(logits, (83, 83)), expected)


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("poison", NOT_FINITE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_cuda_agrees_where_logits_are_not_finite(
    device: Device, dtype: Any, poison: list[float], share: float
) -> None:
    logits = smooth_logits(6, 10, 14).astype(dtype)
    rng = np.random.default_rng(3)
    where = rng.random(logits.shape) < share
    logits[where] = rng.choice(poison, int(where.sum()))
    expected = run(logits.astype(np.float32), (80, 112), NO_SHORT_CUT)
    assert_same(device.run(logits, (80, 112)), expected)
    assert_same(device.run(logits, (80, 112), NO_SHORT_CUT, layout=HWC8), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layout", [CHANNELS_FIRST, HWC8], ids=["channels-first", "hwc8"])
@pytest.mark.parametrize(("source", "size"), [((128, 256), (1024, 2048)), ((97, 211), (780, 1690))])
def test_cuda_gives_the_cpu_bytes_at_full_size(
    cuda_library: ctypes.CDLL,
    source: tuple[int, int],
    size: tuple[int, int],
    layout: Layout,
    dtype: Any,
) -> None:
    device = Device(cuda_library, pytest.importorskip("torch"))
    seed = int.from_bytes(os.urandom(4), "little")
    logits = smooth_logits(19, *source, seed=seed).astype(dtype)
    expected = run(logits.astype(np.float32), size)
    print(f"seed {seed}")
    for confidence in (False, True):
        assert_same(device.run(logits, size, with_confidence=confidence, layout=layout), expected)


def test_cuda_launcher_checks_its_arguments(emulated_cuda: ctypes.CDLL) -> None:
    function = emulated_cuda.edgeseg_cuda_upsample_argmax
    out = np.empty((2, 32, 32), np.int32)
    data = GOOD.ctypes.data

    def status(features: Features | None, *rest: Any) -> int:
        return int(function(None if features is None else ctypes.byref(features), *rest, None))

    good = Features.channels_first(data, FLOAT32, *GOOD.shape)
    rest = (out[0].ctypes.data, out[1].ctypes.data, UINT8, 32, 32, 0)
    assert status(good, *rest) == 0
    assert status(None, *rest) == 1
    for features in (
        Features.channels_first(0, FLOAT32, 3, 4, 5),
        Features.channels_first(data + 2, FLOAT32, 3, 4, 5),
        Features.channels_first(data + 1, FLOAT16, 3, 4, 5),
        Features.channels_first(data, UINT8, 3, 4, 5),
        Features.channels_first(data, INT32, 3, 4, 5),
        Features.channels_first(data, FLOAT32, 0, 4, 5),
        Features.channels_first(data, FLOAT32, 256, 4, 5),
        Features.channels_first(data, FLOAT32, 3, 0, 5),
        Features.channels_first(data, FLOAT32, 3, 4, (1 << 22) + 1),
        Features(data, FLOAT32, 3, 4, 5, 0, 1),
        Features(data, FLOAT32, 3, 4, 5, 20, -1),
    ):
        assert status(features, *rest) == 1
    for index, bad in [
        (0, None),
        (2, FLOAT32),
        (2, 4),
        (3, 0),
        (3, (1 << 22) + 1),
        (4, -1),
        (5, 4),
        (5, -1),
    ]:
        assert status(good, *rest[:index], bad, *rest[index + 1 :]) == 1
    for output_type, step in [(FLOAT16, 1), (INT32, 2)]:
        unaligned = (rest[0] + step, None, output_type, 8, 8, 0)
        assert status(good, *unaligned) == 1
        assert status(good, rest[0], rest[1] + step, output_type, 8, 8, 0) == 1
