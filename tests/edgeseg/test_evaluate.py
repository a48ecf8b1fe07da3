"""Evaluation, with an engine that knows the answer, or part of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.annotation import Annotation, run_lengths
from edgeseg.boundary import BoundaryOverlap
from edgeseg.classes import CAMVID, CITYSCAPES, ClassList
from edgeseg.dataset import Dataset, Sample, open_dataset
from edgeseg.engine.base import OneAtATime
from edgeseg.errors import DataError, EngineError, RequestError
from edgeseg.evaluate import (
    Scorer,
    check_classes,
    evaluate,
    evaluate_instances,
    evaluate_panoptic,
    match_classes,
)
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.hausdorff import HausdorffDistance
from edgeseg.instance_dataset import InstanceDataset, InstanceSample, open_instances
from edgeseg.instances import InstanceOutputs
from edgeseg.metrics import ConfusionMatrix
from edgeseg.panoptic import Fusion
from edgeseg.panoptic_dataset import open_panoptic
from edgeseg.result import AnyOutputs, Outputs, SemanticResult
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


def test_outlines_are_measured_when_asked_for() -> None:
    pictures = [np.kron(labels, np.ones((3, 3), np.uint8)) for labels in truths(3)]
    spec = replace(SPEC, height=18, width=24)
    engine = BlueEngine(spec, wrong=frozenset({3, 5}))
    found = evaluate(engine, Painted(pictures), boundary=True)
    matrix = ConfusionMatrix(11, CAMVID.ignore)
    boundary = BoundaryOverlap(11, CAMVID.ignore)
    distance = HausdorffDistance(11, CAMVID.ignore)
    for labels in pictures:
        predicted = np.where(labels == CAMVID.ignore, 0, labels).astype(np.uint8)
        predicted[np.isin(predicted, (3, 5))] = 0
        matrix.update(predicted, labels)
        boundary.update(predicted, labels)
        distance.update(predicted, labels)
    assert found.dice == matrix.dice() and found.outlines is not None
    assert list(found.per_class_dice.values()) == pytest.approx(matrix.per_class_dice().tolist())
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert 0 < read["boundary_iou"] == boundary.mean() < 1
    assert 0 < read["hd95"] == distance.mean()
    assert list(read["per_class_boundary_iou"].values()) == boundary.per_class().tolist()
    assert list(read["per_class_hd95"].values()) == distance.per_class().tolist()
    assert list(read["per_class_hd95"]) == list(CAMVID.names)
    plain = evaluate(engine, Painted(pictures))
    assert plain.outlines is None and plain.miou == found.miou
    assert not {"boundary_iou", "hd95"} & plain.to_dict().keys()


# --- instances

INSTANCES = ModelSpec(
    name="known objects",
    architecture="none",
    task="instance",
    height=30,
    width=40,
    classes=("Dog", "car"),
    colours=((1, 2, 3), (4, 5, 6)),
    ignore=255,
    preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), order="rgb"),
    capacity=10,
    mask_height=30,
    mask_width=40,
)
CAR_AND_CAT = ("car", "cat")
Box = tuple[int, int, int, int]


def picture_mask(box: Box) -> NDArray[np.bool_]:
    """(x, y, width, height) as a mask."""
    x, y, width, height = box
    mask = np.zeros((INSTANCES.height, INSTANCES.width), np.bool_)
    mask[y : y + height, x : x + width] = True
    return mask


class Boxed(InstanceDataset):
    """Pictures that have their number in the first pixel, and objects that are rectangles."""

    title = "boxed"
    split = "val"

    def __init__(
        self,
        objects: list[list[tuple[str, Box]]],
        classes: tuple[str, ...] = ("car", "dog"),
        outlined: bool = True,
    ) -> None:
        self.classes = classes
        self._objects = objects
        self._outlined = outlined

    def __len__(self) -> int:
        return len(self._objects)

    def sample(self, index: int) -> InstanceSample:
        pixels = np.full((INSTANCES.height, INSTANCES.width, 3), index, np.uint8)
        annotations = tuple(
            Annotation(
                self.classes.index(name),
                box,
                box[2] * box[3],
                False,
                run_lengths(picture_mask(box)) if self._outlined else None,
            )
            for name, box in self._objects[index]
        )
        return InstanceSample(f"number {index}", 100 + index, pixels, annotations)

    def hashes(self) -> dict[str, str]:
        return {}


class BoxEngine(OneAtATime):
    """Gives the objects that it is told for each picture, the first one the surest."""

    name = "boxes"
    description = "boxes"

    def __init__(self, objects: list[list[tuple[str, Box]]], spec: ModelSpec = INSTANCES) -> None:
        self.spec = spec
        self.objects = objects
        self.seen: list[int] = []

    def run(self, pixels: Pixels) -> AnyOutputs:
        number = int(pixels[0, 0, 0])
        self.seen.append(number)
        found = self.objects[number]
        names = [name.casefold() for name in self.spec.classes]
        return InstanceOutputs(
            boxes=np.array(
                [[x, y, x + width, y + height] for _, (x, y, width, height) in found], np.float32
            ).reshape(-1, 4),
            scores=np.linspace(0.9, 0.5, len(found), dtype=np.float32),
            labels=np.array([names.index(name) for name, _ in found], np.int32),
            masks=np.array(
                [picture_mask(box) * np.uint8(255) for _, box in found], np.uint8
            ).reshape(-1, INSTANCES.mask_height, INSTANCES.mask_width),
        )

    def close(self) -> None:
        """Nothing to give back."""


OBJECTS: list[list[tuple[str, Box]]] = [
    [("car", (2, 3, 20, 10)), ("dog", (25, 15, 8, 8))],
    [],
    [("car", (0, 0, 40, 30))],
    [("dog", (10, 10, 1, 1)), ("dog", (20, 10, 12, 5))],
]


@pytest.fixture
def pycocotools() -> None:
    pytest.importorskip("pycocotools")


@pytest.mark.usefixtures("pycocotools")
def test_objects_that_are_right_score_one() -> None:
    progress: list[tuple[int, int]] = []
    found = evaluate_instances(
        BoxEngine(OBJECTS),
        Boxed(OBJECTS),
        progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (read["data"], read["split"], read["engine"]) == ("boxed", "val", "boxes")
    assert (read["frames"], read["box_ap"], read["mask_ap"]) == pytest.approx((4, 1, 1))
    assert read["box"]["ap75"] == read["mask"]["ap75"] == pytest.approx(1)
    assert read["box"]["ap_large"] is None
    assert list(read["per_class"]) == ["car", "dog"]
    for figures in read["per_class"].values():
        assert figures == pytest.approx({"box_ap": 1, "mask_ap": 1})
    assert read["seconds"] > 0


@pytest.mark.usefixtures("pycocotools")
def test_objects_missed_invented_and_taken_for_others() -> None:
    # One of two cars, and after two dogs that are right one that is a car.
    given = [[("dog", (25, 15, 8, 8))], [], OBJECTS[2], [*OBJECTS[3], ("dog", (0, 0, 5, 5))]]
    found = evaluate_instances(BoxEngine(given), Boxed(OBJECTS))
    for precision in (found.box, found.mask):
        assert precision is not None
        assert precision.per_class == pytest.approx({"car": 51 / 101, "dog": 1.0})
        assert precision.ap == pytest.approx((51 / 101 + 1) / 2)


@pytest.mark.usefixtures("pycocotools")
def test_classes_go_by_name_and_the_models_others_are_not_looked_at() -> None:
    spec = replace(INSTANCES, classes=("cat", "DOG", "car"), colours=((0, 0, 0),) * 3)
    given = [[("cat", (0, 0, 5, 5)), *objects] for objects in OBJECTS]
    found = evaluate_instances(BoxEngine(given, spec), Boxed(OBJECTS))
    assert found.box.per_class == pytest.approx({"car": 1.0, "dog": 1.0})


@pytest.mark.usefixtures("pycocotools")
def test_without_outlines_there_is_no_mask_ap() -> None:
    found = evaluate_instances(BoxEngine(OBJECTS), Boxed(OBJECTS, outlined=False))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["box_ap"] == pytest.approx(1)
    assert read["mask_ap"] is None and read["mask"] is None
    assert read["per_class"]["car"] == {"box_ap": pytest.approx(1), "mask_ap": None}


@pytest.mark.usefixtures("pycocotools")
def test_a_limit_spreads_over_the_pictures_with_objects() -> None:
    engine = BoxEngine(OBJECTS)
    found = evaluate_instances(engine, Boxed(OBJECTS), limit=2)
    assert engine.seen == [0, 2] and found.frames == 2
    assert found.box.ap == pytest.approx(1)
    with pytest.raises(RequestError, match="at least one frame"):
        evaluate_instances(engine, Boxed(OBJECTS), limit=0)


@pytest.mark.parametrize(
    ("model", "truth", "expected"),
    [
        (("a", "b"), ("b", "a"), (1, 0)),
        (("A", "x", "b"), ("b", "a"), (1, -1, 0)),
        (("x", "x", "a"), ("a",), (-1, -1, 0)),
        (("a",), ("a", "b", "c"), "of the 3 of truth its 1 lack b, c; names must be the same"),
        (("a", "A"), ("a",), "a has more"),
    ],
)
def test_classes_are_matched_by_name(
    model: tuple[str, ...], truth: tuple[str, ...], expected: tuple[int, ...] | str
) -> None:
    if isinstance(expected, tuple):
        assert match_classes(model, truth, "truth") == expected
        return
    with pytest.raises(DataError, match=expected):
        match_classes(model, truth, "truth")


def test_a_model_that_lacks_a_class_does_not_run() -> None:
    engine = BoxEngine(OBJECTS)
    with pytest.raises(DataError, match="lack cat"):
        evaluate_instances(engine, Boxed([[]], CAR_AND_CAT))
    assert not engine.seen


def test_models_of_the_other_task_are_refused() -> None:
    with pytest.raises(RequestError, match="instance models, and known is for semantic"):
        evaluate_instances(BlueEngine(), Boxed(OBJECTS))
    with pytest.raises(RequestError, match="semantic models, and known objects is for instance"):
        evaluate(BoxEngine(OBJECTS), Painted(truths(1)))


def test_an_engine_that_gives_something_else_is_named() -> None:
    with pytest.raises(EngineError, match="boxes gave InstanceResult for a semantic model"):
        evaluate(BoxEngine([[]] * 99, SPEC), Painted(truths(1, labels=1)))


@pytest.mark.usefixtures("pycocotools")
def test_generated_streets_go_all_the_way_with_their_objects() -> None:
    data = open_instances("synthetic:?size=64x96&frames=3", "val")
    spec = replace(INSTANCES, classes=("car", "pedestrian", "bicyclist"), colours=((0, 0, 0),) * 3)
    found = evaluate_instances(BoxEngine([[]] * 256, spec), data)
    assert (found.frames, found.box.ap) == (3, 0)


# --- panoptic

THINGS = ("car", "pedestrian", "bicyclist")


class StreetEngine(OneAtATime):
    """Knows the streets: all of the class map, or the objects, less those of one class."""

    description = "streets"
    name = "known"

    def __init__(self, spec: ModelSpec, uri: str, leave_out: str = "") -> None:
        self.spec = spec
        self.leave_out = leave_out
        self._classes = {one.pixels.tobytes(): one for one in open_dataset(uri, "val")}
        self._objects = {one.pixels.tobytes(): one for one in open_instances(uri, "val")}

    def run(self, pixels: Pixels) -> AnyOutputs:
        if self.spec.task == "semantic":
            return Outputs(self._classes[pixels.tobytes()].labels)
        height, width = self.spec.mask_height, self.spec.mask_width
        objects = [
            (self.spec.classes.index(THINGS[one.label]), one.mask(height, width))
            for one in self._objects[pixels.tobytes()].annotations
            if THINGS[one.label] != self.leave_out
        ]
        return InstanceOutputs(
            boxes=np.array([[0, 0, width, height] for _ in objects], np.float32).reshape(-1, 4),
            scores=np.full(len(objects), 0.9, np.float32),
            labels=np.array([label for label, _ in objects], np.int32),
            masks=np.array([mask * np.uint8(255) for _, mask in objects], np.uint8).reshape(
                -1, height, width
            ),
        )

    def close(self) -> None:
        """Nothing to give back."""


STREETS = "synthetic:?size=120x160&frames=5"
CLASSES = replace(SPEC, height=120, width=160)
OBJECT_CLASSES = replace(
    INSTANCES,
    height=120,
    width=160,
    mask_height=120,
    mask_width=160,
    classes=("pedestrian", "car", "bicyclist"),
    colours=((0, 0, 0),) * 3,
    capacity=50,
)


def test_two_models_are_measured_as_one() -> None:
    progress: list[tuple[int, int]] = []
    found = evaluate_panoptic(
        StreetEngine(CLASSES, STREETS),
        StreetEngine(OBJECT_CLASSES, STREETS, leave_out="car"),
        open_panoptic(STREETS, "val"),
        fusion=Fusion(stuff_area=0),
        limit=2,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(1, 2), (2, 2)]
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (read["data"], read["engine"], read["frames"]) == ("synthetic streets", "known", 2)
    # Cars are in no segment: missed, and no stuff instead of them.
    assert read["per_class"]["car"] == {"pq": 0, "sq": 0, "rq": 0}
    assert read["per_class"]["road"] == {"pq": 1, "sq": 1, "rq": 1}
    assert list(read["per_class"]) == list(CAMVID.names)
    assert read["stuff"]["pq"] == 1
    assert read["things"]["pq"] == pytest.approx(1 - 1 / found.things.classes)
    assert read["pq"] == pytest.approx(1 - 1 / found.all.classes)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("pedestrian", "dog", "bicyclist"), "synthetic streets lack dog$"),
        (("Cow", "dog", "bicyclist"), "streets lack Cow, dog$"),
    ],
)
def test_models_with_other_classes_are_no_pair(classes: tuple[str, ...], message: str) -> None:
    engines = (
        StreetEngine(CLASSES, STREETS),
        StreetEngine(replace(OBJECT_CLASSES, classes=classes), STREETS),
    )
    with pytest.raises(DataError, match=message):
        evaluate_panoptic(*engines, open_panoptic(STREETS, "val"))


def test_a_class_that_neither_model_has_is_named() -> None:
    classes = tuple(name for name in CAMVID.names if name not in ("sky", *THINGS))
    spec = replace(CLASSES, classes=classes, colours=((0, 0, 0),) * len(classes))
    with pytest.raises(DataError, match=r"between them: the models lack sky$"):
        evaluate_panoptic(
            StreetEngine(spec, STREETS),
            StreetEngine(OBJECT_CLASSES, STREETS),
            open_panoptic(STREETS, "val"),
        )


def test_a_pair_is_one_of_each() -> None:
    engine = StreetEngine(CLASSES, STREETS)
    with pytest.raises(RequestError, match="for instance models, and known is for semantic"):
        evaluate_panoptic(engine, engine, open_panoptic(STREETS, "val"))
    with pytest.raises(RequestError, match="at least one frame"):
        evaluate_panoptic(engine, engine, open_panoptic(STREETS, "val"), limit=0)
