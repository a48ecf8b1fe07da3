"""Segmentation models of Hugging Face transformers, from a folder on this machine.

The folder holds ``config.json``, the weights and, mostly, ``preprocessor_config.json``, as
``save_pretrained`` writes them. Nothing is downloaded, and no code in the folder is run.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeseg.errors import RequestError, WeightsError
from edgeseg.export.own import IMAGENET, first_line
from edgeseg.spec import Preprocessing

__all__ = [
    "Pretrained",
    "instances_of_transformer",
    "logits_of_transformer",
    "read_pretrained",
]

#: how the classes of transformers that segment are called
_KINDS = (
    "ForSemanticSegmentation",
    "ForUniversalSegmentation",
    "ForInstanceSegmentation",
    "ForSegmentation",
)


@dataclass(frozen=True)
class Pretrained:
    """One folder, read: ``size`` is (height, width), None where the folder doesn't say it."""

    module: nn.Module
    architecture: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    size: tuple[int, int] | None
    weights: Path

    @property
    def gives_logits(self) -> bool:
        """Whether its scores are logits of classes, not sums over queries."""
        return self.architecture.endswith(_KINDS[0])


def read_pretrained(folder: str) -> Pretrained:
    """The model in ``folder``, in eval mode.

    RequestError when it is no folder or holds no segmentation model, WeightsError when its weights
    cannot be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RequestError(
            f"hf: is followed by a folder on this machine, and there is none called {folder}; "
            f"`hf download {folder} --local-dir {path.name or 'model'}` fetches a model by its name"
        )
    config = _json(path / "config.json", "save_pretrained writes it")
    architecture = str((config.get("architectures") or ["unknown"])[0])
    if not architecture.endswith(_KINDS):
        raise RequestError(
            f"{path} holds a {architecture}, which is no segmentation model: its architecture in "
            f"config.json would end in {', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
        )
    weights = [*sorted(path.glob("*.safetensors")), *sorted(path.glob("pytorch_model*.bin"))]
    if not weights:
        raise WeightsError(
            f"{path} has a config.json and no weights (model.safetensors or pytorch_model.bin); "
            "download the folder again, whole"
        )
    transformers = _transformers()
    if not hasattr(transformers, architecture):
        raise RequestError(
            f"transformers {transformers.__version__} knows no {architecture}; "
            "pip install --upgrade transformers, or export the model by a factory of your own"
        )
    module = _loaded(getattr(transformers, architecture), path)
    described = path / "preprocessor_config.json"
    pictures = _json(described, "") if described.is_file() else {}
    configuration: Any = module.config
    names = configuration.id2label
    return Pretrained(
        module=module,
        architecture=architecture,
        classes=tuple(str(names[index]) for index in sorted(names)),
        preprocessing=_preprocessing(pictures),
        size=_size(pictures),
        weights=weights[0],
    )


def logits_of_transformer(result: Any) -> Tensor:
    """Scores (1, classes, h, w) of what a transformers model returns.

    Models of masks and classes (Cheng et al., "Per-pixel classification is not all you need", 2021)
    get that paper's semantic inference: the sum over the queries of class probability, the last
    class ("nothing") left out, times mask probability.
    """
    if hasattr(result, "masks_queries_logits"):
        return _of_queries(result.class_queries_logits, result.masks_queries_logits)
    if hasattr(result, "pred_masks"):
        return _of_queries(result.logits, result.pred_masks)
    logits: Tensor = result.logits
    return logits


def instances_of_transformer(result: Any) -> dict[str, Tensor]:
    """The raw detections of what a transformers model returns: see `edgeseg.export.own_instance`.

    Each query is a candidate. MaskFormer and Mask2Former multiply its score by the mean probability
    of the samples that its mask covers, as those papers' instance inference does; DETR has boxes.
    RequestError for a model that gives classes per pixel only.
    """
    if hasattr(result, "masks_queries_logits"):
        masks = result.masks_queries_logits
        covered = (masks > 0).to(masks.dtype)
        sure = (masks.sigmoid() * covered).sum(dim=(2, 3)) / (covered.sum(dim=(2, 3)) + 1e-6)
        scores = result.class_queries_logits.softmax(dim=-1)[..., :-1]
        return {"scores": scores * sure[..., None], "masks": masks}
    if hasattr(result, "pred_masks"):
        return {
            "boxes_cxcywh": result.pred_boxes,
            "scores": result.logits.softmax(dim=-1)[..., :-1],
            "masks": result.pred_masks,
        }
    raise RequestError(
        f"a {type(result).__name__} has classes per pixel and no objects; leave --task instance out"
    )


def _of_queries(classes: Tensor, masks: Tensor) -> Tensor:
    """(1, queries, classes + 1) and (1, queries, h, w) logits -> (1, classes, h, w) scores."""
    return torch.einsum("bqc,bqhw->bchw", classes.softmax(dim=-1)[..., :-1], masks.sigmoid())


def _transformers() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
        # Its own bars would be drawn into ours.
        transformers.utils.logging.disable_progress_bar()
        return transformers
    except ImportError as error:
        raise RequestError(
            f"models named hf: need transformers, which cannot be imported ({error}); "
            "pip install transformers adds it"
        ) from error


def _loaded(kind: Any, path: Path) -> nn.Module:
    try:
        # Attention written out: fused attention of windows cannot be traced to ONNX.
        module, report = kind.from_pretrained(
            path,
            local_files_only=True,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except ImportError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RequestError(
            f"{kind.__name__} cannot be built here: {lines[0] if lines else error}"
        ) from error
    except Exception as error:
        raise WeightsError(f"{path} cannot be loaded ({first_line(error)})") from error
    missing = [str(key) for key in report.get("missing_keys", ())]
    if missing:
        raise WeightsError(
            f"the weights in {path} are of another model: {len(missing)} keys are missing "
            f"(first {sorted(missing)[0]}), and would be random"
        )
    network: nn.Module = module
    return network.eval()


def _json(path: Path, hint: str) -> Mapping[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError(f"{path.parent} has no {path.name}; {hint}") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} is to hold an object, and holds a {type(content).__name__}")
    return content


def _preprocessing(described: Mapping[str, Any]) -> Preprocessing:
    """What ``preprocessor_config.json`` says, ImageNet's where it says nothing.

    transformers computes ``(pixel * rescale_factor - mean) / std`` in RGB, in which rescaling and
    normalisation can each be switched off; ours divides by 255 first.
    """
    if not described:
        return IMAGENET
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    # Processors that never normalise do not say so.
    if described.get("do_normalize", "image_mean" in described):
        mean = _three(described.get("image_mean"), IMAGENET.mean)
        std = _three(described.get("image_std"), IMAGENET.std)
    factor = 1.0
    if described.get("do_rescale", True):
        factor = float(described.get("rescale_factor", 1 / 255))
    # (p * f - m) / s = (p / 255 - m / (255 f)) / (s / (255 f)); the usual factor leaves both alone.
    range_of_pixels = 255 * factor
    if abs(range_of_pixels - 1) < 1e-6:
        range_of_pixels = 1.0
    mean = _three([value / range_of_pixels for value in mean], mean)
    std = _three([value / range_of_pixels for value in std], std)
    order = described.get("do_flip_channel_order", False)
    return Preprocessing(mean, std, "bgr" if order else "rgb")


def _three(values: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if isinstance(values, (list, tuple)) and len(values) == 3:
        first, second, third = (float(value) for value in values)
        return first, second, third
    return default


def _size(described: Mapping[str, Any]) -> tuple[int, int] | None:
    size = described.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and isinstance(size.get("height"), int):
        width = size.get("width")
        return (size["height"], width) if isinstance(width, int) else None
    return None
