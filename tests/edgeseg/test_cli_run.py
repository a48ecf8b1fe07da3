"""`edgeseg run` with several sources: an output for each, and one that fails alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgeseg import cli
from edgeseg.cli import main
from tests.edgeseg.test_cli import names, place, video_frames

__all__ = ["place"]

STREET = "synthetic:?size=48x64&frames=6"
OTHER = "synthetic:?size=64x48&frames=4&seed=2"


def test_each_source_has_its_own_output(
    bundle_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = place / "out.avi"
    arguments = ["run", str(bundle_folder), "--source", STREET, "--source", OTHER]
    assert main([*arguments, "--save", str(target), "--json", str(place / "x.json")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "synthetic-2: 4 frames, 0 dropped" in captured.out
    assert names(place) == ["out-synthetic-2.avi", "out-synthetic.avi", "x.json"]
    assert [picture.shape for picture in video_frames(place / "out-synthetic.avi")] == [
        (48, 64, 3)
    ] * 6
    assert len(video_frames(place / "out-synthetic-2.avi")) == 4
    found = json.loads((place / "x.json").read_text())
    assert {name: each["frames"] for name, each in found["sources"].items()} == {
        "synthetic": 6, "synthetic-2": 4
    }  # fmt: skip
    assert found["failed"] == {}


def test_folders_for_each_and_frames_for_each(bundle_folder: Path, place: Path) -> None:
    arguments = ["run", str(bundle_folder), "--source", STREET, "--source", OTHER]
    assert main([*arguments, "--save", str(place / "out"), "--frames", "2"]) == 0
    assert names(place / "out") == [
        "synthetic", "synthetic-2", "synthetic-2/000000.png", "synthetic-2/000001.png",
        "synthetic/000000.png", "synthetic/000001.png",
    ]  # fmt: skip


def test_source_that_fails_leaves_the_others_alone(
    bundle_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(bundle_folder), "--source", STREET, "--source", "nothing.mp4"]
    assert main([*arguments, "--save", str(place / "out.avi")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("edgeseg: nothing: nothing.mp4 does not exist")
    assert "synthetic: 6 frames" in captured.out and names(place) == ["out-synthetic.avi"]


def test_nothing_runs_when_nothing_opens(
    bundle_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(bundle_folder), "--save", str(place / "out.avi")]
    assert main([*arguments, "--source", "a.mp4", "--source", "b.mp4"]) == 1
    assert "a.mp4 does not exist" in capsys.readouterr().err
    assert main([*arguments, "--source", STREET, "--source", "synthetic:?colour=red"]) == 2
    assert "'colour' came" in capsys.readouterr().err
    assert names(place) == []


@pytest.mark.parametrize(
    ("uris", "found"),
    [
        (["front.mp4", "a/front.avi?loop=2", "front-2.mp4"], ["front", "front-2", "front-2-2"]),
        (["0", "/dev/video1", "csi://0"], ["0", "video1", "0-2"]),
        (["rtsp://me:secret@host/cam/1", "rtsp://host"], ["1", "host"]),
        (["http://h/v.mjpg?a=1", "gst: videotestsrc ! x", "*.png"], ["v", "gst", "source"]),
        (["synthetic:", "frames/", "☃", "."], ["synthetic", "frames", "source", "source-2"]),
    ],
)
def test_names(uris: list[str], found: list[str]) -> None:
    assert cli._names_of(uris) == found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_what_was_finished(bundle_folder: Path, place: Path, number: int) -> None:
    endless = "synthetic:?size=48x64&frames=0"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeseg", "run", str(bundle_folder), "--source", endless,
         "--source", f"{endless}&live=1", "--save", "out.avi"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size > 10_000 for path in place.iterdir()) < 2:
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
    assert names(place) == ["out-synthetic-2.avi", "out-synthetic.avi"]
    for name in names(place):
        capture = cv2.VideoCapture(str(place / name))
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) > 1
        found, picture = capture.read()
        capture.release()
        assert found and np.asarray(picture).shape == (48, 64, 3)
    assert "synthetic-2: saved out-synthetic-2.avi" in out


def test_page_of_a_run(bundle_folder: Path, place: Path) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("prometheus_client")
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeseg", "run", str(bundle_folder), "--source",
         "synthetic:?size=48x64&frames=0&live=1", "--save", "log.jsonl", "--serve", "127.0.0.1:0",
         "--recordings", "clips", "--token", "only-for-me", "--json", "x.json"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip

    def asked(path: str, token: str = "only-for-me") -> bytes:
        request = urllib.request.Request(
            f"{where}{path}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"edgeseg: open (http://127.0.0.1:\d+)/\?token=only-for-me .*\n", line)
        assert found is not None, line
        where = found[1]
        deadline = time.monotonic() + 60
        while not (stats := json.loads(asked("/stats.json")))["outlets"][0]["written"]:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert stats["sources"][0]["status"]["state"] == "live"
        assert stats["outlets"][0]["name"] == "log.jsonl"
        assert stats["outlets"][0]["policy"] == "drop" and stats["reading"]["rss_mb"] > 10
        assert b'edgeseg_masks_total{source="synthetic"}' in asked("/metrics")
        assert asked("/snapshot/synthetic/overlay.png").startswith(b"\x89PNG")
        with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
            asked("/stats.json", "not-for-me")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert err.splitlines()[-1] == "edgeseg: stopped; what was finished is kept"
    lines = (place / "log.jsonl").read_text().splitlines()
    figures = json.loads((place / "x.json").read_text())
    assert len(lines) == figures["outlets"][0]["written"] > 0


@pytest.mark.parametrize("option", [("--token", "x"), ("--recordings", "x")])
def test_options_of_a_page_need_one(
    option: tuple[str, str], bundle_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(bundle_folder), "--source", STREET, *option]) == 2
    assert "add --serve" in capsys.readouterr().err


def test_several_outputs_of_several_sources(bundle_folder: Path, place: Path) -> None:
    arguments = ["run", str(bundle_folder), "--source", STREET, "--source", OTHER]
    saves = ["--save", str(place / "log.jsonl?shapes=none"), "--save", str(place / "out.avi")]
    assert main([*arguments, *saves]) == 0
    lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    assert Counter(line["source"] for line in lines) == {"synthetic": 6, "synthetic-2": 4}
    assert names(place) == ["log.jsonl", "out-synthetic-2.avi", "out-synthetic.avi"]
    assert not any(thread.name.startswith("edgeseg") for thread in threading.enumerate())
