"""Heads of instance models as ONNX graphs: raw predictions to boxes, scores, labels and masks.

Everything has a static shape and is a standard operator, except the last step,
``EdgeSegMaskAssembly``, which carries a body of standard operators. There is no NonZero,
NonMaxSuppression or Loop, and no TopK beyond 3840, which is TensorRT's limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeseg.export.models.selection import Selection
from edgeseg.spec import ModelSpec

__all__ = [
    "FAR",
    "MASK_ASSEMBLY",
    "OUTPUTS",
    "Detections",
    "GraphWriter",
    "Rescoring",
    "append_instance_outputs",
    "append_mask_assembly",
    "append_mask_levels",
    "append_selection",
    "append_yolact_head",
    "append_yolact_selection",
    "mask_assembly_function",
]

#: op type of the head that makes masks of prototypes (domain ``edgeseg``)
MASK_ASSEMBLY = "EdgeSegMaskAssembly"

#: outputs of every instance graph, in order
OUTPUTS = ("boxes", "scores", "labels", "count", "masks")

#: a box with larger numbers, in pixels or relative to the picture, is none: it came of an overflow
FAR = 1e6

_DOMAIN = "edgeseg"
# Everything that is no weight of the network begins with this.
_OURS = "edgeseg.head."
_OPSET = 18
# Ranks of a class that are compared with those before them at a time.
_BLOCK = 50
# Scores are 0 to 1, so this marks what is no detection.
_NONE = -1.0
# Variances of the box regression (Liu et al., SSD, 2016), as the published networks are trained.
_CENTRE_VARIANCE, _SIZE_VARIANCE = 0.1, 0.2


@dataclass(frozen=True)
class Detections:
    """Names of the tensors of one picture's detections, best first, all of ``capacity`` rows.

    ``boxes`` float32 (1, K, 4) xyxy in network pixels, ``scores`` float32 (1, K), ``labels`` int32
    (1, K), ``count`` int32 (1,): rows from there on are zeros. ``sources`` int64 (K,): the rows of
    the raw predictions that they came from.
    """

    boxes: str
    scores: str
    labels: str
    count: str
    sources: str


@dataclass(frozen=True, eq=False)
class Rescoring:
    """The network that tells from a mask how well it covers its object (YOLACT++).

    ``weights``: state_dict key -> kernels and biases of its convolutions, in order. All but the
    last have a stride of 2; ReLU follows each, and the maximum over what is left of the mask.
    """

    weights: Mapping[str, NDArray[np.float32]]


def _node(
    op_type: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    name: str,
    attributes: Mapping[str, int | float | Sequence[int]],
) -> onnx.NodeProto:
    made = helper.make_node(op_type, inputs, outputs, name)
    made.attribute.extend(helper.make_attribute(key, attributes[key]) for key in sorted(attributes))
    return made


class GraphWriter:
    """Adds nodes and constants, named after what they are, to an ONNX graph."""

    def __init__(self, graph: onnx.GraphProto, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        **attributes: int | float | Sequence[int],
    ) -> str:
        """Adds a node; returns the name of its first output, ``name`` with the prefix.

        ``outputs``: names of all outputs where there are several.
        """
        names = [self.prefix + output for output in outputs or (name,)]
        self.graph.node.append(_node(op_type, list(inputs), names, self.prefix + name, attributes))
        return names[0]

    def constant(self, value: NDArray[np.generic], name: str) -> str:
        """Adds an initializer; returns its name."""
        self.graph.initializer.append(numpy_helper.from_array(value, self.prefix + name))
        return self.prefix + name

    def integers(self, values: Sequence[int], name: str) -> str:
        """Adds an int64 vector; returns its name."""
        return self.constant(np.array(values, np.int64), name)

    def number(self, value: float, name: str) -> str:
        """Adds a float32 scalar; returns its name."""
        return self.constant(np.array(value, np.float32), name)


def append_yolact_head(
    graph: onnx.GraphProto,
    priors: NDArray[np.float32],
    spec: ModelSpec,
    selection: Selection,
    *,
    rescoring: Rescoring | None = None,
    opset: int = _OPSET,
) -> list[onnx.FunctionProto]:
    """Makes ``graph``, which ends with YOLACT's raw heads, keep the contract of instance models.

    Its outputs are, in order, ``loc`` (1, A, 4), ``conf`` (1, A, classes + 1), coefficients (1, A,
    channels) and prototypes (1, channels, ``spec.mask_height``, ``spec.mask_width``). With
    ``rescoring`` the scores are multiplied by what it thinks of the masks, and rank the detections
    anew. Returns the body of ``EdgeSegMaskAssembly``, in operators of ``opset``.
    """
    loc, conf, coefficients, prototypes = (output.name for output in graph.output)
    size = (spec.height, spec.width)
    found = append_yolact_selection(
        graph, loc, conf, priors, size, len(spec.classes) + 1, selection
    )
    write = GraphWriter(graph, _OURS)
    chosen = write.node("Gather", [coefficients, found.sources], "chosen", axis=1)
    if rescoring is not None:
        found, chosen = _rescored(write, rescoring, prototypes, chosen, found, spec)
    masks = append_mask_assembly(write, prototypes, chosen, found, spec)
    append_instance_outputs(graph, spec, found, masks)
    return [mask_assembly_function(opset)]


def append_mask_assembly(
    write: GraphWriter, prototypes: str, coefficients: str, found: Detections, spec: ModelSpec
) -> str:
    """Levels int32 (1, K, h, w) of ``found``, by ``EdgeSegMaskAssembly``.

    ``prototypes`` (1, channels, h, w) and ``coefficients`` (1, K, channels) are tensors of the
    graph, which has to come with ``mask_assembly_function``.
    """
    masks = f"{write.prefix}masks"
    write.graph.node.append(
        helper.make_node(
            MASK_ASSEMBLY,
            [prototypes, coefficients, found.boxes, found.count],
            [masks],
            "head",
            domain=_DOMAIN,
            network_height=spec.height,
            network_width=spec.width,
        )
    )
    return masks


def append_mask_levels(write: GraphWriter, logits: str, found: Detections, spec: ModelSpec) -> str:
    """Levels int32 (1, K, h, w) of ``found``, each of a map of its own.

    ``logits`` (1, K, h, w) is a tensor of the graph. The same as ``EdgeSegMaskAssembly`` makes of
    its sums: floor(255 p + 1/2), where p is the sigmoid; 0 where that is no number, outside the
    box, and in rows that are no detection.
    """
    rows, grid = spec.capacity, [spec.mask_height, spec.mask_width]
    shape = write.integers([rows, 1, *grid], "mask_shape")
    odds = write.node("Sigmoid", [logits], "mask_odds")
    odds = write.node("Reshape", [odds, shape], "mask_grid")
    levels = write.node("Mul", [odds, write.number(255.0, "full")], "mask_scaled")
    levels = write.node("Add", [levels, write.number(0.5, "half_level")], "mask_raised")
    levels = write.node("Floor", [levels], "mask_levels")
    zero = f"{write.prefix}zero"
    shown = _inside_boxes(write, found.boxes, spec)
    is_number = write.node("LessOrEqual", [zero, odds], "mask_is_number")
    shown = write.node("And", [shown, is_number], "mask_is_shown")
    index = np.arange(rows, dtype=np.int32).reshape(rows, 1, 1, 1)
    real = write.node("Less", [write.constant(index, "row_index"), found.count], "row_is_real")
    shown = write.node("And", [shown, real], "mask_is_wanted")
    levels = write.node("Where", [shown, levels, zero], "wanted_levels")
    levels = write.node("Cast", [levels], "mask_integers", to=TensorProto.INT32)
    whole = write.integers([1, rows, *grid], "masks_shape")
    return write.node("Reshape", [levels, whole], "masks")


def _rescored(
    write: GraphWriter,
    rescoring: Rescoring,
    prototypes: str,
    coefficients: str,
    found: Detections,
    spec: ModelSpec,
) -> tuple[Detections, str]:
    """``found`` and its ``coefficients`` (1, K, channels), by scores that know the masks."""
    rows = spec.capacity
    masks = _cropped_masks(write, prototypes, coefficients, found.boxes, spec)
    keys = list(rescoring.weights)
    for kernel, bias in zip(keys[::2], keys[1::2], strict=True):
        for key in (kernel, bias):
            write.graph.initializer.append(numpy_helper.from_array(rescoring.weights[key], key))
        values = rescoring.weights[kernel]
        stride = 1 if bias == keys[-1] else 2
        layer = kernel.removesuffix(".weight")
        masks = write.node(
            "Conv",
            [masks, kernel, bias],
            layer,
            kernel_shape=list(values.shape[2:]),
            strides=[stride, stride],
        )
        masks = write.node("Relu", [masks], f"{layer}.relu")
    best = write.node("GlobalMaxPool", [masks], "best_overlap")
    flat = write.integers([rows, len(spec.classes)], "overlap_shape")
    overlaps = write.node("Reshape", [best, flat], "overlaps")
    column = write.integers([rows, 1], "label_column")
    labels = write.node("Reshape", [found.labels, column], "label_of_row")
    overlap = write.node("GatherElements", [overlaps, labels], "overlap", axis=1)
    overlap = write.node("Reshape", [overlap, write.integers([1, rows], "one_row")], "overlap_row")

    product = write.node("Mul", [found.scores, overlap], "mask_score")
    # A mask that is no number covers nothing; what is no detection stays behind those that are.
    zero, none = f"{write.prefix}zero", f"{write.prefix}none"
    is_number = write.node("LessOrEqual", [zero, product], "mask_score_is_number")
    product = write.node("Where", [is_number, product, zero], "number_of_mask_score")
    index = write.constant(np.arange(rows, dtype=np.int32)[None], "row_index")
    real = write.node("Less", [index, found.count], "row_is_real")
    product = write.node("Where", [real, product, none], "rank")
    write.node(
        "TopK",
        [product, write.integers([rows], "rescored_rows")],
        "best_rescored",
        outputs=("rescored", "rescored_from"),
        axis=1,
    )
    order = write.node(
        "Reshape", [f"{write.prefix}rescored_from", f"{write.prefix}flat"], "rescored_order"
    )
    ranked = Detections(
        boxes=write.node("Gather", [found.boxes, order], "rescored_boxes", axis=1),
        scores=write.node("Relu", [f"{write.prefix}rescored"], "rescored_scores"),
        labels=write.node("Gather", [found.labels, order], "rescored_labels", axis=1),
        count=found.count,
        sources=write.node("Gather", [found.sources, order], "rescored_sources", axis=0),
    )
    return ranked, write.node("Gather", [coefficients, order], "rescored_chosen", axis=1)


def _cropped_masks(
    write: GraphWriter, prototypes: str, coefficients: str, boxes: str, spec: ModelSpec
) -> str:
    """(K, 1, h, w) float32: what ``EdgeSegMaskAssembly`` makes levels of, before it does."""
    rows, height, width = spec.capacity, spec.mask_height, spec.mask_width
    planes = write.node(
        "Reshape", [prototypes, write.integers([1, -1, height * width], "plane_shape")], "planes"
    )
    sums = write.node("MatMul", [coefficients, planes], "mask_sums")
    odds = write.node("Sigmoid", [sums], "mask_odds")
    odds = write.node(
        "Reshape", [odds, write.integers([rows, 1, height, width], "mask_shape")], "mask_grid"
    )
    inside = _inside_boxes(write, boxes, spec)
    return write.node("Where", [inside, odds, f"{write.prefix}zero"], "cropped_masks")


def _inside_boxes(write: GraphWriter, boxes: str, spec: ModelSpec) -> str:
    """(K, 1, h, w) bool: the samples that ``EdgeSegMaskAssembly`` keeps of each mask."""
    rows, height, width = spec.capacity, spec.mask_height, spec.mask_width
    corners = [f"corner_{name}" for name in ("x1", "y1", "x2", "y2")]
    shaped = write.node(
        "Reshape", [boxes, write.integers([rows, 4, 1, 1], "box_column")], "mask_boxes"
    )
    quarters = write.integers([1, 1, 1, 1], "box_quarters")
    write.node("Split", [shaped, quarters], "mask_corners", outputs=corners, axis=1)
    one = write.number(1.0, "sample")
    inside = []
    for axis, samples, size in ((0, width, spec.width), (1, height, spec.height)):
        name = "xy"[axis]
        count = write.number(float(samples), f"mask_samples_{name}")
        pixels = write.number(float(size), f"mask_pixels_{name}")
        ends = [
            write.node(
                "Div",
                [write.node("Mul", [write.prefix + corner, count], f"{corner}_times"), pixels],
                f"{corner}_sample",
            )
            for corner in corners[axis::2]
        ]
        low = write.node("Sub", [write.node("Min", ends, f"mask_low_{name}"), one], f"from_{name}")
        high = write.node("Add", [write.node("Max", ends, f"mask_high_{name}"), one], f"to_{name}")
        shape = (1, 1, 1, samples) if name == "x" else (1, 1, samples, 1)
        places = np.arange(samples, dtype=np.float32).reshape(shape)
        place = write.constant(places, f"mask_place_{name}")
        after = write.node("LessOrEqual", [low, place], f"after_{name}")
        before = write.node("Less", [place, high], f"before_{name}")
        inside.append(write.node("And", [after, before], f"inside_{name}"))
    return write.node("And", inside, "inside_box")


def append_instance_outputs(
    graph: onnx.GraphProto, spec: ModelSpec, found: Detections, masks: str
) -> None:
    """Replaces the outputs of ``graph`` by those of the contract.

    ``masks``: name of an int32 (1, K, h, w) tensor of levels; it gets a Cast to uint8 behind it.
    """
    renamed = {
        found.boxes: "boxes",
        found.scores: "scores",
        found.labels: "labels",
        found.count: "count",
    }
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    graph.node.append(
        helper.make_node("Cast", [masks], ["masks"], "masks_to_uint8", to=TensorProto.UINT8)
    )
    capacity = spec.capacity
    grid = [1, capacity, spec.mask_height, spec.mask_width]
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, capacity, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, capacity]),
            helper.make_tensor_value_info("labels", TensorProto.INT32, [1, capacity]),
            helper.make_tensor_value_info("count", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("masks", TensorProto.UINT8, grid),
        ]
    )


def append_yolact_selection(
    graph: onnx.GraphProto,
    loc: str,
    conf: str,
    priors: NDArray[np.float32],
    size: tuple[int, int],
    num_classes: int,
    selection: Selection,
    prefix: str = _OURS,
) -> Detections:
    """Adds what is between YOLACT's raw heads and its detections to ``graph``.

    ``loc`` (1, A, 4) and ``conf`` (1, A, num_classes) are tensors of the graph, ``num_classes``
    counts the background in column 0; ``priors`` (A, 4) are relative; ``size`` is (height, width)
    of the network's input. A prior with a score or box that is no finite number is no candidate.
    """
    write = GraphWriter(graph, prefix)
    total = priors.shape[0]
    odds = write.node("Softmax", [conf], "odds", axis=2)
    rows = write.node("Reshape", [odds, write.integers([total, num_classes], "odds_shape")], "rows")
    scores = write.node(
        "Slice",
        [
            rows,
            write.integers([1], "first_class"),
            write.integers([num_classes], "end_class"),
            write.integers([1], "sliced_axis"),
        ],
        "class_scores",
    )

    def corners_of(chosen: str) -> str:
        return _decoded(write, loc, priors, chosen)

    shape = (total, num_classes - 1)
    return append_selection(write, scores, shape, corners_of, selection, relative_to=size)


def append_selection(
    write: GraphWriter,
    scores: str,
    shape: tuple[int, int],
    corners_of: Callable[[str], str],
    selection: Selection,
    *,
    relative_to: tuple[int, int] | None = None,
) -> Detections:
    """Adds what is between scored candidates and detections to the graph of ``write``.

    ``scores`` float32 of ``shape`` (A, classes) is a tensor of the graph, without a background.
    ``corners_of`` adds what makes boxes (n, 4) xyxy of rows, an int64 tensor (n,), once.
    ``relative_to``: (height, width) of the picture that boxes are shares of; None for boxes in
    pixels. A candidate with a score or box that is no finite number, or beyond ``FAR``, is none.
    """
    prefix = write.prefix
    total, foreground = shape
    kept = min(selection.candidates, total)
    none = write.number(_NONE, "none")

    # The best score of each, and the candidates among them.
    class_axis = write.integers([1], "class_axis")
    best = write.node("ReduceMax", [scores, class_axis], "best_score", keepdims=0)
    # Also takes care of scores that are no number: TopK has no place for them. Less, here and
    # below, since OpenVINO's Greater says yes to a NaN.
    above = write.node(
        "Less", [write.number(selection.score_threshold, "threshold"), best], "is_candidate"
    )
    ranked = write.node("Where", [above, best, none], "candidate_score")
    if selection.cross_class:
        kept = min(kept, selection.per_class)
    write.node(
        "TopK",
        [ranked, write.integers([kept], "candidates")],
        "best_candidates",
        outputs=("top_score", "top_prior"),
    )
    top_score, top_prior = f"{prefix}top_score", f"{prefix}top_prior"

    corners = corners_of(top_prior)
    near = write.node("Abs", [corners], "corner_distance")
    near = write.node("Less", [near, write.number(FAR, "far")], "is_near")
    near = write.node("Cast", [near], "near_corners", to=TensorProto.FLOAT)
    near = write.node(
        "ReduceMin", [near, write.integers([1], "corner_axis")], "near_box", keepdims=0
    )
    zero = write.number(0.0, "zero")
    usable = write.node(
        "And",
        [
            write.node("Less", [zero, near], "box_is_finite"),
            write.node("Less", [none, top_score], "score_is_enough"),
        ],
        "is_usable",
    )
    usable = write.node("Unsqueeze", [usable, write.integers([1], "one")], "usable_rows")
    corners = write.node("Where", [usable, corners, zero], "usable_boxes")
    scores = write.node("Gather", [scores, top_prior], "candidate_scores", axis=0)
    scores = write.node("Where", [usable, scores, none], "usable_scores")

    # Groups of boxes that compete: (groups, ranked) scores, highest first, and their rows.
    if selection.cross_class:
        label = write.node("ArgMax", [scores], "best_class", axis=1, keepdims=0)
        groups, ranks = 1, kept
        scores = write.node("ReduceMax", [scores, class_axis], "best", keepdims=0)
        scores = write.node("Unsqueeze", [scores, write.integers([0], "front")], "groups")
    else:
        groups, ranks = foreground, min(selection.per_class, kept)
        scores = write.node("Transpose", [scores], "groups", perm=[1, 0])
    write.node(
        "TopK",
        [scores, write.integers([ranks], "ranks")],
        "best_of_groups",
        outputs=("group_score", "group_row"),
        axis=1,
    )
    group_score, group_row = f"{prefix}group_score", f"{prefix}group_row"
    survivors = group_score
    # No two boxes overlap by more than all.
    if selection.iou_threshold < 1:
        survivors = _survivors(
            write, corners, group_score, group_row, groups, ranks, selection.iou_threshold
        )

    # The best over all groups.
    pairs = groups * ranks
    whole = write.integers([pairs], "pairs")
    written = min(selection.capacity, pairs)
    write.node(
        "TopK",
        [
            write.node("Reshape", [survivors, whole], "survivors_flat"),
            write.integers([written], "written"),
        ],
        "best_survivors",
        outputs=("final_score", "final_pair"),
    )
    final_score, pair = f"{prefix}final_score", f"{prefix}final_pair"
    row = write.node("Reshape", [group_row, whole], "pair_rows")
    row = write.node("Gather", [row, pair], "final_row", axis=0)
    if selection.cross_class:
        label = write.node("Gather", [label, row], "final_label", axis=0)
    else:
        label = write.node("Div", [pair, write.integers([ranks], "ranks_each")], "final_label")
    source = write.node("Gather", [top_prior, row], "sources", axis=0)
    boxes = write.node("Gather", [corners, row], "final_boxes", axis=0)
    if relative_to is not None:
        height, width = relative_to
        scale = np.array([width, height, width, height], np.float32)
        boxes = write.node("Mul", [boxes, write.constant(scale, "network_size")], "pixel_boxes")
    label = write.node("Cast", [label], "label", to=TensorProto.INT32)

    missing = selection.capacity - written
    if missing:
        final_score = _padded(write, final_score, [0, missing], none, "all_scores")
        label = _padded(write, label, [0, missing], _int32_zero(write), "all_labels")
        source = _padded(write, source, [0, missing], "", "all_sources")
        boxes = _padded(write, boxes, [0, 0, missing, 0], zero, "all_boxes")
    real = write.node("Less", [write.number(_NONE / 2, "half_none"), final_score], "is_real")
    count = write.node("Cast", [real], "real", to=TensorProto.INT32)
    count = write.node("ReduceSum", [count, write.integers([0], "row_axis")], "count", keepdims=1)
    front = write.integers([0], "batch_axis")
    real_rows = write.node("Unsqueeze", [real, f"{prefix}one"], "real_rows")
    boxes = write.node("Where", [real_rows, boxes, zero], "real_boxes")
    final_score = write.node("Where", [real, final_score, zero], "real_scores")
    label = write.node("Where", [real, label, _int32_zero(write)], "real_labels")
    return Detections(
        boxes=write.node("Unsqueeze", [boxes, front], "batch_boxes"),
        scores=write.node("Unsqueeze", [final_score, front], "batch_scores"),
        labels=write.node("Unsqueeze", [label, front], "batch_labels"),
        count=count,
        sources=source,
    )


def _int32_zero(write: GraphWriter) -> str:
    name = f"{write.prefix}int32_zero"
    if not any(tensor.name == name for tensor in write.graph.initializer):
        write.constant(np.array(0, np.int32), "int32_zero")
    return name


def _padded(write: GraphWriter, tensor: str, pads: Sequence[int], value: str, name: str) -> str:
    inputs = [tensor, write.integers(pads, f"{name}_pads"), *([value] if value else [])]
    return write.node("Pad", inputs, name)


def _decoded(write: GraphWriter, loc: str, priors: NDArray[np.float32], rows: str) -> str:
    """Boxes (rows, 4) x1, y1, x2, y2 of the priors ``rows``, relative to the picture."""
    flat = write.node(
        "Reshape", [loc, write.integers([priors.shape[0], 4], "loc_shape")], "loc_rows"
    )
    deltas = write.node("Gather", [flat, rows], "deltas", axis=0)
    chosen = write.node("Gather", [write.constant(priors, "priors"), rows], "chosen_priors", axis=0)
    halves = write.integers([2, 2], "halves")
    write.node("Split", [deltas, halves], "delta_parts", outputs=("shift", "growth"), axis=1)
    write.node("Split", [chosen, halves], "prior_parts", outputs=("centre", "extent"), axis=1)
    prefix = write.prefix
    shift = write.node(
        "Mul", [f"{prefix}shift", write.number(_CENTRE_VARIANCE, "centre_variance")], "shift_share"
    )
    shift = write.node("Mul", [shift, f"{prefix}extent"], "shift_by")
    middle = write.node("Add", [f"{prefix}centre", shift], "middle")
    growth = write.node(
        "Mul", [f"{prefix}growth", write.number(_SIZE_VARIANCE, "size_variance")], "growth_share"
    )
    sides = write.node(
        "Mul", [f"{prefix}extent", write.node("Exp", [growth], "growth_factor")], "sides"
    )
    half = write.node("Mul", [sides, write.number(0.5, "half")], "half_sides")
    low = write.node("Sub", [middle, half], "low_corner")
    high = write.node("Add", [sides, low], "high_corner")
    return write.node("Concat", [low, high], "corners", axis=1)


def _survivors(
    write: GraphWriter,
    boxes: str,
    scores: str,
    rows: str,
    groups: int,
    ranks: int,
    iou_threshold: float,
) -> str:
    """``scores`` (groups, ranks), and -1 where an earlier box of the group overlaps too much.

    ``boxes`` (candidates, 4); ``rows`` (groups, ranks) of ``boxes``.
    """
    prefix = write.prefix
    quarters = write.integers([1, 1, 1, 1], "quarters")
    sides = ("left", "top", "right", "bottom")
    planes = write.node("Transpose", [boxes], "box_planes", perm=[1, 0])
    write.node(
        "Split", [planes, quarters], "box_sides", outputs=[f"{s}_plane" for s in sides], axis=0
    )
    flat = write.integers([-1], "flat")
    grouped = {}
    for side in sides:
        plane = write.node("Reshape", [f"{prefix}{side}_plane", flat], f"{side}_of_box")
        grouped[side] = write.node("Gather", [plane, rows], side, axis=0)
    grouped["area"] = write.node(
        "Mul",
        [
            write.node("Sub", [grouped["right"], grouped["left"]], "box_width"),
            write.node("Sub", [grouped["bottom"], grouped["top"]], "box_height"),
        ],
        "area",
    )
    write.number(iou_threshold, "iou_threshold")
    # Half of all pairs of boxes are of no interest: those where the other one comes later. So the
    # ranks are taken in blocks, each against those before it and itself.
    steps = [*range(0, ranks, _BLOCK), ranks]
    blocks = [
        _worst_excess(write, grouped, groups, begin, end)
        for begin, end in itertools.pairwise(steps)
    ]
    worst = write.node("Concat", blocks, "worst_excess", axis=1)
    removed = write.node("Less", [f"{prefix}zero", worst], "is_removed")
    return write.node("Where", [removed, f"{prefix}none", scores], "survivors")


def _worst_excess(
    write: GraphWriter, grouped: Mapping[str, str], groups: int, begin: int, end: int
) -> str:
    """By how much the boxes of ranks ``begin`` to ``end - 1`` overlap an earlier one too much.

    (groups, end - begin), above zero if one of their IoUs is above the threshold.
    """
    prefix = write.prefix
    name = f"_{begin}"
    first = write.integers([0], f"from_first{name}")
    start = write.integers([begin], f"from{name}")
    stop = write.integers([end], f"to{name}")
    ranked = write.integers([1], f"ranked_axis{name}")
    rows = write.integers([groups, end - begin, 1], f"later_shape{name}")
    columns = write.integers([groups, 1, end], f"earlier_shape{name}")
    later, earlier = {}, {}
    for side, tensor in grouped.items():
        part = write.node("Slice", [tensor, start, stop, ranked], f"{side}_in{name}")
        later[side] = write.node("Reshape", [part, rows], f"{side}_later{name}")
        part = write.node("Slice", [tensor, first, stop, ranked], f"{side}_until{name}")
        earlier[side] = write.node("Reshape", [part, columns], f"{side}_earlier{name}")
    lengths = {}
    for low, high, kind in (("left", "right", "width"), ("top", "bottom", "height")):
        nearer = write.node("Min", [later[high], earlier[high]], f"common_{high}{name}")
        further = write.node("Max", [later[low], earlier[low]], f"common_{low}{name}")
        lengths[kind] = write.node("Sub", [nearer, further], f"common_{kind}{name}")
    # A negative height needs no care: the area is then not above zero.
    width = write.node("Relu", [lengths["width"]], f"overlap_width{name}")
    common = write.node("Mul", [width, lengths["height"]], f"common_area{name}")
    both = write.node("Add", [later["area"], earlier["area"]], f"both_areas{name}")
    union = write.node("Sub", [both, common], f"union_area{name}")
    # common / union > threshold, without a division; boxes of no size overlap nothing.
    limit = write.node("Mul", [union, f"{prefix}iou_threshold"], f"area_limit{name}")
    excess = write.node("Sub", [common, limit], f"excess{name}")
    before = np.tri(end - begin, end, begin - 1, dtype=np.float32)
    excess = write.node(
        "Mul", [excess, write.constant(before, f"is_earlier{name}")], f"excess_of_earlier{name}"
    )
    last = write.integers([2], f"last_axis{name}")
    return write.node("ReduceMax", [excess, last], f"worst_excess{name}", keepdims=0)


def mask_assembly_function(opset: int = _OPSET) -> onnx.FunctionProto:
    """``EdgeSegMaskAssembly`` in standard operators, those of ``opset``.

    ``prototypes`` float32 (N, channels, h, w), ``coefficients`` float32 (N, K, channels), ``boxes``
    float32 (N, K, 4) xyxy in pixels of an input of ``network_height`` x ``network_width``,
    ``count`` int32 (N,) -> ``masks`` int32 (N, K, h, w): floor(255 p + 1/2), where p is the sigmoid
    of the sum of prototypes times coefficients; 0 where that is no number, outside the box, and
    from row ``count`` on. The box is scaled to the prototypes, ordered, and widened by 1 each way;
    sample x is inside if low <= x < high.
    """
    write = _FunctionWriter()
    node, vector, number = write.node, write.vector, write.number

    # Sums of prototypes, as one product of matrices.
    node("Shape", ["prototypes"], "channels_of", start=0, end=2)
    node("Shape", ["prototypes"], "grid", start=2, end=4)
    node("Concat", ["channels_of", vector(-1)], "planes_shape", axis=0)
    node("Reshape", ["prototypes", "planes_shape"], "planes")
    node("MatMul", ["coefficients", "planes"], "sums")
    node("Shape", ["coefficients"], "rows_of", start=0, end=2)
    node("Concat", ["rows_of", "grid"], "masks_shape", axis=0)
    node("Reshape", ["sums", "masks_shape"], "logits")
    node("Sigmoid", ["logits"], "probability")
    node("Mul", ["probability", number(255.0)], "scaled")
    node("Add", ["scaled", number(0.5)], "raised")
    node("Floor", ["raised"], "levels")

    # Which samples are inside: (N, K, h, 1) and (N, K, 1, w).
    quarters = node("Constant", [], "quarters", value_ints=[1, 1, 1, 1])
    node("Split", ["boxes", quarters], "corners", outputs=["x1", "y1", "x2", "y2"], axis=2)
    for low, high, axis, attribute in (
        ("y1", "y2", 2, "network_height"),
        ("x1", "x2", 3, "network_width"),
    ):
        side = node("Shape", ["prototypes"], f"side_{axis}", start=axis, end=axis + 1)
        samples = node("Cast", [side], f"samples_{axis}", to=TensorProto.FLOAT)
        write.attribute(attribute)
        network = node("Cast", [attribute], f"network_{axis}", to=TensorProto.FLOAT)
        ends = []
        for corner in (low, high):
            node("Mul", [corner, samples], f"{corner}_times")
            ends.append(node("Div", [f"{corner}_times", network], f"{corner}_sample"))
        first, second = ends
        # Where, not Min and Max: a comparison with a NaN says no, and such a box must be empty.
        # Less, not Greater, which says yes to a NaN in OpenVINO.
        node("Less", [first, second], f"ordered_{axis}")
        node("Where", [f"ordered_{axis}", first, second], f"least_{axis}")
        node("Where", [f"ordered_{axis}", second, first], f"most_{axis}")
        node("Sub", [f"least_{axis}", number(1.0)], f"from_{axis}")
        node("Add", [f"most_{axis}", number(1.0)], f"to_{axis}")
        end = node("Squeeze", [side, vector(0)], f"end_{axis}")
        node("Range", [write.integer(0), end, write.integer(1)], f"range_{axis}")
        node("Cast", [f"range_{axis}"], f"position_{axis}", to=TensorProto.FLOAT)
        node("LessOrEqual", [f"from_{axis}", f"position_{axis}"], f"after_{axis}")
        node("Less", [f"position_{axis}", f"to_{axis}"], f"before_{axis}")
        node("And", [f"after_{axis}", f"before_{axis}"], f"along_{axis}")
        node("Unsqueeze", [f"along_{axis}", vector(5 - axis)], f"inside_{axis}")
    node("And", ["inside_2", "inside_3"], "inside")

    node("Shape", ["coefficients"], "capacity", start=1, end=2)
    node("Squeeze", ["capacity", vector(0)], "rows_end")
    node("Range", [write.integer(0), "rows_end", write.integer(1)], "rows")
    node("Cast", ["rows"], "row", to=TensorProto.INT32)
    node("Unsqueeze", ["count", vector(1)], "rows_wanted")
    node("Less", ["row", "rows_wanted"], "row_is_wanted")
    tail = node("Constant", [], "tail", value_ints=[2, 3])
    node("Unsqueeze", ["row_is_wanted", tail], "wanted")
    node("And", ["inside", "wanted"], "shown")
    # A logit that is no number is not above zero, nor at it.
    node("LessOrEqual", [number(0.0), "probability"], "is_number")
    node("And", ["shown", "is_number"], "seen")
    node("Where", ["seen", "levels", number(0.0)], "seen_levels")
    node("Cast", ["seen_levels"], "masks", to=TensorProto.INT32)
    return helper.make_function(
        _DOMAIN,
        MASK_ASSEMBLY,
        ["prototypes", "coefficients", "boxes", "count"],
        ["masks"],
        write.nodes,
        [helper.make_opsetid("", opset)],
        attributes=["network_height", "network_width"],
    )


class _FunctionWriter:
    """Collects the nodes of a function body; constants become nodes, once each."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._made: set[str] = set()

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        **attributes: int | float | Sequence[int],
    ) -> str:
        """Adds a node; returns the name of its first output."""
        names = list(outputs) or [name]
        self.nodes.append(_node(op_type, inputs, names, name, attributes))
        return names[0]

    def attribute(self, name: str) -> None:
        """Makes the function's integer attribute ``name`` an int64 scalar of that name."""
        constant = helper.make_node("Constant", [], [name], name)
        reference = onnx.AttributeProto()
        reference.name = "value_int"
        reference.type = onnx.AttributeProto.INT
        reference.ref_attr_name = name
        constant.attribute.append(reference)
        self.nodes.append(constant)

    def vector(self, value: int) -> str:
        """An int64 tensor (1,)."""
        return self._constant(f"vector_{value}".replace("-", "minus_"), "value_ints", [value])

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self._constant(f"integer_{value}", "value_int", value)

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self._constant(f"number_{value}".replace(".", "_"), "value_float", value)

    def _constant(self, name: str, attribute: str, value: int | float | Sequence[int]) -> str:
        if name not in self._made:
            self._made.add(name)
            self.nodes.append(_node("Constant", [], [name], name, {attribute: value}))
        return name
