"""Targets: what each text stands for, and what is said to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeseg.errors import RequestError
from edgeseg.sink import (
    ImageFolderSink,
    JsonLinesSink,
    Target,
    VideoSink,
    open_sink,
    target_of_source,
)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("out.mp4", "video", {"where": "out.mp4"}),
    ("a/OUT.WEBM", "video", {"where": "a/OUT.WEBM"}),
    ("frames", "images", {"where": "frames"}),
    ("log.jsonl", "jsonlines", {"where": "log.jsonl", "shapes": "rle"}),
    ("log.ndjson?shapes=none", "jsonlines", {"where": "log.ndjson", "shapes": "none"}),
    ("rtp://10.0.0.2:5000", "rtp", {"host": "10.0.0.2", "port": 5000, "codec": None}),
    (
        "rtp://[ff02::1]:5000?codec=jpeg&bitrate=900&sdp=a%20b.sdp",
        "rtp",
        {"host": "ff02::1", "codec": "jpeg", "kbits": 900, "sdp": "a b.sdp"},
    ),
    ("rtsp://:8554/street", "rtsp-server", {"where": "street", "host": "", "port": 8554}),
    ("rtsp://:0/a/b", "rtsp-server", {"where": "a/b", "port": 0, "user": None}),
    (
        "rtsp://me:s%40c:ret@:8554/street?address=127.0.0.1",
        "rtsp-server",
        {"host": "127.0.0.1", "user": "me", "password": "s@c:ret"},
    ),
    ("rtsp://host/street", "rtsp", {"where": "rtsp://host/street"}),
    (
        "rtsp://me:secret@host:8554/street?token=1&codec=vp8&x=y",
        "rtsp",
        {"where": "rtsp://me:secret@host:8554/street?token=1&x=y", "codec": "vp8"},
    ),
    ("gst: x264enc ! fakesink name=a?b", "gst", {"where": "x264enc ! fakesink name=a?b"}),
]


@pytest.mark.parametrize(("text", "kind", "parts"), CASES)
def test_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: str, parts: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = Target.of(f" {text} ")
    assert found.kind == kind
    assert {name: getattr(found, name) for name in parts} == parts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty text came"),
        ("out.gif", r"results go to a video \(\.mp4, .*JSON lines.*gst: \.\.\.\), and 'out.gif'"),
        ("http://host/x", "results go to a video"),
        ("gst:", "gst: and what gst-launch-1.0 takes"),
        ("rtp://host", "rtp://HOST:PORT"),
        ("rtp://:5000", "rtp://HOST:PORT"),
        ("rtp://host:5000/x", "rtp://HOST:PORT"),
        ("rtsp://host:99999/x", "rtsp://HOST:PORT/NAME"),
        ("rtsp://host:port/x", "rtsp://HOST:PORT/NAME"),
        ("rtsp://:8554/", "has a name"),
        ("rtsp://:8554/a b", "has no spaces"),
        ("rtsp://:8554/a'b", "has a name"),
        ("rtsp://:8554/x?codec=h265", "codec in .* is h264, vp8, jpeg, and 'h265' came"),
        ("rtsp://:8554/x?bitrate=0", "kilobits per second, 1 to 1000000, and '0' came"),
        ("rtsp://:8554/x?bitrate=1e3", "kilobits per second"),
        ("rtsp://:8554/x?port=1", "'port' came in .* its options are codec, bitrate, address"),
        ("rtsp://:8554/x?codec=", "has no value"),
        ("rtsp://:8554/x?codec=vp8&codec=vp8", "comes twice"),
        ("log.jsonl?shapes=boxes", "shapes in .* is rle, polygons, none, and 'boxes' came"),
        ("log.jsonl?shape=rle", "'shape' came in .*, and its options are shapes"),
        ("out.mp4?fps=3", "'fps' came in .*, and it has no options"),
    ],
)
def test_what_is_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=says):
        Target.of(text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://me:secret@:8554/",
        "rtsp://me:secret@host/a b",
        "rtsp://me:secret@host:99999/x",
        "rtsp://me:secret@host/x?codec=no",
        "rtp://me:secret@host:5000",
        "ftp://me:secret@host/x",
    ],
)
def test_passwords_are_in_no_message(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        Target.of(text)
    assert "secret" not in str(caught.value) and "me:***@" in str(caught.value)


def test_passwords_are_in_no_representation() -> None:
    for text in ("rtsp://me:secret@:8554/x", "rtsp://me:secret@host/x"):
        target = Target.of(text)
        assert "secret" not in repr(target) and "secret" not in target.shown


def test_what_is_there_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.folder").mkdir()
    assert Target.of("a.folder").kind == "images"
    Path("log.jsonl?shapes=none").touch()
    with pytest.raises(RequestError, match="results go to"):
        Target.of("log.jsonl?shapes=none")


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("out.mp4", "out-front.mp4"),
        ("a/out.tar.avi", "a/out.tar-front.avi"),
        ("frames", "frames/front"),
        ("log.jsonl?shapes=none", "log.jsonl?shapes=none"),
        ("rtsp://:8554/street?codec=vp8", "rtsp://:8554/street-front?codec=vp8"),
        ("rtsp://a:b@host/street/", "rtsp://a:b@host/street-front"),
    ],
)
def test_one_of_several_sources(target: str, found: str) -> None:
    assert target_of_source(target, "front") == found


@pytest.mark.parametrize("target", ["rtp://host:5000", "gst: fakesink"])
def test_targets_of_one_source_alone(target: str) -> None:
    with pytest.raises(RequestError, match="takes the results of one source"):
        target_of_source(target, "front")


@pytest.mark.parametrize(
    ("target", "kind", "policy"),
    [
        ("out.mp4", VideoSink, "wait"),
        ("frames", ImageFolderSink, "wait"),
        ("log.jsonl?shapes=none", JsonLinesSink, "wait"),
    ],
)
def test_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, kind: type, policy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_sink(target, source="front") as sink:
        assert type(sink) is kind
        assert sink.policy == policy and sink.notes == ()
    assert list(tmp_path.iterdir()) == []
