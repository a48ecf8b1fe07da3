"""The golden pair: the same picture everywhere, and what counts as the same answer."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edgeseg.errors import BundleError
from edgeseg.golden import (
    AGREEMENT,
    Golden,
    InstanceGolden,
    golden_from_json,
    golden_image,
)
from edgeseg.instances import InstanceOutputs
from edgeseg.result import Outputs


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


# --- instances


def found(seed: int, count: int) -> InstanceOutputs:
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 200, (count, 2))
    return InstanceOutputs(
        np.concatenate([start, start + rng.uniform(40, 90, (count, 2))], 1).astype(np.float32),
        rng.random(count).astype(np.float32),
        rng.integers(0, 80, count).astype(np.int32),
        rng.integers(100, 256, (count, 30, 30)).astype(np.uint8),
    )


def test_detections_round_trip() -> None:
    golden = InstanceGolden.of(5, found(1, 30))
    assert len(golden.detections) == 20 and golden.is_proof
    read = golden_from_json(golden.to_json())
    assert isinstance(read, InstanceGolden) and "\n" not in golden.to_json()
    assert read.agreement_of(found(1, 30)) == 1.0
    assert read.agreement_of(found(2, 30)) == 0.0
    assert read.agreement_of(found(1, 0)) == 0.0
    assert read.agreement_of(Outputs(np.zeros((9, 9), np.uint8))) == 0.0
    semantic = Golden.of(3, np.zeros((9, 9), np.uint8))
    assert golden_from_json(semantic.to_json()) == semantic
    assert semantic.agreement_of(found(1, 3)) == 0.0


def test_order_does_not_matter_and_each_is_found_once() -> None:
    outputs = found(1, 10)
    golden = InstanceGolden.of(0, outputs)
    order = np.random.default_rng(0).permutation(10)
    fields = ("boxes", "scores", "labels", "masks")
    shuffled = InstanceOutputs(*(getattr(outputs, name)[order] for name in fields))
    assert golden.agreement_of(shuffled) == 1.0
    same = np.zeros(10, np.int64)
    repeated = InstanceOutputs(*(getattr(outputs, name)[same] for name in fields))
    assert golden.agreement_of(repeated) == 0.1


@pytest.mark.parametrize(
    ("field", "change", "agreement"),
    [
        ("boxes", 1.0, 1.0),
        ("boxes", 20.0, 0.0),
        ("scores", 0.04, 1.0),
        ("scores", 0.06, 0.0),
        ("labels", 1, 0.0),
        ("masks", -4, 1.0),
        ("masks", -50, 0.0),
    ],
)
def test_what_is_the_same_detection(field: str, change: float, agreement: float) -> None:
    outputs = found(3, 12)
    golden = InstanceGolden.of(0, outputs)
    values = getattr(outputs, field)
    values[:] = (values.astype(np.float64) + change).astype(values.dtype)
    assert golden.agreement_of(outputs) == agreement


def test_no_detections_are_no_proof() -> None:
    golden = golden_from_json(InstanceGolden.of(0, found(1, 0)).to_json())
    assert not golden.is_proof
    assert golden.agreement_of(found(1, 0)) == 1.0 and golden.agreement_of(found(1, 1)) == 0.0


def test_boxes_without_numbers_are_not_recorded() -> None:
    outputs = found(1, 3)
    outputs.boxes[1, 2] = np.nan
    golden = InstanceGolden.of(0, outputs)
    assert len(golden.detections) == 2 and "NaN" not in golden.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"detections": []}',
        '{"seed": 1, "detections": 7, "samples": 9, "promised": 0.8}',
        '{"seed": 1, "detections": [[1, 2]], "samples": 9, "promised": 0.8}',
        '{"seed": 1, "detections": [], "samples": 0, "promised": 0.8}',
        '{"seed": 1, "detections": [], "samples": "many", "promised": 0.8}',
    ],
)
def test_what_is_no_instance_pair(text: str) -> None:
    with pytest.raises(BundleError, match=r"^the model's golden pair cannot be read"):
        golden_from_json(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"seed": -1, "samples": ""}', "a seed of -1"),
        ('{"seed": 1.5, "samples": ""}', "a seed of '1.5'"),
        ('{"seed": true, "samples": ""}', "a seed of 'True'"),
        ('{"seed": 1, "seed": 2, "samples": ""}', "'seed' comes twice"),
        (f'{{"seed": 1, "samples": "{"00" * 2305}"}}', "more than 48x48 samples"),
        ('{"seed": 1, "samples": "", "promised": 0}', "a promised agreement of '0'"),
        ('{"seed": 1, "samples": "", "promised": 1.5}', "a promised agreement"),
        ('{"seed": 1, "samples": "", "promised": NaN}', "NaN is no number"),
        ('{"seed": 1, "detections": [], "samples": 9, "promised": -1}', "a promised agreement"),
        (
            '{"seed": 1, "detections": ['
            + ", ".join(["[0, 0.5, 0, 0, 1, 1, 0.5]"] * 21)
            + '], "samples": 9, "promised": 0.8}',
            "more than 20 detections",
        ),
        ("[" * 100_000, "levels"),
    ],
)
def test_pairs_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(BundleError, match=rf"golden pair cannot be read \(.*{says}"):
        golden_from_json(text)
