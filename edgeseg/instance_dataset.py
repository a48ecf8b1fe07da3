"""Pictures with the objects in them, opened by URI: COCO folders and generated streets."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgeseg.annotation import Annotation, run_lengths
from edgeseg.classes import CAMVID
from edgeseg.dataset import (
    Pictures,
    SyntheticDataset,
    open_streets,
    read_contents,
    read_picture,
)
from edgeseg.errors import DataError, RequestError
from edgeseg.frame import Pixels

__all__ = [
    "CocoDataset",
    "InstanceDataset",
    "InstanceSample",
    "SyntheticInstances",
    "open_instances",
]

_FORMS = "coco:DIR, or synthetic: with options as in synthetic:?seed=100&size=360x480&frames=60"


@dataclass(frozen=True, eq=False)
class InstanceSample:
    """One picture and its objects.

    ``number`` is the picture's id in the data set. ``pixels``: (height, width, 3) uint8, BGR; it
    belongs to the caller.
    """

    name: str
    number: int
    pixels: Pixels
    annotations: tuple[Annotation, ...]


class InstanceDataset(Pictures[InstanceSample]):
    """Pictures with objects.

    ``classes`` are the names of their classes, in the order of `Annotation.label`.
    """

    classes: tuple[str, ...]


def open_instances(uri: str, split: str) -> InstanceDataset:
    """The data set that ``uri`` names.

    ``coco:DIR`` reads ``DIR/annotations/instances_<split>.json`` with ``DIR/<split>/*.jpg``.

    ``synthetic:`` generates streets, with the cars, pedestrians and bicyclists in them as exact
    truth; its options and splits are those of `edgeseg.dataset.open_dataset`.

    Raises RequestError for a URI that is none of these, and DataError when the files are not as
    promised: annotations are checked here, pictures when a sample is read.
    """
    kind, colon, rest = uri.partition(":")
    if colon and kind == "coco":
        if not rest:
            raise RequestError("coco: needs the folder with annotations/ in it: coco:DIR")
        return CocoDataset(Path(rest).expanduser(), split)
    if colon and kind == "synthetic":
        return SyntheticInstances(open_streets(uri, split))
    if colon and kind == "camvid":
        raise RequestError(
            "camvid: has a class for every pixel and no objects, which is for semantic models; "
            f"for an instance model use {_FORMS}"
        )
    raise RequestError(f"a data set of objects is {_FORMS}, and {uri!r} came")


class CocoDataset(InstanceDataset):
    """A folder in the layout of COCO 2017 (Lin et al., arXiv 1405.0312), by picture id.

    The pictures are those of the annotation file, with objects or without. Classes are in the
    order of their category ids, which may have gaps.
    """

    title = "COCO"

    def __init__(self, folder: Path, split: str) -> None:
        if split in ("", ".", "..") or "/" in split or "\\" in split:
            raise RequestError(
                f"a split is the name of a folder with pictures, as val2017, and {split!r} came"
            )
        self.split = split
        path = folder / "annotations" / f"instances_{split}.json"
        content = _read_annotations(path, folder)
        try:
            labels = self._take_categories(content)
            self._images = _images(content)
            self._annotations = _annotations(content, self._images, labels)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is not in COCO's format ({_reason(error)})") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        self._numbers = sorted(self._images)
        if not self._numbers:
            raise DataError(f"{path} lists no pictures")
        self._pictures = folder / split
        self._check_files()

    def __len__(self) -> int:
        return len(self._numbers)

    def sample(self, index: int) -> InstanceSample:
        number = self._numbers[self._checked(index)]
        name, height, width = self._images[number]
        path = self._pictures / name
        # COCO's coordinates are those of the pixels as stored: a note in the file that says which
        # way up the camera was held must not turn them.
        pixels = read_picture(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{path} is {pixels.shape[0]}x{pixels.shape[1]}, and its annotations are for "
                f"{height}x{width}"
            )
        return InstanceSample(path.stem, number, pixels, self._annotations.get(number, ()))

    def hashes(self) -> dict[str, str]:
        names = [self._images[number][0] for number in self._numbers]
        return {
            Path(name).stem: hashlib.sha256(read_contents(self._pictures / name)).hexdigest()
            for name in names
        }

    def _take_categories(self, content: Mapping[str, Any]) -> dict[int, int]:
        """Sets ``classes``; returns category id -> label."""
        names = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        ids = sorted(names)
        self.classes = tuple(names[number] for number in ids)
        if not ids or len(ids) != len(content["categories"]):
            raise DataError("categories are one or more, each with an id of its own")
        folded = {name.casefold() for name in self.classes}
        if len(folded) != len(ids):
            raise DataError("two categories have the same name")
        return {number: label for label, number in enumerate(ids)}

    def _check_files(self) -> None:
        try:
            there = {path.name for path in self._pictures.iterdir()}
        except OSError as error:
            raise DataError(
                f"coco: reads the pictures in {self._pictures}, and it cannot be read "
                f"({error.strerror})"
            ) from error
        missing = [name for name, _, _ in self._images.values() if name not in there]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(self._images)} annotated pictures are not in "
                f"{self._pictures}, {min(missing)} first; evaluate with an annotation file of "
                "those that are"
            )


class SyntheticInstances(InstanceDataset):
    """The objects of generated streets: cars, pedestrians and bicyclists with their bicycles.

    ``streets``: the pictures, the same as for a semantic model. What is hidden behind something
    nearer is no part of an object's mask or box. An object of which fewer than ``LEAST_SEEN``
    pixels are seen is marked as a crowd, so that it is neither missed nor invented.
    """

    #: What the Cityscapes benchmark asks of an object, too. Nothing is painted as small as that:
    #: it is what looks out from behind something else, or over the border.
    LEAST_SEEN = 100

    title = SyntheticDataset.title
    classes = ("car", "pedestrian", "bicyclist")

    def __init__(self, streets: SyntheticDataset) -> None:
        self.split = streets.split
        self._streets = streets
        self._labels = {CAMVID.names.index(name): label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._streets)

    def sample(self, index: int) -> InstanceSample:
        frame = self._streets.frame(index)
        annotations = []
        for instance in frame.instances:
            left, top, right, bottom = instance.box
            annotations.append(
                Annotation(
                    label=self._labels[instance.label],
                    box=(left, top, right - left, bottom - top),
                    area=instance.area,
                    crowd=instance.area < self.LEAST_SEEN,
                    segmentation=run_lengths(frame.instance_map == instance.id),
                )
            )
        return InstanceSample(
            self._streets.name(index), index + 1, frame.pixels, tuple(annotations)
        )

    def hashes(self) -> dict[str, str]:
        return self._streets.hashes()


def _read_annotations(path: Path, folder: Path) -> Mapping[str, Any]:
    """The annotation file, its lists not yet looked at."""
    try:
        content = path.read_bytes()
    except OSError as error:
        splits = sorted(
            found.stem.removeprefix("instances_")
            for found in (folder / "annotations").glob("instances_*.json")
        )
        hint = f"; the splits there are {', '.join(splits)}" if splits else ""
        raise DataError(
            f"coco: reads its annotations from {path}, which cannot be read "
            f"({error.strerror}){hint}"
        ) from error
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is no JSON, or is cut short ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not in COCO's format (it holds a {type(found).__name__})")
    return found


def _images(content: Mapping[str, Any]) -> dict[int, tuple[str, int, int]]:
    """Picture id -> (file name, height, width)."""
    images: dict[int, tuple[str, int, int]] = {}
    for entry in content["images"]:
        number = int(entry["id"])
        if number in images:
            raise DataError(f"two pictures have the id {number}")
        name = str(entry["file_name"])
        if Path(name).name != name:
            raise DataError(f"a file name has no folder in it, and {name!r} does")
        images[number] = (name, int(entry["height"]), int(entry["width"]))
    return images


def _annotations(
    content: Mapping[str, Any], images: Mapping[int, object], labels: Mapping[int, int]
) -> dict[int, tuple[Annotation, ...]]:
    """Picture id -> its objects, in the order of the file."""
    found: dict[int, list[Annotation]] = defaultdict(list)
    for entry in content["annotations"]:
        number, category = int(entry["image_id"]), int(entry["category_id"])
        if number not in images:
            raise DataError(f"annotation {entry.get('id')} is of picture {number}, not listed")
        if category not in labels:
            raise DataError(f"annotation {entry.get('id')} is of category {category}, not listed")
        x, y, width, height = (float(value) for value in entry["bbox"])
        try:
            annotation = Annotation(
                label=labels[category],
                box=(x, y, width, height),
                area=float(entry["area"]),
                crowd=bool(entry.get("iscrowd", 0)),
                segmentation=_segmentation(entry.get("segmentation")),
            )
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"annotation {entry.get('id')}: {_reason(error)}") from error
        found[number].append(annotation)
    return {number: tuple(objects) for number, objects in found.items()}


def _segmentation(value: object) -> list[list[float]] | dict[str, Any] | None:
    """Polygons or run lengths, checked as far as pycocotools does not."""
    if not value:
        return None
    if isinstance(value, dict):
        counts = value["counts"]
        if not isinstance(counts, list | str) or len(value["size"]) != 2:
            raise DataError("run lengths are {size: [height, width], counts: list or text}")
        return {"size": [int(side) for side in value["size"]], "counts": counts}
    polygons = [_polygon(part) for part in value] if isinstance(value, Iterable) else []
    if not polygons:
        raise DataError(f"an outline is polygons or run lengths, and {type(value).__name__} came")
    return polygons


def _polygon(values: Iterable[float]) -> list[float]:
    polygon = [float(value) for value in values]
    if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
        raise DataError(
            f"a polygon is three or more corners, x and y each, and {len(polygon)} numbers came"
        )
    return polygon


def _reason(error: Exception) -> str:
    """What an error says, or what a missing key means."""
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
