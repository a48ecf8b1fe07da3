"""The command line: what each command gives, and one clear sentence for all that goes wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
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

import edgeseg
from edgeseg import sink as sink_module
from edgeseg.bundle import Bundle
from edgeseg.classes import CAMVID
from edgeseg.cli import main
from edgeseg.engine import openvino as openvino_module
from edgeseg.frame import Pixels, checked_pixels
from edgeseg.result import AnyOutputs, SemanticResult
from edgeseg.sink import window as window_module
from edgeseg.source import quiet_opencv
from tests.edgeseg.tiny_instances import TinyInstances

if TYPE_CHECKING:
    from tests.conftest import Tiny

STREET = "synthetic:?size=48x64&frames=6"
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

    @property
    def content(self) -> dict[str, Any]:
        """Standard output, which has to be JSON and nothing else."""
        content = json.loads(self.out, parse_constant=pytest.fail)
        assert isinstance(content, dict)
        return content


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; OpenCV's own writing to standard error is caught as well."""

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


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder for output."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write_video(path: Path, frames: int, codec: str = "MJPG") -> Path:
    with quiet_opencv():
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 20.0, (64, 48))
        assert writer.isOpened()
        for index in range(frames):
            writer.write(np.full((48, 64, 3), 8 * index % 256, np.uint8))
        writer.release()
    return path


def lie(path: Path, frames: int) -> None:
    """Makes the header of an AVI promise ``frames``."""
    content = bytearray(path.read_bytes())
    for chunk, field in ((b"avih", 16), (b"strh", 32)):
        struct.pack_into("<I", content, content.index(chunk) + 8 + field, frames)
    path.write_bytes(bytes(content))


def video_frames(path: Path) -> list[Pixels]:
    capture = cv2.VideoCapture(str(path))
    frames: list[Pixels] = []
    while True:
        found, frame = capture.read()
        if not found:
            capture.release()
            return frames
        frames.append(checked_pixels(frame))


# --- what every command gives


def test_help_and_version(run: Run) -> None:
    plain = run()
    assert plain.code == 0 and "edgeseg demo" in plain.out
    commands = ("demo", "run", "profile", "eval", "export", "train", "inspect", "doctor")
    for command in commands:
        assert f"\n    {command} " in plain.out
        found = run(command, "--help")
        assert found.code == 0 and found.out.startswith(f"usage: edgeseg {command}")
    version = run("--version")
    assert (version.code, version.out) == (0, f"edgeseg {edgeseg.__version__}\n")
    assert importlib.metadata.version("edgeseg") == edgeseg.__version__


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("head", ["auto", "graph"])
def test_run(run: Run, bundle_folder: Path, place: Path, engine: str, head: str) -> None:
    pytest.importorskip(engine)
    target = place / "out.avi"
    found = run(
        "run", bundle_folder, "--source", STREET, "--save", target,
        "--engine", engine, "--head", head, "--threads", 1, "--json", place / "figures.json",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    assert "1 threads" in found.out and "6 frames, 0 dropped" in found.out
    assert f"saved {target}" in found.out
    assert names(place) == ["figures.json", "out.avi"]
    frames = video_frames(target)
    assert len(frames) == 6 and frames[0].shape == (48, 64, 3)
    content = json.loads((place / "figures.json").read_text())
    assert (content["frames"], content["dropped"], content["engine"]) == (6, 0, engine)
    assert list(content["stages"]) == ["capture", "fit", "network", "head", "restore", "output"]


def test_run_without_output(run: Run, bundle_folder: Path, place: Path) -> None:
    found = run("run", bundle_folder, "--source", STREET, "--frames", 3)
    assert found.code == 0 and "3 frames" in found.out and "saved" not in found.out


def test_run_to_a_folder_with_masks(run: Run, bundle_folder: Path, place: Path, tiny: Tiny) -> None:
    frames = place / "frames"
    frames.mkdir()
    for seed in range(3):
        cv2.imwrite(str(frames / f"{seed}.png"), tiny.picture(seed))
    found = run("run", bundle_folder, "--source", frames, "--save", place / "out", "--masks")
    assert found.code == 0
    assert names(place / "out") == sorted(
        f"{index:06d}{kind}.png" for index in range(3) for kind in ("", "_classes")
    )
    for seed in range(3):
        mask = cv2.imread(str(place / "out" / f"{seed:06d}_classes.png"), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        np.testing.assert_array_equal(mask, tiny.class_map(tiny.picture(seed)))


@pytest.mark.parametrize("arguments", [("run", "--source", STREET), ("profile", "--frames", "3")])
def test_json_alone_on_standard_output(
    run: Run, bundle_folder: Path, arguments: tuple[str, ...]
) -> None:
    command, *rest = arguments
    found = run(command, bundle_folder, *rest, "--json", "-")
    assert (found.code, found.err) == (0, "")
    assert {"fps", "frames", "dropped", "engine", "stages", "mask_age_ms"} <= found.content.keys()


def test_profile(run: Run, bundle_folder: Path, place: Path) -> None:
    found = run(
        "profile", bundle_folder, "--source", STREET,
        "--json", place / "figures.json", "--report", place / "report.html",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    assert "frames per second" in found.out and "64x48 frames, network 48x32" in found.out
    assert names(place) == ["figures.json", "report.html"]
    content = json.loads((place / "figures.json").read_text())
    keys = {"fps", "frames", "dropped", "engine", "stages", "mask_age_ms", "peak_rss_mb"}
    assert keys <= content.keys()
    assert all(
        times.keys() == {"p50_ms", "p95_ms", "p99_ms"} for times in content["stages"].values()
    )
    assert content["mask_age_ms"].keys() == {"p50", "p99"}
    assert "frames per second" in (place / "report.html").read_text(encoding="utf-8")


def test_eval(run: Run, place: Path) -> None:
    arguments = ("eval", "streets", "--data", "synthetic:?frames=4", "--limit", "3")
    content = run(*arguments, "--json", "-").content
    assert {"miou", "per_class", "frames"} <= content.keys()
    assert content["frames"] == 3 and 0 < content["miou"] <= 1
    assert list(content["per_class"]) == list(CAMVID.names)
    found = run(*arguments, "--json", place / "figures.json")
    assert found.code == 0 and "mIoU" in found.out and "bicyclist" in found.out
    again = json.loads((place / "figures.json").read_text())
    assert again["per_class"] == content["per_class"]


def test_eval_of_outlines(run: Run) -> None:
    arguments = ("eval", "streets", "--data", "synthetic:?frames=2&size=96x128", "--boundary")
    found = run(*arguments)
    assert found.code == 0
    assert all(title in found.out for title in ("IoU", "Dice", "boundary", "HD95 px"))
    content = run(*arguments, "--json", "-").content
    keys = {"miou", "dice", "pixel_accuracy", "boundary_iou", "hd95", "per_class_hd95"}
    assert keys <= content.keys() and 0 < content["boundary_iou"] < content["miou"]


def test_eval_of_objects(run: Run, place: Path) -> None:
    for package in ("onnx", "torch", "pycocotools"):
        pytest.importorskip(package)
    model = TinyInstances()
    bundle = model.write(place / "tiny")
    folder = place / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").mkdir()
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number in range(3):
        pixels = model.picture(number)
        assert cv2.imwrite(str(folder / f"val/{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png", "height": 32, "width": 48})
        outputs = model.outputs(pixels)
        for (x1, y1, x2, y2), label in zip(
            outputs.boxes.clip(0, [48, 32, 48, 32]).tolist(), outputs.labels.tolist(), strict=True
        ):
            outline = [x1, y1, x2, y1, x2, y2, x1, y2]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 10 - label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [outline],
                }
            )
    categories = [{"id": 10 - label, "name": name} for label, name in enumerate(model.spec.classes)]
    (folder / "annotations/instances_val.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    arguments = ("eval", bundle, "--data", f"coco:{folder}")
    content = run(*arguments, "--json", "-").content
    assert content["frames"] == 3 and content["box_ap"] == pytest.approx(1)
    assert 0 <= content["mask_ap"] < 1
    assert list(content["per_class"]) == ["red", "green", "blue"]
    found = run(*arguments)
    assert found.code == 0
    assert all(part in found.out for part in ("AP50", "AR 100", "AP of a class", "green"))
    for wrong, sentence in (
        (("eval", bundle, "--data", "camvid:x"), "for an instance model use coco:DIR"),
        ((*arguments, "--boundary"), "--boundary is for semantic models"),
        (("eval", "streets", "--data", f"coco:{folder}"), "for a semantic one use camvid:DIR"),
    ):
        outcome = run(*wrong)
        assert outcome.code == 2 and sentence in outcome.sentence


def test_eval_of_segments(run: Run, place: Path) -> None:
    for package in ("onnx", "torch"):
        pytest.importorskip(package)
    model = TinyInstances()
    things = ("car", "pedestrian", "bicyclist")
    other = replace(model, spec=replace(model.spec, classes=things)).write(place / "things")
    arguments = ("eval", "streets", "--panoptic", other, "--data", "synthetic:?frames=2")
    content = run(*arguments, "--json", "-").content
    assert {"pq", "sq", "rq", "things", "stuff", "per_class", "frames"} <= content.keys()
    assert 0 < content["pq"] < content["stuff"]["pq"] < 1
    assert list(content["per_class"]) == list(CAMVID.names)
    found = run(*arguments, "--limit", "1")
    assert found.code == 0
    assert all(part in found.out for part in ("PQ", "SQ", "RQ", "things", "1 pictures", "road"))
    for wrong, sentence in (
        ((*arguments, "--boundary"), "--boundary is for class maps"),
        (("eval", other, "--panoptic", other, "--data", "synthetic:"), "are for semantic models"),
        (("eval", "streets", "--panoptic", other, "--data", "camvid:x"), "is synthetic:"),
    ):
        outcome = run(*wrong)
        assert outcome.code == 2 and sentence in outcome.sentence


def test_inspect(run: Run, bundle_folder: Path, place: Path) -> None:
    found = run("inspect", bundle_folder, "--json", place / "spec.json")
    assert (found.code, found.err) == (0, "")
    for part in ("tiny: semantic", "(1, 32, 48, 3)", "stretch", "blue, green, red"):
        assert part in found.out
    content = json.loads((place / "spec.json").read_text())
    assert content["spec"]["classes"] == ["blue", "green", "red"]
    assert content["manifest"]["files"].keys() == {"model.onnx", "report.html"}
    assert run("inspect", bundle_folder / "model.onnx").code == 0
    shipped = run("inspect", "streets").out
    assert "bisenetv2" in shipped and "provenance" in shipped


def test_doctor(run: Run) -> None:
    found = run("doctor", "--json", "-")
    assert (found.code, found.err) == (0, "")
    assert found.content["healthy"] is True and len(found.content["checks"]) > 10


def test_export_of_the_shipped_model(run: Run, place: Path) -> None:
    found = run("export", "streets", "-o", place / "copy")
    assert (found.code, found.err) == (0, "")
    assert Bundle.open(place / "copy").name == "streets"
    assert names(place) == ["copy", *(f"copy/{name}" for name in names(place / "copy"))]
    assert run("inspect", place / "copy").code == 0


def test_demo(run: Run, place: Path) -> None:
    found = run("demo", "-o", place / "demo", "--frames", "2")
    assert found.code == 0
    assert names(place / "demo") == ["report.html", "report.json", "segmented.mp4"]
    for part in ("frames per second", "mIoU", "demo/report.html", "edgeseg run streets --source"):
        assert part in found.out
    assert len(video_frames(place / "demo" / "segmented.mp4")) == 2


# --- frames that are not as promised


def test_video_that_ends_early(run: Run, bundle_folder: Path, place: Path) -> None:
    video = write_video(place / "clip.avi", 40)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    found = run("run", bundle_folder, "--source", video, "--save", place / "out.avi")
    assert (found.code, found.err) == (0, "")
    (note,) = [line for line in found.out.splitlines() if "promises" in line]
    assert "promises 40 frames" in note and "could be read" in note
    written = len(video_frames(place / "out.avi"))
    assert 0 < written < 40 and f"{written} frames, 0 dropped" in found.out
    assert names(place) == ["clip.avi", "out.avi"]


@pytest.mark.parametrize("promised", [3, 500])
def test_header_that_lies(run: Run, bundle_folder: Path, place: Path, promised: int) -> None:
    video = write_video(place / "clip.avi", 20)
    lie(video, promised)
    found = run("run", bundle_folder, "--source", video, "--save", place / "out.avi", "--json", "-")
    assert (found.code, found.err) == (0, "")
    assert len(video_frames(place / "out.avi")) == found.content["frames"] <= 20
    # A decoder may believe a header that promises too little; one that promises too much is told.
    if found.content["frames"] == 20:
        (note,) = found.content["notes"]
        assert f"promises {promised} frames and 20 could be read" in note
    else:
        assert promised == 3


def test_size_that_changes_midway(run: Run, bundle_folder: Path, place: Path) -> None:
    frames = place / "frames"
    frames.mkdir()
    for index, size in enumerate([(48, 64), (90, 60), (33, 201), (48, 64)]):
        cv2.imwrite(str(frames / f"{index}.png"), np.full((*size, 3), 90, np.uint8))
    for name in ("out.avi", "out"):
        found = run("run", bundle_folder, "--source", frames, "--save", place / name)
        assert (found.code, found.err) == (0, "")
    pictures = video_frames(place / "out.avi")
    assert [picture.shape for picture in pictures] == [(48, 64, 3)] * 4
    sizes = [cv2.imread(str(path)) for path in sorted((place / "out").iterdir())]
    assert [picture.shape[:2] for picture in sizes if picture is not None] == [
        (48, 64), (90, 60), (33, 201), (48, 64),
    ]  # fmt: skip


def test_grey_and_transparent_pictures(run: Run, bundle_folder: Path, place: Path) -> None:
    frames = place / "frames"
    frames.mkdir()
    cv2.imwrite(str(frames / "0.png"), np.full((48, 64), 90, np.uint8))
    cv2.imwrite(str(frames / "1.png"), np.full((48, 64, 4), 90, np.uint8))
    found = run("run", bundle_folder, "--source", frames)
    assert found.code == 0 and "2 frames" in found.out


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("none.mp4", 1, "none.mp4 does not exist"),
        ("empty.mp4", 1, "is empty, and a video was promised"),
        ("text.mp4", 1, "is no video that OpenCV can read"),
        ("cut.mp4", 1, "is no video that OpenCV can read"),
        ("folder", 1, "holds no images"),
        ("folder/*.png", 1, "no image matches"),
        ("77", 1, "camera 77 "),
        ("csi://front", 2, "a CSI camera is csi://0"),
        ("synthetic:?size=big", 2, "a size is HEIGHTxWIDTH, such as 384x480, and 'big' came"),
        ("synthetic:?size=8x8", 2, "from 32"),
        ("synthetic:?colour=red", 2, "'colour' came"),
        ("", 2, "an empty text came"),
    ],
)
def test_sources_that_give_nothing(
    run: Run,
    bundle_folder: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(place)
    (place / "folder").mkdir()
    (place / "empty.mp4").touch()
    (place / "text.mp4").write_text("no video\n" * 100)
    video = write_video(place / "cut.mp4", 20, "mp4v")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    before = names(place)
    for command in (("run", "--save", "out.mp4"), ("profile", "--report", "out.html")):
        found = run(command[0], bundle_folder, "--source", source, *command[1:], "--json", "o.json")
        assert (found.code, found.out) == (code, "")
        assert says in found.sentence
        assert names(place) == before


# --- places that cannot be written


@pytest.mark.parametrize("where", ["missing/out", "file/out", "taken", "folder"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("run", "--json"),
        ("profile", "--json"),
        ("profile", "--report"),
        ("inspect", "--json"),
        ("doctor", "--json"),
        ("eval", "--json"),
    ],
)
def test_unwritable_file(
    run: Run,
    bundle_folder: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    option: str,
    where: str,
) -> None:
    (place / "file").write_text("mine")
    (place / "folder").mkdir()
    (place / "taken").mkdir()
    (place / "taken" / "mine").write_text("mine")
    before = names(place)
    monkeypatch.setattr(Bundle, "open", lambda source: pytest.fail("no work is to begin"))
    arguments = {
        "run": (bundle_folder, "--source", STREET),
        "profile": (bundle_folder,),
        "inspect": (bundle_folder,),
        "eval": (bundle_folder, "--data", "synthetic:"),
        "doctor": (),
    }
    found = run(command, *arguments[command], option, place / where)
    assert (found.code, found.out) == (1, "")
    assert "cannot be written" in found.sentence
    assert names(place) == before and (place / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("where", "code", "says"),
    [
        ("missing/out.mp4", 1, "missing does not exist; make it, or choose another"),
        ("file/out.mp4", 1, "file does not exist"),
        ("file/out", 1, "cannot be made"),
        ("file", 1, "cannot be made"),
        ("out.mov", 2, "results go to a video"),
        ("out.png", 2, "results go to a video"),
    ],
)
def test_unwritable_results(
    run: Run, bundle_folder: Path, place: Path, where: str, code: int, says: str
) -> None:
    (place / "file").write_text("mine")
    found = run("run", bundle_folder, "--source", STREET, "--save", place / where)
    assert (found.code, found.out) == (code, "")
    assert says in found.sentence
    assert names(place) == ["file"]


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_unwritable_demo(run: Run, place: Path, where: str) -> None:
    (place / "file").write_text("mine")
    found = run("demo", "--frames", "2", "-o", place / where)
    assert (found.code, found.out) == (1, "")
    assert "cannot be written" in found.sentence
    assert names(place) == ["file"]


@pytest.mark.parametrize("target", ["file", "photos", "file/below"])
def test_unwritable_bundle(run: Run, place: Path, target: str) -> None:
    (place / "file").write_text("mine")
    (place / "photos").mkdir()
    (place / "photos" / "1.jpg").write_text("mine")
    before = names(place)
    found = run("export", "streets", "-o", place / target)
    assert found.code == (1 if "/" in target else 2) and found.out == ""
    assert "cannot be written" in found.sentence or "is no bundle" in found.sentence
    assert names(place) == before


def test_folder_without_permission(run: Run, bundle_folder: Path, place: Path) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    place.chmod(0o555)
    try:
        for option, name in (("--save", "out.mp4"), ("--save", "out"), ("--json", "x.json")):
            found = run("run", bundle_folder, "--source", STREET, option, place / name)
            assert found.code == 1 and found.sentence
        assert names(place) == []
    finally:
        place.chmod(0o755)


def test_window_without_a_display(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "_is_headless", lambda: True)
    found = run("run", bundle_folder, "--source", STREET, "--show", "--save", place / "out.mp4")
    assert (found.code, found.out) == (1, "")
    assert "headless build" in found.sentence and "--save" in found.sentence
    assert names(place) == []


# --- bundles that are not as promised


def every_command(bundle: Path | str) -> list[tuple[str | Path, ...]]:
    return [
        ("run", bundle, "--source", STREET),
        ("profile", bundle),
        ("eval", bundle, "--data", "synthetic:?frames=1"),
        ("inspect", bundle),
    ]


def changed_byte(folder: Path) -> Path:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "model.onnx").write_bytes(bytes(content))
    return folder


def truncated(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    return path


def foreign(folder: Path) -> Path:
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    path = folder / "foreign.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def without_manifest(folder: Path) -> Path:
    (folder / "bundle.json").unlink()
    return folder


def damaged_manifest(folder: Path) -> Path:
    (folder / "bundle.json").write_text('{"files": ')
    return folder


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (changed_byte, "is not the file that was exported"),
        (truncated, "is not a whole ONNX file"),
        (foreign, "was not exported by EdgeSeg"),
        (without_manifest, "is not a bundle: it has no bundle.json"),
        (damaged_manifest, "bundle.json is damaged"),
        (lambda folder: folder / "none", "there is no bundle"),
        (lambda folder: "steets", "a model that ships with EdgeSeg: streets"),
    ],
)
def test_bad_bundle(
    run: Run, bundle_folder: Path, spoil: Callable[[Path], Path | str], says: str
) -> None:
    for command in every_command(spoil(bundle_folder)):
        found = run(*command)
        assert (found.code, found.out) == (1, "")
        assert says in found.sentence


def test_other_classes_than_the_data(run: Run, bundle_folder: Path) -> None:
    found = run("eval", bundle_folder, "--data", "synthetic:?frames=1")
    assert found.code == 1 and "its 3 are not the 11" in found.sentence


# --- wrong requests


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("run", "BUNDLE", "--source", STREET, "--engine", "abacus"),
            "the engines are tensorrt, openvino",
        ),
        (("profile", "BUNDLE", "--engine", ""), "the engines are tensorrt, openvino"),
        (("run", "BUNDLE", "--source", STREET, "--save", "x.mp4", "--opacity", "2"), "0 and 1"),
        (("eval", "streets", "--data", "imagenet:x"), "imagenet"),
        (("eval", "streets", "--data", "synthetic:", "--split", "moon"), "not 'moon'"),
        (("eval", "streets", "--data", "synthetic:?size=0x0"), "0x0"),
    ],
)
def test_wrong_requests(
    run: Run,
    bundle_folder: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(place)
    found = run(*(bundle_folder if word == "BUNDLE" else word for word in arguments))
    assert (found.code, found.out) == (2, "")
    assert says in found.sentence
    assert names(place) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("segment",), "invalid choice: 'segment'"),
        (("run",), "required: BUNDLE"),
        (("run", "x", "--source", "y", "--frames", "0"), "a whole number from 1 .*'0' came"),
        (("run", "x", "--source", "y", "--frames", "many"), "a whole number from 1 .*'many' came"),
        (("run", "x", "--source", "y", "--threads", "-1"), "--threads"),
        (("profile", "x", "--frames", "1.5"), "a whole number from 1 .*'1.5' came"),
        (("profile", "x", "--head", "wooden"), "invalid choice: 'wooden'"),
        (("demo", "--speed", "3"), "unrecognized arguments"),
    ],
)
def test_wrong_options(run: Run, arguments: tuple[str, ...], says: str) -> None:
    found = run(*arguments)
    assert (found.code, found.out) == (2, "")
    usage, *_, sentence = found.err.splitlines()
    assert usage.startswith("usage: edgeseg")
    assert re.search(says, sentence)


def test_engine_that_is_not_installed(
    run: Run, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    found = run("run", bundle_folder, "--source", STREET, "--engine", "openvino")
    assert found.code == 1
    assert found.sentence == "the engine openvino is not installed; `pip install openvino` adds it"
    found = run("run", bundle_folder, "--source", STREET)
    assert found.code == 1 and "no inference engine is installed" in found.sentence


# --- kernels


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the builders of the kernels were asked for; they compile nothing."""
    calls: list[tuple[Any, ...]] = []
    # The package has a function of the module's name.
    module = importlib.import_module("edgeseg.kernels.build")

    def note(name: str, made: Any) -> None:
        def build(*arguments: Any) -> Any:
            calls.append((name, *arguments))
            return made

        monkeypatch.setattr(module, name, build)

    note("build", Path("_cpu.so"))
    note("build_cuda", Path("cuda.so"))
    note("build_tensorrt", (Path("cuda.so"), Path("plugins.so")))
    return calls


@pytest.mark.parametrize(
    ("arguments", "call", "out"),
    [
        pytest.param((), ("build", None), "built _cpu.so\n", id="cpu"),
        pytest.param(("-o", "d"), ("build", Path("d")), "built _cpu.so\n", id="folder"),
        pytest.param(("--cuda",), ("build_cuda", None, None), "built cuda.so\n", id="cuda"),
        pytest.param(
            ("--tensorrt",),
            ("build_tensorrt", None, None, None),
            "built cuda.so\nbuilt plugins.so\n",
            id="tensorrt",
        ),
        pytest.param(
            ("--tensorrt", "--tensorrt-headers", "h", "--arch", "87,110", "-o", "d"),
            ("build_tensorrt", Path("d"), Path("h"), ["87", "110"]),
            "built cuda.so\nbuilt plugins.so\n",
            id="all",
        ),
    ],
)
def test_kernels_build(
    run: Run,
    asked: list[tuple[Any, ...]],
    arguments: tuple[str, ...],
    call: tuple[Any, ...],
    out: str,
) -> None:
    found = run("kernels", "build", *arguments)
    assert (found.code, found.out, found.err) == (0, out, "")
    assert asked == [call]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tensorrt-headers", "d"), "--tensorrt-headers goes with --tensorrt"),
        (("--cuda", "--tensorrt-headers", "d"), "--tensorrt-headers goes with --tensorrt"),
        (("--arch", "87"), "--arch goes with --cuda or --tensorrt"),
        (("--cuda", "--tensorrt"), "not allowed with argument --cuda"),
    ],
)
def test_kernels_build_wrong_options(
    run: Run, asked: list[tuple[Any, ...]], arguments: tuple[str, ...], says: str
) -> None:
    found = run("kernels", "build", *arguments)
    assert found.code == 2 and says in found.err
    assert asked == []


def test_kernels_build_wrong_architecture(run: Run) -> None:
    found = run("kernels", "build", "--cuda", "--arch", "orin")
    assert found.code == 2 and "'orin' came" in found.sentence


# --- stopped midway


class _Interrupting:
    """An engine of its library that is interrupted at its fifth frame."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: int = 6
    ) -> None:
        engine = openvino_module.OpenVinoEngine
        run = engine.run
        self.calls = 0

        def interrupted(this: openvino_module.OpenVinoEngine, pixels: Pixels) -> AnyOutputs:
            self.calls += 1
            # The first call is for the golden pair.
            if self.calls == call:
                raise error
            return run(this, pixels)

        monkeypatch.setattr(engine, "run", interrupted)


def test_interrupted_run_keeps_what_was_finished(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    write = sink_module.VideoSink.write

    def interrupted(sink: sink_module.VideoSink, result: SemanticResult) -> None:
        nonlocal written
        write(sink, result)
        written += 1
        if written == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sink_module.VideoSink, "write", interrupted)
    target = place / "out.avi"
    found = run(
        "run", bundle_folder, "--source", "synthetic:?size=48x64&frames=0", "--save", target,
        "--json", place / "x.json",
    )  # fmt: skip
    assert found.code == 0
    assert found.sentence == "stopped; what was finished is kept"
    assert f"saved {target}" in found.out
    # What was on its way is finished, too.
    frames = json.loads((place / "x.json").read_text())["frames"]
    assert len(video_frames(target)) == written == frames >= 3
    assert names(place) == ["out.avi", "x.json"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_what_was_finished(bundle_folder: Path, place: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeseg", "run", str(bundle_folder),
         "--source", "synthetic:?size=48x64&frames=0", "--save", "out.avi"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        # The first frames are in the file once it has grown.
        while not any(path.stat().st_size > 10_000 for path in place.iterdir()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    # On a slow machine lines of progress come before it.
    assert process.returncode == 0
    assert err.splitlines()[-1] == "edgeseg: stopped; what was finished is kept"
    assert "saved out.avi" in out
    assert names(place) == ["out.avi"] and len(video_frames(place / "out.avi")) > 1


def test_interrupted_engine_keeps_what_was_finished(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Interrupting(monkeypatch, KeyboardInterrupt())
    found = run(
        "run", bundle_folder, "--source", STREET, "--save", place / "out", "--engine", "openvino"
    )
    assert found.code == 0 and "what was finished is kept" in found.err
    assert names(place / "out") == [f"{index:06d}.png" for index in range(4)]


def test_run_interrupted_before_the_first_frame(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Interrupting(monkeypatch, KeyboardInterrupt(), call=2)
    found = run(
        "run", bundle_folder, "--source", STREET, "--save", place / "out.avi",
        "--engine", "openvino",
    )  # fmt: skip
    assert found.code == 0 and "saved" not in found.out
    assert names(place) == []


def test_output_that_fails_leaves_the_others_alone(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeseg.errors import SinkError

    def full(sink: sink_module.VideoSink, result: SemanticResult) -> None:
        raise SinkError("the disk is full")

    monkeypatch.setattr(sink_module.VideoSink, "write", full)
    saves = ["--save", place / "out.avi", "--save", place / "log.jsonl"]
    found = run("run", bundle_folder, "--source", STREET, *saves, "--json", place / "x.json")
    assert (found.code, found.sentence) == (1, "the disk is full; the other outputs go on")
    assert len((place / "log.jsonl").read_text().splitlines()) == 6
    assert names(place) == ["log.jsonl", "x.json"]
    assert json.loads((place / "x.json").read_text())["outlets"][0]["error"] == "the disk is full"
    # The last one: nobody is left to run for.
    found = run("run", bundle_folder, "--source", "synthetic:?size=48x64&frames=0", *saves[:2])
    assert (found.code, found.sentence) == (1, "the disk is full")


def test_source_alone_is_for_the_shipped_model(run: Run, place: Path) -> None:
    found = run("run", "synthetic:?size=96x128&frames=2", "--save", place / "out")
    assert found.code == 0 and "2 frames" in found.out
    assert names(place / "out") == ["000000.png", "000001.png"]
    found = run("run", "nothing")
    assert found.code == 2 and "what nothing is to segment is missing" in found.sentence


def test_engine_that_fails_midway_leaves_nothing(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeseg.errors import EngineError

    _Interrupting(monkeypatch, EngineError("the engine broke"))
    (place / "out.avi").write_text("an older one")
    found = run(
        "run", bundle_folder, "--source", STREET, "--save", place / "out.avi",
        "--json", place / "x.json", "--engine", "openvino",
    )  # fmt: skip
    assert (found.code, found.sentence) == (1, "the engine broke")
    assert names(place) == ["out.avi"]
    assert (place / "out.avi").read_text() == "an older one"


def test_interrupted_profile_leaves_nothing(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Interrupting(monkeypatch, KeyboardInterrupt())
    found = run(
        "profile", bundle_folder, "--engine", "openvino",
        "--report", place / "x.html", "--json", place / "x.json",
    )  # fmt: skip
    assert found.code == INTERRUPTED
    assert found.sentence == "stopped before anything was measured"
    assert names(place) == []


def test_full_disk(
    run: Run, bundle_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    found = run("inspect", bundle_folder, "--json", place / "x.json")
    assert found.code == 1 and "x.json cannot be written (No space left on device)" in found.err
    assert names(place) == []


def test_reader_that_goes_away(bundle_folder: Path) -> None:
    # `edgeseg inspect ... | head -0`
    with subprocess.Popen(
        [sys.executable, "-m", "edgeseg", "inspect", str(bundle_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_module_and_script_are_the_same(bundle_folder: Path) -> None:
    script = shutil.which("edgeseg", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the script is not beside this Python")
    for command in ([script], [sys.executable, "-m", "edgeseg"]):
        found = subprocess.run(
            [*command, "inspect", "nowhere"], capture_output=True, text=True, check=False
        )
        assert found.returncode == 1 and found.stdout == ""
        assert found.stderr.startswith("edgeseg: there is no bundle nowhere")
