"""fit_frame against OpenCV and float64 arithmetic, on the CPU, an emulated GPU and a real one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import KernelError, RequestError
from edgeseg.geometry import Geometry
from edgeseg.kernels import FrameRectangle, frames
from edgeseg.kernels.frames import FrameFormat
from edgeseg.kernels.launchers import BGR8, NV12, RGB8, YUYV, FrameFit, FramePlanes
from edgeseg.spec import Fit

Pixels = NDArray[np.uint8]

PORTABLE_CODE = 4
INVALID_VALUE = 1
POISON = 201

FORMATS: list[FrameFormat] = ["bgr", "rgb", "nv12", "yuyv"]
FITS: list[Fit] = ["stretch", "letterbox"]
CODES = {"bgr": BGR8, "rgb": RGB8, "nv12": NV12, "yuyv": YUYV}

# Height and width of the frame, and of the network's input; the frame's are made even where its
# format asks for it.
SIZES = [
    pytest.param((60, 80), (32, 64), id="smaller"),
    pytest.param((36, 64), (40, 80), id="a-little-larger"),
    pytest.param((24, 40), (96, 160), id="x4"),
    pytest.param((96, 160), (24, 40), id="a-quarter"),
    pytest.param((90, 51), (31, 47), id="odd"),
    pytest.param((50, 38), (50, 38), id="same-size"),
    pytest.param((48, 64), (48, 64), id="same-size-aligned"),
    pytest.param((40, 30), (40, 77), id="same-height"),
    pytest.param((30, 40), (77, 40), id="same-width"),
    pytest.param((1, 1), (9, 13), id="one-pixel"),
    pytest.param((1, 2), (1, 1), id="to-one-pixel"),
    pytest.param((2, 2), (33, 16), id="2x2"),
    pytest.param((9, 300), (3, 7), id="flat"),
    pytest.param((300, 4), (7, 128), id="narrow"),
    pytest.param((12, 20), (6, 260), id="more-than-two-warps"),
    pytest.param((700, 6), (200, 16), id="many-rows"),
]


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    if not kernels.available():
        try:
            kernels.build()
        except KernelError as error:
            pytest.skip(f"the CPU kernels are not here and cannot be built: {error}")


@dataclass(frozen=True)
class Camera:
    """A frame somewhere in a larger buffer, as drivers hand them over."""

    buffer: Pixels
    format: FrameFormat
    height: int
    width: int
    offsets: tuple[int, ...]
    pitches: tuple[int, ...]

    @classmethod
    def random(
        cls,
        format: FrameFormat,
        size: tuple[int, int],
        rng: np.random.Generator,
        *,
        offset: int = 0,
        spare: int = 0,
    ) -> Camera:
        """Noise: ``offset`` bytes before each plane, ``spare`` after each row."""
        height, width = size
        if format == "nv12":
            height += height % 2
        if format in ("nv12", "yuyv"):
            width += width % 2
        rows = (height, height // 2) if format == "nv12" else (height,)
        pitch = {"bgr": 3, "rgb": 3, "nv12": 1, "yuyv": 2}[format] * width + spare
        offsets, end = [], 0
        for count in rows:
            offsets.append(end + offset)
            # Nothing after the last pixel: the next byte is someone else's.
            end += offset + pitch * count - spare
        buffer = rng.integers(0, 256, end, dtype=np.uint8)
        return cls(buffer, format, height, width, tuple(offsets), (pitch,) * len(rows))

    def plane(self, index: int, shape: tuple[int, ...]) -> Pixels:
        strides = (self.pitches[index], *np.empty(shape[1:], np.uint8).strides)
        return np.lib.stride_tricks.as_strided(
            self.buffer[self.offsets[index] :], shape, strides, writeable=False
        )

    def frame(self) -> Any:
        """What ``fit_frame`` takes."""
        if self.format == "nv12":
            luma = self.plane(0, (self.height, self.width))
            return luma, self.plane(1, (self.height // 2, self.width))
        return self.plane(0, (self.height, self.width, 2 if self.format == "yuyv" else 3))

    def bgr(self) -> Pixels:
        """The frame as OpenCV converts it."""
        import cv2  # here, so that the tests for a GPU run where there is none

        frame = self.frame()
        if self.format == "bgr":
            return np.ascontiguousarray(frame)
        if self.format == "nv12":
            frame = np.concatenate(frame)
        code = {
            "rgb": cv2.COLOR_RGB2BGR,
            "nv12": cv2.COLOR_YUV2BGR_NV12,
            "yuyv": cv2.COLOR_YUV2BGR_YUYV,
        }[self.format]
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(frame), code), dtype=np.uint8)

    def planes(self, address: int) -> FramePlanes:
        """The struct for a copy of the buffer at ``address``."""
        planes = FramePlanes()
        for index, (offset, pitch) in enumerate(zip(self.offsets, self.pitches, strict=True)):
            planes.planes[index] = address + offset
            planes.pitches[index] = pitch
        planes.format = CODES[self.format]
        return planes


def cpu(camera: Camera, rectangle: FrameRectangle, flags: int = 0, threads: int = 1) -> Pixels:
    """The CPU library's result, with raw flags."""
    image = np.full((rectangle.height, rectangle.width, 3), POISON, np.uint8)
    frames._run(camera.planes(camera.buffer.ctypes.data), rectangle, image, flags, threads)
    return image


def expected_float64(bgr: Pixels, rectangle: FrameRectangle) -> NDArray[np.float64]:
    """Independent float64 arithmetic, with NaN where there is padding."""

    def axis(source: int, target: int) -> tuple[Any, Any, Any]:
        at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        near = np.floor(at).astype(int)
        return near, np.minimum(near + 1, source - 1), at - near

    values = bgr.astype(np.float64)
    top, bottom, down = axis(rectangle.frame_height, rectangle.inner_height)
    left, right, along = axis(rectangle.frame_width, rectangle.inner_width)
    rows = values[top] * (1 - down[:, None, None]) + values[bottom] * down[:, None, None]
    inner = rows[:, left] * (1 - along[:, None]) + rows[:, right] * along[:, None]
    image = np.full((rectangle.height, rectangle.width, 3), np.nan)
    end_row = rectangle.top + rectangle.inner_height
    end_column = rectangle.left + rectangle.inner_width
    image[rectangle.top : end_row, rectangle.left : end_column] = inner
    return image


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("frame_size", "size"), SIZES)
def test_equals_opencv_and_float64(
    frame_size: tuple[int, int], size: tuple[int, int], format: FrameFormat, fit: Fit
) -> None:
    camera = Camera.random(format, frame_size, np.random.default_rng(1))
    bgr = camera.bgr()
    geometry = Geometry.fitting(camera.height, camera.width, *size, fit=fit)
    rectangle = FrameRectangle.fitting(camera.height, camera.width, *size, fit=fit)

    image = kernels.fit_frame(camera.frame(), size, format=format, fit=fit)

    assert image.shape == (*size, 3)
    by_opencv = geometry.fit(bgr)
    assert np.abs(image.astype(int) - by_opencv).max() <= 1
    exact = expected_float64(bgr, rectangle)
    padding = np.isnan(exact)
    assert (image[padding] == 114).all()
    # Half a level of rounding, and what 14 bits of position and 7 of intermediate result lose.
    assert np.abs(image - exact)[~padding].max() <= 0.53
    if (camera.height, camera.width) == (rectangle.inner_height, rectangle.inner_width):
        np.testing.assert_array_equal(image, by_opencv)


@pytest.mark.parametrize("format", FORMATS)
def test_random_sizes_equal_opencv(format: FrameFormat) -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        frame_size = (int(rng.integers(1, 150)), int(rng.integers(1, 150)))
        size = (int(rng.integers(1, 120)), int(rng.integers(1, 120)))
        camera = Camera.random(format, frame_size, rng)
        fit = FITS[int(rng.integers(2))]
        geometry = Geometry.fitting(camera.height, camera.width, *size, fit=fit)
        image = kernels.fit_frame(camera.frame(), size, format=format, fit=fit)
        difference = np.abs(image.astype(int) - geometry.fit(camera.bgr())).max()
        assert difference <= 1, f"{frame_size} to {size}, {fit}"


@pytest.mark.parametrize("format", FORMATS)
def test_camera_sizes_equal_opencv(format: FrameFormat) -> None:
    rng = np.random.default_rng(3)
    for frame_size, size in [((1080, 1920), (512, 1024)), ((480, 640), (512, 1024))]:
        camera = Camera.random(format, frame_size, rng)
        image = kernels.fit_frame(camera.frame(), size, format=format)
        geometry = Geometry.fitting(*frame_size, *size, fit="stretch")
        assert np.abs(image.astype(int) - geometry.fit(camera.bgr())).max() <= 1


@pytest.mark.parametrize("flags", [0, PORTABLE_CODE], ids=["fastest", "portable"])
@pytest.mark.parametrize("v", [0, 17, 128, 200, 255])
def test_every_luma_and_chroma_is_opencvs_colour(v: int, flags: int) -> None:
    # All lumas along a row, all values of U down the rows.
    camera = Camera.random("yuyv", (256, 256), np.random.default_rng(0))
    pairs = camera.buffer.reshape(256, 128, 4)
    pairs[..., 0::2] = np.arange(256).reshape(128, 2)
    pairs[..., 1] = np.arange(256)[:, None]
    pairs[..., 3] = v
    rectangle = FrameRectangle.fitting(256, 256, 256, 256)
    np.testing.assert_array_equal(cpu(camera, rectangle, flags), camera.bgr())
    swapped = pairs.copy()
    pairs[..., 1], pairs[..., 3] = swapped[..., 3], swapped[..., 1]
    np.testing.assert_array_equal(cpu(camera, rectangle, flags), camera.bgr())


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("frame_size", "size"), SIZES)
def test_instruction_sets_and_threads_give_the_same_bytes(
    frame_size: tuple[int, int], size: tuple[int, int], format: FrameFormat, fit: Fit
) -> None:
    camera = Camera.random(format, frame_size, np.random.default_rng(4))
    rectangle = FrameRectangle.fitting(camera.height, camera.width, *size, fit=fit)
    image = cpu(camera, rectangle)
    np.testing.assert_array_equal(cpu(camera, rectangle, PORTABLE_CODE), image)
    for threads in (2, 3, 64):
        np.testing.assert_array_equal(cpu(camera, rectangle, threads=threads), image)


@pytest.mark.parametrize("format", FORMATS)
def test_frames_may_be_views_of_larger_buffers(format: FrameFormat) -> None:
    rng = np.random.default_rng(5)
    for offset, spare in [(0, 13), (1, 0), (5, 3), (16, 32)]:
        camera = Camera.random(format, (37, 50), rng, offset=offset, spare=spare)
        image = kernels.fit_frame(camera.frame(), (24, 40), format=format)
        geometry = Geometry.fitting(camera.height, camera.width, 24, 40, fit="stretch")
        assert np.abs(image.astype(int) - geometry.fit(camera.bgr())).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's mprotect")
def test_nothing_after_the_last_pixel_is_read() -> None:
    # In a process of its own: reading the page that cannot be read ends it.
    program = (
        "import ctypes, mmap, numpy as np\n"
        "from edgeseg import kernels\n"
        "page = mmap.PAGESIZE\n"
        "memory = mmap.mmap(-1, 2 * page)\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "locked = ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0)\n"
        "assert locked == 0\n"
        "array = np.frombuffer(memory, np.uint8, page)\n"
        "for width in range(2, 70, 2):\n"
        "    for format, depth in [('bgr', 3), ('rgb', 3), ('yuyv', 2), ('nv12', 1)]:\n"
        "        rows = 6 if format == 'nv12' else 5\n"
        "        frame = array[page - rows * width * depth:]\n"
        "        shape = (rows, width, depth) if depth > 1 else (rows, width)\n"
        "        height = 4 if format == 'nv12' else 5\n"
        "        for size in [(3, 7), (height, width), (9, 100)]:\n"
        "            kernels.fit_frame(frame.reshape(shape), size, format=format, threads=1)\n"
        "print('read to the end')\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout == "read to the end\n", f"exit code {result.returncode}: {result.stderr}"


def test_an_nv12_frame_may_be_one_array() -> None:
    camera = Camera.random("nv12", (20, 30), np.random.default_rng(6))
    luma, chroma = camera.frame()
    np.testing.assert_array_equal(
        kernels.fit_frame(np.concatenate([luma, chroma]), (16, 16), format="nv12"),
        kernels.fit_frame((luma, chroma), (16, 16), format="nv12"),
    )


@pytest.mark.parametrize(("source", "target"), [(1 << 22, 1000), (999, 1 << 20)])
def test_very_long_sides(source: int, target: int) -> None:
    rng = np.random.default_rng(7)
    row = rng.integers(0, 256, (1, source, 3), dtype=np.uint8)
    for frame, size in [(row, (1, target)), (row.transpose(1, 0, 2).copy(), (target, 1))]:
        image = kernels.fit_frame(frame, size)
        height, width = frame.shape[:2]
        rectangle = FrameRectangle.fitting(height, width, *size)
        assert np.abs(image - expected_float64(frame, rectangle)).max() <= 0.53


def test_rectangle_is_geometry() -> None:
    rng = np.random.default_rng(8)
    sides = [[1, 1, 5000, 3], [1080, 1920, 512, 1024], [3, 4000, 2, 2]]
    sides += [list(map(int, rng.integers(1, (20, 3000, 20, 3000)))) for _ in range(300)]
    for frame_height, frame_width, height, width in sides:
        for fit in FITS:
            geometry = Geometry.fitting(frame_height, frame_width, height, width, fit=fit)
            rectangle = FrameRectangle.fitting(frame_height, frame_width, height, width, fit=fit)
            launched = rectangle.launched()
            assert [name for name, _ in FrameFit._fields_] == list(vars(rectangle))
            for name, value in vars(rectangle).items():
                assert value == getattr(geometry, name) == getattr(launched, name)


def test_out_is_used_in_place_and_nothing_around_it() -> None:
    camera = Camera.random("nv12", (40, 60), np.random.default_rng(9))
    for size, fit in [((31, 43), "stretch"), ((32, 64), "letterbox"), ((40, 60), "stretch")]:
        room = np.full((3, *size, 3), POISON, np.uint8)
        out = room[1]
        image = kernels.fit_frame(camera.frame(), size, format="nv12", fit=fit, out=out)  # type: ignore[arg-type]
        assert image is out
        np.testing.assert_array_equal(
            out,
            kernels.fit_frame(camera.frame(), size, format="nv12", fit=fit),  # type: ignore[arg-type]
        )
        assert (room[[0, 2]] == POISON).all()


def test_sizes_may_change_from_call_to_call() -> None:
    rng = np.random.default_rng(10)
    for frame_size, size in [((4, 4), (9, 9)), ((80, 90), (40, 50)), ((4, 4), (9, 9))]:
        frame = rng.integers(0, 256, (*frame_size, 3), dtype=np.uint8)
        geometry = Geometry.fitting(*frame_size, *size, fit="stretch")
        difference = kernels.fit_frame(frame, size).astype(int) - geometry.fit(frame)
        assert np.abs(difference).max() <= 1


GOOD = np.zeros((8, 10, 3), np.uint8)
OVERLAPPING = np.zeros((12, 10, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"frame": [[1]]}, "list", id="list"),
        pytest.param({"frame": GOOD.astype(np.float32)}, "float32", id="float32"),
        pytest.param({"frame": GOOD[..., 0]}, r"\(8, 10\)", id="two-dimensions"),
        pytest.param({"frame": np.zeros((8, 10, 4), np.uint8)}, r"any, 3\), got", id="bgra"),
        pytest.param({"frame": GOOD[:0]}, "empty", id="empty"),
        pytest.param({"frame": GOOD[:, ::2]}, "one piece", id="every-second-column"),
        pytest.param({"frame": GOOD[::-1]}, "top to bottom", id="upside-down"),
        pytest.param({"frame": GOOD[..., ::-1]}, "one piece", id="channels-swapped"),
        pytest.param({"format": "i420"}, "i420", id="format"),
        pytest.param({"format": "yuyv"}, r"any, 2\)", id="yuyv-of-three"),
        pytest.param(
            {"format": "yuyv", "frame": np.zeros((8, 9, 2), np.uint8)}, "even", id="yuyv-odd"
        ),
        pytest.param({"format": "nv12"}, r"\(any, any\)", id="nv12-of-three"),
        pytest.param(
            {"format": "nv12", "frame": np.zeros((8, 10), np.uint8)}, "3 rows", id="nv12-rows"
        ),
        pytest.param(
            {"format": "nv12", "frame": np.zeros((6, 9), np.uint8)}, "even", id="nv12-odd-width"
        ),
        pytest.param(
            {"format": "nv12", "frame": (np.zeros((3, 8), np.uint8), np.zeros((2, 8), np.uint8))},
            "even",
            id="nv12-odd-height",
        ),
        pytest.param(
            {"format": "nv12", "frame": (np.zeros((4, 8), np.uint8), np.zeros((4, 8), np.uint8))},
            r"chroma.*\(2, 8\)",
            id="nv12-chroma",
        ),
        pytest.param({"fit": "crop"}, "letterbox", id="fit"),
        pytest.param({"size": (0, 8)}, "1 to", id="size-0"),
        pytest.param({"size": 8}, "height, width", id="size-number"),
        pytest.param({"threads": -1}, "threads", id="threads"),
        pytest.param({"out": np.zeros((8, 8, 3), np.int32)}, "uint8", id="out-dtype"),
        pytest.param({"out": np.zeros((8, 9, 3), np.uint8)}, r"\(8, 9, 3\)", id="out-shape"),
        pytest.param({"out": np.zeros((8, 9, 3), np.uint8)[:, :8]}, "contig", id="out-view"),
        pytest.param(
            {"out": np.frombuffer(bytes(192), np.uint8).reshape(8, 8, 3)},
            "writable",
            id="out-read-only",
        ),
        pytest.param(
            {"frame": OVERLAPPING[:8], "size": (8, 10), "out": OVERLAPPING[4:]},
            "same memory",
            id="out-overlaps",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"frame": GOOD, "size": (8, 8)}
    with pytest.raises(RequestError, match=message):
        kernels.fit_frame(**(good | arguments))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"frame_height": 0}, id="no-rows"),
        pytest.param({"width": 1 << 23}, id="too-wide"),
        pytest.param({"inner_width": 0}, id="no-rectangle"),
        pytest.param({"top": -1}, id="above"),
        pytest.param({"left": 1}, id="beyond"),
    ],
)
def test_bad_rectangles_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="got FrameRectangle"):
        replace(FrameRectangle.fitting(8, 10, 8, 8), **change)


def bad_structs() -> list[Any]:
    """What changes a good NV12 frame (8 x 10) and fit to a bad one."""
    return [
        pytest.param({"frame_height": 0}, {}, id="no-rows"),
        pytest.param({"frame_height": 7}, {}, id="odd-height"),
        pytest.param({"frame_width": 9}, {}, id="odd-width"),
        pytest.param({"width": (1 << 22) + 1}, {}, id="too-wide"),
        pytest.param({"inner_height": 0}, {}, id="no-rectangle"),
        pytest.param({"left": 1}, {}, id="beyond"),
        pytest.param({"top": -1, "inner_height": 4}, {}, id="above"),
        pytest.param({}, {"format": 4}, id="format"),
        pytest.param({}, {"format": -1}, id="format-negative"),
        pytest.param({}, {"pitch": 9}, id="pitch"),
        pytest.param({}, {"chroma_pitch": 9}, id="chroma-pitch"),
        pytest.param({}, {"luma": None}, id="no-luma"),
        pytest.param({}, {"chroma": None}, id="no-chroma"),
    ]


def changed_structs(
    frame: Pixels, fit_change: dict[str, int], frame_change: dict[str, Any]
) -> tuple[FramePlanes, FrameFit]:
    planes = FramePlanes()
    address = frame.ctypes.data
    planes.planes[0] = frame_change.get("luma", address)
    planes.planes[1] = frame_change.get("chroma", address + 80)
    planes.pitches[0] = frame_change.get("pitch", 10)
    planes.pitches[1] = frame_change.get("chroma_pitch", 10)
    planes.format = frame_change.get("format", NV12)
    fit = FrameRectangle.fitting(8, 10, 8, 16).launched()
    for name, value in fit_change.items():
        setattr(fit, name, value)
    return planes, fit


@pytest.mark.parametrize(("fit_change", "frame_change"), bad_structs())
def test_the_libraries_check_their_own_arguments(
    emulated_cuda: ctypes.CDLL, fit_change: dict[str, int], frame_change: dict[str, Any]
) -> None:
    frame, image = np.zeros(120, np.uint8), np.full((8, 16, 3), POISON, np.uint8)
    planes, fit = changed_structs(frame, fit_change, frame_change)
    arguments = [ctypes.byref(planes), ctypes.byref(fit), image.ctypes.data]
    assert kernels.load().edgeseg_fit_frame(*arguments, 0, 1) == 1
    assert emulated_cuda.edgeseg_cuda_fit_frame(*arguments, None) == INVALID_VALUE
    assert (image == POISON).all()


def test_the_libraries_refuse_null_and_unknown_flags(emulated_cuda: ctypes.CDLL) -> None:
    frame, image = np.zeros(120, np.uint8), np.zeros((8, 16, 3), np.uint8)
    planes, fit = changed_structs(frame, {}, {})
    good = [ctypes.byref(planes), ctypes.byref(fit), image.ctypes.data]
    function = kernels.load().edgeseg_fit_frame
    assert function(*good, 0, 1) == 0
    assert emulated_cuda.edgeseg_cuda_fit_frame(*good, None) == 0
    for index in range(3):
        bad = [*good[:index], None, *good[index + 1 :]]
        assert function(*bad, 0, 1) == 1
        assert emulated_cuda.edgeseg_cuda_fit_frame(*bad, None) == INVALID_VALUE
    assert function(*good, 1, 1) == 1
    assert function(*good, 0, 0) == 1


# Bytes before the frame's planes and after their rows, and before the image: whole words and packs
# can be moved in the first, less in the others.
ALIGNMENTS = [
    pytest.param(0, 0, 0, id="aligned"),
    pytest.param(4, 4, 4, id="words"),
    pytest.param(3, 5, 1, id="bytes"),
]


def check_cuda(
    library: ctypes.CDLL,
    camera: Camera,
    rectangle: FrameRectangle,
    lead: int,
    torch: Any = None,
) -> None:
    """The launcher gives the CPU's bytes, ``lead`` bytes into an allocation, and no others."""
    count = 3 * rectangle.height * rectangle.width
    room = np.full(lead + count + 16, POISON, np.uint8)
    sent: Any = camera.buffer
    received: Any = room
    if torch is None:
        stream = None
        addresses = (sent.ctypes.data, received.ctypes.data)
    else:
        sent, received = torch.from_numpy(camera.buffer).cuda(), torch.from_numpy(room).cuda()
        addresses = (sent.data_ptr(), received.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
    status = library.edgeseg_cuda_fit_frame(
        ctypes.byref(camera.planes(addresses[0])),
        ctypes.byref(rectangle.launched()),
        addresses[1] + lead,
        stream,
    )
    assert status == 0
    result = received if torch is None else received.cpu().numpy()
    image = result[lead : lead + count].reshape(rectangle.height, rectangle.width, 3)
    np.testing.assert_array_equal(image, cpu(camera, rectangle))
    assert (result[:lead] == POISON).all()
    assert (result[lead + count :] == POISON).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("offset", "spare", "lead"), ALIGNMENTS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("frame_size", "size"), SIZES)
def test_cuda_kernel_on_an_emulated_gpu_gives_the_cpu_bytes(
    emulated_cuda: ctypes.CDLL,
    frame_size: tuple[int, int],
    size: tuple[int, int],
    format: FrameFormat,
    offset: int,
    spare: int,
    lead: int,
    fit: Fit,
) -> None:
    rng = np.random.default_rng(11)
    camera = Camera.random(format, frame_size, rng, offset=offset, spare=spare)
    rectangle = FrameRectangle.fitting(camera.height, camera.width, *size, fit=fit)
    check_cuda(emulated_cuda, camera, rectangle, lead)


@pytest.mark.gpu
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("offset", "spare", "lead"), ALIGNMENTS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("frame_size", "size"),
    [
        *SIZES,
        pytest.param((1080, 1920), (512, 1024), id="1080p"),
        pytest.param((1024, 2048), (1024, 2048), id="cityscapes"),
        pytest.param((720, 1280), (1024, 2048), id="720p-larger"),
    ],
)
def test_cuda_gives_the_cpu_bytes(
    cuda_library: ctypes.CDLL,
    frame_size: tuple[int, int],
    size: tuple[int, int],
    format: FrameFormat,
    offset: int,
    spare: int,
    lead: int,
    fit: Fit,
) -> None:
    import torch

    camera = Camera.random(format, frame_size, np.random.default_rng(), offset=offset, spare=spare)
    rectangle = FrameRectangle.fitting(camera.height, camera.width, *size, fit=fit)
    check_cuda(cuda_library, camera, rectangle, lead, torch)
