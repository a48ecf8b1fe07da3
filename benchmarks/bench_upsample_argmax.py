"""EdgeSegUpsampleArgmax against ONNX Runtime's Resize(linear) + ArgMax, on the CPU.

Both run in this process, in turn, at the same number of threads; the figure is the median of the
ratios of neighbouring runs, with the 10th and 90th percentile. Before anything is timed, both
results are checked against float64 arithmetic.

    python benchmarks/bench_upsample_argmax.py [--runs 60] [--threads 1 2] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnxruntime
import rounds
import torch
from numpy.typing import NDArray

from edgeseg import kernels
from edgeseg.export.models import create, definition
from edgeseg.export.preprocess import network_input
from edgeseg.export.weights import load_weights
from edgeseg.synthetic import Street

CLASSES = 19
FACTOR = 8
# How far the borrowed channels of the real logits lie below the true ones.
LOWERED = np.float32(5.0)
SOURCE_SIZES: tuple[tuple[int, int], ...] = ((64, 128), (128, 256))
TIE = 1e-6

Logits = NDArray[np.float32]


def real_logits(height: int, width: int) -> Logits:
    """Logits (classes, height, width) that the shipped network gives for a street.

    It has 11 classes. The other eight channels are what it gives for the mirrored picture, lowered
    so that they rarely win: fields as smooth as real ones, with borders elsewhere.
    """
    picture = Street(height * FACTOR, width * FACTOR, seed=3).frame(40).pixels
    network = load_weights(create("bisenetv2", 11), "streets")
    preprocessing = definition("bisenetv2").preprocessing
    with torch.inference_mode():
        seen, mirrored = (
            network.low_resolution_logits(network_input(view, preprocessing))[0].numpy()
            for view in (picture, picture[:, ::-1])
        )
    return np.ascontiguousarray(np.concatenate([seen, mirrored[: CLASSES - 11] - LOWERED]))


def random_logits(height: int, width: int) -> Logits:
    """Independent noise: the worst case, every cell is mixed."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((CLASSES, height, width)).astype(np.float32)


KINDS: dict[str, Callable[[int, int], Logits]] = {"real": real_logits, "random": random_logits}


@dataclass(frozen=True)
class Row:
    """One comparison; times are medians."""

    logits: str
    source: tuple[int, int]
    target: tuple[int, int]
    threads: int
    edgeseg_ms: float
    confidence_ms: float
    onnxruntime_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    mixed_cells: float
    wrong_pixels: int
    ties: int
    onnxruntime_differs: int


def resize_argmax(source: tuple[int, int], threads: int) -> onnxruntime.InferenceSession:
    """What a user would otherwise run: Resize and ArgMax, fixed shapes, all optimisations."""
    sizes = np.array([1, CLASSES, source[0] * FACTOR, source[1] * FACTOR], np.int64)
    make, kind = onnx.helper, onnx.TensorProto
    graph = make.make_graph(
        [
            make.make_node(
                "Resize",
                ["logits", "", "", "sizes"],
                ["values"],
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            ),
            make.make_node("ArgMax", ["values"], ["class_map"], axis=1, keepdims=0),
        ],
        "resize_argmax",
        [make.make_tensor_value_info("logits", kind.FLOAT, [1, CLASSES, *source])],
        [make.make_tensor_value_info("class_map", kind.INT64, [1, *sizes[2:].tolist()])],
        [onnx.numpy_helper.from_array(sizes, "sizes")],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads that spin would take the cores from the other side between its runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def exact_values(logits: Logits) -> NDArray[np.float64]:
    """Upsampled logits in float64."""

    def axis(
        source: int,
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
        at = np.clip((np.arange(source * FACTOR) + 0.5) / FACTOR - 0.5, 0, source - 1)
        near = np.floor(at).astype(np.intp)
        return near, np.minimum(near + 1, source - 1), at - near

    values = logits.astype(np.float64)
    top, bottom, down = axis(values.shape[1])
    left, right, along = axis(values.shape[2])
    rows = values[:, top] * (1 - down[:, None]) + values[:, bottom] * down[:, None]
    return np.asarray(rows[:, :, left] * (1 - along) + rows[:, :, right] * along)


def mixed_share(logits: Logits) -> float:
    """Share of low-resolution cells whose four corners disagree."""
    winner = logits.argmax(axis=0)
    first = winner[:-1, :-1]
    agree = (winner[1:, :-1] == first) & (winner[:-1, 1:] == first) & (winner[1:, 1:] == first)
    return float(1 - agree.mean())


def elapsed_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def compare(name: str, source: tuple[int, int], threads: int, runs: int) -> Row:
    """Check, then time in turn."""
    logits = KINDS[name](*source)
    target = (source[0] * FACTOR, source[1] * FACTOR)
    session = resize_argmax(source, threads)
    feed = {"logits": logits[None]}
    class_map, levels = np.empty(target, np.uint8), np.empty(target, np.uint8)

    values = exact_values(logits)
    second, best = np.partition(values, CLASSES - 2, axis=0)[-2:]
    kernels.upsample_argmax(logits, target, out=class_map, threads=threads)
    (theirs,) = session.run(None, feed)
    tied = best - second <= TIE
    wrong = (class_map != values.argmax(axis=0)) & ~tied
    differs = theirs[0] != class_map
    del values, second, best

    def ours() -> object:
        return kernels.upsample_argmax(logits, target, out=class_map, threads=threads)

    def ours_with_confidence() -> object:
        return kernels.upsample_argmax_confidence(
            logits, target, out=class_map, confidence=levels, threads=threads
        )

    def onnx_runtime() -> object:
        return session.run(None, feed)

    for warm_up in (ours, ours_with_confidence, onnx_runtime):
        warm_up()
    times = np.array(
        [
            [elapsed_ms(ours), elapsed_ms(onnx_runtime), elapsed_ms(ours_with_confidence)]
            for _ in range(runs)
        ]
    )
    ratios = times[:, 1] / times[:, 0]
    return Row(
        logits=name,
        source=source,
        target=target,
        threads=threads,
        edgeseg_ms=float(np.median(times[:, 0])),
        confidence_ms=float(np.median(times[:, 2])),
        onnxruntime_ms=float(np.median(times[:, 1])),
        ratio=float(np.median(ratios)),
        ratio_p10=float(np.percentile(ratios, 10)),
        ratio_p90=float(np.percentile(ratios, 90)),
        mixed_cells=mixed_share(logits),
        wrong_pixels=int(wrong.sum()),
        ties=int(tied.sum()),
        onnxruntime_differs=int(differs.sum()),
    )


def main() -> int:
    """Print the table; exit code 1 when a pixel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=60, help="alternated runs per row")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    rounds.add_output_arguments(parser)
    options = parser.parse_args()
    threads = options.threads or sorted({1, kernels.available_cores()})
    sizes, runs = SOURCE_SIZES, options.runs
    if options.quick:
        sizes, runs, threads = ((8, 16),), 1, [1]

    rounds.say(
        f"{'logits':7} {'source':>9} {'target':>10} {'thr':>3} {'mixed':>6} {'edgeseg':>9} "
        f"{'ORT':>9} {'ratio (p10-p90)':>20} {'+confid.':>9} {'wrong':>5} {'ties':>4}"
    )
    rows = []
    for name in KINDS:
        for source in sizes:
            for count in threads:
                row = compare(name, source, count, runs)
                rows.append(row)
                spread = f"{row.ratio:.1f} ({row.ratio_p10:.1f}-{row.ratio_p90:.1f})"
                rounds.say(
                    f"{name:7} {'x'.join(map(str, source)):>9} "
                    f"{'x'.join(map(str, row.target)):>10} {count:3d} {row.mixed_cells:6.1%} "
                    f"{row.edgeseg_ms:6.2f} ms {row.onnxruntime_ms:6.1f} ms {spread:>20} "
                    f"{row.confidence_ms:6.2f} ms {row.wrong_pixels:5d} {row.ties:4d}"
                )
    rounds.write_json(
        options.json,
        {
            "benchmark": "upsample_argmax",
            "machine": rounds.machine(("edgeseg", "numpy", "onnxruntime")),
            "classes": CLASSES,
            "runs": runs,
            "rows": [asdict(row) for row in rows],
        },
    )
    return int(any(row.wrong_pixels for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
