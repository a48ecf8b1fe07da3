"""From a URI to an opened source."""

from __future__ import annotations

from pathlib import Path

from edgeseg.errors import RequestError, SourceError
from edgeseg.source.address import Address, without_password
from edgeseg.source.base import Source
from edgeseg.source.camera import camera, camera_name
from edgeseg.source.connection import Connect
from edgeseg.source.gstreamer import gstreamer, has_element
from edgeseg.source.images import ImageSource, images_in, images_like
from edgeseg.source.live import LiveSource
from edgeseg.source.mjpeg import boundary_of, get, mjpeg
from edgeseg.source.network import network, open_capture
from edgeseg.source.opencv import promised_length
from edgeseg.source.street import SyntheticSource
from edgeseg.source.video import CaptureSource, VideoSource
from edgeseg.synthetic import Street

__all__ = ["open_source"]

_STREET_SIZE = (360, 480)
_STREET_FPS = 30.0
_RTSP_ELEMENTS = ("rtspsrc", "decodebin", "videoconvert", "appsink")


def open_source(uri: str, *, timeout_s: float = 10.0) -> Source:
    """The source that ``uri`` names, opened; `edgeseg.source.address` has the grammar.

    ``timeout_s`` is how long a camera or a network stream may take to open, and to give its next
    frame, in seconds, where the URI has no ``timeout`` of its own. Raises RequestError for a URI
    of no known kind or with wrong options, SourceError when there is nothing at it that can be
    read.
    """
    if not timeout_s > 0:
        raise RequestError(f"a time-out is a number of seconds above 0, and {timeout_s} came")
    address = Address.of(uri)
    options = address.options
    if options.timeout_s is not None:
        timeout_s = options.timeout_s
    if address.kind == "video":
        return VideoSource(address.uri, Path(address.target), loop=options.loop)
    if address.kind == "images":
        return _images(address)
    if address.kind == "synthetic":
        return _street(address)
    if address.kind == "http":
        return _http(address, timeout_s)
    if address.kind == "camera":
        return _lasting(address, camera(address, timeout_s), timeout_s, camera_name(address))
    if address.kind in ("csi", "gst"):
        return _lasting(address, gstreamer(address, timeout_s), timeout_s, address.shown)
    connect = network(address, timeout_s)
    if address.kind == "rtsp" and all(has_element(name) for name in _RTSP_ELEMENTS):
        connect = gstreamer(address, timeout_s)
    return _lasting(address, connect, timeout_s, without_password(address.target))


def _lasting(address: Address, connect: Connect, timeout_s: float, name: str) -> LiveSource:
    return LiveSource(
        address.uri,
        connect,
        name=name,
        timeout_s=timeout_s,
        reconnect_s=address.options.reconnect_s,
        waits=address.options.waits,
    )


def _http(address: Address, timeout_s: float) -> Source:
    """MJPEG, another live stream, or a recording, of which nothing is dropped."""
    name, others = without_password(address.target), network(address, timeout_s)
    try:
        response = get(address.target, timeout_s, verify=address.options.verify)
    except SourceError:
        if not address.options.waits:
            raise
        return _lasting(address, mjpeg(address, timeout_s, others), timeout_s, name)
    if boundary_of(response.content_type) is not None:
        connect = mjpeg(address, timeout_s, others, first=response)
        return _lasting(address, connect, timeout_s, name)
    response.close()
    capture = open_capture(address, timeout_s)
    if promised_length(capture) is not None:
        return CaptureSource(address.uri, name, capture)
    return _lasting(address, network(address, timeout_s, first=capture), timeout_s, name)


def _images(address: Address) -> ImageSource:
    path, options = Path(address.target), address.options
    if path.is_dir():
        paths = images_in(address.target, path)
    elif path.exists():
        paths = [path]
    else:
        paths = images_like(address.target, path)
    return ImageSource(address.uri, paths, loop=options.loop, fps=options.fps)


def _street(address: Address) -> SyntheticSource:
    options = address.options
    height, width = options.size or _STREET_SIZE
    street = Street(
        height,
        width,
        seed=options.seed,
        frames=options.frames if options.frames > 0 else None,
        fps=options.fps or _STREET_FPS,
        scene=options.scene,
    )
    return SyntheticSource(address.uri, street, live=options.live)
