"""`edgeseg profile` as it is typed."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeseg.cli import main
from edgeseg.profile.timeline import Timeline
from edgeseg.result import AnyResult

STREET = "synthetic:?size=48x64&frames=0"
QUICK = ("--source", STREET, "--frames", "3", "--warm-up", "0", "--engine", "openvino")


@dataclass
class Found:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def called(*arguments: object) -> Found:
        code = main(["profile", *map(str, arguments)])
        captured = capsys.readouterr()
        return Found(code, captured.out, captured.err)

    return called


def test_seconds_and_layers(run: Any, bundle_folder: Path, tmp_path: Path) -> None:
    found = run(
        bundle_folder, "--source", STREET, "--seconds", "0.2", "--layers", "--json", "-",
        "--report", tmp_path / "r.html", "--engine", "openvino",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    content = json.loads(found.out)
    assert {"interval_ms", "jitter_ms", "machine", "readings", "layers"} <= content.keys()
    assert content["layers"] and {"name", "ms", "kind"} == content["layers"][0].keys()
    assert "layer by layer" in (tmp_path / "r.html").read_text()


def test_compare(run: Any, bundle_folder: Path, tmp_path: Path) -> None:
    found = run(
        bundle_folder, *QUICK, "--threads", "1", "--compare", ",threads=2", ",head=graph",
        "--rounds", "2", "--json", tmp_path / "c.json", "--report", tmp_path / "c.html",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    content = json.loads((tmp_path / "c.json").read_text())
    assert [
        entry["setting"].removeprefix(str(bundle_folder)) for entry in content["comparison"]
    ] == [
        "@openvino,threads=1",
        "@openvino,threads=2",
        "@openvino,threads=1,head=graph",
    ]
    assert "settings in turns" in found.out and "times as fast" in (tmp_path / "c.html").read_text()
    # Without a BUNDLE before it, the first is what the others are compared with.
    again = run(
        *QUICK, "--rounds", "1", "--json", "-", "--compare", f"{bundle_folder},threads=1",
        f"{bundle_folder},threads=2",
    )  # fmt: skip
    assert len(json.loads(again.out)["comparison"]) == 2


def test_sweep(run: Any, bundle_folder: Path) -> None:
    found = run(bundle_folder, *QUICK, "--sweep", "--rounds", "3", "--no-save", "--at-least", "1")
    if "one number of threads" in found.err:
        pytest.skip("this machine has one core: there is nothing to sweep")
    assert (found.code, found.err) == (0, "")
    assert "is the largest network here that reaches 1 frames per second" in found.out
    assert not (bundle_folder / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "a profile is of a BUNDLE, such as streets, and none came"),
        (("BUNDLE", "--layers", "--sweep"), 2, "--layers is for one bundle"),
        (("BUNDLE", "--at-least", "30"), 2, "--at-least goes with --sweep"),
        (("BUNDLE", "--compare", "nowhere"), 1, "there is no bundle nowhere"),
        (("BUNDLE", "--compare", "BUNDLE"), 2, "is there twice"),
        (("--compare", "BUNDLE"), 2, "two settings or more, and 1 came"),
        (("BUNDLE", "--compare", "BUNDLE,speed=9"), 2, "'speed=9' is none of them"),
        (("BUNDLE", "--compare", "@caffe"), 2, "the engines are tensorrt, openvino, onnxruntime"),
        (("BUNDLE", "--sweep", "--threads", "1"), 2, "a sweep chooses among settings"),
        (("BUNDLE", "--sweep", "--rounds", "1"), 2, "3 rounds or more, and 1 came"),
        (("BUNDLE", "--seconds", "0"), 2, "more than 0 seconds, and 0.0 came"),
        (("BUNDLE", "--seconds", "nan", "--compare", ",threads=2"), 2, "more than 0 seconds"),
        (("BUNDLE", "--seconds", "-1", "--sweep"), 2, "more than 0 seconds"),
        (("BUNDLE", "--frames", "1"), 2, "2 frames or more, and 1 came"),
        (("BUNDLE", "--compare", "@onnxruntime", "--source", "none.mp4"), 1, "does not exist"),
    ],
)
def test_one_sentence_for_what_cannot_be(
    run: Any, bundle_folder: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    found = run(*(part.replace("BUNDLE", str(bundle_folder)) for part in arguments))
    assert (found.code, found.out) == (code, "")
    (line,) = found.err.splitlines()
    assert line.startswith("edgeseg: ") and message in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_long_profile_gives_what_was_measured(
    run: Any,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    plain = Timeline.add

    def add(timeline: Timeline, result: AnyResult) -> None:
        plain(timeline, result)
        if len(timeline) == 5:
            signal.raise_signal(number)

    monkeypatch.setattr(Timeline, "add", add)
    found = run(
        bundle_folder, "--source", "synthetic:?size=48x64&frames=0&live=1&fps=200",
        "--seconds", "600", "--json", tmp_path / "p.json", "--engine", "openvino",
    )  # fmt: skip
    assert found.code == 130
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["stopped"] is True and content["frames"] >= 5
    assert "It was stopped after 5 frames" in found.out
