"""Recipes: read back as they were written, and wrong ones refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

from edgeseg import calibration
from edgeseg.calibration.recipe import Finetuning, QuantizationRecipe
from edgeseg.errors import RequestError

RECIPES = Path(calibration.__file__).parent / "recipes"

WRONG: dict[str, tuple[str, str]] = {
    "a number without end": ("percentile = 1" + "0" * 400, "int too large to convert to float"),
    "levels without end": ("floats = " + "[" * 50_000, "it has too many levels"),
    "an unknown key": ('range = "mse"', "it says range, and knows ranges, percentile"),
    "an unknown key of the table": ("[finetune]\nstep = 3", "it says step, and knows steps"),
    "no TOML": ("ranges = ", "is not valid TOML"),
    "another type": ('frames = "100"', "frames is '100', and a whole number is wanted"),
    "a fraction of a frame": ("frames = 1.5", "frames is 1.5, and a whole number is wanted"),
    "true for 1": ("frames = true", "frames is True, and a whole number is wanted"),
    "1 for true": ("half = 1", "half is 1, and true or false is wanted"),
    "true for a number": ("equalize = true", "equalize is True, and a number is wanted"),
    "a text for a list": ('floats = "head"', "floats is 'head', and a list of texts is wanted"),
    "a list of others": ("floats = [1]", r"floats is \[1\], and a list of texts is wanted"),
    "views of texts": ('[finetune]\nviews = ["1"]', "a list of numbers is wanted"),
    "no table": ("finetune = 5", r"finetune is 5, and a table \[finetune\] is wanted"),
    "an unknown method": ('ranges = "max"', "ranges are one of minmax, average"),
    "another for weights": ('weights = "entropy"', "weights are minmax or mse"),
    "a percentile of 0": ("percentile = 0", "above 0 and at most 100"),
    "no percentile": ("percentile = nan", "above 0 and at most 100"),
    "too much balance": ("equalize = 1.1", "between 0 and 1, and 1.1 came"),
    "no frames": ("frames = 0", "at least one frame, and 0 came"),
    "a layer twice": ('floats = ["a", "b", "a"]', "a came twice"),
    "no steps": ("[finetune]\nsteps = 0", "0 steps of 4"),
    "no views": ("[finetune]\nviews = []", "factors above 0"),
    "a view of nothing": ("[finetune]\nviews = [1.0, 0.0]", "factors above 0"),
    "a negative rate": ("[finetune]\nlearning_rate = -1.0", "learning rates are 0 or more"),
    "no rate": ("[finetune]\nscale_learning_rate = nan", "learning rates are 0 or more"),
    "a negative seed": ("[finetune]\nseed = -1", "from 0 on, and -1 came"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes(tmp_path: Path, case: str) -> None:
    text, words = WRONG[case]
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        QuantizationRecipe.read(path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        QuantizationRecipe.read(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    "recipe",
    [
        QuantizationRecipe(),
        QuantizationRecipe(ranges="entropy", equalize=0.0, floats=("a", "b"), half=True),
        QuantizationRecipe(finetune=Finetuning(steps=3, views=(0.5, 1.0), seed=7)),
    ],
)
def test_recipes_come_back_from_json(recipe: QuantizationRecipe) -> None:
    content: dict[str, Any] = json.loads(json.dumps(recipe.to_dict()))
    assert QuantizationRecipe.from_dict(content) == recipe


def test_the_same_recipe_is_the_same_text(tmp_path: Path) -> None:
    """Whole numbers where any number fits; what is hashed and recorded does not differ."""
    texts = (
        "equalize = 1\n[finetune]\nviews = [1, 2]",
        "equalize = 1.0\n[finetune]\nviews = [1.0, 2.0]",
    )
    found = set()
    for text in texts:
        (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
        found.add(json.dumps(QuantizationRecipe.read(tmp_path / "recipe.toml").to_dict()))
    assert len(found) == 1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_read(path: Path) -> None:
    assert isinstance(QuantizationRecipe.read(path), QuantizationRecipe)
