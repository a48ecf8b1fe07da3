"""The grammar of URIs: what is taken for an option, and what is left to a server."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from edgeseg.errors import EdgeSegError, RequestError
from edgeseg.source.address import Address, Kind, Options, without_password


@pytest.mark.parametrize(
    ("uri", "kind", "target", "options"),
    [
        ("0", "camera", "0", Options()),
        ("1?width=1280&height=720", "camera", "1", Options(size=(720, 1280))),
        (
            "/dev/video2?size=480x640&fps=29.97&format=mjpeg&timeout=2.5",
            "camera",
            "/dev/video2",
            Options(size=(480, 640), fps=29.97, format="mjpeg", timeout_s=2.5),
        ),
        ("csi://1?fps=60&flip=2", "csi", "1", Options(fps=60.0, flip=2)),
        ("rtsp://u:p@h/s", "rtsp", "rtsp://u:p@h/s", Options()),
        (
            "rtsp://h/s?channel=1&latency=50&a=%20b&transport=udp&reconnect=0",
            "rtsp",
            "rtsp://h/s?channel=1&a=%20b",
            Options(latency_ms=50, transport="udp", reconnect_s=0),
        ),
        # Behind #, the options; before it, nothing is touched.
        (
            "rtsp://h/s?latency=1&timeout=x#latency=50",
            "rtsp",
            "rtsp://h/s?latency=1&timeout=x",
            Options(latency_ms=50),
        ),
        ("http://h/v?timeout=9#", "http", "http://h/v?timeout=9", Options()),
        (
            "https://h/v?width=640&fps=5&reconnect=60&verify=0",
            "http",
            "https://h/v?width=640&fps=5",
            Options(reconnect_s=60, waits=True, verify=False),
        ),
        (
            "http://h/v?reconnect=always",
            "http",
            "http://h/v",
            Options(reconnect_s=math.inf, waits=True),
        ),
        ("udp://@:5000", "stream", "udp://@:5000", Options()),
        ("gst: videotestsrc ! videoconvert", "gst", "videotestsrc ! videoconvert", Options()),
        (
            "gst: uridecodebin uri=http://h/?a=1 ! queue",
            "gst",
            "uridecodebin uri=http://h/?a=1 ! queue",
            Options(),
        ),
        ("gst: videotestsrc?timeout=3", "gst", "videotestsrc", Options(timeout_s=3)),
        (
            "synthetic:?seed=3&size=96x128&frames=0&live=1",
            "synthetic",
            "synthetic:",
            Options(seed=3, size=(96, 128), frames=0, live=True),
        ),
    ],
)
def test_taken_apart(uri: str, kind: Kind, target: str, options: Options) -> None:
    assert Address.of(uri) == Address(uri, kind, target, options)
    assert Address.of(f"  {uri}\n").target == target


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("0?latency=3", "options of a camera are size, width, .* and 'latency' came"),
        ("csi://0?format=x", "options of a CSI camera are .*flip.* and 'format' came"),
        ("rtsp://h/s#width=3", "options of an rtsp:// stream are latency, transport, timeout"),
        ("synthetic:?seed=1&seed=2", "seed comes twice"),
        ("synthetic:?seed", "seed has no value"),
        ("synthetic:?", "^$"),
        ("0?width=640", "only a part of it, or both, came"),
        ("0?size=480x640&width=640&height=480", "only a part of it, or both, came"),
        ("0?format=nine!", "`v4l2-ctl --list-formats` has them"),
        ("0?fps=1e3", "a number above 0, and '1e3' came"),
        ("0?timeout=0", "a number above 0"),
        ("0?reconnect=soon", "a number of seconds, from 0, or always"),
        ("csi://0?flip=8", "a whole number from 0 to 7"),
        ("rtsp://h/s?transport=pigeon", "transport .* is tcp or udp, and 'pigeon' came"),
        ("rtsp://a:secret@h/s?transport=pigeon", r"a:\*\*\*@h"),
        ("rtsp://a b/", "without spaces"),
        ("synthetic:?live=2", "0 to 1"),
    ],
)
def test_wrong_ones(uri: str, says: str) -> None:
    if says == "^$":
        assert Address.of(uri).options == Options()
        return
    with pytest.raises(RequestError, match=says) as raised:
        Address.of(uri)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


def test_defaults_are_no_request() -> None:
    assert Address.of("0?reconnect=0").options == replace(Options(), reconnect_s=0)
    assert not Address.of("0?reconnect=0").options.waits


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("rtsp://me:secret@h:554/x", "rtsp://me:***@h:554/x"),
        ("rtsp://me:se@cret@h/x", "rtsp://me:***@h/x"),
        ("http://h/v?user=me&pwd=secret&res=4", "http://h/v?user=me&pwd=***&res=4"),
        ("http://h/v?access_token=secret#timeout=5", "http://h/v?access_token=***#timeout=5"),
        ("http://h/v?API-Key=secret;Password=secret", "http://h/v?API-Key=***;Password=***"),
        (
            "gst: rtspsrc location=rtsp://h/x user-id=me user-pw=secret ! decodebin",
            "gst: rtspsrc location=rtsp://h/x user-id=me user-pw=*** ! decodebin",
        ),
        ('gst: souphttpsrc user-pw = "my secret" ! jpegdec', None),
        ("http://h/passage?keyframe=1&monkey=2", "http://h/passage?keyframe=1&monkey=2"),
        ("rtsp://h:554/x@y", "rtsp://h:554/x@y"),
        ("gst: rtspsrc location=rtsp://me:secret@h/x ! decodebin", None),
    ],
)
def test_passwords_are_hidden(uri: str, shown: str | None) -> None:
    assert "secret" not in without_password(uri)
    assert shown is None or without_password(uri) == shown


def test_any_text_is_an_address_or_a_sentence() -> None:
    pieces = (
        "0", "csi://", "rtsp://", "http://h", "gst:", "synthetic:", "?", "&", "=", "#", "size",
        "fps=", "1x1", "always", "%", "\0", " ", "*", "[", "!", "/dev/", "~", "..", "é", "\ud800",
        "loop=1", "reconnect=", ":", "@", "9" * 400,
    )  # fmt: skip
    chance = random.Random(7)
    for _ in range(1500):
        text = "".join(chance.choices(pieces, k=chance.randint(0, 8)))
        try:
            address = Address.of(text)
        except EdgeSegError as error:
            assert str(error)
        else:
            assert address.target
