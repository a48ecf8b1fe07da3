"""Frame size to network size and back: the only step outside the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeseg.frame import Pixels
from edgeseg.spec import Fit, ModelSpec

__all__ = ["Geometry"]

# The grey that detectors commonly pad with; near the mean of natural images, so that a border
# looks like nothing in particular to the network.
_PADDING = 114


@dataclass(frozen=True)
class Geometry:
    """How frames of one size fit the network, both ways.

    ``frame_height`` x ``frame_width`` pixels of a frame land on the rectangle of
    ``inner_height`` x ``inner_width`` at (``top``, ``left``) of a network input of
    ``height`` x ``width``. With fit "stretch" that rectangle is the whole input; with
    "letterbox" it keeps the frame's aspect ratio and the rest is padding.
    """

    frame_height: int
    frame_width: int
    height: int
    width: int
    top: int
    left: int
    inner_height: int
    inner_width: int

    @classmethod
    def between(cls, frame_height: int, frame_width: int, spec: ModelSpec) -> Geometry:
        """The geometry for frames of this size and this model."""
        return cls.fitting(frame_height, frame_width, spec.height, spec.width, fit=spec.fit)

    @classmethod
    def fitting(
        cls, frame_height: int, frame_width: int, height: int, width: int, *, fit: Fit
    ) -> Geometry:
        """The geometry for frames of this size and a network input of ``height`` x ``width``."""
        inner_height, inner_width = height, width
        if fit == "letterbox":
            scale = min(height / frame_height, width / frame_width)
            inner_height = min(max(round(frame_height * scale), 1), height)
            inner_width = min(max(round(frame_width * scale), 1), width)
        return cls(
            frame_height=frame_height,
            frame_width=frame_width,
            height=height,
            width=width,
            top=(height - inner_height) // 2,
            left=(width - inner_width) // 2,
            inner_height=inner_height,
            inner_width=inner_width,
        )

    def fit(self, pixels: Pixels) -> Pixels:
        """A frame (frame_height, frame_width, 3) -> network input (height, width, 3), uint8 BGR.

        Bilinear with half-pixel centres. The result is contiguous; it is ``pixels`` itself when
        nothing has to change, and otherwise belongs to the caller.
        """
        # Here, so that kernels and their tests have this class where there is no OpenCV.
        import cv2

        if (self.frame_height, self.frame_width) == (self.inner_height, self.inner_width):
            inner = pixels
        else:
            inner = cv2.resize(  # type: ignore[assignment]
                pixels, (self.inner_width, self.inner_height), interpolation=cv2.INTER_LINEAR
            )
        if (self.inner_height, self.inner_width) == (self.height, self.width):
            return np.ascontiguousarray(inner)
        bottom = self.height - self.top - self.inner_height
        right = self.width - self.left - self.inner_width
        return cv2.copyMakeBorder(  # type: ignore[return-value]
            inner,
            self.top,
            bottom,
            self.left,
            right,
            cv2.BORDER_CONSTANT,
            value=(_PADDING, _PADDING, _PADDING),
        )

    def restore(self, plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A map at network size (height, width) -> at frame size, uint8.

        Nearest neighbour with half-pixel centres, so that labels stay labels. ``plane`` itself
        when nothing has to change, and otherwise an array of the caller's own.
        """
        import cv2

        inner = plane[
            self.top : self.top + self.inner_height, self.left : self.left + self.inner_width
        ]
        if (self.inner_height, self.inner_width) == (self.frame_height, self.frame_width):
            return inner
        return cv2.resize(  # type: ignore[return-value]
            inner,
            (self.frame_width, self.frame_height),
            interpolation=cv2.INTER_NEAREST_EXACT,
        )
