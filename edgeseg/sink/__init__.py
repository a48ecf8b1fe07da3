"""Where results go: a video, PNGs, JSON lines, a window, live video, several of them, or nowhere.

`target` has the grammar of targets, `outlet` what gives each sink a thread of its own. To a
caller, `open_sink`, `Sink` and `Outlet` are enough.
"""

from edgeseg.sink.base import MultiSink, NullSink, Policy, Sink
from edgeseg.sink.images import ImageFolderSink
from edgeseg.sink.jsonlines import JsonLinesSink
from edgeseg.sink.opening import open_sink
from edgeseg.sink.outlet import Outlet, OutletStats
from edgeseg.sink.target import Target, target_of_source
from edgeseg.sink.video import VIDEO_SUFFIXES, VideoSink
from edgeseg.sink.window import WindowSink

__all__ = [
    "VIDEO_SUFFIXES",
    "ImageFolderSink",
    "JsonLinesSink",
    "MultiSink",
    "NullSink",
    "Outlet",
    "OutletStats",
    "Policy",
    "Sink",
    "Target",
    "VideoSink",
    "WindowSink",
    "open_sink",
    "target_of_source",
]
