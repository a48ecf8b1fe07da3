"""Opening pictures with objects, and everything that can be wrong with their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgeseg.classes import CAMVID
from edgeseg.dataset import FRAMES_PER_STREET, SPLIT_SEEDS, open_dataset
from edgeseg.errors import DataError, RequestError
from edgeseg.instance_dataset import SyntheticInstances, open_instances
from edgeseg.synthetic import Street

SHARED = Path(__file__).resolve().parents[3] / "shared"

Content = dict[str, Any]


def content() -> Content:
    """Two pictures, the second without objects; category ids with a gap, not in order."""
    return {
        "images": [
            {"id": 70, "file_name": "b.png", "height": 6, "width": 8},
            {"id": 3, "file_name": "a.png", "height": 5, "width": 9},
        ],
        "categories": [{"id": 17, "name": "Cat"}, {"id": 4, "name": "car"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 3,
                "category_id": 17,
                "bbox": [1, 2, 3, 2],
                "area": 5.5,
                "iscrowd": 0,
                "segmentation": [[1, 2, 4, 2, 4, 4]],
            },
            {
                "id": 2,
                "image_id": 3,
                "category_id": 4,
                "bbox": [0, 0, 9, 5],
                "area": 45,
                "iscrowd": 1,
                "segmentation": {"size": [5, 9], "counts": [0, 45]},
            },
            {"id": 3, "image_id": 3, "category_id": 4, "bbox": [0, 0, 2, 2], "area": 4},
        ],
    }


def write(folder: Path, written: object) -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "val").mkdir(exist_ok=True)
    for name, size in (("a.png", (5, 9)), ("b.png", (6, 8))):
        pixels = np.random.default_rng(size).integers(0, 256, (*size, 3)).astype(np.uint8)
        assert cv2.imwrite(str(folder / "val" / name), pixels)
    path = folder / "annotations/instances_val.json"
    path.write_text(written if isinstance(written, str) else json.dumps(written))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, content())
    return tmp_path


def test_coco_gives_what_the_files_hold(folder: Path) -> None:
    data = open_instances(f"coco:{folder}", "val")
    assert (len(data), data.title, data.split) == (2, "COCO", "val")
    assert data.classes == ("car", "Cat")
    first, second = data
    assert (first.name, first.number, second.name, second.number) == ("a", 3, "b", 70)
    np.testing.assert_array_equal(first.pixels, cv2.imread(str(folder / "val/a.png")))
    assert second.pixels.shape == (6, 8, 3) and second.annotations == ()
    cat, crowd, bare = first.annotations
    assert (cat.label, cat.box, cat.area, cat.crowd) == (1, (1, 2, 3, 2), 5.5, False)
    assert cat.segmentation == [[1, 2, 4, 2, 4, 4]]
    assert (crowd.label, crowd.crowd, bare.label, bare.crowd) == (0, True, 0, False)
    assert crowd.mask(5, 9).all() and bare.segmentation is None
    with pytest.raises(IndexError):
        data.sample(2)
    expected = {
        stem: hashlib.sha256((folder / f"val/{stem}.png").read_bytes()).hexdigest() for stem in "ab"
    }
    assert data.hashes() == expected


def test_pictures_are_read_as_they_are_stored(folder: Path) -> None:
    # EXIF's "turn by 90 degrees", put in front of a picture that is wider than high.
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    marked = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    turned = np.asarray(cv2.imdecode(np.frombuffer(marked, np.uint8), cv2.IMREAD_COLOR))
    assert turned.shape == (8, 6, 3)
    (folder / "val/b.png").write_bytes(marked)
    found = open_instances(f"coco:{folder}", "val").sample(1).pixels
    np.testing.assert_array_equal(
        found, cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    )


def changed(change: Callable[[Content], object]) -> Content:
    made = content()
    change(made)
    return made


BAD = [
    ("{", "is no JSON, or is cut short"),
    ("[]", "not in COCO's format .it holds a list"),
    (changed(lambda c: c.pop("images")), "not in COCO's format .no 'images'"),
    (changed(lambda c: c["annotations"][0].pop("bbox")), "no 'bbox'"),
    (changed(lambda c: c["annotations"][0].pop("area")), "annotation 1: no 'area'"),
    (changed(lambda c: c["images"].clear() or c["annotations"].clear()), "lists no pictures"),
    (changed(lambda c: c["categories"].clear()), "categories are one or more"),
    (changed(lambda c: c["categories"][0].update(id=4)), "each with an id of its own"),
    (changed(lambda c: c["categories"][0].update(name="CAR")), "same name"),
    (changed(lambda c: c["images"][0].update(id=3)), "two pictures have the id 3"),
    (changed(lambda c: c["images"][0].update(file_name="../x.png")), "no folder in it"),
    (changed(lambda c: c["annotations"][1].update(image_id=4)), "annotation 2 is of picture 4"),
    (changed(lambda c: c["annotations"][1].update(category_id=5)), "is of category 5, not listed"),
    (changed(lambda c: c["annotations"][1].update(bbox=[1, 2, 3])), "not in COCO's format"),
    (changed(lambda c: c["annotations"][1].update(bbox=[1, 2, -3, 4])), "annotation 2: a box and"),
    (changed(lambda c: c["annotations"][1].update(bbox="none")), "not in COCO's format"),
    (changed(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]])), "4 numbers came"),
    (changed(lambda c: c["annotations"][0].update(segmentation=[1, 2, 3, 4])), "annotation 1: "),
    (changed(lambda c: c["annotations"][0].update(segmentation=7)), "polygons or run lengths"),
    (changed(lambda c: c["annotations"][0].update(segmentation={"size": [5, 9]})), "no 'counts'"),
    (changed(lambda c: c["images"][0].update(file_name="c.png")), "1 of the 2 .* c.png first"),
]


@pytest.mark.parametrize(("written", "message"), BAD)
def test_annotations_that_cannot_be(tmp_path: Path, written: object, message: str) -> None:
    path = write(tmp_path, written)
    with pytest.raises(DataError, match=message) as raised:
        open_instances(f"coco:{tmp_path}", "val")
    assert str(tmp_path) in str(raised.value) or path.name in str(raised.value)


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"instances_train.json.*the splits there are val"):
        open_instances(f"coco:{folder}", "train")
    with pytest.raises(DataError, match=r"nowhere/annotations/instances_val.json.*No such file"):
        open_instances(f"coco:{folder / 'nowhere'}", "val")
    data = open_instances(f"coco:{folder}", "val")
    (folder / "val/a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a\.png is no image"):
        data.sample(0)
    assert cv2.imwrite(str(folder / "val/b.png"), np.zeros((8, 6, 3), np.uint8))
    with pytest.raises(DataError, match=r"b\.png is 8x6, and its annotations are for 6x8"):
        data.sample(1)
    (folder / "val/b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        data.sample(1)
    (folder / "val/a.png").unlink()
    (folder / "val").rmdir()
    with pytest.raises(DataError, match=r"reads the pictures in .*val, and it cannot be read"):
        open_instances(f"coco:{folder}", "val")


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        ("coco:", "val", "coco: needs the folder"),
        ("coco:x", "../val", "a split is the name of a folder"),
        ("camvid:x", "val", "no objects, which is for semantic models; for an instance model use"),
        ("somewhere", "val", "a data set of objects is coco:DIR, or synthetic:"),
        ("coco", "val", "a data set of objects is"),
        ("voc:x", "val", "a data set of objects is"),
        ("synthetic:", "night", "splits train, val, test, demo"),
        ("synthetic:?seeds=1", "val", "'seeds' came"),
    ],
)
def test_uris_that_cannot_be(uri: str, split: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_instances(uri, split)


def test_streets_have_the_objects_that_the_pixels_show() -> None:
    uri = f"synthetic:?size=200x280&frames={FRAMES_PER_STREET + 1}"
    data, semantic = open_instances(uri, "val"), open_dataset(uri, "val")
    assert len(data) == len(semantic) and data.hashes() == semantic.hashes()
    hidden = 0
    for number, (sample, other) in enumerate(zip(data, semantic, strict=True), 1):
        assert (sample.name, sample.number) == (other.name, number)
        np.testing.assert_array_equal(sample.pixels, other.pixels)
        seen = np.zeros(other.labels.shape, np.int64)
        for one in sample.annotations:
            mask = one.mask(*other.labels.shape)
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            box = (left, top, columns.max() + 1 - left, rows.max() + 1 - top)
            assert (one.box, one.area) == (box, mask.sum())
            assert one.crowd == (mask.sum() < SyntheticInstances.LEAST_SEEN)
            hidden += one.crowd
            assert {CAMVID.names[label] for label in other.labels[mask]} == {
                data.classes[one.label]
            }
            seen += mask
        # No object is left out, and none is there twice.
        countable = [CAMVID.names.index(name) for name in data.classes]
        np.testing.assert_array_equal(seen, np.isin(other.labels, countable))
    assert 0 < hidden < sum(len(sample.annotations) for sample in data)
    frame = Street(200, 280, seed=SPLIT_SEEDS["val"], frames=None).frame(0)
    np.testing.assert_array_equal(data.sample(0).pixels, frame.pixels)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real pictures in ../shared")
def test_real_coco_agrees_with_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.coco")
    path = SHARED / "data/coco_mini"
    data = open_instances(f"coco:{path}", "train2017")
    reference = coco.COCO(str(path / "annotations/instances_train2017.json"))
    assert len(data) == len(reference.imgs) == 192
    assert data.classes == tuple(one["name"] for one in reference.loadCats(reference.getCatIds()))
    crowds = 0
    crowded = {one["image_id"] for one in reference.anns.values() if one["iscrowd"]}
    numbers = sorted(reference.imgs)
    chosen = [index for index, number in enumerate(numbers) if number in crowded][:3]
    for index in (*chosen, *range(0, 192, 24)):
        sample = data.sample(index)
        theirs = reference.loadAnns(reference.getAnnIds(imgIds=sample.number))
        assert len(theirs) == len(sample.annotations)
        for ours, one in zip(sample.annotations, theirs, strict=True):
            expected = reference.annToRLE(one)
            height, width = sample.pixels.shape[:2]
            packed = ours.packed(height, width)
            assert packed == {"size": [height, width], "counts": expected["counts"]}
            assert ours.crowd == bool(one["iscrowd"])
            crowds += ours.crowd
    assert crowds
