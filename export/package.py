"""From a checkpoint to a verified bundle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeseg import __version__
from edgeseg.bundle import SHIPPED, Bundle, new_bundle, tool_versions, write_manifest
from edgeseg.classes import ClassList, class_list
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.draw import draw_classes
from edgeseg.engine import cpu_engine, open_engine
from edgeseg.errors import RequestError, WeightsError
from edgeseg.evaluate import evaluate
from edgeseg.export.models import DEFINITIONS, SemanticNetwork, create, definition
from edgeseg.export.onnx import export_network, sha256_of
from edgeseg.export.preprocess import evaluate_network
from edgeseg.export.verify import Verification, verify
from edgeseg.export.weights import load_weights, read_weights
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.report import Figure, Figures, Picture, Pictures, Report, Section, Table
from edgeseg.spec import Fit, ModelSpec, parse_size

__all__ = ["ExportRequest", "Exported", "export_bundle"]

#: pictures that ``verify`` looks at
_VERIFIED = 12
_SHOWN = 4
# What has an influence on the file.
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")


@dataclass(frozen=True)
class ExportRequest:
    """What ``edgeseg export`` was asked for; None where a default applies."""

    model: str
    weights: str | None = None
    size: str | None = None
    name: str | None = None
    classes: tuple[str, ...] | None = None
    fit: Fit = "stretch"
    confidence: bool = False
    half_weights: bool = False
    data: str | None = None
    split: str = "val"


@dataclass(frozen=True)
class Exported:
    """The bundle that was made, and what was found out about it."""

    bundle: Path
    verification: Verification
    accuracy: tuple[dict[str, object], ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "bundle": str(self.bundle),
            "verification": self.verification.to_dict(),
            "accuracy": list(self.accuracy),
        }


def export_bundle(
    request: ExportRequest,
    target: str | Path,
    *,
    provenance: dict[str, Any] | None = None,
    extra_files: tuple[Path, ...] = (),
    pictures: Dataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Makes the bundle ``target`` of a checkpoint; it appears whole, or not at all.

    ``provenance`` is added to bundle.json; ``extra_files`` are copied into the bundle. ``pictures``
    are what the report shows, where those of the data may not be passed on.

    RequestError for what cannot be (an unknown model, a size, classes that don't match the
    weights), WeightsError for the checkpoint, EngineError when an engine disagrees with PyTorch.
    """
    target = Path(target)
    network, architecture, weights_path = _network(request)
    spec = _spec(request, network, architecture, name=request.name or target.resolve().name)
    if request.half_weights:
        _round_to_half(network)
    dataset = _dataset(request)
    if request.data is not None and dataset.classes.names != spec.classes:
        raise RequestError(
            f"{request.data} has the classes {', '.join(dataset.classes.names)}, and the model "
            f"has {', '.join(spec.classes)}; leave --data out, or give --classes"
        )
    checkpoint = sha256_of(weights_path)
    with new_bundle(target) as folder:
        frames = _spread(dataset, _VERIFIED)
        exported = export_network(
            network, spec, half_weights=request.half_weights, source_sha256=checkpoint
        )
        exported.write(folder / "model.onnx")
        bundle = Bundle.open(folder / "model.onnx")
        verification = verify(
            network, bundle, frames, f"{dataset.title} {dataset.split}", progress=progress
        )
        accuracy: tuple[dict[str, object], ...] = ()
        if request.data is not None:
            accuracy = _accuracy(network, bundle, dataset, progress)
        report = _report(network, bundle, verification, accuracy, dataset, pictures or dataset)
        report.write(folder / "report.html")
        for file in extra_files:
            (folder / file.name).write_bytes(file.read_bytes())
        write_manifest(
            folder,
            {
                "name": spec.name,
                "edgeseg": __version__,
                "provenance": {
                    "architecture": architecture,
                    "checkpoint": {"file": weights_path.name, "sha256": checkpoint},
                    "weights_stored_as": "fp16" if request.half_weights else "fp32",
                    "tools": tool_versions(_TOOLS),
                    **(provenance or {}),
                },
                "verification": verification.to_dict(),
                "accuracy": list(accuracy),
            },
        )
    return Exported(target, verification, accuracy)


def _network(request: ExportRequest) -> tuple[SemanticNetwork, str, Path]:
    """The network with its weights, its architecture, and the file they came from."""
    if request.model in SHIPPED:
        if request.weights is not None:
            raise RequestError(
                f"{request.model} comes with its weights, and {request.weights} came too; to "
                "export a checkpoint of your own, name its architecture: "
                f"{', '.join(DEFINITIONS)}"
            )
        shipped = Bundle.open(request.model)
        architecture, weights = shipped.spec.architecture, str(shipped.model_path)
    else:
        architecture = definition(request.model).name
        if request.weights is None:
            raise RequestError(
                f"{architecture} has no weights of its own; give a checkpoint with --weights "
                f"(published ones: {DEFINITIONS[architecture].checkpoints}), or export streets"
            )
        weights = request.weights
    state = read_weights(weights)
    key = DEFINITIONS[architecture].network.classifier
    if key not in state:
        raise WeightsError(f"the checkpoint {weights} is not of {architecture}: it has no {key}")
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"the checkpoint {weights} holds values that are no numbers, in {len(broken)} entries "
            f"(first {broken[0]}); take one from before the training diverged"
        )
    network = load_weights(create(architecture, int(state[key].shape[0])), state)
    path = Path(weights)
    if not path.is_file():
        path = Bundle.open(path).model_path
    return network, architecture, path


def _spec(
    request: ExportRequest, network: SemanticNetwork, architecture: str, *, name: str
) -> ModelSpec:
    shipped = Bundle.open(request.model).spec if request.model in SHIPPED else None
    classes = class_list(network.num_classes)
    if shipped is not None:
        classes = ClassList(shipped.name, shipped.classes, shipped.colours, shipped.ignore)
    if request.classes is not None:
        if len(request.classes) != network.num_classes:
            raise RequestError(
                f"the checkpoint has {network.num_classes} classes, "
                f"and {len(request.classes)} names came"
            )
        classes = ClassList("given", request.classes, classes.colours, classes.ignore)
    if request.size is not None:
        height, width = parse_size(request.size, multiple=network.stride)
    elif shipped is not None:
        height, width = shipped.height, shipped.width
    else:
        raise RequestError("the network size is missing; give --size HxW, such as --size 512x1024")
    return ModelSpec(
        name=name,
        architecture=architecture,
        task="semantic",
        height=height,
        width=width,
        classes=classes.names,
        colours=classes.colours,
        ignore=classes.ignore,
        preprocessing=DEFINITIONS[architecture].preprocessing,
        fit=request.fit,
        confidence=request.confidence,
    )


def _dataset(request: ExportRequest) -> Dataset:
    """What to verify on: the user's data, or generated streets."""
    if request.data is not None:
        return open_dataset(request.data, request.split)
    return open_dataset("synthetic:?frames=48", "val")


def _spread(dataset: Dataset, count: int) -> list[Pixels]:
    """At most ``count`` pictures, evenly over the data set, each at most once."""
    count = min(count, len(dataset))
    return [dataset.sample(index * len(dataset) // count).pixels for index in range(count)]


@torch.no_grad()
def _round_to_half(network: nn.Module) -> None:
    """Rounds kernels to fp16 in place, so that PyTorch computes with what the file will hold."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.half().float())


def _accuracy(
    network: SemanticNetwork,
    bundle: Bundle,
    dataset: Dataset,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, object], ...]:
    """mIoU of the graph on the best engine, and of PyTorch, on the whole split."""
    engine = open_engine(bundle, cpu_engine())
    found = evaluate(engine, dataset, progress=progress)
    engine.close()
    confusion = evaluate_network(
        network, dataset, (bundle.spec.height, bundle.spec.width), fit=bundle.spec.fit
    )
    return (
        {"step": "export", **found.to_dict()},
        {
            "step": "PyTorch",
            "data": dataset.title,
            "split": dataset.split,
            "engine": "torch",
            "frames": len(dataset),
            "miou": None if math.isnan(confusion.miou()) else confusion.miou(),
        },
    )


def _report(
    network: SemanticNetwork,
    bundle: Bundle,
    verification: Verification,
    accuracy: tuple[dict[str, object], ...],
    dataset: Dataset,
    shown: Dataset,
) -> Report:
    spec = bundle.spec
    figures = [
        Figure(f"{spec.height}×{spec.width}", "network size", "height × width"),
        Figure(f"{len(bundle.model.content) / 1e6:.1f} MB", "ONNX file"),
        Figure(f"{network.parameter_count() / 1e6:.2f} M", "parameters"),
    ]
    for entry in accuracy[:1]:
        miou = entry["miou"]
        share = f"{miou:.1%}" if isinstance(miou, float) else "no labels"
        figures.insert(0, Figure(share, "mIoU", dataset.title))
    engine = open_engine(bundle, cpu_engine())
    pictures = []
    for pixels in _spread(shown, _SHOWN):
        geometry = Geometry.between(pixels.shape[0], pixels.shape[1], spec)
        class_map = geometry.restore(engine.run(geometry.fit(pixels)).class_map)
        drawn = draw_classes(pixels, class_map, names=spec.classes, colours=spec.colours)
        pictures += [Picture(pixels), Picture(drawn)]
    engine.close()
    rows = tuple(
        (found.engine, found.head, str(found.pixels), str(found.differing), str(found.beyond_ties))
        for found in verification.comparisons
    )
    return Report(
        title=spec.name,
        subtitle=f"{spec.architecture}, {len(spec.classes)} classes",
        sections=(
            Section("", (Figures(tuple(figures)),)),
            Section(
                "The graph against PyTorch",
                (
                    Table(
                        ("engine", "head", "pixels", "differing", "not by a tie"),
                        rows,
                        "llrrr",
                        caption=f"{verification.images} pictures of {verification.data}",
                    ),
                ),
            ),
            Section("How it looks", (Pictures(tuple(pictures)),)),
        ),
    )
