"""Biases of the classes, found for the highest mean IoU."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeseg.cli import main
from edgeseg.dataset import open_dataset
from edgeseg.export.balance import balance_classes, best_biases
from edgeseg.export.models import SemanticNetwork, create
from edgeseg.export.preprocess import evaluate_network

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

SIZE = (96, 128)
STREETS = "synthetic:?frames=6&size=96x128"


def miou(logits: Floats, labels: Labels, biases: NDArray[Any]) -> float:
    """Plainly: of sets of pixels."""
    winners = (logits + biases).argmax(axis=1)
    found = []
    for index in range(logits.shape[1]):
        is_it, says_it = labels == index, winners == index
        union = np.count_nonzero(is_it | says_it)
        if union:
            found.append(np.count_nonzero(is_it & says_it) / union)
    return float(np.mean(found))


def unsure(seed: int) -> tuple[Floats, Labels]:
    """Pixels of three classes, one of them rare and underestimated."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, 2000, p=[0.6, 0.37, 0.03])
    logits = random.normal(0, 1, (2000, 3)).astype(np.float32)
    logits[np.arange(2000), labels] += 2.5
    logits[:, 2] -= 2.0
    return logits, labels.astype(np.int64)


def test_a_rare_class_gets_its_share() -> None:
    logits, labels = unsure(0)
    biases = best_biases([(logits, labels)])
    before = miou(logits, labels, np.zeros(3))
    reached = miou(logits, labels, biases)
    assert reached > before + 0.05
    # Nothing on a grid around is better by much than what was found.
    grid = [
        miou(logits, labels, np.array([0.0, *pair]))
        for pair in product(np.arange(-3, 5, 0.25), repeat=2)
    ]
    assert reached > max(grid) - 0.01


def test_several_sets_count_alike() -> None:
    sets = [unsure(0), unsure(1)]
    sets[1][0][:, 2] += 4.0  # where it is overestimated
    biases = best_biases(sets)

    def together(which: NDArray[Any]) -> float:
        return float(np.mean([miou(*each, which) for each in sets]))

    assert together(biases) >= together(np.zeros(3))
    for change in np.eye(3) * 0.125:
        assert together(biases) >= together(biases + change) - 1e-4
        assert together(biases) >= together(biases - change) - 1e-4


def test_perfect_logits_stay() -> None:
    labels = np.arange(300) % 3
    assert not best_biases([(np.eye(3, dtype=np.float32)[labels] * 9, labels)]).any()


def test_network_gets_what_was_found() -> None:
    torch.manual_seed(0)
    network = create("bisenetv2", 11)
    assert isinstance(network, SemanticNetwork)
    dataset = open_dataset(STREETS, "train")
    bias = dict(network.named_parameters())["head.conv_out.1.bias"]
    before, plain = bias.detach().clone(), evaluate_network(network, dataset, SIZE).miou()
    seen: list[tuple[int, int]] = []
    balance = balance_classes(
        network, [dataset], SIZE, limit=4, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    added = torch.tensor(list(balance.biases.values()))
    assert torch.allclose(bias.detach(), before + added)
    assert list(balance.biases) == list(dataset.classes.names)
    ((low, high),) = balance.miou.values()
    assert low < high
    assert evaluate_network(network, dataset, SIZE).miou() > plain


def test_export_balances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "bisenetv2", "--size", "96x128", "--balance", STREETS]
    weights = tmp_path / "w.pt"
    torch.manual_seed(0)
    torch.save(create("bisenetv2", 11).state_dict(), weights)
    target = tmp_path / "out"
    assert main([*arguments, "--weights", str(weights), "-o", str(target)]) == 0
    written = json.loads((target / "bundle.json").read_text())["provenance"]["balance"]
    assert len(written["biases"]) == 11 and "synthetic streets train" in written["miou"]
    capsys.readouterr()


def test_instances_have_no_classes_to_balance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "street-objects", "--balance", STREETS, "-o", str(tmp_path / "x")]
    assert main(arguments) == 2
    assert "cannot be balanced" in capsys.readouterr().err and not (tmp_path / "x").exists()
