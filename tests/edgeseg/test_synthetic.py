"""Synthetic streets: the same seed gives the same bytes, and the ground truth is consistent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest

from edgeseg.classes import CAMVID
from edgeseg.errors import RequestError
from edgeseg.synthetic import SCENES, Street, StreetFrame

COUNTABLE = tuple(CAMVID.names.index(name) for name in ("car", "pedestrian", "bicyclist"))


def same(first: StreetFrame, second: StreetFrame) -> bool:
    return (
        np.array_equal(first.pixels, second.pixels)
        and np.array_equal(first.class_map, second.class_map)
        and np.array_equal(first.instance_map, second.instance_map)
        and first.instances == second.instances
    )


def check(frame: StreetFrame, height: int, width: int) -> None:
    """Everything that the maps and the list of instances promise about each other."""
    assert frame.pixels.shape == (height, width, 3)
    assert frame.class_map.shape == frame.instance_map.shape == (height, width)
    assert frame.pixels.dtype == frame.class_map.dtype == np.uint8
    assert frame.instance_map.dtype == np.uint16
    assert frame.class_map.max() < len(CAMVID.names)
    assert np.array_equal(np.isin(frame.class_map, COUNTABLE), frame.instance_map > 0)
    ids = [instance.id for instance in frame.instances]
    assert ids == sorted(set(np.unique(frame.instance_map).tolist()) - {0})
    for instance in frame.instances:
        mine = frame.instance_map == instance.id
        rows, columns = np.nonzero(mine)
        assert instance.label in COUNTABLE
        assert set(frame.class_map[mine].tolist()) == {instance.label}
        assert instance.area == len(rows)
        assert instance.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_frames_do_not_depend_on_the_order_of_calls() -> None:
    forwards = Street(120, 160, seed=5)
    backwards = Street(120, 160, seed=5)
    indices = (0, 1, 40, 299)
    first = {index: forwards.frame(index) for index in indices}
    second = {index: backwards.frame(index) for index in reversed(indices)}
    assert all(same(first[index], second[index]) for index in indices)
    assert all(same(first[index], forwards.frame(index)) for index in indices)


def test_threads_get_the_same_frames() -> None:
    street = Street(96, 128, seed=8)
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(street.frame, range(24)))
    other = Street(96, 128, seed=8)
    assert all(same(frame, other.frame(index)) for index, frame in enumerate(parallel))


def test_frames_belong_to_the_caller() -> None:
    street = Street(96, 128, seed=2)
    frame = street.frame(3)
    before = street.frame(3)
    frame.pixels[:] = 0
    frame.class_map[:] = 0
    frame.instance_map[:] = 0
    assert same(street.frame(3), before)


def test_seeds_differ() -> None:
    first, second = (Street(96, 128, seed=seed, scene="city").frame(0) for seed in (1, 2))
    assert not np.array_equal(first.pixels, second.pixels)
    assert not np.array_equal(first.class_map, second.class_map)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (33, 201), (320, 180), (360, 480), (300, 37)]
)
def test_any_size(scene: str, height: int, width: int) -> None:
    for seed in range(3):
        street = Street(height, width, seed=seed, scene=scene)
        for index in (0, 77, 240):
            check(street.frame(index), height, width)


@pytest.mark.parametrize(
    ("scene", "absent"),
    [
        ("city", set()),
        ("suburb", set()),
        ("highway", {"pavement", "pedestrian", "bicyclist"}),
    ],
)
def test_every_class_of_a_scene_appears(scene: str, absent: set[str]) -> None:
    pixels = np.zeros(len(CAMVID.names), np.int64)
    for seed in range(8):
        street = Street(180, 240, seed=seed, scene=scene)
        for index in (10, 130, 250):
            labels = street.frame(index).class_map
            pixels += np.bincount(labels.ravel(), minlength=len(pixels))
    share = dict(zip(CAMVID.names, pixels / pixels.sum(), strict=True))
    assert {name for name, part in share.items() if part == 0} == absent
    assert all(part > 0.0015 for name, part in share.items() if name not in absent), share
    assert 0.2 < share["road"] < 0.5
    assert 0.08 < share["sky"] < 0.45


def test_all_scenes_are_chosen_by_some_seed() -> None:
    assert {Street(32, 32, seed=seed).scene for seed in range(24)} == set(SCENES)


@pytest.mark.parametrize("scene", SCENES)
def test_the_street_moves(scene: str) -> None:
    street = Street(120, 160, seed=11, scene=scene)
    near, next_, far = (street.frame(index).class_map for index in (50, 51, 200))
    assert 0 < np.mean(near != next_) < 0.15
    assert np.mean(near != next_) < np.mean(near != far)


def test_instances_keep_their_id() -> None:
    kept = seen = 0
    for seed in range(4):
        street = Street(180, 240, seed=seed, scene="city")
        previous = street.frame(0)
        for index in range(1, 12):
            current = street.frame(index)
            now = {instance.id: instance for instance in current.instances}
            for old in previous.instances:
                if old.area < 60:
                    continue
                seen += 1
                new = now.get(old.id)
                if new is None or new.label != old.label:
                    continue
                x0, y0 = max(old.box[0], new.box[0]), max(old.box[1], new.box[1])
                x1, y1 = min(old.box[2], new.box[2]), min(old.box[3], new.box[3])
                kept += x1 > x0 and y1 > y0
            previous = current
    assert seen > 100
    assert kept > 0.95 * seen


def test_a_recycled_object_is_a_new_instance() -> None:
    # A loop of the town takes at most 32 seconds in the city: nobody parked is met twice.
    street = Street(120, 160, seed=3, scene="city", frames=None)
    early = {
        instance.id for index in range(0, 60, 20) for instance in street.frame(index).instances
    }
    late = {
        instance.id for index in range(1800, 1860, 20) for instance in street.frame(index).instances
    }
    lead = early & late
    assert early and late
    assert len(lead) <= 1


def test_class_and_picture_agree() -> None:
    """Labels move with the picture: class borders lie where the picture has edges."""
    street = Street(240, 320, seed=4, scene="city")
    on, all_ = [], []
    for index in (20, 90, 160):
        frame = street.frame(index)
        grey = frame.pixels.astype(np.float64).mean(axis=2)
        step = np.abs(np.diff(grey, axis=1))
        border = np.diff(frame.class_map.astype(int), axis=1) != 0
        on.append(step[border].mean())
        all_.append(step[~border].mean())
    assert np.mean(on) > 4 * np.mean(all_)


def test_length_and_iteration() -> None:
    street = Street(32, 48, seed=1, frames=3, fps=10)
    assert len(street) == street.frames == 3
    assert (street.height, street.width, street.seed, street.fps) == (32, 48, 1, 10.0)
    frames = list(street)
    assert len(frames) == 3
    assert all(same(frame, street.frame(index)) for index, frame in enumerate(frames))


def test_endless() -> None:
    street = Street(32, 48, seed=1, frames=None)
    assert street.frames is None
    with pytest.raises(TypeError, match="endless"):
        len(street)
    assert len(list(islice(street, 4))) == 4
    check(street.frame(10_000_000), 32, 48)


def test_time_is_index_over_fps() -> None:
    slow, fast = (Street(64, 96, seed=6, fps=fps) for fps in (15, 30))
    assert np.array_equal(slow.frame(10).class_map, fast.frame(20).class_map)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"height": 31}, "height.*31"),
        ({"width": 8193}, "width.*8193"),
        ({"height": 48.0}, "height.*48.0"),
        ({"seed": -1}, "seed.*-1"),
        ({"frames": 0}, "frames.*got 0"),
        ({"fps": 0}, "fps.*got 0"),
        ({"fps": float("nan")}, "fps.*nan"),
        ({"scene": "beach"}, "city, suburb, highway, got 'beach'"),
    ],
)
def test_wrong_arguments(wrong: dict[str, object], said: str) -> None:
    arguments: dict[str, object] = {"height": 32, "width": 32, **wrong}
    with pytest.raises(RequestError, match=said):
        Street(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 5, 6])
def test_frames_outside_the_clip(index: int) -> None:
    with pytest.raises(RequestError, match="from 0 to 4"):
        Street(32, 32, frames=5).frame(index)
