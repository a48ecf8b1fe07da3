"""Sources of frames: a URI names a file, a folder, a camera, a network stream or a street.

`address` has the grammar of URIs, `status` the states of a source and the counts of its frames,
`live` what keeps a camera from going stale. To a caller, `open_source` and `Source` are enough.
"""

from edgeseg.source.address import Address, Options
from edgeseg.source.base import Source
from edgeseg.source.camera import cameras
from edgeseg.source.images import IMAGE_SUFFIXES, ImageSource
from edgeseg.source.live import LiveSource
from edgeseg.source.opencv import quiet_opencv
from edgeseg.source.opening import open_source
from edgeseg.source.status import Backoff, State, Status, Tally
from edgeseg.source.street import SyntheticSource
from edgeseg.source.video import CaptureSource, VideoSource

__all__ = [
    "IMAGE_SUFFIXES",
    "Address",
    "Backoff",
    "CaptureSource",
    "ImageSource",
    "LiveSource",
    "Options",
    "Source",
    "State",
    "Status",
    "SyntheticSource",
    "Tally",
    "VideoSource",
    "cameras",
    "open_source",
    "quiet_opencv",
]
