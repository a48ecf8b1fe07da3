"""Frames without labels: who labels them, and a model that gets used to a camera."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="bundles are made with onnx")

import torch
from torch import Tensor

from edgeseg.bundle import Bundle
from edgeseg.classes import CAMVID, class_list
from edgeseg.cli import main
from edgeseg.dataset import open_dataset
from edgeseg.errors import CalibrationError, DataError, RequestError
from edgeseg.export.adapt import AdaptRequest, adapt_bundle
from edgeseg.export.distill import Teacher, open_teacher
from edgeseg.export.distillation import Distillation
from edgeseg.export.instance_training import InstanceTraining
from edgeseg.export.models import create, create_semantic, definition
from edgeseg.export.preprocess import class_map_of
from edgeseg.export.pseudo import PseudoLabelled, PseudoObjects
from edgeseg.export.recipe import Recipe, Source
from edgeseg.export.semantic_training import SemanticTraining
from edgeseg.export.torchengine import TorchEngine
from edgeseg.export.train import train
from edgeseg.export.weights import load_weights
from edgeseg.instance_dataset import SyntheticInstances
from edgeseg.instances import InstanceOutputs
from edgeseg.metrics import ConfusionMatrix


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures without labels."""
    folder = tmp_path_factory.mktemp("camera")
    streets = open_dataset("synthetic:?frames=6&size=96x128", "test")
    for index, sample in enumerate(streets):
        assert cv2.imwrite(str(folder / f"{index}.png"), sample.pixels)
    return folder


class Sure(Teacher):
    """Says class 3 on the left half with 0.95, class 1 on the right with 0.6, mirror or not."""

    def __init__(self) -> None:
        network = create_semantic("bisenetv2", 11)
        super().__init__(network, definition("bisenetv2").preprocessing, CAMVID)
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        _, height, width, _ = images.shape
        chances = torch.full((2, 11, height, width), 0.0)
        left = torch.zeros(2, height, width, dtype=torch.bool)
        left[0, :, : width // 2] = True
        left[1, :, width // 2 :] = True
        for place, chance, where in ((3, 0.95, left), (1, 0.6, ~left)):
            rest = (1 - chance) / 10
            chances += where[:, None] * rest
            chances[:, place] += where * (chance - rest)
        return chances.log()


def test_only_what_the_teacher_is_sure_of_has_a_label(camera: Path) -> None:
    teacher = Sure()
    made = PseudoLabelled(
        f"frames:{camera}", teacher, CAMVID, size=(96, 128), count=3, confidence=0.9
    )
    assert len(made) == 3
    assert made.labelled == pytest.approx(0.5)
    sample = made.sample(0)
    assert sample.pixels.shape == (96, 128, 3)
    assert (sample.labels[:, :64] == 3).all()
    assert (sample.labels[:, 64:] == CAMVID.ignore).all()
    # It saw the picture and its mirror image.
    first, second = teacher.seen[0].numpy()
    np.testing.assert_array_equal(first, sample.pixels)
    np.testing.assert_array_equal(second, first[:, ::-1])
    # What a caller does to a sample is its own business.
    sample.labels[:] = 0
    assert (made.sample(0).labels[:, :64] == 3).all()
    assert len(made.hashes()) == 3
    with pytest.raises(IndexError):
        made.sample(3)
    every = PseudoLabelled(
        f"frames:{camera}", teacher, CAMVID, size=(96, 128), count=1, confidence=0.5
    )
    assert every.labelled == 1.0
    assert (every.sample(0).labels[:, 64:] == 1).all()


def test_frames_that_cannot_be(camera: Path, tmp_path: Path) -> None:
    def labelled(uri: str, teacher: Teacher, confidence: float = 0.9) -> PseudoLabelled:
        return PseudoLabelled(uri, teacher, CAMVID, size=(96, 128), count=2, confidence=confidence)

    with pytest.raises(DataError, match=r"sure of no pixel .* lower confidence"):
        labelled(f"frames:{camera}", Sure(), 0.99)
    with pytest.raises(CalibrationError):
        labelled(f"frames:{tmp_path / 'nowhere'}", Sure())
    entry = definition("yolact_resnet18")
    objects = Teacher(create("yolact_resnet18", 4), entry.preprocessing)
    with pytest.raises(RequestError, match="teachers that give a class map"):
        labelled(f"frames:{camera}", objects)


def found_objects(size: tuple[int, int]) -> InstanceOutputs:
    """Three objects of masks a quarter of ``size``: of 0.95, of 0.5, of 0.05, and an empty one."""
    masks = np.zeros((4, size[0] // 4, size[1] // 4), np.uint8)
    masks[0, 4:12, 2:10] = masks[1, 4:12, 16:28] = masks[2, :4, :4] = 255
    boxes = [(8, 16, 40, 48), (64, 16, 112, 48), (0, 0, 16, 16), (50, 50, 60, 60)]
    return InstanceOutputs(
        boxes=np.array(boxes, np.float32),
        scores=np.array([0.95, 0.5, 0.05, 0.97], np.float32),
        labels=np.array([2, 0, 1, 0], np.int32),
        masks=masks,
    )


def test_objects_that_the_teacher_is_sure_of(camera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Finding(TorchEngine):
        def run(self, pixels: Any) -> InstanceOutputs:
            seen.append(pixels)
            return found_objects((96, 128))

    monkeypatch.setattr("edgeseg.export.pseudo.TorchEngine", Finding)
    entry = definition("yolact_resnet18")
    teacher = Teacher(create("yolact_resnet18", 4), entry.preprocessing)

    def labelled(confidence: float) -> PseudoObjects:
        return PseudoObjects(
            f"frames:{camera}", teacher, size=(96, 128), count=3, confidence=confidence
        )

    made = labelled(0.9)
    assert len(made) == 3 and made.labelled == 3 and made.classes == teacher.classes.names
    sample = made.sample(0)
    np.testing.assert_array_equal(sample.pixels, seen[0])
    # The one of 0.5 teaches nothing, and where it said 0.05 there is none.
    assert [(each.label, each.crowd) for each in sample.annotations] == [(2, False), (0, True)]
    borders = ((8, 16, 40, 48), (64, 16, 112, 48))
    for each, border in zip(sample.annotations, borders, strict=True):
        left, top, right, bottom = border
        x, y, width, height = each.box
        np.testing.assert_allclose((x, y, x + width, y + height), border, atol=2)
        mask = each.mask(96, 128)
        assert int(mask.sum()) == each.area > 0.8 * (right - left) * (bottom - top)
        assert not mask[:, : int(x)].any() and not mask[int(y + height) :].any()
    # What a caller does to a sample is its own business.
    sample.pixels[:] = 0
    assert made.sample(0).pixels.any()
    assert len(made.hashes()) == 3
    with pytest.raises(IndexError):
        made.sample(3)
    crowds = [[each.crowd for each in labelled(at).sample(0).annotations] for at in (0.5, 0.0)]
    assert crowds == [[False, False], [False, False, False]]
    with pytest.raises(DataError, match=r"sure of no object in .* lower confidence"):
        labelled(0.99)


def test_objects_are_found_by_a_teacher_of_objects(camera: Path, tmp_path: Path) -> None:
    teacher = open_teacher("street-objects", "yolact_resnet18", (96, 128))
    assert teacher.size == (384, 512) and teacher.classes.names == SyntheticInstances.classes
    with pytest.raises(RequestError, match="a teacher that finds objects"):
        PseudoObjects(f"frames:{camera}", Sure(), size=(96, 128), count=2, confidence=0.9)
    with pytest.raises(CalibrationError):
        PseudoObjects(
            f"frames:{tmp_path / 'none'}", teacher, size=(96, 128), count=2, confidence=0.9
        )
    both = recipe(
        f"frames:{camera}",
        "synthetic:?size=96x128&frames=4",
        model="yolact_resnet18",
        distillation=Distillation(alpha=1.0, confidence=0.4, frames=3),
    )
    teacher.size = (192, 256)
    task = InstanceTraining(both, (), teacher)
    assert task.classes == SyntheticInstances.classes
    assert task.batches.drawn(np.random.default_rng(0)).images.shape == (4, 96, 128, 3)
    with pytest.raises(RequestError, match="a teacher gives them; name one"):
        InstanceTraining(both, ())


def recipe(*uris: str, **changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": "bisenetv2",
        "sources": tuple(Source(uri, 2) for uri in uris),
        "steps": 2,
        "crop": (96, 128),
        "full_height": 96,
        "warmup": 1,
        "mixed_precision": False,
        "distillation": Distillation(confidence=0.5, frames=3),
        **changes,
    }
    return Recipe(**given)


def test_frames_alone_have_the_classes_of_the_teacher(camera: Path) -> None:
    teacher = open_teacher("streets", "bisenetv2", (96, 128))
    teacher.size = (96, 128)
    task = SemanticTraining(recipe(f"frames:{camera}"), (), teacher)
    assert task.network.num_classes == 11
    batch = task.batches.drawn(np.random.default_rng(0))
    labels = set(np.unique(batch.truth.labels.numpy()).tolist())
    assert labels <= {*range(11), CAMVID.ignore}
    assert len(labels) > 2


def test_frames_beside_labelled_pictures(camera: Path) -> None:
    teacher = open_teacher("streets", "bisenetv2", (96, 128))
    both = recipe(f"frames:{camera}", "synthetic:?size=96x128&frames=4")
    task = SemanticTraining(both, (), teacher)
    assert task.batches.drawn(np.random.default_rng(0)).images.shape == (4, 96, 128, 3)


def test_without_a_teacher_frames_are_refused(camera: Path) -> None:
    with pytest.raises(RequestError, match="a teacher gives them; name one"):
        SemanticTraining(recipe(f"frames:{camera}", distillation=None), ())
    with pytest.raises(RequestError, match="goes on with a folder, a list or a video"):
        recipe("frames:")


def test_distillation_checks_how_frames_are_labelled() -> None:
    with pytest.raises(RequestError, match="confidence of a distillation is 0 to 1"):
        Distillation(confidence=1.5)
    with pytest.raises(RequestError, match="frames of a distillation are 1 or more"):
        Distillation(frames=0)


def test_names_of_a_checkpoints_classes_are_numbers() -> None:
    network = create_semantic("bisenetv2", 5)
    teacher = Teacher(network, definition("bisenetv2").preprocessing)
    assert teacher.classes == class_list(network.named_classes)
    assert teacher.size is None


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("streets-int8", "integers are not trained; adapt the bundle that it came from"),
        ("tiny", "models of an architecture in `edgeseg models`"),
    ],
)
def test_bundles_that_cannot_be_adapted(
    bundle: str, message: str, bundle_folder: Path, tmp_path: Path
) -> None:
    name = str(bundle_folder) if bundle == "tiny" else bundle
    with pytest.raises(RequestError, match=message):
        adapt_bundle(AdaptRequest(name, ("synthetic:",)), tmp_path / "mine")
    assert list(tmp_path.iterdir()) == [bundle_folder]


def test_places_that_cannot_take_the_bundle(tmp_path: Path) -> None:
    request = AdaptRequest("streets", ("synthetic:",))
    with pytest.raises(RequestError, match="frames of the camera"):
        AdaptRequest("streets", ())
    (tmp_path / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RequestError, match="exists and is no bundle"):
        adapt_bundle(request, tmp_path)
    own = Bundle.open("streets").copy_to(tmp_path / "own")
    with pytest.raises(RequestError, match="is the bundle to adapt"):
        adapt_bundle(AdaptRequest(str(own), ("synthetic:",)), own)


def small(tmp_path: Path, model: str = "streets") -> Path:
    """``model`` at a size that takes no time."""
    target = tmp_path / "small"
    arguments = ["export", model, "--size", "96x128", "-o", str(target)]
    assert main(arguments) == 0
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("model", "confidence"), [("streets", "0.6"), ("street-objects", "0.3")])
def test_a_model_gets_used_to_a_camera(
    model: str,
    confidence: str,
    tmp_path: Path,
    camera: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole command; the original stays, and nothing else is left behind."""
    before = small(tmp_path, model)
    original = (before / "model.onnx").read_bytes()
    target = tmp_path / "mine"
    capsys.readouterr()
    arguments = ["adapt", str(before), "--video", str(camera), "-o", str(target)]
    options = ["--steps", "3", "--frames", "4", "--confidence", confidence, "--json", "-"]
    assert main([*arguments, *options]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["bundle"] == str(target)
    assert (before / "model.onnx").read_bytes() == original
    made = Bundle.open(target)
    assert made.spec.classes == Bundle.open(before).spec.classes
    assert made.manifest["provenance"]["adapted_from"]["name"] == "small"
    assert made.model.content != original
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "small"]


@pytest.mark.slow
def test_adapting_helps_on_a_dark_camera(tmp_path: Path) -> None:
    """Unlabelled frames of a camera darker and bluer than all it knows raise mIoU there."""
    folder = tmp_path / "dark"
    folder.mkdir()

    def darkened(pixels: Any) -> Any:
        return ((pixels / 255.0) ** 2 * (90, 40, 20)).astype(np.uint8)

    for index, sample in enumerate(open_dataset("synthetic:?frames=24&size=192x256", "test")):
        cv2.imwrite(str(folder / f"{index}.png"), darkened(sample.pixels))
    teacher = open_teacher("streets", "bisenetv2", (192, 256))
    teacher.size = (192, 256)
    request = AdaptRequest("streets", (str(folder),), steps=30)
    bundle = Bundle.open("streets")
    made = recipe(
        f"frames:{folder}",
        crop=(192, 256),
        full_height=192,
        steps=30,
        colour=0.3,
        learning_rate=request.learning_rate,
        class_weights=0.0,
        average=0.9,
        distillation=request.recipe(bundle).distillation,
    )
    checkpoint = train(
        made, tmp_path / "dark.pt", start=bundle.model_path, teacher=teacher, report=lambda _: None
    )
    scores = []
    for weights in (bundle.model_path, checkpoint):
        network = load_weights(create_semantic("bisenetv2", 11), weights).eval()
        confusion = ConfusionMatrix(11, CAMVID.ignore)
        with torch.no_grad():
            for sample in open_dataset("synthetic:?frames=12&size=192x256", "val"):
                found = class_map_of(network, darkened(sample.pixels), (192, 256))
                confusion.update(found, sample.labels)
        scores.append(confusion.miou())
    assert scores[1] > scores[0] + 0.05
