"""Pruning, training and quantizing by one recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="bundles are made with onnx")

import torch

import edgeseg.export.compress as module
from edgeseg.bundle import Bundle
from edgeseg.calibration.package import quantize_bundle
from edgeseg.cli import main
from edgeseg.compare import Comparison, Spread, Standing
from edgeseg.errors import EdgeSegError, EngineError, RequestError
from edgeseg.export.compress import compress
from edgeseg.export.compress_recipe import CompressionRecipe, Cut
from edgeseg.export.compress_report import CompressionReport, Step
from edgeseg.export.structure import Cost
from edgeseg.export.weights import read_weights

STREETS = "synthetic:?frames=4&size=96x128"
RECIPE = f"""
model = "streets"
size = "96x128"
data = "{STREETS}"
calibration = "{STREETS}"
balance = "{STREETS}"
max_drop = 100.0

[[prune]]
macs = 0.8
train_steps = 1

[[prune]]
macs = 0.6
protect = ["head"]

[train]
steps = 2
crop = [96, 128]
full_height = 96
warmup = 1

[[train.source]]
uri = "{STREETS}"
share = 2

[train.distillation]
alpha = 0.5

[quantize]
frames = 4
"""
STEPS = ["original", "pruned 1", "distilled 1", "pruned 2", "distilled 2", "INT8"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(**changes: Any) -> CompressionRecipe:
    given: dict[str, Any] = {
        "model": "bisenetv2",
        "data": STREETS,
        "calibration": STREETS,
        "prune": [{"macs": 0.5}],
        **changes,
    }
    return CompressionRecipe.from_dict({k: v for k, v in given.items() if v is not None})


def bundles(steps: Path) -> list[Bundle]:
    """Those before INT8, in their order."""
    titles = enumerate(STEPS[:5])
    return [Bundle.open(steps / f"{place}-{title.replace(' ', '-')}") for place, title in titles]


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(RECIPE, encoding="utf-8")
    found = CompressionRecipe.read(file)
    assert found.architecture == "bisenetv2"
    assert found.calibration == (STREETS,)
    assert found.balance == (STREETS,)
    assert [cut.macs for cut in found.cuts] == [0.8, 0.6]
    assert found.cuts[1].rules.protect == ("head",)
    assert found.train is not None
    assert found.train.model == "bisenetv2"
    assert found.train.crop == (96, 128)
    assert found.train.distillation is not None
    assert found.quantize is not None
    assert found.quantize.frames == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": None}, r"does nothing; add one or more of \[\[prune\]\]"),
        ({"data": None}, "does not say data"),
        ({"model": 3}, "does not say model"),
        ({"model": "bisenet9"}, "bisenet9"),
        ({"calibration": None}, "name a folder, a list or a video in calibration"),
        ({"max_drop": -1}, "max_drop is in points"),
        ({"max_drop": math.nan}, "max_drop is in points"),
        ({"pictures": 0}, "1 or more"),
        ({"teacher": "streets"}, r"table \[train.distillation\]"),
        ({"balance": STREETS}, r"balanced after a training; add a table \[train\]"),
        ({"prune": [{}]}, "one of macs, parameters and milliseconds, and none of them came"),
        ({"prune": [{"macs": 0.5, "milliseconds": 3}]}, "and macs and milliseconds came"),
        ({"prune": [{"macs": 0.5, "importance": "luck"}]}, "importance is one of"),
        ({"prune": [{"macs": 0.5, "train_steps": 0}]}, "train_steps .* are 1 or more"),
        ({"prune": [{"macs": 0.5, "multiple": 0}]}, "multiple is 1 channel or more"),
        ({"prune": [{"macs": -1}]}, "above 0"),
        ({"prune": [{"macs": 0.5, "depth": 1}]}, "does not fit: .*depth"),
        ({"prune": {"macs": 0.5}}, r"tables \[\[prune\]\] is wanted"),
        ({"train": {"steps": 3}}, "training needs data"),
        ({"train": {"stepz": 3}}, r"\[train\] of the recipe does not fit: .*stepz"),
        ({"quantize": {"frames": "many"}}, r"\[quantize\] of the recipe does not fit"),
        ({"speed": 3}, "does not fit: .*speed"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeSegError, match=message):
        recipe(**changes)


def test_shares_are_of_the_model_that_the_recipe_begins_with() -> None:
    whole = Cost(1000, 400)
    assert Cut(macs=0.25).target(whole).amount == 250
    assert Cut(parameters=0.5).target(whole).amount == 200
    assert Cut(macs=600.0).target(whole).amount == 600
    assert Cut(milliseconds=0.5).target(whole).amount == 0.5


def made_up(
    tmp_path: Path, figures: list[tuple[float, float]], max_drop: float = 1.0
) -> CompressionReport:
    """Steps with (accuracy, milliseconds) ``figures``."""
    steps, standings = [], []
    for place, (accuracy, ms) in enumerate(figures):
        bundle = tmp_path / str(place)
        bundle.mkdir()
        (bundle / "model.onnx").write_bytes(bytes(1000 * (place + 1)))
        filters = {"stem": 64 - 8 * place, "head": 11}
        steps.append(Step(f"step {place}", bundle, Cost(1000 - place, 100 - place), filters))
        spread = Spread(ms - 1, ms, ms + 1)
        standings.append(
            Standing(f"step {place}", {"miou": accuracy, "boundary_iou": 0.1}, spread, spread)
        )
    return CompressionReport(
        name="small",
        recipe=recipe(max_drop=max_drop),
        steps=tuple(steps),
        comparison=Comparison("streets", "val", 4, tuple(standings), 1.0),
        engine="an engine",
    )


@pytest.mark.parametrize(
    ("figures", "max_drop", "best"),
    [
        ([(0.60, 10.0), (0.55, 5.0), (0.595, 6.0), (0.592, 4.0)], 1.0, 3),
        ([(0.60, 10.0), (0.55, 5.0), (0.595, 6.0), (0.58, 4.0)], 1.0, 2),
        ([(0.60, 10.0), (0.55, 5.0), (0.595, 6.0), (0.58, 4.0)], 5.0, 1 + 2),
        ([(0.60, 10.0), (0.59, 5.0)], 1.0, 1),
        ([(0.60, 10.0), (0.589, 5.0)], 1.0, 0),
        ([(0.60, 10.0), (0.61, 11.0)], 1.0, 0),
    ],
)
def test_the_best_is_the_fastest_within_the_budget(
    tmp_path: Path, figures: list[tuple[float, float]], max_drop: float, best: int
) -> None:
    assert made_up(tmp_path, figures, max_drop).best == best


def test_a_report_has_every_step_and_marks_the_best(tmp_path: Path) -> None:
    report = made_up(tmp_path, [(0.60, 10.0), (0.595, 5.0)])
    text = report.render()
    assert "step 1 (best)" in text
    assert "2.00 times as fast, -0.50 points of mIoU" in text
    said = report.to_dict()
    assert said["best"] == "step 1"
    assert said["metric"] == "miou"
    page = report.report().to_html()
    assert "Accuracy against time" in page
    assert "64 → 56" in page
    other = tmp_path / "other"
    other.mkdir()
    assert "No step is faster" in made_up(other, [(0.60, 10.0), (0.5, 5.0)]).render()


def test_figures_without_a_value_are_passed_over(tmp_path: Path) -> None:
    report = made_up(tmp_path, [(0.6, 10.0)])
    spread = Spread(1, 1, 1)
    objects = Standing("x", {"box_ap": 0.5, "mask_ap": math.nan}, spread, spread)
    boxes = replace(report, comparison=replace(report.comparison, standings=(objects,)))
    assert boxes.metric == "box_ap"


def test_nothing_is_done_for_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no weights of its own"):
        compress(recipe(), tmp_path / "small")
    with pytest.raises(RequestError, match="tensorrt"):
        compress(recipe(), tmp_path / "small", engine="tensorrt")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RequestError, match="exists and is no bundle"):
        compress(recipe(model="streets"), taken)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".steps")) == [
        "taken"
    ]


def test_classes_that_cannot_be_balanced_are_told_before_the_work(tmp_path: Path) -> None:
    train = {
        "steps": 1,
        "crop": [96, 128],
        "full_height": 96,
        "source": [{"uri": STREETS, "share": 2}],
    }
    objects = recipe(model="street-objects", balance=STREETS, train=train, size="96x128")
    with pytest.raises(RequestError, match="street-objects cannot be balanced"):
        compress(objects, tmp_path / "small")
    nowhere = recipe(model="streets", balance="camvid:nowhere", train=train, size="96x128")
    with pytest.raises(EdgeSegError, match="nowhere"):
        compress(nowhere, tmp_path / "other")
    assert not list(tmp_path.rglob("*pruned*"))


@pytest.mark.slow
def test_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pruned twice, distilled after each cut, INT8; interrupted before the last, and gone on."""
    file, target = tmp_path / "small.toml", tmp_path / "small"
    file.write_text(RECIPE, encoding="utf-8")
    wanted = CompressionRecipe.read(file)

    real = quantize_bundle

    def interrupted(*_: Any, **__: Any) -> None:
        raise EngineError("the machine was switched off")

    monkeypatch.setattr(module, "quantize_bundle", interrupted)
    with pytest.raises(EngineError, match="switched off"):
        compress(wanted, target)
    assert not target.exists()
    steps = tmp_path / "small.steps"
    trained = (steps / "4-distilled-2.pt").stat().st_mtime_ns

    monkeypatch.setattr(module, "quantize_bundle", real)
    capsys.readouterr()
    assert main(["compress", str(file), "-o", str(target), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert "distilled 2: done already" in err
    assert (steps / "4-distilled-2.pt").stat().st_mtime_ns == trained

    said = json.loads(out)
    assert [step["step"] for step in said["steps"]] == STEPS
    macs = [step["macs"] for step in said["steps"]]
    assert macs[1] == macs[2] <= 0.8 * macs[0]
    assert macs[3] == macs[4] == macs[5] <= 0.6 * macs[0]
    # The second cut leaves the head as it was, and takes from others.
    before, after = (read_weights(steps / f"{name}.pt") for name in ("2-distilled-1", "3-pruned-2"))
    smaller = {name for name in before if after[name].shape[:1] < before[name].shape[:1]}
    assert smaller
    assert not any(name.startswith("head.") for name in smaller)
    fastest = min(said["steps"], key=lambda step: step["milliseconds"]["p50"])
    assert said["best"] == fastest["step"]
    made = Bundle.open(target)
    assert made.manifest["compression"]["best"] == said["best"]
    assert made.model_path.read_bytes() == next(
        (steps / f"{place}-{title.replace(' ', '-')}" / "model.onnx").read_bytes()
        for place, title in enumerate(STEPS)
        if title == said["best"]
    )
    assert "Accuracy against time" in (target / "report.html").read_text(encoding="utf-8")
    assert Bundle.open(steps / "5-INT8").model.is_quantized()
    balanced = ["balance" in made.manifest["provenance"] for made in bundles(steps)]
    assert balanced == [title.startswith("distilled") for title in STEPS[:5]]

    # Another training, and all that follows is made anew; what came before is not.
    changed = replace(wanted, cuts=(wanted.cuts[0], replace(wanted.cuts[1], train_steps=1)))
    lines: list[str] = []
    compress(changed, target, report=lines.append)
    done = [line.split(":")[0] for line in lines if "done already" in line]
    assert done == STEPS[:4]

    # A budget that only the original keeps: the sentence, and nothing at the target.
    other = tmp_path / "other"
    (tmp_path / "other.steps").symlink_to(steps)
    hard = replace(wanted, max_drop=0.0)
    monkeypatch.setattr(CompressionReport, "best", property(lambda _: 0))
    told: list[str] = []
    with pytest.raises(RequestError, match="nothing beat the original"):
        compress(replace(hard, cuts=changed.cuts), other, report=told.append)
    assert not other.exists()
    # The figures came at the cost of hours, so they are told nevertheless.
    assert "No step is faster and loses 0 points" in told[-1]
    assert all(step in told[-1] for step in STEPS)
