"""From a target to an opened sink."""

from __future__ import annotations

import os
from pathlib import Path

from edgeseg.errors import SinkError
from edgeseg.sink.base import MultiSink, NullSink, Sink
from edgeseg.sink.images import ImageFolderSink
from edgeseg.sink.jsonlines import JsonLinesSink
from edgeseg.sink.part import reason_of
from edgeseg.sink.target import Target
from edgeseg.sink.video import VideoSink
from edgeseg.sink.window import WindowSink

__all__ = ["open_sink"]


def open_sink(
    target: str | os.PathLike[str] | None,
    *,
    show: bool = False,
    title: str = "EdgeSeg",
    source: str | None = None,
    fps: float | None = None,
    opacity: float = 0.5,
    legend: bool = True,
    masks: bool = False,
) -> Sink:
    """The sink that ``target`` names, opened; `edgeseg.sink.target` has the grammar.

    ``show`` adds a window called ``title``; without either, results go nowhere. ``source`` is the
    source's name in JSON lines, ``fps`` its rate, for videos, ``masks`` is for folders. Raises
    RequestError for a target of no known kind or with wrong options, SinkError when the output
    cannot be written or shown: nothing has been processed by then.
    """
    sinks: list[Sink] = []
    # The window first: that it cannot be shown should not leave a file behind.
    if show:
        sinks.append(WindowSink(title, opacity=opacity, legend=legend))
    if target is not None:
        found = Target.of(os.fspath(target))
        if found.kind == "jsonlines":
            sinks.append(JsonLinesSink(found.where, source=source, shapes=found.shapes))
        elif found.kind == "images":
            sinks.append(ImageFolderSink(found.where, opacity=opacity, legend=legend, masks=masks))
        elif found.kind == "video":
            sinks.append(VideoSink(found.where, fps=fps, opacity=opacity, legend=legend))
        else:
            sinks.append(_live(found, fps, opacity, legend))
    if not sinks:
        return NullSink()
    return sinks[0] if len(sinks) == 1 else MultiSink(sinks)


def _live(target: Target, fps: float | None, opacity: float, legend: bool) -> Sink:
    from edgeseg.sink.gstreamer import GStreamerSink, RtpSink, RtspPublishSink
    from edgeseg.sink.rtspserver import RtspServerSink

    if target.kind == "gst":
        return GStreamerSink(target.where, fps=fps, opacity=opacity, legend=legend)
    if target.kind == "rtsp":
        return RtspPublishSink(
            target.where,
            codec=target.codec,
            kbits=target.kbits,
            fps=fps,
            opacity=opacity,
            legend=legend,
        )
    if target.kind == "rtsp-server":
        return RtspServerSink(
            target.where,
            target.port,
            host=target.host,
            user=target.user,
            password=target.password,
            codec=target.codec,
            kbits=target.kbits,
            fps=fps,
            opacity=opacity,
            legend=legend,
        )
    sink = RtpSink(
        target.host,
        target.port,
        codec=target.codec,
        kbits=target.kbits,
        fps=fps,
        opacity=opacity,
        legend=legend,
    )
    if target.sdp is not None:
        path = Path(target.sdp).expanduser()
        try:
            path.write_text(sink.sdp, encoding="ascii", newline="")
        except OSError as error:
            sink.abort()
            raise SinkError(
                f"{path} cannot be written ({reason_of(error)}); choose another"
            ) from error
    return sink
