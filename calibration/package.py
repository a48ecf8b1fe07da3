"""From a bundle and calibration frames to an INT8 bundle: calibrated, proven, with a report."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from onnx import helper

from edgeseg import __version__
from edgeseg.bundle import (
    GOLDEN_KEY,
    SPEC_KEY,
    Bundle,
    check_new_bundle,
    new_bundle,
    tool_versions,
    write_manifest,
)
from edgeseg.calibration.accuracy import (
    AnyDataset,
    AnyEvaluation,
    figure,
    labelled,
    title,
)
from edgeseg.calibration.agreement import Agreement, agreement_of
from edgeseg.calibration.calibrate import Calibrated, Pictures, Stage, calibrate, silent
from edgeseg.calibration.frames import (
    CalibrationFrames,
    check_overlap,
    open_frames,
    overlap_error,
)
from edgeseg.calibration.graph import (
    WEIGHTED,
    Graph,
    is_standard,
    prepared,
    share_constants,
)
from edgeseg.calibration.half import Half, to_half
from edgeseg.calibration.lint import Placement as Linted
from edgeseg.calibration.lint import lint
from edgeseg.calibration.recipe import Finetuning, QuantizationRecipe
from edgeseg.calibration.report import QuantizationReport, layer_reports
from edgeseg.calibration.sensitivity import (
    Laboratory,
    Search,
    Trials,
    damages,
    search,
)
from edgeseg.dataset import Sample
from edgeseg.engine import cpu_engine, cpu_engines, open_engine
from edgeseg.engine.onnxruntime import recorded_golden
from edgeseg.errors import CalibrationError, EdgeSegError, RequestError
from edgeseg.frame import Pixels
from edgeseg.golden import INT8_AGREEMENT, INT8_INSTANCE_AGREEMENT
from edgeseg.result import AnyOutputs

__all__ = ["QuantizeRequest", "Quantized", "Trainer", "layer_names", "quantize_bundle"]

# Pictures on which damage is measured, and on which INT8 and fp32 are compared.
_JUDGED = 16
# Pictures that are run to find what overflows fp16: its largest values are common ones.
_HALF_FRAMES = 24
# What has an influence on the file.
_TOOLS = ("numpy", "onnx", "onnxruntime", "openvino", "opencv-python")


class Trainer(Protocol):
    """Fine-tunes a calibrated model; `edgeseg.export.finetune` has it, since it needs torch."""

    def __call__(
        self,
        calibrated: Calibrated,
        frames: Sequence[Pixels],
        settings: Finetuning,
        *,
        floats: Sequence[str],
        work: Path,
        stage: Stage,
    ) -> Calibrated: ...


@dataclass(frozen=True)
class QuantizeRequest:
    """What to quantize, with what, and how good it has to be.

    ``bundle``: any that is not quantized. ``calibration``: URIs of frames (see ``open_frames``).
    ``data`` and ``split``: labelled pictures to measure on; needed for ``max_drop``, the points
    (0 to 100) of mIoU, or of AP for an instance model, that may be lost. ``allow_overlap``: go on,
    and record it, when calibration frames are also evaluation pictures. ``name``: None for that of
    the target. ``sensitivity``: measure the damage of each layer even if the budget does not need
    it.
    """

    bundle: str
    calibration: tuple[str, ...]
    recipe: QuantizationRecipe = field(default_factory=QuantizationRecipe)
    data: str | None = None
    split: str = "val"
    max_drop: float | None = None
    allow_overlap: bool = False
    name: str | None = None
    engine: str | None = None
    threads: int = 0
    sensitivity: bool = False

    def __post_init__(self) -> None:
        if not self.calibration:
            raise RequestError(
                "quantization needs frames like those the model will see; name a folder, a list "
                "or a video with --calibration"
            )
        if self.max_drop is not None and self.data is None:
            raise RequestError(
                "a budget is proven on labelled pictures; name them with --data, as in "
                "--data camvid:DIR or coco:DIR, or leave --max-drop out"
            )
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise RequestError(
                f"--max-drop is in points of mIoU or AP, 0 to 100, and {self.max_drop:g} came"
            )


@dataclass(frozen=True)
class Quantized:
    """The finished bundle. ``floats``: layers left in floating point, of ``layers``. ``agreement``:
    share, 0 to 1, of the pixels with the class of the fp32 model, on calibration frames, or of the
    instances that both find (see `agreement_of`), NaN where there are none. ``heads``: for an
    instance model the error of each raw head (see `Heads.errors`), else empty. ``accuracy``: (fp32,
    INT8) on the labelled data, or None. ``notes``: what the frames gave cause to say."""

    path: Path
    layers: int
    floats: tuple[str, ...]
    agreement: float
    heads: Mapping[str, float]
    accuracy: tuple[AnyEvaluation, AnyEvaluation] | None
    placement: Linted
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "bundle": str(self.path),
            "layers": self.layers,
            "floats": list(self.floats),
            "agreement": _plain(self.agreement),
            "heads": dict(self.heads),
            "accuracy": None
            if self.accuracy is None
            else {
                name: found.to_dict()
                for name, found in zip(("fp32", "int8"), self.accuracy, strict=True)
            },
            "placement": self.placement.to_dict(),
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """Plain text for a terminal."""
        done = self.layers - len(self.floats)
        lines = [*self.notes, f"{done} of {self.layers} layers with weights in INT8"]
        if 0 < len(self.floats) < self.layers:
            lines.append(f"in floating point: {', '.join(self.floats)}")
        if not self.heads:
            lines.append(f"{self.agreement:.2%} of pixels have the class that fp32 gives them")
        elif not math.isnan(self.agreement):
            lines.append(
                f"{self.agreement:.2%} of the instances are found by both, before and after"
            )
        if self.heads:
            worst = max(self.heads, key=lambda name: self.heads[name])
            lines.append(f"the raw heads are off by {self.heads[worst]:.2%} at most ({worst})")
        if self.accuracy is not None:
            fp32, int8 = (figure(found) * 100 for found in self.accuracy)
            first = self.accuracy[0]
            lines.append(
                f"{title(first)} on {first.data} {first.split}, {first.frames} pictures: "
                f"{int8:.2f} % (fp32 {fp32:.2f} %, {int8 - fp32:+.2f} points)"
            )
        lines.append(
            f"TensorRT would reformat {self.placement.reformats} tensors, "
            f"{self.placement.avoidable} of them avoidably"
        )
        return "\n".join(lines)


def layer_names(bundle: Bundle) -> tuple[str, ...]:
    """The layers of ``bundle`` that have weights, and could become INT8, in order.

    CalibrationError when it is quantized already.
    """
    model = onnx.load_model_from_string(bundle.model.content)
    return tuple(layer.name for layer in prepared(model).layers())


def quantize_bundle(
    request: QuantizeRequest,
    target: str | Path,
    *,
    trainer: Trainer | None = None,
    shown: AnyDataset | None = None,
    stage: Stage = silent,
) -> Quantized:
    """Writes the INT8 bundle to ``target``, whole or not at all; the original is only read.

    ``shown``: pictures for the report, for whoever may not pass on those of ``data`` and of the
    calibration; it shows these by default.

    Measurements and training are kept beside the target while it is being made, in
    ``.NAME.quantize``, and a second call with the same request goes on from there. The same request
    gives the same bytes, as long as no budget makes the clock decide which layers stay in floating
    point; those it chose are in ``bundle.json`` and can be asked for with the recipe's ``floats``.

    RequestError and CalibrationError come before any long work where that can be; see
    `open_frames`, `calibrate` and `search` for theirs.
    """
    target = Path(target)
    request = replace(request, engine=request.engine or cpu_engine())
    bundle = Bundle.open(request.bundle)
    model = _checked_model(request, bundle)
    _check_target(target, bundle)
    recipe = request.recipe
    if recipe.finetune is not None and trainer is None:
        raise RequestError(
            "the recipe asks for fine-tuning, which needs PyTorch; "
            "pip install 'edgeseg[export]' adds it, or leave [finetune] out"
        )
    if recipe.finetune is not None and bundle.spec.task != "semantic":
        raise RequestError(
            "fine-tuning learns the classes of pixels, and "
            f"{request.bundle} finds instances; leave --finetune (or [finetune]) out"
        )
    # An engine that is not here, or a bundle that it cannot run, is found now.
    open_engine(bundle, request.engine, threads=request.threads).close()
    dataset = None
    if request.data is not None:
        dataset = labelled(request.data, request.split, bundle.spec)
    sets = [open_frames(uri, bundle.spec, count=recipe.frames) for uri in request.calibration]
    more: list[CalibrationFrames] = []
    if recipe.finetune is not None:
        count = recipe.finetune.frames
        more = [open_frames(uri, bundle.spec, count=count) for uri in request.calibration]
    overlap = _overlap(request, [*sets, *more], dataset)
    work = target.resolve().parent / f".{target.resolve().name}.quantize"
    _make(work)
    context = _context(request, bundle, [*sets, *more], dataset)
    try:
        calibrated = _calibrated(model, sets, more, recipe, work, context, trainer, stage)
    except EdgeSegError:
        # A refusal that comes before anything was measured leaves nothing behind.
        with suppress(OSError):
            work.rmdir()
        raise

    judged = _spread(Pictures(sets), _JUDGED)
    varied = _spread(Pictures(sets), _HALF_FRAMES) if recipe.half else []
    # The graph that was made last: in the end, the one that is written.
    halves: list[Half] = []

    def finish(made: onnx.ModelProto) -> onnx.ModelProto:
        if recipe.half:
            halves[:] = [to_half(made, varied)]
            made = halves[0].model
        share_constants(made)
        return made

    laboratory = Laboratory(
        bundle,
        calibrated,
        judged,
        Trials(work / "trials.json", context),
        engine=request.engine,
        threads=request.threads,
        finish=finish,
    )
    found = _searched(request, laboratory, dataset, stage)
    measured = found.damages
    if not measured and request.sensitivity:
        measured = damages(laboratory, stage=stage)

    accuracy = None
    if dataset is not None:
        accuracy = (
            laboratory.evaluation(laboratory.layers, dataset, stage),
            laboratory.evaluation(found.floats, dataset, stage),
        )
    instances = bundle.spec.task == "instance"
    agreement = laboratory.agreement(found.floats)
    heads = laboratory.head_errors(found.floats) if instances else {}
    closeness = {"agreement": _plain(agreement), **({"heads": heads} if instances else {})}
    made = laboratory.model(found.floats)
    spec = replace(bundle.spec, name=request.name or target.resolve().name)
    promised = INT8_INSTANCE_AGREEMENT if instances else INT8_AGREEMENT
    golden = recorded_golden(made.SerializeToString(), spec, promised)
    properties = {SPEC_KEY: spec.to_json(), GOLDEN_KEY: golden.to_json()}
    del made.metadata_props[:]
    helper.set_model_props(made, properties)
    onnx.checker.check_model(made, full_check=True)
    placement = lint(made)
    notes = tuple(note for frames in sets for note in frames.notes)
    notes += _left_out(calibrated.graph)
    if overlap:
        are = "frame is also an" if len(overlap) == 1 else "frames are also"
        pictures = "picture" if len(overlap) == 1 else "pictures"
        notes += (
            f"{len(overlap)} calibration {are} evaluation {pictures}, which flatters; "
            "recorded, as --allow-overlap says",
        )
    with new_bundle(target) as folder:
        (folder / "model.onnx").write_bytes(made.SerializeToString(deterministic=True))
        quantized = Bundle.open(folder / "model.onnx")
        verification = _verified(quantized, judged)
        layers = layer_reports(calibrated, found.floats, measured, halves, fixed=recipe.floats)
        manifest = _manifest(
            request, bundle, sets, more, overlap, calibrated, found, accuracy, closeness, placement
        )
        QuantizationReport(
            bundle=bundle,
            quantized=quantized,
            search=found,
            layers=layers,
            accuracy=accuracy,
            agreement=agreement,
            heads=heads,
            placement=placement,
            frames=tuple(sets),
            recipe=recipe,
            notes=notes,
            pictures=tuple(judged),
            engine=request.engine,
            threads=request.threads,
            dataset=shown or dataset,
        ).write(folder / "report.html")
        write_manifest(
            folder,
            {"name": spec.name, "edgeseg": __version__, "verification": verification, **manifest},
        )
    shutil.rmtree(work, ignore_errors=True)
    return Quantized(
        target, len(laboratory.layers), found.floats, agreement, heads, accuracy, placement, notes
    )


def _searched(
    request: QuantizeRequest, laboratory: Laboratory, dataset: AnyDataset | None, stage: Stage
) -> Search:
    fixed = request.recipe.floats
    if dataset is None or request.max_drop is None:
        floats = tuple(name for name in laboratory.layers if name in fixed)
        return Search(floats, float("nan"), float("nan"), (), ())
    return search(laboratory, dataset, request.max_drop, fixed=fixed, stage=stage)


def _calibrated(
    model: onnx.ModelProto,
    sets: Sequence[CalibrationFrames],
    more: Sequence[CalibrationFrames],
    recipe: QuantizationRecipe,
    work: Path,
    context: str,
    trainer: Trainer | None,
    stage: Stage,
) -> Calibrated:
    calibrated = Calibrated.load(work / "calibrated", context)
    if calibrated is None:
        calibrated = calibrate(model, Pictures(sets), recipe, stage=stage)
        calibrated.save(work / "calibrated", context)
    if recipe.finetune is None or trainer is None:
        return calibrated
    trained = Calibrated.load(work / "trained", context)
    if trained is None:
        trained = trainer(
            calibrated,
            list(Pictures(more)),
            recipe.finetune,
            floats=recipe.floats,
            work=work,
            stage=stage,
        )
        trained.save(work / "trained", context)
    return trained


def _checked_model(request: QuantizeRequest, bundle: Bundle) -> onnx.ModelProto:
    if bundle.model.is_quantized():
        raise CalibrationError(
            f"{request.bundle} is quantized already; give the floating-point bundle it came from"
        )
    return onnx.load_model_from_string(bundle.model.content)


def _check_target(target: Path, bundle: Bundle) -> None:
    """Refuses ``target`` before any work if no bundle can be put there, or it is the original."""
    # A lone file's folder may be a bundle, too.
    if target.resolve() in bundle.model_path.resolve().parents:
        raise RequestError(
            f"{target} is the bundle that is to be quantized; give the INT8 one another name"
        )
    check_new_bundle(target)


def _left_out(graph: Graph) -> tuple[str, ...]:
    """What has weights, or could have, and cannot be quantized."""
    layers = {layer.node for layer in graph.layers()}
    names = [
        f"{node.op_type} {node.name}"
        for node in graph.nodes
        if is_standard(node, *WEIGHTED) and node.name not in layers
    ]
    if not names:
        return ()
    are, their = ("is", "its") if len(names) == 1 else ("are", "their")
    return (
        f"in floating point {are} also what cannot be quantized, since {their} weights are no "
        f"constants or {their} form is another than that of a convolution or a plain linear "
        f"layer: {', '.join(names)}",
    )


def _make(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalibrationError(f"{work} cannot be written ({error.strerror})") from error


def _overlap(
    request: QuantizeRequest, sets: Sequence[CalibrationFrames], dataset: AnyDataset | None
) -> tuple[str, ...]:
    if dataset is None:
        return ()
    found = (name for frames in sets for name in check_overlap(frames, dataset))
    # The same frame may be there twice, to calibrate and to train with.
    names = tuple(dict.fromkeys(found))
    if names and not request.allow_overlap:
        raise overlap_error(names, dataset)
    return names


def _context(
    request: QuantizeRequest,
    bundle: Bundle,
    sets: Sequence[CalibrationFrames],
    dataset: AnyDataset | None,
) -> str:
    """What the measurements of a run hold for, as a hash."""
    said = {
        "model": hashlib.sha256(bundle.model.content).hexdigest(),
        "frames": [frames.digest() for frames in sets],
        "recipe": request.recipe.to_dict(),
        "data": None if dataset is None else _digest(dataset),
        "engine": [request.engine, request.threads],
        "tools": _tools(),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(dataset: AnyDataset) -> str:
    """One sha256, in hexadecimal, over all pictures and labels."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        arrays = [sample.pixels]
        if isinstance(sample, Sample):
            arrays.append(sample.labels)
        else:
            digest.update(json.dumps([asdict(entry) for entry in sample.annotations]).encode())
        for values in arrays:
            digest.update(f"{sample.name} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _spread(pictures: Pictures, count: int) -> list[Pixels]:
    """At most ``count`` of ``pictures``, evenly spread."""
    total = len(pictures)
    wanted = {index * total // min(count, total) for index in range(min(count, total))}
    return [pixels for index, pixels in enumerate(pictures) if index in wanted]


def _verified(quantized: Bundle, pictures: Sequence[Pixels]) -> dict[str, object]:
    """How far every engine that is here agrees with the first: see `agreement_of`."""
    found: dict[str, list[AnyOutputs]] = {}
    for name in cpu_engines():
        engine = open_engine(quantized, name)
        found[name] = [engine.run(pixels) for pixels in pictures]
        engine.close()
    first = next(iter(found))
    return {
        "data": "calibration frames",
        "images": len(pictures),
        "compared_with": first,
        "agreement": {
            name: _plain(Agreement.sum(map(agreement_of, found[first], outputs)).share)
            for name, outputs in found.items()
        },
    }


def _plain(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _manifest(
    request: QuantizeRequest,
    bundle: Bundle,
    sets: Sequence[CalibrationFrames],
    more: Sequence[CalibrationFrames],
    overlap: Sequence[str],
    calibrated: Calibrated,
    found: Search,
    accuracy: tuple[AnyEvaluation, AnyEvaluation] | None,
    closeness: Mapping[str, object],
    placement: Linted,
) -> dict[str, object]:
    chosen = calibrated.placement(found.floats)
    scales = calibrated.scales(chosen)
    before = bundle.manifest.get("provenance", {})
    steps = list(bundle.manifest.get("accuracy", []))
    if accuracy is not None:
        steps += [
            # Without the seconds it took: the same input gives the same file.
            {"step": step, **{k: v for k, v in entry.to_dict().items() if k != "seconds"}}
            for step, entry in zip(("fp32", "int8"), accuracy, strict=True)
        ]
    return {
        "provenance": {
            **before,
            "quantized_from": {
                "name": bundle.name,
                "sha256": hashlib.sha256(bundle.model.content).hexdigest(),
            },
            "tools": {**before.get("tools", {}), **_tools()},
        },
        "accuracy": steps,
        "quantization": {
            "recipe": request.recipe.to_dict(),
            "max_drop": request.max_drop,
            "layers": len(calibrated.graph.layers()),
            "floats": list(found.floats),
            **closeness,
            "placement": placement.to_dict(),
            "calibration": [_recorded(frames) for frames in sets],
            "finetuning": [_recorded(frames) for frames in more],
            "overlap": list(overlap),
            "scales": {
                "activations": {
                    tensor: scales.activations[group]
                    for group, tensors in chosen.groups().items()
                    for tensor in tensors
                },
                # float32, little endian, hexadecimal: exact, and a line a layer
                "weights": {
                    name: values.astype("<f4").tobytes().hex()
                    for name, values in scales.weights.items()
                },
            },
        },
    }


def _recorded(frames: CalibrationFrames) -> dict[str, object]:
    return {
        "source": frames.title,
        "frames": len(frames),
        "digest": frames.digest(),
        "sha256": dict(frames.hashes),
        "skipped": list(frames.skipped),
    }


def _tools() -> dict[str, str]:
    return {"edgeseg": __version__, **tool_versions(_TOOLS)}
