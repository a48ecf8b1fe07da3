"""Random changes to a training picture and its labels, made together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.frame import Pixels

if TYPE_CHECKING:
    from edgeseg.export.recipe import Recipe

__all__ = ["Augmentation", "Placement"]

Labels = NDArray[np.uint8]

_GREY = (114, 114, 114)


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in its crop: resized, bordered, cut out, mirrored, in this order.

    ``crop`` and ``size`` (the picture's after resizing) are (height, width), ``border`` the rows
    added above and below and the columns left and right, ``corner`` the first (row, column) of the
    bordered picture that is in the crop; all in pixels.
    """

    crop: tuple[int, int]
    size: tuple[int, int]
    border: tuple[int, int, int, int]
    corner: tuple[int, int]
    flipped: bool

    def picture(self, pixels: Pixels) -> Pixels:
        """(h, w, 3) uint8 -> the crop of it, grey where it does not reach."""
        way = cv2.INTER_AREA if self.size[0] < pixels.shape[0] else cv2.INTER_LINEAR
        return self._cut(cv2.resize(pixels, self.size[::-1], interpolation=way), _GREY)

    def labels(self, labels: Labels, outside: int) -> Labels:
        """(h, w) uint8 -> the crop of it, ``outside`` where it does not reach."""
        resized = cv2.resize(labels, self.size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        return self._cut(resized, (outside,))

    def _cut(self, array: Any, outside: tuple[int, ...]) -> NDArray[np.uint8]:
        if any(self.border):
            array = cv2.copyMakeBorder(array, *self.border, cv2.BORDER_CONSTANT, value=outside)
        (top, left), (height, width) = self.corner, self.crop
        cut: NDArray[np.uint8] = array[top : top + height, left : left + width]
        return np.ascontiguousarray(cut[:, ::-1] if self.flipped else cut)


@dataclass(frozen=True)
class Augmentation:
    """Scale, aspect, crop, flip and colour, drawn anew for every sample.

    ``crop``: (height, width) of what comes out. ``scale``: range of the zoom, 1 being the size at
    which a whole picture has the height of ``full_height``. ``aspect``: largest stretch of width
    against height, either way. ``colour``: strength of brightness, contrast, saturation and hue
    changes, 0 to 1.
    """

    crop: tuple[int, int]
    full_height: int
    scale: tuple[float, float] = (0.6, 1.8)
    aspect: float = 1.3
    flip: bool = True
    colour: float = 0.5

    @classmethod
    def of(cls, recipe: Recipe) -> Augmentation:
        """What ``recipe`` asks for, in full strength."""
        return cls(
            crop=recipe.crop,
            full_height=recipe.full_height,
            scale=recipe.scale,
            aspect=recipe.aspect,
            colour=recipe.colour,
        )

    def weakened(self, strength: float) -> Augmentation:
        """The same with less of scale, aspect and colour: 1 is all of them, 0 none."""
        low, high = self.scale
        return replace(
            self,
            scale=(low**strength, high**strength),
            aspect=self.aspect**strength,
            colour=self.colour * strength,
        )

    def drawn(self, height: int, width: int, rng: np.random.Generator) -> Placement:
        """Where a picture of ``height`` x ``width`` comes to lie, this time."""
        zoom = np.exp(rng.uniform(*np.log(self.scale))) * self.full_height / height
        stretch = np.exp(rng.uniform(-1, 1) * np.log(self.aspect) / 2)
        rows = max(round(height * zoom / stretch), 8)
        columns = max(round(width * zoom * stretch), 8)
        missing_rows = max(self.crop[0] - rows, 0)
        missing_columns = max(self.crop[1] - columns, 0)
        above = left_of = 0
        if missing_rows or missing_columns:
            above = int(rng.integers(0, missing_rows + 1))
            left_of = int(rng.integers(0, missing_columns + 1))
        top = int(rng.integers(0, rows + missing_rows - self.crop[0] + 1))
        left = int(rng.integers(0, columns + missing_columns - self.crop[1] + 1))
        return Placement(
            crop=self.crop,
            size=(rows, columns),
            border=(above, missing_rows - above, left_of, missing_columns - left_of),
            corner=(top, left),
            flipped=self.flip and bool(rng.random() < 0.5),
        )

    def __call__(
        self, pixels: Pixels, labels: Labels, ignore: int, rng: np.random.Generator
    ) -> tuple[Pixels, Labels]:
        """(h, w, 3) uint8 BGR and (h, w) uint8 -> the same two at ``crop`` size.

        Where the picture is smaller than the crop, the border is grey and labelled ``ignore``.
        """
        placement = self.drawn(pixels.shape[0], pixels.shape[1], rng)
        return self.recoloured(placement.picture(pixels), rng), placement.labels(labels, ignore)

    def recoloured(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """``pixels`` under another light, through another camera."""
        if self.colour == 0:
            return pixels
        strength = self.colour
        image = pixels.astype(np.float32)
        image *= rng.uniform(1 - strength, 1 + strength)
        centre = image.mean()
        image = centre + (image - centre) * rng.uniform(1 - strength, 1 + strength)
        grey = image.mean(axis=2, keepdims=True)
        image = grey + (image - grey) * rng.uniform(1 - strength, 1 + strength)
        # A camera's white balance: one gain per channel.
        image *= rng.uniform(1 - 0.3 * strength, 1 + 0.3 * strength, 3).astype(np.float32)
        if rng.random() < 0.3:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.4))
        if rng.random() < 0.3:
            image += rng.normal(0, rng.uniform(2, 10), image.shape).astype(np.float32)
        recoloured: Pixels = np.clip(image, 0, 255).astype(np.uint8)
        return recoloured
