"""Opening data sets, and everything that can be wrong with their files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgeseg.classes import CAMVID
from edgeseg.dataset import FRAMES_PER_STREET, SPLIT_SEEDS, open_dataset
from edgeseg.errors import DataError, RequestError
from edgeseg.synthetic import Street

SHARED = Path(__file__).resolve().parents[3] / "shared"


def save(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)
    return path


def picture(seed: int = 0, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def truth(seed: int = 0, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 12, (height, width)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CamVid folder of two samples, "a" and "b"."""
    for seed, stem in enumerate("ab"):
        save(tmp_path / f"images/val/{stem}.png", picture(seed))
        save(tmp_path / f"labels/val/{stem}.png", truth(seed))
    return tmp_path


def test_camvid_gives_what_the_files_hold(folder: Path) -> None:
    (folder / "images/val/.hidden.png").write_bytes(b"")
    (folder / "images/val/notes.txt").write_text("no image")
    save(folder / "labels/val/extra.png", truth())
    data = open_dataset(f"camvid:{folder}", "val")
    assert (len(data), data.title, data.split, data.classes) == (2, "CamVid", "val", CAMVID)
    for seed, sample in enumerate(data):
        assert sample.name == "ab"[seed]
        np.testing.assert_array_equal(sample.pixels, picture(seed))
        np.testing.assert_array_equal(sample.labels, truth(seed))
        assert sample.labels.dtype == np.uint8
    with pytest.raises(IndexError):
        data.sample(2)


def test_hashes_are_those_of_the_files(folder: Path) -> None:
    expected = {
        stem: hashlib.sha256((folder / f"images/val/{stem}.png").read_bytes()).hexdigest()
        for stem in "ab"
    }
    assert open_dataset(f"camvid:{folder}", "val").hashes() == expected


def break_nothing(folder: Path) -> None:
    """The control: an unbroken folder must not raise."""


def drop_label(folder: Path) -> None:
    (folder / "labels/val/b.png").unlink()


def drop_images(folder: Path) -> None:
    for path in (folder / "images/val").iterdir():
        path.unlink()


def drop_label_folder(folder: Path) -> None:
    (folder / "labels/val").rename(folder / "labels/train")


def two_of_a_name(folder: Path) -> None:
    save(folder / "images/val/b.jpg", picture())


def other_size(folder: Path) -> None:
    save(folder / "labels/val/b.png", truth(height=5))


def out_of_range(folder: Path) -> None:
    labels = truth()
    labels[0, 0] = 12
    save(folder / "labels/val/b.png", labels)


def coloured_label(folder: Path) -> None:
    save(folder / "labels/val/b.png", picture())


def deep_label(folder: Path) -> None:
    save(folder / "labels/val/b.png", truth().astype(np.uint16))


def empty_image(folder: Path) -> None:
    (folder / "images/val/b.png").write_bytes(b"")


def not_an_image(folder: Path) -> None:
    (folder / "images/val/b.png").write_bytes(b"<html>not found</html>")


def label_cut_short(folder: Path) -> None:
    path = folder / "labels/val/b.png"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing, None),
        (drop_label, r"for .*b\.png there is no .*labels.val.b\.png"),
        (drop_images, "holds no images"),
        (drop_label_folder, "there is no folder .*labels.val; .* has train"),
        (two_of_a_name, r"b\.jpg and b\.png .* share"),
        (other_size, r"b\.png is 5x8 for 6x8"),
        (out_of_range, r"labels are 0 to 10, or 11 for none, and .*b\.png has 12"),
        (coloured_label, r"b\.png is 6x8x3 uint8"),
        (deep_label, r"b\.png is 6x8 uint16"),
        (empty_image, r"b\.png is empty"),
        (not_an_image, r"b\.png is no image"),
        (label_cut_short, r"labels.val.b\.png is no image, or is cut short"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_folders(folder: Path, damage: object, message: str | None) -> None:
    assert callable(damage)
    damage(folder)
    uri = f"camvid:{folder}"
    if message is None:
        assert len(list(open_dataset(uri, "val"))) == 2
        return
    with pytest.raises(DataError, match=message):
        list(open_dataset(uri, "val"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*nowhere.images"):
        open_dataset(f"camvid:{tmp_path / 'nowhere'}", "val")


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        ("camvid:", "val", "camvid:DIR"),
        ("camvid:x", "../val", "a split is the name of a folder"),
        ("coco:x", "val", "no class for every pixel, which is for instance models; .* use camvid"),
        ("ade20k:x", "val", "a data set is camvid:DIR"),
        ("some/folder", "val", "a data set is camvid:DIR"),
        ("synthetic:", "dev", "train, val, test, demo"),
        ("synthetic:city", "val", "question mark"),
        ("synthetic:?seed", "val", "NAME=VALUE"),
        ("synthetic:?fps=3", "val", "'fps' came"),
        ("synthetic:?frames=0", "val", "frames .* from 1"),
        ("synthetic:?frames=1e3", "val", "'1e3' came"),
        ("synthetic:?seed=-1", "val", "seed .* from 0"),
        ("synthetic:?seed=999999&frames=5", "val", "seed .* from 0 to 999998"),
        ("synthetic:?size=big", "val", "HEIGHTxWIDTH"),
        ("synthetic:?scene=moon", "val", "moon"),
    ],
)
def test_requests_that_cannot_be(uri: str, split: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_dataset(uri, split)


def test_synthetic_is_the_street_it_promises() -> None:
    frames = FRAMES_PER_STREET + 2
    data = open_dataset(f"synthetic:?seed=7&size=48x64&frames={frames}&scene=highway", "test")
    assert (len(data), data.classes) == (frames, CAMVID)
    samples = list(data)
    for index, sample in enumerate(samples):
        seed = SPLIT_SEEDS["test"] + 7 + index // FRAMES_PER_STREET
        number = int(sample.name.split()[-1])
        expected = Street(48, 64, seed=seed, frames=None, scene="highway").frame(number)
        assert sample.name.startswith(f"street {seed} ")
        np.testing.assert_array_equal(sample.pixels, expected.pixels)
        np.testing.assert_array_equal(sample.labels, expected.class_map)
    again = data.sample(1)
    np.testing.assert_array_equal(again.pixels, samples[1].pixels)
    assert len(set(data.hashes().values())) == frames


def test_no_street_is_in_two_splits() -> None:
    most = 4 * FRAMES_PER_STREET
    streets: dict[str, set[str]] = {}
    for split in SPLIT_SEEDS:
        data = open_dataset(f"synthetic:?seed=999996&size=32x32&frames={most}", split)
        names = {data.sample(index).name for index in (0, most - 1)}
        streets[split] = {name.split()[1] for name in names}
    first, last = (set.union(*streets.values()), sum(len(found) for found in streets.values()))
    assert len(first) == last == 2 * len(SPLIT_SEEDS)
    starts = sorted(SPLIT_SEEDS.values())
    for split, found in streets.items():
        after = [start for start in starts if start > SPLIT_SEEDS[split]]
        assert all(int(seed) < min(after, default=1 << 62) for seed in found), split


@pytest.mark.skipif(not (SHARED / "data/camvid").is_dir(), reason="needs the CamVid images")
def test_camvid_itself_opens() -> None:
    data = open_dataset(f"camvid:{SHARED / 'data/camvid'}", "val")
    assert len(data) == 101
    sample = data.sample(100)
    assert sample.pixels.shape == (360, 480, 3)
    assert sample.labels.shape == (360, 480)
