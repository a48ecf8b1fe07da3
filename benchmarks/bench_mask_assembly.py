"""EdgeSegMaskAssembly against YOLACT's post-processing in PyTorch, on the CPU.

Both run in this process, in turn, at the same number of threads; a ratio is formed inside a round.
PyTorch ends with one byte per pixel, EdgeSeg with packed bits or COCO run lengths, so the time with
the bits unpacked to bytes is there too. Before anything is timed, every pixel of both is checked
against float64 arithmetic. A second table shows how the time grows with instances and frame.

    python benchmarks/bench_mask_assembly.py [--rounds 20] [--threads 1 2] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rounds import Spread, add_output_arguments, in_turn, machine, ratio, say, write_json
from torch import Tensor
from torch.nn import functional

from edgeseg import kernels
from edgeseg.geometry import Geometry

PROTOTYPES = 32
SIDE = 138
NETWORK = 550
THRESHOLD = 0.5
# Float32 arithmetic moves a probability by less.
TIE = 3e-6

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Detections:
    """Prototypes (channels, side, side); coefficients and boxes (network pixels) of instances."""

    prototypes: Floats
    coefficients: Floats
    boxes: Floats

    @property
    def arrays(self) -> tuple[Floats, Floats, Floats]:
        return self.prototypes, self.coefficients, self.boxes

    def first(self, instances: int) -> Detections:
        return Detections(self.prototypes, self.coefficients[:instances], self.boxes[:instances])


def objects(instances: int, side: int = SIDE) -> Detections:
    """What a trained network gives: smooth prototypes that add up to one blob in each box.

    The prototypes are plane waves; the coefficients of an instance are the least-squares fit,
    inside its box, of a logit that is positive within an ellipse. Boxes are a twentieth to two
    thirds of the picture in diameter, the small ones more frequent, as in COCO.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    down, along = rng.normal(0, 9, (2, PROTOTYPES, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (PROTOTYPES, 1, 1))
    waves = np.cos(down * y + along * x + phase)
    diameter = np.exp(rng.uniform(np.log(0.05), np.log(0.65), instances))
    stretch = np.exp(rng.uniform(-0.5, 0.5, instances))
    extent = np.minimum(np.stack([diameter * stretch, diameter / stretch], axis=1), 1)
    corner = rng.uniform(0, 1, (instances, 2)) * (1 - extent)
    boxes = np.concatenate([corner, corner + extent], axis=1)
    coefficients = np.empty((instances, PROTOTYPES))
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        inside = (x1 - 2 / side <= x) & (x <= x2 + 2 / side)
        inside &= (y1 - 2 / side <= y) & (y <= y2 + 2 / side)
        middle, radius = ((x1 + x2) / 2, (y1 + y2) / 2), ((x2 - x1) / 2, (y2 - y1) / 2)
        distance = ((x - middle[0]) / radius[0]) ** 2 + ((y - middle[1]) / radius[1]) ** 2
        wanted = np.clip(8 * (0.95 - distance), -8, 8)[inside]
        coefficients[index] = np.linalg.lstsq(waves[:, inside].T, wanted, rcond=1e-2)[0]
    return Detections(
        waves.astype(np.float32),
        coefficients.astype(np.float32),
        (boxes * NETWORK).astype(np.float32),
    )


def noise(instances: int, side: int = SIDE) -> Detections:
    """The worst case: every box is the whole picture, and nearly every cell is mixed."""
    rng = np.random.default_rng(1)
    return Detections(
        rng.standard_normal((PROTOTYPES, side, side)).astype(np.float32),
        rng.standard_normal((instances, PROTOTYPES)).astype(np.float32),
        np.tile(np.array([0, 0, NETWORK, NETWORK], np.float32), (instances, 1)),
    )


KINDS: dict[str, Callable[..., Detections]] = {"objects": objects, "noise": noise}


def torch_probabilities(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """(n, height, width) of prototypes (height, width, channels), zeros outside the boxes.

    YOLACT's steps: the product, the sigmoid, and a mask of the box that is multiplied with it.
    """
    height, width, _ = prototypes.shape
    found = torch.sigmoid(prototypes @ coefficients.T)
    sides = boxes / NETWORK * torch.tensor([width, height, width, height], dtype=boxes.dtype)
    x1, x2 = (torch.minimum(sides[:, 0], sides[:, 2]), torch.maximum(sides[:, 0], sides[:, 2]))
    y1, y2 = (torch.minimum(sides[:, 1], sides[:, 3]), torch.maximum(sides[:, 1], sides[:, 3]))
    column = torch.arange(width, dtype=boxes.dtype).view(1, -1, 1)
    row = torch.arange(height, dtype=boxes.dtype).view(-1, 1, 1)
    inside = (
        (column >= (x1 - 1).clamp(min=0))
        & (column < (x2 + 1).clamp(max=width))
        & (row >= (y1 - 1).clamp(min=0))
        & (row < (y2 + 1).clamp(max=height))
    )
    return (found * inside.to(found.dtype)).permute(2, 0, 1).contiguous()


def torch_values(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, frame: tuple[int, int]
) -> Tensor:
    """(n, frame height, frame width): the probabilities at frame size."""
    found = torch_probabilities(prototypes, coefficients, boxes)
    return functional.interpolate(found[None], frame, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True)
class Row:
    """One comparison; times in milliseconds."""

    masks: str
    instances: int
    frame: tuple[int, int]
    threads: int
    bits_ms: Spread
    channels_last_ms: Spread
    unpacked_ms: Spread
    rle_ms: Spread
    torch_ms: Spread
    of_torch: Spread
    of_torch_unpacked: Spread
    of_torch_rle: Spread
    mixed_cells: float
    differing_pixels: int
    wrong_pixels: int
    torch_wrong_pixels: int
    pixels_on: int


@dataclass(frozen=True)
class Growth:
    """EdgeSeg alone, for some instances in some frame; times in milliseconds."""

    masks: str
    instances: int
    frame: tuple[int, int]
    threads: int
    levels_ms: Spread
    bits_ms: Spread
    rle_ms: Spread
    box_samples: int
    mixed_cells: int
    rle_bytes: int


def mixed_cells(detections: Detections) -> int:
    """Cells of the prototypes that a mask's border runs through: its length."""
    levels = kernels.assemble_masks(*detections.arrays, (NETWORK, NETWORK))
    total = 0
    for mask in levels:
        on = np.pad(mask > 255 * THRESHOLD, 1).astype(np.int8)
        corners = on[:-1, :-1] + on[1:, :-1] + on[:-1, 1:] + on[1:, 1:]
        total += int(((corners > 0) & (corners < 4)).sum())
    return total


def box_samples(detections: Detections) -> int:
    """Samples of the prototypes that the boxes hold, in all."""
    scaled = detections.boxes * detections.prototypes.shape[1] / NETWORK
    extent = np.ceil(scaled[:, 2:]) - np.floor(scaled[:, :2])
    return int(extent.prod(axis=1).sum())


def elapsed_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def timed(run: Callable[[], object]) -> Callable[[], float]:
    return lambda: elapsed_ms(run)


@dataclass(frozen=True)
class Agreement:
    """Pixels of both sides against float64 arithmetic."""

    differing: int
    wrong: int
    torch_wrong: int
    on: int


def agreement(detections: Detections, frame: tuple[int, int], geometry: Geometry) -> Agreement:
    """Compares instance by instance: all at once take gigabytes in float64."""
    differing = wrong = torch_wrong = on = 0
    prototypes = torch.from_numpy(detections.prototypes).permute(1, 2, 0).contiguous()
    for index in range(len(detections.boxes)):
        one = slice(index, index + 1)
        coefficients = torch.from_numpy(detections.coefficients[one])
        boxes = torch.from_numpy(detections.boxes[one])
        exact = torch_values(prototypes.double(), coefficients.double(), boxes.double(), frame)
        values = exact[0].numpy()
        theirs = torch_values(prototypes, coefficients, boxes, frame)[0].gt(THRESHOLD).numpy()
        bits = kernels.assemble_mask_bits(
            detections.prototypes, detections.coefficients[one], detections.boxes[one], geometry
        )
        ours = np.unpackbits(bits[0], axis=-1, count=frame[1]).astype(bool)
        clear = np.abs(values - THRESHOLD) > TIE
        differing += int((ours != theirs).sum())
        wrong += int(((ours != (values > THRESHOLD)) & clear).sum())
        torch_wrong += int(((theirs != (values > THRESHOLD)) & clear).sum())
        on += int(ours.sum())
    return Agreement(differing, wrong, torch_wrong, on)


def compare(
    kind: str, detections: Detections, frame: tuple[int, int], threads: int, rounds: int
) -> Row:
    """Check, then time in turn."""
    torch.set_num_threads(threads)
    geometry = Geometry.fitting(*frame, NETWORK, NETWORK, fit="stretch")
    found = agreement(detections, frame, geometry)
    instances = len(detections.boxes)
    bits = np.empty((instances, frame[0], (frame[1] + 7) // 8), np.uint8)
    last = np.ascontiguousarray(detections.prototypes.transpose(1, 2, 0))
    prototypes, coefficients, boxes = map(torch.from_numpy, (last, *detections.arrays[1:]))

    def ours() -> object:
        return kernels.assemble_mask_bits(
            *detections.arrays, geometry, threshold=THRESHOLD, out=bits, threads=threads
        )

    def channels_last() -> object:
        return kernels.assemble_mask_bits(
            last.transpose(2, 0, 1), *detections.arrays[1:], geometry, out=bits, threads=threads
        )

    def unpacked() -> object:
        ours()
        return np.unpackbits(bits, axis=-1, count=frame[1])

    def run_lengths() -> object:
        return kernels.assemble_mask_rles(*detections.arrays, geometry, threads=threads)

    def in_torch() -> object:
        with torch.inference_mode():
            return torch_values(prototypes, coefficients, boxes, frame).gt(THRESHOLD)

    candidates: dict[str, Callable[[], object]] = {
        "bits": ours,
        "channels_last": channels_last,
        "unpacked": unpacked,
        "rle": run_lengths,
        "torch": in_torch,
    }
    for warm_up in candidates.values():
        warm_up()
    times = in_turn({name: timed(run) for name, run in candidates.items()}, rounds)
    cells = instances * (detections.prototypes.shape[1] + 1) ** 2
    return Row(
        masks=kind,
        instances=instances,
        frame=frame,
        threads=threads,
        bits_ms=Spread.of(times["bits"]),
        channels_last_ms=Spread.of(times["channels_last"]),
        unpacked_ms=Spread.of(times["unpacked"]),
        rle_ms=Spread.of(times["rle"]),
        torch_ms=Spread.of(times["torch"]),
        of_torch=ratio(times["torch"], times["bits"]),
        of_torch_unpacked=ratio(times["torch"], times["unpacked"]),
        of_torch_rle=ratio(times["torch"], times["rle"]),
        mixed_cells=mixed_cells(detections) / cells,
        differing_pixels=found.differing,
        wrong_pixels=found.wrong,
        torch_wrong_pixels=found.torch_wrong,
        pixels_on=found.on,
    )


def growth(
    kind: str, detections: Detections, frame: tuple[int, int], threads: int, rounds: int
) -> Growth:
    """EdgeSeg's three forms, in turn."""
    geometry = Geometry.fitting(*frame, NETWORK, NETWORK, fit="stretch")
    instances, (_, height, width) = len(detections.boxes), detections.prototypes.shape
    levels = np.empty((instances, height, width), np.uint8)
    bits = np.empty((instances, frame[0], (frame[1] + 7) // 8), np.uint8)
    candidates: dict[str, Callable[[], object]] = {
        "levels": lambda: kernels.assemble_masks(
            *detections.arrays, (NETWORK, NETWORK), out=levels, threads=threads
        ),
        "bits": lambda: kernels.assemble_mask_bits(
            *detections.arrays, geometry, out=bits, threads=threads
        ),
        "rle": lambda: kernels.assemble_mask_rles(*detections.arrays, geometry, threads=threads),
    }
    for warm_up in candidates.values():
        warm_up()
    times = in_turn({name: timed(run) for name, run in candidates.items()}, rounds)
    runs = kernels.assemble_mask_rles(*detections.arrays, geometry, threads=threads)
    return Growth(
        masks=kind,
        instances=instances,
        frame=frame,
        threads=threads,
        levels_ms=Spread.of(times["levels"]),
        bits_ms=Spread.of(times["bits"]),
        rle_ms=Spread.of(times["rle"]),
        box_samples=box_samples(detections),
        mixed_cells=mixed_cells(detections),
        rle_bytes=sum(len(run["counts"]) for run in runs),
    )


def compared_rows(
    sizes: dict[str, list[tuple[int, tuple[int, int]]]], side: int, threads: list[int], rounds: int
) -> Iterator[Row]:
    say(
        f"{'masks':8}{'inst.':>6}{'frame':>11}{'thr':>4}{'mixed':>7}{'bits':>10}{'unpacked':>11}"
        f"{'RLE':>10}{'PyTorch':>11}{'PyTorch takes':>22}{'unpacked':>9}{'differ':>8}{'wrong':>6}"
    )
    for kind, cases in sizes.items():
        for instances, frame in cases:
            detections = KINDS[kind](instances, side)
            for count in threads:
                row = compare(kind, detections, frame, count, rounds)
                say(
                    f"{kind:8}{instances:6d}{'x'.join(map(str, frame)):>11}{count:4d}"
                    f"{row.mixed_cells:7.1%}{row.bits_ms.median:7.2f} ms"
                    f"{row.unpacked_ms.median:8.1f} ms{row.rle_ms.median:7.2f} ms"
                    f"{row.torch_ms.median:8.0f} ms{row.of_torch.text(0):>22}"
                    f"{row.of_torch_unpacked.median:9.0f}{row.differing_pixels:8d}"
                    f"{row.wrong_pixels:6d}"
                )
                yield row


def growth_rows(
    counts: list[int], frames: list[tuple[int, int]], side: int, threads: int, rounds: int
) -> Iterator[Growth]:
    say(
        f"\n{'masks':8}{'inst.':>6}{'frame':>11}{'thr':>4}{'in boxes':>10}{'mixed':>9}"
        f"{'levels':>11}{'bits':>11}{'RLE':>11}{'RLE bytes':>11}"
    )
    detections = objects(max(counts), side)
    for frame in frames:
        for count in counts:
            row = growth("objects", detections.first(count), frame, threads, rounds)
            say(
                f"{row.masks:8}{count:6d}{'x'.join(map(str, frame)):>11}{threads:4d}"
                f"{row.box_samples:10d}{row.mixed_cells:9d}{row.levels_ms.median:8.3f} ms"
                f"{row.bits_ms.median:8.3f} ms{row.rle_ms.median:8.3f} ms{row.rle_bytes:11d}"
            )
            yield row


def main() -> int:
    """Prints both tables; exit code 1 when a pixel is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="alternated rounds per row")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    add_output_arguments(parser)
    options = parser.parse_args()
    threads: list[int] = options.threads or sorted({1, kernels.available_cores()})
    side, rounds = SIDE, options.rounds
    sizes = {
        "objects": [(50, (720, 1280)), (100, (720, 1280)), (50, (1080, 1920))],
        "noise": [(50, (720, 1280))],
    }
    counts = [1, 5, 20, 50, 100, 200, 500]
    frames = [(720, 1280), (1080, 1920), (2160, 3840)]
    if options.quick:
        side, rounds, threads = 35, 1, [1]
        sizes = {kind: [(3, (36, 64))] for kind in KINDS}
        counts, frames = [1, 4], [(36, 64)]

    rows = list(compared_rows(sizes, side, threads, rounds))
    grown = list(growth_rows(counts, frames, side, threads[-1], rounds))
    write_json(
        options.json,
        {
            "benchmark": "mask_assembly",
            "machine": machine(("edgeseg", "numpy", "torch")),
            "prototypes": [PROTOTYPES, side, side],
            "network": [NETWORK, NETWORK],
            "rounds": rounds,
            "quick": options.quick,
            "rows": [asdict(row) for row in rows],
            "growth": [asdict(row) for row in grown],
        },
    )
    return int(any(row.wrong_pixels for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
