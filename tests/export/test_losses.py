"""Losses of the semantic models against float64 arithmetic in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from numpy.typing import NDArray

from edgeseg.export.losses import (
    bootstrapped_cross_entropy,
    boundary_weights,
    ohem_cross_entropy,
)

CLASSES, HEIGHT, WIDTH = 5, 12, 20


def expected(
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    ignore: int = 255,
    threshold: float = 0.7,
    weights: NDArray[np.float64] | None = None,
) -> tuple[float, NDArray[np.float64]]:
    """The loss and its gradient with respect to ``logits``, from the definition, pixel by pixel."""
    labelled = np.flatnonzero(labels.ravel() != ignore)
    rows = np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])
    losses = np.zeros(rows.shape[0])
    slopes = np.zeros_like(rows)
    for pixel in labelled:
        row, label = rows[pixel], int(labels.ravel()[pixel])
        shifted = np.exp(row - row.max())
        probabilities = shifted / shifted.sum()
        weight = 1.0 if weights is None else weights[label]
        losses[pixel] = -weight * math.log(probabilities[label])
        slopes[pixel] = weight * probabilities
        slopes[pixel, label] -= weight
    kept = np.flatnonzero(losses > -math.log(threshold))
    least = len(labelled) // 16
    if len(kept) < least:
        kept = np.argsort(-losses, kind="stable")[:least]
    gradient = np.zeros_like(rows)
    if not len(kept):
        return 0.0, np.zeros_like(logits)
    gradient[kept] = slopes[kept] / len(kept)
    n, _, height, width = logits.shape
    return float(losses[kept].mean()), np.moveaxis(gradient.reshape(n, height, width, -1), -1, 1)


def pixels(
    seed: int, *, confident: float = 0.0, ignored: float = 0.2, ignore: int = 255
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Random logits and labels; ``confident`` is added at the right class of every pixel."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (2, CLASSES, HEIGHT, WIDTH)).astype(np.float32)
    labels = random.integers(0, CLASSES, (2, HEIGHT, WIDTH))
    where = np.arange(CLASSES)[None, :, None, None] == labels[:, None]
    logits += np.float32(confident) * where
    labels[random.random(labels.shape) < ignored] = ignore
    return logits, labels


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("threshold", [0.7, 0.3, 0.05])
@pytest.mark.parametrize(
    ("confident", "ignored"),
    [(0.0, 0.2), (0.0, 0.0), (8.0, 0.2), (12.0, 0.5), (12.0, 0.98)],
    ids=["hard", "hard, all labelled", "easy", "very easy", "hardly any label"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_those_of_the_definition(
    seed: int, threshold: float, confident: float, ignored: float, weighted: bool
) -> None:
    logits, labels = pixels(seed, confident=confident, ignored=ignored)
    weights = np.linspace(0.5, 5.0, CLASSES) if weighted else None
    wanted, slope = expected(
        logits.astype(np.float64), labels, threshold=threshold, weights=weights
    )
    x = torch.from_numpy(logits).requires_grad_()
    loss = ohem_cross_entropy(
        x,
        torch.from_numpy(labels),
        score_threshold=threshold,
        class_weights=None if weights is None else torch.from_numpy(weights).float(),
    )
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted, rel=2e-5, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), slope, rtol=1e-4, atol=1e-7)


def test_both_branches_are_reached() -> None:
    for confident, branch in ((0.0, "hard pixels"), (12.0, "the largest")):
        logits, labels = pixels(0, confident=confident)
        losses = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits), torch.from_numpy(labels), ignore_index=255, reduction="none"
        )
        hard = int((losses > -math.log(0.7)).sum())
        least = int((labels != 255).sum()) // 16
        assert ("hard pixels" if hard >= least else "the largest") == branch


def test_an_ignored_pixel_counts_nowhere() -> None:
    logits, labels = pixels(3, ignored=0.3, ignore=11)
    changed = logits + 50 * (labels == 11)[:, None] * np.arange(CLASSES)[None, :, None, None]
    losses = [
        ohem_cross_entropy(
            torch.from_numpy(values.astype(np.float32)), torch.from_numpy(labels), ignore=11
        ).item()
        for values in (logits, changed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("confident", [0.0, 12.0])
def test_nothing_labelled_is_zero_and_can_be_stepped(confident: float) -> None:
    logits, labels = pixels(0, confident=confident, ignored=1.1)
    x = torch.from_numpy(logits).requires_grad_()
    loss = ohem_cross_entropy(x, torch.from_numpy(labels))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, labels = pixels(4)
    rounded = torch.from_numpy(logits).bfloat16()
    wanted, _ = expected(rounded.double().numpy(), labels)
    loss = ohem_cross_entropy(rounded, torch.from_numpy(labels))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=2e-5)


def bootstrapped(
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    least: int,
    threshold: float,
    weights: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """The loss and its gradient, from the definition, picture by picture."""
    total, gradient = 0.0, np.zeros_like(logits)
    for n, picture in enumerate(logits):
        losses = np.zeros(labels[n].size)
        slopes = np.zeros((labels[n].size, CLASSES))
        for pixel, label in enumerate(labels[n].ravel()):
            if label == 255:
                continue
            row = picture[:, pixel // WIDTH, pixel % WIDTH]
            probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            losses[pixel] = -weights[n].ravel()[pixel] * math.log(probabilities[label])
            slopes[pixel] = weights[n].ravel()[pixel] * probabilities
            slopes[pixel, label] -= weights[n].ravel()[pixel]
        order = np.argsort(-losses, kind="stable")
        if losses[order[least]] > threshold:
            kept = np.flatnonzero(losses > threshold)
        else:
            kept = order[:least]
        total += losses[kept].mean() / len(logits)
        for pixel in kept.tolist():
            gradient[n, :, pixel // WIDTH, pixel % WIDTH] = slopes[pixel] / len(kept) / len(logits)
    return total, gradient


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("confident", "least", "threshold"),
    [(0.0, 16, 0.3), (0.0, 100, 1.0), (8.0, 60, 0.3), (12.0, 100, 0.3)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bootstrapped_loss_is_that_of_the_definition(
    seed: int, confident: float, least: int, threshold: float, weighted: bool
) -> None:
    logits, labels = pixels(seed, confident=confident)
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 3, labels.shape) if weighted else np.ones(labels.shape)
    wanted, slope = bootstrapped(logits.astype(np.float64), labels, least, threshold, weights)
    x = torch.from_numpy(logits).requires_grad_()
    loss = bootstrapped_cross_entropy(
        x,
        torch.from_numpy(labels),
        least=least,
        loss_threshold=threshold,
        pixel_weights=torch.from_numpy(weights).float() if weighted else None,
    )
    assert loss.item() == pytest.approx(wanted, rel=2e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    # Of two losses that are the same in float32, either may be the last that counts.
    np.testing.assert_allclose(x.grad.numpy(), slope, rtol=1e-4, atol=1e-6)


def test_a_picture_smaller_than_the_least_counts_whole() -> None:
    logits, labels = pixels(0, confident=12.0, ignored=0.0)
    loss = bootstrapped_cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert math.isfinite(loss.item())


def test_pixels_weigh_in_hard_example_mining() -> None:
    logits, labels = pixels(5)
    weights = np.random.default_rng(5).uniform(0, 3, labels.shape).astype(np.float32)
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(labels), ignore_index=255,
        reduction="none",
    ).numpy() * weights  # fmt: skip
    wanted = losses[losses > -math.log(0.7)].mean()
    found = ohem_cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), pixel_weights=torch.from_numpy(weights)
    )
    assert found.item() == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_boundary_weights_are_those_of_a_plain_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (4, 5)).astype(np.uint8).repeat(6, 0).repeat(7, 1)
    labels[rng.integers(0, 24), rng.integers(0, 35)] = 255
    height, width = labels.shape
    boundary = [
        (y, x)
        for y in range(height)
        for x in range(width)
        if any(
            0 <= y + j < height and 0 <= x + i < width and labels[y + j, x + i] != labels[y, x]
            for j, i in ((0, 1), (1, 0), (0, -1), (-1, 0))
        )
    ]
    found = boundary_weights(labels, 2.5, 3.0)
    for y in range(height):
        for x in range(width):
            distance = min(math.hypot(y - b, x - a) for b, a in boundary)
            assert found[y, x] == pytest.approx(1 + 2.5 * math.exp(-distance / 3), rel=1e-5)


def test_one_class_has_no_boundary() -> None:
    assert (boundary_weights(np.zeros((4, 6), np.uint8), 2.0, 5.0) == 1).all()
