"""Training: recipes, steps that learn, runs that go on where they stopped."""

from __future__ import annotations

import importlib
import math
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
from edgeseg.export.models import create
from edgeseg.export.recipe import Recipe, Source
from edgeseg.export.train import train as trained
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


SHIPPED = sorted(path.name for path in (files("edgeseg.export") / "recipes").iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_recipes_are_recipes(name: str) -> None:
    recipe = Recipe.read(str(files("edgeseg.export") / "recipes" / name))
    assert recipe.batch >= 2
    assert all(source.uri.split(":")[0] in ("camvid", "synthetic") for source in recipe.sources)


def test_the_command_line_trains(
    tiny_definition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TOML.replace("bisenetv2", "tiny").replace("share = 2", "share = 4"))
    output = tmp_path / "model.pt"
    assert main(["train", str(recipe), "-o", str(output), "--validate", STREETS]) == 0
    assert "mIoU" in capsys.readouterr().out
    load_weights(create(tiny_definition, 11), output)
    recipe.write_text("model: tiny")
    assert main(["train", str(recipe), "-o", str(output)]) == 2
    assert "not valid TOML" in capsys.readouterr().err
