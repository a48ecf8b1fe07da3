"""Results as live video through GStreamer: RTP, RTSP to a server elsewhere, or any pipeline."""

from __future__ import annotations

import random
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from edgeseg.errors import SinkError
from edgeseg.result import Result
from edgeseg.sink.base import Policy, Sink, check_opacity
from edgeseg.sink.drawing import drawn
from edgeseg.sink.encoder import Codec, Encoder, find_encoder, usual_kbits
from edgeseg.sink.feed import FRONT, Feed, Shape, gstreamer_library, works
from edgeseg.source.address import without_password
from edgeseg.source.gstreamer import has_element
from edgeseg.source.status import Backoff

__all__ = ["GStreamerSink", "LiveVideoSink", "RtpSink", "RtspPublishSink", "quoted"]

# Rate of a source that states none. The pictures' own times are sent either way.
_USUAL_FPS = 25.0
# How long a pipeline may take to write what it still has, in seconds.
_LAST_WORDS_S = 5.0
# A server that takes no picture for so long, in seconds, is lost: some never say no.
_SILENCE_S = 10.0
# Pictures that find room before the server has agreed to take any.
_ON_THE_WAY = 5


class LiveVideoSink(Sink):
    """Live video of the frames with their results over them; the base of all that is streamed.

    The first picture gives the size, with odd sides made even; later ones are scaled to it. It is
    made for viewers: `write` never waits for the network or the encoder, and what they have no time
    for is left out and counted.
    """

    def __init__(self, *, fps: float | None, opacity: float, legend: bool) -> None:
        check_opacity(opacity)
        self._fps = fps or _USUAL_FPS
        self._opacity = opacity
        self._legend = legend
        self._shape: Shape | None = None
        self._closed = False

    @property
    def policy(self) -> Policy:
        """``"drop"``: a viewer wants the newest."""
        return "drop"

    def write(self, result: Result) -> None:
        """Draws the result and sends it."""
        if self._closed:
            raise SinkError(f"{self._shown} is finished, and one more frame came")
        if not self._wanted():
            return
        picture = drawn(result, opacity=self._opacity, legend=self._legend)
        if self._shape is None:
            self._shape = Shape(picture, self._fps)
        self._send(self._shape, self._shape.bytes_of(picture), result.frame.captured_ns)

    @property
    @abstractmethod
    def _shown(self) -> str:
        """What it is called in messages; without a password."""

    def _wanted(self) -> bool:
        """Whether anybody would see the next picture."""
        return True

    @abstractmethod
    def _send(self, shape: Shape, content: bytes, captured_ns: int) -> None:
        """Hands over one picture of ``shape``."""


class GStreamerSink(LiveVideoSink):
    """A pipeline of the user's own: ``text`` is what stands behind the pictures' appsrc.

    As for gst-launch-1.0, such as ``x264enc ! mp4mux ! filesink location=x.mp4``; videoconvert is
    put in front of it. `close` lets it come to its end, five seconds long. Raises SinkError without
    GStreamer, and with the first frame when the text is no pipeline.
    """

    def __init__(
        self, text: str, *, fps: float | None = None, opacity: float = 0.5, legend: bool = True
    ) -> None:
        super().__init__(fps=fps, opacity=opacity, legend=legend)
        self._text = text
        self._gst = gstreamer_library(self._shown)
        self._pipeline: Pipeline | None = None
        # A wrong text should be told of before anything is computed.
        Pipeline(self._gst, self._shown, self.text()).stop()

    def text(self) -> str:
        """The whole pipeline."""
        return f"{FRONT} ! videoconvert ! {self._text}"

    @property
    def dropped(self) -> int:
        """Pictures that the pipeline had no time for."""
        return 0 if self._pipeline is None else self._pipeline.dropped

    def close(self) -> None:
        """Lets the pipeline come to its end and stops it."""
        self._closed = True
        if self._pipeline is not None:
            self._pipeline.finish(_LAST_WORDS_S)

    def abort(self) -> None:
        """Stops the pipeline where it is."""
        self._closed = True
        if self._pipeline is not None:
            self._pipeline.stop()

    @property
    def _shown(self) -> str:
        return f"gst: {without_password(self._text)}"

    def _send(self, shape: Shape, content: bytes, captured_ns: int) -> None:
        if self._pipeline is None:
            self._pipeline = Pipeline(self._gst, self._shown, self.text())
            self._pipeline.start(shape)
        self._pipeline.push(content, captured_ns)


class RtpSink(LiveVideoSink):
    """Live video as RTP packets to one receiver, or to all of a multicast group.

    Nobody is asked whether they arrive. ``sdp`` is what a player needs to understand them.
    ``codec`` and ``kbits`` (kilobits per second): None for the best there is, and for what suits
    the size. Raises SinkError without GStreamer or an encoder.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        codec: Codec | None = None,
        kbits: int | None = None,
        fps: float | None = None,
        opacity: float = 0.5,
        legend: bool = True,
    ) -> None:
        super().__init__(fps=fps, opacity=opacity, legend=legend)
        self._host, self._port = host, port
        self._kbits = kbits
        self._gst = gstreamer_library(self._shown)
        self._encoder = find_encoder(works, codec)
        self._pipeline: Pipeline | None = None

    @property
    def sdp(self) -> str:
        """The session description: what a player opens, as a file that ends in .sdp."""
        return self._encoder.sdp(self._host, self._port)

    @property
    def dropped(self) -> int:
        """Pictures that the encoder had no time for."""
        return 0 if self._pipeline is None else self._pipeline.dropped

    @staticmethod
    def text(encoder: Encoder, host: str, port: int, *, kbits: int, fps: float) -> str:
        """The pipeline."""
        return (
            f"{FRONT} ! {encoder.text(kbits=kbits, fps=fps)}{encoder.parser} ! "
            f"{encoder.payloader} ! udpsink host={quoted(host)} port={port} sync=false async=false"
        )

    def close(self) -> None:
        """Stops sending."""
        self._closed = True
        if self._pipeline is not None:
            self._pipeline.stop()

    @property
    def _shown(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"rtp://{host}:{self._port}"

    def _send(self, shape: Shape, content: bytes, captured_ns: int) -> None:
        if self._pipeline is None:
            kbits = self._kbits or usual_kbits(shape.height, shape.width, shape.fps)
            text = self.text(self._encoder, self._host, self._port, kbits=kbits, fps=shape.fps)
            self._pipeline = Pipeline(self._gst, self._shown, text)
            self._pipeline.start(shape)
        self._pipeline.push(content, captured_ns)


class RtspPublishSink(LiveVideoSink):
    """Live video to an RTSP server elsewhere, such as MediaMTX, which gives it to its viewers.

    ``url`` may hold a user and a password, which appear in no message. A server that cannot be
    reached at first is an error; one that is lost later is tried again, with the pauses of a
    source's `Backoff`, and what comes meanwhile is left out. ``codec`` and ``kbits`` as for
    `RtpSink`. Raises SinkError without GStreamer, its rtspclientsink, or an encoder.
    """

    def __init__(
        self,
        url: str,
        *,
        codec: Codec | None = None,
        kbits: int | None = None,
        fps: float | None = None,
        opacity: float = 0.5,
        legend: bool = True,
        backoff: Backoff | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(fps=fps, opacity=opacity, legend=legend)
        self._url = url
        self._kbits = kbits
        self._gst = gstreamer_library(self._shown)
        if not has_element("rtspclientsink"):
            raise SinkError(
                f"{self._shown} is sent through GStreamer's rtspclientsink, which is not here; "
                "`sudo apt-get install -y gstreamer1.0-rtsp` brings it"
            )
        self._encoder = find_encoder(works, codec)
        self._backoff = backoff or Backoff()
        self._now_s = now_s
        self._pipeline: Pipeline | None = None
        self._connected_before = False
        self._attempt = 0
        self._next_s = 0.0
        self._taken = 0
        self._taken_s = 0.0
        self._lost = 0
        self._dropped = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """How often the server was lost."""
        if not self._lost:
            return ()
        return (f"{self._shown} was lost {self._lost} times, and found again or still tried",)

    @property
    def dropped(self) -> int:
        """Pictures that were left out: no server at the time, or no time."""
        return self._dropped + (0 if self._pipeline is None else self._pipeline.dropped)

    @staticmethod
    def text(encoder: Encoder, url: str, *, kbits: int, fps: float) -> str:
        """The pipeline; the packets go through the connection that the server was asked on."""
        return (
            f"{FRONT} ! {encoder.text(kbits=kbits, fps=fps)}{encoder.parser} ! "
            f"rtspclientsink location={quoted(url)} protocols=tcp latency=0"
        )

    def close(self) -> None:
        """Takes leave of the server."""
        self._closed = True
        self._drop_pipeline()

    @property
    def _shown(self) -> str:
        return without_password(self._url)

    def _send(self, shape: Shape, content: bytes, captured_ns: int) -> None:
        if self._pipeline is None:
            if self._now_s() < self._next_s:
                self._dropped += 1
                return
            kbits = self._kbits or usual_kbits(shape.height, shape.width, shape.fps)
            text = self.text(self._encoder, self._url, kbits=kbits, fps=shape.fps)
            self._pipeline = Pipeline(self._gst, self._shown, text)
            self._pipeline.start(shape)
            self._taken, self._taken_s = 0, self._now_s()
        try:
            self._pipeline.push(content, captured_ns)
            self._check_flow(self._pipeline.pushed)
        except SinkError:
            if not self._connected_before:
                raise
            self._drop_pipeline()
            self._lost += self._attempt == 0
            self._next_s = self._now_s() + self._backoff.delay_s(self._attempt, random.random())
            self._attempt += 1

    def _check_flow(self, taken: int) -> None:
        """Notes that pictures get through; SinkError when none did for too long."""
        if taken > self._taken:
            self._taken, self._taken_s = taken, self._now_s()
            if taken > _ON_THE_WAY:
                self._connected_before, self._attempt = True, 0
        elif self._now_s() - self._taken_s > _SILENCE_S:
            raise SinkError(f"{self._shown} has taken no picture for {_SILENCE_S:g} seconds")

    def _drop_pipeline(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            self._dropped += pipeline.dropped
            pipeline.stop()


class Pipeline:
    """One GStreamer pipeline with its feed; ``name`` is what messages call it.

    SinkError when ``text`` is no pipeline.
    """

    def __init__(self, gst: Any, name: str, text: str) -> None:
        self._gst = gst
        self._name = name
        try:
            self._pipeline: Any = gst.parse_launch(text)
        except Exception as error:
            # GLib.Error, which is there only where PyGObject is.
            message = without_password(getattr(error, "message", str(error)))
            raise SinkError(f"{name} is no pipeline that GStreamer takes: {message}") from None
        self._bus: Any = self._pipeline.get_bus()
        self._feed: Feed | None = None

    @property
    def dropped(self) -> int:
        """Pictures that it had no time for."""
        return 0 if self._feed is None else self._feed.dropped

    @property
    def pushed(self) -> int:
        """Pictures that it took."""
        return 0 if self._feed is None else self._feed.pushed

    def start(self, shape: Shape) -> None:
        """Starts it; SinkError when an element refuses."""
        self._feed = Feed(self._gst, self._pipeline.get_by_name("edgeseg"), shape)
        if self._pipeline.set_state(self._gst.State.PLAYING) == self._gst.StateChangeReturn.FAILURE:
            try:
                self._raise_error()
            finally:
                self.stop()
            raise SinkError(f"{self._name} cannot be started")

    def push(self, content: bytes, captured_ns: int) -> None:
        """Hands over one picture; SinkError when the pipeline has broken off."""
        assert self._feed is not None
        self._raise_error()
        if not self._feed.push(content, captured_ns):
            self._raise_error()
            raise SinkError(f"{self._name} has ended, and takes no more pictures")

    def finish(self, seconds: float) -> None:
        """Lets it come to its end, and stops it; SinkError when that fails or takes longer."""
        if self._feed is None:
            self.stop()
            return
        self._feed.end()
        kinds = self._gst.MessageType.EOS | self._gst.MessageType.ERROR
        message = self._bus.timed_pop_filtered(round(seconds * 1e9), kinds)
        self.stop()
        if message is None:
            raise SinkError(f"{self._name} did not come to its end within {seconds:g} seconds")
        if message.type == self._gst.MessageType.ERROR:
            self._raise(message)

    def stop(self) -> None:
        """Stops it where it is."""
        self._feed = None
        self._pipeline.set_state(self._gst.State.NULL)

    def _raise_error(self) -> None:
        message = self._bus.pop_filtered(self._gst.MessageType.ERROR)
        if message is not None:
            self._raise(message)

    def _raise(self, message: Any) -> None:
        error, detail = message.parse_error()
        reason = (error.message or detail or "no reason is given").strip()
        source = message.src.get_name() if message.src is not None else "the pipeline"
        raise SinkError(f"{self._name} broke off: {without_password(reason)} ({source})")


def quoted(value: str) -> str:
    """``value`` as it stands in the text of a pipeline."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
