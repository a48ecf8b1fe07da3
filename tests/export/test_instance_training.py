"""Training of YOLACT: objects follow their pictures, and a run learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("pycocotools", reason="masks of COCO are pycocotools'")

import cv2
import torch

from edgeseg.annotation import Annotation, run_lengths
from edgeseg.errors import DataError, RequestError
from edgeseg.export import instance_training
from edgeseg.export.augment import Augmentation
from edgeseg.export.instance_training import InstanceBatches, InstanceTraining
from edgeseg.export.models import create
from edgeseg.export.recipe import Recipe, Source
from edgeseg.export.train import train
from edgeseg.export.weights import load_weights
from edgeseg.instance_dataset import (
    InstanceDataset,
    InstanceSample,
    SyntheticInstances,
    open_instances,
)

STREETS = "synthetic:?size=96x128&frames=4"
RECIPE = Recipe(
    model="yolact_resnet18",
    sources=(Source(STREETS, 2),),
    steps=2,
    crop=(64, 96),
    full_height=96,
    warmup=1,
    auxiliary_heads=True,
    mixed_precision=False,
)


class Blocks(InstanceDataset):
    """One picture with two rectangles, each of a colour of its own, and one crowd."""

    title = "blocks"
    split = "train"
    classes = ("red", "green")
    COLOURS = ((0, 0, 250), (0, 250, 0), (250, 0, 0))
    BOXES = ((20, 10, 40, 30), (70, 40, 45, 50), (5, 60, 20, 30))

    def __len__(self) -> int:
        return 1

    def sample(self, index: int) -> InstanceSample:
        pixels = np.full((100, 140, 3), 60, np.uint8)
        annotations = []
        for number, ((x, y, w, h), colour) in enumerate(zip(self.BOXES, self.COLOURS, strict=True)):
            pixels[y : y + h, x : x + w] = colour
            mask = np.zeros((100, 140), np.bool_)
            mask[y : y + h, x : x + w] = True
            annotations.append(
                Annotation(min(number, 1), (x, y, w, h), w * h, number == 2, run_lengths(mask))
            )
        return InstanceSample("blocks", 1, pixels, tuple(annotations))

    def hashes(self) -> dict[str, str]:
        return {"blocks": ""}


@pytest.mark.parametrize("seed", range(12))
def test_objects_follow_their_pixels(seed: int) -> None:
    recipe = replace(RECIPE, colour=0.0, crop=(96, 128), full_height=100, scale=(0.7, 1.6))
    batches = InstanceBatches(recipe, [Blocks()], (24, 32))
    batch = batches.drawn(np.random.default_rng(seed))
    assert batch.images.shape == (2, 96, 128, 3)
    assert batch.images.dtype == torch.uint8
    for pixels, objects in zip(batch.images.numpy(), batch.truth, strict=True):
        found = {}
        for number, colour in enumerate(Blocks.COLOURS):
            # At borders colours mix: what is nearly pure is surely inside.
            inside = (np.abs(pixels.astype(int) - colour) < 60).all(axis=2)
            if inside.sum() >= 80:
                found[number] = inside
        assert len(objects.labels) >= len(found)
        for number, inside in found.items():
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            same = (objects.labels == min(number, 1)) & (objects.crowd == (number == 2))
            boxes = objects.boxes.numpy() * (128, 96, 128, 96)
            distances = np.abs(boxes - box).max(axis=1) + 1000 * ~same.numpy()
            best = int(distances.argmin())
            assert distances[best] <= 2
            small = cv2.resize(inside.astype(np.float32), (32, 24), interpolation=cv2.INTER_AREA)
            sure = np.abs(small - 0.5) > 0.45
            mask = objects.masks[best].numpy()
            assert (mask == (small > 0.5))[sure].mean() > 0.97


def test_what_is_left_of_an_object_may_be_too_little() -> None:
    # A crop that shows all, of objects that get smaller and smaller.
    seen = {}
    for full_height in (96, 24, 16):
        recipe = replace(
            RECIPE, crop=(96, 128), full_height=full_height, scale=(1.0, 1.0), aspect=1.0
        )
        batch = InstanceBatches(recipe, [Blocks()], (24, 32)).drawn(np.random.default_rng(0))
        seen[full_height] = [bool(crowd) for crowd in batch.truth[0].crowd]
    assert seen[96] == [False, False, True]
    # 45x50 pixels at 0.24 are 130, and 40x30 are 69; at 0.16 they are 58 and 31.
    assert seen[24] == [False, False, True]
    assert seen[16] == [True, True, True]


def test_no_object_at_all_is_a_picture_like_any_other() -> None:
    class Empty(Blocks):
        def sample(self, index: int) -> InstanceSample:
            return replace(super().sample(index), annotations=())

    batch = InstanceBatches(RECIPE, [Empty()], (16, 24)).drawn(np.random.default_rng(0))
    assert [objects.boxes.shape for objects in batch.truth] == [(0, 4)] * 2
    assert batch.truth[0].masks.shape == (0, 16, 24)


def test_samples_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_instances(STREETS, "train")
    batches = InstanceBatches(RECIPE, [dataset], (16, 24))
    first = [batches.drawn(np.random.default_rng(seed)) for seed in range(8)]

    def gone(self: object, index: int) -> InstanceSample:
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(SyntheticInstances, "sample", gone)
        again = [batches.drawn(np.random.default_rng(seed)) for seed in range(8)]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images)
        for mine, theirs in zip(one.truth, two.truth, strict=True):
            assert torch.equal(mine.boxes, theirs.boxes)
            assert torch.equal(mine.masks, theirs.masks)
    # With no room for them they are read each time.
    monkeypatch.setattr(instance_training, "_KEPT_BYTES", -1)
    batches = InstanceBatches(RECIPE, [dataset], (16, 24))
    batches.drawn(np.random.default_rng(0))
    monkeypatch.setattr(SyntheticInstances, "sample", gone)
    with pytest.raises(AssertionError, match="read again"):
        batches.drawn(np.random.default_rng(0))


def test_two_steps_give_a_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "model.pt"
    train(RECIPE, output, validate=((STREETS, "val"),), workers=0, report=said.append)
    load_weights(create("yolact_resnet18", 4), output)
    assert [line.split(":")[0].strip() for line in said[:-1]] == ["synthetic streets"]
    assert "mask AP" in said[0]
    assert "pedestrian" in said[0]


@pytest.mark.slow
def test_a_run_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(uri: str, split: str) -> InstanceDataset:
        return Blocks()

    monkeypatch.setattr(instance_training, "open_instances", opened)
    recipe = replace(
        RECIPE,
        steps=60,
        crop=(96, 128),
        full_height=100,
        scale=(1.0, 1.0),
        aspect=1.0,
        colour=0.0,
        average=0.8,
        learning_rate=1e-3,
    )
    said: list[str] = []
    output = tmp_path / "model.pt"
    train(recipe, output, validate=(("blocks", "val"),), workers=0, report=said.append)
    (found,) = [line for line in said if "mask AP" in line]
    assert float(found.split("mask AP ")[1].split()[0]) > 0.5


def test_data_sets_with_different_classes_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = {"one": Blocks(), "two": open_instances(STREETS, "train")}
    monkeypatch.setattr(instance_training, "open_instances", lambda uri, split: opened[uri])
    recipe = replace(RECIPE, sources=(Source("one", 1), Source("two", 1)))
    with pytest.raises(DataError, match="blocks has the classes red, green and synthetic streets"):
        train(recipe, tmp_path / "model.pt", workers=0)


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "yolact_plus_resnet50"])
def test_two_stage_networks_and_yolact_plus_plus_are_trained_elsewhere(name: str) -> None:
    recipe = replace(RECIPE, model=name, crop=(256, 256))
    with pytest.raises(RequestError, match="trains YOLACT and semantic networks"):
        InstanceTraining(recipe, ())


def test_a_semantic_data_set_has_no_objects() -> None:
    recipe = replace(RECIPE, sources=(Source("camvid:somewhere", 2),))
    with pytest.raises(RequestError, match="for an instance model use"):
        InstanceTraining(recipe, ())


def test_augmentation_is_that_of_the_recipe() -> None:
    recipe = replace(RECIPE, scale=(0.5, 2.0), aspect=1.4, colour=0.2)
    assert Augmentation.of(recipe) == Augmentation(
        crop=(64, 96), full_height=96, scale=(0.5, 2.0), aspect=1.4, colour=0.2
    )
