"""Distillation losses against plain arithmetic in float64, and a student that learns by them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="teachers may be graphs")

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgeseg.cli import main
from edgeseg.errors import RequestError
from edgeseg.export.distill import DistilledTask, Teacher, open_teacher
from edgeseg.export.distillation import (
    Distillation,
    Imitation,
    channel_divergence,
    head_imitation,
    semantic_imitation,
    softened_divergence,
)
from edgeseg.export.models import create, create_semantic, definition
from edgeseg.export.models.yolact import Heads, Yolact
from edgeseg.export.recipe import Recipe, Source
from edgeseg.export.semantic_training import SemanticTraining
from edgeseg.export.train import train
from edgeseg.export.weights import load_weights, read_weights, save_weights

STREETS = "synthetic:?size=64x96&frames=4"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distribution(values: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = np.exp(values - values.max())
    found: NDArray[np.float64] = shifted / shifted.sum()
    return found


def divergence(
    student: NDArray[np.float64], teacher: NDArray[np.float64], temperature: float
) -> float:
    """T^2 KL of one pair of distributions, from their logits."""
    p, q = distribution(teacher / temperature), distribution(student / temperature)
    return float(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def maps(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(*shape, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_softened_divergence(temperature: float) -> None:
    student, teacher = maps(0, 2, 5, 3, 4)
    s, t = student.double().numpy(), teacher.double().numpy()
    each = np.array(
        [
            [[divergence(s[n, :, y, x], t[n, :, y, x], temperature) for x in range(4)]
             for y in range(3)] for n in range(2)
        ]
    )  # fmt: skip
    assert float(softened_divergence(student, teacher, temperature)) == pytest.approx(
        each.mean(), rel=1e-5
    )
    weights = torch.rand(2, 3, 4)
    assert float(softened_divergence(student, teacher, temperature, weights)) == pytest.approx(
        np.average(each, weights=weights.numpy()), rel=1e-5
    )
    assert float(softened_divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_divergence(temperature: float) -> None:
    student, teacher = maps(1, 2, 3, 4, 5)
    s, t = student.double().flatten(2).numpy(), teacher.double().flatten(2).numpy()
    each = [divergence(s[n, c], t[n, c], temperature) for n in range(2) for c in range(3)]
    assert float(channel_divergence(student, teacher, temperature)) == pytest.approx(
        np.mean(each), rel=1e-5
    )


@pytest.mark.parametrize("loss", [softened_divergence, channel_divergence])
def test_gradients_are_those_of_differences(loss: Any) -> None:
    student, teacher = maps(2, 1, 4, 3, 3)
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher, 2.0).backward()
    assert leaf.grad is not None
    s, t = student.double().numpy(), teacher.double().numpy()

    def value(array: NDArray[np.float64]) -> float:
        if loss is channel_divergence:
            return float(np.mean([divergence(array[0, c].ravel(), t[0, c].ravel(), 2.0)
                                  for c in range(4)]))  # fmt: skip
        return float(np.mean([divergence(array[0, :, y, x], t[0, :, y, x], 2.0)
                              for y in range(3) for x in range(3)]))  # fmt: skip

    for index in np.ndindex(1, 4, 3, 3):
        up, down = s.copy(), s.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        slope = (value(up) - value(down)) / 2e-5
        assert float(leaf.grad[index]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def some_heads(seed: int, anchors: int = 7) -> Heads:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Heads(
        loc=2 * random(2, anchors, 4),
        conf=2 * random(2, anchors, 4),
        mask=torch.tanh(random(2, anchors, 32)),
        priors=torch.rand(anchors, 4),
        proto=random(2, 3, 5, 32).relu(),
    )


def test_imitation_of_heads() -> None:
    student, teacher = some_heads(0), some_heads(1)
    found = head_imitation(student, teacher, 2.0)
    s = {name: student[name].double().numpy() for name in ("loc", "conf", "mask", "proto")}
    t = {name: teacher[name].double().numpy() for name in ("loc", "conf", "mask", "proto")}
    weight = np.array([[1 - distribution(row)[0] for row in rows] for rows in t["conf"]])
    each = np.array(
        [[divergence(s["conf"][n, a], t["conf"][n, a], 2.0) for a in range(7)] for n in range(2)]
    )
    distance = np.abs(s["loc"] - t["loc"])
    box = np.where(distance < 1, distance**2 / 2, distance - 0.5).sum(2)
    mask = ((s["mask"] - t["mask"]) ** 2).mean(2)
    wanted = {
        "soft class": np.average(each, weights=weight) + each.mean(),
        "soft box": 1.5 * np.average(box, weights=weight),
        "soft mask": 6.125 * np.average(mask, weights=weight),
        "soft prototypes": ((s["proto"] - t["proto"]) ** 2).mean() / (t["proto"] ** 2).mean(),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, rel=1e-5)
    same = head_imitation(teacher, teacher, 2.0)
    assert all(abs(float(value)) < 1e-6 for value in same.values())
    with pytest.raises(RequestError, match=r"its loc is \(2, 9, 4\) where the student's is"):
        head_imitation(student, some_heads(1, anchors=9), 2.0)


def test_semantic_teachers_may_be_coarser() -> None:
    student = torch.randn(1, 3, 8, 8)
    teacher = torch.randn(1, 3, 4, 4)
    parts = semantic_imitation(student, teacher, Distillation(channels=1.0))
    assert parts.keys() == {"soft", "channels"}
    fine = nn.functional.interpolate(teacher, size=(8, 8), mode="bilinear", align_corners=False)
    assert float(parts["soft"]) == float(softened_divergence(student, fine, 2.0))
    with pytest.raises(RequestError, match="gives 4 where the student gives 3"):
        semantic_imitation(student, torch.randn(1, 4, 8, 8), Distillation())


class Small(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x).relu())
        return found


def test_features_are_compared_through_a_projector() -> None:
    torch.manual_seed(0)
    student, teacher = Small(4), Small(6)
    x = torch.randn(2, 3, 16, 16)
    imitation = Imitation(student, teacher, [("first", "first")], x)
    (projector,) = imitation.projectors
    assert isinstance(projector, nn.Conv2d)
    assert projector.weight.shape == (6, 4, 1, 1)
    student(x)
    with torch.no_grad():
        teacher(x)
    wanted = teacher.first(x)
    found = projector(student.first(x))
    loss = imitation()
    assert loss.item() == pytest.approx(
        float(((found - wanted).detach() ** 2).mean() / (wanted.detach() ** 2).mean()), rel=1e-6
    )
    loss.backward()
    assert student.first.weight.grad is not None
    assert projector.weight.grad is not None
    assert teacher.first.weight.grad is None
    with pytest.raises(RequestError, match="the student has no module 'second'"):
        Imitation(student, teacher, [("second", "first")], x)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 1.5}, "0 to 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"channels": -1.0}, "0 or more"),
        ({"features": 1.0}, "need layers"),
        ({"layers": (("a", "b"),)}, "need features"),
        ({"features": 1.0, "layers": (("a",),)}, "pairs"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Distillation(**changes)


@pytest.fixture
def recipe(tiny_definition: str) -> Recipe:
    return Recipe(
        model=tiny_definition,
        sources=(Source(STREETS, 4),),
        steps=150,
        crop=(32, 32),
        full_height=64,
        warmup=1,
        learning_rate=3e-3,
        average=0.9,
        mixed_precision=False,
        distillation=Distillation(alpha=0.0, temperature=1.0),
    )


def test_a_student_becomes_its_teacher(recipe: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(7)
    wise = create_semantic(recipe.model, 11)
    teacher = Teacher(wise, definition(recipe.model).preprocessing)
    said: list[str] = []
    train(recipe, tmp_path / "model.pt", teacher=teacher, workers=0, report=said.append)
    losses = [float(line.split()[3]) for line in said if line.startswith("step")]
    assert losses[-1] < losses[0] / 2
    # Nothing of the teacher, or of what helped, is in the checkpoint, and the teacher is as it was.
    load_weights(create(recipe.model, 11), tmp_path / "model.pt")
    torch.manual_seed(7)
    fresh = create_semantic(recipe.model, 11).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in wise.state_dict().items())


def test_parts_of_the_loss_and_their_factors(recipe: Recipe) -> None:
    first = next(name for name, module in create(recipe.model, 11).named_modules()
                 if isinstance(module, nn.Conv2d))  # fmt: skip
    settings = Distillation(
        alpha=0.25, channels=3.0, features=2.0, layers=((first, first),), temperature=2.0
    )
    task = SemanticTraining(replace(recipe, distillation=settings), ())
    torch.manual_seed(1)
    teacher = Teacher(create_semantic(recipe.model, 11), definition(recipe.model).preprocessing)
    both = DistilledTask(task, teacher, settings)
    batch = task.batches.drawn(np.random.default_rng(0))
    x = torch.randn(4, 3, 32, 32)
    found = task.network.eval()(x).detach()
    with torch.no_grad():
        parts = both.losses(found, batch, torch.device("cpu"))
    assert parts.keys() == {"main", "soft", "channels", "features"}
    wanted = teacher(batch.images)
    labels = task.losses(found, batch, torch.device("cpu"))["main"]
    assert float(parts["main"]) == pytest.approx(0.25 * float(labels))
    assert float(parts["soft"]) == pytest.approx(
        0.75 * float(softened_divergence(found, wanted, 2.0)), rel=1e-5
    )
    assert float(parts["channels"]) == pytest.approx(
        3 * float(channel_divergence(found, wanted, 4.0)), rel=1e-5
    )
    assert both.companions is not None


def test_a_teacher_that_only_labels_is_not_asked_again(recipe: Recipe) -> None:
    class Counting(Teacher):
        asked = 0

        def __call__(self, images: Tensor) -> Any:
            self.asked += 1
            return super().__call__(images)

    network = create_semantic(recipe.model, 11)
    teacher = Counting(network, definition(recipe.model).preprocessing)
    for settings, asked in ((Distillation(alpha=1.0), 0), (Distillation(alpha=1.0, channels=1), 1)):
        task = SemanticTraining(replace(recipe, distillation=settings), ())
        both = DistilledTask(task, teacher, settings)
        batch = task.batches.drawn(np.random.default_rng(0))
        x = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            parts = both.losses(task.network.eval()(x), batch, torch.device("cpu"))
        assert teacher.asked == asked
        assert ("channels" in parts) == bool(asked)


def test_companions_are_learned_and_kept(recipe: Recipe, tmp_path: Path) -> None:
    first = next(name for name, module in create(recipe.model, 11).named_modules()
                 if isinstance(module, nn.Conv2d))  # fmt: skip
    settings = Distillation(features=1.0, layers=((first, first),))
    teacher = Teacher(create_semantic(recipe.model, 11), definition(recipe.model).preprocessing)
    runs = []
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        output = tmp_path / f"{name}.pt"
        for steps in parts:
            wanted = replace(recipe, steps=4, distillation=settings)

            def stop(line: str, steps: int = steps) -> None:
                if steps == 2 and line.startswith("  "):
                    raise KeyboardInterrupt

            try:
                train(wanted, output, teacher=teacher, workers=0, report=stop,
                      validate=((STREETS, "val"),), validate_every=2)  # fmt: skip
            except KeyboardInterrupt:
                assert (tmp_path / "parts.pt.resume").exists()
        runs.append(read_weights(output))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_yolact_learns_from_another(tmp_path: Path) -> None:
    recipe = Recipe(
        model="yolact_resnet18",
        sources=(Source("synthetic:?size=96x128&frames=2", 2),),
        steps=1,
        crop=(64, 64),
        full_height=96,
        warmup=1,
        mixed_precision=False,
        distillation=Distillation(),
    )
    network = create("yolact_resnet18", 4)
    assert isinstance(network, Yolact)
    teacher = Teacher(network, definition("yolact_resnet18").preprocessing)
    train(recipe, tmp_path / "model.pt", teacher=teacher, workers=0, report=lambda _: None)
    load_weights(create("yolact_resnet18", 4), tmp_path / "model.pt")


def test_teachers_that_do_not_fit(recipe: Recipe, tmp_path: Path) -> None:
    preprocessing = definition("bisenetv2").preprocessing
    other = Teacher(create_semantic(recipe.model, 5), preprocessing)
    with pytest.raises(RequestError, match="it has 5 where the data have 11"):
        train(recipe, tmp_path / "model.pt", teacher=other, workers=0)
    objects = create("yolact_resnet18", 12)
    assert isinstance(objects, Yolact)
    with pytest.raises(RequestError, match="gives objects where the student gives a class per"):
        train(recipe, tmp_path / "x.pt", teacher=Teacher(objects, preprocessing), workers=0)
    with pytest.raises(RequestError, match="there is no teacher"):
        train(recipe, tmp_path / "model.pt", workers=0)
    with pytest.raises(RequestError, match="the recipe has none"):
        train(replace(recipe, distillation=None), tmp_path / "m.pt", teacher=other, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_teachers_by_name(tiny_definition: str, tmp_path: Path) -> None:
    found = open_teacher("streets", tiny_definition, (64, 64))
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert found(images).shape == (2, 11, 64, 64)
    checkpoint = tmp_path / "wise.pt"
    save_weights(create(tiny_definition, 11), checkpoint)
    assert open_teacher(str(checkpoint), tiny_definition, (32, 32))(images).shape[1] == 11


def test_a_graph_of_others_teaches(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(2, 3, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["scores"])],
        "others",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 2, 32, 32])],
        [numpy_helper.from_array(weight, "weight")],
    )
    path = tmp_path / "others.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path
    )
    teacher = open_teacher(str(path), "bisenetv2", (32, 32))
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    found = teacher(images)
    assert found.shape == (3, 2, 32, 32)
    assert not found.requires_grad


def test_the_command_line_distils(
    tiny_definition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'steps = 1\ncrop = [32, 32]\nfull_height = 64\n[[source]]\nuri = "{STREETS}"\nshare = 2\n'
        "[distillation]\ntemperature = 3.0\nchannels = 1.0\n"
    )
    output = tmp_path / "model.pt"
    line = ["distill", "tiny", "--recipe", str(recipe), "-o", str(output), "--workers", "0"]
    assert main([*line, "--teacher", "streets", "--alpha", "0.1"]) == 0
    load_weights(create(tiny_definition, 11), output)
    assert Recipe.read(recipe, model="tiny").distillation == Distillation(
        temperature=3.0, channels=1.0
    )
    capsys.readouterr()
    assert main([*line, "--teacher", "nowhere"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*line, "--teacher", "streets", "--alpha", "3"]) == 2
    assert "0 to 1" in capsys.readouterr().err
