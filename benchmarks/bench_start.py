"""From nothing to the first mask: how long a fresh process takes, with EdgeSeg and with PyTorch.

Every figure is of a new Python process, from its creation to the line that it prints when it is
done, so the interpreter's own start is included. In turn, round by round:

- ``import edgeseg``, and the same with its names looked up, which brings numpy and OpenCV
- first mask with EdgeSeg on each engine that is installed: import, ``load("streets")`` (which
  checks the file's hash and the golden pair), read a picture from disk, mask at its size
- first mask with PyTorch as a user would otherwise get it: import torch and OpenCV, build the same
  network, load the same weights from a ``.pt`` file, read, resize, normalise, infer, argmax, resize

"Cold" means a new process with nothing compiled or loaded; the files are in the system's cache, as
they are when a program is started the second time. One unmeasured round puts them there.

    python benchmarks/bench_start.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
from rounds import Spread, add_output_arguments, in_turn, machine, ratio, say, write_json

from edgeseg.engine import available_engines
from edgeseg.synthetic import Street

FRAME = (720, 960)
MODEL = "streets"
PACKAGES = ("edgeseg", "openvino", "onnxruntime", "torch", "opencv-python", "numpy")
IMPORT_TARGET_S = 0.3
FIRST_MASK_TARGET_S = 2.0

DONE = "done"

IMPORT = f"""
import edgeseg
print({DONE!r}, flush=True)
"""

LOOK_UP = f"""
import edgeseg
edgeseg.load, edgeseg.Frame
print({DONE!r}, flush=True)
"""

FIRST_MASK = f"""
import sys
import cv2
import edgeseg
model = edgeseg.load({MODEL!r}, engine=sys.argv[2])
class_map = model(cv2.imread(sys.argv[1])).class_map
print({DONE!r}, class_map.shape, flush=True)
"""

# The network's definition is EdgeSeg's own; importing it brings torch and nothing else heavy.
FIRST_MASK_TORCH = f"""
import sys
import cv2
import torch
from edgeseg.export.models import create
network = create("bisenetv2", int(sys.argv[3]))
network.load_state_dict(torch.load(sys.argv[2], weights_only=True))
pixels = cv2.imread(sys.argv[1])
rgb = cv2.cvtColor(cv2.resize(pixels, (int(sys.argv[5]), int(sys.argv[4]))), cv2.COLOR_BGR2RGB)
x = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0).float() / 255
mean = torch.tensor([0.3257, 0.3690, 0.3223]).view(1, 3, 1, 1)
std = torch.tensor([0.2112, 0.2148, 0.2115]).view(1, 3, 1, 1)
with torch.inference_mode():
    classes = network((x - mean) / std).argmax(dim=1)[0].to(torch.uint8).numpy()
class_map = cv2.resize(classes, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST)
print({DONE!r}, class_map.shape, flush=True)
"""


def seconds_until_done(code: str, *arguments: str) -> float:
    """From the creation of a Python process that runs ``code`` until it says that it is done."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    elapsed = time.perf_counter() - started
    _, errors = process.communicate()
    if not line.startswith(DONE):
        raise SystemExit(f"the measured program failed:\n{errors}")
    return elapsed


def torch_arguments(folder: Path) -> list[str]:
    """Writes the shipped weights as a user's checkpoint; what the PyTorch program is called with.

    Empty without torch.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnx") is None:
        return []
    from edgeseg.bundle import Bundle
    from edgeseg.export.models import create
    from edgeseg.export.weights import load_weights, save_weights

    spec = Bundle.open(MODEL).spec
    network = load_weights(create(spec.architecture, len(spec.classes)), MODEL)
    save_weights(network, folder / "weights.pt")
    return [
        str(folder / "weights.pt"),
        str(len(spec.classes)),
        str(spec.height),
        str(spec.width),
    ]


def _engine_start(picture: Path, engine: str) -> Callable[[], float]:
    return lambda: seconds_until_done(FIRST_MASK, str(picture), engine)


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "street.png"
        cv2.imwrite(str(picture), Street(*FRAME, seed=3).frame(0).pixels)
        candidates: dict[str, Callable[[], float]] = {
            "import edgeseg": lambda: seconds_until_done(IMPORT),
            "names looked up": lambda: seconds_until_done(LOOK_UP),
        }
        for name in available_engines():
            candidates[f"first mask, {name}"] = _engine_start(picture, name)
        checkpoint = torch_arguments(Path(folder))
        if checkpoint:
            candidates["first mask, PyTorch"] = lambda: seconds_until_done(
                FIRST_MASK_TORCH, str(picture), *checkpoint
            )
        in_turn(candidates, 1)
        say(f"{rounds} rounds")
        return in_turn(candidates, rounds)


def target_s(name: str) -> float | None:
    """Seconds within which a candidate is to be done, None for one that has no target."""
    if name == "import edgeseg":
        return IMPORT_TARGET_S
    if name.startswith("first mask") and not name.endswith("PyTorch"):
        return FIRST_MASK_TARGET_S
    return None


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes of each kind")
    add_output_arguments(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    times = measure(options.rounds)
    eager = times.get("first mask, PyTorch")
    rows: list[dict[str, object]] = []
    say(f"{'':<28}{'seconds':>22}{'target':>10}{'PyTorch takes':>24}")
    for name, seconds in times.items():
        spread = Spread.of(seconds)
        row: dict[str, object] = {"what": name, "seconds": spread.to_dict()}
        target = target_s(name)
        longer = ""
        if target is not None:
            row["target_s"] = target
        if eager is not None and name.startswith("first mask") and seconds is not eager:
            times_longer = ratio(eager, seconds)
            row["torch_takes_times"] = times_longer.to_dict()
            longer = f"{times_longer.text(2)} x"
        limit = "" if target is None else f"< {target}"
        say(f"{name:<28}{spread.text(3):>22}{limit:>10}{longer:>24}")
        rows.append(row)
    write_json(
        options.json,
        {
            "benchmark": "start",
            "machine": machine(PACKAGES),
            "model": MODEL,
            "frame": list(FRAME),
            "rounds": options.rounds,
            "quick": options.quick,
            "rows": rows,
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
