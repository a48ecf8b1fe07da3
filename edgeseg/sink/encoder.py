"""Video encoders of GStreamer: which one to take, and the text of its part of a pipeline.

The choice is a function of the elements that work here, so that a Jetson, a Raspberry Pi or an
Intel box encodes in hardware and anything else in software. What needs that hardware
(nvv4l2h264enc, v4l2h264enc, VA-API) is tested as text only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgeseg.errors import SinkError

__all__ = ["CODECS", "Codec", "Encoder", "find_encoder", "usual_kbits"]

#: whether an element of that name is installed, and its device there
Has = Callable[[str], bool]

Codec = Literal["h264", "vp8", "jpeg"]
CODECS: tuple[Codec, ...] = ("h264", "vp8", "jpeg")

# Bits that a pixel of a street with flat colours over it is given: enough for clean edges.
_BITS_PER_PIXEL = 0.12
_LEAST_KBITS = 300


@dataclass(frozen=True)
class Encoder:
    """An encoder that works here: ``element`` is its name in GStreamer."""

    element: str
    codec: Codec
    converter: str | None = None

    def text(self, *, kbits: int, fps: float) -> str:
        """From pictures in BGR to encoded video: elements joined by ``!``.

        ``kbits`` per second are aimed at (JPEG has a quality instead). A whole picture comes every
        second, so that who joins late sees something by then, and no picture depends on a later
        one, so that none has to wait.
        """
        bits, every = kbits * 1000, max(round(fps), 1)
        to = "videoconvert ! video/x-raw,format="
        if self.element == "nvv4l2h264enc":
            return (
                f"{to}BGRx ! {self.converter} ! video/x-raw(memory:NVMM),format=NV12 ! "
                f"nvv4l2h264enc bitrate={bits} iframeinterval={every} idrinterval={every} "
                "insert-sps-pps=true maxperf-enable=true"
            )
        if self.element == "v4l2h264enc":
            # The level is not derived from the size, and 1 is what a Raspberry Pi starts from.
            return (
                f'{to}I420 ! v4l2h264enc extra-controls="controls,video_bitrate={bits},'
                f'h264_i_frame_period={every},repeat_sequence_header=1" ! '
                "video/x-h264,level=(string)4"
            )
        if self.element == "nvh264enc":
            return f"{to}NV12 ! nvh264enc bitrate={kbits} gop-size={every} zerolatency=true"
        if self.element in ("vah264enc", "vah264lpenc"):
            return f"{to}NV12 ! {self.element} bitrate={kbits} key-int-max={every} b-frames=0"
        if self.element == "vaapih264enc":
            return (
                f"{to}NV12 ! vaapih264enc rate-control=cbr bitrate={kbits} keyframe-period={every}"
            )
        if self.element == "x264enc":
            return (
                f"{to}I420 ! x264enc tune=zerolatency speed-preset=superfast bitrate={kbits} "
                f"key-int-max={every}"
            )
        if self.element == "openh264enc":
            return f"{to}I420 ! openh264enc complexity=low bitrate={bits} gop-size={every}"
        if self.element == "vp8enc":
            return (
                f"{to}I420 ! vp8enc deadline=1 cpu-used=8 lag-in-frames=0 target-bitrate={bits} "
                f"keyframe-max-dist={every}"
            )
        return f"{to}I420 ! jpegenc quality=85"

    @property
    def parser(self) -> str:
        """What brings the encoder's output into the form that is sent, `` ! `` in front."""
        # The parameter sets with every whole picture: a receiver may join at any of them.
        return " ! h264parse config-interval=-1" if self.codec == "h264" else ""

    @property
    def payloader(self) -> str:
        """What cuts the video into packets of RTP; named pay0, as GStreamer's server wants it."""
        if self.codec == "h264":
            return "rtph264pay name=pay0 pt=96 config-interval=-1"
        if self.codec == "vp8":
            return "rtpvp8pay name=pay0 pt=96"
        return "rtpjpegpay name=pay0 pt=26"

    def sdp(self, host: str, port: int) -> str:
        """The session description (RFC 8866) that a player needs for RTP without a server."""
        family = "IP6" if ":" in host else "IP4"
        kind = 26 if self.codec == "jpeg" else 96
        lines = [
            "v=0",
            f"o=- 0 0 IN {family} {host}",
            "s=EdgeSeg",
            f"c=IN {family} {host}",
            "t=0 0",
            f"m=video {port} RTP/AVP {kind}",
            f"a=rtpmap:{kind} {self.codec.upper()}/90000",
        ]
        if self.codec == "h264":
            lines.append("a=fmtp:96 packetization-mode=1")
        return "".join(f"{line}\r\n" for line in lines)


# What an encoder needs beside itself, by codec: to be sent as RTP.
_NEEDED = {
    "h264": ("h264parse", "rtph264pay"),
    "vp8": ("rtpvp8pay",),
    "jpeg": ("rtpjpegpay",),
}
_ELEMENTS: dict[Codec, tuple[str, ...]] = {
    "h264": (
        "nvv4l2h264enc",
        "nvh264enc",
        "vah264enc",
        "vah264lpenc",
        "vaapih264enc",
        "v4l2h264enc",
        "x264enc",
        "openh264enc",
    ),
    "vp8": ("vp8enc",),
    "jpeg": ("jpegenc",),
}


def find_encoder(has: Has, codec: Codec | None = None) -> Encoder:
    """The best encoder: H.264 in hardware, H.264 in software, VP8, JPEG, or one of ``codec``.

    ``has`` says what works here; an Orin Nano has the element of NVIDIA's encoder and no encoder.
    SinkError, with the packages that bring some, when there is none.
    """
    for kind in CODECS if codec is None else (codec,):
        if not all(has(name) for name in _NEEDED[kind]):
            continue
        for name in _ELEMENTS[kind]:
            if name != "nvv4l2h264enc":
                if has(name):
                    return Encoder(name, kind)
                continue
            converters = [one for one in ("nvvidconv", "nvvideoconvert") if has(one)]
            if converters and has(name):
                return Encoder(name, kind, converters[0])
    wanted = "video" if codec is None else {"h264": "H.264", "vp8": "VP8", "jpeg": "JPEG"}[codec]
    raise SinkError(
        f"GStreamer has nothing here that encodes {wanted} for RTP; `sudo apt-get install -y "
        "gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly` does"
    )


def usual_kbits(height: int, width: int, fps: float) -> int:
    """Kilobits per second for a picture of this size: 0.6 Mbit/s at 360x480, 7.5 at 1080x1920."""
    return max(round(height * width * fps * _BITS_PER_PIXEL / 1000), _LEAST_KBITS)
