"""Steps after the network, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeseg.borders import border_step, refine_borders
from edgeseg.classes import CAMVID
from edgeseg.errors import RequestError
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.postprocess import NOTHING_MORE, Postprocessing, rescored
from edgeseg.result import Outputs, result_of
from edgeseg.spec import ModelSpec, Preprocessing

OBJECTS = ModelSpec(
    name="objects",
    architecture="none",
    task="instance",
    height=24,
    width=32,
    classes=CAMVID.names,
    colours=CAMVID.colours,
    ignore=CAMVID.ignore,
    preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), order="rgb"),
    capacity=40,
    mask_height=12,
    mask_width=16,
)
CLASSES = replace(OBJECTS, name="classes", task="semantic", capacity=0, mask_height=0, mask_width=0)


def found(count: int, seed: int = 0, labels: int = 3) -> InstanceOutputs:
    """Rectangles of levels, many of which overlap, best score first."""
    random = np.random.default_rng(seed)
    masks = np.zeros((count, 12, 16), np.uint8)
    for mask in masks:
        top, left = random.integers(0, 4), random.integers(0, 6)
        bottom, right = top + random.integers(0, 9), left + random.integers(0, 11)
        mask[top:bottom, left:right] = random.integers(90, 256, mask[top:bottom, left:right].shape)
    return InstanceOutputs(
        boxes=np.tile(np.array([0, 0, 32, 24], np.float32), (count, 1)),
        scores=np.sort(random.random(count).astype(np.float32))[::-1].copy(),
        labels=random.integers(0, labels, count).astype(np.int32),
        masks=masks,
        network_ns=5,
    )


def test_by_default_nothing_changes() -> None:
    outputs = found(9)
    assert NOTHING_MORE.instances(outputs) is outputs
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    frame, geometry = Frame.of(pixels), Geometry.between(48, 64, OBJECTS)
    plain = InstanceResult.from_outputs(outputs, frame, geometry, OBJECTS)
    same = result_of(outputs, frame, geometry, OBJECTS, NOTHING_MORE)
    assert isinstance(same, InstanceResult)
    assert same.outputs is outputs
    assert same.mask_bits().tobytes() == plain.mask_bits().tobytes()
    assert same.rles() == plain.rles()
    class_map = np.random.default_rng(1).integers(0, 3, (24, 32)).astype(np.uint8)
    classes = result_of(Outputs(class_map), frame, geometry, CLASSES)
    np.testing.assert_array_equal(classes.maps()["classes"], geometry.restore(class_map))


@pytest.mark.parametrize("seed", range(4))
def test_scores_times_how_sure_the_mask_is(seed: int) -> None:
    outputs = found(20, seed)
    expected = []
    for score, mask in zip(outputs.scores.tolist(), outputs.masks, strict=True):
        on = [int(level) for level in mask.ravel() if level > 127]
        expected.append(score * sum(on) / len(on) / 255 if on else 0.0)
    again = rescored(outputs)
    order = sorted(range(20), key=lambda index: -np.float32(expected[index]))
    np.testing.assert_allclose(again.scores, [expected[index] for index in order], rtol=1e-6)
    assert again.masks.tobytes() == outputs.masks[order].tobytes()
    assert again.labels.tolist() == outputs.labels[order].tolist()
    assert (np.diff(again.scores) <= 0).all()


def test_nothing_found_has_nothing_to_rescore() -> None:
    assert len(rescored(found(0)).scores) == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
def test_refined_masks_are_those_of_the_whole_frame() -> None:
    random = np.random.default_rng(4)
    geometry = Geometry.between(61, 83, OBJECTS)
    pixels = random.integers(0, 80, (61, 83, 3)).astype(np.uint8)
    outputs = found(12, 5)
    small = np.array([[3, 4, 9, 11], [30, 20, 40, 30], [0, 0, 0, 0], [np.nan, 0, 3, 3]], np.float32)
    outputs = replace(outputs, boxes=np.concatenate([outputs.boxes[4:], small]))
    frame = Frame.of(pixels)
    plain = InstanceResult.from_outputs(outputs, frame, geometry, OBJECTS)
    steps = Postprocessing(refine=True)
    refined = result_of(outputs, frame, geometry, OBJECTS, steps)
    assert isinstance(refined, InstanceResult)
    step = border_step(geometry)
    expected = np.array(
        [
            refine_borders(mask.astype(np.uint8), pixels, step, compiled=False)
            for mask in plain.masks
        ]
    )
    np.testing.assert_array_equal(refined.masks, expected.astype(bool))
    assert (refined.masks != plain.masks).any()
    # All forms are of the refined masks.
    bits = np.unpackbits(refined.mask_bits(), axis=-1, count=83)
    np.testing.assert_array_equal(bits, expected)
    assert refined.frame_masks.areas().tolist() == expected.sum(axis=(1, 2)).tolist()
    assert [rle["size"] for rle in refined.rles()] == [[61, 83]] * 12
    pycocotools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    decoded = np.stack([pycocotools.decode(rle) for rle in refined.rles()])
    np.testing.assert_array_equal(decoded, expected)


def test_refined_classes() -> None:
    random = np.random.default_rng(6)
    geometry = Geometry.between(48, 64, CLASSES)
    pixels = random.integers(0, 60, (48, 64, 3)).astype(np.uint8)
    class_map = random.integers(0, 3, (24, 32)).astype(np.uint8)
    confidence = random.integers(0, 256, (24, 32)).astype(np.uint8)
    outputs = Outputs(class_map, confidence)
    result = result_of(outputs, Frame.of(pixels), geometry, CLASSES, Postprocessing(refine=True))
    restored = geometry.restore(class_map)
    expected = refine_borders(restored, pixels, border_step(geometry), compiled=False)
    assert (expected != restored).any()
    np.testing.assert_array_equal(result.maps()["classes"], expected)
    np.testing.assert_array_equal(result.confidence, geometry.restore(confidence))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("refine", Postprocessing(refine=True)),
        ("rescore", Postprocessing(rescore=True)),
        (" refine + rescore ", Postprocessing(refine=True, rescore=True)),
    ],
)
def test_names_of_steps(text: str, steps: Postprocessing) -> None:
    assert Postprocessing.parse(text) == steps
    assert Postprocessing.parse(str(steps)) == steps


def test_no_steps_have_a_name_for_the_table() -> None:
    assert str(NOTHING_MORE) == "nothing more"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' came"),
        ("sharpen", "rescore and refine, joined by +, and 'sharpen' came"),
        ("refine,rescore", "joined by"),
        ("refine=1", "'refine=1' came"),
        ("refine+refine", "taken once, and refine came twice"),
    ],
)
def test_wrong_names(text: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        Postprocessing.parse(text)
    assert says in str(error.value)


def test_steps_that_do_not_suit_the_model() -> None:
    with pytest.raises(RequestError, match="rescore is for instances, and classes gives"):
        Postprocessing(rescore=True).check(CLASSES)
    for steps in (Postprocessing(refine=True), NOTHING_MORE):
        steps.check(CLASSES)
        steps.check(OBJECTS)
