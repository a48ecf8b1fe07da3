"""YOLACT's loss against plain loops in float64, and its gradients against differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch import Tensor

from edgeseg.export.models.yolact import Heads, Priors, decoded
from edgeseg.export.multibox import Objects, encoded, matched, multibox_losses

CLASSES = 3
CHANNELS = 32
LEVELS = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
SIZE = (48, 64)
GRID = (12, 16)

Array = NDArray[np.float64]


def priors() -> Tensor:
    return Priors().of(LEVELS, *SIZE).double()


def some_objects(seed: int, count: int, crowds: int = 0) -> Objects:
    """Objects anywhere, some of them tiny, the last ``crowds`` of them crowds."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.8, (count, 2))
    high = np.minimum(low + rng.uniform(0.02, 0.5, (count, 2)), 1.0)
    return Objects(
        boxes=torch.from_numpy(np.concatenate([low, high], 1)),
        labels=torch.from_numpy(rng.integers(0, CLASSES, count)),
        masks=torch.from_numpy(rng.random((count, *GRID)) < 0.5),
        crowd=torch.from_numpy(np.arange(count) >= count - crowds),
    )


def some_heads(seed: int, pictures: int, *, segm: bool = True) -> Heads:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = len(priors())
    heads = Heads(
        loc=random(pictures, count, 4),
        conf=random(pictures, count, CLASSES + 1) * 2,
        mask=torch.tanh(random(pictures, count, CHANNELS)),
        priors=priors(),
        proto=random(pictures, *GRID, CHANNELS).relu(),
    )
    if segm:
        heads["segm"] = random(pictures, CLASSES, 6, 8)
    return heads


def corners(box: Array) -> Array:
    x, y, w, h = box
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def common(a: Array, b: Array) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return float(max(width, 0.0) * max(height, 0.0))


def area(a: Array) -> float:
    return float((a[2] - a[0]) * (a[3] - a[1]))


def matched_by_loops(anchors: Array, objects: Objects) -> tuple[list[int], list[int]]:
    """Class and object of every prior, the definition word by word."""
    boxes = objects.boxes.double().numpy()
    asked = [i for i in range(len(boxes)) if not objects.crowd[i]]
    crowds = [i for i in range(len(boxes)) if objects.crowd[i]]
    overlaps = {
        (a, i): common(corners(anchors[a]), boxes[i])
        / (area(corners(anchors[a])) + area(boxes[i]) - common(corners(anchors[a]), boxes[i]))
        for a in range(len(anchors))
        for i in asked
    }
    forced: dict[int, int] = {}
    pairs = sorted(overlaps, key=lambda pair: -overlaps[pair])
    given: set[int] = set()
    for a, i in pairs:
        if a not in forced and i not in given:
            forced[a] = i
            given.add(i)
    classes, owners = [], []
    for a in range(len(anchors)):
        best = max(asked, key=lambda i: overlaps[a, i], default=0)
        share = overlaps[a, best] if asked else 0.0
        if a in forced:
            best, share = forced[a], 1.0
        found = 1 + int(objects.labels[best]) if asked else 0
        if share < 0.5:
            found = -1 if share >= 0.4 else 0
        if found == 0 and any(
            common(corners(anchors[a]), boxes[i]) / area(corners(anchors[a])) > 0.7 for i in crowds
        ):
            found = -1
        classes.append(found)
        owners.append(best)
    return classes, owners


def losses_by_loops(heads: Heads, truth: list[Objects]) -> dict[str, float]:
    anchors = heads["priors"].numpy()
    loc, conf, mask, proto = (
        heads[key].detach().numpy() for key in ("loc", "conf", "mask", "proto")
    )
    box = class_ = masks = 0.0
    positives = 0
    for n, objects in enumerate(truth):
        classes, owners = matched_by_loops(anchors, objects)
        entropies = [
            math.log(sum(math.exp(value) for value in row)) - row[max(label, 0)]
            for row, label in zip(conf[n], classes, strict=True)
        ]
        mine = [a for a, label in enumerate(classes) if label > 0]
        background = sorted((entropies[a] for a, label in enumerate(classes) if label == 0))
        positives += len(mine)
        class_ += sum(entropies[a] for a in mine)
        class_ += sum(background[::-1][: max(3 * len(mine), 3)])
        for a in mine:
            x1, y1, x2, y2 = objects.boxes[owners[a]].double().numpy()
            cx, cy, w, h = anchors[a]
            wanted = [
                ((x1 + x2) / 2 - cx) / (0.1 * w),
                ((y1 + y2) / 2 - cy) / (0.1 * h),
                math.log((x2 - x1) / w) / 0.2,
                math.log((y2 - y1) / h) / 0.2,
            ]
            for value, goal in zip(loc[n, a], wanted, strict=True):
                d = abs(value - goal)
                box += 0.5 * d * d if d < 1 else d - 0.5
            left, top, right, bottom = x1 * GRID[1], y1 * GRID[0], x2 * GRID[1], y2 * GRID[0]
            total = 0.0
            for y in range(GRID[0]):
                for x in range(GRID[1]):
                    if not (top - 1 <= y < bottom + 1 and left - 1 <= x < right + 1):
                        continue
                    p = 1 / (1 + math.exp(-float(proto[n, y, x] @ mask[n, a])))
                    on = bool(objects.masks[owners[a], y, x])
                    total -= math.log(p if on else 1 - p)
            masks += total / max((right - left) * (bottom - top), 1.0)
    found = {
        "box": 1.5 * box / max(positives, 1),
        "class": class_ / max(positives, 1),
        "mask": 6.125 * masks / max(positives, 1),
    }
    if "segm" in heads:
        logits = heads["segm"].detach().numpy()
        total = 0.0
        for n, objects in enumerate(truth):
            for label in range(CLASSES):
                for y in range(6):
                    for x in range(8):
                        on = any(
                            not objects.crowd[i]
                            and objects.labels[i] == label
                            and objects.masks[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                            .double()
                            .mean()
                            > 0.5
                            for i in range(len(objects.labels))
                        )
                        p = 1 / (1 + math.exp(-logits[n, label, y, x]))
                        total -= math.log(p if on else 1 - p) / 48
        found["pixel"] = total / len(truth)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_priors_are_matched_as_the_definition_says(seed: int) -> None:
    objects = some_objects(seed, 6, crowds=seed % 3)
    found = matched(priors(), objects)
    classes, owners = matched_by_loops(priors().numpy(), objects)
    assert found.classes.tolist() == classes
    mine = [a for a, label in enumerate(classes) if label > 0]
    assert [int(found.objects[a]) for a in mine] == [owners[a] for a in mine]
    # Every object that is asked for has a prior.
    assert {owners[a] for a in mine} >= set(np.flatnonzero(~objects.crowd.numpy()).tolist())
    assert 0 in classes
    assert seed != 2 or -1 in classes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("segm", [True, False])
def test_losses_are_those_of_plain_loops(seed: int, segm: bool) -> None:
    heads = some_heads(seed, 2, segm=segm)
    truth = [some_objects(10 + seed, 4, crowds=1), some_objects(20 + seed, 2)]
    found = multibox_losses(heads, truth)
    wanted = losses_by_loops(heads, truth)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # The loss itself is computed in float32.
        assert float(found[name]) == pytest.approx(value, rel=2e-5), name


def test_pictures_without_objects_teach_background_only() -> None:
    heads = some_heads(1, 2)
    truth = [some_objects(1, 0), some_objects(2, 2, crowds=2)]
    found = multibox_losses(heads, truth)
    wanted = losses_by_loops(heads, truth)
    assert float(found["box"]) == float(found["mask"]) == 0
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=2e-5), name


def test_gradients_are_those_of_differences() -> None:
    heads = some_heads(3, 1)
    truth = [some_objects(5, 3)]
    leaves = {
        key: heads[key].float().requires_grad_() for key in ("loc", "conf", "mask", "proto", "segm")
    }
    parts = multibox_losses(Heads(**leaves, priors=heads["priors"]), truth)  # type: ignore[typeddict-item]
    torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    rng = np.random.default_rng(0)
    for key, leaf in leaves.items():
        gradient = leaf.grad
        assert gradient is not None
        strongest = gradient.abs().flatten().topk(3).indices.tolist()
        anywhere = rng.integers(0, leaf.numel(), 2).tolist()
        for index in (*strongest, *anywhere):
            step = 1e-4
            values = []
            for sign in (1, -1):
                moved = {name: each.detach().double() for name, each in leaves.items()}
                moved[key] = moved[key].clone()
                moved[key].view(-1)[index] += sign * step
                moved_heads = Heads(**moved, priors=heads["priors"])  # type: ignore[typeddict-item]
                values.append(sum(losses_by_loops(moved_heads, truth).values()))
            slope = (values[0] - values[1]) / (2 * step)
            assert float(gradient.flatten()[index]) == pytest.approx(slope, rel=1e-3, abs=1e-5), key


def test_a_box_survives_being_encoded() -> None:
    anchors = priors()
    boxes = some_objects(4, 20).boxes
    found = decoded(encoded(boxes, anchors[:20]), anchors[:20])
    torch.testing.assert_close(found, boxes)


def test_a_crowd_of_priors_counts_in_full_when_only_some_are_looked_at() -> None:
    # One object over all: many priors are its own. With equal coefficients each has the same mask
    # loss, so any choice of them has the mean of all.
    anchors = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64).repeat(150, 1)
    heads = Heads(
        loc=torch.zeros(1, 150, 4),
        conf=torch.zeros(1, 150, CLASSES + 1),
        mask=torch.full((1, 150, CHANNELS), 0.1),
        priors=anchors,
        proto=torch.rand(1, *GRID, CHANNELS),
    )
    objects = Objects(
        boxes=torch.tensor([[0.25, 0.25, 0.75, 0.75]]),
        labels=torch.tensor([1]),
        masks=torch.ones(1, *GRID, dtype=torch.bool),
        crowd=torch.tensor([False]),
    )
    wanted = losses_by_loops(heads, [objects])
    assert float(multibox_losses(heads, [objects])["mask"]) == pytest.approx(
        wanted["mask"], rel=1e-5
    )
