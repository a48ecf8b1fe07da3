"""Comparisons, with engines that know how wrong they are and how long they take."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.annotation import Annotation, run_lengths
from edgeseg.boundary import BoundaryOverlap
from edgeseg.classes import CAMVID
from edgeseg.compare import Candidate, Comparison, Spread, Standing, compare
from edgeseg.dataset import Dataset, Sample
from edgeseg.engine.base import OneAtATime
from edgeseg.errors import DataError, RequestError
from edgeseg.evaluate import evaluate
from edgeseg.frame import Pixels
from edgeseg.instance_dataset import InstanceDataset, InstanceSample
from edgeseg.instances import InstanceOutputs
from edgeseg.postprocess import Postprocessing
from edgeseg.result import AnyOutputs, Outputs
from edgeseg.spec import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="known",
    architecture="none",
    task="semantic",
    height=24,
    width=32,
    classes=CAMVID.names,
    colours=CAMVID.colours,
    ignore=CAMVID.ignore,
    preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), order="rgb"),
)
OBJECTS = replace(SPEC, name="objects", task="instance", capacity=10, mask_height=24, mask_width=32)


class Clock:
    """A clock that engines turn forward; ``order`` is who did so."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.order: list[str] = []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("edgeseg.compare.time.perf_counter_ns", lambda: made.now_ns)
    return made


class Painted(Dataset):
    """Pictures that have their labels as their blue channel."""

    title = "painted"
    split = "val"
    classes = CAMVID

    def __init__(self, count: int, stray: int | None = None) -> None:
        random = np.random.default_rng(3)
        coarse = random.integers(0, 3, (count, 6, 8)).astype(np.uint8)
        self.truths = np.kron(coarse, np.ones((1, 4, 4), np.uint8))
        self._stray = stray

    def __len__(self) -> int:
        return len(self.truths)

    def sample(self, index: int) -> Sample:
        labels = self.truths[index].copy()
        if index == self._stray:
            labels[0, 0] = 200
        shown = np.repeat(self.truths[index][..., None], 3, axis=2) * np.uint8(80)
        return Sample(f"number {index}", shown, labels)

    def hashes(self) -> dict[str, str]:
        return {}


class Painter(OneAtATime):
    """Reads the labels off the picture, moved by ``shift`` columns, in ``milliseconds`` each."""

    name = "painter"
    description = "painter"

    def __init__(
        self, clock: Clock, milliseconds: list[float], shift: int = 0, spec: ModelSpec = SPEC
    ) -> None:
        self.spec = spec
        self._clock = clock
        self._milliseconds = milliseconds
        self._shift = shift
        self.runs = 0

    def run(self, pixels: Pixels) -> Outputs:
        # The first run is the one that is not timed.
        milliseconds = self._milliseconds[max(self.runs - 1, 0) % len(self._milliseconds)]
        self._clock.now_ns += round(milliseconds * 1e6)
        self._clock.order.append(f"{milliseconds:g}")
        self.runs += 1
        return Outputs(np.roll(pixels[..., 0] // 80, self._shift, axis=1))

    def close(self) -> None:
        """Nothing to give back."""


def test_figures_and_times_are_those_of_each(clock: Clock) -> None:
    data = Painted(4)
    right = Painter(clock, [10, 20, 30, 40])
    wrong = Painter(clock, [11, 24, 30, 43], shift=2)
    progress: list[tuple[int, int]] = []
    found = compare(
        [Candidate("moved", wrong), Candidate("right", right)],
        data,
        progress=lambda done, total: progress.append((done, total)),
    )
    moved, exact = found.standings
    assert (found.data, found.split, found.frames) == ("painted", "val", 4)
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert exact.figures == {"miou": 1.0, "boundary_iou": 1.0}
    expected = evaluate(Painter(clock, [1], shift=2), data)
    outlines = BoundaryOverlap(11, CAMVID.ignore)
    for truth in data.truths:
        outlines.update(np.roll(truth, 2, axis=1), truth)
    assert moved.figures == {"miou": expected.miou, "boundary_iou": outlines.mean()}
    assert found.gains(exact)["miou"] == 1 - expected.miou
    assert moved.frame_ms == Spread(*np.percentile([11, 24, 30, 43], (25, 50, 75)).tolist())
    assert exact.frame_ms == Spread(17.5, 25.0, 32.5)
    assert exact.extra_ms == Spread(*np.percentile([-1, -4, 0, -3], (25, 50, 75)).tolist())
    assert moved.extra_ms == Spread(0, 0, 0)


def test_each_goes_first_in_turn(clock: Clock) -> None:
    candidates = [Candidate(str(index), Painter(clock, [index])) for index in range(1, 4)]
    compare(candidates, Painted(4))
    # Once more each on the first picture, to warm up.
    assert "".join(clock.order) == "112233" + "231" + "312" + "123"


def test_a_step_is_taken_and_timed(clock: Clock) -> None:
    engine = Painter(clock, [5], shift=1)
    steps = Postprocessing(refine=True)
    found = compare([Candidate("plain", engine), Candidate("refine", engine, steps)], Painted(3))
    plain, refined = found.standings
    assert refined.figures["miou"] > plain.figures["miou"] + 0.05
    assert refined.frame_ms.p50 >= 5


def test_a_limit_spreads_over_the_set(clock: Clock) -> None:
    engine = Painter(clock, [5])
    found = compare([Candidate("a", engine), Candidate("b", engine)], Painted(9), limit=3)
    assert found.frames == 3
    assert engine.runs == 2 * 3 + 2


class Boxed(InstanceDataset):
    """One car in each picture."""

    title = "boxed"
    split = "val"
    classes = ("car",)

    def __len__(self) -> int:
        return 3

    def sample(self, index: int) -> InstanceSample:
        pixels = np.full((24, 32, 3), index, np.uint8)
        car = Annotation(0, (4, 4, 16, 12), 192, False, run_lengths(car_mask()))
        return InstanceSample(f"number {index}", index, pixels, (car,))

    def hashes(self) -> dict[str, str]:
        return {}


def car_mask() -> NDArray[np.bool_]:
    mask = np.zeros((24, 32), np.bool_)
    mask[4:16, 4:20] = True
    return mask


class TwiceFound(OneAtATime):
    """Finds the car, and a bit less of it again, in the wrong order of their scores."""

    name = "twice"
    description = "twice"
    spec = OBJECTS

    def run(self, pixels: Pixels) -> AnyOutputs:
        part = car_mask()
        part[:, 16:] = False
        return InstanceOutputs(
            boxes=np.array([[4, 4, 16, 16], [4, 4, 20, 16]], np.float32),
            scores=np.array([0.9, 0.8], np.float32),
            labels=np.full(2, SPEC.classes.index("car"), np.int32),
            masks=np.stack([part * np.uint8(140), car_mask() * np.uint8(255)]),
        )

    def close(self) -> None:
        """Nothing to give back."""


def test_objects_have_their_ap() -> None:
    pytest.importorskip("pycocotools", reason="the AP is pycocotools'")
    engine = TwiceFound()
    found = compare(
        [
            Candidate("plain", engine),
            Candidate("rescore", engine, Postprocessing(rescore=True)),
        ],
        Boxed(),
    )
    plain, rescored = (standing.figures for standing in found.standings)
    assert rescored["mask_ap"] == pytest.approx(1)
    assert plain["mask_ap"] < 1
    assert rescored["box_ap"] > plain["box_ap"]
    assert list(plain) == ["box_ap", "mask_ap"]


def test_what_cannot_be_compared(clock: Clock) -> None:
    engine = Painter(clock, [1])
    pair = [Candidate("a", engine), Candidate("b", engine)]
    with pytest.raises(RequestError, match="needs two candidates, and 1 came"):
        compare(pair[:1], Painted(2))
    with pytest.raises(RequestError, match="at least one frame, and a limit of 0 came"):
        compare(pair, Painted(2), limit=0)
    with pytest.raises(RequestError, match="of one task, here semantic, and cars is for instance"):
        compare([*pair, Candidate("cars", TwiceFound())], Painted(2))
    with pytest.raises(RequestError, match="rescore is for instances"):
        compare([*pair, Candidate("c", engine, Postprocessing(rescore=True))], Painted(2))
    other = Painter(clock, [1], spec=replace(SPEC, classes=SPEC.classes[::-1]))
    with pytest.raises(DataError, match="class 0 is 'bicyclist'"):
        compare([*pair, Candidate("c", other)], Painted(2))
    assert clock.order == []
    with pytest.raises(DataError, match="painted val, number 1: the labels of the truth"):
        compare(pair, Painted(2, stray=1))


COMPARISON = Comparison(
    data="painted",
    split="val",
    frames=2,
    standings=(
        Standing(
            "streets",
            {"miou": 0.5, "boundary_iou": float("nan")},
            Spread(9.0, 10.0, 11.0),
            Spread(0, 0, 0),
        ),
        Standing(
            "refine",
            {"miou": 0.525, "boundary_iou": float("nan")},
            Spread(12.0, 13.0, 14.0),
            Spread(2.5, 3.0, 3.25),
        ),
    ),
    seconds=1.5,
)


def test_table() -> None:
    assert COMPARISON.render().splitlines() == [
        "         mIoU          boundary IoU  ms a frame           more than the first",
        "streets  0.5000        absent        10.0 (9.0 to 11.0)",
        "refine   0.5250 +2.50  absent        13.0 (12.0 to 14.0)  +3.0 (2.5 to 3.2)",
    ]


def test_json() -> None:
    read = json.loads(json.dumps(COMPARISON.to_dict(), allow_nan=False))
    assert read == {
        "data": "painted",
        "split": "val",
        "frames": 2,
        "candidates": [
            {
                "title": "streets",
                "miou": 0.5,
                "boundary_iou": None,
                "gain": {"miou": 0.0, "boundary_iou": None},
                "frame_ms": {"p25": 9.0, "p50": 10.0, "p75": 11.0},
                "extra_ms": {"p25": 0, "p50": 0, "p75": 0},
            },
            {
                "title": "refine",
                "miou": 0.525,
                "boundary_iou": None,
                "gain": {"miou": pytest.approx(0.025), "boundary_iou": None},
                "frame_ms": {"p25": 12.0, "p50": 13.0, "p75": 14.0},
                "extra_ms": {"p25": 2.5, "p50": 3.0, "p75": 3.25},
            },
        ],
        "seconds": 1.5,
    }
