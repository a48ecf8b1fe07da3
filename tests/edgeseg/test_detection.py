"""Average precision: known answers, a second implementation, and plain pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.annotation import Annotation, run_lengths
from edgeseg.detection import AveragePrecision, DetectionScorer
from edgeseg.errors import DataError, RequestError

coco_mask = pytest.importorskip("pycocotools.mask")

SIZE = (60, 80)
Box = tuple[int, int, int, int]


def filled(box: Box, size: tuple[int, int] = SIZE) -> NDArray[np.bool_]:
    """A mask that is its box (x, y, width, height)."""
    x, y, width, height = box
    mask = np.zeros(size, np.bool_)
    mask[y : y + height, x : x + width] = True
    return mask


def true(box: Box, label: int = 0, *, crowd: bool = False, bare: bool = False) -> Annotation:
    x, y, width, height = box
    outline = None if bare else run_lengths(filled(box))
    return Annotation(label, (x, y, width, height), width * height, crowd, outline)


def packed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    rle: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def found(box: Box, score: float, label: int = 0, number: int = 1) -> dict[str, Any]:
    return {
        "image_id": number,
        "category_id": label,
        "bbox": list(box),
        "score": score,
        "segmentation": packed(filled(box)),
    }


def both(
    truth: list[Annotation], detections: list[dict[str, Any]], classes: tuple[str, ...] = ("car",)
) -> tuple[AveragePrecision, AveragePrecision]:
    scorer = DetectionScorer(classes)
    scorer.add(1, SIZE, truth, detections)
    return scorer.boxes(), scorer.masks()


A: Box = (5, 5, 20, 10)
B: Box = (40, 30, 20, 10)


@pytest.mark.parametrize(
    ("case", "truth", "detections", "ap", "ap50", "recall"),
    [
        ("perfect", [A, B], [(A, 0.9), (B, 0.8)], 1.0, 1.0, 1.0),
        # Four of 16 columns further: IoU 16 / 24, right up to an overlap of 0.65.
        ("shifted", [A], [((9, 5, 20, 10), 0.9)], 0.4, 1.0, 0.4),
        # Recall of a half is reached at 51 of the 101 places where precision is looked up.
        ("missed", [A, B], [(A, 0.9)], 51 / 101, 51 / 101, 0.5),
        # The second on the same object is wrong, but after all of the right ones.
        ("duplicate last", [A], [(A, 0.9), (A, 0.8)], 1.0, 1.0, 1.0),
        # Here it comes before the second object, which is the third of three to be right.
        (
            "duplicate first",
            [A, B],
            [(A, 0.9), (A, 0.8), (B, 0.7)],
            (51 + 50 * 2 / 3) / 101,
            (51 + 50 * 2 / 3) / 101,
            1.0,
        ),
        ("invented first", [A], [(B, 0.9), (A, 0.8)], 0.5, 0.5, 1.0),
        ("invented last", [A], [(A, 0.9), (B, 0.8)], 1.0, 1.0, 1.0),
        ("too far off", [A], [((16, 5, 20, 10), 0.9)], 0.0, 0.0, 0.0),
        ("none found", [A], [], 0.0, 0.0, 0.0),
        ("nothing to find", [], [(A, 0.9)], math.nan, math.nan, math.nan),
        ("nothing at all", [], [], math.nan, math.nan, math.nan),
    ],
)
def test_known_answers(
    case: str,
    truth: list[Box],
    detections: list[tuple[Box, float]],
    ap: float,
    ap50: float,
    recall: float,
) -> None:
    precisions = both([true(box) for box in truth], [found(*one) for one in detections])
    for precision in precisions:
        assert precision.ap == pytest.approx(ap, nan_ok=True), case
        assert precision.ap50 == pytest.approx(ap50, nan_ok=True), case
        assert precision.ar_100 == pytest.approx(recall, nan_ok=True), case
        assert precision.per_class == pytest.approx({"car": ap}, nan_ok=True), case


def test_a_crowd_is_neither_found_nor_missed() -> None:
    crowd = true((30, 20, 40, 30), crowd=True)
    inside = [found((32, 22, 10, 10), 0.95), found((50, 30, 10, 10), 0.94)]
    for precision in both([true(A), crowd], [*inside, found(A, 0.9)]):
        assert (precision.ap, precision.ar_100) == pytest.approx((1.0, 1.0))
    for precision in both([crowd], inside):
        assert math.isnan(precision.ap)


def test_boxes_and_masks_are_told_apart() -> None:
    detection = found(A, 0.9)
    detection["segmentation"] = packed(filled(B))
    box, mask = both([true(A)], [detection])
    assert (box.ap, mask.ap) == pytest.approx((1.0, 0.0))


def test_objects_are_small_medium_or_large_by_their_area() -> None:
    size = (400, 400)
    boxes: list[Box] = [(0, 0, 20, 20), (0, 100, 50, 50), (150, 150, 200, 200)]
    scorer = DetectionScorer(("car",))
    truth = [
        Annotation(0, box, box[2] * box[3], False, run_lengths(filled(box, size))) for box in boxes
    ]
    detections = [
        {**found(box, 0.9), "segmentation": packed(filled(box, size))} for box in boxes[1:]
    ]
    # The object's size is its mask's where masks are compared: this one is small as a mask only.
    sliver = {
        **found((0, 300, 100, 99), 0.95),
        "segmentation": packed(filled((0, 300, 9, 9), size)),
    }
    scorer.add(1, size, truth, [*detections, sliver])
    box, mask = scorer.boxes(), scorer.masks()
    assert (box.ap_small, box.ap_medium, box.ap_large) == pytest.approx((0, 1, 0.5))
    assert (mask.ap_small, mask.ap_medium, mask.ap_large) == pytest.approx((0, 1, 1))
    assert (mask.ar_small, mask.ar_medium, mask.ar_large) == (0, 1, 1)


def test_classes_are_averaged_and_absent_ones_left_out() -> None:
    classes = ("car", "dog", "cat")
    truth = [true(A, 0), true(B, 2)]
    detections = [found(A, 0.9, 0), found(A, 0.8, 2), found(B, 0.7, 1), found(B, 0.6, -1)]
    for precision in both(truth, detections, classes):
        assert precision.per_class == pytest.approx(
            {"car": 1.0, "dog": math.nan, "cat": 0.0}, nan_ok=True
        )
        assert precision.ap == pytest.approx(0.5)
        assert precision.to_classes() == pytest.approx({"car": 1.0, "dog": None, "cat": 0.0})
        figures = precision.to_dict()
        assert len(figures) == 12 and figures["ap_large"] is None and figures["ap"] == precision.ap


def random_case(seed: int, numbers: range) -> dict[int, tuple[list[Annotation], list[Any]]]:
    """Pictures with objects of three classes, most of them found more or less."""
    random = np.random.default_rng(seed)
    pictures = {}
    for number in numbers:
        truth: list[Annotation] = []
        detections: list[Any] = []
        for _ in range(random.integers(0, 9)):
            x, y = int(random.integers(0, 60)), int(random.integers(0, 45))
            box = (x, y, int(random.integers(1, 80 - x)), int(random.integers(1, 60 - y)))
            label = int(random.integers(0, 3))
            truth.append(true(box, label, crowd=bool(random.random() < 0.1)))
            for _ in range(random.integers(0, 3)):
                jitter = random.integers(-2, 3, 4)
                low = (0, 0, 1, 1)
                near = np.maximum(np.array(box) + jitter, low).tolist()
                near = (near[0], near[1], min(near[2], 80 - near[0]), min(near[3], 60 - near[1]))
                wrong = int(random.random() < 0.1)
                # Scores differ, so that the order is one.
                detections.append(found(near, float(random.random()), (label + wrong) % 3, number))
        pictures[number] = (truth, detections)
    return pictures


def ap_by_hand(
    pictures: dict[int, tuple[list[Annotation], list[Any]]], label: int, threshold: float
) -> float:
    """AP of one class at one overlap, from the masks' pixels; the definition taken literally."""
    ranked: list[tuple[float, bool]] = []
    wanted = 0
    for truth, detections in pictures.values():
        objects = [(one.mask(*SIZE), one.crowd) for one in truth if one.label == label]
        wanted += sum(not crowd for _, crowd in objects)
        taken: set[int] = set()
        mine = [one for one in detections if one["category_id"] == label]
        for detection in sorted(mine, key=lambda one: -one["score"]):
            mask = filled(detection["bbox"])
            best, partner = threshold, None
            for index, (other, crowd) in enumerate(objects):
                if crowd or index in taken:
                    continue
                overlap = (mask & other).sum() / (mask | other).sum()
                if overlap >= best:
                    best, partner = overlap, index
            if partner is not None:
                taken.add(partner)
                ranked.append((detection["score"], True))
            elif not any(
                crowd and (mask & other).sum() / mask.sum() >= threshold for other, crowd in objects
            ):
                ranked.append((detection["score"], False))
    if not wanted:
        return math.nan
    ranked.sort(key=lambda one: -one[0])
    curve, right = [], 0
    for place, (_, good) in enumerate(ranked, 1):
        right += good
        curve.append((right / wanted, right / place))
    # Precision at a recall is the best that is reached there or beyond.
    return (
        math.fsum(
            max((precision for recall, precision in curve if recall >= at / 100), default=0.0)
            for at in range(101)
        )
        / 101
    )


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_the_definition_gives(seed: int) -> None:
    pictures = random_case(seed, range(1, 9))
    scorer = DetectionScorer(("car", "dog", "cat"))
    for number, (truth, detections) in pictures.items():
        scorer.add(number, SIZE, truth, detections)
    precision = scorer.masks()
    table = [
        [ap_by_hand(pictures, label, 0.5 + 0.05 * step) for step in range(10)] for label in range(3)
    ]
    assert list(precision.per_class.values()) == pytest.approx(np.mean(table, axis=1), abs=1e-9)
    assert precision.ap == pytest.approx(np.mean(table), abs=1e-9)
    assert precision.ap50 == pytest.approx(np.mean(table, axis=0)[0], abs=1e-9)
    assert precision.ap75 == pytest.approx(np.mean(table, axis=0)[5], abs=1e-9)
    assert 0.1 < precision.ap < 0.9


def plain(pictures: Any, kind: str) -> list[float]:
    """The twelve figures as a user of pycocotools computes them, by files of COCO's format."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": n, "height": SIZE[0], "width": SIZE[1]} for n in pictures],
            "categories": [{"id": 10 + n, "name": str(n)} for n in range(3)],
            "annotations": [
                {
                    "id": 100 * n + index + 1,
                    "image_id": n,
                    "category_id": 10 + one.label,
                    "bbox": list(one.box),
                    "area": one.area,
                    "iscrowd": int(one.crowd),
                    "segmentation": one.segmentation,
                }
                for n, (annotations, _) in pictures.items()
                for index, one in enumerate(annotations)
            ],
        }
        truth.createIndex()
        results = [
            {**one, "category_id": 10 + one["category_id"]}
            for _, detections in pictures.values()
            for one in detections
        ]
        for one in results:
            # As pycocotools wants it: it takes the size of the box, if there is one.
            if kind == "segm":
                del one["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value == -1 else float(value) for value in evaluation.stats]


@pytest.mark.parametrize("seed", [7, 8])
def test_all_twelve_figures_are_those_of_pycocotools(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = random_case(seed, range(1, 21))
    scorer = DetectionScorer(("0", "1", "2"))
    for number, (truth, detections) in pictures.items():
        scorer.add(number, SIZE, truth, detections)
    for kind, precision in (("bbox", scorer.boxes()), ("segm", scorer.masks())):
        figures = [math.nan if x is None else x for x in precision.to_dict().values()]
        assert figures == pytest.approx(plain(pictures, kind), nan_ok=True)
    # Asked twice, it says the same.
    assert scorer.boxes() == scorer.boxes()
    assert capsys.readouterr().out == ""


def test_objects_without_outline_are_told() -> None:
    scorer = DetectionScorer(("car",))
    scorer.add(1, SIZE, [true(A)], [])
    outlined = [scorer.outlined]
    scorer.add(2, SIZE, [true(A, bare=True)], [found(A, 0.9, number=2)])
    assert [*outlined, scorer.outlined] == [True, False]
    assert scorer.boxes().ap == pytest.approx(51 / 101)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, "picture 1 says that it is in 7"),
        (
            {"segmentation": {"size": [80, 60], "counts": ""}},
            "size of its picture, 60x80, and one of 80x60",
        ),
    ],
)
def test_detections_of_something_else(change: dict[str, Any], message: str) -> None:
    scorer = DetectionScorer(("car",))
    with pytest.raises(DataError, match=message):
        scorer.add(1, SIZE, [true(A)], [found(A, 0.9) | change])
    scorer.add(1, SIZE, [true(A)], [found(A, 0.9)])
    assert scorer.boxes().ap == pytest.approx(1)


def test_a_picture_comes_once_and_labels_are_classes() -> None:
    scorer = DetectionScorer(("car",))
    with pytest.raises(DataError, match="labels are 0 to 0, and 1 came"):
        scorer.add(1, SIZE, [true(A, 1)], [])
    scorer.add(1, SIZE, [], [])
    with pytest.raises(RequestError, match="number 1 came again"):
        scorer.add(1, SIZE, [], [])


def test_without_pycocotools_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(RequestError, match=r"pip install 'edgeseg\[eval\]'"):
        DetectionScorer(("car",))
