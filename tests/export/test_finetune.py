"""Fine-tuning of a quantized graph: the teacher, the training, and what comes back of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")

import cv2
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from edgeseg.calibration.calibrate import Calibrated
from edgeseg.calibration.graph import Graph, prepared
from edgeseg.calibration.observe import observe
from edgeseg.calibration.placement import place
from edgeseg.calibration.quantize import quantize
from edgeseg.calibration.ranges import weight_scales
from edgeseg.calibration.recipe import Finetuning
from edgeseg.errors import CalibrationError
from edgeseg.export import finetune as module
from edgeseg.export.finetune import divergence, finetune, teach, train_integers
from edgeseg.export.torchgraph import TorchGraph
from edgeseg.frame import Pixels

HEIGHT, WIDTH = 32, 64
#: The MatMul of the network here takes one width.
VIEWS = (1.0,)
SETTINGS = Finetuning(steps=12, batch=2, learning_rate=1e-2, scale_learning_rate=5e-2, views=VIEWS)


def network() -> onnx.ModelProto:
    """Two branches of convolutions that meet in a Concat, and a MatMul that cannot be quantized;
    logits of 4 classes at 1/4."""
    rng = np.random.default_rng(1)
    square = rng.normal(0, 0.25, (WIDTH // 4, WIDTH // 4))
    constants: dict[str, NDArray[Any]] = {
        "mean": np.full((1, 3, 1, 1), 128, np.float32),
        # It treats left as it treats right, or the teacher would contradict the model.
        "square": ((square + square[::-1, ::-1]) / 2).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["x"]),
    ]

    def conv(name: str, source: str, out: int, into: int, kernel: int, stride: int = 1) -> str:
        scale = (2 / (into * kernel * kernel)) ** 0.5 / (64 if source == "x" else 1)
        weight = rng.normal(0, scale, (out, into, kernel, kernel))
        constants[f"{name}.weight"] = weight.astype(np.float32)
        constants[f"{name}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        nodes.append(
            helper.make_node(
                "Conv", inputs, [f"{name}.raw"], strides=[stride] * 2, pads=[kernel // 2] * 4
            )
        )
        nodes.append(helper.make_node("Relu", [f"{name}.raw"], [f"{name}.out"]))
        return f"{name}.out"

    stem = conv("stem", "x", 6, 3, 3, 2)
    sides = [conv("one", stem, 4, 6, 3, 2), conv("two", stem, 4, 6, 1, 2)]
    nodes.append(helper.make_node("Concat", sides, ["joined"], axis=1))
    conv("last", "joined", 4, 8, 1)
    nodes.append(helper.make_node("MatMul", ["last.raw", "square"], ["mixed"]))
    nodes.append(helper.make_node("Add", ["mixed", "last.raw"], ["logits"]))
    head = helper.make_node(
        "EdgeSegUpsampleArgmax", ["logits"], ["class_map"], domain="edgeseg",
        height=HEIGHT, width=WIDTH, align_corners=0,
    )  # fmt: skip
    kept = [node for node in nodes if list(node.output) != ["last.out"]]
    graph = helper.make_graph(
        [*kept, head],
        "two branches",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, HEIGHT, WIDTH, 3])],
        [helper.make_tensor_value_info("class_map", TensorProto.UINT8, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("edgeseg", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def pictures(count: int) -> list[Pixels]:
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (count, HEIGHT // 4, WIDTH // 4, 3)).astype(np.uint8)
    return list(blocks.repeat(4, axis=1).repeat(4, axis=2))


def logits_of(model: onnx.ModelProto, pixels: Pixels) -> NDArray[np.float32]:
    """By ONNX Runtime, each node as it stands; (4, 8, 16)."""
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    del asked.graph.output[:]
    asked.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, None))
    kept = [node for node in asked.graph.node if node.domain != "edgeseg"]
    del asked.graph.node[:]
    asked.graph.node.extend(kept)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        asked.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: NDArray[np.float32] = session.run(None, {"image": pixels[None]})[0][0]
    return found


@dataclass(frozen=True)
class Setting:
    """A network quantized badly, with frames and what its teacher says of them."""

    calibrated: Calibrated
    frames: Sequence[Pixels]
    wanted: torch.Tensor

    def finetune(
        self, settings: Finetuning = SETTINGS, floats: Sequence[str] = (), **options: Any
    ) -> Calibrated:
        placement = self.calibrated.placement(floats)
        graph, scales = finetune(
            self.calibrated.graph, placement, self.calibrated.scales(placement),
            self.frames, self.wanted, settings, **options,
        )  # fmt: skip
        return self.calibrated.trained(graph, placement, scales)

    def loss(self, model: onnx.ModelProto) -> float:
        """The divergence of ``model`` from the teacher, by ONNX Runtime in float64."""
        found = []
        for pixels, wanted in zip(self.frames, self.wanted.double().numpy(), strict=True):
            logits = logits_of(model, pixels).astype(np.float64)
            shifted = logits - logits.max(axis=0)
            log_odds = shifted - np.log(np.exp(shifted).sum(axis=0))
            logs = np.log(np.maximum(wanted, 1e-300))
            found.append((wanted * (logs - log_odds)).sum(axis=0).mean())
        return float(np.mean(found))


@pytest.fixture(scope="module")
def setting() -> Setting:
    graph, frames = prepared(network()), pictures(6)
    placement = place(graph)
    tensors = [site.tensor for site in placement.sites]
    seen = observe(graph.model, tensors, frames, total=len(frames))
    return Setting(
        Calibrated(
            graph,
            # Clipped far too early.
            {name: 0.4 * seen[name].histogram.amax for name in tensors},
            {
                layer.name: weight_scales(graph.floats(layer.weight), layer.axis)
                for layer in placement.layers
            },
            seen,
        ),
        frames,
        teach(graph.model, frames, VIEWS),
    )


def same(one: Graph, other: Graph) -> bool:
    found, wanted = (each.model.SerializeToString(deterministic=True) for each in (one, other))
    return bool(found == wanted)


# --- the teacher


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    odds = np.exp(logits.astype(np.float64) - logits.max(axis=0))
    shares: NDArray[np.float64] = odds / odds.sum(axis=0)
    return shares


def test_teacher_is_the_mean_over_mirrored_views(setting: Setting) -> None:
    model = setting.calibrated.graph.model
    found = teach(model, setting.frames[:2], VIEWS)
    assert found.shape == (2, 4, HEIGHT // 4, WIDTH // 4) and found.dtype == torch.float16
    for pixels, said in zip(setting.frames, found.numpy(), strict=False):
        mirrored = np.ascontiguousarray(pixels[:, ::-1])
        views = [softmax(logits_of(model, pixels)), softmax(logits_of(model, mirrored))[..., ::-1]]
        np.testing.assert_allclose(said, np.mean(views, axis=0), atol=1e-3)


@pytest.mark.parametrize("views", [(1.0, 1.5), (1.5, 1.0), (1.5,), (0.5, 1.0, 2.0)])
def test_teacher_looks_at_other_sizes(views: tuple[float, ...]) -> None:
    """Of a network without the MatMul, which takes one width only; by torch's own operators."""
    model = network()
    nodes = [node for node in model.graph.node if node.op_type != "MatMul"]
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = "last.raw" if name == "mixed" else name
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    values = {
        entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
        for entry in model.graph.initializer
    }

    def conv(name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        weight = values[f"{name}.weight"]
        padding = weight.shape[2] // 2
        return functional.conv2d(x, weight, values[f"{name}.bias"], stride, padding)

    def logits(pixels: Pixels) -> torch.Tensor:
        x = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32)) - 128
        stem = conv("stem", x, 2).relu()
        joined = torch.cat([conv("one", stem, 2).relu(), conv("two", stem, 2).relu()], 1)
        return 2 * conv("last", joined, 1)

    (pixels,) = pictures(1)
    total = torch.zeros(4, HEIGHT // 4, WIDTH // 4)
    for view in views:
        # Sizes are multiples of 32.
        size = (round(WIDTH * view / 32) * 32, max(round(HEIGHT * view / 32), 1) * 32)
        seen = pixels if view == 1 else np.asarray(cv2.resize(pixels, size), np.uint8)
        for mirrored in (False, True):
            found = logits(np.ascontiguousarray(seen[:, ::-1]) if mirrored else seen)
            found = found.flip(3) if mirrored else found
            found = functional.interpolate(
                found, total.shape[1:], mode="bilinear", align_corners=False, antialias=True
            )
            total += found.softmax(1)[0] / (2 * len(views))
    said = teach(model, [pixels], views)[0].float()
    torch.testing.assert_close(said, total, atol=1e-3, rtol=1e-3)


def test_teacher_that_takes_one_size(setting: Setting) -> None:
    with pytest.raises(CalibrationError, match=r"1.5 times its size.* views = \[1.0\]"):
        teach(setting.calibrated.graph.model, setting.frames[:1], (1.0, 1.5))


def test_mirrored_frames_have_mirrored_targets(setting: Setting) -> None:
    """A teacher that looks at mirror images says of a mirrored frame the mirrored same."""
    model = setting.calibrated.graph.model
    batch = module._batch(setting.frames, [1, 3], [True, False])
    np.testing.assert_array_equal(batch[0].numpy(), setting.frames[1][:, ::-1])
    np.testing.assert_array_equal(batch[1].numpy(), setting.frames[3])
    targets = module._targets(setting.wanted, [1, 3], [True, False])
    np.testing.assert_array_equal(targets[1].numpy(), setting.wanted[3].float().numpy())
    mirrored = teach(model, [np.ascontiguousarray(setting.frames[1][:, ::-1])], VIEWS)
    torch.testing.assert_close(targets[0], mirrored[0].float(), atol=1e-3, rtol=1e-3)


def test_divergence_is_that_of_float64() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 3, 4))
    targets = rng.dirichlet(np.ones(5), (2, 3, 4)).transpose(0, 3, 1, 2)
    targets[0, :, 0, 0] = (0, 1, 0, 0, 0)
    odds = np.exp(logits)
    shares = odds / odds.sum(axis=1, keepdims=True)
    logs = np.log(np.where(targets > 0, targets, 1) / np.where(targets > 0, shares, 1))
    wanted = (targets * logs).sum(axis=1).mean()
    found = divergence(torch.from_numpy(logits), torch.from_numpy(targets))
    assert float(found) == pytest.approx(wanted, rel=1e-12)


# --- the training


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_training_lowers_the_divergence(setting: Setting, mixed_precision: bool) -> None:
    losses: list[float] = []
    settings = replace(SETTINGS, steps=60, mixed_precision=mixed_precision)
    trained = setting.finetune(settings, progress=lambda step, steps, loss: losses.append(loss))
    # The graph that is written has learned it, not only the module that was trained.
    before, after = (setting.loss(each.model()) for each in (setting.calibrated, trained))
    assert after < 0.7 * before
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.7 * np.mean(losses[:2])


def test_written_graph_is_the_student(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module after its last step, and the graph by ONNX Runtime."""
    students: list[TorchGraph] = []

    def kept(*arguments: Any, **options: Any) -> TorchGraph:
        students.append(TorchGraph(*arguments, **options))
        return students[-1]

    monkeypatch.setattr(module, "TorchGraph", kept)
    trained = setting.finetune()
    (student,) = students
    with torch.no_grad():
        (found,) = student(torch.from_numpy(np.stack(setting.frames))).values()
    for pixels, logits in zip(setting.frames, found.numpy(), strict=True):
        wanted = logits_of(trained.model(), pixels)
        # Sums in another order may round a value the other way, rarely.
        assert np.mean(np.abs(wanted - logits) > 1e-3 * np.abs(wanted).max()) < 0.02


def test_tensors_of_a_group_keep_one_scale(setting: Setting) -> None:
    before, after = setting.calibrated, setting.finetune()
    placement = before.placement()
    (group,) = [tensors for tensors in placement.groups().values() if len(tensors) > 1]
    assert set(group) == {"one.out", "two.out", "joined"}
    assert len({after.thresholds[tensor] for tensor in group}) == 1
    one, other = before.scales(placement).activations, after.scales(placement).activations
    assert all(one[name] != other[name] and other[name] > 0 for name in one)
    model = after.model()
    scales = {
        node.input[1]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in group
    }
    assert len(scales) == 1


def test_what_is_not_quantized_is_left_as_it_is(setting: Setting) -> None:
    before, after = setting.calibrated.graph, setting.finetune(floats=["one"]).graph
    for name in ("one.weight", "one.bias", "square", "mean"):
        np.testing.assert_array_equal(after.array(name), before.array(name))
    for name in ("stem.weight", "stem.bias", "two.weight", "last.bias"):
        assert not np.array_equal(after.array(name), before.array(name))


def test_nothing_is_trained_at_rates_of_0(setting: Setting) -> None:
    after = setting.finetune(replace(SETTINGS, learning_rate=0.0, scale_learning_rate=0.0))
    placement = after.placement()
    # Weights are clipped to what their scales hold, and nothing is beyond it here.
    assert same(after.graph, setting.calibrated.graph)
    one, other = (each.scales(placement) for each in (after, setting.calibrated))
    assert one.activations == other.activations
    for name, scales in one.weights.items():
        np.testing.assert_allclose(scales, other.weights[name], rtol=1e-6)


def test_training_that_diverges_is_ended(setting: Setting) -> None:
    with pytest.raises(CalibrationError, match=r"diverged at step .* of 12; take smaller"):
        setting.finetune(replace(SETTINGS, scale_learning_rate=1e4))


# --- an interrupted training


def test_interrupted_training_gives_the_same(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_EVERY", 3)
    whole = setting.finetune()
    file = tmp_path / "finetune.pt"
    steps: list[int] = []

    def stopped(step: int, total: int, loss: float) -> None:
        steps.append(step)
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setting.finetune(resume=file, progress=stopped)
    found = setting.finetune(resume=file, progress=stopped_never(steps))
    # From the state after step 6 on.
    assert steps == [*range(1, 9), *range(7, 13)]
    assert same(found.graph, whole.graph) and found.thresholds == whole.thresholds
    for name, scales in whole.weight_scales.items():
        np.testing.assert_array_equal(found.weight_scales[name], scales)
    assert [path.name for path in tmp_path.iterdir()] == ["finetune.pt"]
    # Another training does not go on from it.
    steps.clear()
    setting.finetune(replace(SETTINGS, seed=1), resume=file, progress=stopped_never(steps))
    assert steps[0] == 1


def stopped_never(steps: list[int]) -> Any:
    return lambda step, total, loss: steps.append(step)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickle", "list"])
def test_damaged_states_are_begun_anew(setting: Setting, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "finetune.pt"
    settings = replace(SETTINGS, steps=2)
    torch.save([1, 2] if damage == "list" else {"context": "x"}, file)
    content = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "cut": content[:-50], "text": b"text\n", "pickle": b"\x80\x02."}.get(
            damage, content
        )
    )
    steps: list[int] = []
    setting.finetune(settings, resume=file, progress=stopped_never(steps))
    assert steps == [1, 2]


def test_teacher_is_asked_once(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, steps=2)
    first = train_integers(setting.calibrated, setting.frames, settings, work=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "teach", lambda *_, **__: pytest.fail("asked again"))
        again = train_integers(setting.calibrated, setting.frames, settings, work=tmp_path)
        assert same(first.graph, again.graph) and first.thresholds == again.thresholds
    # Other frames, other answers.
    asked: list[int] = []

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(len(arguments[1]))
        return teach(*arguments, **options)

    monkeypatch.setattr(module, "teach", noted)
    train_integers(setting.calibrated, setting.frames[:4], settings, work=tmp_path)
    assert asked == [4]


def test_a_place_that_cannot_be_written(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be written"):
        train_integers(
            setting.calibrated, setting.frames, replace(SETTINGS, steps=1),
            work=tmp_path / "nowhere",
        )  # fmt: skip


def test_every_frame_comes_once_before_any_comes_again() -> None:
    order = module._Order(7, seed=3)
    drawn = [order.next(3) for _ in range(14)]
    frames = [index for chosen, _ in drawn for index in chosen]
    for first in range(0, 42, 7):
        assert sorted(frames[first : first + 7]) == list(range(7))
    assert frames[:7] != frames[7:14]
    mirrored = [flip for _, flips in drawn for flip in flips]
    assert 8 < sum(mirrored) < 34


def test_quantized_weights_are_those_that_were_trained(setting: Setting) -> None:
    """int8 levels of the written graph, against rounding by hand."""
    trained = setting.finetune()
    placement = trained.placement()
    scales = trained.scales(placement)
    model = quantize(trained.graph, placement, scales)
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    for layer in placement.layers:
        weight = trained.graph.floats(layer.weight)
        largest = np.abs(weight).max(axis=(1, 2, 3))
        np.testing.assert_allclose(scales.weights[layer.name], largest / 127, rtol=1e-6)
        levels = np.rint(weight / scales.weights[layer.name][:, None, None, None])
        np.testing.assert_array_equal(arrays[f"{layer.weight}.int8"], levels)
        assert np.abs(levels).max() == 127
