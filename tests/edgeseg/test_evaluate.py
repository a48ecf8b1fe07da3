"""Evaluation, with an engine that knows the answer, or part of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.classes import CAMVID, CITYSCAPES, ClassList
from edgeseg.dataset import Dataset, Sample, open_dataset
from edgeseg.engine.base import OneAtATime
from edgeseg.errors import DataError, RequestError
from edgeseg.evaluate import Scorer, check_classes, evaluate
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.spec import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="known",
    architecture="none",
    task="semantic",
    height=6,
    width=8,
    classes=CAMVID.names,
    colours=CAMVID.colours,
    ignore=CAMVID.ignore,
    preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), order="rgb"),
)


class Painted(Dataset):
    """Pictures that have their label, or a given one, as their blue channel."""

    title = "painted"
    split = "val"
    classes = CAMVID

    def __init__(self, truths: list[NDArray[np.uint8]]) -> None:
        self._truths = truths

    def __len__(self) -> int:
        return len(self._truths)

    def sample(self, index: int) -> Sample:
        labels = self._truths[index]
        shown = np.where(labels == CAMVID.ignore, 0, labels).astype(np.uint8)
        return Sample(f"number {index}", np.repeat(shown[..., None], 3, axis=2), labels)

    def hashes(self) -> dict[str, str]:
        return {}


class BlueEngine(OneAtATime):
    """Gives the blue channel as the class map; ``wrong`` classes are given as sky."""

    name = "blue"
    description = "blue"

    def __init__(self, spec: ModelSpec = SPEC, wrong: frozenset[int] = frozenset()) -> None:
        self.spec = spec
        self.wrong = wrong
        self.seen: list[Pixels] = []

    def run(self, pixels: Pixels) -> Outputs:
        assert pixels.shape == (self.spec.height, self.spec.width, 3)
        self.seen.append(pixels)
        class_map = pixels[..., 0].copy()
        class_map[np.isin(class_map, list(self.wrong))] = 0
        return Outputs(class_map)

    def close(self) -> None:
        """Nothing to give back."""


def truths(count: int, labels: int = 12) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(3)
    return [random.integers(0, labels, (6, 8)).astype(np.uint8) for _ in range(count)]


def test_the_right_answer_scores_one() -> None:
    progress: list[tuple[int, int]] = []
    found = evaluate(
        BlueEngine(),
        Painted(truths(4)),
        progress=lambda done, total: progress.append((done, total)),
    )
    assert (found.miou, found.pixel_accuracy, found.frames) == (1.0, 1.0, 4)
    assert (found.data, found.split, found.engine) == ("painted", "val", "blue")
    assert found.per_class == dict.fromkeys(CAMVID.names, 1.0)
    assert found.seconds > 0
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_wrong_classes_cost_what_they_must() -> None:
    pictures = truths(5)
    found = evaluate(BlueEngine(wrong=frozenset({3, 5})), Painted(pictures))
    counts = np.bincount(np.concatenate([labels.ravel() for labels in pictures]), minlength=12)
    sky = int(counts[0]) / int(counts[0] + counts[3] + counts[5])
    expected = dict.fromkeys(CAMVID.names, 1.0) | {"sky": sky, "road": 0.0, "tree": 0.0}
    assert found.per_class == pytest.approx(expected)
    assert found.miou == pytest.approx(math.fsum(expected.values()) / 11)
    right = int(counts[:11].sum() - counts[3] - counts[5])
    assert found.pixel_accuracy == pytest.approx(right / int(counts[:11].sum()))


def test_pictures_of_any_size_are_compared_at_their_own() -> None:
    big = [np.kron(labels, np.ones((3, 3), np.uint8)) for labels in truths(2, labels=1)]
    big[0][:9] = 3
    engine = BlueEngine(replace(SPEC, fit="letterbox"))
    found = evaluate(engine, Painted(big))
    assert found.miou > 0.9
    assert found.pixel_accuracy > 0.95


def test_classes_that_never_occur_are_none_in_json() -> None:
    labels = np.zeros((6, 8), np.uint8)
    found = evaluate(BlueEngine(), Painted([labels]))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["miou"] == 1.0
    assert read["frames"] == 1
    assert read["per_class"] == dict.fromkeys(CAMVID.names) | {"sky": 1.0}


def test_nothing_labelled_is_none_in_json() -> None:
    found = evaluate(BlueEngine(), Painted([np.full((6, 8), CAMVID.ignore, np.uint8)]))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (read["miou"], read["pixel_accuracy"]) == (None, None)


@pytest.mark.parametrize(
    ("limit", "indices"),
    [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))],
)
def test_a_limit_spreads_over_the_set(limit: int, indices: list[int]) -> None:
    pictures = [np.full((6, 8), index, np.uint8) for index in range(10)]
    engine = BlueEngine()
    assert evaluate(engine, Painted(pictures), limit=limit).frames == len(indices)
    assert [int(pixels[0, 0, 0]) for pixels in engine.seen] == indices


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one frame"):
        evaluate(BlueEngine(), Painted(truths(1)), limit=0)


def test_a_wrong_label_is_named_with_its_sample() -> None:
    pictures = truths(2)
    pictures[1][0, 0] = 77
    with pytest.raises(DataError, match=r"painted val, number 1: .* 77 came"):
        evaluate(BlueEngine(), Painted(pictures))


SWAPPED = (CAMVID.names[1], CAMVID.names[0], *CAMVID.names[2:])


@pytest.mark.parametrize(
    ("model", "truth", "message"),
    [
        (CAMVID.names, CAMVID, None),
        (tuple(name.upper() for name in CAMVID.names), CAMVID, None),
        (CAMVID.names[:-1], CAMVID, "10 are not the 11 of CamVid: the model lacks bicyclist$"),
        ((*CAMVID.names, "dog"), CAMVID, "CamVid lacks dog$"),
        ((*CAMVID.names[:-1], "dog"), CAMVID, "the model lacks bicyclist and CamVid lacks dog$"),
        (SWAPPED, CAMVID, "class 0 is 'building' in the model and 'sky' there"),
        (CITYSCAPES.names, CAMVID, "the model lacks pavement, tree, sign_symbol, pedestrian and 1"),
    ],
)
def test_classes_must_be_the_same(
    model: tuple[str, ...], truth: ClassList, message: str | None
) -> None:
    if message is None:
        check_classes(model, truth)
        return
    with pytest.raises(DataError, match=message):
        check_classes(model, truth)


def test_a_model_of_other_classes_does_not_run() -> None:
    engine = BlueEngine(replace(SPEC, classes=SWAPPED))
    with pytest.raises(DataError, match="own classes"):
        evaluate(engine, Painted(truths(1)))
    assert not engine.seen


def test_a_scorer_fed_by_hand_agrees_with_evaluate() -> None:
    data = Painted(truths(3))
    engine = BlueEngine(wrong=frozenset({8}))
    scorer = Scorer(SPEC.classes, CAMVID)
    for sample in data:
        frame = Frame.of(sample.pixels)
        geometry = Geometry.between(frame.height, frame.width, SPEC)
        outputs = engine.run(geometry.fit(frame.pixels))
        scorer.add(
            SemanticResult.from_outputs(outputs, frame, geometry, SPEC).class_map, sample.labels
        )
    by_hand = scorer.evaluation(data="painted", split="val", engine="blue")
    assert scorer.frames == 3
    assert replace(by_hand, seconds=0) == replace(evaluate(engine, data), seconds=0)


def test_a_generated_street_goes_all_the_way() -> None:
    data = open_dataset("synthetic:?size=48x64&frames=2", "val")
    found = evaluate(BlueEngine(wrong=frozenset(range(256))), data)
    sky = sum(int((sample.labels == 0).sum()) for sample in data)
    assert found.pixel_accuracy == pytest.approx(sky / (2 * 48 * 64))
