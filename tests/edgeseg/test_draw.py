"""Class maps as pictures, compared with float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.classes import CAMVID, CITYSCAPES, ClassList
from edgeseg.draw import colourise, draw_classes
from edgeseg.errors import FrameError, RequestError

NAMES = ("road", "car", "sign_symbol")
COLOURS = ((10, 20, 200), (250, 0, 0), (0, 255, 30))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def labels(height: int, width: int, classes: int, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, classes, (height, width), dtype=np.uint8)


def test_colourise_gives_each_class_its_colour_as_bgr() -> None:
    class_map = np.array([[0, 1, 2], [2, 200, 255]], np.uint8)
    black = (0, 0, 0)
    expected = [[(200, 20, 10), (0, 0, 250), (30, 255, 0)], [(30, 255, 0), black, black]]
    np.testing.assert_array_equal(colourise(class_map, COLOURS), np.array(expected, np.uint8))


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_blend_is_a_weighted_mean(opacity: float) -> None:
    pixels, class_map = noise(37, 53), labels(37, 53, 3)
    before = pixels.copy()
    drawn = draw_classes(
        pixels, class_map, names=NAMES, colours=COLOURS, opacity=opacity, legend=False
    )
    painted = np.array(COLOURS, np.float64)[class_map][..., ::-1]
    expected = pixels * (1 - opacity) + painted * opacity
    assert np.abs(drawn - expected).max() <= 0.51
    np.testing.assert_array_equal(pixels, before)
    assert drawn.dtype == np.uint8 and drawn is not pixels


@pytest.mark.parametrize("known", [CAMVID, CITYSCAPES], ids=lambda known: known.title)
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (8, 400), (400, 8), (48, 64), (240, 320), (540, 960), (2160, 3840)],
)
def test_legend_stays_inside_every_picture(known: ClassList, height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 90, np.uint8)
    class_map = np.tile(
        np.arange(len(known.names), dtype=np.uint8), height * width // len(known.names) + 1
    )[: height * width].reshape(height, width)
    drawn = draw_classes(pixels, class_map, names=known.names, colours=known.colours, opacity=0.0)
    changed = np.argwhere((drawn != pixels).any(axis=2))
    assert drawn.shape == pixels.shape
    if height >= 240 and width >= 320:
        bottom, right = changed.max(axis=0)
        # There, to be read, and leaving most of the picture free.
        assert bottom > 100 and right > 50
        assert bottom < height - 1 and right <= width * 0.55


def test_legend_names_only_the_classes_that_are_there() -> None:
    pixels = np.full((240, 320, 3), 128, np.uint8)
    class_map = np.zeros((240, 320), np.uint8)
    class_map[0, :70] = 2  # 0.09 % of the picture: below the threshold
    drawn = {
        case: draw_classes(pixels, classes, names=NAMES, colours=COLOURS, opacity=0.0)
        for case, classes in {
            "one": np.zeros_like(class_map),
            "one and a trace": class_map,
            "three": labels(240, 320, 3),
        }.items()
    }
    np.testing.assert_array_equal(drawn["one"], drawn["one and a trace"])
    assert (drawn["three"] != pixels).sum() > 2 * (drawn["one"] != pixels).sum()
    # The swatch of the first class, in its own colour.
    assert (drawn["one"] == (200, 20, 10)).all(axis=2).sum() >= 16
    assert not (drawn["one"] == (30, 255, 0)).all(axis=2).any()


@pytest.mark.parametrize(("height", "width"), [(240, 320), (481, 640), (1080, 1920)])
def test_legend_is_a_pane_of_glass_over_every_frame(height: int, width: int) -> None:
    """A drawn panel is kept, so it must not hold anything of the frame it was first drawn for."""
    class_map = labels(height, width, 3)

    def legend_over(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        drawn = draw_classes(pixels, class_map, names=NAMES, colours=COLOURS, opacity=0.0)
        return drawn.astype(np.float64)

    frame = noise(height, width)
    first = legend_over(frame)
    black, white = (legend_over(np.full((height, width, 3), light, np.uint8)) for light in (0, 255))
    np.testing.assert_allclose(first, black + (white - black) * (frame / 255.0), atol=1.0)
    np.testing.assert_array_equal(legend_over(frame), first)


@pytest.mark.parametrize(
    ("pixels", "class_map", "opacity", "names", "error", "says"),
    [
        (noise(4, 5), labels(4, 6, 3), 0.5, NAMES, FrameError, "the class map 4x6"),
        (noise(4, 5)[..., 0], labels(4, 5, 3), 0.5, NAMES, FrameError, "grey"),
        (noise(4, 5), labels(4, 5, 3).astype(np.int64), 0.5, NAMES, FrameError, "int64"),
        (noise(4, 5), labels(4, 5, 3), 1.5, NAMES, RequestError, "between 0 and 1"),
        (noise(4, 5), labels(4, 5, 3), 0.5, NAMES[:2], RequestError, "2 class names"),
    ],
)
def test_wrong_arguments_are_refused(
    pixels: NDArray[np.uint8],
    class_map: NDArray[np.uint8],
    opacity: float,
    names: tuple[str, ...],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        draw_classes(pixels, class_map, names=names, colours=COLOURS, opacity=opacity)
