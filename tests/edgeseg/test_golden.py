"""The golden pair: the same picture everywhere, and what counts as the same answer."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edgeseg.errors import BundleError
from edgeseg.golden import AGREEMENT, Golden, golden_image


def test_picture_is_the_same_everywhere() -> None:
    # A bundle that was exported years ago holds what its model made of exactly these bytes.
    picture = golden_image(7, 384, 480)
    assert picture.shape == (384, 480, 3) and picture.dtype == np.uint8
    digest = hashlib.sha256(picture.tobytes()).hexdigest()
    assert digest == "18d25833965c310733f0eab0b95b7103d14937308f96e90f82cabed23bc6a1ec"


def test_picture_depends_on_the_seed_and_has_contrast() -> None:
    pictures = [golden_image(seed, 64, 96) for seed in range(4)]
    assert len({picture.tobytes() for picture in pictures}) == 4
    for picture in pictures:
        assert np.ptp(picture.reshape(-1, 3), axis=0).min() > 40


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (23, 25), (24, 24), (49, 48)])
def test_any_size(size: tuple[int, int]) -> None:
    picture = golden_image(0, *size)
    assert picture.shape == (*size, 3)
    class_map = picture[..., 0] // 32
    golden = Golden.of(0, class_map)
    assert len(golden.samples) == 2 * min(size[0], 48) * min(size[1], 48)
    assert golden.agreement(class_map) == 1.0


def test_agreement_is_the_share_of_sampled_pixels() -> None:
    class_map = np.zeros((96, 96), np.uint8)
    golden = Golden.of(1, class_map)
    changed = class_map.copy()
    changed[:48] = 1
    assert golden.agreement(changed) == 0.5
    assert golden.agreement(np.ones_like(class_map)) == 0.0
    one_pixel = class_map.copy()
    one_pixel[0, 0] = 1
    assert AGREEMENT < golden.agreement(one_pixel) < 1.0


def test_map_of_another_size_does_not_agree() -> None:
    golden = Golden.of(1, np.zeros((32, 48), np.uint8))
    assert golden.agreement(np.zeros((16, 48), np.uint8)) == 0.0


def test_json_round_trip() -> None:
    golden = Golden.of(12, golden_image(12, 32, 48)[..., 1])
    assert Golden.from_json(golden.to_json()) == golden
    assert "\n" not in golden.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"seed": 1}',
        '{"samples": "00"}',
        '{"seed": "x", "samples": "00"}',
        '{"seed": null, "samples": "00"}',
        '{"seed": 1, "samples": "0"}',
        '{"seed": 1, "samples": "zz"}',
    ],
)
def test_what_is_no_pair(text: str) -> None:
    with pytest.raises(BundleError, match=r"^the model's golden pair cannot be read"):
        Golden.from_json(text)
