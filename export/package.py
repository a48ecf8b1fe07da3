"""From a checkpoint to a verified bundle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeseg import __version__
from edgeseg.bundle import SHIPPED, Bundle, new_bundle, tool_versions, write_manifest
from edgeseg.classes import ClassList, class_list, named_classes
from edgeseg.dataset import Dataset, open_dataset
from edgeseg.draw import draw_classes
from edgeseg.engine import cpu_engine, open_engine
from edgeseg.errors import RequestError, WeightsError
from edgeseg.evaluate import evaluate, evaluate_instances, match_classes
from edgeseg.export.balance import Balance, balance_classes, balancing_pictures
from edgeseg.export.foreign import (
    InstanceAdapter,
    adapter_named,
    instances_of_module,
    logits_of,
    module_of_factory,
    network_of_module,
)
from edgeseg.export.graphs import instances_of_file, network_of_file
from edgeseg.export.models import (
    DEFINITIONS,
    InstanceNetwork,
    SemanticNetwork,
    create,
    definition,
)
from edgeseg.export.onnx import export_network, sha256_of
from edgeseg.export.own import TRANSFORMERS_PREFIX, OwnNetwork, OwnOptions, is_own
from edgeseg.export.own_instance import OwnInstanceNetwork, raw_of
from edgeseg.export.preprocess import evaluate_network
from edgeseg.export.torchengine import TorchEngine
from edgeseg.export.transformers_models import (
    instances_of_transformer,
    logits_of_transformer,
    read_pretrained,
)
from edgeseg.export.verify import InstanceComparison, Verification, verify
from edgeseg.export.views import ViewedNetwork
from edgeseg.export.weights import load_weights, read_weights
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.instance_dataset import InstanceDataset, open_instances
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.report import Figure, Figures, Picture, Pictures, Report, Section, Table
from edgeseg.result import AnyOutputs
from edgeseg.spec import Fit, ModelSpec, parse_size

__all__ = ["ExportRequest", "Exported", "export_bundle"]

AnyDataset = Dataset | InstanceDataset

#: pictures that ``verify`` looks at
_VERIFIED = 12
_SHOWN = 4
#: instances that a model gives at most
_CAPACITY = 100
# Weaker instances are left out of the pictures.
_SHOWN_SCORE = 0.15
# What has an influence on the file.
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "transformers")


@dataclass(frozen=True)
class ExportRequest:
    """What ``edgeseg export`` was asked for; None where a default applies.

    ``model``: a name that EdgeSeg knows, or one's own: ``package.module:factory``, an ONNX file, or
    ``hf:FOLDER``; ``own`` says what such a model cannot say of itself. ``views``:
    sizes at which the graph looks at each picture, see `edgeseg.export.views`; none for its own.
    ``balance``: labelled pictures, split train, on which the classes' biases are set, see
    `edgeseg.export.balance`.
    """

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
    views: tuple[float, ...] = ()
    balance: tuple[str, ...] = ()
    own: OwnOptions = field(default_factory=OwnOptions)


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
    pictures: AnyDataset | None = None,
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
    balance = _balanced(network, request, spec, progress) if request.balance else None
    if request.views:
        network = _viewed(network, request.views, spec)
    if request.half_weights:
        _round_to_half(network)
    dataset = _dataset(request, spec)
    checkpoint = sha256_of(weights_path) if weights_path is not None else ""
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
                    "checkpoint": weights_path
                    and {"file": weights_path.name, "sha256": checkpoint},
                    "weights_stored_as": "fp16" if request.half_weights else "fp32",
                    **({"views": list(request.views)} if request.views else {}),
                    **({"balance": balance.to_dict()} if balance is not None else {}),
                    "tools": tool_versions(_TOOLS),
                    **(provenance or {}),
                },
                "verification": verification.to_dict(),
                "accuracy": list(accuracy),
            },
        )
    return Exported(target, verification, accuracy)


def _balanced(
    network: SemanticNetwork | InstanceNetwork,
    request: ExportRequest,
    spec: ModelSpec,
    progress: Callable[[int, int], None] | None,
) -> Balance:
    """Sets the biases of the classes of ``network``."""
    datasets = balancing_pictures(request.model, request.balance, spec)
    # They refuse all others.
    assert not isinstance(network, InstanceNetwork)
    return balance_classes(
        network, datasets, (spec.height, spec.width), fit=spec.fit, progress=progress
    )


def _network(
    request: ExportRequest,
) -> tuple[SemanticNetwork | InstanceNetwork, str, Path | None]:
    """The network with its weights, its architecture, and the file they came from, if any."""
    if is_own(request.model):
        is_instance = request.own.task == "instance"
        return own_instances(request) if is_instance else own_network(request)
    if request.own != OwnOptions():
        raise RequestError(
            f"{request.model} has its own normalisation and outputs; mean, std, channel order, "
            "scale, corners, adapter, output name, least score and overlap are for models of your "
            "own"
        )
    return read_network(request.model, request.weights)


def read_network(
    model: str, weights: str | None, *, auxiliary_heads: bool = False
) -> tuple[SemanticNetwork | InstanceNetwork, str, Path]:
    """The network called ``model`` with its weights, its architecture, and where they came from.

    ``model``: an architecture, with ``weights`` as ``read_weights`` takes them, or a model that
    ships with EdgeSeg, without. ``auxiliary_heads``: also the heads that only training uses, if the
    checkpoint has them. RequestError for other combinations, WeightsError for the checkpoint.
    """
    if model in SHIPPED:
        if weights is not None:
            raise RequestError(
                f"{model} comes with its weights, and {weights} came too; to "
                "export a checkpoint of your own, name its architecture: "
                f"{', '.join(DEFINITIONS)}"
            )
        shipped = Bundle.open(model)
        architecture, weights = shipped.spec.architecture, str(shipped.model_path)
    else:
        architecture = definition(model).name
        if weights is None:
            raise RequestError(
                f"{architecture} has no weights of its own; give a checkpoint with --weights "
                f"(published ones: {DEFINITIONS[architecture].checkpoints}), or export streets"
            )
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
    num_classes = DEFINITIONS[architecture].network.classes_in(state)
    network = create(architecture, num_classes, auxiliary_heads=auxiliary_heads)
    if auxiliary_heads:
        found = network.current_names(state)
        if any(name not in found for name, _ in network.named_parameters()):
            network = create(architecture, num_classes)
    load_weights(network, state)
    assert isinstance(network, SemanticNetwork | InstanceNetwork)
    path = Path(weights)
    if not path.is_file():
        path = Bundle.open(path).model_path
    return network, architecture, path


def own_network(request: ExportRequest) -> tuple[OwnNetwork, str, Path | None]:
    """``_network`` for a model that is not EdgeSeg's."""
    model, options = request.model, request.own
    is_file, is_folder = model.endswith(".onnx"), model.startswith(TRANSFORMERS_PREFIX)
    _check_suited(request)
    size = parse_size(request.size) if request.size is not None else None
    if is_file:
        return (
            network_of_file(
                model,
                size,
                classes=request.classes,
                preprocessing=options.preprocessing(),
                align_corners=options.align_corners,
                output_name=options.output_name,
            ),
            Path(model).stem,
            Path(model),
        )
    classes, preprocessing = request.classes, options.preprocessing
    adapter = adapter_named(options.adapter) if options.adapter is not None else None
    if is_folder:
        found = read_pretrained(model.removeprefix(TRANSFORMERS_PREFIX))
        module, architecture, path = found.module, found.architecture, found.weights
        if request.confidence and not found.gives_logits:
            raise RequestError(
                f"a confidence is made of logits, and {architecture} gives sums over its queries; "
                "leave --confidence out"
            )
        network = network_of_module(
            module,
            _needed(size or found.size),
            name=architecture,
            classes=classes or found.classes,
            preprocessing=preprocessing(found.preprocessing),
            align_corners=options.align_corners,
            adapter=adapter or logits_of_transformer,
            half_weights=request.half_weights,
        )
        return network, architecture, path
    wanted = _needed(size)
    network = network_of_module(
        module_of_factory(model, classes=classes, weights=request.weights),
        wanted,
        name=model,
        classes=classes,
        preprocessing=preprocessing(),
        align_corners=options.align_corners,
        adapter=adapter or logits_of,
        half_weights=request.half_weights,
    )
    return network, model, _weights_file(request)


def own_instances(request: ExportRequest) -> tuple[OwnInstanceNetwork, str, Path | None]:
    """``_network`` for an instance model that is not EdgeSeg's."""
    model, options = request.model, request.own
    _check_suited(request)
    size = parse_size(request.size) if request.size is not None else None
    if model.endswith(".onnx"):
        network = instances_of_file(
            model,
            size,
            classes=request.classes,
            preprocessing=options.preprocessing(),
            least_score=options.least_score,
            overlap=options.overlap,
        )
        return network, Path(model).stem, Path(model)
    classes, preprocessing = request.classes, options.preprocessing()
    adapter: InstanceAdapter = raw_of
    path: Path | None
    if model.startswith(TRANSFORMERS_PREFIX):
        found = read_pretrained(model.removeprefix(TRANSFORMERS_PREFIX))
        module, name, path = found.module, found.architecture, found.weights
        classes, wanted = classes or found.classes, _needed(size or found.size)
        preprocessing = options.preprocessing(found.preprocessing)
        adapter = instances_of_transformer
    else:
        wanted = _needed(size)
        module = module_of_factory(model, classes=classes, weights=request.weights)
        name, path = model, _weights_file(request)
    if options.adapter is not None:
        adapter = adapter_named(options.adapter)
    network = instances_of_module(
        module,
        wanted,
        name=name,
        classes=classes,
        preprocessing=preprocessing,
        adapter=adapter,
        half_weights=request.half_weights,
        least_score=options.least_score,
        overlap=options.overlap,
    )
    return network, name, path


def _weights_file(request: ExportRequest) -> Path | None:
    """The file that the weights of a factory's module came from."""
    if request.weights is None:
        return None
    weights = Path(request.weights)
    return weights if weights.is_file() else Bundle.open(weights).model_path


def _check_suited(request: ExportRequest) -> None:
    """RequestError for options that say nothing about the user's model."""
    model, options = request.model, request.own
    is_file, is_folder = model.endswith(".onnx"), model.startswith(TRANSFORMERS_PREFIX)
    finds_objects = options.task == "instance"
    kind = "an ONNX file" if is_file else "a folder of transformers" if is_folder else model
    task = f"a model for the task {options.task}"
    unsuited = (
        ("--weights", request.weights is not None and (is_file or is_folder), kind),
        ("--half-weights", request.half_weights and is_file, kind),
        ("--adapter", options.adapter is not None and is_file, kind),
        ("--output-name", options.output_name is not None and not is_file, kind),
        ("--output-name", options.output_name is not None and finds_objects, task),
        ("--align-corners", options.align_corners and finds_objects, task),
        ("--confidence", request.confidence and finds_objects, task),
        ("--least-score", options.least_score is not None and not finds_objects, task),
        ("--overlap", options.overlap is not None and not finds_objects, task),
    )
    for option, came, what in unsuited:
        if came:
            raise RequestError(f"{option} does not go with {what}; leave it out")


def _viewed(
    network: SemanticNetwork | InstanceNetwork, views: tuple[float, ...], spec: ModelSpec
) -> ViewedNetwork:
    """``network`` that looks at each picture several times."""
    if not isinstance(network, SemanticNetwork) or isinstance(network, OwnNetwork):
        raise RequestError(
            f"views are averaged for the semantic models that EdgeSeg knows, and "
            f"{spec.architecture} came; leave --views out"
        )
    return ViewedNetwork(network, views, (spec.height, spec.width))


def _needed(size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise RequestError("the network size is missing; give --size HxW, such as --size 512x1024")
    return size


def _spec(
    request: ExportRequest,
    network: SemanticNetwork | InstanceNetwork,
    architecture: str,
    *,
    name: str,
) -> ModelSpec:
    shipped = Bundle.open(request.model).spec if request.model in SHIPPED else None
    classes = class_list(network.named_classes)
    if isinstance(network, OwnNetwork | OwnInstanceNetwork):
        preprocessing = network.preprocessing
        if network.classes is not None:
            classes = ClassList("own", network.classes, classes.colours, classes.ignore)
        if isinstance(network, OwnNetwork) and request.confidence and network.tail.probabilities:
            raise RequestError(
                "a confidence is made of logits, and this model gives probabilities below network "
                "size; leave --confidence out, or export what stands before its softmax or sigmoid"
            )
    else:
        preprocessing = DEFINITIONS[architecture].preprocessing
    if shipped is not None:
        classes = ClassList(shipped.name, shipped.classes, shipped.colours, shipped.ignore)
    if request.classes is not None:
        if len(request.classes) != network.named_classes:
            background = " without the background" if isinstance(network, InstanceNetwork) else ""
            raise RequestError(
                f"the checkpoint has {network.named_classes} classes{background}, "
                f"and {len(request.classes)} names came"
            )
        classes = named_classes(request.classes)
    if isinstance(network, OwnNetwork | OwnInstanceNetwork):
        height, width = network.size
    elif request.size is not None:
        height, width = parse_size(request.size, multiple=network.stride)
    elif shipped is not None:
        height, width = shipped.height, shipped.width
    elif (published := DEFINITIONS[architecture].size) is not None:
        height, width = parse_size(published)
    else:
        raise RequestError("the network size is missing; give --size HxW, such as --size 512x1024")
    capacity = mask_height = mask_width = 0
    if isinstance(network, InstanceNetwork):
        capacity = _CAPACITY
        mask_height, mask_width = network.mask_size(height, width)
    return ModelSpec(
        name=name,
        architecture=architecture,
        task="instance" if isinstance(network, InstanceNetwork) else "semantic",
        height=height,
        width=width,
        classes=classes.names,
        colours=classes.colours,
        ignore=classes.ignore,
        preprocessing=preprocessing,
        fit=request.fit,
        confidence=request.confidence,
        capacity=capacity,
        mask_height=mask_height,
        mask_width=mask_width,
        mask_extent=network.mask_extent if isinstance(network, InstanceNetwork) else "image",
    )


def _dataset(request: ExportRequest, spec: ModelSpec) -> AnyDataset:
    """What to verify on: the user's data, or generated streets."""
    if request.data is None:
        return open_dataset("synthetic:?frames=48", "val")
    if spec.task == "instance":
        objects = open_instances(request.data, request.split)
        match_classes(spec.classes, objects.classes, objects.title)
        return objects
    dataset = open_dataset(request.data, request.split)
    if dataset.classes.names != spec.classes:
        raise RequestError(
            f"{request.data} has the classes {', '.join(dataset.classes.names)}, and the model "
            f"has {', '.join(spec.classes)}; leave --data out, or give --classes"
        )
    return dataset


def _spread(dataset: AnyDataset, count: int) -> list[Pixels]:
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
    network: SemanticNetwork | InstanceNetwork,
    bundle: Bundle,
    dataset: AnyDataset,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, object], ...]:
    """mIoU or AP of the graph on the best engine, and of PyTorch, on the whole split."""
    engine = open_engine(bundle, cpu_engine())
    if isinstance(network, InstanceNetwork):
        assert isinstance(dataset, InstanceDataset)
        objects = evaluate_instances(engine, dataset, progress=progress)
        engine.close()
        eager = evaluate_instances(TorchEngine(network, bundle.spec), dataset, progress=progress)
        return {"step": "export", **objects.to_dict()}, {"step": "PyTorch", **eager.to_dict()}
    assert isinstance(dataset, Dataset)
    found = evaluate(engine, dataset, progress=progress)
    engine.close()
    confusion = evaluate_network(
        network, dataset, (bundle.spec.height, bundle.spec.width), fit=bundle.spec.fit
    )
    return (
        {"step": "export", **found.to_dict()},
        {
            "step": network.reference if isinstance(network, OwnNetwork) else "PyTorch",
            "data": dataset.title,
            "split": dataset.split,
            "engine": "torch",
            "frames": len(dataset),
            "miou": None if math.isnan(confusion.miou()) else confusion.miou(),
        },
    )


def _report(
    network: SemanticNetwork | InstanceNetwork,
    bundle: Bundle,
    verification: Verification,
    accuracy: tuple[dict[str, object], ...],
    dataset: AnyDataset,
    shown: AnyDataset,
) -> Report:
    spec = bundle.spec
    figures = [
        Figure(f"{spec.height}×{spec.width}", "network size", "height × width"),
        Figure(f"{len(bundle.model.content) / 1e6:.1f} MB", "ONNX file"),
        Figure(f"{network.parameter_count() / 1e6:.2f} M", "parameters"),
    ]
    for entry in accuracy[:1]:
        if spec.task == "instance":
            title = "box AP" if entry["mask_ap"] is None else "mask AP"
            value = entry["mask_ap"] if title == "mask AP" else entry["box_ap"]
        else:
            title, value = "mIoU", entry["miou"]
        share = f"{value:.1%}" if isinstance(value, float) else "no labels"
        figures.insert(0, Figure(share, title, dataset.title))
    engine = open_engine(bundle, cpu_engine())
    pictures = []
    for pixels in _spread(shown, _SHOWN):
        geometry = Geometry.between(pixels.shape[0], pixels.shape[1], spec)
        outputs = engine.run(geometry.fit(pixels))
        pictures += [Picture(pixels), Picture(_drawn(pixels, outputs, geometry, spec))]
    engine.close()
    return Report(
        title=spec.name,
        subtitle=f"{spec.architecture}, {len(spec.classes)} classes",
        sections=(
            Section("", (Figures(tuple(figures)),)),
            Section(
                f"The graph against {verification.reference}",
                (_table(verification),),
            ),
            Section("How it looks", (Pictures(tuple(pictures)),)),
        ),
    )


def _drawn(pixels: Pixels, outputs: AnyOutputs, geometry: Geometry, spec: ModelSpec) -> Pixels:
    """``pixels`` with what was found in them."""
    if isinstance(outputs, InstanceOutputs):
        count = int((outputs.scores >= _SHOWN_SCORE).sum())
        best = InstanceOutputs(
            boxes=outputs.boxes[:count],
            scores=outputs.scores[:count],
            labels=outputs.labels[:count],
            masks=outputs.masks[:count],
        )
        return InstanceResult.from_outputs(best, Frame.of(pixels), geometry, spec).draw()
    class_map = geometry.restore(outputs.class_map)
    return draw_classes(pixels, class_map, names=spec.classes, colours=spec.colours)


def _table(verification: Verification) -> Table:
    """One row for each engine and head."""
    rows: list[tuple[str, ...]] = []
    columns: tuple[str, ...] = ("pixels", "differing", "not by a tie")
    for found in verification.comparisons:
        numbers: tuple[str, ...]
        if isinstance(found, InstanceComparison):
            columns = ("instances", "found", "the same", "of their mask samples differ")
            share = found.other_samples / max(found.samples, 1)
            numbers = (str(found.expected), str(found.found), str(found.matched), f"{share:.4%}")
        else:
            numbers = (str(found.pixels), str(found.differing), str(found.beyond_ties))
        rows.append((found.engine, found.head, *numbers))
    return Table(
        ("engine", "head", *columns),
        tuple(rows),
        "ll" + "r" * len(columns),
        caption=f"{verification.images} pictures of {verification.data}",
    )
