"""A window on the screen with the results."""

from __future__ import annotations

import os
import subprocess
import sys

import cv2

from edgeseg.errors import SinkError
from edgeseg.result import Result
from edgeseg.sink.base import Policy, Sink, check_opacity
from edgeseg.sink.drawing import drawn

__all__ = ["WindowSink"]

_ESCAPE = 27


class WindowSink(Sink):
    """A window on the screen. Q, Escape, or closing the window sets `stopped`.

    Belongs to the thread that made it, which on macOS must be the main thread. Raises SinkError
    when OpenCV is a build without windows, or there is no display.
    """

    def __init__(
        self, title: str = "EdgeSeg", *, opacity: float = 0.5, legend: bool = True
    ) -> None:
        check_opacity(opacity)
        _check_windows()
        self._title = title
        self._opacity = opacity
        self._legend = legend
        self._stopped = False
        self._open = False
        self._was_visible = False
        self._closed = False

    @property
    def policy(self) -> Policy:
        """``"drop"``: whoever looks wants to see the newest."""
        return "drop"

    @property
    def stopped(self) -> bool:
        """Whether the user pressed Q or Escape, or closed the window."""
        return self._stopped

    def write(self, result: Result) -> None:
        """Shows one result; nothing once the window was closed."""
        if self._stopped or self._closed:
            return
        picture = drawn(result, opacity=self._opacity, legend=self._legend)
        try:
            if not self._open:
                cv2.namedWindow(self._title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
                cv2.resizeWindow(self._title, picture.shape[1], picture.shape[0])
                self._open = True
            cv2.imshow(self._title, picture)
            key = cv2.waitKey(1) & 0xFF
            visible = cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) > 0
        except cv2.error as error:
            raise SinkError(
                "the window cannot be shown; write the result with --save instead"
            ) from error
        # Some backends don't know whether a window is visible, and always deny it.
        if key in (ord("q"), ord("Q"), _ESCAPE) or (self._was_visible and not visible):
            self._stopped = True
        self._was_visible = visible

    def close(self) -> None:
        """Closes the window."""
        if self._closed:
            return
        self._closed = True
        if self._open:
            # A window that the user has closed is gone already, and some backends say so.
            try:
                cv2.destroyWindow(self._title)
                cv2.waitKey(1)
            except cv2.error:
                return


# What opens a window and closes it again, for a process of its own: without a display, some of
# OpenCV's window backends end the whole process instead of raising.
_WINDOW_PROBE = "import cv2; cv2.namedWindow('EdgeSeg'); cv2.waitKey(1); cv2.destroyAllWindows()"


def _check_windows() -> None:
    """Raises SinkError, with the fix, where no window can be opened."""
    if _is_headless():
        raise SinkError(
            "this OpenCV is a headless build and opens no windows; "
            "`pip uninstall opencv-python-headless` and `pip install opencv-python`, or use --save"
        )
    no_display = (
        "there is no display to open a window on; use --save, or start it in a desktop session"
    )
    if sys.platform == "linux":
        if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
            raise SinkError(no_display)
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _WINDOW_PROBE],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SinkError(no_display) from error
        if probe.returncode != 0:
            raise SinkError(no_display)


def _is_headless() -> bool:
    if not hasattr(cv2, "imshow"):
        return True
    gui = [line for line in cv2.getBuildInformation().splitlines() if "GUI:" in line]
    return any(line.split("GUI:")[1].strip().upper() in ("NONE", "NO") for line in gui)
