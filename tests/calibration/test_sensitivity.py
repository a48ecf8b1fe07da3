"""The search for the layers to leave in floating point, against trying every set there is."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

from edgeseg.calibration.sensitivity import Laboratory, Search, Trials, damages, search
from edgeseg.dataset import Dataset
from edgeseg.errors import CalibrationError, RequestError

FP32 = 0.8
DATA = cast(Dataset, SimpleNamespace(title="some streets", split="val"))


@dataclass
class Bench:
    """A laboratory of layers whose damage in points of mIoU adds up, and so does their cost."""

    points: dict[str, float]
    costs: dict[str, float] = field(default_factory=dict)
    fp32_ms: float = 1e6
    proven: list[frozenset[str]] = field(default_factory=list)
    timed: list[frozenset[str]] = field(default_factory=list)
    figure_name: str = "mIoU"

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.points)

    def lost(self, floats: Collection[str]) -> float:
        return sum(value for name, value in self.points.items() if name not in floats)

    def figure(self, floats: Collection[str], dataset: Dataset, stage: object = None) -> float:
        self.proven.append(frozenset(floats))
        return FP32 - self.lost(floats) / 100

    def disagreement(self, floats: Collection[str]) -> float:
        return self.lost(floats) / 50

    def latency_ms(self) -> float:
        return 1.0

    def extra_ms(self, floats: Collection[str]) -> float:
        self.timed.append(frozenset(floats))
        if len(floats) == len(self.points):
            return self.fp32_ms
        return sum(self.costs.get(name, 1.0) for name in floats)

    def search(self, max_drop: float, **options: Any) -> Search:
        return search(cast(Laboratory, self), DATA, max_drop, **options)

    def least(self, max_drop: float) -> tuple[float, int] | None:
        """The least cost within the budget, and the least number of layers; None if half of them
        do not do."""
        sets = [
            chosen
            for count in range(len(self.points) // 2 + 1)
            for chosen in itertools.combinations(self.points, count)
            if self.lost(chosen) <= max_drop
        ]
        if not sets:
            return None
        return min(sum(self.costs[name] for name in each) for each in sets), len(sets[0])


def bench(rng: np.random.Generator, count: int, *, same_cost: bool) -> Bench:
    names = [f"layer{number}" for number in range(count)]
    points = rng.exponential(1.0, count).round(3)
    costs = np.ones(count) if same_cost else rng.uniform(0.1, 3, count).round(3)
    return Bench(
        dict(zip(names, points.tolist(), strict=True)),
        dict(zip(names, costs.tolist(), strict=True)),
    )


@pytest.mark.parametrize("seed", range(60))
def test_budget_is_met_with_as_little_as_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = bench(rng, int(rng.integers(2, 10)), same_cost=seed % 3 == 0)
    max_drop = float(rng.uniform(0, 1)) * made.lost(())
    least = made.least(max_drop)
    if least is None:
        with pytest.raises(CalibrationError, match="no INT8 graph within"):
            made.search(max_drop)
        return
    found = made.search(max_drop)
    assert found.drop <= max_drop + 1e-9
    assert made.lost(found.floats) == pytest.approx(found.drop)
    cost = sum(made.costs[name] for name in found.floats)
    # Within one layer of the best set there is; the very best where all cost the same.
    assert cost <= least[0] + max(made.costs.values())
    if seed % 3 == 0:
        assert len(found.floats) == least[1]
    # None of them is there for nothing.
    for name in found.floats:
        assert made.lost([other for other in found.floats if other != name]) > max_drop


def test_a_slow_layer_is_replaced_by_quick_ones() -> None:
    """It has most damage by far, also per millisecond, but two quick ones do as well."""
    made = Bench(
        {"a": 1.0, "slow": 40.0, "b": 0.7, "c": 0.7, "d": 0.1, "e": 0.1, "f": 0.1},
        {"a": 0.5, "slow": 30.0, "b": 0.6, "c": 0.6, "d": 1.0, "e": 1.0, "f": 1.0},
    )
    found = made.search(made.lost(("a", "b", "c")) + 0.01)
    assert found.floats == ("a", "b", "c")


def test_half_of_the_layers_do_if_the_right_ones_are_taken() -> None:
    """By damage per millisecond the cheap ones come first, and do not reach it."""
    made = Bench(
        {"a": 5.0, "b": 5.0, "c": 1.0, "d": 1.0},
        {"a": 100.0, "b": 100.0, "c": 0.1, "d": 0.1},
    )
    assert made.search(2.01).floats == ("a", "b")


def test_nothing_is_measured_that_the_budget_does_not_need() -> None:
    made = Bench({"a": 0.1, "b": 0.1})
    found = made.search(0.3)
    assert (found.floats, found.damages) == ((), ()) and made.timed == []
    ((count, miou),) = found.tried
    assert count == 0 and miou == pytest.approx(0.798)
    assert made.proven == [frozenset("ab"), frozenset()]
    assert found.fp32 == FP32 and found.drop == pytest.approx(0.2)


def test_layers_that_were_asked_for_stay_whatever_they_cost() -> None:
    made = Bench({"a": 3.0, "b": 0.1, "c": 2.0, "d": 0.0}, fp32_ms=0.0)
    # Slower than fp32, and yet it is what was asked for.
    assert made.search(5.5, fixed=("d", "b")).floats == ("b", "d")
    made.fp32_ms = 1e3
    assert made.search(2.5, fixed=["b"]).floats == ("a", "b")
    with pytest.raises(RequestError, match=r"no layer e to leave .* the layers are a, b, c, d"):
        made.search(1.0, fixed=["e"])


def test_a_budget_that_cannot_be_met_shows_the_best() -> None:
    made = Bench({"a": 3.0, "b": 2.0, "c": 1.0, "d": 1.0, "e": 1.04})
    words = (
        r"no INT8 graph within 0.5 points of mIoU was found: the best loses 3.04 \(76.96 % instead "
        r"of 80.00 %\) with 2 of 5 layers in floating point; allow --max-drop 3.1, give more"
    )
    with pytest.raises(CalibrationError, match=words):
        made.search(0.5)
    # What the message says is enough.
    assert made.search(3.1).floats == ("a", "b")


def test_a_graph_that_is_no_faster_than_floats_is_refused() -> None:
    made = Bench({"a": 3.0, "b": 0.1}, fp32_ms=1.0)
    with pytest.raises(CalibrationError, match=r"1 of 2 layers .* no faster than the model"):
        made.search(1.0)


def test_labels_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Bench({"a": 3.0})
    monkeypatch.setattr(Bench, "figure", lambda *_: math.nan)
    with pytest.raises(CalibrationError, match="nothing in some streets val has a label"):
        made.search(1.0)


def test_instances_lose_points_of_ap_and_are_not_trained() -> None:
    made = Bench({"a": 3.0, "b": 3.0}, figure_name="AP")
    with pytest.raises(CalibrationError, match="within 1 points of AP was found") as refusal:
        made.search(1.0)
    assert str(refusal.value).endswith("or give more calibration frames")


def test_damages_are_of_each_layer_alone() -> None:
    made = Bench({"a": 3.0, "b": 2.0, "c": 0.0})
    assert [(each.layer, each.damage) for each in damages(cast(Laboratory, made))] == [
        ("a", 0.06), ("b", 0.04), ("c", 0.0),
    ]  # fmt: skip


# --- what is kept


def fails() -> float:
    raise AssertionError("measured again")


def test_trials_go_on_and_begin_anew_for_something_else(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    one = Trials(path, "streets")
    # Values come back bit by bit.
    value = 0.1 + 0.2
    assert one.get("a", lambda: value) == value and one.get("a", fails) == value
    again = Trials(path, "streets")
    assert again.get("a", fails) == value and again.get("b", lambda: 2.0) == 2.0
    other = Trials(path, "fields")
    assert other.get("a", lambda: 3.0) == 3.0
    assert Trials(path, "fields").get("a", fails) == 3.0
    assert Trials(path, "streets").get("a", lambda: 4.0) == 4.0
    assert [each.name for each in tmp_path.iterdir()] == ["trials.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'"text"',
        b'{"context": "streets"}',
        b'{"context": "streets", "values": []}',
        b'{"context": "streets", "values": {"a": "x"}}',
        b'{"context": "streets", "values": {"a": null}}',
        json.dumps({"context": "streets", "values": {"a": 1.0}}).encode()[:-4],
    ],
)
def test_damaged_trials_are_measured_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trials.json"
    path.write_bytes(content)
    assert Trials(path, "streets").get("a", lambda: 7.0) == 7.0
    assert Trials(path, "streets").get("a", fails) == 7.0


def test_an_interrupted_measurement_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"

    def stopped() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trials(path, "streets").get("a", stopped)
    assert Trials(path, "streets").get("a", lambda: 1.0) == 1.0
