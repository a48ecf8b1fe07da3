"""Frame size to network size and back, against arithmetic in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.geometry import Geometry
from edgeseg.spec import Fit

PADDING = 114

# frame height and width, network height and width
SIZES = [
    pytest.param(48, 64, 48, 64, id="same"),
    pytest.param(96, 128, 48, 64, id="half"),
    pytest.param(24, 32, 48, 64, id="twice"),
    pytest.param(54, 96, 48, 64, id="wide"),
    pytest.param(96, 54, 48, 64, id="tall"),
    pytest.param(37, 101, 48, 64, id="odd"),
    pytest.param(1, 1, 48, 64, id="one-pixel"),
    pytest.param(1, 500, 48, 64, id="one-row"),
    pytest.param(500, 1, 48, 64, id="one-column"),
    pytest.param(3, 5, 1, 1, id="to-one-pixel"),
]


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )


def linear(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear with half-pixel centres, clamped at the border."""

    def weights(size: int, source: int) -> NDArray[np.float64]:
        position = ((np.arange(size) + 0.5) * source / size - 0.5).clip(0, source - 1)
        low = np.floor(position).astype(np.int64)
        table = np.zeros((size, source))
        np.add.at(table, (np.arange(size), low), 1 - (position - low))
        np.add.at(table, (np.arange(size), np.minimum(low + 1, source - 1)), position - low)
        return table

    rows, columns = weights(height, pixels.shape[0]), weights(width, pixels.shape[1])
    out: NDArray[np.float64] = np.einsum("yh,hwc,xw->yxc", rows, pixels.astype(float), columns)
    return out


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize(("frame_height", "frame_width", "height", "width"), SIZES)
def test_fit(frame_height: int, frame_width: int, height: int, width: int, fit: Fit) -> None:
    pixels = picture(frame_height, frame_width)
    geometry = Geometry.fitting(frame_height, frame_width, height, width, fit=fit)
    fitted = geometry.fit(pixels)
    assert fitted.shape == (height, width, 3) and fitted.dtype == np.uint8
    assert fitted.flags.c_contiguous
    expected = np.full((height, width, 3), float(PADDING))
    inner = (
        slice(geometry.top, geometry.top + geometry.inner_height),
        slice(geometry.left, geometry.left + geometry.inner_width),
    )
    expected[inner] = linear(pixels, geometry.inner_height, geometry.inner_width)
    # OpenCV interpolates with 11-bit weights.
    assert np.abs(fitted - expected).max() <= 1.5


@pytest.mark.parametrize(("frame_height", "frame_width", "height", "width"), SIZES)
def test_letterbox_keeps_the_aspect_and_the_middle(
    frame_height: int, frame_width: int, height: int, width: int
) -> None:
    geometry = Geometry.fitting(frame_height, frame_width, height, width, fit="letterbox")
    scale = min(height / frame_height, width / frame_width)
    assert abs(geometry.inner_height - max(frame_height * scale, 1)) <= 0.5
    assert abs(geometry.inner_width - max(frame_width * scale, 1)) <= 0.5
    assert geometry.inner_height == height or geometry.inner_width == width
    below = height - geometry.top - geometry.inner_height
    right = width - geometry.left - geometry.inner_width
    assert below - geometry.top in (0, 1) and right - geometry.left in (0, 1)


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
@pytest.mark.parametrize(("frame_height", "frame_width", "height", "width"), SIZES)
def test_restore(frame_height: int, frame_width: int, height: int, width: int, fit: Fit) -> None:
    geometry = Geometry.fitting(frame_height, frame_width, height, width, fit=fit)
    plane = np.random.default_rng(3).integers(0, 200, (height, width), dtype=np.uint8)
    # What lies in the padding must never be seen.
    inner = np.zeros((height, width), bool)
    inner[
        geometry.top : geometry.top + geometry.inner_height,
        geometry.left : geometry.left + geometry.inner_width,
    ] = True
    plane[~inner] = 255
    restored = geometry.restore(plane)
    assert restored.shape == (frame_height, frame_width) and restored.dtype == np.uint8
    # The centre of each pixel of the frame lies in one pixel of the inner rectangle. In whole
    # numbers; a centre on the border of two may go to either.
    top = 2 * np.arange(frame_height) + 1
    left = 2 * np.arange(frame_width) + 1
    rows = top * geometry.inner_height // (2 * frame_height)
    columns = left * geometry.inner_width // (2 * frame_width)
    clear = np.ix_(
        top * geometry.inner_height % (2 * frame_height) != 0,
        left * geometry.inner_width % (2 * frame_width) != 0,
    )
    expected = plane[np.ix_(geometry.top + rows, geometry.left + columns)]
    np.testing.assert_array_equal(restored[clear], expected[clear])
    assert restored.max() < 255


def test_nothing_is_copied_when_nothing_changes() -> None:
    pixels, plane = picture(48, 64), np.zeros((48, 64), np.uint8)
    for fit in ("stretch", "letterbox"):
        geometry = Geometry.fitting(48, 64, 48, 64, fit=fit)
        assert geometry.fit(pixels) is pixels
        assert np.shares_memory(geometry.restore(plane), plane)


@pytest.mark.parametrize("size", [(48, 64), (40, 60)])
def test_views_fit_like_arrays(size: tuple[int, int]) -> None:
    pixels = picture(96, 128)
    for view in (pixels[::2, ::2], pixels[::-2, ::-2], pixels[:48, 64:, ::-1]):
        geometry = Geometry.fitting(48, 64, *size, fit="letterbox")
        fitted = geometry.fit(view)
        assert fitted.flags.c_contiguous
        np.testing.assert_array_equal(fitted, geometry.fit(view.copy()))
