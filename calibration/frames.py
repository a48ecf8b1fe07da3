"""Frames that a model is calibrated with: pictures without truth, checked before they count.

::

    frames/                           images, also in folders below it, in the order of their names
    train.txt  train.lst              a list of images, one a line, relative to the list
    clip.mp4                          a video file
    camvid:DIR                        the images of DIR/images/train
    synthetic:?seed=3&frames=200      generated streets of the split "train" (`edgeseg.dataset`)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.dataset import Dataset, open_dataset
from edgeseg.errors import CalibrationError, RequestError, SourceError
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.instance_dataset import InstanceDataset
from edgeseg.source import IMAGE_SUFFIXES, VideoSource, quiet_opencv
from edgeseg.spec import ModelSpec

__all__ = [
    "AIM",
    "FEW",
    "CalibrationFrames",
    "check_overlap",
    "open_frames",
    "overlap_error",
]

#: Fewer distinct frames than FEW are worth a warning, which says to aim at AIM. Of n frames that
#: come from the same camera in no particular order, each is as likely as any other to hold the
#: largest value of a tensor, so the next frame goes beyond the range of the n with a chance of
#: 1 / (n + 1): 3 % after 32 frames and 1 % after 100. It is so for every tensor of a network,
#: whatever its distribution; near-duplicates are no new draws and do not count.
FEW = 32
AIM = 100

_FORMS = (
    "a folder of images, a list of them (.txt, .lst), a video file, camvid:DIR, or synthetic: "
    "with options"
)
_LISTS = (".txt", ".lst")

# A frame is judged by its cells: the means of what lies below a grid with 24 cells on the shorter
# side. Photographs have as much structure between cells as between pixels, and noise averages out
# in both, but only the cells tell a grainy photograph from noise: sensor noise at night pulls the
# correlation of neighbouring pixels down to 0.01, and leaves that of the cells.
_CELLS = 24

# The least correlation of neighbouring cells, in the worse of the two directions, that a picture
# has. Measured, lowest / median of a set:
#   CamVid train 0.82 / 0.91, COCO 0.40 / 0.81, two clips 0.78 / 0.81, generated streets 0.69 / 0.83
#   a mixture of these at JPEG quality 5 0.61 / 0.83, at 3 % of the brightness 0.59 / 0.80, blurred
#   by 15 pixels 0.87 / 0.94, in fog 0.62 / 0.83, at night (10 % of the brightness and noise of 20
#   levels) 0.43 / 0.78, and a milder night brightened again 0.63 / 0.83
# and the highest of noise:
#   uniform, grey, Gaussian, salt and pepper 0.04 (0.17 at 32x48, where cells share pixels), JPEG
#   quality 10 0.07, enlarged from 100x100 0.09, blurred by 3 pixels 0.16, one value a row 0.22
# Nothing is refused before most frames fail, so that single pictures below it do no harm.
_LEAST_CORRELATION = 0.3
# Spread of the cells, in grey levels, below which a frame is blank. Photographs darkened to 3 %
# have 0.6 or more.
_LEAST_SPREAD = 0.25

# Frames whose cells differ by less than this share of their spread, on average, show the same.
# By it 359 of the 367 pictures of CamVid train are distinct, all 192 of COCO, 81 of 221 frames from
# a driving car, and 172 of 795 from a camera that stands still (166 with the light at 5 %); 553 of
# 559 copies at JPEG quality 20, and all with noise of 8 levels, are the same as their originals.
_SAME = 0.05

# Frames of a video between two wanted ones from which on it pays to seek instead of to decode.
_SEEK = 250


@dataclass(frozen=True, eq=False)
class _Reading:
    """One entry as read: ``pixels`` at source size, None where it cannot be read."""

    index: int
    name: str
    sha256: str = ""
    pixels: Pixels | None = None


@dataclass(frozen=True)
class _Entry:
    """What is remembered of a frame: its place in the origin, its hashes, its (height, width)."""

    index: int
    name: str
    sha256: str
    pixels_sha256: str
    size: tuple[int, int]


class _Origin(ABC):
    """Where frames come from: a fixed sequence of ``total`` entries, read when asked for.

    ``lessons`` counts what reading found out about the origin so far that changes what it gives.
    """

    title: str
    total: int
    lessons: int = 0

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Generator[_Reading, None, None]:
        """The entries at ``indices``, which ascend; fewer when the origin ends before the last."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the origin itself."""
        return ()


class CalibrationFrames:
    """Frames to calibrate with, read again at every iteration, one at a time in memory.

    ``title`` is their name for a person. ``skipped`` names what could not be read. ``notes`` are
    warnings, a sentence each. ``hashes`` is name -> sha256 in hexadecimal, as
    `edgeseg.dataset.Dataset.hashes` defines it: of a file's bytes, and of the pixels of frames
    that have no file of their own. ``sizes`` is (height, width) at the source -> number of frames,
    the most frequent first. Made by `open_frames`.
    """

    def __init__(
        self,
        origin: _Origin,
        entries: tuple[_Entry, ...],
        spec: ModelSpec,
        *,
        skipped: tuple[str, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.title = origin.title
        self.skipped = skipped
        self.notes = notes
        self.hashes = {entry.name: entry.sha256 for entry in entries}
        self.sizes = dict(Counter(entry.size for entry in entries).most_common())
        self._origin = origin
        self._entries = entries
        self._spec = spec

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        """(name, pixels) of each frame, always the same ones in the same order.

        ``pixels`` are (spec.height, spec.width, 3) uint8 BGR and belong to the caller. Raises
        CalibrationError when a frame has changed or gone since `open_frames`.
        """
        found = 0
        with closing(self._origin.read([entry.index for entry in self._entries])) as readings:
            for entry, reading in zip(self._entries, readings, strict=False):
                if reading.pixels is None or reading.sha256 != entry.sha256:
                    raise self._changed(entry)
                found += 1
                height, width = reading.pixels.shape[:2]
                yield entry.name, Geometry.between(height, width, self._spec).fit(reading.pixels)
        if found < len(self._entries):
            raise self._changed(self._entries[found])

    def digest(self) -> str:
        """One sha256, in hexadecimal, over the names and hashes of all frames in their order."""
        lines = "".join(f"{sha256}  {name}\n" for name, sha256 in self.hashes.items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def pixel_hashes(self) -> dict[str, str]:
        """Name -> sha256 of the decoded pixels at source size, in hexadecimal.

        The same for every file that holds the same picture without loss.
        """
        return {entry.name: entry.pixels_sha256 for entry in self._entries}

    def _changed(self, entry: _Entry) -> CalibrationError:
        return CalibrationError(
            f"{entry.name} of {self.title} has changed or gone since calibration began; "
            "leave the frames as they are until it is done, and begin again"
        )


def open_frames(uri: str, spec: ModelSpec, *, count: int = 200) -> CalibrationFrames:
    """The frames that ``uri`` names, fitted to the network size of ``spec``.

    At most ``count`` of them, spread evenly over what is there. Each is read once here, to be
    hashed and judged. What cannot be read is skipped and noted; a note also comes with fewer than
    ``FEW`` distinct frames (its docstring has the reason), with several sizes, and with single
    frames of noise.

    Raises CalibrationError when nothing is at ``uri``, when no frame can be read, and when most of
    them are noise or blank; RequestError for options that cannot be.
    """
    if count < 1:
        raise RequestError(f"calibration takes 1 frame or more, and a count of {count} came")
    origin = _origin(uri)
    while True:
        lessons = origin.lessons
        survey = _Survey()
        for reading in origin.read(_spread(origin.total, count)):
            survey.add(reading)
        # A video may turn out shorter than its header says: then it is chosen again from what is
        # really there, so that the frames are spread over all of it.
        if origin.lessons == lessons:
            break
    return CalibrationFrames(
        origin,
        tuple(survey.entries),
        spec,
        skipped=tuple(survey.skipped),
        notes=(*origin.notes, *survey.verdict(origin.title, spec)),
    )


def check_overlap(frames: CalibrationFrames, dataset: Dataset | InstanceDataset) -> tuple[str, ...]:
    """Names of the calibration frames that are also pictures of ``dataset``; empty is good.

    Compared are the files, and the decoded pixels, so that a picture stored again without loss
    is found. One that was scaled or compressed anew is not. Reads all of ``dataset``.
    """
    held = set(dataset.hashes().values())
    held.update(_pixels_sha256(dataset.sample(index).pixels) for index in range(len(dataset)))
    pixels = frames.pixel_hashes()
    return tuple(
        name for name, sha256 in frames.hashes.items() if sha256 in held or pixels[name] in held
    )


def overlap_error(names: Sequence[str], dataset: Dataset | InstanceDataset) -> CalibrationError:
    """The refusal of calibration frames ``names`` that `check_overlap` found in ``dataset``."""
    are = "is" if len(names) == 1 else "are"
    return CalibrationError(
        f"{_frames(len(names))} to calibrate with {are} also in the evaluation set "
        f"{dataset.title} {dataset.split} ({_some(names)}), and accuracy measured on what ranges "
        "were fitted to flatters; calibrate with other frames, or let --allow-overlap go on and "
        "record it"
    )


def _origin(uri: str) -> _Origin:
    """What ``uri`` names, with its entries listed."""
    text = uri.strip()
    if not text:
        raise RequestError(f"calibration frames are {_FORMS}, and an empty text came")
    kind, colon, rest = text.partition(":")
    if colon and kind == "synthetic":
        return _Generated(open_dataset(text, "train"))
    if colon and kind == "camvid":
        if not rest:
            raise RequestError("camvid: needs the folder with images/train: camvid:DIR")
        return _camvid(Path(rest).expanduser())
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        what = "is no file or folder" if path.exists() else "does not exist"
        raise CalibrationError(f"{text} {what}; calibration frames are {_FORMS}")
    if path.suffix.lower() in _LISTS:
        return _list(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _Files(path.name, {path.name: path})
    return _Video(path)


class _Files(_Origin):
    """Image files, name -> path, in the order to read. ``repeated`` entries were left out."""

    def __init__(self, title: str, paths: dict[str, Path], *, repeated: int = 0) -> None:
        self.title = title
        self.total = len(paths)
        self._paths = tuple(paths.items())
        self._repeated = repeated

    def read(self, indices: Sequence[int]) -> Generator[_Reading, None, None]:
        for index in indices:
            name, path = self._paths[index]
            try:
                contents = path.read_bytes()
            except (OSError, ValueError):
                yield _Reading(index, name)
                continue
            yield _Reading(
                index, name, sha256=hashlib.sha256(contents).hexdigest(), pixels=_decoded(contents)
            )

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._repeated:
            return ()
        return (f"{self._repeated} lines of {self.title} name an image a second time",)


class _Video(_Origin):
    """A video file. ``total`` is what its header promises until the end came sooner.

    Raises CalibrationError for a file that is no video, or of which no frame can be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.title = path.name
        self._path = path
        self._seekable = True
        self._promised: int | None = None
        try:
            with VideoSource(str(path), path) as source:
                self._promised = source.length
        except SourceError as error:
            raise CalibrationError(str(error)) from error
        self.total = self._counted() if self._promised is None else self._promised

    def read(self, indices: Sequence[int]) -> Generator[_Reading, None, None]:
        # ``position`` is the number of frames before the one that a grab would give.
        capture, position = self._opened(), 0
        try:
            for index in indices:
                if self._seekable and index - position > _SEEK:
                    if _sought(capture, index):
                        position = index + 1
                    else:
                        # Not every file can be sought in; then all of it is decoded.
                        self._seekable = False
                        self.lessons += 1
                        capture.release()
                        capture, position = self._opened(), 0
                while position <= index and _grabbed(capture):
                    position += 1
                if position <= index:
                    self.total = position
                    self.lessons += 1
                    return
                name = f"frame {index}"
                pixels = _retrieved(capture)
                if pixels is None:
                    yield _Reading(index, name)
                else:
                    yield _Reading(index, name, sha256=_pixels_sha256(pixels), pixels=pixels)
        finally:
            with quiet_opencv():
                capture.release()

    @property
    def notes(self) -> tuple[str, ...]:
        # A header may be off by one frame without anything being wrong.
        if self._promised is None or self._promised - self.total <= 1:
            return ()
        note = (
            f"the header of {self.title} promises {self._promised} frames and {self.total} could "
            "be read"
        )
        return (note,)

    def _opened(self) -> cv2.VideoCapture:
        with quiet_opencv():
            return cv2.VideoCapture(str(self._path))

    def _counted(self) -> int:
        capture = self._opened()
        try:
            count = 0
            while _grabbed(capture):
                count += 1
            return count
        finally:
            with quiet_opencv():
                capture.release()


class _Generated(_Origin):
    """Samples of a data set whose pictures have no files."""

    def __init__(self, dataset: Dataset) -> None:
        self.title = f"{dataset.title} {dataset.split}"
        self.total = len(dataset)
        self._dataset = dataset

    def read(self, indices: Sequence[int]) -> Generator[_Reading, None, None]:
        for index in indices:
            sample = self._dataset.sample(index)
            yield _Reading(
                index, sample.name, sha256=_pixels_sha256(sample.pixels), pixels=sample.pixels
            )


def _folder(folder: Path) -> _Files:
    """A folder of images, and of folders with more."""
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        raise CalibrationError(
            f"{folder} is a data set, and its label maps are no pictures to calibrate with; "
            f"camvid:{folder} takes the images of its split train"
        )
    found = _images(folder)
    if not found:
        raise CalibrationError(
            f"the folder {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); "
            "give a video by its own name"
        )
    return _Files(f"folder {folder.resolve().name}", found)


def _camvid(folder: Path) -> _Files:
    """The images of the split "train"; labels are not needed."""
    place = folder / "images" / "train"
    found = _images(place)
    if not found:
        what = "holds no images" if place.is_dir() else "is no folder"
        raise CalibrationError(
            f"camvid: calibrates with DIR/images/train, and {place} {what}; "
            "give a folder of another shape by its own name"
        )
    return _Files("CamVid train", found)


def _images(folder: Path) -> dict[str, Path]:
    """The images below a folder, by their names; hidden ones are other programs' own."""
    found: dict[str, Path] = {}
    for path in folder.rglob("*"):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            found[inner.as_posix()] = path
    # Sorted as text: paths compare differently on Windows.
    return dict(sorted(found.items()))


def _list(path: Path) -> _Files:
    """The images that a text file names, one a line; a name that comes again counts once."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path} should be a list of images in UTF-8, one a line, and cannot be read ({error})"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise CalibrationError(f"{path} lists no images; it needs the path of one on each line")
    paths = {name: path.parent / name for name in names}
    return _Files(f"list {path.name}", paths, repeated=len(names) - len(paths))


@dataclass
class _Survey:
    """What one reading of all frames found out about them."""

    entries: list[_Entry] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)
    #: cells of the frames that differ from each other, up to FEW of them
    distinct: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, reading: _Reading) -> None:
        """Takes one entry into account."""
        pixels = reading.pixels
        if pixels is None:
            self.skipped.append(reading.name)
            return
        size = (pixels.shape[0], pixels.shape[1])
        self.entries.append(
            _Entry(reading.index, reading.name, reading.sha256, _pixels_sha256(pixels), size)
        )
        cells = _cells(pixels)
        if not _is_picture(cells):
            self.noise.append(reading.name)
        elif len(self.distinct) < FEW and not any(_same(cells, other) for other in self.distinct):
            self.distinct.append(cells)

    def verdict(self, title: str, spec: ModelSpec) -> tuple[str, ...]:
        """The warnings; CalibrationError where the frames are none to calibrate with."""
        read, tried = len(self.entries), len(self.entries) + len(self.skipped)
        if not read:
            raise CalibrationError(
                f"none of the {_frames(tried)} of {title} can be read ({_some(self.skipped)}); "
                "are they there, complete, and images that OpenCV knows?"
            )
        if 2 * len(self.noise) > read:
            raise CalibrationError(
                "calibration takes pictures such as the model will see, and of the "
                f"{_frames(read)} of {title}, {len(self.noise)} show noise or nothing "
                f"({_some(self.noise)}); ranges from them would fit no real frame: give "
                "photographs or a video"
            )
        notes = []
        if self.skipped:
            notes.append(
                f"{len(self.skipped)} of {_frames(tried)} could not be read and were skipped: "
                f"{_some(self.skipped)}"
            )
        if self.noise:
            notes.append(
                f"{len(self.noise)} of {_frames(read)} show noise or nothing, which makes "
                f"ranges worse; take them away: {_some(self.noise)}"
            )
        distinct = len(self.distinct)
        if distinct < FEW:
            count = _frames(distinct)
            if distinct < read:
                # The others are near-duplicates, or noise.
                count = count.replace(" ", " distinct ") + f" among {read}"
            notes.append(
                f"{count} may not show all that the ranges must hold; aim at {AIM} or more, of "
                "different places, light and weather"
            )
        sizes = Counter(entry.size for entry in self.entries).most_common()
        if len(sizes) > 1:
            listed = [f"{number} of {height}x{width}" for (height, width), number in sizes]
            notes.append(
                f"frames come in {len(sizes)} sizes ({_some(listed)}); all were brought to "
                f"{spec.height}x{spec.width} ({spec.fit})"
            )
        return tuple(notes)


def _spread(total: int, count: int) -> list[int]:
    """At most ``count`` of 0 ... total - 1, from the middles of as many equal parts."""
    count = min(total, count)
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def _cells(pixels: Pixels) -> NDArray[np.float64]:
    """(rows, columns, 3) means of a picture's parts, ``_CELLS`` on its shorter side."""
    height, width = pixels.shape[:2]
    scale = _CELLS / min(height, width)
    if scale < 1:
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        pixels = cv2.resize(  # type: ignore[assignment]
            pixels, size, interpolation=cv2.INTER_AREA
        )
    return pixels.astype(np.float64)


def _is_picture(cells: NDArray[np.float64]) -> bool:
    """Whether there is something in a frame, and its parts have to do with their neighbours."""
    deviation = cells - cells.mean(axis=(0, 1))
    if deviation.std() < _LEAST_SPREAD:
        return False
    # A line of cells has no neighbours in one direction, and is judged by the other.
    return all(
        _correlation(first, second) >= _LEAST_CORRELATION
        for first, second in (
            (deviation[1:], deviation[:-1]),
            (deviation[:, 1:], deviation[:, :-1]),
        )
        if first.size
    )


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of two arrays of deviations from one mean, all channels together; 1 where both are 0."""
    power = float((first * first).sum() + (second * second).sum())
    return 2 * float((first * second).sum()) / power if power else 1.0


def _same(cells: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two frames show the same but for noise, compression and small things that move."""
    if cells.shape != other.shape:
        return False
    spread = float((other - other.mean(axis=(0, 1))).std())
    return float(np.abs(cells - other).mean()) < _SAME * spread


def _decoded(contents: bytes) -> Pixels | None:
    """The picture in a file's bytes as (height, width, 3) uint8 BGR; None if there is none."""
    if not contents:
        return None
    try:
        with quiet_opencv():
            picture = cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return picture  # type: ignore[return-value]


def _sought(capture: cv2.VideoCapture, index: int) -> bool:
    """Grabs frame ``index``; whether the capture says that it was this one."""
    with quiet_opencv():
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        return round(capture.get(cv2.CAP_PROP_POS_FRAMES)) == index and capture.grab()


def _grabbed(capture: cv2.VideoCapture) -> bool:
    with quiet_opencv():
        return capture.grab()


def _retrieved(capture: cv2.VideoCapture) -> Pixels | None:
    """The frame that was grabbed, as (height, width, 3) uint8 BGR; None if it cannot be decoded."""
    with quiet_opencv():
        found, picture = capture.retrieve()
    if not found or picture is None or picture.ndim != 3 or picture.dtype != np.uint8:
        return None
    return picture  # type: ignore[return-value]


def _pixels_sha256(pixels: Pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _some(names: Iterable[str], *, most: int = 5) -> str:
    """The first few of ``names``, and how many more there are."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")
