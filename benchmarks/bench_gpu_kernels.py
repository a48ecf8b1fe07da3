"""EdgeSeg's CUDA kernels: against what memory allows, and against what a user would otherwise run.

For each case in gpu_cases.py, in turn and round by round:

- EdgeSeg's kernel, microseconds per call
- a copy on the device that reads and writes as many bytes as the kernel has to, where memory is
  what limits the kernel: it pays for being started just as a kernel does
- the reference: torch's interpolate and argmax, YOLACT's mask steps in torch, torchvision's
  roi_align level by level

All are recorded as CUDA graphs of many calls and timed with CUDA events, so that neither Python nor
the launch from the host is in any figure. The calls of a graph go round over buffers that together
are four times the L2 cache, so that every call finds its input in memory, as it would after a
network. Before anything is timed, a result must be the CPU library's, byte for byte, and the
reference must compute the same thing but for rounding.

    python benchmarks/bench_gpu_kernels.py [--library FILE] [--only KERNEL] [--rounds 50]
        [--results FOLDER] [--json FILE] [--quick] [--check]

--check stops after the comparison with the CPU library: nothing of torch's runs on the GPU then,
which suits a sanitizer. --results writes gpu-<GPU>-<date>.json into a folder. benchmarks/gpu.sh
(`make gpu`) builds the library and runs this.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from gpu_cases import Call, Case, Device, Mismatch, all_cases, quick_cases
from rounds import Spread, add_output_arguments, in_turn, machine, ratio, say, write_json

from edgeseg.errors import EdgeSegError
from edgeseg.kernels import launchers

LIBRARY = Path(__file__).resolve().parents[1] / "build" / "gpu" / "libedgeseg_cuda.so"
PACKAGES = ("numpy", "torch", "torchvision")

# Calls in a graph, and what their buffers may take together.
FEWEST_CALLS = 8
MOST_CALLS = 512
MOST_BYTES = 4 << 30

# Rounds end when a case has had this long; the slow references would take minutes.
SECONDS_PER_CASE = 4.0
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """What was measured for one case; times in microseconds per call."""

    kernel: str
    input: str
    output: str
    bytes_moved: int
    calls: int
    rounds: int
    edgeseg_us: Spread
    gb_per_s: float
    copy_us: Spread | None
    of_copy: Spread | None
    """Bandwidth as a share of the copy's."""
    of_copy_wanted: float | None
    reference: str | None
    reference_us: Spread | None
    of_reference: Spread | None
    """How many times as long the reference takes."""
    of_reference_wanted: float | None

    @property
    def falls_short(self) -> bool:
        """Whether a target that the case has is missed."""
        return any(
            wanted is not None and found is not None and found.median < wanted
            for wanted, found in [
                (self.of_copy_wanted, self.of_copy),
                (self.of_reference_wanted, self.of_reference),
            ]
        )


class Timer(Protocol):
    """A way to time a series of calls on a device."""

    @property
    def cache_bytes(self) -> int:
        """The cache that buffers must not fit into."""

    @property
    def free_bytes(self) -> int:
        """Memory that buffers may take."""

    def series(self, call: Call, count: int) -> Callable[[], float]:
        """A function that runs ``call(0)`` to ``call(count - 1)`` and returns microseconds per
        call.
        """


class GraphTimer:
    """Series as CUDA graphs, timed with events on the device."""

    @property
    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    @property
    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def series(self, call: Call, count: int) -> Callable[[], float]:
        # What is done once, such as loading a kernel, must not be inside the graph.
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for index in range(min(3, count)):
                call(index)
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(count):
                call(index)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        return lambda: elapsed_ms(graph.replay) * 1e3 / count


def elapsed_ms(run: Callable[[], object]) -> float:
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


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second that a copy of 1 GiB in device memory moves, read and written; median."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [elapsed_ms(lambda: target.copy_(source)) for _ in range(rounds + 3)][3:]
    return 2 * source.numel() / (Spread.of(times).median / 1e3)


def calls_for(case: Case, cache_bytes: int, free_bytes: int) -> int:
    """How many calls, each on buffers of its own, go into a graph."""
    # Twice, as the reference has a result of its own, and inputs in its own layout.
    room = min(MOST_BYTES, free_bytes // 4) // (2 * case.bytes_moved)
    wanted = min(max(-(-4 * cache_bytes // case.bytes_moved), FEWEST_CALLS), MOST_CALLS)
    return max(min(wanted, room), 1)


def measure(case: Case, device: Device, timer: Timer, most_rounds: int) -> Row:
    """Checks, then times in turn. Raises ``Mismatch`` on a wrong result."""
    count = calls_for(case, timer.cache_bytes, timer.free_bytes)
    prepared = case.prepare(device, count)
    prepared.check()
    candidates = {"edgeseg": timer.series(prepared.launch, count)}
    if prepared.make_reference is not None:
        reference = prepared.make_reference()
        reference.check()
        candidates["reference"] = timer.series(reference.call, count)
    if case.bandwidth_counts:
        # Half of the bytes from one place to the other: a copy reads and writes.
        halves = torch.zeros(
            (count, 2, case.bytes_moved // 2), dtype=torch.uint8, device=device.device
        )
        candidates["copy"] = timer.series(lambda i: halves[i, 1].copy_(halves[i, 0]), count)
    one_round = sum(run() for run in candidates.values()) * count / 1e6
    rounds = int(min(max(SECONDS_PER_CASE / max(one_round, 1e-9), FEWEST_ROUNDS), most_rounds))
    # Graphs know their buffers by address alone: `prepared`, `reference` and `halves` must live on.
    times = in_turn(candidates, rounds)
    ours = times["edgeseg"]
    copies, theirs = times.get("copy"), times.get("reference")
    return Row(
        kernel=case.kernel,
        input=case.input,
        output=case.output,
        bytes_moved=case.bytes_moved,
        calls=count,
        rounds=rounds,
        edgeseg_us=Spread.of(ours),
        gb_per_s=case.bytes_moved / Spread.of(ours).median / 1e3,
        copy_us=None if copies is None else Spread.of(copies),
        of_copy=None if copies is None else ratio(copies, ours),
        of_copy_wanted=case.of_copy_wanted,
        reference=case.reference,
        reference_us=None if theirs is None else Spread.of(theirs),
        of_reference=None if theirs is None else ratio(theirs, ours),
        of_reference_wanted=case.of_reference_wanted,
    )


def row_text(row: Row) -> str:
    """One line of the table."""
    text = f"{row.kernel:18}{row.input:44}{row.output:24}{row.edgeseg_us.median:>9.2f} us"
    if row.of_copy is not None:
        percent = Spread(*(100 * share for share in asdict(row.of_copy).values()))
        text += f"{row.gb_per_s:>7.0f} GB/s, {percent.text(0)} % of a copy"
    if row.of_reference is not None:
        text += f", {row.of_reference.text(1)} x {row.reference}"
    return text + (" FALLS SHORT" if row.falls_short else "")


def result_file(folder: Path, gpu: str, date: str) -> Path:
    """gpu-<GPU>-<date>.json: ``NVIDIA H200`` becomes ``nvidia-h200``."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"gpu-{slug}-{date}.json"


def report(rows: Sequence[Row], described: dict[str, object], quick: bool) -> dict[str, object]:
    """What goes into the JSON file."""
    return {
        "benchmark": "gpu_kernels",
        "machine": described,
        "quick": quick,
        "rows": [{**asdict(row), "falls_short": row.falls_short} for row in rows],
    }


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY, help="libedgeseg_cuda.so")
    parser.add_argument("--only", metavar="KERNEL", help="cases of this kernel only")
    parser.add_argument("--rounds", type=int, default=50, help="most alternated rounds per case")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="for gpu-<GPU>-<date>.json")
    parser.add_argument("--check", action="store_true", help="compare results, time nothing")
    add_output_arguments(parser)
    return parser.parse_args(given)


def selected_cases(only: str | None, quick: bool) -> list[Case]:
    """The cases to run; SystemExit when no kernel is called ``only``."""
    cases = quick_cases() if quick else all_cases()
    chosen = [case for case in cases if only in (None, case.kernel)]
    if not chosen:
        known = ", ".join(sorted({case.kernel for case in cases}))
        raise SystemExit(f"there is no kernel {only!r}; there are {known}")
    return chosen


def check_all(cases: Sequence[Case], device: Device) -> None:
    """Compares one result of each case with the CPU library's."""
    for case in cases:
        case.prepare(device, 1).check()
        say(f"{case.title}: as the CPU library")


def measure_all(cases: Sequence[Case], device: Device, timer: Timer, rounds: int) -> list[Row]:
    """Measures every case and prints its line."""
    rows = []
    for case in cases:
        rows.append(measure(case, device, timer, rounds))
        say(row_text(rows[-1]))
        # The buffers of one case may be most of a small GPU's memory.
        gc.collect()
        if device.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Measures, prints the table, writes the JSON; exit code 1 without a GPU or on a wrong
    result. A target that is missed is said, and is no failure.
    """
    options = arguments()
    cases = selected_cases(options.only, options.quick)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA GPU here, and this benchmark measures one")
    if not options.library.is_file():
        raise SystemExit(f"the CUDA library {options.library} is not here; `make gpu` builds it")
    try:
        device = Device(launchers.open_library(options.library), torch.device("cuda", 0))
        torch.cuda.set_device(device.device)
        if options.check:
            check_all(cases, device)
            return 0
        rounds = 1 if options.quick else options.rounds
        bandwidth = copy_bandwidth(device.device, rounds)
        properties = torch.cuda.get_device_properties(0)
        say(f"{properties.name}, a large copy moves {bandwidth / 1e9:.0f} GB/s")
        if not any(case.kernel == "pyramid_roi_align" and case.reference for case in cases):
            say("torchvision is not here, or not for this torch: nothing to compare RoIAlign with")
        rows = measure_all(cases, device, GraphTimer(), rounds)
    except (EdgeSegError, Mismatch) as error:
        raise SystemExit(str(error)) from None
    described = {
        **machine(PACKAGES),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "processors": int(properties.multi_processor_count),
        "l2_cache_bytes": int(properties.L2_cache_size),
        "copy_gb_per_s": bandwidth / 1e9,
    }
    content = report(rows, described, options.quick)
    write_json(options.json, content)
    if options.results is not None:
        target = result_file(options.results, properties.name, str(described["date"]))
        write_json(str(target), content)
        say(f"written to {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
