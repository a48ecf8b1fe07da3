"""EdgeSegUpsampleArgmax on the GPU: against what memory allows, and against PyTorch's two steps.

For 19 classes, 64x128 -> 512x1024 and 128x256 -> 1024x2048, microseconds per call of

- EdgeSeg's CUDA kernel, class map alone and with confidence
- PyTorch on the same GPU: ``F.interpolate(bilinear)``, ``argmax``, to uint8
- the memory limit: the bytes that must move (logits read once, class map written once) at the
  bandwidth of a large device-to-device copy; and a plain copy of as many bytes, call by call, which
  pays for being started just as a kernel does

All are recorded as CUDA graphs of many calls and timed with CUDA events, in turn, so that neither
Python nor the launch from the host is in any figure. The calls of a graph go round over buffers
that together are four times the L2 cache, so that every call finds its logits in memory, as it
would after a network. Before anything is timed, the class map must be the CPU kernel's, byte for
byte.

"smooth" logits have regions of one winner with borders between them, as a trained network gives;
"random" ones are the worst case, in which nothing can be skipped.

    python benchmarks/bench_gpu_kernels.py [--library FILE] [--rounds 50] [--json FILE]

benchmarks/gpu.sh (``make gpu``) builds the library and runs this.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rounds import Spread, add_output_arguments, in_turn, machine, ratio, say, write_json
from torch import Tensor
from torch.nn import functional

from edgeseg import kernels

CLASSES = 19
FACTOR = 8
SIZES = ((64, 128), (128, 256))
QUICK_SIZES = ((8, 16),)
LIBRARY = Path(__file__).resolve().parents[1] / "build" / "gpu" / "libedgeseg_cuda.so"
PACKAGES = ("numpy", "torch")

Logits = NDArray[np.float32]
Call = Callable[[int], None]


@dataclass(frozen=True)
class Row:
    """One kind of logits at one size; times in microseconds per call, bandwidth in GB/s."""

    logits: str
    source: tuple[int, int]
    target: tuple[int, int]
    mixed_cells: float
    bytes_moved: int
    memory_limit_us: float
    copy_us: Spread
    edgeseg_us: Spread
    confidence_us: Spread
    torch_us: Spread
    of_memory_limit: float
    of_copy: Spread
    of_torch: Spread


@dataclass(frozen=True)
class Buffers:
    """What the calls of a graph go round over."""

    logits: list[Tensor]
    class_map: list[Tensor]
    confidence: list[Tensor]


def random_logits(height: int, width: int) -> Logits:
    """Independent noise: every cell is mixed."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((CLASSES, height, width)).astype(np.float32)


def smooth_logits(height: int, width: int) -> Logits:
    """Coarse noise, interpolated, with a little fine noise on it: regions and borders."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 4, (1, CLASSES, max(height // 16, 2), max(width // 16, 2)))
    smooth = functional.interpolate(
        torch.from_numpy(coarse.astype(np.float32)),
        size=(height, width),
        mode="bicubic",
        align_corners=False,
    )
    fine = rng.normal(0, 0.1, (CLASSES, height, width)).astype(np.float32)
    return np.ascontiguousarray(smooth[0].numpy() + fine, dtype=np.float32)


KINDS: dict[str, Callable[[int, int], Logits]] = {"smooth": smooth_logits, "random": random_logits}


def mixed_share(logits: Logits) -> float:
    """Share of low-resolution cells whose four corners disagree."""
    winner = logits.argmax(axis=0)
    first = winner[:-1, :-1]
    agree = (winner[1:, :-1] == first) & (winner[:-1, 1:] == first) & (winner[1:, 1:] == first)
    return float(1 - agree.mean())


def load_library(path: Path) -> Callable[..., int]:
    """The launcher in the CUDA library at ``path``."""
    if not path.is_file():
        raise SystemExit(f"the CUDA library {path} is not here; `make gpu` builds it")
    function = ctypes.CDLL(str(path)).edgeseg_cuda_upsample_argmax
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [
        pointer,  # logits
        *[number] * 3,  # classes, height, width
        *[pointer] * 2,  # class_map, confidence
        *[number] * 3,  # target_height, target_width, flags
        pointer,  # stream
    ]
    function.restype = number
    launcher: Callable[..., int] = function
    return launcher


def launch(
    function: Callable[..., int], logits: Tensor, class_map: Tensor, confidence: Tensor | None
) -> None:
    """Queues EdgeSeg's kernel on the current stream."""
    status = function(
        logits.data_ptr(),
        *logits.shape,
        class_map.data_ptr(),
        None if confidence is None else confidence.data_ptr(),
        *class_map.shape,
        0,
        torch.cuda.current_stream().cuda_stream,
    )
    if status != 0:
        raise SystemExit(f"the CUDA kernel could not be started: CUDA error {status}")


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second that a copy of 1 GiB in device memory moves, read and written; median."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [_elapsed_ms(lambda: target.copy_(source)) for _ in range(rounds + 3)][3:]
    return 2 * source.numel() / (Spread.of(times).median / 1e3)


def _elapsed_ms(run: Callable[[], object]) -> float:
    """Milliseconds on the GPU between two events around ``run``."""
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def timed_graph(call: Call, count: int) -> Callable[[], float]:
    """``call(0)`` to ``call(count - 1)`` as one CUDA graph; microseconds per call of a replay."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for index in range(min(3, count)):
            call(index)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    return lambda: _elapsed_ms(graph.replay) * 1e3 / count


def compare(
    kind: str,
    source: tuple[int, int],
    function: Callable[..., int],
    bandwidth: float,
    rounds: int,
) -> Row:
    """Check against the CPU kernel, then time in turn."""
    logits = KINDS[kind](*source)
    target = (source[0] * FACTOR, source[1] * FACTOR)
    moved = logits.nbytes + target[0] * target[1]
    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    count = min(max(-(-4 * cache // moved), 8), 512)
    on_device = torch.from_numpy(logits).cuda()
    buffers = Buffers(
        logits=[on_device.clone() for _ in range(count)],
        class_map=[torch.empty(target, dtype=torch.uint8, device="cuda") for _ in range(count)],
        confidence=[torch.empty(target, dtype=torch.uint8, device="cuda") for _ in range(count)],
    )
    # A copy reads and writes, so half of the bytes from one place to the other moves all of them.
    halves = torch.empty((count, 2, moved // 2), dtype=torch.uint8, device="cuda")

    def ours(index: int) -> None:
        launch(function, buffers.logits[index], buffers.class_map[index], None)

    def ours_with_confidence(index: int) -> None:
        launch(function, buffers.logits[index], buffers.class_map[index], buffers.confidence[index])

    def torch_steps(index: int) -> None:
        values = functional.interpolate(
            buffers.logits[index][None], size=target, mode="bilinear", align_corners=False
        )
        buffers.class_map[index].copy_(values.argmax(dim=1)[0])

    def copy(index: int) -> None:
        halves[index, 1].copy_(halves[index, 0])

    ours(0)
    expected = kernels.upsample_argmax(logits, target)
    wrong = int((buffers.class_map[0].cpu().numpy() != expected).sum())
    if wrong:
        raise SystemExit(f"{kind} {source}: {wrong} pixels differ from the CPU kernel's")
    times = in_turn(
        {
            "edgeseg": timed_graph(ours, count),
            "confidence": timed_graph(ours_with_confidence, count),
            "torch": timed_graph(torch_steps, count),
            "copy": timed_graph(copy, count),
        },
        rounds,
    )
    limit_us = moved / bandwidth * 1e6
    edgeseg_us = Spread.of(times["edgeseg"])
    return Row(
        logits=kind,
        source=source,
        target=target,
        mixed_cells=mixed_share(logits),
        bytes_moved=moved,
        memory_limit_us=limit_us,
        copy_us=Spread.of(times["copy"]),
        edgeseg_us=edgeseg_us,
        confidence_us=Spread.of(times["confidence"]),
        torch_us=Spread.of(times["torch"]),
        of_memory_limit=limit_us / edgeseg_us.median,
        of_copy=ratio(times["copy"], times["edgeseg"]),
        of_torch=ratio(times["torch"], times["edgeseg"]),
    )


def _print_row(row: Row) -> None:
    say(
        f"{row.logits:8}{'x'.join(map(str, row.source)):>9}{'x'.join(map(str, row.target)):>11}"
        f"{row.mixed_cells:>7.1%}{row.edgeseg_us.median:>10.2f} us{row.confidence_us.median:>9.2f}"
        f" us{row.torch_us.median:>10.1f} us{row.of_torch.text(1):>22}{row.memory_limit_us:>9.2f}"
        f" us{row.of_memory_limit:>8.1%}{row.copy_us.median:>9.2f} us"
    )


def main() -> int:
    """Measures, prints the table, writes the JSON; exit code 1 without a GPU or a wrong pixel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY, help="libedgeseg_cuda.so")
    parser.add_argument("--rounds", type=int, default=50, help="alternated rounds per row")
    add_output_arguments(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU here, and this benchmark measures one")
    sizes: tuple[tuple[int, int], ...] = SIZES
    if options.quick:
        sizes, options.rounds = QUICK_SIZES, 1
    function = load_library(options.library)
    device = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth(options.rounds)
    say(f"{device.name}, a large copy moves {bandwidth / 1e9:.0f} GB/s")
    say(
        f"{'logits':8}{'source':>9}{'target':>11}{'mixed':>7}{'edgeseg':>13}{'+confid.':>12}"
        f"{'PyTorch':>13}{'PyTorch takes':>22}{'limit':>12}{'of it':>8}{'copy':>12}"
    )
    rows = []
    for kind in KINDS:
        for source in sizes:
            row = compare(kind, source, function, bandwidth, options.rounds)
            _print_row(row)
            rows.append(row)
    write_json(
        options.json,
        {
            "benchmark": "gpu_kernels",
            "machine": {
                **machine(PACKAGES),
                "gpu": device.name,
                "compute_capability": f"{device.major}.{device.minor}",
                "cuda": torch.version.cuda,
                "l2_cache_bytes": int(device.L2_cache_size),
                "copy_gb_per_s": bandwidth / 1e9,
            },
            "classes": CLASSES,
            "rounds": options.rounds,
            "quick": options.quick,
            "rows": [asdict(row) for row in rows],
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
