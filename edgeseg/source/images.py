"""Images from files: one, a folder, or those that match a pattern."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from edgeseg.errors import SourceError
from edgeseg.frame import Frame, Pixels
from edgeseg.source.base import Source
from edgeseg.source.opencv import as_bgr, quiet_opencv

__all__ = ["IMAGE_SUFFIXES", "ImageSource", "images_in", "images_like", "natural"]

#: endings of the files that a folder of images is made of
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class ImageSource(Source):
    """Images from files, one frame each, made BGR uint8 whatever they were.

    ``paths`` in the order to read, ``loop`` how often again after the first time (``math.inf``
    without end). ``fps`` is the rate that is stated; they are read as fast as they are asked for.
    ``Frame.index`` is the place in that list, counted on from one time to the next: an image that
    cannot be read is left out, named in `notes`, and its number stays unused. Raises SourceError
    when none can be read.
    """

    def __init__(
        self, uri: str, paths: Sequence[Path], *, loop: float = 0, fps: float | None = None
    ) -> None:
        length = None if math.isinf(loop) else len(paths) * (1 + int(loop))
        super().__init__(uri, live=False, fps=fps, length=length)
        self._paths = list(paths)
        self._next = 0
        self._unreadable: list[str] = []
        # Read ahead by one, so that a folder without a readable image is refused when it is opened.
        self._ahead = self._read_file()
        if self._ahead is None:
            what = (
                f"{paths[0]} is no image that OpenCV can read"
                if len(paths) == 1
                else f"none of the {len(paths)} images of {uri} can be read by OpenCV"
            )
            raise SourceError(f"{what}; is it damaged, or still being written?")
        self._size = (self._ahead.height, self._ahead.width)

    @property
    def notes(self) -> tuple[str, ...]:
        """Names of the images that were skipped."""
        if not self._unreadable:
            return ()
        named = ", ".join(self._unreadable[:5])
        more = len(self._unreadable) - 5
        note = (
            f"{len(self._unreadable)} of {len(self._paths)} images could not be read and were "
            f"skipped: {named}{f' and {more} more' if more > 0 else ''}"
        )
        return (note,)

    def _read(self) -> Frame | None:
        if self._ahead is not None:
            frame, self._ahead = self._ahead, None
            return Frame(frame.pixels, time.monotonic_ns(), frame.index)
        return self._read_file()

    def _read_file(self) -> Frame | None:
        tries = 0
        # Not more than once through all of them: they may have been removed in the meantime.
        while tries < len(self._paths) and (self._length is None or self._next < self._length):
            index = self._next
            self._next += 1
            tries += 1
            path = self._paths[index % len(self._paths)]
            pixels = _read_image(path)
            if pixels is not None:
                return Frame(pixels, time.monotonic_ns(), index)
            self._frames.count("damaged")
            if path.name not in self._unreadable:
                self._unreadable.append(path.name)
        return None


def images_in(uri: str, folder: Path) -> list[Path]:
    """The images of a folder in natural order; raises SourceError when there are none."""
    try:
        paths = [path for path in folder.iterdir() if _is_image(path)]
    except OSError as error:
        raise SourceError(
            f"the folder {uri} cannot be read ({(error.strerror or str(error)).lower()})"
        ) from error
    if not paths:
        raise SourceError(
            f"the folder {uri} holds no images ({', '.join(IMAGE_SUFFIXES)}); "
            "give a video by its own name"
        )
    return sorted(paths, key=natural)


def images_like(uri: str, pattern: Path) -> list[Path]:
    """The images that match a pattern, in natural order; raises SourceError when none does."""
    root, parts = Path(pattern.anchor), list(pattern.parts[1 if pattern.anchor else 0 :])
    while parts and not any(sign in parts[0] for sign in "*?["):
        root /= parts.pop(0)
    try:
        found = list(root.glob(str(Path(*parts)))) if root.is_dir() else []
    except (OSError, ValueError, NotImplementedError, re.error) as error:
        raise SourceError(f"{uri} is no pattern that can be searched for ({error})") from error
    paths = [path for path in found if _is_image(path)]
    if not paths:
        raise SourceError(
            f"no image matches {uri} ({len(found)} other files do); "
            f"images end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return sorted(paths, key=natural)


def natural(path: Path) -> tuple[list[str | int], str]:
    """What to sort by, so that numbers inside names count by value: frame2 before frame10."""
    pieces = re.split(r"(\d+)", str(path).casefold())
    # isdecimal and not isdigit: \d takes the digits of every script, and so does int().
    return [int(piece) if piece.isdecimal() else piece for piece in pieces], str(path)


def _read_image(path: Path) -> Pixels | None:
    # Decoding from memory, because cv2.imread cannot open every name on Windows.
    try:
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
        if encoded.size == 0:
            return None
        with quiet_opencv():
            picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    return None if picture is None or picture.size == 0 else as_bgr(picture)


def _is_image(path: Path) -> bool:
    # Names with a leading dot are other programs' side files (macOS writes "._photo.jpg").
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
