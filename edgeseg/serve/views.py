"""What a web page shows of a result: the overlay, the frame alone, or the mask alone."""

from __future__ import annotations

from typing import Literal, cast

import cv2
import numpy as np

from edgeseg.draw import colourise, draw_classes
from edgeseg.errors import SinkError
from edgeseg.frame import Pixels
from edgeseg.instances import InstanceResult
from edgeseg.result import Result, SemanticResult

__all__ = ["VIEWS", "View", "encoded_jpeg", "encoded_png", "rendered"]

View = Literal["overlay", "original", "mask"]
VIEWS: tuple[View, ...] = ("overlay", "original", "mask")

# What stands in a map of classes where none is, and is black then.
_NO_CLASS = 255


def rendered(
    result: Result, view: View, *, opacity: float = 0.5, longest: int | None = None
) -> Pixels:
    """The picture of a view: (height, width, 3) uint8 BGR; it may be the frame's own array.

    ``longest``: pixels that its longer side has at most, None for those of the frame. The overlay
    has no legend: the page has one, of letters that stay sharp.
    """
    pixels = result.frame.pixels
    scale = 1.0 if longest is None else min(1.0, longest / max(pixels.shape[:2]))
    if view == "original":
        return _smaller(pixels, scale)
    if isinstance(result, SemanticResult):
        if scale == 1.0 and view == "overlay":
            return result.draw(opacity=opacity, legend=False)
        # Made smaller first: what is not shown need not be drawn.
        class_map = _smaller_map(result.class_map, scale)
        if view == "mask":
            return colourise(class_map, result.spec.colours)
        return draw_classes(
            _smaller(pixels, scale),
            class_map,
            names=result.spec.classes,
            colours=result.spec.colours,
            opacity=opacity,
            legend=False,
        )
    if view == "mask" and isinstance(result, InstanceResult):
        # The class of the best instance at each pixel, and of none where there is none.
        class_of = np.full(len(result) + 1, _NO_CLASS, np.uint8)
        class_of[1:] = result.labels
        class_map = _smaller_map(class_of[result.instance_map], scale)
        return colourise(class_map, result.spec.colours)
    drawn = result.draw(opacity=opacity if view == "overlay" else 1.0, legend=False)
    return _smaller(drawn, scale)


def encoded_jpeg(picture: Pixels, quality: int, *, sharp: bool = False) -> bytes:
    """A JPEG; ``sharp`` keeps colours at full resolution, for masks, whose borders are colours."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    # Since OpenCV 4.5.5.
    if sharp and hasattr(cv2, "IMWRITE_JPEG_SAMPLING_FACTOR"):
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", picture, options)
    if not done:
        raise SinkError(f"OpenCV cannot encode a picture of {picture.shape} as JPEG")
    return data.tobytes()


def encoded_png(picture: Pixels) -> bytes:
    """A PNG, encoded fast rather than small."""
    done, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise SinkError(f"OpenCV cannot encode a picture of {picture.shape} as PNG")
    return data.tobytes()


def _smaller(pixels: Pixels, scale: float) -> Pixels:
    if scale == 1.0:
        return pixels
    return cast(Pixels, cv2.resize(pixels, _size(pixels, scale), interpolation=cv2.INTER_AREA))


def _smaller_map(class_map: Pixels, scale: float) -> Pixels:
    if scale == 1.0:
        return class_map
    size = _size(class_map, scale)
    return cast(Pixels, cv2.resize(class_map, size, interpolation=cv2.INTER_NEAREST))


def _size(array: Pixels, scale: float) -> tuple[int, int]:
    height, width = array.shape[:2]
    return max(round(width * scale), 1), max(round(height * scale), 1)
