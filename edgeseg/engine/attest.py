"""Attestation: what the finished engine really is, beside what the graph asked for.

TensorRT says nothing when a convolution that was quantized runs in half precision, or when a
plugin was left out. Its engine inspector knows, so every plan is looked at once when it is built.

The inspector's JSON differs between releases. Layers have ``Name``, ``LayerType``, ``Inputs``,
``Outputs`` and, for some, ``ParameterType``, ``Weights``, ``Metadata`` (the ONNX nodes that a
layer came from, separated by control characters). A tensor's type is in ``Format/Datatype`` (a
sentence such as "Channel major FP16 format where channel % 8 == 0", or "Half") or in ``Datatype``.
The list of inputs and outputs is called ``Bindings`` up to 10.x and ``I/O Tensors`` from 11.0.
Sources: the example engines of trt-engine-explorer (NVIDIA/TensorRT, up to 10.13), NVIDIA's page
"Migrating IEngineInspector Usage from TensorRT 10.x to 11.x".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeseg.engine.graph import Graph, Precision

__all__ = ["Attestation", "EngineLayer", "Promise", "engine_layers"]

# From narrow to wide: a layer that is wider than promised is slower than it was measured to be.
_WIDTH: dict[str, int] = {"int8": 8, "fp8": 8, "fp16": 16, "bf16": 16, "fp32": 32}
_SHOWN = 3

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# Layers that multiply by weights, by their ParameterType, or by their LayerType where they have
# none: CaskConvolution, CaskDeconvolutionV2, CaskGemmConvolution, gemm, MatrixMultiply, ...
_COMPUTES = re.compile(r"conv|gemm|matrixmultiply|matmul|fullyconnected", re.IGNORECASE)
_TYPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), name)
    for pattern, name in (
        (r"\b(bf16|bfloat16)\b", "bf16"),
        (r"\b(fp16|half|float16)\b", "fp16"),
        (r"\b(fp32|float|float32)\b", "fp32"),
        (r"\bint8\b", "int8"),
        (r"\b(fp8|float8)\b", "fp8"),
    )
)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    ``kind``: the inspector's word for it. ``precision``: that of its weights, or of its first
    input; None where it is not written or neither floating nor int8. ``nodes``: names of the ONNX
    nodes in it. ``role``: "compute" has weights, "reformat" changes only layout or type at
    TensorRT's own wish, "plugin" and "dla" are what they say, "other" the rest.
    """

    name: str
    kind: str
    role: str
    precision: str | None
    nodes: tuple[str, ...]
    #: all texts that the inspector gives for it, to look for a plugin's name in
    words: str = ""


@dataclass(frozen=True)
class Promise:
    """What the graph asks of the engine.

    ``precisions``: node with weights -> precision. ``plugins``: node -> op type of those that a
    plugin has to compute. ``dla``: whether something has to run on the DLA.
    """

    precisions: Mapping[str, Precision]
    plugins: Mapping[str, str]
    dla: bool = False

    @classmethod
    def of(cls, graph: Graph, *, plugins: bool, dla: bool = False) -> Promise:
        """What ``graph`` asks for; ``plugins``: whether its edgeseg nodes are left to plugins."""
        asked = {node.label: node.op_type for node in graph.operators()} if plugins else {}
        return cls(graph.precisions(), asked, dla)


@dataclass(frozen=True)
class Attestation:
    """What was found in an engine.

    ``layers``: how many there are. ``precisions``: precision -> number of layers with weights.
    ``plugins``: op types that a plugin computes. ``reformats``: layers that only change layout or
    type. ``on_dla``: layers on the DLA. ``unseen``: nodes with weights that no layer names, as
    happens in regions that are fused as a whole. ``failures``: sentences, empty when the engine is
    what the graph asks for.
    """

    layers: int
    precisions: Mapping[str, int]
    plugins: tuple[str, ...]
    reformats: int
    on_dla: int
    unseen: int
    failures: tuple[str, ...]

    @classmethod
    def of(cls, inspected: str, promise: Promise) -> Attestation:
        """Compares the inspector's JSON for a whole engine with what was promised."""
        layers = engine_layers(inspected)
        if layers is None or not any(layer.kind for layer in layers):
            return cls(
                len(layers or ()), {}, (), 0, 0, len(promise.precisions),
                ("the engine inspector gave no details of the layers",),
            )  # fmt: skip
        computing = [layer for layer in layers if layer.role == "compute"]
        on_dla = sum(layer.role == "dla" for layer in layers)
        failures, unseen = _precision_failures(computing, promise.precisions, bool(on_dla))
        plugins, missing = _plugins(layers, promise.plugins)
        if missing:
            failures.append(
                f"{len(missing)} of {len(promise.plugins)} plugin layers are missing: "
                + _listed([f"{promise.plugins[node]} ({node})" for node in missing])
            )
        if promise.dla and not on_dla:
            failures.append("no layer runs on the DLA: all of them fell back to the GPU")
        return cls(
            layers=len(layers),
            precisions=dict(
                Counter(layer.precision or "unknown" for layer in computing).most_common()
            ),
            plugins=plugins,
            reformats=sum(layer.role == "reformat" for layer in layers),
            on_dla=on_dla,
            unseen=unseen,
            failures=tuple(failures),
        )

    @property
    def holds(self) -> bool:
        """Whether the engine is what the graph asks for."""
        return not self.failures

    def render(self) -> list[str]:
        """Lines for a person: what runs in which precision, then what is not as asked."""
        computing = ", ".join(f"{count} {name}" for name, count in self.precisions.items())
        parts = [f"{self.layers} layers; with weights: {computing or 'none named'}"]
        parts.append(f"{self.reformats} reformats")
        parts.append(f"plugins: {', '.join(self.plugins) or 'none'}")
        if self.on_dla:
            parts.append(f"{self.on_dla} on the DLA")
        lines = ["; ".join(parts)]
        if self.unseen:
            lines.append(f"{self.unseen} nodes with weights are in fused regions and not named")
        lines.extend(f"not as asked: {failure}" for failure in self.failures)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them back."""
        return {
            "layers": self.layers,
            "precisions": dict(self.precisions),
            "plugins": list(self.plugins),
            "reformats": self.reformats,
            "on_dla": self.on_dla,
            "unseen": self.unseen,
            "failures": list(self.failures),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Attestation:
        """What ``to_dict`` gave; KeyError, TypeError or ValueError for anything else."""
        return cls(
            layers=int(values["layers"]),
            precisions={str(name): int(n) for name, n in dict(values["precisions"]).items()},
            plugins=tuple(str(name) for name in values["plugins"]),
            reformats=int(values["reformats"]),
            on_dla=int(values["on_dla"]),
            unseen=int(values["unseen"]),
            failures=tuple(str(failure) for failure in values["failures"]),
        )


def engine_layers(inspected: str) -> tuple[EngineLayer, ...] | None:
    """The layers in the inspector's JSON for a whole engine, in the layout of any release.

    None when it is no such JSON. An engine built without detailed verbosity gives names only; such
    layers have an empty kind.
    """
    try:
        listed = json.loads(inspected)["Layers"]
        return tuple(_layer(entry) for entry in listed)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _layer(entry: str | Mapping[str, Any]) -> EngineLayer:
    if isinstance(entry, str):
        return EngineLayer(entry, "", "other", None, _named_nodes(entry, ""))
    name = str(entry.get("Name", ""))
    kind = str(entry.get("LayerType", ""))
    parameters = str(entry.get("ParameterType", ""))
    role = "other"
    if kind == "Reformat" or parameters == "Reformat":
        # Those from Q and DQ nodes compute what the graph says; the others are TensorRT's own.
        role = "other" if entry.get("Origin") == "QDQ" else "reformat"
    elif "plugin" in f"{kind} {parameters}".lower():
        role = "plugin"
    elif "dla" in kind.lower():
        role = "dla"
    elif _COMPUTES.search(parameters or kind):
        role = "compute"
    words = " ".join(value for value in entry.values() if isinstance(value, str))
    nodes = _named_nodes(name, str(entry.get("Metadata", "")))
    return EngineLayer(name, kind, role, _precision(entry), nodes, words)


def _named_nodes(name: str, metadata: str) -> tuple[str, ...]:
    """ONNX nodes in a layer: from its metadata, or from a name like "conv + bn + PWN(relu)"."""
    found = _ONNX_NODE.findall(metadata)
    if found:
        return tuple(dict.fromkeys(found))
    return tuple(dict.fromkeys(part.strip() for part in name.split(" + ")))


def _precision(entry: Mapping[str, Any]) -> str | None:
    weights = entry.get("Weights")
    if isinstance(weights, Mapping):
        known = _type_named(str(weights.get("Type", "")))
        if known is not None:
            return known
    for tensor in entry.get("Inputs", ()):
        # Up to 10.x one text has format and type; later the type stands alone.
        text = tensor.get("Format/Datatype", tensor.get("Datatype", tensor.get("DataType", "")))
        known = _type_named(str(text))
        if known is not None:
            return known
    return None


def _type_named(text: str) -> str | None:
    return next((name for pattern, name in _TYPES if pattern.search(text)), None)


def _precision_failures(
    computing: Sequence[EngineLayer], promised: Mapping[str, Precision], on_dla: bool
) -> tuple[list[str], int]:
    """Sentences about nodes that run wider than promised, and how many nodes no layer names."""
    layers_of: dict[str, list[EngineLayer]] = {}
    for layer in computing:
        for node in layer.nodes:
            layers_of.setdefault(node, []).append(layer)
    failures = []
    for precision in sorted(set(promised.values()), key=lambda name: _WIDTH[name]):
        nodes = [node for node, wanted in promised.items() if wanted == precision]
        wider = []
        for node in nodes:
            found = [layer.precision for layer in layers_of.get(node, ()) if layer.precision]
            slow = [name for name in found if _WIDTH[name] > _WIDTH[precision]]
            if slow:
                wider.append(f"{node} ({slow[0]})")
        if wider:
            failures.append(
                f"{len(wider)} of {len(nodes)} layers that the graph wants in {precision} run "
                f"wider: {_listed(wider)}"
            )
        named = any(node in layers_of for node in nodes)
        present = any(layer.precision == precision for layer in computing)
        if not (named or present or on_dla) and _WIDTH[precision] < _WIDTH["fp32"]:
            failures.append(
                f"the graph wants {len(nodes)} layers in {precision}, and no layer of the engine is"
            )
    return failures, sum(node not in layers_of for node in promised)


def _plugins(
    layers: Sequence[EngineLayer], promised: Mapping[str, str]
) -> tuple[tuple[str, ...], list[str]]:
    """Op types that plugin layers compute, and the promised nodes that none computes."""
    # A name may be cut or changed; the plugin's type, where it is written, says as much.
    left = [layer for layer in layers if layer.role == "plugin"]
    present, missing = [], []
    for node, op_type in promised.items():
        by_name = [layer for layer in left if node in layer.nodes or node == layer.name]
        chosen = next(iter(by_name), None) or next(
            (layer for layer in left if op_type in layer.words), None
        )
        if chosen is None:
            missing.append(node)
        else:
            left.remove(chosen)
            present.append(op_type)
    return tuple(dict.fromkeys([*present, *(layer.name for layer in left)])), missing


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
