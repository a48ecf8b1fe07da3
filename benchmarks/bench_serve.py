"""What the web page costs: frames per second with a viewer and a recording, and without.

Compared, round by round in one process, on the same video of 360x480 and the shipped model:

- engine alone: the engine, fed with frames that are already decoded and resized
- end to end: ``Streams`` over the video file, results taken and thrown away
- served: the same with the web page open, a viewer in another process who reads the overlay as
  fast as the page shows it (15 pictures per second) and the figures, and a recording running

Frames per second, for all three, are n over the time from mask 0 to mask n. Served rounds start
when the viewer has its first picture. The viewer throws its pictures away: what a browser does
with them, it does on another machine.

    python benchmarks/bench_serve.py [--rounds 9] [--frames 240] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from rounds import Spread, add_output_arguments, in_turn, machine, ratio, say, write_json

import edgeseg
from edgeseg import kernels
from edgeseg.engine import Engine
from edgeseg.frame import Pixels
from edgeseg.geometry import Geometry
from edgeseg.sensors import Sensors
from edgeseg.serve import WebPage
from edgeseg.source import open_source, quiet_opencv
from edgeseg.streams import Streams
from edgeseg.synthetic import Street

MODEL = "streets-int8"
SIZE = (360, 480)
# Frames of the video, which starts anew at its end.
CLIP = 48
WARM_UP = 5
NAME = "street"
OF_ENGINE_TARGET = 0.97
PACKAGES = ("edgeseg", "openvino", "onnxruntime", "opencv-python", "numpy", "aiohttp")

# The viewer: reads both streams, and says how many pictures it got when its input ends.
VIEWER = """
import socket, sys, threading
host, port = "127.0.0.1", int(sys.argv[1])
pictures, first = [0], threading.Event()
def read(path, mark, count):
    connection = socket.create_connection((host, port))
    connection.sendall(f"GET {path} HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode())
    while data := connection.recv(1 << 16):
        if count:
            pictures[0] += data.count(mark)
            if pictures[0]:
                first.set()
for arguments in (("/stream/NAME/overlay.mjpg", b"image/jpeg", True), ("/events", b"", False)):
    threading.Thread(target=read, args=arguments, daemon=True).start()
first.wait()
print("watching", flush=True)
before = pictures[0]
sys.stdin.read()
print(pictures[0] - before, flush=True)
""".replace("NAME", NAME)


@dataclass(frozen=True)
class Pace:
    """One run: frames per second; pictures and recorded frames per second where it was served."""

    fps: float
    viewed: float = 0.0
    recorded: float = 0.0
    lost: int = 0


def write_clip(path: Path, frames: int) -> None:
    """A drive through a generated street."""
    height, width = SIZE
    # FFmpeg asks once per process whether it may write to standard error.
    with quiet_opencv():
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (width, height))
    if not writer.isOpened():
        raise SystemExit("this OpenCV cannot write MPEG-4 video; install opencv-python")
    street = Street(height, width, seed=3, frames=frames)
    for index in range(frames):
        writer.write(street.frame(index).pixels)
    writer.release()


def engine_alone(engine: Engine, fitted: list[Pixels], frames: int) -> Pace:
    """Masks of pictures of network size that lie in memory."""
    finished_ns = []
    for pixels in itertools.islice(itertools.cycle(fitted), frames + 1):
        engine.run(pixels)
        finished_ns.append(time.monotonic_ns())
    return _pace(finished_ns)


def end_to_end(engine: Engine, video: Path, frames: int) -> Pace:
    """Masks of the video at frame size, and nothing done with them."""
    finished_ns: list[int] = []
    with Streams(engine, {NAME: open_source(f"{video}?loop=always")}) as streams:
        for stream in streams:
            finished_ns.append(stream.result.finished_ns)
            if len(finished_ns) == frames + 1 + WARM_UP:
                break
    return _pace(finished_ns[WARM_UP:])


def served(engine: Engine, video: Path, frames: int, folder: Path) -> Pace:
    """The same with the web page, a viewer and a recording."""
    spec = engine.spec
    finished_ns: list[int] = []
    watching = False
    with ExitStack() as stack:
        sensors = Sensors()
        stack.callback(sensors.close)
        streams = stack.enter_context(Streams(engine, {NAME: open_source(f"{video}?loop=always")}))
        page = stack.enter_context(
            WebPage(
                "127.0.0.1:0",
                stats=lambda: streams.stats((), sensors.read()),
                names=[NAME],
                legend=dict(zip(spec.classes, spec.colours, strict=True)),
                recordings=folder,
            )
        )
        viewer = stack.enter_context(_viewer(page.port))
        recording = _ask(page.port, "POST", "/recordings", {"source": NAME})
        sink = page.sink(NAME)
        for stream in streams:
            sink.write(stream.result)
            if not watching:
                watching = viewer.watches()
                continue
            finished_ns.append(stream.result.finished_ns)
            if len(finished_ns) == frames + 1:
                break
        seconds = (finished_ns[-1] - finished_ns[0]) / 1e9
        viewed = viewer.stop() / seconds
        (running,) = _ask(page.port, "GET", "/recordings")["running"]
        _ask(page.port, "DELETE", f"/recordings/{recording['id']}")
    for path in folder.iterdir():
        path.unlink()
    return _pace(
        finished_ns, viewed, running["written"] / running["seconds"], int(running["dropped"])
    )


class Viewer:
    """A process that watches the page."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self._output = process.stdout

    def watches(self) -> bool:
        """Whether it has its first picture; asked before each frame, and never waits."""
        import select

        return bool(select.select([self._output], [], [], 0)[0]) and bool(self._output.readline())

    def stop(self) -> int:
        """How many pictures it got since."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return int(self._output.readline())


@contextmanager
def _viewer(port: int) -> Iterator[Viewer]:
    process = subprocess.Popen(
        [sys.executable, "-c", VIEWER, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Viewer(process)
    finally:
        process.kill()
        process.wait()
        for end in (process.stdin, process.stdout):
            if end is not None:
                end.close()


def _ask(port: int, method: str, path: str, body: object = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.status >= 300:
        raise SystemExit(f"{method} {path}: {text.strip()}")
    return json.loads(text)


def _pace(
    finished_ns: list[int], viewed: float = 0.0, recorded: float = 0.0, lost: int = 0
) -> Pace:
    masks = len(finished_ns) - 1
    return Pace(masks * 1e9 / (finished_ns[-1] - finished_ns[0]), viewed, recorded, lost)


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="alternated rounds")
    parser.add_argument("--frames", type=int, default=240, help="frames per round and candidate")
    parser.add_argument(
        "--threads", type=int, default=kernels.available_cores(), help="of the engine (all cores)"
    )
    parser.add_argument("--model", default=MODEL, help=f"bundle ({MODEL})")
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.frames = 1, 4
    frames = options.frames
    with (
        tempfile.TemporaryDirectory() as folder,
        edgeseg.load(options.model, threads=options.threads) as model,
    ):
        engine, video, films = model.engine, Path(folder) / "street.mp4", Path(folder) / "films"
        write_clip(video, CLIP if not options.quick else 4)
        with open_source(str(video)) as source:
            pictures = [frame.pixels for frame in source]
        geometry = Geometry.between(*SIZE, model.spec)
        fitted = [geometry.fit(pixels) for pixels in pictures]
        engine_alone(engine, fitted, WARM_UP)
        say(f"{engine.description}: {options.rounds} rounds of {frames} frames of 360x480 each")
        paces = in_turn(
            {
                "alone": lambda: engine_alone(engine, fitted, frames),
                "end to end": lambda: end_to_end(engine, video, frames),
                "served": lambda: served(engine, video, frames, films),
            },
            options.rounds,
            progress=lambda done, total: say(f"round {done} of {total}"),
        )
        name, description = engine.name, engine.description
    fps = {which: [pace.fps for pace in runs] for which, runs in paces.items()}
    spreads = {
        "engine_alone_fps": Spread.of(fps["alone"]),
        "end_to_end_fps": Spread.of(fps["end to end"]),
        "served_fps": Spread.of(fps["served"]),
        "of_engine": ratio(fps["served"], fps["alone"]),
        "of_end_to_end": ratio(fps["served"], fps["end to end"]),
        "end_to_end_of_engine": ratio(fps["end to end"], fps["alone"]),
    }
    viewed = Spread.of(pace.viewed for pace in paces["served"])
    recorded = Spread.of(pace.recorded for pace in paces["served"])
    lost = sum(pace.lost for pace in paces["served"])
    for title, spread in spreads.items():
        say(f"{title.replace('_', ' '):<24}{spread.text(2 if title.endswith('fps') else 3):>28}")
    say(f"the viewer got {viewed.text(1)} pictures per second")
    say(f"the recording got {recorded.text(1)} per second, {lost} lost")
    say(f"Target: of engine >= {OF_ENGINE_TARGET}. Median over the rounds, extremes in brackets.")
    write_json(
        options.json,
        {
            "benchmark": "serve",
            "machine": machine(PACKAGES),
            "model": options.model,
            "threads": options.threads,
            "rounds": options.rounds,
            "frames": frames,
            "quick": options.quick,
            "targets": {"of_engine": OF_ENGINE_TARGET},
            "rows": [
                {
                    "engine": name,
                    "description": description,
                    "frame": list(SIZE),
                    **{title: spread.to_dict() for title, spread in spreads.items()},
                    "viewed_fps": viewed.to_dict(),
                    "recorded_fps": recorded.to_dict(),
                    "recorded_lost": lost,
                }
            ],
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
