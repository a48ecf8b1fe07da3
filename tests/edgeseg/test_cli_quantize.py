"""``edgeseg quantize``, and ``edgeseg inspect`` of what it made: figures, and one sentence for all
that goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx", reason="the workstation side needs onnx")

from edgeseg.bundle import Bundle
from edgeseg.classes import CAMVID
from edgeseg.cli import main
from edgeseg.engine import available_engines, open_engine

if TYPE_CHECKING:
    from tests.conftest import Tiny

FRAMES, PICTURES = 6, 3
INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """What a command returned and wrote."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on standard error, without the program's name."""
        (line,) = self.err.splitlines()
        assert line.startswith("edgeseg: ")
        return line.removeprefix("edgeseg: ")


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as wrong:
            assert isinstance(wrong.code, int)
            code = wrong.code
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return run


@dataclass(frozen=True)
class Street:
    """A bundle with CamVid's classes, frames to calibrate it with, and labelled ones that it gets
    right."""

    bundle: Path
    frames: Path
    data: str

    def options(self, target: Path) -> list[str | Path]:
        """A whole request."""
        return [
            "quantize", self.bundle, "--calibration", self.frames, "-o", target, "--threads", "1",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def street(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Street:
    folder = tmp_path_factory.mktemp("street")
    spec = replace(
        tiny.spec, classes=CAMVID.names, colours=CAMVID.colours, ignore=CAMVID.ignore, name="street"
    )
    network = replace(tiny, spec=spec)
    (folder / "frames").mkdir()
    for number in range(FRAMES):
        cv2.imwrite(str(folder / "frames" / f"{number}.png"), blocks(100 + number))
    for part in ("images", "labels"):
        (folder / "camvid" / part / "val").mkdir(parents=True)
    for number in range(PICTURES):
        picture = blocks(number)
        name = f"val/{number}.png"
        cv2.imwrite(str(folder / "camvid" / "images" / name), picture)
        cv2.imwrite(str(folder / "camvid" / "labels" / name), network.class_map(picture))
    return Street(
        network.write(folder / "street"), folder / "frames", f"camvid:{folder / 'camvid'}"
    )


def blocks(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(32, 48, 3): colours with a wide lead of one channel, so that no border is a close call."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 128, (2, 3, 3), dtype=np.uint8)
    strongest = rng.integers(0, 3, (2, 3))
    np.put_along_axis(colours, strongest[..., None], 250, axis=2)
    return colours.repeat(16, axis=0).repeat(16, axis=1)


@pytest.fixture(scope="module")
def int8(street: Street, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized bundle; not to be changed."""
    target = tmp_path_factory.mktemp("made") / "int8"
    options = [*street.options(target), "--data", street.data, "--max-drop", "5"]
    assert main([str(option) for option in options]) == 0
    return target


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_quantize(run: Run, street: Street, int8: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    found = run(
        *street.options(target), "--data", street.data, "--max-drop", "5", "--json",
        tmp_path / "figures.json",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    assert "6 frames may not show all that the ranges must hold; aim at 100" in found.out
    assert "1 of 1 layers with weights in INT8" in found.out
    assert "mIoU on CamVid val, 3 pictures:" in found.out
    assert f"saved {target}; look at {target / 'report.html'}" in found.out
    figures = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert (figures["bundle"], figures["layers"], figures["floats"]) == (str(target), 1, [])
    fp32, made = (figures["accuracy"][name]["miou"] for name in ("fp32", "int8"))
    assert fp32 > 0.99 and fp32 - made <= 0.05 and figures["agreement"] > 0.95
    # The same again, in every byte.
    assert contents(target) == contents(int8)
    for name in available_engines():
        open_engine(Bundle.open(target), name, threads=1).close()


def test_quantize_json_alone(run: Run, street: Street, tmp_path: Path) -> None:
    found = run(
        *street.options(tmp_path / "int8"), "--half", "--ranges", "entropy", "--frames", "4",
        "--name", "other", "--engine", "onnxruntime", "--json", "-",
    )  # fmt: skip
    assert found.code == 0 and json.loads(found.out)["accuracy"] is None
    bundle = Bundle.open(tmp_path / "int8")
    recipe = bundle.manifest["quantization"]["recipe"]
    assert (bundle.name, recipe["half"], recipe["ranges"]) == ("other", True, "entropy")
    assert bundle.manifest["quantization"]["calibration"][0]["frames"] == 4


def test_options_go_before_the_recipe(run: Run, street: Street, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('ranges = "percentile"\npercentile = 99.9\nframes = 3\nequalize = 0.5\n')
    found = run(*street.options(tmp_path / "int8"), "--recipe", path, "--frames", "2")
    assert found.code == 0
    recipe = Bundle.open(tmp_path / "int8").manifest["quantization"]["recipe"]
    assert [recipe[name] for name in ("ranges", "percentile", "frames", "equalize")] == [
        "percentile", 99.9, 2, 0.5,
    ]  # fmt: skip


def test_inspect_of_a_quantized_bundle(run: Run, int8: Path) -> None:
    found = run("inspect", int8)
    assert (found.code, found.err) == (0, "")
    assert "layers in floating point: none" in found.out
    assert "calibrated with 6 frames of folder frames" in found.out
    assert "placement for TensorRT" in found.out
    content = json.loads(run("inspect", int8, "--json", "-").out)
    assert content["placement"]["avoidable"] == 0
    assert content["placement"] == content["manifest"]["quantization"]["placement"]


def test_inspect_of_floats_says_nothing_of_it(run: Run, street: Street) -> None:
    found = run("inspect", street.bundle)
    assert found.code == 0 and "TensorRT" not in found.out and "quantization" not in found.out


# --- what cannot be done

Options = Callable[[Street, Path], list[str | Path]]

#: options behind a whole request, the exit code, and words of the sentence
WRONG: dict[str, tuple[Options, int, str]] = {
    "a budget without data": (lambda street, tmp: ["--max-drop", "0.3"], 2, "--data camvid:DIR"),
    "a negative budget": (
        lambda street, tmp: ["--max-drop", "-1", "--data", street.data],
        2,
        "0 to 100, and -1 came",
    ),
    "an unknown layer": (
        lambda street, tmp: ["--keep-float", "head"],
        2,
        "there is no layer 'head' to leave in floating point; the layers are kernel",
    ),
    "FP16 and a layer": (
        lambda street, tmp: ["--fp16", "--keep-float", "kernel"],
        2,
        "--fp16 leaves no layer in INT8",
    ),
    "all layers": (lambda street, tmp: ["--keep-float", "kernel"], 2, "nothing is left"),
    "an unknown method": (
        lambda street, tmp: ["--ranges", "max"],
        2,
        "ranges are one of minmax, average, percentile, entropy, mse, and 'max' came",
    ),
    "an unknown engine": (lambda street, tmp: ["--engine", "tensorflow"], 2, "the engines are"),
    "no recipe": (lambda street, tmp: ["--recipe", tmp / "no.toml"], 2, "cannot be read"),
    "a wrong recipe": (
        lambda street, tmp: ["--recipe", written(tmp, "range = 'mse'")],
        2,
        "does not fit: it says range, and knows ranges",
    ),
    "a wrong type": (
        lambda street, tmp: ["--recipe", written(tmp, "[finetune]\nsteps = 'many'")],
        2,
        "steps is 'many', and a whole number is wanted",
    ),
    "no frames there": (
        lambda street, tmp: ["--calibration", tmp / "none"],
        1,
        "does not exist; calibration frames are a folder of images",
    ),
    "no frames in it": (lambda street, tmp: ["--calibration", empty(tmp)], 1, "no images"),
    "noise": (lambda street, tmp: ["--calibration", noise(tmp)], 1, "3 show noise or nothing"),
    "overlap": (
        lambda street, tmp: [
            "--data", street.data, "--calibration", street.data.removeprefix("camvid:")
            + "/images/val",
        ],
        1,
        "3 frames to calibrate with are also in the evaluation set CamVid val",
    ),
    "no data": (lambda street, tmp: ["--data", f"camvid:{tmp}"], 1, "there is no folder"),
    "the bundle itself": (lambda street, tmp: ["-o", street.bundle], 2, "one another name"),
    "a folder of something else": (
        lambda street, tmp: ["-o", street.frames],
        2,
        "exists and is no bundle",
    ),
    "no place for figures": (
        lambda street, tmp: ["--json", tmp / "no" / "x.json"],
        1,
        "is no writable folder",
    ),
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def noise(folder: Path) -> Path:
    (folder / "noise").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (96, 144, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "noise" / f"{number}.png"), pixels)
    return folder / "noise"


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_sentence(
    run: Run, street: Street, tmp_path: Path, case: str
) -> None:
    options, code, words = WRONG[case]
    before = contents(street.bundle.parent)
    found = run(*street.options(tmp_path / "int8"), *options(street, tmp_path))
    assert found.code == code and words in found.sentence
    assert found.out == "" and not (tmp_path / "int8").exists()
    assert contents(street.bundle.parent) == before


def test_quantized_already(run: Run, street: Street, int8: Path, tmp_path: Path) -> None:
    found = run(*replace(street, bundle=int8).options(tmp_path / "twice"))
    assert found.code == 1
    assert found.sentence.endswith(
        "is quantized already; give the floating-point bundle it came from"
    )


def test_a_budget_that_cannot_be_met(run: Run, street: Street, tmp_path: Path) -> None:
    """Labels of another world, with which no two graphs agree alike."""
    folder = tmp_path / "camvid"
    shutil.copytree(street.data.removeprefix("camvid:"), folder)
    target = tmp_path / "int8"
    # One level per channel: INT8 sees nothing of what the labels tell apart.
    for number in range(PICTURES):
        level = np.full((32, 48, 3), 100, np.uint8)
        level[:, :24, 0] += 1
        level[:, 24:, 2] += 1
        cv2.imwrite(str(folder / "images" / "val" / f"{number}.png"), level)
        labels = np.zeros((32, 48), np.uint8)
        labels[:, 24:] = 2
        cv2.imwrite(str(folder / "labels" / "val" / f"{number}.png"), labels)
    found = run(*street.options(target), "--data", f"camvid:{folder}", "--max-drop", "0.3")
    assert found.code == 1 and not target.exists()
    assert "no INT8 graph within 0.3 points of mIoU was found: the best loses" in found.sentence
    assert "with 0 of 1 layers in floating point; allow --max-drop" in found.sentence


def test_finetuning_without_torch(
    run: Run, street: Street, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "edgeseg.export.finetune", raising=False)
    found = run(*street.options(tmp_path / "int8"), "--finetune", "5")
    assert found.code == 1 and list(tmp_path.iterdir()) == []
    assert found.sentence == (
        "this command prepares models and needs torch, which is not installed; "
        "pip install 'edgeseg[export]' adds it"
    )


def test_finetuning(run: Run, street: Street, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the workstation side needs torch")
    found = run(*street.options(tmp_path / "int8"), "--finetune", "2")
    assert found.code == 0
    said = Bundle.open(tmp_path / "int8").manifest["quantization"]
    assert said["recipe"]["finetune"]["steps"] == 2
    assert [entry["frames"] for entry in said["finetuning"]] == [FRAMES]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle(
    street: Street, int8: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Another process, stopped once it has kept something; the second run gives the same."""
    target, work = tmp_path / "int8", tmp_path / ".int8.quantize"
    options = [str(each) for each in street.options(target)]
    options += ["--data", street.data, "--max-drop", "5"]
    before = contents(street.bundle)
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeseg", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (work / "calibrated").is_dir() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == INTERRUPTED and errors.endswith("edgeseg: stopped\n")
    else:
        assert process.returncode == -number
    assert not target.exists() and work.is_dir() and contents(street.bundle) == before
    assert main(options) == 0
    assert contents(target) == contents(int8)
    assert not work.exists()
