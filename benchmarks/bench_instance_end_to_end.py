"""Frame to finished instances: YOLACT on EdgeSeg's engines, and a plain PyTorch loop.

Compared, round by round in one process, on the same frames of 720x1280, the same weights and the
same number of threads:

- EdgeSeg, fp32 and INT8, on each CPU engine: resizing, network, decoding, Fast NMS, mask assembly,
  and masks at frame size as packed bits, one frame after the other
- PyTorch eager: the same job as a user writes it with OpenCV and torch: resize, RGB, normalise,
  ``network(x)``, decoding, Fast NMS per class, prototypes times coefficients, sigmoid, crop, masks
  enlarged to the frame, threshold; one byte per pixel in the end

Frames lie in memory: reading a camera or a file is in neither. The network is YOLACT over ResNet-50
with 80 classes at 550x550 (arXiv 1904.02689), its weights seeded random numbers; the last layers
are scaled, and the background's bias chosen, so that about 150 priors of a frame are candidates, as
in a busy street. YOLACT then nearly always fills what it may give, here 50 instances. Random masks
have longer borders than those of a trained network, which is the harder case for EdgeSeg. INT8 is
calibrated on other frames of the same kind; that it finds other instances than fp32 says little,
since those of random weights are the outliers of noise. What INT8 costs in accuracy is measured on
trained models, by `edgeseg quantize --data`.

Post-processing is what comes behind the raw heads: the head in the graph (decoding, NMS), timed by
itself on the same engine; the assembly of the masks; the masks at frame size. Its share is of the
whole frame's time in the same round.

    python benchmarks/bench_instance_end_to_end.py [--rounds 15] [--frames 4] [--threads N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from rounds import (
    Spread,
    add_output_arguments,
    in_turn,
    machine,
    ratio,
    say,
    write_json,
)
from torch import Tensor, nn
from torch.nn import functional

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.calibration.agreement import partners
from edgeseg.calibration.calibrate import calibrate
from edgeseg.calibration.recipe import QuantizationRecipe
from edgeseg.classes import COCO
from edgeseg.engine import Engine, available_engines, open_engine
from edgeseg.export.instance import append_yolact_head
from edgeseg.export.models import create, definition
from edgeseg.export.models.yolact import Yolact
from edgeseg.export.onnx import export_network
from edgeseg.frame import Frame, Pixels
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.onnxfile import OnnxFile
from edgeseg.result import result_of
from edgeseg.spec import ModelSpec
from edgeseg.synthetic import Street

ARCHITECTURE = "yolact_resnet50"
CLASSIFIER = "prediction_layers.0.conf_layer"
PACKAGES = ("edgeseg", "openvino", "onnxruntime", "torch", "opencv-python", "numpy")
FRAME, NETWORK = (720, 1280), 550
QUICK_FRAME, QUICK_NETWORK = (90, 160), 138
CAPACITY = 50
# What logits and box regression vary by, and how many priors the bias of the background leaves.
LOGIT_SPREAD, LOC_SPREAD = 2.0, 0.5
WANTED_CANDIDATES = 150
CALIBRATION_FRAMES = 24
OF_EAGER_TARGET = 2.0
POST_TARGET = 0.1


@dataclass(frozen=True)
class Run:
    """Milliseconds of one frame, means of a round: the whole, and the parts behind the raw heads
    that the frame's own clock sees (``assembly``, ``frame_masks``)."""

    total: float
    assembly: float = 0.0
    frame_masks: float = 0.0


@dataclass(frozen=True)
class Row:
    """One engine in one precision."""

    engine: str
    precision: str
    description: str
    instances: float
    same_as_eager: float
    total_ms: Spread
    eager_ms: Spread
    of_eager: Spread
    post_share: Spread
    graph_head_ms: Spread
    assembly_ms: Spread
    frame_masks_ms: Spread

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            name: value.to_dict() if isinstance(value, Spread) else value
            for name, value in vars(self).items()
        }


def streets(size: tuple[int, int], seeds: Sequence[int]) -> list[Pixels]:
    """A frame of each street."""
    return [Street(*size, seed=seed).frame(20).pixels for seed in seeds]


def network_input(pixels: Pixels, side: int) -> Tensor:
    """(1, 3, side, side) normalised, as a user makes it."""
    preprocessing = definition(ARCHITECTURE).preprocessing
    rgb = cv2.cvtColor(cv2.resize(pixels, (side, side)), cv2.COLOR_BGR2RGB)
    x = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0).float().contiguous() / 255
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    return (x - mean) / torch.tensor(preprocessing.std).view(1, 3, 1, 1)


@torch.no_grad()
def busy_network(frames: Sequence[Pixels], side: int) -> Yolact:
    """YOLACT with seeded weights and about ``WANTED_CANDIDATES`` priors above its threshold.

    Batch norms take their statistics from the frames, as training would have left them, and the
    last layers are scaled to what those of a trained network give.
    """
    torch.manual_seed(0)
    network = create(ARCHITECTURE, len(COCO.names) + 1).eval()
    assert isinstance(network, Yolact)
    inputs = torch.cat([network_input(pixels, side) for pixels in frames])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.backbone.train()
    network.backbone(inputs)
    network.eval()
    heads = network(inputs)
    for name, spread, wanted in (
        ("prediction_layers.0.bbox_layer", heads["loc"].std(), LOC_SPREAD),
        (
            "prediction_layers.0.mask_layer",
            torch.atanh(heads["mask"].clamp(-0.999, 0.999)).std(),
            1.0,
        ),
        (CLASSIFIER, heads["conf"].std(dim=(0, 1)).repeat(3), LOGIT_SPREAD),
        ("proto_net.10", heads["proto"].std(), 1.0),
    ):
        weight, bias = parameters_of(network, name)
        gain = (wanted / spread.clamp(min=1e-6)).expand(len(bias))
        weight.mul_(gain[:, None, None, None])
        bias.mul_(gain)
    # Each class is as likely as any other before anything is seen.
    _, bias = parameters_of(network, CLASSIFIER)
    bias.sub_(network(inputs)["conf"].mean(dim=(0, 1)).repeat(3))
    heads = network(inputs)
    threshold = network.selection.score_threshold

    def candidates(bias: float) -> float:
        shifted = heads["conf"].clone()
        shifted[..., 0] += bias
        best = torch.softmax(shifted, dim=2)[..., 1:].amax(dim=2)
        return float((best > threshold).sum()) / len(frames)

    low, high = 0.0, 40.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if candidates(middle) > WANTED_CANDIDATES else (low, middle)
    bias.view(-1, network.num_classes)[:, 0] += low
    return network


def parameters_of(network: Yolact, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution."""
    found = dict(network.named_parameters())
    return found[f"{name}.weight"], found[f"{name}.bias"]


class EagerLoop:
    """The job as a user writes it with OpenCV and torch, with YOLACT's own settings."""

    def __init__(self, network: Yolact, side: int) -> None:
        self._network = network
        self._side = side
        self._selection = replace(network.selection, capacity=CAPACITY)

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> tuple[Tensor, Tensor, Tensor, NDArray[np.bool_]]:
        """Boxes (n, 4) relative, scores, labels, and masks (n, height, width) of the frame."""
        heads = self._network(network_input(pixels, self._side))
        boxes, scores, labels, coefficients = self._detections(heads)
        height, width = pixels.shape[:2]
        if not len(boxes):
            return boxes, scores, labels, np.zeros((0, height, width), np.bool_)
        masks = _cropped(torch.sigmoid(heads["proto"][0] @ coefficients.T), boxes)
        masks = functional.interpolate(
            masks[None], (height, width), mode="bilinear", align_corners=False
        )[0]
        return boxes, scores, labels, (masks > 0.5).numpy()

    def _detections(self, heads: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fast NMS over all classes at once: a matrix of overlaps for each."""
        chosen = self._selection
        probabilities = torch.softmax(heads["conf"][0], dim=1)[:, 1:].T
        keep = probabilities.max(dim=0).values > chosen.score_threshold
        probabilities = probabilities[:, keep]
        loc, priors = heads["loc"][0][keep], heads["priors"][keep]
        centres = priors[:, :2] + loc[:, :2] * 0.1 * priors[:, 2:]
        sizes = priors[:, 2:] * torch.exp(loc[:, 2:] * 0.2)
        boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
        coefficients = heads["mask"][0][keep]
        ranked, order = probabilities.sort(dim=1, descending=True)
        ranked, order = ranked[:, : chosen.per_class], order[:, : chosen.per_class]
        candidates = boxes[order]
        low = torch.maximum(candidates[:, :, None, :2], candidates[:, None, :, :2])
        high = torch.minimum(candidates[:, :, None, 2:], candidates[:, None, :, 2:])
        common = (high - low).clamp(min=0).prod(dim=3)
        areas = (candidates[..., 2:] - candidates[..., :2]).prod(dim=2)
        overlaps = common / (areas[:, :, None] + areas[:, None, :] - common)
        worst = overlaps.triu(diagonal=1).max(dim=1).values if ranked.shape[1] else ranked
        # As YOLACT does it: a candidate is one of every class that nothing better overlaps.
        alive = worst <= chosen.iou_threshold
        labels = torch.arange(len(ranked))[:, None].expand_as(ranked)[alive]
        rows, scores = order[alive], ranked[alive]
        best = scores.argsort(descending=True)[: chosen.capacity]
        return boxes[rows[best]], scores[best], labels[best], coefficients[rows[best]]


def _cropped(masks: Tensor, boxes: Tensor) -> Tensor:
    """(n, h, w) of masks (h, w, n), zero outside of the boxes widened by one sample."""
    height, width = masks.shape[:2]
    x1, y1, x2, y2 = (boxes * boxes.new_tensor([width, height, width, height])).T
    x = torch.arange(width)[None, :, None]
    y = torch.arange(height)[:, None, None]
    inside = (x >= x1 - 1) & (x < x2 + 1) & (y >= y1 - 1) & (y < y2 + 1)
    cropped: Tensor = masks * inside
    return cropped.permute(2, 0, 1)


def spec_for(network: Yolact, side: int) -> ModelSpec:
    """The contract of the exported graph."""
    height, width = network.mask_size(side, side)
    return ModelSpec(
        name="bench",
        architecture=ARCHITECTURE,
        task="instance",
        height=side,
        width=side,
        classes=COCO.names,
        colours=COCO.colours,
        ignore=COCO.ignore,
        preprocessing=definition(ARCHITECTURE).preprocessing,
        capacity=CAPACITY,
        mask_height=height,
        mask_width=width,
    )


def int8_of(bundle: Bundle, frames: Sequence[Pixels]) -> Bundle:
    """``bundle`` in INT8, calibrated with ``frames`` of network size.

    What random weights take for instances are the outliers of their noise, which any range but the
    whole one clips.
    """
    model = onnx.load_model_from_string(bundle.model.content)
    recipe = QuantizationRecipe(ranges="minmax")
    made = calibrate(model, list(frames), recipe).model()  # type: ignore[arg-type]
    helper.set_model_props(made, {entry.key: entry.value for entry in model.metadata_props})
    return replace(bundle, model=OnnxFile(made.SerializeToString(), f"{bundle.name}, INT8"))


class GraphHead:
    """The part of the graph between the raw heads and the mask assembly, by itself."""

    def __init__(self, network: Yolact, spec: ModelSpec, engine: str, threads: int) -> None:
        priors = network.priors(spec.height, spec.width).numpy()
        sides = {
            "loc": [1, len(priors), 4],
            "conf": [1, len(priors), network.num_classes],
            "mask": [1, len(priors), 32],
            "proto": [1, 32, spec.mask_height, spec.mask_width],
        }
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in sides.items()
        ]
        graph = helper.make_graph([], "head", values, values)
        selection = replace(network.selection, capacity=spec.capacity)
        functions = append_yolact_head(graph, priors, spec, selection)
        model = helper.make_model(
            graph,
            functions=functions,
            opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("edgeseg", 1)],
            ir_version=8,
        )
        content, _ = OnnxFile(model.SerializeToString(), "head").without_mask_head()
        cut = onnx.load_model_from_string(content)
        # The assembly reads the prototypes where the network leaves them.
        for values in (cut.graph.input, cut.graph.output):
            for entry in [entry for entry in values if entry.name == "proto"]:
                values.remove(entry)
        opened = _ort_run if engine == "onnxruntime" else _ov_run
        self._run = opened(cut.SerializeToString(), threads)
        self._feed: dict[str, NDArray[np.float32]] = {}

    def prepare(self, heads: Any) -> None:
        """Takes the raw heads of a frame, as the network gives them."""
        self._feed = {
            "loc": heads["loc"].numpy(),
            "conf": heads["conf"].numpy(),
            "mask": heads["mask"].numpy(),
            "proto": heads["proto"].permute(0, 3, 1, 2).contiguous().numpy(),
        }

    def milliseconds(self, turns: int) -> float:
        """Mean of ``turns`` runs."""
        started = time.perf_counter()
        for _ in range(turns):
            self._run(self._feed)
        return (time.perf_counter() - started) / turns * 1e3


def _ort_run(content: bytes, threads: int) -> Callable[[dict[str, Any]], object]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    inputs = {entry.name for entry in session.get_inputs()}
    return lambda feed: session.run(None, {k: v for k, v in feed.items() if k in inputs})


def _ov_run(content: bytes, threads: int) -> Callable[[dict[str, Any]], object]:
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    request = compiled.create_infer_request()
    inputs = {name for entry in compiled.inputs for name in entry.get_names()}

    def run(feed: dict[str, Any]) -> object:
        for name, values in feed.items():
            if name in inputs:
                request.set_tensor(name, openvino.Tensor(values, shared_memory=True))
        return request.infer()

    return run


def edgeseg_run(engine: Engine, frames: Sequence[Pixels]) -> Run:
    """From each frame to its InstanceResult, masks at frame size."""
    spec = engine.spec
    total = assembly = masks = 0
    for pixels in frames:
        started = time.perf_counter_ns()
        frame = Frame.of(pixels)
        geometry = Geometry.between(frame.height, frame.width, spec)
        outputs = engine.run(geometry.fit(frame.pixels))
        between = time.perf_counter_ns()
        result_of(outputs, frame, geometry, spec)
        finished = time.perf_counter_ns()
        total += finished - started
        assembly += outputs.head_ns
        masks += finished - between
    scale = 1e-6 / len(frames)
    return Run(total * scale, assembly * scale, masks * scale)


def eager_run(loop: EagerLoop, frames: Sequence[Pixels]) -> Run:
    """The same by PyTorch."""
    started = time.perf_counter()
    for pixels in frames:
        loop(pixels)
    return Run((time.perf_counter() - started) / len(frames) * 1e3)


def same_share(engine: Engine, loop: EagerLoop, frames: Sequence[Pixels]) -> tuple[float, float]:
    """Instances to a frame, and the share of PyTorch's that EdgeSeg has as well: the same class,
    and boxes and masks with an IoU of 0.5 or more."""
    spec = engine.spec
    counts, same, total = [], 0, 0
    for pixels in frames:
        frame = Frame.of(pixels)
        geometry = Geometry.between(frame.height, frame.width, spec)
        result = result_of(engine.run(geometry.fit(frame.pixels)), frame, geometry, spec)
        assert isinstance(result, InstanceResult)
        counts.append(len(result))
        boxes, scores, labels, masks = loop(pixels)
        sides = boxes.new_tensor([frame.width, frame.height, frame.width, frame.height])
        wanted = _outputs(boxes * sides, scores, labels, masks)
        ours = _outputs(
            torch.from_numpy(result.outputs.boxes) / spec.width * sides,
            torch.from_numpy(result.scores),
            torch.from_numpy(result.labels),
            result.masks,
        )
        same += len(partners(wanted, ours))
        total += len(scores)
    return float(np.mean(counts)), same / max(total, 1)


def _outputs(
    boxes: Tensor, scores: Tensor, labels: Tensor, masks: NDArray[np.bool_]
) -> InstanceOutputs:
    return InstanceOutputs(
        boxes=boxes.numpy(),
        scores=scores.numpy(),
        labels=labels.numpy().astype(np.int32),
        masks=masks.astype(np.uint8) * 255,
    )


def compare(options: argparse.Namespace) -> list[Row]:
    """Export, calibrate, check what comes out, then time in turn."""
    size, side = (QUICK_FRAME, QUICK_NETWORK) if options.quick else (FRAME, NETWORK)
    frames = streets(size, range(options.frames))
    network = busy_network(frames, side)
    spec = spec_for(network, side)
    geometry = Geometry.between(*size, spec)
    few = 2 if options.quick else CALIBRATION_FRAMES
    loop = EagerLoop(network, side)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        model = Path(folder) / "model.onnx"
        export_network(network, spec).write(model)
        fp32 = Bundle.open(model)
        seen = [geometry.fit(pixels) for pixels in streets(size, range(100, 100 + few))]
        bundles = {"fp32": fp32, "INT8": int8_of(fp32, seen)}
        candidates: dict[str, Callable[[], Any]] = {"eager": lambda: eager_run(loop, frames)}
        engines: dict[tuple[str, str], Engine] = {}
        agree = {}
        for name in available_engines():
            head = GraphHead(network, spec, name, options.threads)
            with torch.inference_mode():
                head.prepare(network(network_input(frames[0], side)))
            candidates[f"{name} head"] = _head(head, options.frames)
            for precision, bundle in bundles.items():
                engine = open_engine(bundle, name, threads=options.threads, check=False)
                opened.callback(engine.close)
                engines[name, precision] = engine
                agree[name, precision] = same_share(engine, loop, frames)
                candidates[f"{name} {precision}"] = _ours(engine, frames)
        for run in candidates.values():
            run()
        say(f"{options.rounds} rounds of {options.frames} frames each")
        found = in_turn(candidates, options.rounds)
    return [
        _row(engine, precision, found, agree[name, precision])
        for (name, precision), engine in engines.items()
    ]


def _ours(engine: Engine, frames: Sequence[Pixels]) -> Callable[[], Run]:
    return lambda: edgeseg_run(engine, frames)


def _head(head: GraphHead, turns: int) -> Callable[[], float]:
    return lambda: head.milliseconds(turns)


def _row(
    engine: Engine, precision: str, found: dict[str, list[Any]], agree: tuple[float, float]
) -> Row:
    ours: list[Run] = found[f"{engine.name} {precision}"]
    eager: list[Run] = found["eager"]
    heads: list[float] = found[f"{engine.name} head"]
    shares = [
        (head + run.assembly + run.frame_masks) / run.total
        for head, run in zip(heads, ours, strict=True)
    ]
    return Row(
        engine=engine.name,
        precision=precision,
        description=engine.description,
        instances=agree[0],
        same_as_eager=agree[1],
        total_ms=Spread.of(run.total for run in ours),
        eager_ms=Spread.of(run.total for run in eager),
        of_eager=ratio([run.total for run in eager], [run.total for run in ours]),
        post_share=Spread.of(shares),
        graph_head_ms=Spread.of(heads),
        assembly_ms=Spread.of(run.assembly for run in ours),
        frame_masks_ms=Spread.of(run.frame_masks for run in ours),
    )


def _print_row(row: Row) -> None:
    say(
        f"{row.engine:<12}{row.precision:<6}{row.total_ms.median:>8.1f} ms"
        f"{row.eager_ms.median:>9.1f} ms{row.of_eager.text(2):>22}"
        f"{row.post_share.median:>10.1%} ({row.post_share.low:.1%}-{row.post_share.high:.1%})"
        f"{row.instances:>7.0f}{row.same_as_eager:>9.1%}"
    )
    say(
        f"{'':<18}post-processing, ms: head in the graph {row.graph_head_ms.text(2)}, assembly "
        f"{row.assembly_ms.text(2)}, masks of the frame {row.frame_masks_ms.text(2)}"
    )


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="alternated rounds")
    parser.add_argument("--frames", type=int, default=4, help="frames per round and candidate")
    parser.add_argument(
        "--threads", type=int, default=kernels.available_cores(), help="for all (all cores)"
    )
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.frames = 1, 2
    torch.set_num_threads(options.threads)
    rows = compare(options)
    say(
        f"{'engine':<12}{'':<6}{'a frame':>11}{'eager':>12}{'of PyTorch eager':>22}"
        f"{'post-processing':>24}{'found':>7}{'as eager':>9}"
    )
    for row in rows:
        _print_row(row)
    say(
        f"Targets: of PyTorch eager >= {OF_EAGER_TARGET}, post-processing <= {POST_TARGET:.0%} of "
        "the frame. Median over the rounds, smallest and largest in brackets."
    )
    write_json(
        options.json,
        {
            "benchmark": "instance_end_to_end",
            "machine": machine(PACKAGES),
            "model": f"{ARCHITECTURE}, seeded random weights",
            "frame": list(QUICK_FRAME if options.quick else FRAME),
            "network": QUICK_NETWORK if options.quick else NETWORK,
            "threads": options.threads,
            "rounds": options.rounds,
            "frames": options.frames,
            "quick": options.quick,
            "targets": {"of_eager": OF_EAGER_TARGET, "post_share": POST_TARGET},
            "rows": [row.to_dict() for row in rows],
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
