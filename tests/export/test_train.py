"""Training: recipes, steps that learn, runs that go on where they stopped."""

from __future__ import annotations

import csv
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch import Tensor

from edgeseg.classes import CITYSCAPES
from edgeseg.cli import main
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.errors import DataError, RequestError, WeightsError
from edgeseg.export import semantic_training
from edgeseg.export.losses import ohem_cross_entropy
from edgeseg.export.models import BiSeNetV2, create
from edgeseg.export.ranks import chosen_device
from edgeseg.export.recipe import Recipe, Source, sources_of
from edgeseg.export.train import train as trained
from edgeseg.export.training_task import Batch, Score
from edgeseg.export.weights import load_weights, read_weights, save_weights

# `edgeseg.export.train` as a module; the name above is the function in it.
module = importlib.import_module("edgeseg.export.train")

STREETS = "synthetic:?size=64x96&frames=8"

RECIPE = Recipe(
    model="bisenetv2",
    sources=(Source(STREETS, 2),),
    steps=2,
    crop=(64, 96),
    full_height=64,
    warmup=1,
    mixed_precision=False,
)


# No process for the batches: starting one takes longer than most of these runs.
train = partial(trained, workers=0, device="cpu")


@pytest.fixture
def small(tiny_definition: str) -> Recipe:
    """For the small network: a step takes no time."""
    return replace(RECIPE, model=tiny_definition, sources=(Source(STREETS, 4),), crop=(32, 32))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that two runs can be compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state_of(path: Path) -> dict[str, Tensor]:
    found = read_weights(path)
    assert all(torch.isfinite(value).all() for value in found.values())
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixed_precision": True}, {"auxiliary_heads": True}],
    ids=["plain", "mixed precision", "training heads"],
)
def test_two_steps_give_a_checkpoint(changes: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "made" / "model.pt"
    found = train(replace(RECIPE, **changes), output, report=said.append)
    assert found == output
    assert [path.name for path in output.parent.iterdir()] == ["model.pt"]
    assert said == [f"2 steps; {output}"]
    state = state_of(output)
    load_weights(create("bisenetv2", 11), output)
    assert any(key.startswith("aux") for key in state) == bool(changes.get("auxiliary_heads"))
    torch.manual_seed(RECIPE.seed)
    fresh = create("bisenetv2", 11).state_dict()
    moved = [key for key, value in fresh.items() if not torch.equal(value, state[key])]
    assert len(moved) > len(fresh) // 2


def test_a_run_learns(small: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = replace(small, steps=100, learning_rate=3e-3, average=0.9)
    train(recipe, tmp_path / "model.pt", report=said.append)
    losses = [float(line.split()[3]) for line in said if line.startswith("step")]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.1


class Stopped(Exception):
    """What a closed terminal or a full disk looks like from here."""


@pytest.mark.parametrize("finished", [1, 3])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, steps=4)
    seen: dict[str, list[Tensor]] = {"whole": [], "parts": []}
    run = "whole"
    losses_of = ohem_cross_entropy

    def watched(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        if run == "parts" and len(seen[run]) == finished:
            raise Stopped
        seen[run].append(labels)
        loss: Tensor = losses_of(logits, labels, **options)
        return loss

    monkeypatch.setitem(semantic_training._LOSSES, "ohem", watched)
    train(recipe, tmp_path / "whole.pt", report=lambda _: None)

    run = "parts"
    parts = tmp_path / "parts.pt"
    with pytest.raises(Stopped):
        train(recipe, parts, validate_every=1, report=lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.pt.resume", "whole.pt"]
    assert torch.load(tmp_path / "parts.pt.resume", weights_only=True)["step"] == finished
    run = "rest"
    seen["rest"] = []
    said: list[str] = []
    train(recipe, parts, validate_every=1, report=said.append)
    assert said[0] == f"resuming at step {finished}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.pt", "whole.pt"]

    batches = [*seen["parts"], *seen["rest"]]
    assert len(batches) == len(seen["whole"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(batches, seen["whole"], strict=True))
    whole, again = state_of(tmp_path / "whole.pt"), state_of(parts)
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0, msg=key)


def test_a_run_of_another_recipe_is_not_gone_on_with(small: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "model.pt"

    def stop(_: str) -> None:
        raise Stopped

    validate = ((STREETS, "val"),)
    with pytest.raises(Stopped):
        train(small, output, validate=validate, validate_every=1, report=stop)
    kept = (tmp_path / "model.pt.resume").read_bytes()
    with pytest.raises(RequestError, match=r"model\.pt\.resume belongs to a run of another recipe"):
        train(replace(small, seed=9), output, report=lambda _: None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "model.pt.resume": kept
    }
    (tmp_path / "model.pt.resume").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(WeightsError, match="delete it to begin anew"):
        train(small, output, report=lambda _: None)


def test_a_run_is_the_same_twice_and_another_with_another_seed(
    small: Recipe, tmp_path: Path
) -> None:
    states = []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.pt"
        train(replace(small, seed=seed), path, report=lambda _: None)
        states.append(state_of(path))
    same = [torch.equal(value, states[1][key]) for key, value in states[0].items()]
    other = [torch.equal(value, states[2][key]) for key, value in states[0].items()]
    assert all(same)
    assert not all(other)


def test_validation_says_how_it_goes(small: Recipe, camvid: str, tmp_path: Path) -> None:
    said: list[str] = []
    train(
        small,
        tmp_path / "model.pt",
        validate=((camvid, "val"), (STREETS, "val")),
        validate_every=1,
        report=said.append,
    )
    lines = [line for line in said if "mIoU" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["CamVid", "synthetic streets"] * 3
    assert all("bicyclist" in line for line in lines)


def test_a_run_begins_where_it_is_told(tiny_definition: str, small: Recipe, tmp_path: Path) -> None:
    start = create(tiny_definition, 11)
    save_weights(start, tmp_path / "start.pt")
    # Out of time before the first step: what comes out is what went in.
    train(
        small,
        tmp_path / "model.pt",
        start=tmp_path / "start.pt",
        minutes=1e-9,
        report=lambda _: None,
    )
    for key, value in state_of(tmp_path / "model.pt").items():
        assert torch.equal(value, start.state_dict()[key])


@pytest.mark.parametrize(
    ("start", "words"),
    [("nothing.pt", "does not exist"), ("streets", "does not fit Tiny")],
)
def test_a_start_that_does_not_fit(small: Recipe, start: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=words):
        train(small, tmp_path / "model.pt", start=start, report=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(
    small: Recipe, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(logits: Tensor, *_: object, **__: object) -> Tensor:
        return logits.sum() * value

    monkeypatch.setitem(semantic_training._LOSSES, "ohem", broken)
    with pytest.raises(DataError, match=r"the loss is .* at step 0; .* kept in .*batch-0"):
        train(small, tmp_path / "model.pt", report=lambda _: None)
    (kept,) = tmp_path.iterdir()
    batch = torch.load(kept, weights_only=True)
    assert batch["images"].shape == (4, 32, 32, 3)
    assert batch["truth"]["labels"].shape == (4, 32, 32)


def test_data_sets_with_different_classes_do_not_mix(
    small: Recipe, camvid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(uri: str, split: str) -> Dataset:
        dataset = open_dataset(uri, split)
        if uri.startswith("camvid"):
            dataset.classes = CITYSCAPES
        return dataset

    monkeypatch.setattr(semantic_training, "open_dataset", opened)
    recipe = replace(small, sources=(Source(STREETS, 2), Source(camvid, 2, split="val")))
    with pytest.raises(DataError, match=r"synthetic streets has the classes sky.* one list"):
        train(recipe, tmp_path / "model.pt", report=lambda _: None)


def test_a_picture_that_cannot_be_read_ends_the_run(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Found by the thread that prepares batches, raised where the run was started.
    opened = open_dataset(STREETS, "train")
    read = type(opened).sample
    counted = iter(range(1000))

    def sample(self: Dataset, index: int) -> Any:
        if next(counted) >= len(opened) + 3:
            raise DataError("street.png is cut short")
        return read(self, index)

    monkeypatch.setattr(type(opened), "sample", sample)
    with pytest.raises(DataError, match="cut short"):
        train(replace(small, steps=50), tmp_path / "model.pt", report=lambda _: None)


def test_pictures_without_a_label_teach_nothing(
    small: Recipe, camvid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(camvid, "val")
    read = type(dataset).sample

    def blank(self: Dataset, index: int) -> Any:
        sample = read(self, index)
        return replace(sample, labels=np.full_like(sample.labels, 11))

    monkeypatch.setattr(type(dataset), "sample", blank)
    recipe = replace(small, sources=(Source(camvid, 2, split="val"),))
    with pytest.raises(DataError, match="no pixel of CamVid has a label"):
        train(recipe, tmp_path / "model.pt", report=lambda _: None)


@pytest.mark.parametrize("place", ["file/model.pt", "folder"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    small: Recipe, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(semantic_training, "open_dataset", None)
    with pytest.raises(WeightsError, match="cannot be written"):
        train(small, tmp_path / place, report=lambda _: None)


def test_batches_are_those_of_the_recipe(camvid: str) -> None:
    recipe = replace(
        RECIPE, sources=(Source(STREETS, 1), Source(camvid, 2, split="val")), crop=(32, 64)
    )
    task = semantic_training.SemanticTraining(recipe, ())
    orders = []
    for workers, first, rank in ((0, 0, 0), (2, 0, 0), (0, 2, 0), (0, 0, 1)):
        found = module._loaded(task, recipe.seed, rank, first, workers)
        orders.append([next(found) for _ in range(4 - first)])
        found.close()
    for batch in orders[0]:
        assert batch.images.shape == (3, 32, 64, 3)
        assert batch.truth.labels.shape == (3, 32, 64)
        assert batch.truth.weights is None
        assert batch.images.dtype == batch.truth.labels.dtype == torch.uint8
    for other, skipped in ((orders[1], 0), (orders[2], 2)):
        for mine, theirs in zip(orders[0][skipped:], other, strict=True):
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.truth.labels, theirs.truth.labels)
    # Another process of the same run has others.
    assert not torch.equal(orders[0][0].images, orders[3][0].images)


TOML = f"""
model = "bisenetv2"
steps = 3
crop = [64, 96]
scale = [0.8, 1.2]

[[source]]
uri = "{STREETS}"
share = 2
"""


def test_a_recipe_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    assert Recipe.read(path) == Recipe(
        model="bisenetv2",
        sources=(Source(STREETS, 2),),
        steps=3,
        crop=(64, 96),
        scale=(0.8, 1.2),
    )


BAD_RECIPES: dict[str, tuple[str, str]] = {
    "an unknown key": ("speed = 3\n" + TOML, "speed"),
    "an unknown key of a source": (TOML + "weight = 2\n", "weight"),
    "no steps": (TOML.replace("steps = 3", ""), "steps"),
    "no model": (TOML.replace('model = "bisenetv2"', ""), "model"),
    "an unknown model": (TOML.replace("bisenetv2", "segnet"), "bisenetv1, bisenetv2"),
    "no source": (TOML.split("[[source]]", maxsplit=1)[0], r"\[\[source\]\]"),
    "a source without its list": (TOML.replace("[[source]]", "[source]"), "does not fit"),
    "a batch of one": (TOML.replace("share = 2", "share = 1"), "add up to 1; raise"),
    "too much augment": (TOML.replace("share = 2", "share = 2\naugment = 2"), "between 0 and 1"),
    "a share of nothing": (TOML.replace("share = 2", "share = 0"), "1 or more"),
    "a share that is no number": (TOML.replace("share = 2", 'share = "all"'), "whole number"),
    "steps that are no number": (TOML.replace("steps = 3", 'steps = "many"'), "does not fit"),
    "zero steps": (TOML.replace("steps = 3", "steps = 0"), "at least one step, and 0 came"),
    "a crop between": (TOML.replace("[64, 96]", "[60, 96]"), r"multiples of 32, and \[60, 96\]"),
    "a crop of one number": (TOML.replace("[64, 96]", "[64]"), r"\[height, width\]"),
    "a crop that is no list": (TOML.replace("[64, 96]", "64"), "does not fit"),
    "no TOML": ("model: bisenetv2", "not valid TOML"),
    "no text": ("\udcff\udcfe", "not valid TOML"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_cannot_be(case: str, tmp_path: Path) -> None:
    content, words = BAD_RECIPES[case]
    path = tmp_path / "recipe.toml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError, match=words):
        Recipe.read(path)


@pytest.mark.parametrize("place", ["missing.toml", "."])
def test_a_recipe_that_cannot_be_read(place: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        Recipe.read(tmp_path / place)


RECIPES = sorted(path.name for path in (files("edgeseg.export") / "recipes").iterdir())
SMALLER = [name for name in RECIPES if name.endswith("_small.toml")]
SHIPPED = [name for name in RECIPES if name not in SMALLER]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_recipes_are_recipes(name: str) -> None:
    model = {"fchardnet.toml": "fchardnet70", "yolact.toml": "yolact_resnet50"}.get(name)
    if name.startswith("bisenet"):
        model = name.removesuffix(".toml")
    data = (Source(STREETS, 8),)
    path = str(files("edgeseg.export") / "recipes" / name)
    recipe = Recipe.read(path, model=model, sources=() if model is None else data)
    assert recipe.batch >= 2
    assert all(source.uri.split(":")[0] in ("camvid", "synthetic") for source in recipe.sources)
    if model is not None:
        assert Recipe.published(model, data) == recipe


@pytest.mark.parametrize("name", SMALLER)
def test_the_shipped_recipes_of_smaller_models_are_recipes(name: str) -> None:
    pytest.importorskip("onnx", reason="bundles are made with onnx")
    from edgeseg.export.compress_recipe import CompressionRecipe

    recipe = CompressionRecipe.read(str(files("edgeseg.export") / "recipes" / name))
    assert recipe.train is not None
    assert recipe.train.distillation is not None
    assert recipe.cuts
    assert recipe.quantize is not None


def test_a_recipe_and_a_model_agree(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    assert Recipe.read(path, model="bisenetv2").model == "bisenetv2"
    with pytest.raises(RequestError, match="is for bisenetv2, and bisenetv1 is to be trained"):
        Recipe.read(path, model="bisenetv1")
    other = (Source("synthetic:", 3),)
    assert Recipe.read(path, sources=other).sources == other
    path.write_text(TOML.replace('model = "bisenetv2"', ""))
    assert Recipe.read(path, model="bisenetv1").model == "bisenetv1"
    with pytest.raises(RequestError, match="no published recipe for maskrcnn_resnet50_fpn"):
        Recipe.published("maskrcnn_resnet50_fpn", other)
    with pytest.raises(RequestError, match="needs data"):
        Recipe.published("bisenetv2", ())


@pytest.mark.parametrize(
    ("uris", "shares", "wanted"),
    [
        ([], None, []),
        (["a"], None, [8]),
        (["a", "b", "c"], None, [3, 3, 3]),
        (["a", "b"], "3,5", [3, 5]),
    ],
)
def test_sources_of_a_command_line(uris: list[str], shares: str | None, wanted: list[int]) -> None:
    found = sources_of(uris, shares, "train")
    assert found == tuple(Source(uri, n, "train") for uri, n in zip(uris, wanted, strict=True))


@pytest.mark.parametrize("shares", ["3", "3,4,5", "3,x", "0,5", "3,-1", ""])
def test_shares_that_do_not_fit(shares: str) -> None:
    with pytest.raises(RequestError, match="one for each of 2 data sets"):
        sources_of(["a", "b"], shares, "train")


def test_the_command_line_trains(
    tiny_definition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TOML.replace("bisenetv2", "tiny").replace("share = 2", "share = 4"))
    output = tmp_path / "model.pt"
    line = ["train", "tiny", "--recipe", str(recipe), "-o", str(output), "--workers", "0"]
    assert main([*line, "--validate", STREETS, "--history", str(tmp_path / "log")]) == 0
    assert "mIoU" in capsys.readouterr().out
    load_weights(create(tiny_definition, 11), output)
    rows = (tmp_path / "log" / "scalars.csv").read_text().splitlines()
    assert rows[0] == "step,seconds,name,value"
    assert {row.split(",")[2] for row in rows[1:]} == {
        "loss",
        "loss/main",
        "rate",
        "synthetic streets mIoU",
    }
    # The options take the place of what the recipe says.
    assert main([*line, "--steps", "1", "--data", STREETS, "--shares", "2", "--seed", "4"]) == 0
    assert "1 steps" in capsys.readouterr().out
    recipe.write_text("speed = 1")
    assert main(line) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["train", "tiny", "-o", str(output)]) == 2
    assert "no published recipe" in capsys.readouterr().err


def test_a_log_goes_on_where_the_run_does(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    calls = iter(range(100))

    def watched(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        if next(calls) == 3:
            raise Stopped
        return ohem_cross_entropy(logits, labels, **options)

    monkeypatch.setitem(semantic_training._LOSSES, "ohem", watched)
    recipe = replace(small, steps=5)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "model.pt", log=log, save_every=2, report=lambda _: None)
    table = log / "scalars.csv"
    written = table.read_text()
    # Cut short in the middle of a row, as a killed process leaves it.
    table.write_text(written[:-4])
    train(recipe, tmp_path / "model.pt", log=log, save_every=2, report=lambda _: None)
    rows = [row.split(",") for row in table.read_text().splitlines()[1:]]
    steps = [int(row[0]) for row in rows if row[2] == "loss"]
    assert steps == [1, 2, 3, 4, 5]
    again = written.splitlines()
    assert table.read_text().splitlines()[: len(again) - 3] == again[:-3]


def test_the_best_network_is_kept(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.3, 0.6, 0.5, 0.9])
    kept: list[dict[str, Tensor]] = []

    def scores(_: object, network: Any, limit: int | None) -> list[Score]:
        kept.append({name: value.clone() for name, value in network.state_dict().items()})
        return [Score("streets", next(values), "streets")]

    monkeypatch.setattr(semantic_training.SemanticTraining, "scores", scores)
    train(
        replace(small, steps=3, average=0.5),
        tmp_path / "model.pt",
        validate_every=1,
        report=lambda _: None,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.best.pt", "model.pt"]
    best, last = state_of(tmp_path / "model.best.pt"), state_of(tmp_path / "model.pt")
    assert all(torch.equal(best[name], kept[1][name]) for name in best)
    assert all(torch.equal(last[name], kept[3][name]) for name in last)
    assert not all(torch.equal(last[name], best[name]) for name in last)


def test_gradients_of_several_batches_make_one_step(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loss that is the mean over all samples, so two halves weigh as much as the whole; with no
    # batch norm in the way, which sees each batch alone.
    def mean(logits: Tensor, labels: Tensor, **_: object) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels % 11)

    monkeypatch.setitem(semantic_training._LOSSES, "ohem", mean)
    seen: list[Batch[Any]] = []
    drawn = semantic_training.SemanticBatches.drawn

    def whole(self: Any, rng: np.random.Generator) -> Batch[Any]:
        parts = seen[:2]
        return Batch(
            torch.cat([part.images for part in parts]),
            semantic_training.SemanticTruth(torch.cat([part.truth.labels for part in parts]), None),
        )

    def kept(self: Any, rng: np.random.Generator) -> Batch[Any]:
        seen.append(drawn(self, rng))
        return seen[-1]

    recipe = replace(small, steps=1, average=0.0, optimizer="sgd")
    monkeypatch.setattr(torch.nn, "BatchNorm2d", torch.nn.Identity)
    monkeypatch.setattr(semantic_training.SemanticBatches, "drawn", kept)
    train(replace(recipe, accumulate=2), tmp_path / "two.pt", report=lambda _: None)
    assert len(seen) == 2
    monkeypatch.setattr(semantic_training.SemanticBatches, "drawn", whole)
    train(recipe, tmp_path / "one.pt", report=lambda _: None)
    one, two = state_of(tmp_path / "one.pt"), state_of(tmp_path / "two.pt")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 0}, "at least one batch"),
        ({"optimizer": "lion"}, "adamw, sgd"),
        ({"loss": "mse"}, "ohem, bootstrapped"),
        ({"boundary_weight": -1.0}, "0 or more"),
        ({"boundary_reach": 0.0}, "above 0 pixels"),
    ],
)
def test_choices_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        replace(RECIPE, **changes)


def test_boundaries_and_the_other_loss(small: Recipe, tmp_path: Path) -> None:
    recipe = replace(small, boundary_weight=2.0, boundary_reach=3.0, loss="bootstrapped")
    task = semantic_training.SemanticTraining(recipe, ())
    truth = task.batches.drawn(np.random.default_rng(0)).truth
    assert truth.weights is not None
    assert truth.weights.shape == truth.labels.shape
    assert 1 < float(truth.weights.max()) <= 3
    train(recipe, tmp_path / "model.pt", report=lambda _: None)
    state_of(tmp_path / "model.pt")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(RequestError, match="auto, cpu or cuda"):
        chosen_device("tpu")
    if not torch.cuda.is_available():
        assert chosen_device("auto") == torch.device("cpu")
        with pytest.raises(RequestError, match="finds no GPU"):
            chosen_device("cuda")


def _command(recipe: Path, output: Path, *options: str) -> list[str]:
    return ["train", "bisenetv2", "--recipe", str(recipe), "-o", str(output), *options]


_SAVING_OFTEN = """
import sys
from edgeseg.export.recipe import Recipe
from edgeseg.export.train import train
recipe, place = sys.argv[1:]
train(Recipe.read(recipe), place + ".pt", save_every=3, workers=1, log=place)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TOML.replace("steps = 3", "steps = 12\nmixed_precision = false"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(name: str) -> list[str]:
        return [sys.executable, "-c", _SAVING_OFTEN, str(recipe), str(tmp_path / name)]

    def losses(name: str) -> dict[int, str]:
        rows = csv.reader((tmp_path / name / "scalars.csv").read_text().splitlines())
        return {int(row[0]): row[3] for row in rows if row[2] == "loss"}

    subprocess.run(command("whole"), check=True, env=environment)
    killed = subprocess.Popen(command("parts"), env=environment, start_new_session=True)
    kept = tmp_path / "parts.pt.resume"
    while not kept.exists():
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert kept.exists()
    assert not (tmp_path / "parts.pt").exists()
    subprocess.run(command("parts"), check=True, env=environment)
    assert losses("parts") == losses("whole")
    assert len(losses("whole")) == 12
    one, two = state_of(tmp_path / "whole.pt"), state_of(tmp_path / "parts.pt")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        TOML.replace("steps = 3", 'steps = 1\nmixed_precision = false\noptimizer = "sgd"')
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ("--workers", "0", "--history", str(tmp_path / "log"), "--validate", STREETS)
    done = subprocess.run(
        [
            *torchrun,
            "--nproc-per-node=2",
            "-m",
            "edgeseg",
            *_command(recipe, tmp_path / "two.pt", *options),
        ],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    # One of them speaks and writes.
    assert done.stdout.count("mIoU") == 1
    assert done.stdout.count("1 steps") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "recipe.toml", "two.pt"]
    # The step of both is that of one process on the batches of both.
    drawn = semantic_training.SemanticBatches.drawn
    ranks = iter((0, 1))

    def of_both(self: Any, _: np.random.Generator) -> Batch[Any]:
        return drawn(self, np.random.default_rng((0, 0, next(ranks))))

    monkeypatch.setattr(semantic_training.SemanticBatches, "drawn", of_both)
    alone = tmp_path / "alone.pt"
    train(replace(Recipe.read(recipe), accumulate=2), alone, report=lambda _: None)
    one, two = state_of(alone), state_of(tmp_path / "two.pt")
    torch.manual_seed(0)
    fresh = create("bisenetv2", 11).state_dict()
    for name, value in one.items():
        # Batch norms remember what each process saw itself.
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(one[BiSeNetV2.classifier], fresh[BiSeNetV2.classifier])
