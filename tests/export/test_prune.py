"""Pruning to a target, the widths it leaves, and everything that can be wrong with a request."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("torch_pruning", reason="pruning needs torch-pruning")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import torch
from numpy.typing import NDArray
from torch import nn

from edgeseg.cli import main
from edgeseg.errors import RequestError
from edgeseg.export import latency
from edgeseg.export.couplings import Coupling
from edgeseg.export.importance import WeightNorm
from edgeseg.export.latency import EngineStopwatch
from edgeseg.export.models import Network, SemanticNetwork, create
from edgeseg.export.prune import Rules, Target, counted, prune, recalibrate
from edgeseg.export.recipe import Recipe
from edgeseg.export.structure import positions_of, structure_of, total
from edgeseg.export.train import train
from edgeseg.export.weights import load_weights, read_weights, save_weights

Lively = Callable[[Network, int], Network]

SIZE = (64, 64)
L2 = WeightNorm(2)


@pytest.fixture
def network(tiny_class: type[SemanticNetwork], lively: Lively) -> Network:
    return lively(tiny_class(3), 7)


def amount(network: Network, kind: str) -> int:
    cost = total(structure_of(network), positions_of(network, SIZE))
    return cost.macs if kind == "macs" else cost.parameters


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("multiple", [1, 8])
def test_cost_falls_to_the_target_and_no_further(
    kind: str, share: float, multiple: int, lively: Lively
) -> None:
    network = lively(create("bisenetv2", 4), 3)
    before = amount(network, kind)
    found = prune(network, Target(kind, share), L2, Rules(multiple, multiple), size=SIZE)  # type: ignore[arg-type]
    after = amount(network, kind)
    costs = [getattr(cost, kind) for cost in found.costs]
    assert costs == [before, after]
    # The last chunk was needed: it is a small part of the whole.
    assert share - 0.05 < after / before <= share
    assert all(
        found.after[name].out_channels in (shape.out_channels, *range(0, 2000, multiple))
        for name, shape in found.before.items()
    )
    network(torch.zeros(1, 3, *SIZE))


@pytest.mark.parametrize(("multiple", "minimum"), [(8, 8), (16, 16), (32, 64), (5, 7)])
def test_widths_are_multiples_or_as_they_were(multiple: int, minimum: int, lively: Lively) -> None:
    network = lively(create("bisenetv2", 4), 3)
    before = structure_of(network)
    prune(network, Target("macs", 0.55), L2, Rules(multiple, minimum), size=SIZE)
    changed = 0
    for name, shape in structure_of(network).items():
        width = shape.out_channels
        if width == before[name].out_channels:
            continue
        if shape.groups > 1:
            # Filters of a channel's own go with it.
            width = shape.groups
        assert width % multiple == 0 and width >= minimum, name
        changed += 1
    assert changed >= 2


class Given:
    """Scores made by a function of the coupling."""

    name = "given"

    def __init__(self, scores: Callable[[Coupling], NDArray[np.float64]]) -> None:
        self._scores = scores

    def __call__(
        self, network: Network, couplings: Sequence[Coupling]
    ) -> list[NDArray[np.float64]]:
        return [self._scores(coupling) for coupling in couplings]


def test_what_matters_least_goes(network: Network) -> None:
    kept = [1, 4, 6, 7]
    state = copy.deepcopy(network.state_dict())

    def scores(coupling: Coupling) -> NDArray[np.float64]:
        return np.where(np.isin(np.arange(8), kept), 2.0, 1.0)

    rules = Rules(4, 4, protect=("second",))
    found = prune(network, Target("macs", 0.9), Given(scores), rules, size=SIZE)
    assert [shape.out_channels for shape in found.after.values()] == [4, 12, 3]
    for key in ("first.conv.weight", "first.bn.running_var", "first.bn.bias"):
        torch.testing.assert_close(network.state_dict()[key], state[key][kept])
    torch.testing.assert_close(
        network.state_dict()["second.conv.weight"], state["second.conv.weight"][:, kept]
    )


def test_what_a_measure_says_nothing_about_stays(network: Network) -> None:
    def scores(coupling: Coupling) -> NDArray[np.float64]:
        known = coupling.name == "second.conv"
        return np.ones(len(coupling)) if known else np.full(len(coupling), np.nan)

    found = prune(network, Target("macs", 0.9), Given(scores), Rules(1, 1), size=SIZE)
    assert found.after["first.conv"] == found.before["first.conv"]
    assert found.after["second.conv"].out_channels < 12


def test_training_heads_keep_their_channels_and_follow(lively: Lively) -> None:
    network = lively(create("bisenetv2", 4, auxiliary_heads=True), 3)
    found = prune(network, Target("macs", 0.4), L2, size=SIZE)
    for name, shape in found.after.items():
        if name.startswith("aux"):
            assert shape.out_channels == found.before[name].out_channels
    assert found.after["aux2.conv.conv"].in_channels == found.after[
        "segment.S1S2.fuse.conv"
    ].out_channels  # fmt: skip


def test_steps_train_between(lively: Lively) -> None:
    network = lively(create("bisenetv2", 4), 3)
    before = amount(network, "macs")
    seen: list[tuple[int, float]] = []
    progress: list[tuple[int, int]] = []

    def finetune(given: Network, step: int) -> None:
        assert given is network
        given.train()
        seen.append((step, amount(given, "macs") / before))

    prune(
        network,
        Target("macs", 0.4),
        L2,
        size=SIZE,
        steps=3,
        finetune=finetune,
        progress=lambda done, of: progress.append((done, of)),
    )
    assert [step for step, _ in seen] == [1, 2, 3]
    for (_, share), wanted in zip(seen, (0.8, 0.6, 0.4), strict=True):
        assert wanted - 0.05 < share <= wanted
    assert not network.training
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_milliseconds_are_met_by_a_network_that_was_measured(lively: Lively) -> None:
    network = lively(create("bisenetv2", 4), 3)
    times: list[float] = []

    def stopwatch(given: Network) -> float:
        # Some of it does not depend on the channels.
        times.append(2 + 10 * amount(given, "macs") / full)
        return times[-1]

    full = amount(network, "macs")
    prune(network, Target("milliseconds", 7.0), L2, size=SIZE, stopwatch=stopwatch)
    reached = stopwatch(network)
    assert 6.7 < reached <= 7.0
    # The original, the smallest, and a search by halves.
    assert len(times) <= 2 + 8 + 1
    assert times[0] == 12.0


@pytest.mark.parametrize(
    ("target", "rules", "words"),
    [
        (Target("macs", 1e12), Rules(), "and a target of 1000.00 G multiplications came; take"),
        (Target("macs", 0.01), Rules(), r"^pruning can bring this network down to .* k mult"),
        (Target("parameters", 10), Rules(), r"and 10 parameters came; take a larger target"),
        (Target("macs", 0.5), Rules(protect=("second", "first")), "down to 451.58 k"),
        (Target("macs", 0.5), Rules(protect=("third",)), "and 'third' came"),
        (Target("milliseconds", 5), Rules(), "no stopwatch came"),
    ],
)
def test_targets_that_cannot_be_met_change_nothing(
    network: Network, target: Target, rules: Rules, words: str
) -> None:
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RequestError, match=words):
        prune(network, target, L2, rules, size=SIZE)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Target("macs", 0), "a number above 0, and 0 came"),
        (lambda: Target("milliseconds", float("nan")), "and nan came"),
        (lambda: Target("parameters", 1), "a share below 1, such as 0.5, or a number of param"),
        (lambda: Rules(multiple=0), "multiple is 1 channel or more, and 0 came"),
        (lambda: Rules(minimum=-1), "minimum is 1 channel or more, and -1 came"),
    ],
)
def test_wrong_numbers_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        make()


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (2.41e9, "2.41 G"), (3.36e6, "3.36 M"), (1500, "1.50 k")]
)
def test_counted(value: float, text: str) -> None:
    assert counted(value) == text


def test_recalibration_is_the_mean_over_batches(network: Network) -> None:
    batches = [
        torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    ]
    recalibrate(network, batches)
    conv = network.get_submodule("first.conv")
    with torch.no_grad():
        seen = [conv(x).double().transpose(0, 1).flatten(1) for x in batches]
    norm = network.get_submodule("first.bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    mean = sum(each.mean(1) for each in seen) / 2
    variance = sum(each.var(1) for each in seen) / 2
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1 and not norm.training
    with pytest.raises(RequestError, match="batches of 2 pictures or more, and 1"):
        recalibrate(network, [batches[0][:1]])


# --- the command


@pytest.fixture
def checkpoint(tiny_definition: str, network: Network, tmp_path: Path) -> Path:
    save_weights(network, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def command(checkpoint: Path, *more: str) -> list[str]:
    return ["prune", "tiny", "--weights", str(checkpoint), "--size", "64x96", *more]


@pytest.mark.parametrize("importance", ["l2", "activation", "taylor", "bn"])
def test_a_pruned_checkpoint_is_exported_like_any_other(
    checkpoint: Path,
    camvid: str,
    importance: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    leftovers: Callable[[Path], list[str]],
) -> None:
    out = tmp_path / "small.pt"
    frames = camvid.removeprefix("camvid:") + "/images/val"
    code = main(
        command(
            checkpoint, "--macs", "0.6", "--multiple", "2", "--minimum", "2", "-o", str(out),
            "--importance", importance, "--calibration", frames,
            "--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "report.html"),
        )
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["importance"] == importance
    before, after = content["macs"]
    assert after <= 0.6 * before
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert sum(layer["macs"][1] for layer in layers.values()) == after
    assert layers["classify"]["out_channels"] == [3, 3]
    assert "second.conv" in printed.out and f"saved {out}" in printed.out
    assert "second.conv" in (tmp_path / "report.html").read_text()
    # Which proves that the engines give what PyTorch gives.
    assert main(["export", "tiny", "--weights", str(out), "--size", "64x96",
                 "-o", str(tmp_path / "bundle")]) == 0  # fmt: skip
    bundle = tmp_path / "bundle"
    # And once more, from the bundle, whose size it takes.
    again = ["prune", "tiny", "--weights", str(bundle), "--params", "0.8", "--multiple", "1",
             "--minimum", "1", "-o", str(tmp_path / "smaller.pt")]  # fmt: skip
    assert main(again) == 0, capsys.readouterr().err
    sizes = [p.stat().st_size for p in (checkpoint, out, tmp_path / "smaller.pt")]
    assert sizes == sorted(sizes, reverse=True)
    assert leftovers(tmp_path) == []


def test_labels_steer_taylor(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--macs", "0.6", "--multiple", "1", "--minimum", "1", "-o", str(tmp_path / "o.pt"))
    labels = ("--importance", "taylor", "--labels", "synthetic:?frames=4&size=64x96")
    assert main(command(checkpoint, *more, *labels)) == 2
    assert "11 classes, and the model 3" in capsys.readouterr().err
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_milliseconds_before_and_after_are_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    pytest.importorskip(engine)
    more = ("--params", "0.7", "--multiple", "1", "--minimum", "1", "-o", str(tmp_path / "o.pt"))
    code = main(command(checkpoint, *more, "--engine", engine, "--threads", "1", "--json", "-"))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    content = json.loads(printed.out)
    assert len(content["milliseconds"]) == 2 and min(content["milliseconds"]) > 0
    assert "1 threads" in content["engine"]


class Idle:
    """An engine that only says that it was asked."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.description = name
        self._asked = asked

    def run(self, pixels: object) -> None:
        self._asked.append(self.description)

    def close(self) -> None:
        self._asked.append(f"closed {self.description}")


def test_a_stopwatch_lets_networks_take_turns(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    names = iter(["reference", "candidate"])
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(EngineStopwatch, "_opened", lambda *_: Idle(next(names), asked))
    monkeypatch.setattr(latency, "check_engine", lambda name: None)
    stopwatch = EngineStopwatch(network, SIZE, engine="idle")
    # A clock that ticks once per question: each run takes one tick.
    monkeypatch.setattr("edgeseg.export.latency.time.perf_counter_ns", lambda: next(clock))
    stopwatch.reference_ms = 12.0
    asked.clear()
    assert stopwatch(network) == 12.0
    assert asked.pop() == "closed candidate"
    pairs = [tuple(asked[at : at + 2]) for at in range(0, len(asked), 2)]
    first, last = ("reference", "candidate"), ("candidate", "reference")
    assert {first, last} == set(pairs)
    # After warming up every round has both, and begins with the one that ended the last.
    assert pairs[3:] == [last, first] * (len(pairs[3:]) // 2) + [last] * (len(pairs[3:]) % 2)


def test_milliseconds_are_the_reference_times_the_ratio(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([[[10.0, 11.0, 50.0]], [[20.0, 40.0, 22.0], [10.0, 30.0, 5.5]]])
    monkeypatch.setattr(EngineStopwatch, "_opened", lambda *_: Idle("engine", []))
    monkeypatch.setattr(latency, "check_engine", lambda name: None)
    monkeypatch.setattr(latency, "_times", lambda *_: next(times))
    # The machine has become twice as slow: ratios of 0.5, 0.75 and 0.25, and 11 ms at first.
    assert EngineStopwatch(network, SIZE, engine="idle")(network) == pytest.approx(5.5)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--macs", "0.5", "--protect", "secnd"), 2, "and 'secnd' came; close to it are second"),
        (("--macs", "2"), 2, "pruning can bring this network down to"),
        (("--macs", "0.01"), 2, "pruning can bring this network down to"),
        (("--macs", "900G"), 2, "take one below"),
        (("--params", "1"), 2, "a target is a share below 1"),
        (("--milliseconds", "3", "--engine", "tensorrt"), 2, "openvino or onnxruntime, and 'ten"),
        (("--macs", "0.5", "--engine", "nothing"), 2, "openvino or onnxruntime, and 'nothing'"),
        (("--macs", "0.5", "--importance", "luck"), 2, "importance is one of activation, l1, l2"),
        (("--macs", "0.5", "--importance", "activation"), 2, "name a folder"),
        (("--macs", "0.5", "--importance", "taylor"), 2, "name a folder"),
        (("--macs", "0.5", "--labels", "synthetic:"), 2, "read by --importance taylor alone"),
        (("--macs", "0.5", "--calibration", "nowhere"), 1, "nowhere does not exist"),
        (("--macs", "0.5", "--multiple", "0"), 2, "from 1 to 999999999"),
        (("--macs", "half"), 2, "a number above 0 is wanted"),
        (("--macs", "-1"), 2, "a number above 0 is wanted"),
        (("--macs", "0.5", "--params", "0.5"), 2, "not allowed with"),
        ((), 2, "one of the arguments --macs --params --milliseconds is required"),
        (("--macs", "0.5", "--report", "nowhere/r.html"), 1, "is no writable folder"),
    ],
)
def test_wrong_requests_are_told_and_write_nothing(
    checkpoint: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = sorted(tmp_path.rglob("*"))
    try:
        found = main(command(checkpoint, "-o", str(tmp_path / "new" / "out.pt"), *more))
    except SystemExit as stop:
        found = int(str(stop.code))
    told = capsys.readouterr().err
    assert words in told
    assert found == code
    assert sorted(tmp_path.rglob("*")) == there


@pytest.fixture
def streets_checkpoint(
    tiny_definition: str, tiny_class: type[SemanticNetwork], lively: Lively, tmp_path: Path
) -> Path:
    """Of a network that knows the classes of generated streets."""
    save_weights(lively(tiny_class(11), 7), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


STREETS = "synthetic:?frames=4&size=64x96"
RECIPE = f"""
steps = 2
crop = [64, 96]
full_height = 64
warmup = 1

[[source]]
uri = "{STREETS}"
share = 2
"""


@pytest.mark.parametrize("teaches", [False, True])
def test_a_recipe_trains_after_each_step(
    streets_checkpoint: Path,
    teaches: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    leftovers: Callable[[Path], list[str]],
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "small.pt"
    recipe.write_text(RECIPE + ("[distillation]\nalpha = 0.5\n" if teaches else ""))
    # What `edgeseg compress -o small` leaves there is not to be touched.
    (tmp_path / "small.steps").mkdir()
    (tmp_path / "small.steps" / "1-pruned.pt").write_bytes(b"mine")
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
    calls = 0

    def watched(recipe: Recipe, output: Path, **given: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        assert (given["teacher"] is not None) == teaches
        found = train(recipe, output, **given)
        seen.append((read_weights(given["start"]), read_weights(output)))
        return found

    monkeypatch.setattr("edgeseg.export.prune_request.train", watched)
    asked = command(
        streets_checkpoint, "--macs", "0.5", "--multiple", "1", "--minimum", "1", "--steps", "2",
        "--recipe", str(recipe), "--workers", "0", "-o", str(out),
    )  # fmt: skip
    # Stopped in the second training, it goes on there.
    with contextlib.suppress(KeyboardInterrupt):
        assert main(asked) == 130
    assert not out.exists() and len(seen) == 1
    assert main(asked) == 0, capsys.readouterr().err
    assert calls == 3 and len(seen) == 2
    for begun, trained in seen:
        assert any(not torch.equal(begun[name], trained[name]) for name in begun)
    widths = [
        sum(tensor.shape[0] for name, tensor in begun.items() if name.endswith("conv.weight"))
        for begun, _ in seen
    ]
    assert widths[0] > widths[1]
    # What is written is what the last training made, and nothing else is left.
    written = read_weights(out)
    assert all(torch.equal(written[name], tensor) for name, tensor in seen[1][1].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "recipe.toml", "small.pt", "small.steps", "tiny.pt",
    ]  # fmt: skip
    assert (tmp_path / "small.steps" / "1-pruned.pt").read_bytes() == b"mine"
    assert leftovers(tmp_path) == []
    assert "train it further" not in capsys.readouterr().out


def test_a_recipe_that_does_not_fit_is_told_before_the_work(
    streets_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "new" / "small.pt"
    asked = ("--macs", "0.5", "--multiple", "1", "--minimum", "1", "-o", str(out))
    for text, words in (
        ('model = "bisenetv2"\n' + RECIPE, "is for bisenetv2, and tiny is to be trained"),
        ("stepz = 3\n" + RECIPE, "stepz"),
        (RECIPE.replace("64x96", "64x96&seed=x"), "seed"),
    ):
        recipe.write_text(text)
        assert main(command(streets_checkpoint, *asked, "--recipe", str(recipe))) in (1, 2)
        told = capsys.readouterr().err
        assert words in told and "Traceback" not in told
    assert main(command(streets_checkpoint, *asked, "--recipe", str(tmp_path / "none"))) in (1, 2)
    assert "none cannot be read" in capsys.readouterr().err
    assert not out.exists()


def test_models_that_cannot_be_pruned_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.pt")
    assert main(["prune", "resnet", "--macs", "0.5", "-o", out]) == 2
    assert "the models are bisenetv1" in capsys.readouterr().err
    assert main(["prune", "bisenetv2", "--macs", "0.5", "-o", out]) == 2
    assert "give a checkpoint with --weights" in capsys.readouterr().err
    assert main(["prune", "bisenetv2", "--weights", "x.pt", "--macs", "0.5", "-o", out]) == 1
    assert "x.pt does not exist" in capsys.readouterr().err


def test_the_shipped_model_is_pruned_at_its_own_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.pt"
    assert main(["prune", "streets", "--macs", "0.5", "-o", str(out), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["size"] == [384, 480] and content["model"] == "bisenetv2"
    network = load_weights(create("bisenetv2", 11), out)
    assert (
        total(structure_of(network), positions_of(network, (384, 480))).macs == content["macs"][1]
    )
