"""Results as live video for whoever asks: an RTSP server of our own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from edgeseg.errors import RequestError, SinkError
from edgeseg.sink.encoder import Codec, Encoder, find_encoder, usual_kbits
from edgeseg.sink.feed import FRONT, Feed, Shape, gstreamer_library, works
from edgeseg.sink.gstreamer import LiveVideoSink

__all__ = ["RtspServerSink"]

# Sessions whose player went without a word are looked for this often, in seconds.
_CLEANING_S = 5
# How long the server may take to let its players go, in seconds.
_FAREWELL_S = 5.0
# What a player is, once it has given the password.
_ROLE = "viewer"


class RtspServerSink(LiveVideoSink):
    """An RTSP server on ``port`` that shows the results at ``/name`` to any number of players.

    All of them are given the same encoded video, and while nobody watches nothing is drawn or
    encoded. A player that is too slow loses packets of its own; neither the others nor `write`
    notice it. ``host``: which address it is reached at, ``""`` for all that the machine has.
    ``user`` and ``password``: what a player has to know, both or neither; they travel readably, as
    is usual for cameras. ``codec`` and ``kbits`` as for `RtpSink`. Several sinks of one process
    may share a port, under different names and with the same password.

    Raises SinkError, before the first frame, without GStreamer, its RTSP server or an encoder, and
    when the port or the name is taken.
    """

    def __init__(
        self,
        name: str,
        port: int = 8554,
        *,
        host: str = "",
        user: str | None = None,
        password: str | None = None,
        codec: Codec | None = None,
        kbits: int | None = None,
        fps: float | None = None,
        opacity: float = 0.5,
        legend: bool = True,
    ) -> None:
        super().__init__(fps=fps, opacity=opacity, legend=legend)
        if (user is None) != (password is None):
            raise RequestError("a server that asks for a password has a user as well; give both")
        self._name, self._port, self._host = name.strip("/"), port, host
        self._kbits = kbits
        self._gst = gstreamer_library(self._shown)
        self._encoder = find_encoder(works, codec)
        self._lock = threading.Lock()
        self._feeds: dict[Any, Feed] = {}
        self._dropped = 0
        self._offered = False
        secret = None if user is None or password is None else (user, password)
        self._server = _Server.on(host, port, secret, self._shown)
        self._factory: Any = self._server.factory(self._configure)

    @property
    def url(self) -> str:
        """What a player on this machine opens."""
        return f"rtsp://{self._host or '127.0.0.1'}:{self._server.port}/{self._name}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Where to watch, and who can."""
        if self._host in ("127.0.0.1", "localhost") or self._server.secret is not None:
            return (f"to be watched at {self.url}",)
        return (
            f"to be watched at {self.url}, and by anyone who reaches this machine; "
            f"rtsp://USER:PASSWORD@:{self._port}/{self._name} asks for a password",
        )

    @property
    def dropped(self) -> int:
        """Pictures that the encoder had no time for."""
        with self._lock:
            return self._dropped + sum(feed.dropped for feed in self._feeds.values())

    @staticmethod
    def text(encoder: Encoder, *, kbits: int, fps: float) -> str:
        """The pipeline of what is shown, as GStreamer's server takes it."""
        return (
            f"( {FRONT} ! {encoder.text(kbits=kbits, fps=fps)}{encoder.parser} ! "
            f"{encoder.payloader} )"
        )

    def close(self) -> None:
        """Lets the players go, and closes the port unless another sink has it."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            feeds = list(self._feeds.values())
        for feed in feeds:
            feed.end()
        self._server.leave(self._name if self._offered else None)

    @property
    def _shown(self) -> str:
        return f"rtsp://{self._host}:{self._port}/{self._name}"

    def _wanted(self) -> bool:
        # The first picture gives the size, without which no player can be served.
        return not self._offered or bool(self._feeds)

    def _send(self, shape: Shape, content: bytes, captured_ns: int) -> None:
        if not self._offered:
            kbits = self._kbits or usual_kbits(shape.height, shape.width, shape.fps)
            self._factory.set_launch(self.text(self._encoder, kbits=kbits, fps=shape.fps))
            self._server.offer(self._name, self._factory)
            self._offered = True
        with self._lock:
            feeds = list(self._feeds.items())
        for media, feed in feeds:
            if not feed.push(content, captured_ns):
                self._forget(media)

    def _configure(self, factory: Any, media: Any) -> None:
        """A pipeline was made, because a player came; called in the server's thread."""
        assert self._shape is not None
        appsrc = media.get_element().get_by_name_recurse_up("edgeseg")
        feed = Feed(self._gst, appsrc, self._shape)
        media.connect("unprepared", self._forget)
        with self._lock:
            self._feeds[media] = feed

    def _forget(self, media: Any) -> None:
        with self._lock:
            feed = self._feeds.pop(media, None)
            if feed is not None:
                self._dropped += feed.dropped


class _Server:
    """One port of this process, with all that is shown there, and its thread."""

    _all: ClassVar[dict[tuple[str, int], _Server]] = {}
    _making = threading.Lock()

    @classmethod
    def on(cls, host: str, port: int, secret: tuple[str, str] | None, name: str) -> _Server:
        """The server on that port: the one that is there, or a new one."""
        with cls._making:
            # Port 0 is any free one, so never one that is there.
            found = cls._all.get((host, port)) if port else None
            if found is None:
                found = cls(host, port, secret, name)
                cls._all[host, found.port] = found
            elif found.secret != secret:
                raise SinkError(
                    f"{name} shares its port with another output, and so its user and password"
                )
            found._users += 1
            return found

    def __init__(self, host: str, port: int, secret: tuple[str, str] | None, name: str) -> None:
        self._host = host
        self.secret = secret
        self._users = 0
        self._library, self._glib = _server_library(name)
        self._context: Any = self._glib.MainContext.new()
        self._loop: Any = self._glib.MainLoop.new(self._context, False)
        self._rtsp: Any = self._library.RTSPServer.new()
        self._rtsp.set_address(host or "0.0.0.0")
        self._rtsp.set_service(str(port))
        if secret is not None:
            self._ask_for(*secret)
        self._attached = self._rtsp.attach(self._context)
        if not self._attached:
            raise SinkError(
                f"no RTSP server can be opened for {name}; is the port taken? Another one is "
                "rtsp://:PORT/NAME"
            )
        self.port: int = self._rtsp.get_bound_port()
        self._cleaner: Any = self._glib.timeout_source_new_seconds(_CLEANING_S)
        self._cleaner.set_callback(self._clean)
        self._cleaner.attach(self._context)
        self._thread = threading.Thread(
            target=self._serve, name=f"edgeseg-rtsp-{self.port}", daemon=True
        )
        self._thread.start()

    def factory(self, configure: Callable[[Any, Any], None]) -> Any:
        """What makes the pipeline when a player comes; ``configure`` is then called with it."""
        factory = self._library.RTSPMediaFactory.new()
        factory.set_shared(True)
        factory.connect("media-configure", configure)
        if self.secret is not None:
            permissions = self._library.RTSPPermissions.new()
            for right in ("access", "construct"):
                permissions.add_permission_for_role(_ROLE, f"media.factory.{right}", True)
            factory.set_permissions(permissions)
        return factory

    def offer(self, name: str, factory: Any) -> None:
        """Shows something at ``/name``; SinkError when something else is there."""
        with self._making:
            mounts = self._rtsp.get_mount_points()
            there, matched = mounts.match(f"/{name}")
            if there is not None and matched == len(name) + 1:
                raise SinkError(
                    f"two outputs are to be rtsp://{self._host}:{self.port}/{name}; give each a "
                    "name of its own"
                )
            mounts.add_factory(f"/{name}", factory)

    def leave(self, name: str | None) -> None:
        """Takes back what was shown at ``/name``; closes the port when it was the last."""
        with self._making:
            self._users -= 1
            if name is not None:
                self._rtsp.get_mount_points().remove_factory(f"/{name}")
            if self._users:
                return
            del self._all[self._host, self.port]
        ending = self._glib.idle_source_new()
        ending.set_callback(self._let_go)
        ending.attach(self._context)
        self._thread.join(_FAREWELL_S)

    def _serve(self) -> None:
        self._context.push_thread_default()
        try:
            self._loop.run()
        finally:
            self._context.pop_thread_default()

    def _clean(self, *_: Any) -> bool:
        self._rtsp.get_session_pool().cleanup()
        return True

    def _let_go(self, *_: Any) -> bool:
        remove = self._library.RTSPFilterResult.REMOVE
        self._rtsp.client_filter(lambda *_: remove)
        self._cleaner.destroy()
        source = self._context.find_source_by_id(self._attached)
        if source is not None:
            source.destroy()
        self._loop.quit()
        return False

    def _ask_for(self, user: str, password: str) -> None:
        token = self._library.RTSPToken.new()
        token.set_string("media.factory.role", _ROLE)
        auth = self._library.RTSPAuth.new()
        auth.add_basic(self._library.RTSPAuth.make_basic(user, password), token)
        self._rtsp.set_auth(auth)


def _server_library(name: str) -> tuple[Any, Any]:
    """GStreamer's RTSP server, and GLib."""
    try:
        # Older PyGObjects import in a way that Python warns of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import gi

            gi.require_version("GstRtspServer", "1.0")
            from gi.repository import GLib, GstRtspServer
    except (ImportError, ValueError):
        raise SinkError(
            f"{name} is served by GStreamer's RTSP server, which cannot be imported; "
            "`sudo apt-get install -y gir1.2-gst-rtsp-server-1.0` brings it"
        ) from None
    return GstRtspServer, GLib
