"""Frame to finished mask: EdgeSeg's pipeline, its engine alone, and a plain PyTorch loop.

Compared, round by round in one process, on the same video, network, weights, fp32 arithmetic and
number of threads:

- end to end: ``Pipeline`` over a video file; decoding, resizing, network, head, and the mask
  brought to frame size are in it
- engine alone: the same engine, fed with frames that are already decoded and resized; what the
  pipeline adds to it is what it costs to be end to end
- PyTorch eager: the same job as a user writes it with OpenCV and torch: read, resize, RGB,
  normalise, ``model(x)`` with its full-resolution logits, argmax, mask resized to frame size

The network is BiSeNetV2 with the weights of the shipped model (11 classes), exported at the size
of the row: the head's work depends on the picture, and random weights would give it none that is
real. BiSeNetV2 takes multiples of 32, so frames of 720x960 go to a network of 736x960.
FC-HarDNet-70 runs too, at 512x1024, with 19 classes and seeded random weights, on whose noise the
head has more to do. The video is a generated street in MPEG-4 Part 2, which every OpenCV can write
and read.

Frames per second, for all three, are n over the time from mask 0 to mask n. The video goes on
behind mask n, so that as many frames are read within that time as masks are finished.

    python benchmarks/bench_end_to_end.py [--rounds 15] [--frames 8] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rounds import (
    Spread,
    add_output_arguments,
    in_turn,
    machine,
    ratio,
    say,
    write_json,
)

from edgeseg import kernels
from edgeseg.bundle import Bundle
from edgeseg.engine import Engine, available_engines, open_engine
from edgeseg.export.latency import bare_spec
from edgeseg.export.models import SemanticNetwork, create_semantic, definition_of
from edgeseg.export.onnx import export_network
from edgeseg.export.weights import load_weights
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.ledger import Summary
from edgeseg.pipeline import Pipeline
from edgeseg.source import open_source
from edgeseg.spec import ModelSpec
from edgeseg.synthetic import Street

Size = tuple[int, int]

ARCHITECTURE = "bisenetv2"
WEIGHTS = "streets"
PACKAGES = ("edgeseg", "openvino", "onnxruntime", "torch", "opencv-python", "numpy")
# What the pipeline may have read beyond the last mask: two frames waiting, one in hand.
READ_AHEAD = 3
WARM_UP = 3
OF_ENGINE_TARGET = 0.97
OF_EAGER_TARGETS = {ARCHITECTURE: 1.6, "fchardnet70": 2.0}


@dataclass(frozen=True)
class Case:
    """Frames of one (height, width) through a network of another."""

    frame: Size
    network: Size
    architecture: str = ARCHITECTURE

    def opened(self) -> tuple[SemanticNetwork, ModelSpec]:
        """The network, and its contract."""
        if self.architecture == ARCHITECTURE:
            network = load_weights(create_semantic(ARCHITECTURE, 11), WEIGHTS)
            spec = Bundle.open(WEIGHTS).spec
            return network, replace(
                spec, height=self.network[0], width=self.network[1], fit="stretch"
            )
        torch.manual_seed(0)
        network = create_semantic(self.architecture, 19).eval()
        return network, bare_spec(network, self.network)


CASES = (
    Case((720, 960), (736, 960)),
    Case((512, 1024), (512, 1024)),
    Case((512, 1024), (512, 1024), "fchardnet70"),
)
QUICK_CASES = (Case((72, 96), (96, 96)),)


@dataclass(frozen=True)
class Pace:
    """One run: ``fps`` from mask 0 to mask n, ``whole_fps`` from opening the video to mask n."""

    fps: float
    whole_fps: float
    summary: Summary | None = None

    @classmethod
    def of(cls, started_ns: int, finished_ns: list[int], summary: Summary | None = None) -> Pace:
        """The pace of masks that were finished at these times."""
        masks = len(finished_ns)
        return cls(
            (masks - 1) * 1e9 / (finished_ns[-1] - finished_ns[0]),
            masks * 1e9 / (finished_ns[-1] - started_ns),
            summary,
        )


@dataclass(frozen=True)
class Row:
    """One engine at one size."""

    engine: str
    description: str
    architecture: str
    frame: Size
    network: Size
    end_to_end_fps: Spread
    whole_run_fps: Spread
    engine_alone_fps: Spread
    eager_fps: Spread
    of_engine: Spread
    of_eager: Spread
    masks_agree: float
    stages_p50_ms: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        spreads = {
            name: value.to_dict() for name, value in vars(self).items() if isinstance(value, Spread)
        }
        return {
            "engine": self.engine,
            "description": self.description,
            "architecture": self.architecture,
            "frame": list(self.frame),
            "network": list(self.network),
            "masks_agree": self.masks_agree,
            "stages_p50_ms": self.stages_p50_ms,
            **spreads,
        }


def write_video(path: Path, size: Size, frames: int) -> None:
    """A drive through a generated street, ``frames`` frames of (height, width) ``size``."""
    height, width = size
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (width, height), True
    )
    if not writer.isOpened():
        raise SystemExit("this OpenCV cannot write MPEG-4 video; install opencv-python")
    street = Street(height, width, seed=3, frames=frames)
    for index in range(frames):
        writer.write(street.frame(index).pixels)
    writer.release()


def read_video(path: Path) -> list[Pixels]:
    """All frames of a video."""
    with closing(open_source(str(path))) as source:
        return [frame.pixels for frame in source]


def end_to_end(engine: Engine, video: Path, frames: int) -> Pace:
    """Masks of ``frames`` + 1 frames, from the video file to frame size."""
    started_ns = time.monotonic_ns()
    finished_ns = []
    with Pipeline(engine, open_source(str(video))) as results:
        for result in results:
            finished_ns.append(result.finished_ns)
            if len(finished_ns) == frames + 1:
                break
    return Pace.of(started_ns, finished_ns, results.ledger.summary())


def engine_alone(engine: Engine, fitted: list[Pixels], frames: int) -> Pace:
    """Masks of ``frames`` + 1 pictures of network size that lie in memory."""
    started_ns = time.monotonic_ns()
    finished_ns = []
    for pixels in fitted[: frames + 1]:
        engine.run(pixels)
        finished_ns.append(time.monotonic_ns())
    return Pace.of(started_ns, finished_ns)


class EagerLoop:
    """The job as a user writes it with OpenCV and torch."""

    def __init__(self, network: SemanticNetwork, size: Size) -> None:
        preprocessing = definition_of(network).preprocessing
        self._rgb = preprocessing.order == "rgb"
        self._network = network
        self._size = size
        self._mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)

    def class_map(self, pixels: Pixels) -> NDArray[np.uint8]:
        """Classes of one frame, at frame size."""
        height, width = self._size
        resized = cv2.resize(pixels, (width, height))
        if self._rgb:
            resized = cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)
        x = torch.from_numpy(resized).permute(2, 0, 1).unsqueeze(0).float().contiguous() / 255
        logits = self._network((x - self._mean) / self._std)
        classes = logits.argmax(dim=1)[0].to(torch.uint8).numpy()
        frame_size = (pixels.shape[1], pixels.shape[0])
        restored: NDArray[np.uint8] = cv2.resize(
            classes, frame_size, interpolation=cv2.INTER_NEAREST_EXACT
        )
        return restored

    @torch.inference_mode()
    def run(self, video: Path, frames: int) -> Pace:
        """Masks of ``frames`` + 1 frames of the video file."""
        started_ns = time.monotonic_ns()
        finished_ns: list[int] = []
        capture = cv2.VideoCapture(str(video))
        while len(finished_ns) <= frames:
            there, pixels = capture.read()
            if not there:
                raise SystemExit(f"the video ended after {len(finished_ns)} frames")
            self.class_map(pixels)  # type: ignore[arg-type]
            finished_ns.append(time.monotonic_ns())
        capture.release()
        return Pace.of(started_ns, finished_ns)


def compare(case: Case, engines: tuple[str, ...], options: argparse.Namespace) -> list[Row]:
    """Export, check that all give the same masks, then time in turn."""
    frames, threads = options.frames, options.threads
    network, spec = case.opened()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        model, video = Path(folder) / "model.onnx", Path(folder) / "street.mp4"
        export_network(network, spec).write(model)
        write_video(video, case.frame, frames + 1 + READ_AHEAD)
        pictures = read_video(video)
        geometry = Geometry.between(*case.frame, spec)
        fitted = [geometry.fit(pixels) for pixels in pictures]
        eager = EagerLoop(network, case.network)
        with torch.inference_mode():
            expected = eager.class_map(pictures[-1])

        candidates: dict[str, Callable[[], Pace]] = {"eager": lambda: eager.run(video, frames)}
        running: dict[str, Engine] = {}
        agree = {}
        for name in engines:
            engine = open_engine(Bundle.open(model), name, threads=threads)
            opened.callback(engine.close)
            running[name] = engine
            agree[name] = float(
                np.mean(geometry.restore(engine.run(fitted[-1]).class_map) == expected)
            )
            candidates[f"{name} alone"] = _alone(engine, fitted, frames)
            candidates[f"{name} end to end"] = _end_to_end(engine, video, frames)
        for engine in running.values():
            engine_alone(engine, fitted, min(WARM_UP, frames))
        eager.run(video, min(WARM_UP, frames))
        say(f"Frames of {_text(case.frame)}: {options.rounds} rounds of {frames} frames each")
        paces = in_turn(candidates, options.rounds)
    return [_row(case, engine, paces, agree[name]) for name, engine in running.items()]


def _alone(engine: Engine, fitted: list[Pixels], frames: int) -> Callable[[], Pace]:
    return lambda: engine_alone(engine, fitted, frames)


def _end_to_end(engine: Engine, video: Path, frames: int) -> Callable[[], Pace]:
    return lambda: end_to_end(engine, video, frames)


def _row(case: Case, engine: Engine, paces: dict[str, list[Pace]], agree: float) -> Row:
    ours, alone = paces[f"{engine.name} end to end"], paces[f"{engine.name} alone"]
    eager = paces["eager"]

    def speeds(runs: list[Pace]) -> list[float]:
        return [pace.fps for pace in runs]

    stages: dict[str, list[float]] = {}
    for pace in ours:
        if pace.summary is not None:
            for stage, times in pace.summary.stages.items():
                stages.setdefault(stage, []).append(times.p50_ms)
    return Row(
        engine=engine.name,
        description=engine.description,
        architecture=case.architecture,
        frame=case.frame,
        network=case.network,
        end_to_end_fps=Spread.of(speeds(ours)),
        whole_run_fps=Spread.of(pace.whole_fps for pace in ours),
        engine_alone_fps=Spread.of(speeds(alone)),
        eager_fps=Spread.of(speeds(eager)),
        of_engine=ratio(speeds(ours), speeds(alone)),
        of_eager=ratio(speeds(ours), speeds(eager)),
        masks_agree=agree,
        stages_p50_ms={stage: Spread.of(times).median for stage, times in stages.items()},
    )


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _print_header() -> None:
    say(
        f"{'engine':<12}{'model':<12}{'frame':>10}{'network':>10}{'end to end':>12}"
        f"{'alone':>8}{'eager':>8}{'of the engine alone':>24}{'of PyTorch eager':>22}"
        f"{'masks agree':>13}"
    )


def _print_row(row: Row) -> None:
    say(
        f"{row.engine:<12}{row.architecture:<12}{_text(row.frame):>10}{_text(row.network):>10}"
        f"{row.end_to_end_fps.median:>8.2f} fps{row.engine_alone_fps.median:>8.2f}"
        f"{row.eager_fps.median:>8.2f}{row.of_engine.text(3):>24}"
        f"{row.of_eager.text(2):>22}{row.masks_agree:>13.3%}"
    )
    times = ", ".join(f"{name} {ms:.2f}" for name, ms in row.stages_p50_ms.items())
    say(f"{'':<12}median ms per frame: {times}")


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="alternated rounds per size")
    parser.add_argument("--frames", type=int, default=8, help="frames per round and candidate")
    parser.add_argument(
        "--threads",
        type=int,
        default=kernels.available_cores(),
        help="for all three (all cores)",
    )
    add_output_arguments(parser)
    options = parser.parse_args()
    cases: tuple[Case, ...] = CASES
    if options.quick:
        cases, options.rounds, options.frames = QUICK_CASES, 1, 3
    torch.set_num_threads(options.threads)
    _print_header()
    rows = []
    for case in cases:
        found = compare(case, available_engines(), options)
        for row in found:
            _print_row(row)
        rows += found
    say(
        f"Targets: of the engine alone >= {OF_ENGINE_TARGET}, of PyTorch eager >= "
        + ", ".join(f"{least} ({name})" for name, least in OF_EAGER_TARGETS.items())
        + ". Median over the rounds, smallest and largest in brackets."
    )
    write_json(
        options.json,
        {
            "benchmark": "end_to_end",
            "machine": machine(PACKAGES),
            "model": f"{ARCHITECTURE}, weights of {WEIGHTS}, fp32; others with random weights",
            "threads": options.threads,
            "rounds": options.rounds,
            "frames": options.frames,
            "quick": options.quick,
            "targets": {"of_engine": OF_ENGINE_TARGET, "of_eager": OF_EAGER_TARGETS},
            "rows": [row.to_dict() for row in rows],
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
