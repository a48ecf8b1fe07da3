"""Models of Hugging Face transformers, small and random, saved and exported; no download."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the workstation side needs torch")
pytest.importorskip("onnx", reason="the workstation side needs onnx")
pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")

import torch

from edgeseg.bundle import Bundle
from edgeseg.cli import main
from edgeseg.engine import cpu_engines, open_engine
from edgeseg.export import package
from edgeseg.export.own import IMAGENET
from edgeseg.export.transformers_models import _preprocessing
from edgeseg.instances import InstanceOutputs
from edgeseg.result import Outputs
from edgeseg.spec import Preprocessing
from tests.export.test_own_instance import check_alike, expected

# By its name, so that type checkers don't read all of it.
transformers: Any = importlib.import_module("transformers")

SIZE = (64, 96)
NAMES = {0: "wall", 1: "door", 2: "floor", 3: "lamp", 4: "chair"}
LABELS = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
PICTURES: dict[str, Any] = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
    "do_normalize": True,
}


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve streets take longer to paint than all the rest."""
    monkeypatch.setattr(package, "_VERIFIED", 2)
    monkeypatch.setattr(package, "_SHOWN", 1)


def segformer() -> Any:
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
        **LABELS,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def swin(size: int = 64) -> Any:
    return transformers.SwinConfig(
        image_size=size,
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 3, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def upernet() -> Any:
    config = transformers.UperNetConfig(
        backbone_config=swin(), hidden_size=16, use_auxiliary_head=False, **LABELS
    )
    return transformers.UperNetForSemanticSegmentation(config)


def resnet(*stages: str) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        out_features=list(stages),
    )


def detr_config(**more: Any) -> Any:
    return transformers.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        **more,
    )


def maskformer() -> Any:
    config = transformers.MaskFormerConfig(
        backbone_config=swin(),
        decoder_config=detr_config(backbone_config=resnet("stage4")),
        fpn_feature_size=32,
        mask_feature_size=32,
        **LABELS,
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def mask2former() -> Any:
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=10,
        **LABELS,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def detr() -> Any:
    stages = ("stage1", "stage2", "stage3", "stage4")
    return transformers.DetrForSegmentation(detr_config(backbone_config=resnet(*stages), **LABELS))


def saved(make: Callable[[], Any], folder: Path, pictures: dict[str, Any] | None = None) -> Any:
    """The model of ``make``, lively enough to name several classes, saved in ``folder``."""
    torch.manual_seed(3)
    try:
        model = make().eval()
    except ImportError as error:
        if "scipy" in str(error):
            pytest.skip("needs scipy, as transformers wants it for this model")
        raise
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("classifier" in name or "predictor" in name):
                parameter.mul_(20)
    model.save_pretrained(folder)
    if pictures is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return model


def scores(model: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """By loops over queries and numpy, in the model's own attention: (classes, h, w)."""
    x = (pixels[..., ::-1].astype(np.float64) / 255 - PICTURES["image_mean"]) / PICTURES[
        "image_std"
    ]
    with torch.inference_mode():
        found = model(torch.from_numpy(x.transpose(2, 0, 1)[None].copy()).float())
    if hasattr(found, "masks_queries_logits"):
        kinds, masks = found.class_queries_logits, found.masks_queries_logits
    elif hasattr(found, "pred_masks"):
        kinds, masks = found.logits, found.pred_masks
    else:
        logits: NDArray[np.float64] = found.logits[0].double().numpy()
        return logits
    kinds, masks = kinds[0].double().numpy(), masks[0].double().numpy()
    total = np.zeros((len(NAMES), *masks.shape[1:]))
    for query in range(len(kinds)):
        odds = np.exp(kinds[query] - kinds[query].max())
        inside = np.exp(-np.logaddexp(0, -masks[query]))
        for index in range(len(NAMES)):
            total[index] += odds[index] / odds.sum() * inside
    return total


MODELS = {
    "segformer": segformer,
    "upernet": upernet,
    "maskformer": maskformer,
    "mask2former": mask2former,
    "detr": detr,
}


@pytest.mark.parametrize(
    "name",
    ["segformer", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])],
)
def test_a_folder_becomes_a_bundle(name: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "published", tmp_path / "mine"
    model = saved(MODELS[name], folder, PICTURES)
    arguments = ["export", f"hf:{folder}", "--size", "x".join(map(str, SIZE))]
    assert main([*arguments, "-o", str(target)]) == 0
    bundle = Bundle.open(target)
    assert bundle.spec.classes == tuple(NAMES.values())
    assert bundle.spec.preprocessing == Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), "rgb")
    assert bundle.spec.architecture == type(model).__name__
    for engine_name in cpu_engines():
        engine = open_engine(bundle, engine_name)
        for seed in range(2):
            pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            wanted = torch.nn.functional.interpolate(
                torch.from_numpy(scores(model, pixels)[None]), size=SIZE, mode="bilinear"
            )[0].numpy()
            best = np.sort(wanted, axis=0)
            sure = best[-1] - best[-2] > 1e-3 * np.ptp(wanted)
            assert sure.mean() > 0.8
            outputs = engine.run(pixels)
            assert isinstance(outputs, Outputs)
            assert np.array_equal(outputs.class_map[sure], wanted.argmax(axis=0)[sure])
        engine.close()


def raw_detections(model: Any, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """By loops over the queries, in the model's own attention."""
    x = (pixels[..., ::-1].astype(np.float64) / 255 - PICTURES["image_mean"]) / PICTURES[
        "image_std"
    ]
    with torch.inference_mode():
        found = model(torch.from_numpy(x.transpose(2, 0, 1)[None].copy()).float())
    has_boxes = hasattr(found, "pred_masks")
    kinds = found.logits if has_boxes else found.class_queries_logits
    masks = (found.pred_masks if has_boxes else found.masks_queries_logits).double().numpy()
    scores = kinds.double().numpy()
    scores = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    scores = scores[..., : len(NAMES)]
    if has_boxes:
        boxes = found.pred_boxes.double().numpy()
        return {"boxes_cxcywh": boxes, "scores": scores, "masks": masks}
    for query, mask in enumerate(masks[0]):
        inside = mask[mask > 0]
        scores[0, query] *= (1 / (1 + np.exp(-inside))).mean() if inside.size else 0
    return {"scores": scores, "masks": masks}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskformer", "mask2former", "detr"])
def test_a_folder_of_queries_becomes_an_instance_bundle(name: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "published", tmp_path / "mine"
    model = saved(MODELS[name], folder, PICTURES)
    arguments = ["export", f"hf:{folder}", "--task", "instance", "--size", "64x96"]
    assert main([*arguments, "-o", str(target)]) == 0
    bundle = Bundle.open(target)
    assert (bundle.spec.task, bundle.spec.classes) == ("instance", tuple(NAMES.values()))
    for engine_name in cpu_engines():
        engine = open_engine(bundle, engine_name)
        for seed in range(2):
            pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            raw = raw_detections(model, pixels)
            wanted = expected(raw, SIZE, capacity=100, least=0.05, overlap=1.0)
            outputs = engine.run(pixels)
            assert isinstance(outputs, InstanceOutputs)
            assert len(wanted["scores"]) > 2
            check_alike({key: getattr(outputs, key) for key in wanted}, wanted)
        engine.close()


def test_a_model_of_classes_per_pixel_finds_no_objects(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", f"hf:{published}", "--task", "instance", "--size", "64x96"]
    assert main([*arguments, "-o", str(tmp_path / "mine")]) == 2
    assert "classes per pixel and no objects" in capsys.readouterr().err


@pytest.mark.slow
def test_sums_over_queries_are_no_confidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(detr, tmp_path / "published", PICTURES)
    arguments = ["export", f"hf:{tmp_path / 'published'}", "--size", "64x96", "--confidence"]
    assert main([*arguments, "-o", str(tmp_path / "mine")]) == 2
    assert "leave --confidence out" in capsys.readouterr().err


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _another_task(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["SegformerForImageClassification"]
    (folder / "config.json").write_text(json.dumps(config))


def _unknown(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NextYearsForSemanticSegmentation"]
    (folder / "config.json").write_text(json.dumps(config))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _damaged(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _other_weights(folder: Path) -> None:
    safetensors: Any = importlib.import_module("safetensors.torch")
    safetensors.save_file(
        {"elsewhere.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"}
    )


SPOILED = {
    "no config": (_no_config, "has no config.json"),
    "a broken config": (_broken_config, "cannot be read"),
    "another task": (_another_task, "no segmentation model"),
    "an unknown architecture": (_unknown, "knows no NextYearsForSemanticSegmentation"),
    "no weights": (_no_weights, "no weights"),
    "damaged weights": (_damaged, "cannot be loaded"),
    "weights of another model": (_other_weights, "keys are missing"),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    saved(segformer, folder, PICTURES)
    return folder


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_cannot_be_taken_is_refused_in_a_sentence(
    case: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = SPOILED[case]
    folder = tmp_path / "spoiled"
    shutil.copytree(published, folder)
    spoil(folder)
    capsys.readouterr()
    code = main(["export", f"hf:{folder}", "--size", "64x96", "-o", str(tmp_path / "mine")])
    assert code in (1, 2)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("edgeseg: ")
    assert words in message
    assert not (tmp_path / "mine").exists()


def test_a_size_is_needed_where_the_folder_says_none(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"hf:{published}", "-o", str(tmp_path / "mine")]) == 2
    assert "--size HxW" in capsys.readouterr().err


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": [123.0, 116.0, 103.0], "image_std": [58.0, 57.0, 57.5]},
        {"do_normalize": False},
        {"do_rescale": True, "do_flip_channel_order": True},
    ],
    ids=["nothing", "usual", "another factor", "up to 255", "rescaled only", "bgr"],
)
def test_normalisation_is_that_of_transformers(described: dict[str, Any]) -> None:
    found = _preprocessing(described)
    if not described:
        assert found == IMAGENET
        return
    pixels = np.arange(0, 255, 5, dtype=np.float64)[:, None] + np.array([0, 1, 2])
    wanted = pixels[:, ::-1] if described.get("do_flip_channel_order") else pixels
    if described.get("do_rescale", True):
        wanted = wanted * described.get("rescale_factor", 1 / 255)
    if "image_mean" in described:
        wanted = (wanted - described["image_mean"]) / described["image_std"]
    given = pixels[:, ::-1] if found.order == "bgr" else pixels
    ours = (given / 255 - np.array(found.mean)) / np.array(found.std)
    np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-9)
