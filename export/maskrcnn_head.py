"""Mask R-CNN's second half as an ONNX graph: pyramid and raw proposals to boxes, classes and masks.

Everything has a static shape and is a standard operator, except ``EdgeSegPyramidRoiAlign``, which
carries a body of standard operators. There is no NonZero, NonMaxSuppression or Loop, and no TopK
beyond 3840, which is TensorRT's limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeseg.errors import RequestError
from edgeseg.export.instance import Detections, GraphWriter, append_instance_outputs
from edgeseg.export.models.boxes import LARGEST_LOG
from edgeseg.export.models.proposals import PLAIN_WEIGHTS, ProposalRules
from edgeseg.export.models.roiheads import (
    BOX_BINS,
    BOX_WEIGHTS,
    MASK_BINS,
    SAMPLING_RATIO,
    SCALES,
    DetectionRules,
)
from edgeseg.spec import ModelSpec

__all__ = ["PYRAMID_ROI_ALIGN", "append_maskrcnn_head", "pyramid_roi_align_function"]

#: op type of the pooling of boxes from a pyramid (domain ``edgeseg``)
PYRAMID_ROI_ALIGN = "EdgeSegPyramidRoiAlign"

_DOMAIN = "edgeseg"
# Everything that is no weight of the network begins with this.
_OURS = "edgeseg.head."
_OPSET = 18
_MOST = 3840
# Probabilities are 0 to 1, so this marks what is no box.
_NONE = -1.0
_CANONICAL_SIZE, _CANONICAL_LEVEL, _FIRST_LEVEL = 224.0, 4, 2
# Rounds of suppression. A round settles at least one more box of every chain in which each would
# remove the next; the result is that of greedy suppression unless a chain is longer than this.
_ROUNDS = 32


@dataclass(frozen=True)
class _Ranked:
    """Names of boxes in order of score, (groups, ranks, 4), and of scores, -1 for none."""

    boxes: str
    scores: str
    groups: int
    ranks: int


def append_maskrcnn_head(
    graph: onnx.GraphProto,
    anchors: Sequence[NDArray[np.float32]],
    weights: Mapping[str, NDArray[np.float32]],
    spec: ModelSpec,
    proposal_rules: ProposalRules,
    detection_rules: DetectionRules,
) -> list[onnx.FunctionProto]:
    """Makes ``graph``, which ends with pyramid and raw proposals, keep the instance contract.

    Its outputs are, in order: the pooled levels (1, channels, h, w); objectness logits (1, 3, h, w)
    of every level; box deltas (1, 12, h, w) of every level. ``anchors`` (h * w * 3, 4) of every
    level in pixels; ``weights``: state_dict of the heads, whose arrays become initializers of the
    same names. Returns the body of ``EdgeSegPyramidRoiAlign``.

    RequestError where a rule asks for a longer TopK than engines have.
    """
    for name, value in (
        ("proposals of a level", proposal_rules.per_level),
        ("proposals", proposal_rules.total),
        ("candidates", detection_rules.candidates),
        ("capacity", spec.capacity),
    ):
        if not 1 <= value <= _MOST:
            raise RequestError(f"{name}: 1 to {_MOST} can be exported, and {value} came")
    outputs = [output.name for output in graph.output]
    levels = outputs[: len(SCALES)]
    logits = outputs[len(SCALES) : len(SCALES) + len(anchors)]
    deltas = outputs[len(SCALES) + len(anchors) :]
    write = GraphWriter(graph, _OURS)
    _shared_constants(write, spec)
    _add_weights(graph, weights)

    ranked = _ranked_anchors(write, logits, deltas, anchors, proposal_rules)
    survivors = _survivors(write, ranked, proposal_rules.overlap, "proposal")
    total = min(proposal_rules.total, ranked.groups * ranked.ranks)
    proposal_scores, place = _best(
        write, survivors, ranked.groups * ranked.ranks, total, "proposals"
    )
    flat = write.node(
        "Reshape", [ranked.boxes, write.integers([-1, 4], "proposal_rows")], "proposal_boxes"
    )
    proposals = write.node("Gather", [flat, place], "proposals", axis=0)

    found = _detections(write, levels, proposals, proposal_scores, total, spec, detection_rules)
    masks = _masks(write, levels, spec)
    append_instance_outputs(graph, spec, found, masks)
    return [pyramid_roi_align_function()]


def _shared_constants(write: GraphWriter, spec: ModelSpec) -> None:
    write.number(0.0, "zero")
    write.number(0.5, "half")
    write.number(_NONE, "none")
    write.number(_NONE / 2, "half_none")
    write.number(LARGEST_LOG, "largest_log")
    write.integers([-1], "flat")
    write.integers([0], "front")
    write.integers([1], "second")
    write.integers([-1], "last")
    write.integers([2, 2], "halves")
    limits = np.array([spec.width, spec.height, spec.width, spec.height], np.float32)
    write.constant(limits, "limits")
    write.constant(np.array(0, np.int32), "int32_zero")


def _add_weights(graph: onnx.GraphProto, weights: Mapping[str, NDArray[np.float32]]) -> None:
    graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in weights.items())


def _ranked_anchors(
    write: GraphWriter,
    logits: Sequence[str],
    deltas: Sequence[str],
    anchors: Sequence[NDArray[np.float32]],
    rules: ProposalRules,
) -> _Ranked:
    """The best anchors of every level, decoded and clipped; shorter levels are filled up."""
    ranks = min(rules.per_level, max(len(rows) for rows in anchors))
    all_boxes, all_scores = [], []
    for index, (logit, delta, rows) in enumerate(zip(logits, deltas, anchors, strict=True)):
        name = f"_{index}"
        count = min(ranks, len(rows))
        planes = write.node("Transpose", [logit], f"objectness_last{name}", perm=[0, 2, 3, 1])
        planes = write.node("Reshape", [planes, f"{_OURS}flat"], f"objectness{name}")
        write.node(
            "TopK",
            [planes, write.integers([count], f"anchors_kept{name}")],
            f"best_anchors{name}",
            outputs=(f"anchor_logit{name}", f"anchor{name}"),
        )
        chosen = f"{_OURS}anchor{name}"
        # (1, 3 * 4, h, w) -> (h * w * 3, 4), the order of the anchors.
        planes = write.node("Transpose", [delta], f"deltas_last{name}", perm=[0, 2, 3, 1])
        planes = write.node(
            "Reshape", [planes, write.integers([-1, 4], f"deltas_shape{name}")], f"deltas{name}"
        )
        part = write.node("Gather", [planes, chosen], f"chosen_deltas{name}", axis=0)
        origin = write.node(
            "Gather",
            [write.constant(rows, f"anchors{name}"), chosen],
            f"chosen_anchors{name}",
            axis=0,
        )
        boxes = _decoded(write, part, origin, PLAIN_WEIGHTS, f"anchor{name}")
        scores = write.node("Sigmoid", [f"{_OURS}anchor_logit{name}"], f"anchor_score{name}")
        large = _is_large(write, boxes, rules.smallest, f"anchor{name}")
        scores = write.node("Where", [large, scores, f"{_OURS}none"], f"level_scores{name}")
        missing = ranks - count
        if missing:
            scores = write.node(
                "Pad",
                [scores, write.integers([0, missing], f"score_pads{name}"), f"{_OURS}none"],
                f"padded_scores{name}",
            )
            boxes = write.node(
                "Pad",
                [boxes, write.integers([0, 0, missing, 0], f"box_pads{name}"), f"{_OURS}zero"],
                f"padded_boxes{name}",
            )
        all_boxes.append(write.node("Unsqueeze", [boxes, f"{_OURS}front"], f"level_boxes{name}"))
        all_scores.append(write.node("Unsqueeze", [scores, f"{_OURS}front"], f"level_row{name}"))
    return _Ranked(
        write.node("Concat", all_boxes, "ranked_boxes", axis=0),
        write.node("Concat", all_scores, "ranked_scores", axis=0),
        len(anchors),
        ranks,
    )


def _decoded(
    write: GraphWriter, deltas: str, origin: str, weights: Sequence[float], name: str
) -> str:
    """``models.boxes.decoded`` and ``clipped``: (..., 4) each."""
    axis = -1
    scale = write.constant(np.array(weights, np.float32), f"{name}_weights")
    scaled = write.node("Div", [deltas, scale], f"{name}_steps")
    write.node(
        "Split",
        [scaled, f"{_OURS}halves"],
        f"{name}_step_parts",
        outputs=(f"{name}_shift", f"{name}_growth"),
        axis=axis,
    )
    write.node(
        "Split",
        [origin, f"{_OURS}halves"],
        f"{name}_corners",
        outputs=(f"{name}_low", f"{name}_high"),
        axis=axis,
    )
    low, high = f"{_OURS}{name}_low", f"{_OURS}{name}_high"
    size = write.node("Sub", [high, low], f"{name}_size")
    half = write.node("Mul", [size, f"{_OURS}half"], f"{name}_half_size")
    centre = write.node("Add", [low, half], f"{name}_centre")
    shift = write.node("Mul", [f"{_OURS}{name}_shift", size], f"{name}_shift_by")
    centre = write.node("Add", [shift, centre], f"{name}_new_centre")
    growth = write.node(
        "Min", [f"{_OURS}{name}_growth", f"{_OURS}largest_log"], f"{name}_growth_held"
    )
    growth = write.node("Exp", [growth], f"{name}_factor")
    half = write.node("Mul", [growth, size], f"{name}_new_size")
    half = write.node("Mul", [half, f"{_OURS}half"], f"{name}_new_half")
    corners = write.node(
        "Concat",
        [
            write.node("Sub", [centre, half], f"{name}_new_low"),
            write.node("Add", [centre, half], f"{name}_new_high"),
        ],
        f"{name}_new_corners",
        axis=axis,
    )
    corners = write.node("Max", [corners, f"{_OURS}zero"], f"{name}_not_below")
    return write.node("Min", [corners, f"{_OURS}limits"], f"{name}_clipped")


def _is_large(write: GraphWriter, boxes: str, smallest: float, name: str) -> str:
    """Bool (...): whether both sides of ``boxes`` (..., 4) are long enough; no for a NaN."""
    write.node(
        "Split",
        [boxes, f"{_OURS}halves"],
        f"{name}_ends",
        outputs=(f"{name}_begin", f"{name}_end"),
        axis=-1,
    )
    sides = write.node("Sub", [f"{_OURS}{name}_end", f"{_OURS}{name}_begin"], f"{name}_sides")
    shortest = write.node("ReduceMin", [sides, f"{_OURS}last"], f"{name}_shortest", keepdims=0)
    return write.node(
        "GreaterOrEqual",
        [shortest, write.number(smallest, f"{name}_smallest")],
        f"{name}_is_large",
    )


def _survivors(
    write: GraphWriter, ranked: _Ranked, overlap: float, name: str, labels: str = ""
) -> str:
    """``ranked.scores``, and -1 where greedy suppression removes the box.

    ``labels`` (groups, ranks): boxes with different ones don't compete.
    """
    groups, ranks = ranked.groups, ranked.ranks
    columns = write.integers([groups, 1, ranks], f"{name}_column_shape")
    ones = write.integers([1, 1, 1, 1], f"{name}_quarters")
    sides = ("left", "top", "right", "bottom")
    write.node(
        "Split",
        [ranked.boxes, ones],
        f"{name}_box_sides",
        outputs=[f"{name}_{side}_rows" for side in sides],
        axis=2,
    )
    first = {side: f"{_OURS}{name}_{side}_rows" for side in sides}
    second = {
        side: write.node("Reshape", [first[side], columns], f"{name}_{side}_columns")
        for side in sides
    }
    area = write.node(
        "Mul",
        [
            write.node("Sub", [first["right"], first["left"]], f"{name}_width"),
            write.node("Sub", [first["bottom"], first["top"]], f"{name}_height"),
        ],
        f"{name}_area",
    )
    lengths = []
    for low, high in (("left", "right"), ("top", "bottom")):
        near = write.node("Min", [first[high], second[high]], f"{name}_common_{high}")
        far = write.node("Max", [first[low], second[low]], f"{name}_common_{low}")
        length = write.node("Sub", [near, far], f"{name}_common_{low}_{high}")
        lengths.append(write.node("Relu", [length], f"{name}_overlap_{low}_{high}"))
    common = write.node("Mul", lengths, f"{name}_common")
    both = write.node(
        "Add",
        [area, write.node("Reshape", [area, columns], f"{name}_area_columns")],
        f"{name}_both",
    )
    union = write.node("Sub", [both, common], f"{name}_union")
    # common / union > overlap, without a division; boxes of no size overlap nothing.
    limit = write.node(
        "Mul", [union, write.number(overlap, f"{name}_overlap")], f"{name}_common_limit"
    )
    removes = write.node("Greater", [common, limit], f"{name}_overlaps")
    order = np.arange(ranks, dtype=np.int32)
    earlier = write.node(
        "Less",
        [
            write.constant(order.reshape(1, ranks, 1), f"{name}_rank_rows"),
            write.constant(order.reshape(1, 1, ranks), f"{name}_rank_columns"),
        ],
        f"{name}_is_earlier",
    )
    removes = write.node("And", [removes, earlier], f"{name}_would_remove")
    if labels:
        rows = write.integers([groups, ranks, 1], f"{name}_row_shape")
        same = write.node(
            "Equal",
            [
                write.node("Reshape", [labels, rows], f"{name}_label_rows"),
                write.node("Reshape", [labels, columns], f"{name}_label_columns"),
            ],
            f"{name}_same_label",
        )
        removes = write.node("And", [removes, same], f"{name}_would_remove_same")
    removes = write.node("Cast", [removes], f"{name}_removes", to=TensorProto.FLOAT)
    # What is no box is not in the way of any.
    real = write.node("Greater", [ranked.scores, f"{_OURS}half_none"], f"{name}_is_box")
    alive = write.node("Reshape", [real, columns], f"{name}_alive")
    boxes = alive
    for turn in range(_ROUNDS):
        kept = write.node("Cast", [alive], f"{name}_kept_{turn}", to=TensorProto.FLOAT)
        hits = write.node("MatMul", [kept, removes], f"{name}_hits_{turn}")
        free = write.node("Less", [hits, f"{_OURS}half"], f"{name}_free_{turn}")
        alive = write.node("And", [free, boxes], f"{name}_alive_{turn}")
    alive = write.node(
        "Reshape", [alive, write.integers([groups, ranks], f"{name}_flags_shape")], f"{name}_flags"
    )
    return write.node("Where", [alive, ranked.scores, f"{_OURS}none"], f"{name}_survivors")


def _best(write: GraphWriter, scores: str, count: int, kept: int, name: str) -> tuple[str, str]:
    """The ``kept`` best of ``scores``, of any shape with ``count`` entries, and their places."""
    flat = write.node("Reshape", [scores, write.integers([count], f"{name}_count")], f"{name}_flat")
    write.node(
        "TopK",
        [flat, write.integers([kept], f"{name}_kept")],
        f"best_{name}",
        outputs=(f"{name}_score", f"{name}_place"),
    )
    return f"{_OURS}{name}_score", f"{_OURS}{name}_place"


def _pooled(
    write: GraphWriter, levels: Sequence[str], boxes: str, count: int, bins: int, name: str
) -> str:
    """Regions (count, channels, bins, bins) of ``boxes`` (count, 4)."""
    image_of = write.constant(np.zeros(count, np.int32), f"{name}_image_of")
    pooled = f"{_OURS}{name}_pooled"
    write.graph.node.append(
        helper.make_node(
            PYRAMID_ROI_ALIGN,
            [boxes, image_of, *levels],
            [pooled],
            f"{_OURS}{name}_pool",
            domain=_DOMAIN,
            output_height=bins,
            output_width=bins,
            sampling_ratio=SAMPLING_RATIO,
            aligned=0,
            scales=list(SCALES),
            canonical_size=_CANONICAL_SIZE,
            canonical_level=_CANONICAL_LEVEL,
            first_level=_FIRST_LEVEL,
        )
    )
    return pooled


def _linear(write: GraphWriter, x: str, key: str) -> str:
    return write.node("Gemm", [x, f"{key}.weight", f"{key}.bias"], key, transB=1)


def _detections(
    write: GraphWriter,
    levels: Sequence[str],
    proposals: str,
    proposal_scores: str,
    total: int,
    spec: ModelSpec,
    rules: DetectionRules,
) -> Detections:
    """Box head on ``proposals`` (total, 4), and what is left of its boxes."""
    classes = len(spec.classes)
    x = _pooled(write, levels, proposals, total, BOX_BINS, "box")
    x = write.node("Flatten", [x], "region_rows", axis=1)
    for layer in ("fc6", "fc7"):
        x = _linear(write, x, f"roi_heads.box_head.{layer}")
        x = write.node("Relu", [x], f"{layer}_relu")
    odds = write.node(
        "Softmax", [_linear(write, x, "roi_heads.box_predictor.cls_score")], "odds", axis=1
    )
    starts, ends = write.integers([1], "first_class"), write.integers([classes + 1], "end_class")
    scores = write.node("Slice", [odds, starts, ends, f"{_OURS}second"], "class_scores")
    deltas = _linear(write, x, "roi_heads.box_predictor.bbox_pred")
    deltas = write.node(
        "Reshape", [deltas, write.integers([total, classes + 1, 4], "class_shape")], "class_deltas"
    )
    deltas = write.node("Slice", [deltas, starts, ends, f"{_OURS}second"], "foreground_deltas")
    origin = write.node("Unsqueeze", [proposals, f"{_OURS}second"], "proposal_origin")
    boxes = _decoded(write, deltas, origin, BOX_WEIGHTS, "region")
    large = _is_large(write, boxes, rules.smallest, "region")
    above = write.node("Greater", [scores, write.number(rules.score, "least_score")], "is_sure")
    real = write.node("Greater", [proposal_scores, f"{_OURS}half_none"], "proposal_is_real")
    real = write.node("Unsqueeze", [real, f"{_OURS}second"], "proposal_rows_real")
    usable = write.node("And", [write.node("And", [large, above], "is_good"), real], "is_usable")
    scores = write.node("Where", [usable, scores, f"{_OURS}none"], "usable_scores")

    pairs = total * classes
    count = min(rules.candidates, pairs)
    candidate_scores, pair = _best(write, scores, pairs, count, "candidates")
    flat = write.node("Reshape", [boxes, write.integers([pairs, 4], "pair_shape")], "pair_boxes")
    boxes = write.node("Gather", [flat, pair], "candidate_boxes", axis=0)
    label = write.node("Mod", [pair, write.integers([classes], "classes")], "candidate_labels")
    ranked = _Ranked(
        write.node("Unsqueeze", [boxes, f"{_OURS}front"], "candidate_group"),
        write.node("Unsqueeze", [candidate_scores, f"{_OURS}front"], "candidate_group_scores"),
        1,
        count,
    )
    survivors = _survivors(write, ranked, rules.overlap, "candidate", label)
    written = min(spec.capacity, count)
    score, place = _best(write, survivors, count, written, "finals")
    boxes = write.node("Gather", [boxes, place], "final_boxes", axis=0)
    label = write.node("Gather", [label, place], "final_labels", axis=0)
    label = write.node("Cast", [label], "final_label", to=TensorProto.INT32)
    missing = spec.capacity - written
    if missing:
        row = write.integers([0, missing], "final_pads")
        score = write.node("Pad", [score, row, f"{_OURS}none"], "all_scores")
        label = write.node("Pad", [label, row, f"{_OURS}int32_zero"], "all_labels")
        wide = write.integers([0, 0, missing, 0], "final_box_pads")
        boxes = write.node("Pad", [boxes, wide, f"{_OURS}zero"], "all_boxes")
    real = write.node("Greater", [score, f"{_OURS}half_none"], "is_real")
    rows = write.node("Unsqueeze", [real, f"{_OURS}second"], "real_rows")
    boxes = write.node("Where", [rows, boxes, f"{_OURS}zero"], "real_boxes")
    score = write.node("Where", [real, score, f"{_OURS}zero"], "real_scores")
    label = write.node("Where", [real, label, f"{_OURS}int32_zero"], "real_labels")
    ones = write.node("Cast", [real], "real_ones", to=TensorProto.INT32)
    return Detections(
        boxes=write.node("Unsqueeze", [boxes, f"{_OURS}front"], "batch_boxes"),
        scores=write.node("Unsqueeze", [score, f"{_OURS}front"], "batch_scores"),
        labels=write.node("Unsqueeze", [label, f"{_OURS}front"], "batch_labels"),
        count=write.node("ReduceSum", [ones, f"{_OURS}front"], "count", keepdims=1),
        sources=place,
    )


def _masks(write: GraphWriter, levels: Sequence[str], spec: ModelSpec) -> str:
    """Levels int32 (1, capacity, 28, 28) of the masks of the predicted classes."""
    capacity, classes = spec.capacity, len(spec.classes)
    x = _pooled(write, levels, f"{_OURS}real_boxes", capacity, MASK_BINS, "mask")
    for index in range(4):
        key = f"roi_heads.mask_head.{index}.0"
        x = write.node(
            "Conv", [x, f"{key}.weight", f"{key}.bias"], key, pads=[1, 1, 1, 1], kernel_shape=[3, 3]
        )
        x = write.node("Relu", [x], f"mask_relu_{index}")
    key = "roi_heads.mask_predictor.conv5_mask"
    x = write.node(
        "ConvTranspose",
        [x, f"{key}.weight", f"{key}.bias"],
        key,
        strides=[2, 2],
        kernel_shape=[2, 2],
    )
    x = write.node("Relu", [x], "mask_relu_5")
    key = "roi_heads.mask_predictor.mask_fcn_logits"
    logits = write.node("Conv", [x, f"{key}.weight", f"{key}.bias"], key, kernel_shape=[1, 1])
    grid = [spec.mask_height, spec.mask_width]
    rows = write.node(
        "Reshape",
        [logits, write.integers([capacity * (classes + 1), *grid], "mask_rows_shape")],
        "mask_rows",
    )
    # Row r of class label + 1: the background has a mask as well.
    first = write.constant(
        np.arange(capacity, dtype=np.int32) * (classes + 1) + 1, "first_mask_of_row"
    )
    chosen = write.node("Add", [f"{_OURS}real_labels", first], "mask_of_row")
    logits = write.node("Gather", [rows, chosen], "chosen_masks", axis=0)
    levels_of = write.node("Sigmoid", [logits], "mask_probability")
    levels_of = write.node("Mul", [levels_of, write.number(255.0, "full")], "mask_scaled")
    levels_of = write.node("Add", [levels_of, f"{_OURS}half"], "mask_raised")
    levels_of = write.node("Floor", [levels_of], "mask_levels")
    wanted = write.node(
        "Unsqueeze", [f"{_OURS}is_real", write.integers([1, 2], "mask_axes")], "mask_is_wanted"
    )
    levels_of = write.node("Where", [wanted, levels_of, f"{_OURS}zero"], "wanted_masks")
    levels_of = write.node("Unsqueeze", [levels_of, f"{_OURS}front"], "batch_masks")
    return write.node("Cast", [levels_of], "masks", to=TensorProto.INT32)


def pyramid_roi_align_function() -> onnx.FunctionProto:
    """``EdgeSegPyramidRoiAlign`` in standard operators, for this network's pyramid.

    ``boxes`` float32 (R, 4) xyxy in pixels, ``image_of`` int32 (R,), four levels float32 (N,
    channels, h, w), the finest first -> ``pooled`` float32 (R, channels, output_height,
    output_width). Every level pools every box, and a Where chooses: shapes stay static. The
    attributes ``scales``, ``aligned``, ``canonical_size``, ``canonical_level`` and ``first_level``
    speak to the compiled kernels; this body is written for one value of each.
    """
    levels = [f"level_{index}" for index in range(len(SCALES))]
    nodes = [
        helper.make_node("Cast", ["image_of"], ["images"], "images", to=TensorProto.INT64),
        helper.make_node("Constant", [], ["quarters"], "quarters", value_ints=[1, 1, 1, 1]),
        helper.make_node(
            "Split", ["boxes", "quarters"], ["x1", "y1", "x2", "y2"], "corners", axis=1
        ),
        helper.make_node("Sub", ["x2", "x1"], ["width"], "width"),
        helper.make_node("Sub", ["y2", "y1"], ["height"], "height"),
        helper.make_node("Mul", ["width", "height"], ["area"], "area"),
        helper.make_node("Sqrt", ["area"], ["side"], "side"),
        helper.make_node("Constant", [], ["bin_axes"], "bin_axes", value_ints=[2, 3]),
        helper.make_node("Unsqueeze", ["side", "bin_axes"], ["box_side"], "box_side"),
    ]
    chosen = ""
    for index, (level, scale) in enumerate(zip(levels, SCALES, strict=True)):
        pool = helper.make_node(
            "RoiAlign",
            [level, "boxes", "images"],
            [f"pooled_{index}"],
            f"pool_{index}",
            coordinate_transformation_mode="output_half_pixel",
            mode="avg",
            spatial_scale=scale,
        )
        for attribute in ("output_height", "output_width", "sampling_ratio"):
            reference = onnx.AttributeProto()
            reference.name = attribute
            reference.type = onnx.AttributeProto.INT
            reference.ref_attr_name = attribute
            pool.attribute.append(reference)
        nodes.append(pool)
        if not index:
            chosen = "pooled_0"
            continue
        # floor(4 + log2(side / 224) + 1e-6) is at least this level.
        least = _CANONICAL_SIZE * 2.0 ** (_FIRST_LEVEL + index - _CANONICAL_LEVEL - 1e-6)
        last = index == len(levels) - 1
        nodes += [
            helper.make_node(
                "Constant", [], [f"least_{index}"], f"least_{index}", value_float=least
            ),
            helper.make_node(
                "GreaterOrEqual", ["box_side", f"least_{index}"], [f"is_{index}"], f"is_{index}"
            ),
            helper.make_node(
                "Where",
                [f"is_{index}", f"pooled_{index}", chosen],
                ["pooled" if last else f"chosen_{index}"],
                f"choose_{index}",
            ),
        ]
        chosen = f"chosen_{index}"
    return helper.make_function(
        _DOMAIN,
        PYRAMID_ROI_ALIGN,
        ["boxes", "image_of", *levels],
        ["pooled"],
        nodes,
        [helper.make_opsetid("", _OPSET)],
        attributes=[
            "output_height",
            "output_width",
            "sampling_ratio",
            "aligned",
            "scales",
            "canonical_size",
            "canonical_level",
            "first_level",
        ],
    )
