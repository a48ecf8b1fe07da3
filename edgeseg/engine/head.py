"""The head outside the graph: upsampling and argmax, or the masks, in the compiled kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.errors import BundleError, EngineError, FrameError
from edgeseg.frame import Pixels
from edgeseg.instances import InstanceOutputs
from edgeseg.onnxfile import Head, MaskHead, OnnxFile
from edgeseg.result import AnyOutputs, Outputs
from edgeseg.spec import ModelSpec

__all__ = [
    "AnyHead",
    "checked_input",
    "opened_graph",
    "run_head",
    "taken_instances",
    "taken_outputs",
    "wants_compiled_head",
]

AnyHead = Head | MaskHead


def wants_compiled_head(asked: bool | None) -> bool:
    """Whether to cut the graph before its head: ``asked``, or None for "if the kernel is there".

    KernelError when it is asked for and is not there.
    """
    if asked is None:
        return kernels.available()
    if asked:
        kernels.load()
    return asked


def opened_graph(
    model: OnnxFile, spec: ModelSpec, *, compiled_head: bool
) -> tuple[bytes, AnyHead | None]:
    """The graph that a library on the CPU has to run, and the head that was cut off it.

    The head stays in the graph, as its function's body, where ``compiled_head`` is False, and where
    an instance model makes its masks in the network itself. BundleError for a head of another size
    than the spec's: what it gives is as large as it says.
    """
    if compiled_head and spec.task == "semantic":
        content, head = model.without_head()
        _check_size(model, spec, head.height, head.width)
        return content, head
    if compiled_head and model.has_mask_head():
        content, mask_head = model.without_mask_head()
        _check_size(model, spec, mask_head.network_height, mask_head.network_width)
        return content, mask_head
    # ONNX Runtime would run the function body as it is; both libraries get the same inlined form
    # so that one test covers both.
    return model.inlined(), None


def _check_size(model: OnnxFile, spec: ModelSpec, height: int, width: int) -> None:
    if (height, width) != (spec.height, spec.width):
        raise BundleError(
            f"{model.name} promises masks of {spec.height}x{spec.width} and its head makes "
            f"{height}x{width}; export it again"
        )


def taken_outputs(
    found: Mapping[str, NDArray[Any]],
    head: AnyHead | None,
    spec: ModelSpec,
    *,
    threads: int,
    network_ns: int,
) -> AnyOutputs:
    """What the graph gave, by name, and the work of the head on it, as the task's outputs.

    The arrays of ``found`` are the library's, and nothing of them is kept. EngineError when they
    are not what the spec promises.
    """
    if isinstance(head, MaskHead):
        started_ns = time.perf_counter_ns()
        rows = _instances(found, spec)
        masks = kernels.assemble_masks(
            found[head.prototypes],
            np.ascontiguousarray(found[head.coefficients][0, : len(rows.scores)]),
            np.ascontiguousarray(found[head.boxes][0, : len(rows.scores)]),
            (head.network_height, head.network_width),
            threads=threads,
        )
        head_ns = time.perf_counter_ns() - started_ns
        return replace(rows, masks=masks, network_ns=network_ns, head_ns=head_ns)
    if spec.task == "instance":
        return taken_instances(found, spec, network_ns=network_ns)
    if head is None:
        planes = [np.array(found[name][0]) for name in ("class_map", "confidence") if name in found]
        return Outputs(planes[0], planes[1] if len(planes) > 1 else None, network_ns)
    started_ns = time.perf_counter_ns()
    class_map, confidence = run_head(head, found[head.logits], threads)
    return Outputs(class_map, confidence, network_ns, time.perf_counter_ns() - started_ns)


def taken_instances(
    found: Mapping[str, NDArray[Any]], spec: ModelSpec, *, network_ns: int = 0, fit_ns: int = 0
) -> InstanceOutputs:
    """The instances that a graph with its head gave, by name; the arrays are copies.

    EngineError when they are not what the spec promises.
    """
    rows = _instances(found, spec)
    masks = found["masks"][0, : len(rows.scores)].copy()
    return replace(rows, masks=masks, network_ns=network_ns, fit_ns=fit_ns)


def _instances(found: Mapping[str, NDArray[Any]], spec: ModelSpec) -> InstanceOutputs:
    """The first ``count`` rows, masks left out."""
    count = int(found["count"][0])
    if not 0 <= count <= spec.capacity:
        raise EngineError(
            f"{spec.name} promises at most {spec.capacity} instances, and the graph gave {count}; "
            "export the model again"
        )
    labels = found["labels"][0, :count].astype(np.int32)
    if count and not (labels.min() >= 0 and labels.max() < len(spec.classes)):
        raise EngineError(
            f"{spec.name} has {len(spec.classes)} classes, and the graph gave labels from "
            f"{labels.min()} to {labels.max()}; export the model again"
        )
    return InstanceOutputs(
        boxes=np.array(found["boxes"][0, :count], np.float32),
        scores=np.array(found["scores"][0, :count], np.float32),
        labels=labels,
        masks=np.empty((count, spec.mask_height, spec.mask_width), np.uint8),
    )


def run_head(
    head: Head, logits: NDArray[np.float32], threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Class map and, if promised, confidence, (height, width) uint8 each, of low-resolution logits.

    ``logits``: (1, classes, h, w) float32.
    """
    size = (head.height, head.width)
    if head.confidence:
        return kernels.upsample_argmax_confidence(
            logits, size, align_corners=head.align_corners, threads=threads
        )
    class_map = kernels.upsample_argmax(
        logits, size, align_corners=head.align_corners, threads=threads
    )
    return class_map, None


def checked_input(pixels: Pixels, spec: ModelSpec) -> Pixels:
    """``pixels`` as (1, height, width, 3); FrameError unless it is of network size and uint8."""
    wanted = (spec.height, spec.width, 3)
    if pixels.shape != wanted or pixels.dtype != np.uint8:
        raise FrameError(
            f"{spec.name} takes {wanted} uint8, and {pixels.shape} {pixels.dtype} came; "
            "Geometry.fit brings a frame to that size"
        )
    return np.ascontiguousarray(pixels)[None]
