"""Random changes to a training picture and its labels, made together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.frame import Pixels

__all__ = ["Augmentation"]

Labels = NDArray[np.uint8]


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

    def weakened(self, strength: float) -> Augmentation:
        """The same with less of scale, aspect and colour: 1 is all of them, 0 none."""
        low, high = self.scale
        return replace(
            self,
            scale=(low**strength, high**strength),
            aspect=self.aspect**strength,
            colour=self.colour * strength,
        )

    def __call__(
        self, pixels: Pixels, labels: Labels, ignore: int, rng: np.random.Generator
    ) -> tuple[Pixels, Labels]:
        """(h, w, 3) uint8 BGR and (h, w) uint8 -> the same two at ``crop`` size.

        Where the picture is smaller than the crop, the border is grey and labelled ``ignore``.
        """
        pixels, labels = self._resized(pixels, labels, rng)
        pixels, labels = self._cropped(pixels, labels, ignore, rng)
        if self.flip and rng.random() < 0.5:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        return self._recoloured(np.ascontiguousarray(pixels), rng), np.ascontiguousarray(labels)

    def _resized(
        self, pixels: Pixels, labels: Labels, rng: np.random.Generator
    ) -> tuple[Pixels, Labels]:
        zoom = np.exp(rng.uniform(*np.log(self.scale))) * self.full_height / pixels.shape[0]
        stretch = np.exp(rng.uniform(-1, 1) * np.log(self.aspect) / 2)
        height = max(round(pixels.shape[0] * zoom / stretch), 8)
        width = max(round(pixels.shape[1] * zoom * stretch), 8)
        shrinks = height < pixels.shape[0]
        return (
            cv2.resize(  # type: ignore[return-value]
                pixels,
                (width, height),
                interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
            ),
            cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT),
        )

    def _cropped(
        self, pixels: Pixels, labels: Labels, ignore: int, rng: np.random.Generator
    ) -> tuple[Pixels, Labels]:
        height, width = self.crop
        missing_rows = max(height - pixels.shape[0], 0)
        missing_columns = max(width - pixels.shape[1], 0)
        if missing_rows or missing_columns:
            top = int(rng.integers(0, missing_rows + 1))
            left = int(rng.integers(0, missing_columns + 1))
            sides = (top, missing_rows - top, left, missing_columns - left)
            pixels = cv2.copyMakeBorder(  # type: ignore[assignment]
                pixels, *sides, cv2.BORDER_CONSTANT, value=(114, 114, 114)
            )
            labels = cv2.copyMakeBorder(  # type: ignore[assignment]
                labels, *sides, cv2.BORDER_CONSTANT, value=(ignore,)
            )
        top = int(rng.integers(0, pixels.shape[0] - height + 1))
        left = int(rng.integers(0, pixels.shape[1] - width + 1))
        rows, columns = slice(top, top + height), slice(left, left + width)
        return pixels[rows, columns], labels[rows, columns]

    def _recoloured(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
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
