"""Frames that are kept in memory, so that whatever is compared sees the same ones."""

from __future__ import annotations

import time
from collections.abc import Sequence

from edgeseg.errors import SourceError
from edgeseg.frame import Frame, Pixels
from edgeseg.source import Source, open_source
from edgeseg.source.address import without_password

__all__ = ["KeptFrames", "kept_frames"]

_FRAMES = 16
_BYTES = 256_000_000


class KeptFrames(Source):
    """The same pictures over and over, ``count`` in all, each as if it were taken now."""

    def __init__(self, pictures: Sequence[Pixels], count: int) -> None:
        super().__init__("frames in memory", live=False, length=count)
        self._pictures = tuple(pictures)
        self._index = 0

    def _read(self) -> Frame | None:
        if self._index == self.length:
            return None
        pixels = self._pictures[self._index % len(self._pictures)]
        self._index += 1
        return Frame(pixels, time.monotonic_ns(), self._index - 1)


def kept_frames(uri: str) -> list[Pixels]:
    """The first 16 pictures of ``uri``, fewer where they are large, or where there are no more.

    SourceError when it gives none.
    """
    found: list[Pixels] = []
    with open_source(uri) as source:
        for frame in source:
            found.append(frame.pixels)
            if len(found) == _FRAMES or (len(found) + 1) * frame.pixels.nbytes > _BYTES:
                break
    if not found:
        raise SourceError(f"{without_password(uri)} gave no frames, and a comparison needs one")
    return found
