"""Checkpoints in every form they come in, and everything that can be wrong with them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")

import torch
from torch import Tensor

from edgeseg.bundle import Bundle
from edgeseg.errors import WeightsError
from edgeseg.export.models import SemanticNetwork, create, create_semantic
from edgeseg.export.weights import load_weights, read_weights, save_weights

if TYPE_CHECKING:
    from tests.export.conftest import Exportation

State = dict[str, Tensor]


@pytest.fixture
def network(tiny_class: type[SemanticNetwork]) -> SemanticNetwork:
    return tiny_class(4).eval()


@pytest.fixture
def state(
    tiny_class: type[SemanticNetwork], lively: Callable[[SemanticNetwork, int], SemanticNetwork]
) -> State:
    """Another network's weights, training head included."""
    return dict(lively(tiny_class(4, auxiliary_heads=True), 3).state_dict())


def check(network: SemanticNetwork, state: State) -> None:
    """The network holds exactly ``state``, as far as it has the entries."""
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, state[key].to(value.dtype), rtol=0, atol=0)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state": lambda s: {"model_state": s, "best": 0.7, "optimizer_state": {"lr": 1}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "model": lambda s: {"model": s, "optimizer": {}},
    "wrapped twice": lambda s: {"model": {"state_dict": s}},
    "data parallel": lambda s: prefixed(s, "module."),
    "data parallel, wrapped": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled, then parallel": lambda s: prefixed(s, "module._orig_mod."),
    "parallel, then compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "with other entries": lambda s: {**s, "epoch": 7, "note": "best"},
    "no counters": lambda s: {k: v for k, v in s.items() if not k.endswith("batches_tracked")},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "no training heads": lambda s: {k: v for k, v in s.items() if not k.startswith("extra.")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on_disk", [False, True], ids=["mapping", "file"])
def test_every_form_of_checkpoint_loads(
    network: SemanticNetwork, state: State, form: str, on_disk: bool, tmp_path: Path
) -> None:
    content = FORMS[form](state)
    source = content
    if on_disk:
        source = tmp_path / "checkpoint.pth"
        torch.save(content, source)
    assert load_weights(network, source) is network
    if form == "half":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    elif form == "no counters":
        state = state | {k: v for k, v in network.state_dict().items() if "tracked" in k}
    check(network, state)
    assert all(value.dtype != torch.float16 for value in network.state_dict().values())


def test_files_in_the_old_format_load(
    network: SemanticNetwork, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    load_weights(network, str(path))
    check(network, state)


@pytest.mark.parametrize("name", ["bisenetv1", "bisenetv2"])
def test_training_heads_may_be_absent_or_extra(name: str) -> None:
    bare, full = create_semantic(name, 3), create_semantic(name, 3, auxiliary_heads=True)
    load_weights(bare, full.state_dict())
    check(bare, dict(full.state_dict()))
    fresh = create_semantic(name, 3, auxiliary_heads=True)
    kept = {k: v.clone() for k, v in fresh.state_dict().items() if k not in bare.state_dict()}
    load_weights(fresh, bare.state_dict())
    check(fresh, dict(bare.state_dict()) | kept)


def without(*keys: str) -> Callable[[State], Any]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def with_entries(**entries: Tensor) -> Callable[[State], Any]:
    return lambda state: {**state, **{key.replace("__", "."): v for key, v in entries.items()}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("second.bn.running_mean"), ["1 keys are missing (second.bn.running_mean)"]),
        (
            with_entries(third__weight=torch.zeros(1)),
            ["1 keys are unexpected (third.weight)", "Tiny with 4 classes"],
        ),
        (
            lambda state: with_entries(third__weight=torch.zeros(1))(
                without("first.conv.weight")(state)
            ),
            [
                "1 keys are missing (first.conv.weight)",
                "1 keys are unexpected (third.weight)",
                "another model",
            ],
        ),
        (
            with_entries(classify__weight=torch.zeros(7, 12, 1, 1), classify__bias=torch.zeros(7)),
            [
                "2 shapes differ",
                "classify.weight (7, 12, 1, 1) where (4, 12, 1, 1) is wanted",
                "is num_classes right?",
            ],
        ),
        (
            lambda _: create("bisenetv2", 4).state_dict(),
            ["keys are missing (first.conv.weight", "unexpected (detail.S1.0.conv.weight", "more"],
        ),
        (lambda _: {}, ["holds no tensors", "none"]),
        (lambda _: {"epoch": 3, "lr": 0.1}, ["holds no tensors", "epoch, lr"]),
        (lambda _: {3: torch.zeros(1)}, ["holds no tensors"]),
        (lambda _: {"state_dict": {}}, ["holds no tensors"]),
    ],
    ids=[
        "a key missing",
        "a key too many",
        "a key renamed",
        "other classes",
        "another model",
        "empty",
        "no tensors",
        "keys that are no text",
        "an empty wrapper",
    ],
)
@pytest.mark.parametrize("on_disk", [False, True], ids=["mapping", "file"])
def test_a_checkpoint_that_does_not_fit_is_named_and_changes_nothing(
    network: SemanticNetwork,
    state: State,
    change: Callable[[State], Any],
    words: list[str],
    on_disk: bool,
    tmp_path: Path,
) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    source = change(state)
    if on_disk:
        path = tmp_path / "other.pt"
        torch.save(source, path)
        source = path
        words = [*words, str(path)]
    with pytest.raises(WeightsError) as caught:
        load_weights(network, source)
    for word in words:
        assert word in str(caught.value)
    check(network, before)


class Anything:
    """Something that a checkpoint from the internet must not be able to make."""


def _truncated(path: Path) -> None:
    torch.save({"first.conv.weight": torch.zeros(500)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _old_truncated(path: Path) -> None:
    torch.save({"a": torch.zeros(500)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "damaged, cut short"),
    "truncated": (_truncated, "damaged, cut short"),
    "truncated, old format": (_old_truncated, "damaged, cut short"),
    "text": (lambda path: path.write_text("weights"), "damaged, cut short"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Anything())), "more than tensors"),
    "a whole model": (lambda path: torch.save(torch.nn.Conv2d(1, 1, 1), path), "more than tensors"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor"),
    "a list": (lambda path: torch.save([torch.zeros(3)], path), "holds a list"),
    "a folder": (lambda path: path.mkdir(), "is not a bundle"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_is_no_checkpoint(
    network: SemanticNetwork, damage: str, tmp_path: Path
) -> None:
    make, words = DAMAGED[damage]
    path = tmp_path / "weights.pt"
    make(path)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=words) as caught:
        load_weights(network, path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    check(network, before)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "edgeseg"), (b"\x00\xff" * 40, "damaged"), (None, "does not exist")],
    ids=["empty", "noise", "missing"],
)
def test_an_onnx_file_that_is_none_of_ours(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        read_weights(path)


def test_what_is_saved_is_what_is_loaded(
    network: SemanticNetwork, state: State, tmp_path: Path
) -> None:
    load_weights(network, state)
    path = tmp_path / "saved.pt"
    path.write_bytes(b"an older one")
    save_weights(network, path)
    assert [file.name for file in tmp_path.iterdir()] == ["saved.pt"]
    check(network, read_weights(path))


def test_a_failed_save_leaves_the_old_file(
    network: SemanticNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved.pt"
    path.write_bytes(b"an older one")

    def full(content: object, beside: Path) -> None:
        beside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WeightsError, match="No space left"):
        save_weights(network, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "saved.pt": b"an older one"
    }


def test_a_folder_that_is_not_there_is_made(network: SemanticNetwork, tmp_path: Path) -> None:
    save_weights(network, tmp_path / "new" / "folder" / "saved.pt")
    assert read_weights(tmp_path / "new" / "folder" / "saved.pt")


@pytest.mark.parametrize("place", ["folder", "file/saved.pt"])
def test_an_output_that_cannot_be_written(
    network: SemanticNetwork, place: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be written"):
        save_weights(network, tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_an_exported_file_gives_the_weights_back(
    exported: Callable[..., Exportation], order: str, half: bool
) -> None:
    made = exported("tiny", order=order, half_weights=half)
    found = read_weights(made.path)
    wanted = {
        key: value.half().float() if half and value.ndim > 1 else value
        for key, value in made.network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    # And they go into a network again.
    again = load_weights(type(made.network)(11), made.path)
    torch.testing.assert_close(again.state_dict()["first.conv.weight"], wanted["first.conv.weight"])


@pytest.mark.parametrize("architecture", ["bisenetv1", "bisenetv2"])
def test_the_real_models_come_back_too(
    exported: Callable[..., Exportation], architecture: str
) -> None:
    made = exported(architecture)
    network = load_weights(create_semantic(architecture, 11), made.path)
    check(network, dict(made.network.state_dict()))


def test_an_exported_file_does_not_fit_another_model(
    exported: Callable[..., Exportation],
) -> None:
    with pytest.raises(WeightsError, match="keys are missing"):
        load_weights(create("bisenetv2", 11), exported("tiny").path)


def test_the_shipped_model_comes_by_name_by_folder_and_by_file() -> None:
    shipped = Bundle.open("streets")
    assert shipped.folder is not None
    states = [read_weights(s) for s in ("streets", shipped.folder, shipped.model_path)]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())
    network = create("bisenetv2", len(shipped.spec.classes))
    load_weights(network, "streets")
    check(network, states[0] | {k: v for k, v in network.state_dict().items() if "tracked" in k})
