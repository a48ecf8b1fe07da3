"""draw_overlay against OpenCV and exact fractions, on the CPU, an emulated GPU and a real one."""

from __future__ import annotations

import ctypes
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import KernelError, RequestError
from edgeseg.geometry import Geometry
from edgeseg.kernels import FrameRectangle
from edgeseg.spec import Fit

Pixels = NDArray[np.uint8]

PORTABLE_CODE = 4
INVALID_VALUE = 1
POISON = 201
CLASSES = 19

FITS: list[Fit] = ["stretch", "letterbox"]

# Height and width of the frame, and of the class map.
SIZES = [
    pytest.param((60, 80), (32, 64), id="larger"),
    pytest.param((96, 160), (24, 40), id="x4"),
    pytest.param((24, 40), (96, 160), id="a-quarter"),
    pytest.param((51, 91), (47, 31), id="odd"),
    pytest.param((48, 64), (48, 64), id="same-size"),
    pytest.param((37, 29), (37, 29), id="same-size-odd"),
    pytest.param((9, 13), (1, 1), id="one-cell"),
    pytest.param((1, 1), (9, 13), id="one-pixel"),
    pytest.param((2, 3), (5, 2), id="tiny"),
    pytest.param((3, 700), (2, 100), id="flat"),
    pytest.param((500, 4), (130, 70), id="narrow"),
    pytest.param((20, 1100), (20, 70), id="blocks-and-a-rest"),
]


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    if not kernels.available():
        try:
            kernels.build()
        except KernelError as error:
            pytest.skip(f"the CPU kernels are not here and cannot be built: {error}")


def random_frame(size: tuple[int, int], rng: np.random.Generator, spare: int = 0) -> Pixels:
    """Noise, (height, width, 3), with ``spare`` bytes after each row."""
    height, width = size
    row = 3 * width
    rows = rng.integers(0, 256, (height, row + spare), dtype=np.uint8)
    return np.lib.stride_tricks.as_strided(rows, (height, width, 3), (row + spare, 3, 1))


def random_map(size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """Noise with every value of a byte, also those that have no colour."""
    return rng.integers(0, 256, size, dtype=np.uint8)


def smooth_map(size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """Regions, as networks give them: most rows repeat most of the row above."""
    y, x = np.mgrid[: size[0], : size[1]]
    a, b, c = rng.uniform(-0.2, 0.2, 3)
    waves = np.cos(a * y + 3 * np.sin(b * x)) + np.cos(c * (x - y))
    return np.asarray((waves + 2) * CLASSES / 4, dtype=np.uint8)


MAPS = [random_map, smooth_map]


def random_colours(rng: np.random.Generator, classes: int = CLASSES) -> Pixels:
    return rng.integers(0, 256, (classes, 3), dtype=np.uint8)


def positions(source: int, target: int) -> list[Fraction]:
    """Where the centres of ``target`` pixels lie among ``source`` samples."""
    return [Fraction(2 * p + 1, 2) * source / target for p in range(target)]


def expected(
    frame: Pixels, class_map: Pixels, colours: Pixels, rectangle: FrameRectangle, opacity: float
) -> NDArray[np.float64]:
    """Exact positions, float64 colours."""
    rows = [int(at) for at in positions(rectangle.inner_height, rectangle.frame_height)]
    columns = [int(at) for at in positions(rectangle.inner_width, rectangle.frame_width)]
    classes = class_map[rectangle.top :, rectangle.left :][np.ix_(rows, columns)]
    palette = np.zeros((256, 3))
    palette[: len(colours)] = colours
    result: NDArray[np.float64] = frame * (1 - opacity) + palette[classes] * opacity
    return result


def cpu(
    frame: Pixels,
    class_map: Pixels,
    colours: Pixels,
    rectangle: FrameRectangle,
    opacity: int,
    flags: int = 0,
    threads: int = 1,
) -> Pixels:
    """The CPU library's result, with raw flags and opacity of 256."""
    drawn = np.full((*frame.shape[:2], 3), POISON, np.uint8)
    status = kernels.load().edgeseg_draw_overlay(
        frame.ctypes.data, frame.strides[0], class_map.ctypes.data, colours.ctypes.data,
        len(colours), ctypes.byref(rectangle.launched()), opacity, drawn.ctypes.data,
        drawn.strides[0], flags, threads,
    )  # fmt: skip
    assert status == 0
    return drawn


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("frame_size", "size"), SIZES)
def test_equals_exact_arithmetic(
    frame_size: tuple[int, int], size: tuple[int, int], kind: Any, fit: Fit
) -> None:
    rng = np.random.default_rng(1)
    frame, class_map, colours = random_frame(frame_size, rng), kind(size, rng), random_colours(rng)
    rectangle = FrameRectangle.fitting(*frame_size, *size, fit=fit)
    for opacity in (0.0, 1 / 256, 0.25, 0.5, 1.0):
        drawn = kernels.draw_overlay(frame, class_map, colours, rectangle, opacity=opacity)
        assert drawn.shape == frame.shape
        exact = expected(frame, class_map, colours, rectangle, opacity)
        assert np.abs(drawn - exact).max() <= 0.5
        if opacity == 0.0:
            np.testing.assert_array_equal(drawn, frame)


def doubtful(source: int, target: int) -> NDArray[np.bool_]:
    """Where OpenCV may take the sample beside: its positions, in steps of 2^-16 that are rounded
    once and then added up, are this far off at most.
    """
    if (source << 16) % target == 0 and source % 2 == 0:
        return np.zeros(target, np.bool_)  # every step is exact
    return np.array(
        [
            abs(at - round(at)) <= Fraction(index + 2, 1 << 16)
            for index, at in enumerate(positions(source, target))
        ]
    )


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("frame_size", "size"),
    [
        *SIZES,
        pytest.param((480, 640), (384, 480), id="vga"),
        pytest.param((720, 1280), (512, 1024), id="720p"),
        pytest.param((1080, 1920), (512, 1024), id="1080p"),
    ],
)
def test_equals_the_drawing_of_opencv(
    frame_size: tuple[int, int], size: tuple[int, int], fit: Fit
) -> None:
    from edgeseg.draw import draw_classes  # needs OpenCV, which the tests for a GPU do without

    rng = np.random.default_rng(2)
    frame, class_map, colours = (
        random_frame(frame_size, rng),
        random_map(size, rng),
        random_colours(rng),
    )
    geometry = Geometry.fitting(*frame_size, *size, fit=fit)
    rectangle = FrameRectangle.fitting(*frame_size, *size, fit=fit)
    red_green_blue = [(int(r), int(g), int(b)) for b, g, r in colours]
    sure = ~np.logical_or.outer(
        doubtful(rectangle.inner_height, frame_size[0]),
        doubtful(rectangle.inner_width, frame_size[1]),
    )
    assert sure.mean() > 0.5
    for opacity in (0.3, 0.5, 1.0):
        drawn = kernels.draw_overlay(frame, class_map, colours, rectangle, opacity=opacity)
        by_opencv = draw_classes(
            frame, geometry.restore(class_map), names=[""] * CLASSES, colours=red_green_blue,
            opacity=opacity, legend=False,
        )  # fmt: skip
        # Classes differ by tens of levels, so this finds each pixel that takes another's.
        difference = np.abs(drawn.astype(np.int16) - by_opencv).max(axis=2)
        assert difference[sure].max() <= 1


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("frame_size", "size"), SIZES)
def test_instruction_sets_and_threads_give_the_same_bytes(
    frame_size: tuple[int, int], size: tuple[int, int], kind: Any
) -> None:
    rng = np.random.default_rng(3)
    frame, class_map, colours = random_frame(frame_size, rng), kind(size, rng), random_colours(rng)
    rectangle = FrameRectangle.fitting(*frame_size, *size, fit="letterbox")
    for opacity in (0, 3, 128, 255, 256):
        drawn = cpu(frame, class_map, colours, rectangle, opacity)
        for flags, threads in [(PORTABLE_CODE, 1), (0, 2), (0, 64)]:
            other = cpu(frame, class_map, colours, rectangle, opacity, flags, threads)
            np.testing.assert_array_equal(other, drawn)


def test_every_level_colour_and_opacity_is_rounded_to_the_nearest() -> None:
    # All levels down the frame, all colours across.
    frame = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 256, axis=1).repeat(3, axis=2)
    class_map = np.arange(256, dtype=np.uint8)[None].repeat(256, axis=0).copy()
    colours = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1).copy()
    rectangle = FrameRectangle.fitting(256, 256, 256, 256)
    for opacity in range(257):
        drawn = cpu(frame, class_map, colours, rectangle, opacity)
        exact = np.arange(256)[:, None] * (256 - opacity) + np.arange(256)[None] * opacity
        np.testing.assert_array_equal(drawn[..., 0], np.floor(exact / 256 + 0.5))
        assert (drawn == drawn[..., :1]).all()


def test_a_class_without_a_colour_is_black() -> None:
    frame = np.full((2, 2, 3), 200, np.uint8)
    class_map = np.array([[0, 1], [2, 255]], np.uint8)
    colours = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    drawn = kernels.draw_overlay(
        frame, class_map, colours, FrameRectangle.fitting(2, 2, 2, 2), opacity=1.0
    )
    np.testing.assert_array_equal(drawn, [[[10, 20, 30], [40, 50, 60]], [[0, 0, 0], [0, 0, 0]]])


@pytest.mark.parametrize("fit", FITS)
def test_frame_and_out_may_be_views_and_the_same(fit: Fit) -> None:
    rng = np.random.default_rng(4)
    class_map, colours = smooth_map((40, 50), rng), random_colours(rng)
    for size, spare in [((90, 70), 14), ((33, 51), 1)]:
        frame = random_frame(size, rng, spare)
        rectangle = FrameRectangle.fitting(*size, 40, 50, fit=fit)
        drawn = kernels.draw_overlay(frame, class_map, colours, rectangle, opacity=0.4)
        room = np.full((size[0] + 2, size[1] + 5, 3), POISON, np.uint8)
        out = room[1:-1, 2:-3]
        assert (
            kernels.draw_overlay(frame, class_map, colours, rectangle, opacity=0.4, out=out) is out
        )
        np.testing.assert_array_equal(out, drawn)
        out[:] = POISON
        assert (room == POISON).all()
        assert (
            kernels.draw_overlay(frame, class_map, colours, rectangle, opacity=0.4, out=frame)
            is frame
        )
        np.testing.assert_array_equal(frame, drawn)


def test_very_long_sides() -> None:
    rng = np.random.default_rng(5)
    source, target = 4099, 1 << 20
    frame, class_map = random_frame((1, target), rng), random_map((1, source), rng)
    colours = random_colours(rng, 256)
    rectangle = FrameRectangle.fitting(1, target, 1, source)
    drawn = kernels.draw_overlay(frame, class_map, colours, rectangle, opacity=1.0)
    # A cell's pixels are those whose centre is between its borders: (p + 1/2) * source >= cell *
    # target from the first on.
    begin = [-((source - 2 * cell * target) // (2 * source)) for cell in range(source + 1)]
    counts = np.diff(np.minimum(begin, target))
    np.testing.assert_array_equal(drawn[0], colours[class_map[0].repeat(counts)])


GOOD = np.zeros((8, 10, 3), np.uint8)
GOOD_MAP = np.zeros((4, 6), np.uint8)
GOOD_COLOURS = np.zeros((3, 3), np.uint8)
OVERLAPPING = np.zeros((12, 10, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"frame": [[1]]}, "list", id="list"),
        pytest.param({"frame": GOOD.astype(np.float32)}, "float32", id="float32"),
        pytest.param({"frame": GOOD[:7]}, r"\(8, 10, 3\), got \(7, 10, 3\)", id="frame-size"),
        pytest.param({"frame": GOOD[..., ::-1]}, "one piece", id="channels-swapped"),
        pytest.param({"class_map": GOOD_MAP[:3]}, r"class_map.*\(4, 6\)", id="map-size"),
        pytest.param({"class_map": GOOD_MAP.astype(np.int64)}, "int64", id="map-dtype"),
        pytest.param({"class_map": np.zeros((4, 8), np.uint8)[:, :6]}, "contiguous", id="map-view"),
        pytest.param({"colours": [(0, 0, 0)]}, "colours.*list", id="colours-list"),
        pytest.param({"colours": np.zeros((3, 4), np.uint8)}, r"\(any, 3\)", id="colours-of-four"),
        pytest.param({"colours": np.zeros((257, 3), np.uint8)}, "257", id="colours-too-many"),
        pytest.param({"opacity": 1.01}, "0 to 1", id="opacity"),
        pytest.param({"opacity": float("nan")}, "0 to 1", id="opacity-nan"),
        pytest.param({"threads": -1}, "threads", id="threads"),
        pytest.param({"out": np.zeros((8, 9, 3), np.uint8)}, r"\(8, 9, 3\)", id="out-shape"),
        pytest.param(
            {"out": np.frombuffer(bytes(240), np.uint8).reshape(8, 10, 3)},
            "writable",
            id="out-read-only",
        ),
        pytest.param({"frame": OVERLAPPING[:8], "out": OVERLAPPING[4:]}, "overlap", id="overlap"),
        pytest.param(
            {"class_map": OVERLAPPING.reshape(-1)[:24].reshape(4, 6), "out": OVERLAPPING[:8]},
            "same memory",
            id="out-is-the-map",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "frame": GOOD,
        "class_map": GOOD_MAP,
        "colours": GOOD_COLOURS,
        "rectangle": FrameRectangle.fitting(8, 10, 4, 6),
    }
    with pytest.raises(RequestError, match=message):
        kernels.draw_overlay(**(good | arguments))


def test_the_libraries_check_their_own_arguments(emulated_cuda: ctypes.CDLL) -> None:
    fit = FrameRectangle.fitting(8, 10, 4, 6).launched()
    drawn = np.full((8, 10, 3), POISON, np.uint8)
    good = [GOOD.ctypes.data, 30, GOOD_MAP.ctypes.data, GOOD_COLOURS.ctypes.data, 3,
            ctypes.byref(fit), 128, drawn.ctypes.data, 30]  # fmt: skip
    function, on_cuda = kernels.load().edgeseg_draw_overlay, emulated_cuda.edgeseg_cuda_draw_overlay
    too_far = FrameRectangle.fitting(8, 10, 4, 6).launched()
    too_far.top = 1
    changes = [
        (0, None),
        (1, 29),
        (2, None),
        (3, None),
        (4, -1),
        (4, 257),
        (5, None),
        (5, ctypes.byref(too_far)),
        (6, -1),
        (6, 257),
        (7, None),
        (8, 29),
    ]
    for index, bad in changes:
        arguments = [*good[:index], bad, *good[index + 1 :]]
        assert function(*arguments, 0, 1) == 1
        assert on_cuda(*arguments, None) == INVALID_VALUE
    assert function(*good, 1, 1) == 1
    assert function(*good, 0, 0) == 1
    assert (drawn == POISON).all()
    assert function(*good, 0, 1) == 0
    assert on_cuda(*good, None) == 0
    # Without classes, colours may be missing: all is black.
    assert function(*good[:3], None, 0, *good[5:], 0, 1) == 0
    assert on_cuda(*good[:3], None, 0, *good[5:], None) == 0


# Bytes after the rows of the frame and of the picture, beyond whole packs of 16, and before either:
# packs can be moved in the first, words in the second, bytes in the last.
ALIGNMENTS = [
    pytest.param((0, 0), id="aligned"),
    pytest.param((4, 4), id="words"),
    pytest.param((5, 1), id="bytes"),
]


def check_cuda(
    library: ctypes.CDLL,
    frame_size: tuple[int, int],
    class_map: Pixels,
    fit: Fit,
    alignment: tuple[int, int],
    rng: np.random.Generator,
    torch: Any = None,
) -> None:
    """The launcher gives the CPU's bytes, apart and in place, and writes no others."""
    height, width = frame_size
    spare, lead = alignment
    pitch = -(-3 * width // 16) * 16 + spare
    rectangle = FrameRectangle.fitting(height, width, *class_map.shape, fit=fit)
    classes = int(rng.integers(1, 257))
    colours = random_colours(rng, classes)
    opacity = int(rng.choice([0, 77, 128, 256]))
    room = rng.integers(0, 256, lead + height * pitch, dtype=np.uint8)
    poisoned = np.full_like(room, POISON)

    def picture(buffer: Pixels) -> Pixels:
        return np.lib.stride_tricks.as_strided(buffer[lead:], (height, width, 3), (pitch, 3, 1))

    expected_bytes = cpu(picture(room), class_map, colours, rectangle, opacity)
    for in_place in (False, True):
        arrays: list[Any] = [room.copy(), class_map, colours, poisoned.copy()]
        stream = None
        if torch is not None:
            arrays = [torch.from_numpy(array).cuda() for array in arrays]
            stream = torch.cuda.current_stream().cuda_stream
        at = [array.ctypes.data if torch is None else array.data_ptr() for array in arrays]
        to = at[0] if in_place else at[3]
        status = library.edgeseg_cuda_draw_overlay(
            at[0] + lead, pitch, at[1], at[2], classes, ctypes.byref(rectangle.launched()),
            opacity, to + lead, pitch, stream,
        )  # fmt: skip
        assert status == 0
        result = arrays[0 if in_place else 3]
        written = result if torch is None else result.cpu().numpy()
        np.testing.assert_array_equal(picture(written), expected_bytes)
        around = (room if in_place else poisoned).copy()
        picture(around)[:] = expected_bytes
        np.testing.assert_array_equal(written, around)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("frame_size", "size"), SIZES)
def test_cuda_kernel_on_an_emulated_gpu_gives_the_cpu_bytes(
    emulated_cuda: ctypes.CDLL,
    frame_size: tuple[int, int],
    size: tuple[int, int],
    kind: Any,
    alignment: tuple[int, int],
    fit: Fit,
) -> None:
    rng = np.random.default_rng(6)
    check_cuda(emulated_cuda, frame_size, kind(size, rng), fit, alignment, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(
    ("frame_size", "size"),
    [
        *SIZES,
        pytest.param((1080, 1920), (512, 1024), id="1080p"),
        pytest.param((1024, 2048), (1024, 2048), id="cityscapes"),
    ],
)
def test_cuda_gives_the_cpu_bytes(
    cuda_library: ctypes.CDLL,
    frame_size: tuple[int, int],
    size: tuple[int, int],
    kind: Any,
    alignment: tuple[int, int],
    fit: Fit,
) -> None:
    import torch

    rng = np.random.default_rng()
    check_cuda(cuda_library, frame_size, kind(size, rng), fit, alignment, rng, torch)
