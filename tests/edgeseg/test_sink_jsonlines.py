"""JSON lines: what is in them, compared with pycocotools and OpenCV, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import RequestError, SinkError
from edgeseg.frame import Frame
from edgeseg.framemasks import encoded_rle
from edgeseg.geometry import Geometry
from edgeseg.instances import InstanceOutputs, InstanceResult
from edgeseg.panoptic import PanopticResult
from edgeseg.result import Outputs, SemanticResult
from edgeseg.sink import JsonLinesSink, MultiSink, Outlet, open_sink
from edgeseg.sink.jsonlines import SHAPES, Shapes
from edgeseg.sink.runlengths import runs_of
from edgeseg.spec import ModelSpec, Preprocessing
from tests.edgeseg.tiny_instances import TinyInstances

HEIGHT, WIDTH = 48, 64

SPEC = ModelSpec(
    name="blobs",
    architecture="none",
    task="semantic",
    height=HEIGHT,
    width=WIDTH,
    classes=("sky", "road", "car", "tree"),
    colours=((255, 0, 0), (0, 0, 255), (0, 255, 0), (9, 9, 9)),
    ignore=255,
    preprocessing=Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr"),
)


def blobs(seed: int, classes: int = 3) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (HEIGHT // 4, WIDTH // 4), dtype=np.uint8)
    return coarse.repeat(4, axis=0).repeat(4, axis=1)


def semantic(index: int, class_map: NDArray[np.uint8] | None = None) -> SemanticResult:
    frame = Frame.of(np.zeros((HEIGHT, WIDTH, 3), np.uint8), index)
    outputs = Outputs(blobs(index) if class_map is None else class_map)
    return SemanticResult.from_outputs(outputs, frame, Geometry.between(HEIGHT, WIDTH, SPEC), SPEC)


def instances(index: int, boxes: NDArray[np.float32] | None = None) -> InstanceResult:
    spec = TinyInstances().spec
    rng = np.random.default_rng(index)
    count, sides = 3, np.array([spec.width, spec.height] * 2, np.float32)
    if boxes is None:
        corners = np.sort(rng.random((count, 2, 2), dtype=np.float32), axis=1)
        boxes = corners.reshape(count, 4) * sides
    outputs = InstanceOutputs(
        boxes=boxes,
        scores=np.array([0.91, 0.5, 0.25], np.float32),
        labels=rng.integers(0, len(spec.classes), count, dtype=np.int32),
        masks=rng.integers(0, 256, (count, spec.mask_height, spec.mask_width), dtype=np.uint8),
    )
    frame = Frame.of(np.zeros((90, 120, 3), np.uint8), index)
    return InstanceResult.from_outputs(outputs, frame, Geometry.between(90, 120, spec), spec)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def decoded(segmentation: dict[str, Any]) -> NDArray[np.bool_]:
    masks = pytest.importorskip("pycocotools.mask")
    with warnings.catch_warnings():
        # Of numpy 2 about pycocotools.
        warnings.simplefilter("ignore", DeprecationWarning)
        found: NDArray[np.bool_] = masks.decode(segmentation).astype(np.bool_)
    return found


# --- run lengths


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (37, 53), (96, 128)])
@pytest.mark.parametrize("grain", [1, 3, 40])
@pytest.mark.parametrize("values", [1, 2, 11])
def test_runs_are_those_of_pycocotools(height: int, width: int, grain: int, values: int) -> None:
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(height * width + grain + values)
    coarse = rng.integers(0, values, (-(-height // grain), -(-width // grain)), dtype=np.int32)
    whole = coarse.repeat(grain, axis=0).repeat(grain, axis=1)[:height, :width] * 300
    found = runs_of(whole)
    assert list(found) == np.unique(whole).tolist()
    for value, runs in found.items():
        mask = whole == value
        packed = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert runs.counts == packed["counts"].decode("ascii")
        assert runs.counts == encoded_rle(mask)["counts"].decode("ascii")
        assert runs.pixels == int(mask.sum())


def test_runs_that_need_many_digits() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    whole = np.zeros((4000, 3000), np.uint8)
    whole[7, 1] = 1
    whole[:, 2000:2999] = 1
    for value, runs in runs_of(whole).items():
        packed = masks.encode(np.asfortranarray((whole == value).astype(np.uint8)))
        assert runs.counts == packed["counts"].decode("ascii")


def test_runs_of_nothing() -> None:
    assert runs_of(np.zeros((0, 5), np.uint8)) == {}


# --- lines


def test_semantic_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    given = [semantic(0), semantic(7)]
    before = datetime.now(timezone.utc)
    with JsonLinesSink(path, source="front") as sink:
        # It can be followed before anything is in it, and each line is there at once.
        assert path.exists() and path.read_bytes() == b""
        for number, result in enumerate(given):
            sink.write(result)
            assert len(lines(path)) == number + 1
    for result, line in zip(given, lines(path), strict=True):
        assert list(line) == [
            "edgeseg", "run", "source", "model", "index", "captured", "captured_ns",
            "mask_age_ms", "size", "classes",
        ]  # fmt: skip
        assert (line["edgeseg"], line["source"], line["model"]) == (1, "front", "blobs")
        assert line["index"] == result.index and line["size"] == [HEIGHT, WIDTH]
        assert line["captured_ns"] == result.frame.captured_ns
        assert line["mask_age_ms"] == pytest.approx(result.age_ms, abs=1e-3)
        captured = datetime.strptime(line["captured"], "%Y-%m-%dT%H:%M:%S.%f%z")
        assert abs(captured - before) < timedelta(seconds=10)
        covered = np.zeros((HEIGHT, WIDTH), int)
        for entry in line["classes"]:
            mask = decoded(entry["segmentation"])
            np.testing.assert_array_equal(mask, result.mask(entry["class"]))
            assert entry["label"] == SPEC.classes.index(entry["class"])
            assert entry["pixels"] == int(mask.sum()) > 0
            assert entry["share"] == pytest.approx(result.shares()[entry["class"]], abs=1e-6)
            covered += mask
        assert (covered == 1).all()
    first, second = lines(path)
    assert first["run"] == second["run"]


def test_instance_lines(tmp_path: Path) -> None:
    path, given = tmp_path / "log.jsonl", instances(4)
    with JsonLinesSink(path) as sink:
        sink.write(given)
    (line,) = lines(path)
    assert "source" not in line and "classes" not in line
    assert line["size"] == [90, 120]
    for index, entry in enumerate(line["instances"]):
        assert entry["class"] == given.names[index] and entry["label"] == given.labels[index]
        assert entry["score"] == pytest.approx(float(given.scores[index]), abs=1e-4)
        assert entry["box"] == pytest.approx(given.boxes[index].tolist(), abs=0.01)
        np.testing.assert_array_equal(decoded(entry["segmentation"]), given.masks[index])
    assert len(line["instances"]) == 3


def test_panoptic_lines(tmp_path: Path) -> None:
    found = instances(2)
    frame, geometry = found.frame, Geometry.between(90, 120, SPEC)
    stuff = SemanticResult.from_outputs(Outputs(blobs(5)), frame, geometry, SPEC)
    fused = PanopticResult.fuse(stuff, found)
    assert any(segment.is_thing for segment in fused.segments)
    sink = JsonLinesSink(tmp_path / "log.jsonl")
    line = json.loads(json.dumps(sink.to_line(fused)))
    sink.close()
    for segment, entry in zip(fused.segments, line["segments"], strict=True):
        assert (entry["id"], entry["class"], entry["thing"], entry["pixels"]) == (
            segment.id, segment.name, segment.is_thing, segment.area,
        )  # fmt: skip
        np.testing.assert_array_equal(decoded(entry["segmentation"]), fused.ids == segment.id)


@pytest.mark.parametrize("shapes", ["polygons", "none"])
def test_other_shapes(tmp_path: Path, shapes: Shapes) -> None:
    path = tmp_path / "log.jsonl"
    area, objects = semantic(3), instances(3)
    with open_sink(f"{path}?shapes={shapes}") as sink:
        sink.write(area)
        sink.write(objects)
    first, second = lines(path)
    for entries, masks in (
        (first["classes"], [area.mask(entry["class"]) for entry in first["classes"]]),
        (second["instances"], list(objects.masks)),
    ):
        for entry, mask in zip(entries, masks, strict=True):
            if shapes == "none":
                assert "segmentation" not in entry
                continue
            drawn = np.zeros(mask.shape, np.uint8)
            for polygon in entry["segmentation"]:
                assert len(polygon) >= 6
                points = np.array(polygon, np.int32).reshape(-1, 2)
                cv2.fillPoly(drawn, [points], 1)
            # Outer borders only: holes, which lie around no corner, are filled, and nothing else.
            outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
            cv2.floodFill(outside, None, (0, 0), 2, flags=4)
            np.testing.assert_array_equal(drawn == 1, outside[1:-1, 1:-1] != 2)


def test_labels_without_a_name_and_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    class_map = blobs(1)
    class_map[:, 40:] = 255
    boxes = np.array([[np.nan, 0, 9, 9], [1, 2, 30, 31], [0, 0, 0, 0]], np.float32)
    for shapes in SHAPES:
        with JsonLinesSink(path, shapes=shapes) as sink:
            sink.write(semantic(0, class_map))
            sink.write(instances(0, boxes))
        first, second = lines(path)[-2:]
        assert sum(entry["pixels"] for entry in first["classes"]) == 40 * HEIGHT
        assert second["instances"][0]["box"][0] is None
    assert "NaN" not in path.read_text()


def test_a_clock_that_is_set_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLinesSink(path) as sink:
        sink.write(semantic(0))
        monkeypatch.setattr(time, "time_ns", lambda: 0)
        sink.write(semantic(1))
    first, second = lines(path)
    assert first["captured"] < second["captured"]
    first_at, second_at = (
        datetime.strptime(line["captured"], "%Y-%m-%dT%H:%M:%S.%f%z") for line in (first, second)
    )
    passed_ns = second["captured_ns"] - first["captured_ns"]
    assert (second_at - first_at) / timedelta(microseconds=1) == pytest.approx(
        passed_ns / 1000, abs=1
    )


# --- the file


KILLED = """
import os, signal, sys
import numpy as np
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.result import Outputs, SemanticResult
from edgeseg.sink import open_sink
from edgeseg.spec import ModelSpec, Preprocessing
preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bgr")
spec = ModelSpec("x", "none", "semantic", 48, 64, ("a",), ((0, 0, 0),), 255, preprocessing)
sink = open_sink(sys.argv[1])
for index in range(20):
    frame = Frame.of(np.zeros((48, 64, 3), np.uint8), index)
    outputs = Outputs(np.zeros((48, 64), np.uint8))
    sink.write(
        SemanticResult.from_outputs(outputs, frame, Geometry.between(48, 64, spec), spec)
    )
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_every_line_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], timeout=120, check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["index"] for line in lines(path)] == list(range(20))
    # A power cut takes a part of the last line with it.
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with JsonLinesSink(path) as sink:
        assert [note.split()[0] for note in sink.notes] == [str(path)]
        sink.write(semantic(0))
    texts = path.read_text().splitlines()
    assert texts[19] == whole.decode().splitlines()[19][:-29]
    first, last = json.loads(texts[0]), json.loads(texts[20])
    assert len(texts) == 21 and first["run"] != last["run"]


def test_notes_come_through_outlets(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("{}\n")
    with Outlet(MultiSink([JsonLinesSink(path)]), name="log") as outlet:
        assert "was there and is continued" in outlet.notes[0]


def test_several_sources_share_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLinesSink(path, source="a") as first, JsonLinesSink(path, source="b") as second:
        for index in range(5):
            first.write(semantic(index))
            second.write(semantic(index))
    found = [(line["source"], line["index"]) for line in lines(path)]
    assert found == [(name, index) for index in range(5) for name in "ab"]


def test_a_log_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLinesSink(path) as sink:
        sink.write(semantic(0))
        path.rename(tmp_path / "log.jsonl.1")
        sink.write(semantic(1))
        path.unlink()
        sink.write(semantic(2))
    assert [line["index"] for line in lines(tmp_path / "log.jsonl.1")] == [0]
    assert [line["index"] for line in lines(path)] == [2]


def test_a_log_made_for_nothing_goes_again(tmp_path: Path) -> None:
    path, old = tmp_path / "log.jsonl", tmp_path / "old.jsonl"
    old.touch()
    for one in (path, old):
        with JsonLinesSink(one) as sink:
            pass
        sink.abort()
    assert list(tmp_path.iterdir()) == [old]
    with pytest.raises(SinkError, match="is finished"):
        sink.write(semantic(0))


@pytest.mark.parametrize(
    ("name", "says"),
    [("no such folder/log.jsonl", "no such file or directory"), ("folder.jsonl", "is a directory")],
)
def test_a_log_that_cannot_be_is_refused_at_once(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(SinkError, match=f"cannot be written .{says}.; choose another"):
        JsonLinesSink(tmp_path / name)


def test_a_full_disk_is_an_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    with JsonLinesSink(full) as sink, pytest.raises(SinkError, match="no space left on device"):
        sink.write(semantic(0))


def test_a_pipe_is_written_to_as_well(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with JsonLinesSink(path) as sink:
        sink.write(semantic(5))
        assert json.loads(os.read(reader, 1 << 16))["index"] == 5
    os.close(reader)


def test_wrong_shapes(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="rle, polygons, none, and 'mask' came"):
        JsonLinesSink(tmp_path / "log.jsonl", shapes="mask")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
