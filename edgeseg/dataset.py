"""Pictures with a class per pixel, opened by URI: CamVid folders and generated streets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import parse_qsl

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeseg.classes import CAMVID, ClassList
from edgeseg.errors import DataError, RequestError
from edgeseg.frame import Pixels
from edgeseg.spec import parse_size

if TYPE_CHECKING:
    from edgeseg.synthetic import Street, StreetFrame

__all__ = [
    "FRAMES_PER_STREET",
    "SPLIT_SEEDS",
    "CamVidDataset",
    "Dataset",
    "Pictures",
    "Sample",
    "SyntheticDataset",
    "open_dataset",
    "open_streets",
    "read_contents",
    "read_picture",
]

#: First street of each split of ``synthetic:``. A split owns the million seeds from there on, so
#: that no street of one split is ever seen in another. "demo" is for clips that are shown.
SPLIT_SEEDS = {"train": 0, "val": 1_000_000, "test": 2_000_000, "demo": 3_000_000}
_SEEDS_PER_SPLIT = 1_000_000

#: Samples that ``synthetic:`` takes from one street before it goes to the next.
FRAMES_PER_STREET = 4
# Frames between two samples of one street: far enough apart for the scene to have changed.
_STRIDE = 50

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_FORMS = "camvid:DIR, or synthetic: with options as in synthetic:?seed=100&size=360x480&frames=60"


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture and its truth.

    ``pixels``: (height, width, 3) uint8, BGR. ``labels``: (height, width) uint8, a class index
    per pixel, or the data set's ignore label. Both belong to the caller.
    """

    name: str
    pixels: Pixels
    labels: NDArray[np.uint8]


SampleT = TypeVar("SampleT")


class Pictures(ABC, Generic[SampleT]):
    """One split of a data set: a fixed sequence of samples, read when asked for.

    ``title`` is its name for a person, ``split`` the split it was opened with.
    """

    title: str
    split: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples, at least one."""

    @abstractmethod
    def sample(self, index: int) -> SampleT:
        """Sample ``index``, 0 ... len - 1, IndexError beyond.

        Raises DataError, which names the file, when it cannot be read or its labels do not fit.
        """

    @abstractmethod
    def hashes(self) -> dict[str, str]:
        """Sample name -> sha256 of its picture, in hexadecimal.

        The hash of a file is that of its bytes, and of a generated picture that of its pixels, so
        two sets that share a picture can be told (images to calibrate with are none to evaluate
        with). It reads every picture.
        """

    def __iter__(self) -> Iterator[SampleT]:
        for index in range(len(self)):
            yield self.sample(index)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.title} {self.split} has {len(self)} samples, not {index}")
        return index


class Dataset(Pictures[Sample]):
    """Pictures with a class per pixel; ``classes`` is what the labels mean."""

    classes: ClassList


def open_dataset(uri: str, split: str) -> Dataset:
    """The data set that ``uri`` names.

    ``camvid:DIR`` reads ``DIR/images/<split>/*`` with ``DIR/labels/<split>/*.png``: the same
    names, a class index per pixel, 11 where there is no label.

    ``synthetic:`` generates streets, with exact truth in CamVid's classes. Its options:
    ``seed`` (0: the first street within the split), ``size`` (360x480), ``frames`` (60: number
    of samples) and ``scene`` (as in `edgeseg.synthetic`). Splits: those of ``SPLIT_SEEDS``.

    Raises RequestError for a URI that is none of these, and DataError when the files are not as
    promised; the names of the files are compared here, their contents when a sample is read.
    """
    kind, colon, rest = uri.partition(":")
    if not colon:
        raise RequestError(f"a data set is {_FORMS}, and {uri!r} came")
    if kind == "camvid":
        if not rest:
            raise RequestError("camvid: needs the folder with images/ and labels/: camvid:DIR")
        return CamVidDataset(Path(rest).expanduser(), split)
    if kind == "synthetic":
        return open_streets(uri, split)
    if kind == "coco":
        raise RequestError(
            "coco: has objects and no class for every pixel, which is for instance models; "
            f"for a semantic one use {_FORMS}"
        )
    raise RequestError(f"a data set is {_FORMS}, and {uri!r} came")


class CamVidDataset(Dataset):
    """``images/<split>`` and ``labels/<split>`` below one folder, in the order of their names.

    A label without an image is no error, so that a part of the images can be evaluated; an image
    without a label is.
    """

    title = "CamVid"
    classes = CAMVID

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        self._pairs = _pairs(folder, split)

    def __len__(self) -> int:
        return len(self._pairs)

    def sample(self, index: int) -> Sample:
        image, label = self._pairs[self._checked(index)]
        pixels = read_picture(image, cv2.IMREAD_COLOR)
        labels = read_picture(label, cv2.IMREAD_UNCHANGED)
        if labels.ndim != 2 or labels.dtype != np.uint8:
            depth = "x".join(str(side) for side in labels.shape)
            raise DataError(
                f"a label is a grey 8-bit PNG with the class index of each pixel, and {label} is "
                f"{depth} {labels.dtype}; convert its colours to indices"
            )
        if labels.shape != pixels.shape[:2]:
            raise DataError(
                f"a label has the size of its image, and {label} is "
                f"{labels.shape[0]}x{labels.shape[1]} for {pixels.shape[0]}x{pixels.shape[1]}"
            )
        count = len(self.classes.names)
        strays = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
        strays = strays[(strays >= count) & (strays != self.classes.ignore)]
        if strays.size:
            raise DataError(
                f"labels are 0 to {count - 1}, or {self.classes.ignore} for none, "
                f"and {label} has {int(strays[0])}"
            )
        return Sample(image.stem, pixels, labels)

    def hashes(self) -> dict[str, str]:
        return {
            image.stem: hashlib.sha256(read_contents(image)).hexdigest() for image, _ in self._pairs
        }


class SyntheticDataset(Dataset):
    """Generated streets with exact truth: ``FRAMES_PER_STREET`` samples of each, spread in time.

    ``seed`` is that of the first street and ``size`` is (height, width) in pixels. Sample ``i`` is
    of street ``seed + i // FRAMES_PER_STREET``. ``scene`` None lets `edgeseg.synthetic` choose.
    """

    title = "synthetic streets"
    classes = CAMVID

    def __init__(
        self, *, split: str, seed: int, size: tuple[int, int], frames: int, scene: str | None = None
    ) -> None:
        self.split = split
        self._seed = seed
        self._size = size
        self._frames = frames
        self._scene = scene
        # Opening one street checks the scene and the size before anything is counted.
        self._street = self._opened(seed)
        self._street_seed = seed

    def __len__(self) -> int:
        return self._frames

    def sample(self, index: int) -> Sample:
        frame = self.frame(index)
        return Sample(self.name(index), frame.pixels, frame.class_map)

    def name(self, index: int) -> str:
        """Name of sample ``index``: its street, and its frame there."""
        street, turn = divmod(self._checked(index), FRAMES_PER_STREET)
        return f"street {self._seed + street} frame {turn * _STRIDE}"

    def frame(self, index: int) -> StreetFrame:
        """Sample ``index`` with all that the generator knows, the objects included."""
        street, turn = divmod(self._checked(index), FRAMES_PER_STREET)
        seed = self._seed + street
        if seed != self._street_seed:
            self._street, self._street_seed = self._opened(seed), seed
        return self._street.frame(turn * _STRIDE)

    def hashes(self) -> dict[str, str]:
        return {
            sample.name: hashlib.sha256(np.ascontiguousarray(sample.pixels).data).hexdigest()
            for sample in self
        }

    def _opened(self, seed: int) -> Street:
        # Imported here: painting the parts of a street takes time that camvid: need not spend.
        from edgeseg.synthetic import Street

        height, width = self._size
        return Street(height, width, seed=seed, frames=None, scene=self._scene)


def open_streets(uri: str, split: str) -> SyntheticDataset:
    """The data set of ``synthetic:`` and its options, all of them checked; see `open_dataset`."""
    rest = uri.partition(":")[2]
    if split not in SPLIT_SEEDS:
        raise RequestError(f"synthetic: has the splits {', '.join(SPLIT_SEEDS)}, not {split!r}")
    if rest and not rest.startswith("?"):
        raise RequestError(f"the options of synthetic: follow a question mark, and {uri!r} came")
    options = {"seed": "0", "size": "360x480", "frames": "60"}
    try:
        given = parse_qsl(rest[1:], keep_blank_values=True, strict_parsing=bool(rest[1:]))
    except ValueError:
        raise RequestError(
            f"the options of synthetic: are NAME=VALUE, joined by &, and {uri!r} came"
        ) from None
    for name, value in given:
        if name not in ("seed", "size", "frames", "scene"):
            raise RequestError(
                f"as a data set, synthetic: has the options seed, size, frames and scene, "
                f"and {name!r} came"
            )
        options[name] = value
    frames = _whole(options["frames"], "frames", low=1, high=_SEEDS_PER_SPLIT)
    streets = -(-frames // FRAMES_PER_STREET)
    seed = _whole(options["seed"], "seed", low=0, high=_SEEDS_PER_SPLIT - streets)
    return SyntheticDataset(
        split=split,
        seed=SPLIT_SEEDS[split] + seed,
        size=parse_size(options["size"]),
        frames=frames,
        scene=options.get("scene"),
    )


def _whole(text: str, name: str, *, low: int, high: int) -> int:
    """``text`` as a whole number from ``low`` to ``high``; RequestError otherwise."""
    # Not int(): that also takes "1_000", " 5 " and digits of other scripts.
    if not (text.isascii() and text.isdigit() and low <= int(text[:12]) <= high):
        raise RequestError(
            f"{name} of synthetic: is a whole number from {low} to {high}, and {text!r} came"
        )
    return int(text)


def _pairs(folder: Path, split: str) -> tuple[tuple[Path, Path], ...]:
    """(image, label) of every image of a split, by name."""
    if split in ("", ".", "..") or "/" in split or "\\" in split:
        raise RequestError(f"a split is the name of a folder below images/, and {split!r} came")
    images = _listed(folder, "images", split)
    labels = {path.stem: path for path in _listed(folder, "labels", split) if _is_png(path)}
    pictures = [path for path in images if path.suffix.lower() in _IMAGE_SUFFIXES]
    if not pictures:
        raise DataError(f"{folder / 'images' / split} holds no images")
    seen: dict[str, Path] = {}
    for picture in pictures:
        if picture.stem not in labels:
            wanted = folder / "labels" / split / f"{picture.stem}.png"
            raise DataError(f"every image has a label, and for {picture} there is no {wanted}")
        if picture.stem in seen:
            raise DataError(
                f"one label belongs to one image, and {seen[picture.stem].name} and "
                f"{picture.name} in {picture.parent} share theirs; take one away"
            )
        seen[picture.stem] = picture
    return tuple((picture, labels[stem]) for stem, picture in seen.items())


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _listed(folder: Path, part: str, split: str) -> list[Path]:
    """The files of ``folder/part/split`` by name, without hidden ones."""
    place = folder / part / split
    try:
        return sorted(
            path for path in place.iterdir() if path.is_file() and not path.name.startswith(".")
        )
    except OSError as error:
        above = place.parent
        splits = sorted(path.name for path in above.iterdir()) if above.is_dir() else []
        hint = f"{above} has {', '.join(splits)}" if splits else f"there is no {above}"
        if isinstance(error, NotADirectoryError | FileNotFoundError):
            raise DataError(
                f"camvid: reads DIR/images/{split} and DIR/labels/{split}, "
                f"and there is no folder {place}; {hint}"
            ) from error
        raise DataError(f"the folder {place} cannot be read ({error.strerror})") from error


def read_contents(path: Path) -> bytes:
    """The bytes of a file; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def read_picture(path: Path, mode: int) -> NDArray[np.uint8]:
    """The picture in a file; DataError if it is none, or cut short."""
    # Through memory and not cv2.imread, which has trouble with names outside the code page.
    contents = np.frombuffer(read_contents(path), np.uint8)
    picture = cv2.imdecode(contents, mode) if contents.size else None
    if picture is None:
        raise DataError(
            f"{path} is {'empty' if not contents.size else 'no image, or is cut short'}; "
            "copy or download it again"
        )
    return picture  # type: ignore[return-value]
