"""Pictures and labels stay together, whatever is done to them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

# The file itself needs no torch; the folder it is in is the workstation's.
pytest.importorskip("torch", reason="the workstation side needs torch")

from edgeseg.export.augment import Augmentation

IGNORE = 11
GREY = 114


def scene(seed: int, height: int = 60, width: int = 80) -> tuple[NDArray[np.uint8], ...]:
    """Large blocks of labels 0 ... 9, and a picture whose channels are 20 times the label."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, (height // 20, width // 20)).astype(np.uint8)
    labels = labels.repeat(20, axis=0).repeat(20, axis=1)
    return np.repeat((20 * labels)[..., None], 3, axis=2), labels


def plain(crop: tuple[int, int], full_height: int = 60, **changes: object) -> Augmentation:
    """Geometry only."""
    return Augmentation(crop=crop, full_height=full_height, colour=0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("crop", [(32, 64), (96, 64), (128, 160)])
def test_labels_follow_the_pixels(seed: int, crop: tuple[int, int]) -> None:
    pixels, labels = scene(seed)
    found, truth = plain(crop)(pixels, labels, IGNORE, np.random.default_rng(seed))
    assert found.shape == (*crop, 3)
    assert truth.shape == crop
    assert found.dtype == truth.dtype == np.uint8
    assert found.flags.c_contiguous
    assert truth.flags.c_contiguous
    assert set(np.unique(truth)) <= {*np.unique(labels), IGNORE}
    inside = truth != IGNORE
    assert (found[~inside] == GREY).all()
    # Pixels are interpolated at borders of blocks, labels are not: there, half a step may differ.
    distance = np.abs(found[..., 0].astype(int) - 20 * truth.astype(int))[inside]
    assert inside.any()
    assert (distance == 0).mean() > 0.75
    # An interpolated pixel lies between the two labels at a border, never far from both.
    near = np.pad(20 * truth.astype(int), 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(near, (5, 5)).reshape(*crop, 25)
    low = np.where(windows == 20 * IGNORE, 999, windows).min(-1)
    high = np.where(windows == 20 * IGNORE, -1, windows).max(-1)
    values = found[..., 0].astype(int)
    assert ((values >= low - 1) & (values <= high + 1))[inside].all()


def test_the_identity_changes_nothing() -> None:
    pixels, labels = scene(1)
    still = plain((60, 80), scale=(1.0, 1.0), aspect=1.0, flip=False)
    found, truth = still(pixels, labels, IGNORE, np.random.default_rng(0))
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(truth, labels)


def test_a_flip_turns_both() -> None:
    pixels, labels = scene(2)
    flips = plain((60, 80), scale=(1.0, 1.0), aspect=1.0)
    seen = set()
    for seed in range(12):
        found, truth = flips(pixels, labels, IGNORE, np.random.default_rng(seed))
        turned = bool((truth == labels[:, ::-1]).all())
        step = -1 if turned else 1
        np.testing.assert_array_equal(truth, labels[:, ::step])
        np.testing.assert_array_equal(found, pixels[:, ::step])
        seen.add(turned)
    assert seen == {True, False}


def test_the_border_of_a_small_picture_is_ignored() -> None:
    pixels, labels = scene(3)
    small = plain((120, 160), scale=(0.5, 0.5), aspect=1.0, flip=False)
    places = set()
    for seed in range(6):
        found, truth = small(pixels, labels, IGNORE, np.random.default_rng(seed))
        inside = truth != IGNORE
        assert inside.sum() == 30 * 40
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert inside[rows[0] : rows[0] + 30, columns[0] : columns[0] + 40].all()
        assert (found[~inside] == GREY).all()
        places.add((rows[0], columns[0]))
    assert len(places) > 1


@pytest.mark.parametrize("full_height", [30, 60, 120])
def test_scale_one_is_full_height(full_height: int) -> None:
    pixels, labels = scene(4)
    one = plain((160, 192), full_height, scale=(1.0, 1.0), aspect=1.0, flip=False)
    _, truth = one(pixels, labels, IGNORE, np.random.default_rng(0))
    assert (truth != IGNORE).any(axis=1).sum() == full_height
    assert (truth != IGNORE).any(axis=0).sum() == full_height * 4 // 3


def test_the_generator_decides_everything() -> None:
    pixels, labels = scene(5)
    kept = pixels.copy(), labels.copy()
    whole = Augmentation(crop=(64, 64), full_height=60)
    first, again, other = (
        whole(pixels, labels, IGNORE, np.random.default_rng(seed)) for seed in (7, 7, 8)
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[0] != other[0]).any()
    # What was given is still what it was.
    np.testing.assert_array_equal(pixels, kept[0])
    np.testing.assert_array_equal(labels, kept[1])


def test_colour_leaves_labels_alone() -> None:
    pixels, labels = scene(6)
    changed = 0
    for seed in range(6):
        rng = (np.random.default_rng(seed), np.random.default_rng(seed))
        found, truth = Augmentation(crop=(64, 64), full_height=60)(pixels, labels, IGNORE, rng[0])
        dull, same = plain((64, 64))(pixels, labels, IGNORE, rng[1])
        np.testing.assert_array_equal(truth, same)
        changed += int((found != dull).any())
    assert changed == 6


def test_weakened_to_nothing_only_crops_and_flips() -> None:
    full = Augmentation(crop=(32, 40), full_height=32, scale=(0.5, 2.0), aspect=1.5, colour=0.8)
    none = full.weakened(0.0)
    assert (none.scale, none.aspect, none.colour) == ((1.0, 1.0), 1.0, 0.0)
    half = full.weakened(0.5)
    assert half.scale == pytest.approx((0.5**0.5, 2**0.5)) and half.colour == 0.4
    assert full.weakened(1.0) == full
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    out, _ = none(pixels, np.zeros((32, 40), np.uint8), 255, rng)
    assert np.array_equal(out, pixels) or np.array_equal(out, pixels[:, ::-1])
