"""A foreign network that finds objects: what it has to give, and the head that is put behind it.

One picture's raw detections are tensors with fixed names, N candidates each:

- ``scores`` (1, N, classes): probabilities, 0 to 1, without a background;
- ``boxes`` (1, N, 4): x1, y1, x2, y2 in pixels of the network's input, or ``boxes_cxcywh``: centre,
  width and height as shares of it; may be left out where there are ``masks``;
- ``masks`` (1, N, h, w): logits of a map per candidate (DETR, MaskFormer, Mask2Former), or
  ``coefficients`` (1, N, k) and ``prototypes`` (1, k, h, w) whose weighted sums are such logits
  (YOLACT).

Everything behind them has a static shape, as in `edgeseg.export.instance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgeseg.errors import RequestError
from edgeseg.export.instance import (
    FAR,
    OUTPUTS,
    Detections,
    GraphWriter,
    append_instance_outputs,
    append_mask_assembly,
    append_mask_levels,
    append_selection,
    mask_assembly_function,
)
from edgeseg.export.models.instance import FoundInstances, InstanceNetwork
from edgeseg.export.models.selection import Selection
from edgeseg.export.models.yolact import chosen, cropped, mask_probabilities
from edgeseg.export.own import weights_in
from edgeseg.export.tail import static_shapes
from edgeseg.spec import ModelSpec, Preprocessing

__all__ = [
    "RAW_NAMES",
    "OwnInstanceNetwork",
    "RawForm",
    "check_pictures",
    "check_static",
    "free_names",
    "probed",
    "raw_of",
]

#: what a network may give, in the order in which graphs here have them
RAW_NAMES = ("boxes", "boxes_cxcywh", "scores", "masks", "coefficients", "prototypes")

_WANTED = (
    "boxes (1, N, 4), scores (1, N, classes), and masks (1, N, h, w) or coefficients (1, N, k) "
    "with prototypes (1, k, h, w)"
)
# Everything that is no weight of the network begins with this.
_OURS = "edgeseg.head."
#: above this a candidate is a detection, if nothing else is asked for
_LEAST_SCORE = 0.05
#: overlap of boxes above which the weaker goes, of networks whose candidates stand side by side
_OVERLAP = 0.5
# Candidates that are looked at, and of those the best of a class that compete.
_CANDIDATES, _PER_CLASS = 1000, 200
# Samples by which a box that was drawn around a mask is wider. Its sides would lie on samples
# else, and rounding would decide which of them are inside.
_WIDER = 1 / 16
# More than any prototype network has, and what the kernels take.
_MOST_PROTOTYPES = 4096
# What gives tensors whose size depends on the picture.
_DYNAMIC = ("NonZero", "NonMaxSuppression", "Compress", "Unique")
_SHOWN = 4


@dataclass(frozen=True)
class RawForm:
    """Which of ``RAW_NAMES`` a network gives, in that order, and of what size.

    ``candidates`` N and ``classes`` of the scores; ``grid`` (h, w) of the masks or prototypes.
    """

    names: tuple[str, ...]
    candidates: int
    classes: int
    grid: tuple[int, int]

    @property
    def has_boxes(self) -> bool:
        """Whether boxes come, and need not be drawn around the masks."""
        return not {"boxes", "boxes_cxcywh"}.isdisjoint(self.names)

    @property
    def is_assembled(self) -> bool:
        """Whether masks are sums of prototypes."""
        return "prototypes" in self.names

    @classmethod
    def of(
        cls,
        given: Mapping[str, Tensor],
        size: tuple[int, int],
        classes: tuple[str, ...] | None,
        way_out: str,
    ) -> RawForm:
        """The form of ``given``, for an input of ``size`` (height, width).

        RequestError, which ends in ``way_out``, unless it is one that can be exported.
        """
        names = tuple(name for name in RAW_NAMES if name in given)
        _check_names(names, way_out)
        shapes = {name: tuple(given[name].shape) for name in names}
        for name in names:
            tensor = given[name]
            if not tensor.is_floating_point():
                raise RequestError(
                    f"{name} are floating-point numbers, and {tensor.dtype} came; {way_out}"
                )
            axes = 4 if name in ("masks", "prototypes") else 3
            shape = shapes[name]
            if len(shape) != axes or shape[0] != 1 or min(shape) < 1:
                raise RequestError(
                    f"{name} of one picture have {axes} dimensions, of which the first is 1, and "
                    f"{shape} came; an instance model gives {_WANTED}; {way_out}"
                )
        _, candidates, channels = shapes["scores"]
        for name in names:
            if name != "prototypes" and shapes[name][1] != candidates:
                raise RequestError(
                    f"{name} {shapes[name]} are of {shapes[name][1]} candidates, and scores "
                    f"{shapes['scores']} of {candidates}; each candidate has one of each; {way_out}"
                )
            if name.startswith("boxes") and shapes[name][2] != 4:
                raise RequestError(f"{name} have four numbers each, and {shapes[name]} came")
        _check_classes(channels, classes)
        if "prototypes" in names:
            prototypes, coefficients = shapes["prototypes"][1], shapes["coefficients"][2]
            if prototypes != coefficients or prototypes > _MOST_PROTOTYPES:
                raise RequestError(
                    f"each prototype has its coefficient, at most {_MOST_PROTOTYPES}, and "
                    f"prototypes {shapes['prototypes']} came with coefficients "
                    f"{shapes['coefficients']}; {way_out}"
                )
        rows, columns = shapes["prototypes" if "prototypes" in names else "masks"][2:]
        if rows > size[0] or columns > size[1]:
            raise RequestError(
                f"masks have at most as many samples as the input has pixels, {size[0]}x{size[1]}, "
                f"and these have {rows}x{columns}; leave the last upsampling out"
            )
        return cls(names, candidates, channels, (rows, columns))


def _check_names(names: Sequence[str], way_out: str) -> None:
    came = ", ".join(names) or "none of them"
    problem = ""
    if "scores" not in names:
        problem = "there are no scores"
    elif "boxes" in names and "boxes_cxcywh" in names:
        problem = "boxes came in two forms"
    elif "masks" in names and ("prototypes" in names or "coefficients" in names):
        problem = "masks came in two forms"
    elif ("prototypes" in names) != ("coefficients" in names):
        problem = "coefficients and prototypes go together"
    elif "masks" not in names and "prototypes" not in names:
        problem = "there are no masks"
    elif "masks" not in names and not {"boxes", "boxes_cxcywh"}.intersection(names):
        problem = "prototypes are cropped to boxes, and there are none"
    if problem:
        raise RequestError(
            f"an instance model gives {_WANTED}, and {came} came: {problem}; {way_out}"
        )


def _check_classes(channels: int, classes: tuple[str, ...] | None) -> None:
    if channels > 255:
        raise RequestError(f"a model has 1 to 255 classes, and this one scores {channels}")
    if classes is None or len(classes) == channels:
        return
    hint = "; --classes names every column, in order"
    if len(classes) + 1 == channels:
        hint = "; is the background one of the columns? Leave it out of the scores"
    elif len(classes) == channels + 1:
        hint = "; is the background one of the names? An instance model has no name for it"
    raise RequestError(
        f"the model scores {channels} class{'es' if channels > 1 else ''}, "
        f"and {len(classes)} names came{hint}"
    )


def raw_of(result: Any) -> dict[str, Tensor]:
    """The raw detections in what a model or an adapter returns, in the order of ``RAW_NAMES``.

    A mapping, or an object, that has them by name; other entries are left out. RequestError for
    anything else.
    """
    if isinstance(result, Mapping):
        found = {name: result[name] for name in RAW_NAMES if name in result}
        came = f"a mapping with {', '.join(map(str, list(result)[:_SHOWN])) or 'nothing'}"
    else:
        found = {
            name: getattr(result, name)
            for name in RAW_NAMES
            if isinstance(getattr(result, name, None), Tensor)
        }
        came = f"a {type(result).__name__}"
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise RequestError(f"{name} is to be a tensor, and a {type(tensor).__name__} came")
    if "scores" not in found:
        raise RequestError(
            f"an instance model gives {_WANTED}, by these names, and {came} came; write a function "
            "that takes that and returns them as a dict, and name it with --adapter module:function"
        )
    return found


def probed(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two normalised pictures (1, 3, height, width), grey and noise, to try a network on."""
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return torch.zeros(1, 3, *size), noise


def check_pictures(found: Sequence[Mapping[str, Tensor]], size: tuple[int, int]) -> None:
    """RequestError unless the raw detections of several pictures have the same form, and numbers
    that can be what they are called."""
    first = found[0]
    for other in found[1:]:
        for name, tensor in first.items():
            if name not in other or other[name].shape != tensor.shape:
                shapes = [tuple(raw[name].shape) if name in raw else None for raw in found]
                raise RequestError(
                    f"the shape of {name} depends on the picture ({shapes[0]}, then {shapes[-1]}), "
                    "and an engine wants one; return all candidates, before any selection"
                )
    for name in first:
        # Of one alone it may come of a picture that is grey all over.
        if all(bool(raw[name].isnan().any()) for raw in found):
            raise RequestError(
                f"{name} hold values that are no numbers, for a grey picture and a noisy one; "
                "take weights from before the training diverged"
            )
    scores = torch.cat([raw["scores"].float().flatten() for raw in found])
    low, high = float(scores.min()), float(scores.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise RequestError(
            f"scores are probabilities, 0 to 1, and {low:.3g} to {high:.3g} came; put a sigmoid, "
            "or a softmax without its background column, behind them"
        )
    far = {
        name: max(float(raw[name].abs().max()) for raw in found)
        for name in first
        if name.startswith("boxes")
    }
    if "boxes" in far and far["boxes"] <= 1 < min(size):
        raise RequestError(
            f"boxes are x1, y1, x2, y2 in pixels of the input, {size[0]}x{size[1]}, and all that "
            "came are below 1; call them boxes_cxcywh if they are shares of the input, by centre "
            "and size, or multiply them"
        )
    if "boxes_cxcywh" in far:
        middle = float(torch.cat([raw["boxes_cxcywh"].flatten() for raw in found]).abs().median())
        if middle > 2:
            raise RequestError(
                "boxes_cxcywh are shares of the input, 0 to 1, and half of all that came are above "
                f"{middle:.3g}; divide them by the input's width and height"
            )


def check_static(graph: onnx.GraphProto, opset: int, name: str) -> None:
    """RequestError when ``graph``, of the network ``name``, selects by itself."""
    kinds = sorted({node.op_type for node in graph.node if node.op_type in _DYNAMIC})
    # Also a network of one size may use them, to write where a condition holds.
    if kinds and not {output.name for output in graph.output} <= set(static_shapes(graph, opset)):
        raise RequestError(
            f"{name} selects its detections itself ({', '.join(kinds)}), so that their number "
            "depends on the picture, and an engine wants one; export it without that part: "
            "EdgeSeg's head does the selection"
        )


def free_names(graph: onnx.GraphProto) -> None:
    """Renames, in place, what has the name of an input or output of the contract."""
    renamed = {name: f"network.{name}" for name in ("image", *OUTPUTS)}
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)


class OwnInstanceNetwork(InstanceNetwork):
    """A foreign instance network at one size, with the interface of EdgeSeg's own.

    ``source``: (1, 3, height, width) float32, normalised -> the tensors of ``form``, by the code
    that the model came with. ``graph``: the same from ``edgeseg.x`` on, in operators of
    ``own_opset``, its outputs in the order of ``form``.

    ``least_score``: what a detection's score is above. ``overlap``: boxes of one class that overlap
    a better one by more go; at 1 none goes, and each candidate is an object of its best class. None
    is 0.5 for prototypes, and 1 for masks: networks that give a mask per candidate are trained to
    give each object once.
    """

    mask_extent: ClassVar[Literal["image", "box"]] = "image"
    raw_names: ClassVar[tuple[str, ...]] = RAW_NAMES

    def __init__(
        self,
        source: nn.Module,
        graph: onnx.GraphProto,
        form: RawForm,
        *,
        opset: int,
        size: tuple[int, int],
        classes: tuple[str, ...] | None,
        preprocessing: Preprocessing,
        reference: str,
        least_score: float | None = None,
        overlap: float | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.graph = graph
        self.form = form
        self.own_opset = opset
        self.size = size
        self.num_classes = form.classes + 1
        self.classes = classes
        self.preprocessing = preprocessing
        #: who computes ``raw``, for the report
        self.reference = reference
        self._least_score = _LEAST_SCORE if least_score is None else least_score
        default = _OVERLAP if form.is_assembled else 1.0
        self._overlap = default if overlap is None else overlap
        # Refuses what the rules cannot be.
        self.selection(1)

    def selection(self, capacity: int) -> Selection:
        """The rules for ``capacity`` detections; RequestError when they cannot be."""
        suppresses = self._overlap < 1
        looked_at = _CANDIDATES
        if not self.form.has_boxes:
            # Each needs its whole mask for a box.
            looked_at = _PER_CLASS if suppresses else capacity
        return Selection(
            capacity=capacity,
            score_threshold=self._least_score,
            iou_threshold=self._overlap,
            per_class=_PER_CLASS if suppresses else looked_at,
            candidates=looked_at,
            cross_class=not suppresses,
        )

    def mask_size(self, height: int, width: int) -> tuple[int, int]:
        """See ``InstanceNetwork.mask_size``; the graph has one size."""
        return self.form.grid

    def raw(self, x: Tensor) -> tuple[Tensor, ...]:
        """See ``InstanceNetwork.raw``: what ``form`` names."""
        found: tuple[Tensor, ...] = self.source(x)
        return tuple(tensor.float() for tensor in found)

    def parameter_count(self) -> int:
        """Number of floating-point weights in the graph."""
        return weights_in(self.graph)

    def append_head(self, graph: onnx.GraphProto, spec: ModelSpec) -> list[onnx.FunctionProto]:
        """See ``InstanceNetwork.append_head``."""
        form = self.form
        raw = dict(zip(form.names, (output.name for output in graph.output), strict=True))
        write = GraphWriter(graph, _OURS)
        shape = (form.candidates, form.classes)
        scores = write.node(
            "Reshape", [raw["scores"], write.integers(shape, "scores_shape")], "score_rows"
        )
        # What libraries make of the largest of several is theirs where one is no number.
        least = write.number(0.0, "least")
        is_number = write.node("LessOrEqual", [least, scores], "score_is_number")
        scores = write.node("Where", [is_number, scores, least], "class_scores")

        def corners_of(rows: str) -> str:
            if form.has_boxes:
                return _boxes_in_order(write, raw, form, self.size, rows)
            return _boxes_of_masks(write, raw["masks"], form, self.size, rows)

        found = append_selection(write, scores, shape, corners_of, self.selection(spec.capacity))
        masks = self._append_masks(write, raw, found, spec)
        append_instance_outputs(graph, spec, found, masks)
        return [mask_assembly_function(self.own_opset)] if form.is_assembled else []

    def _append_masks(
        self, write: GraphWriter, raw: Mapping[str, str], found: Detections, spec: ModelSpec
    ) -> str:
        if self.form.is_assembled:
            rows = write.node("Gather", [raw["coefficients"], found.sources], "chosen", axis=1)
            return append_mask_assembly(write, raw["prototypes"], rows, found, spec)
        maps = write.node("Gather", [raw["masks"], found.sources], "chosen_masks", axis=1)
        return append_mask_levels(write, maps, found, spec)

    @torch.inference_mode()
    def detect(self, x: Tensor, capacity: int) -> FoundInstances:
        """See ``InstanceNetwork.detect``."""
        height, width = self.size
        raw = dict(zip(self.form.names, self.raw(x), strict=True))
        selection = self.selection(capacity)
        scores = torch.where(raw["scores"][0] >= 0, raw["scores"][0], 0)
        boxes = _found_boxes(raw, scores, self.size, selection.candidates)
        is_box = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1) & (boxes.abs() < FAR).all(dim=1)
        boxes = torch.where(is_box[:, None], boxes, torch.nan)
        rows, labels, best = chosen(scores, boxes, selection)
        boxes = boxes[rows]
        shares = boxes / boxes.new_tensor([width, height, width, height])
        if self.form.is_assembled:
            prototypes = raw["prototypes"][0].permute(1, 2, 0)
            masks = mask_probabilities(prototypes, raw["coefficients"][0][rows], shares)
        else:
            masks = cropped(torch.sigmoid(raw["masks"][0][rows]), shares)
        return FoundInstances(boxes, best, labels, torch.nan_to_num(masks, nan=0.0))


def _found_boxes(
    raw: Mapping[str, Tensor], scores: Tensor, size: tuple[int, int], limit: int
) -> Tensor:
    """Boxes (N, 4) xyxy in pixels; those drawn around masks for the ``limit`` best candidates."""
    height, width = size
    if "boxes" in raw:
        return raw["boxes"][0]
    if "boxes_cxcywh" in raw:
        shares = raw["boxes_cxcywh"][0]
        centre, half = shares[:, :2], shares[:, 2:] * 0.5
        corners = torch.cat([centre - half, centre + half], dim=1)
        return corners * corners.new_tensor([width, height, width, height])
    boxes = torch.full((len(scores), 4), torch.nan)
    for row in scores.amax(dim=1).topk(min(limit, len(scores))).indices.tolist():
        y, x = torch.nonzero(raw["masks"][0, row] > 0, as_tuple=True)
        if not len(y):
            continue
        rows, columns = raw["masks"].shape[2:]
        ends = [x.min() - _WIDER, y.min() - _WIDER, x.max() + 1 + _WIDER, y.max() + 1 + _WIDER]
        scales = [width / columns, height / rows] * 2
        boxes[row] = torch.stack(ends) * torch.tensor(scales)
    return boxes


def _boxes_in_order(
    write: GraphWriter,
    raw: Mapping[str, str],
    form: RawForm,
    size: tuple[int, int],
    rows: str,
) -> str:
    """Boxes (n, 4) xyxy in pixels of the candidates ``rows``; beyond ``FAR`` where one is none."""
    prefix = write.prefix
    name = "boxes" if "boxes" in raw else "boxes_cxcywh"
    flat = write.integers([form.candidates, 4], "boxes_shape")
    boxes = write.node("Reshape", [raw[name], flat], "box_rows")
    boxes = write.node("Gather", [boxes, rows], "candidate_boxes", axis=0)
    halves = write.integers([2, 2], "halves")
    if name == "boxes_cxcywh":
        write.node("Split", [boxes, halves], "box_parts", outputs=("centre", "sides"), axis=1)
        half = write.node("Mul", [f"{prefix}sides", write.number(0.5, "half")], "half_sides")
        low = write.node("Sub", [f"{prefix}centre", half], "low_share")
        high = write.node("Add", [f"{prefix}centre", half], "high_share")
        boxes = write.node("Concat", [low, high], "box_shares", axis=1)
        height, width = size
        scale = write.constant(np.array([width, height] * 2, np.float32), "network_size")
        boxes = write.node("Mul", [boxes, scale], "box_pixels")
    write.node("Split", [boxes, halves], "box_ends", outputs=("low_end", "high_end"), axis=1)
    ordered = write.node("LessOrEqual", [f"{prefix}low_end", f"{prefix}high_end"], "in_order")
    ordered = write.node("Cast", [ordered], "order_of_sides", to=onnx.TensorProto.FLOAT)
    # The smaller of both sides: 0 where one is the wrong way round, or no number.
    ordered = write.node("ReduceMin", [ordered, write.integers([1], "side_axis")], "order_of_box")
    is_box = write.node("Less", [write.number(0.5, "half_sure"), ordered], "is_box")
    return write.node("Where", [is_box, boxes, write.number(2 * FAR, "beyond")], "boxes_in_order")


def _boxes_of_masks(
    write: GraphWriter, masks: str, form: RawForm, size: tuple[int, int], rows: str
) -> str:
    """Boxes (n, 4) around where the maps of the candidates ``rows`` are above zero.

    Beyond ``FAR`` where that is nowhere.
    """
    maps = write.node("Gather", [masks, rows], "candidate_masks", axis=1)
    maps = write.node("Squeeze", [maps, write.integers([0], "picture_axis")], "maps")
    nothing = write.number(0.0, "nothing")
    on = write.node("Less", [nothing, maps], "is_on")
    on = write.node("Cast", [on], "on", to=onnx.TensorProto.FLOAT)
    ends: dict[str, str] = {}
    for name, axis, samples, pixels in (
        ("y", 2, form.grid[0], size[0]),
        ("x", 1, form.grid[1], size[1]),
    ):
        over = write.integers([axis], f"over_{name}")
        line = write.node("ReduceMax", [on, over], f"on_{name}", keepdims=0)
        places = np.arange(1, samples + 1, dtype=np.float32)
        along = write.integers([1], f"along_{name}")
        for side, values in (("high", places), ("low", places[::-1])):
            # The largest place that is on, counted from the other end for the low side.
            place = write.constant(np.ascontiguousarray(values), f"{side}_places_{name}")
            place = write.node("Mul", [line, place], f"{side}_on_{name}")
            ends[side + name] = write.node("ReduceMax", [place, along], f"{side}_{name}")
        count = write.number(float(samples), f"samples_{name}")
        ends["low" + name] = write.node("Sub", [count, ends["low" + name]], f"first_{name}")
        scale = write.number(pixels / samples, f"pixels_per_sample_{name}")
        wider = write.number(_WIDER, f"wider_{name}")
        for side, op in (("low", "Sub"), ("high", "Add")):
            end = write.node(op, [ends[side + name], wider], f"{side}_wider_{name}")
            ends[f"{side}_pixel_{name}"] = write.node("Mul", [end, scale], f"{side}_pixel_{name}")
    sides = ("low_pixel_x", "low_pixel_y", "high_pixel_x", "high_pixel_y")
    boxes = write.node("Concat", [ends[side] for side in sides], "boxes_of_masks", axis=1)
    somewhere = write.node("Less", [nothing, ends["highx"]], "is_somewhere")
    beyond = write.number(2 * FAR, "beyond")
    return write.node("Where", [somewhere, boxes, beyond], "boxes_of_what_is")
