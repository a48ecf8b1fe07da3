"""Synthetic streets: a drive through a generated town, with exact ground truth.

A `Street` is a camera in a moving car. Every frame comes with the class of each pixel (CamVid's
eleven) and the object it belongs to. It serves demos, tests, soak runs and training; no file is
needed. The picture and both maps are drawn through the same masks, so the ground truth is exact.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import SupportsIndex

from edgeseg.errors import RequestError
from edgeseg.synthetic.painter import Painter, StreetFrame, StreetInstance
from edgeseg.synthetic.town import SCENES, build_town

__all__ = ["SCENES", "Street", "StreetFrame", "StreetInstance"]

MIN_SIDE, MAX_SIDE = 32, 8192


class Street:
    """A clip of a generated street, ``height`` x ``width`` pixels, the same for the same ``seed``.

    ``frames`` is its length, None for an endless one; ``fps`` the frames per second of camera
    time; ``scene`` one of `SCENES`, None to let the seed choose. `frame` may be called in any
    order and from several threads. Raises `RequestError` for arguments that cannot be.
    """

    def __init__(
        self,
        height: int = 360,
        width: int = 480,
        *,
        seed: int = 0,
        frames: int | None = 300,
        fps: float = 30.0,
        scene: str | None = None,
    ) -> None:
        self._height = _whole("height", height, MIN_SIDE, MAX_SIDE)
        self._width = _whole("width", width, MIN_SIDE, MAX_SIDE)
        self._seed = _whole("seed", seed, 0, 2**63 - 1)
        self._frames = None if frames is None else _whole("frames", frames, 1, 2**31)
        if not isinstance(fps, (int, float)) or not 0.1 <= fps <= 1000:
            raise RequestError(f"A street's fps is a number from 0.1 to 1000, got {fps!r}.")
        self._fps = float(fps)
        if scene is not None and scene not in SCENES:
            raise RequestError(f"A street's scene is one of {', '.join(SCENES)}, got {scene!r}.")
        self._town = build_town(self._seed, scene, self._height, self._width)

    @property
    def height(self) -> int:
        """Rows of a frame."""
        return self._height

    @property
    def width(self) -> int:
        """Columns of a frame."""
        return self._width

    @property
    def seed(self) -> int:
        """What the street was made from."""
        return self._seed

    @property
    def frames(self) -> int | None:
        """Number of frames, None if endless."""
        return self._frames

    @property
    def fps(self) -> float:
        """Frames per second of camera time."""
        return self._fps

    @property
    def scene(self) -> str:
        """One of `SCENES`."""
        return self._town.scene

    def __len__(self) -> int:
        if self._frames is None:
            raise TypeError("an endless street has no length")
        return self._frames

    def __iter__(self) -> Iterator[StreetFrame]:
        index = 0
        while self._frames is None or index < self._frames:
            yield self.frame(index)
            index += 1

    def frame(self, index: int) -> StreetFrame:
        """Frame ``index``, always the same bytes; the arrays are newly made.

        Raises `RequestError` if ``index`` is negative or past the end.
        """
        last = 2**31 if self._frames is None else self._frames - 1
        index = _whole("frame index", index, 0, last)
        return Painter(self._town, self._fps, index).paint()


def _whole(name: str, value: SupportsIndex, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise RequestError(
            f"A street's {name} is a whole number from {low} to {high}, got {value!r}."
        )
    return number
