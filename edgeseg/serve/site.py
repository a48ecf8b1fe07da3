"""The web page's addresses: what each one answers, and who may ask."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import secrets
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from aiohttp import WSMsgType, web

import edgeseg
from edgeseg.errors import EdgeSegError, SinkError
from edgeseg.result import Result
from edgeseg.serve.access import Access, Refusal
from edgeseg.serve.broadcast import Broadcast, Picture
from edgeseg.serve.feed import HISTORY_S, Feed
from edgeseg.serve.recordings import Recordings, RecordingState, Video
from edgeseg.serve.views import VIEWS, View, encoded_jpeg, encoded_png, rendered
from edgeseg.stats import Stats

__all__ = ["Look", "Site"]

_STATIC = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
    # Not which versions of what answer here.
    "Server": "EdgeSeg",
}
_SIGN_IN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>EdgeSeg</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"></head>
<body><h1>EdgeSeg</h1><p>{reason}</p>
<form method="get" action="/"><label>Token <input name="token" type="password" required
autocomplete="current-password" maxlength="200"></label> <button>Open</button></form>
</body></html>
"""

# Bytes of a request's body, of its first line and of one header.
_LONGEST_BODY, _LONGEST_LINE = 4096, 4096
# Seconds: to send a request, to take a picture, between signs of life, between two events.
_REQUEST_S, _PICTURE_S, _HEARTBEAT_S, _EVENT_S = 10.0, 20.0, 15.0, 1.0
# Seconds that figures may be old; several viewers then cost as much as one.
_FRESH_S = 0.5
_WATCH_S = 2.0
# Bytes of pictures that may lie in the system's buffer on their way to a viewer: more of them
# would be seen late by one who is slow.
_SEND_BUFFER = 128 * 1024
# Pictures on their way to a page that has not said that it shows them.
_IN_FLIGHT = 2
# Seconds that a frame may be in the engine before the program counts as hanging.
_HANGING_S = 30.0
_BOUNDARY = "edgeseg"
_COOKIE_AGE_S = 30 * 24 * 3600

_T = TypeVar("_T")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclasses.dataclass(frozen=True)
class Look:
    """What the page shows, and how much it may cost.

    ``fps``: pictures per second and view at most. ``longest``: pixels of the longer side of a
    live picture. ``quality``: of JPEG, 1 to 100. ``legend``: name -> (red, green, blue).
    """

    legend: Mapping[str, tuple[int, int, int]]
    fps: float = 15.0
    opacity: float = 0.5
    longest: int = 1280
    quality: int = 80


class Site:
    """The handlers of one page; lives in the event loop's thread.

    ``pool``: threads for all that computes or waits for a disk. ``max_clients``: connections that
    show pictures, and as many that show figures.
    """

    def __init__(
        self,
        *,
        stats: Callable[[], Stats],
        feeds: Mapping[str, Feed],
        recordings: Recordings,
        access: Access,
        look: Look,
        pool: ThreadPoolExecutor,
        max_clients: int,
    ) -> None:
        self._stats = stats
        self._feeds = dict(feeds)
        self._recordings = recordings
        self._access = access
        self._look = look
        self._pool = pool
        self._max_clients = max_clients
        self._run = secrets.token_hex(8)
        self._started = time.time()
        self._watching = 0
        self._reading = 0
        self._long: set[asyncio.Task[Any]] = set()
        self._encoding = asyncio.Lock()
        self._filing = asyncio.Lock()
        self._measuring: asyncio.Task[Stats] | None = None
        self._measured: tuple[float, Stats] | None = None
        self._heard: set[int] = set()
        self._broadcasts = {
            (name, view): Broadcast(feed, self._encoder(view))
            for name, feed in self._feeds.items()
            for view in VIEWS
        }
        folder = Path(__file__).parent
        self._static = {name: (folder / name).read_bytes() for name in _STATIC}

    def application(self) -> web.Application:
        """All addresses."""
        app = web.Application(middlewares=[self._guard], client_max_size=_LONGEST_BODY)
        router = app.router
        router.add_get("/", self._file)
        for name in _STATIC:
            if name != "index.html":
                router.add_get(f"/{name}", self._file)
        router.add_get("/page.json", self._page)
        router.add_get("/stats.json", self._stats_json)
        router.add_get("/events", self._events, allow_head=False)
        router.add_get("/live", self._live, allow_head=False)
        router.add_get("/stream/{name}/{view}.mjpg", self._stream, allow_head=False)
        router.add_get("/snapshot/{name}/{view}.{kind}", self._snapshot)
        router.add_get("/metrics", self._metrics)
        router.add_get("/healthz", self._health)
        router.add_get("/recordings", self._list_recordings)
        router.add_post("/recordings", self._start_recording)
        router.add_get("/recordings/{file}", self._download)
        router.add_delete("/recordings/{id}", self._stop_recording)
        return app

    @property
    def server_options(self) -> dict[str, Any]:
        """How `aiohttp.web.AppRunner` is to be made: what a request may be at most."""
        silent = logging.getLogger("edgeseg.serve.http")
        silent.propagate = False
        if not silent.handlers:
            # Junk on the port is no business of the one who looks at the terminal.
            silent.addHandler(logging.NullHandler())
        return {
            "access_log": None,
            "logger": silent,
            "handler_cancellation": True,
            "keepalive_timeout": 30.0,
            "max_line_size": _LONGEST_LINE,
            "max_field_size": _LONGEST_LINE,
            "shutdown_timeout": 1.0,
        }

    @property
    def max_connections(self) -> int:
        """Open connections at most, of whatever kind."""
        return 4 * self._max_clients + 16

    def full(self) -> bytes:
        """What a connection beyond that is told."""
        body = b"Too many connections are open; close a window of this page, or try again later.\n"
        return (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n"
            b"Retry-After: 10\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )

    async def watch(self, server: web.Server) -> None:
        """Ends what should end, for as long as the page is served: recordings on a full disk, and
        connections on which nothing was asked."""
        since: dict[int, float] = {}
        while True:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            there = {id(connection): connection for connection in server.connections}
            since = {key: since.get(key, now) for key in there}
            self._heard &= there.keys()
            for key, connection in there.items():
                if key not in self._heard and now - since[key] > _REQUEST_S:
                    transport = connection.transport
                    if transport is not None:
                        transport.close()
            async with self._filing:
                for recording, reason in await self._compute(self._recordings.failing):
                    self._feeds[recording.source].recording = None
                    await self._compute(partial(self._recordings.give_up, recording, reason))

    async def end(self) -> None:
        """Ends all long answers, and finishes what is being recorded."""
        for task in self._long:
            task.cancel()
        await asyncio.gather(*self._long, return_exceptions=True)
        async with self._filing:
            for feed in self._feeds.values():
                feed.recording = None
            await self._compute(self._recordings.close)

    # --- who may ask

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Checks every request, and gives every answer the page's headers."""
        self._heard.add(id(request.protocol))
        socketed = request.headers.get("Upgrade", "").lower() == "websocket"
        changing = socketed or request.method not in ("GET", "HEAD")
        given = self._access.token_in(request.headers, request.query, request.cookies)
        refusal = self._access.refusal(
            request.method, request.headers, given=given, changing=changing
        )
        response: web.StreamResponse
        if refusal is not None:
            response = self._refused(request, refusal)
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = _sentence(error.status, error.text or error.reason)
                # Such as the methods that an address knows.
                if "Allow" in error.headers:
                    response.headers["Allow"] = error.headers["Allow"]
            except EdgeSegError as error:
                response = _sentence(500, str(error))
            if self._access.token is not None and "token" in request.query:
                self._remember(response)
        if not response.prepared:
            response.headers.update(_HEADERS)
        return response

    def _refused(self, request: web.Request, refusal: Refusal) -> web.Response:
        if (
            refusal.status == 401
            and request.path == "/"
            and "text/html" in request.headers.get("Accept", "")
        ):
            response = web.Response(
                status=401, text=_SIGN_IN.format(reason=refusal.reason), content_type="text/html"
            )
        else:
            response = _sentence(refusal.status, refusal.reason)
        if refusal.status == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="EdgeSeg"'
        return response

    def _remember(self, response: web.StreamResponse) -> None:
        if not response.prepared:
            response.set_cookie(
                self._access.cookie,
                self._access.token or "",
                max_age=_COOKIE_AGE_S,
                path="/",
                httponly=True,
                samesite="Strict",
            )

    # --- the page

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.path.lstrip("/") or "index.html"
        return web.Response(body=self._static[name], content_type=_STATIC[name], charset="utf-8")

    async def _page(self, _: web.Request) -> web.StreamResponse:
        """What does not change while the program runs."""
        legend = [
            [name, f"#{red:02x}{green:02x}{blue:02x}"]
            for name, (red, green, blue) in self._look.legend.items()
        ]
        return _json(
            {
                "run": self._run,
                "version": edgeseg.__version__,
                "names": list(self._feeds),
                "views": list(VIEWS),
                "legend": legend,
                "fps": self._look.fps,
                "history_s": HISTORY_S,
                "recordings": self._recordings.folder is not None,
            }
        )

    async def _stats_json(self, _: web.Request) -> web.StreamResponse:
        return _json((await self._figures()).to_dict())

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        from edgeseg.prometheus import CONTENT_TYPE, exposition

        stats = await self._figures()
        body = await self._compute(lambda: exposition(stats))
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _health(self, _: web.Request) -> web.StreamResponse:
        """200 while masks can come; 503 when every source has ended, or the engine hangs."""
        stats = await self._figures()
        states = {source.name: source.status.state for source in stats.sources}
        if stats.in_engine_s > _HANGING_S:
            status, said = 503, f"a frame has been in the engine for {stats.in_engine_s:.0f} s"
        elif states and all(state == "ended" for state in states.values()):
            status, said = 503, "every source has ended"
        else:
            status, said = 200, "ok"
        return _json({"status": said, "sources": states}, status=status)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: all figures once a second, and the last minutes at the beginning."""
        if self._reading >= self._max_clients:
            return self._too_many()
        self._reading += 1
        try:
            with self._lasting():
                return await self._send_events(request)
        finally:
            self._reading -= 1

    async def _send_events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={**_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"}
        )
        await response.prepare(request)
        told = dict.fromkeys(self._feeds, 0)
        lead = b"retry: 1000\n"
        while True:
            event = await self._event(told)
            data = json.dumps(event, separators=(",", ":"), allow_nan=False).encode()
            await asyncio.wait_for(response.write(lead + b"data: " + data + b"\n\n"), _PICTURE_S)
            lead = b""
            await _drained(request)
            await asyncio.sleep(_EVENT_S)

    async def _event(self, told: dict[str, int]) -> dict[str, object]:
        stats = await self._figures()
        recordings = await self._recording_list()
        shares = await self._compute(self._shares)
        past = {}
        now = int(time.monotonic())
        for name, feed in self._feeds.items():
            seconds = feed.past(told[name])
            if seconds:
                told[name] = seconds[-1].at
            past[name] = [[second.at, second.masks, _rounded(second.age_ms)] for second in seconds]
        return {
            "run": self._run,
            "now": now,
            "stats": stats.to_dict(),
            "shares": shares,
            "past": past,
            "viewers": self._watching,
            "recordings": recordings,
        }

    def _shares(self) -> dict[str, dict[str, float]]:
        """Per source, the share of its newest frame that each class covers."""
        found: dict[str, dict[str, float]] = {}
        for name, feed in self._feeds.items():
            newest = feed.newest
            shares = getattr(newest[1], "shares", None) if newest is not None else None
            if shares is not None:
                found[name] = {
                    kind: round(share, 4) for kind, share in shares().items() if share > 0
                }
        return found

    # --- pictures

    async def _live(self, request: web.Request) -> web.StreamResponse:
        """A WebSocket with the pictures of all sources, for the page.

        A browser opens six connections to one host at most, so that a page of several sources
        cannot have one each. It asks with ``{"watch": [[name, view], …], "round": n}``; each
        picture comes as a message of 8 bytes (little-endian: round uint16, number in the list
        uint16, frame uint32) and the JPEG; ``{"shown": [round, number]}`` asks for the next.
        """
        if self._watching >= self._max_clients:
            return self._too_many()
        channel = web.WebSocketResponse(
            heartbeat=_HEARTBEAT_S, max_msg_size=_LONGEST_BODY, compress=False
        )
        self._watching += 1
        tasks: list[asyncio.Task[None]] = []
        try:
            with self._lasting():
                channel.headers.update(_HEADERS)
                await channel.prepare(request)
                _keep_short(request)
                await self._converse(channel, tasks)
        finally:
            self._watching -= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return channel

    async def _converse(
        self, channel: web.WebSocketResponse, tasks: list[asyncio.Task[None]]
    ) -> None:
        rooms: list[asyncio.Semaphore] = []
        current = -1
        async for message in channel:
            wish = _wish(message.data) if message.type is WSMsgType.TEXT else None
            if wish is None:
                await channel.close(code=1008, message=b"that is not what this channel takes")
                return
            if "shown" in wish:
                shown = wish["shown"]
                if _are_numbers(shown, 2) and shown[0] == current and 0 <= shown[1] < len(rooms):
                    rooms[shown[1]].release()
                continue
            watched = self._watched(wish)
            asked = wish.get("round")
            number = asked if type(asked) is int and 0 <= asked < 2**16 else None
            if watched is None or number is None:
                await channel.close(code=1008, message=b"no such source or view")
                return
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            current = number
            rooms = [asyncio.Semaphore(_IN_FLIGHT) for _ in watched]
            tasks[:] = [
                asyncio.create_task(self._show(channel, broadcast, rooms[place], current, place))
                for place, broadcast in enumerate(watched)
            ]

    def _watched(self, wish: Mapping[str, Any]) -> list[Broadcast] | None:
        asked = wish.get("watch")
        if not isinstance(asked, list) or len(asked) > len(self._feeds):
            return None
        found = []
        for pair in asked:
            if not isinstance(pair, list) or not all(isinstance(part, str) for part in pair):
                return None
            broadcast = self._broadcasts.get(cast("tuple[str, View]", tuple(pair)))
            if broadcast is None:
                return None
            found.append(broadcast)
        return found

    async def _show(
        self,
        channel: web.WebSocketResponse,
        broadcast: Broadcast,
        room: asyncio.Semaphore,
        number: int,
        place: int,
    ) -> None:
        async with aclosing(broadcast.pictures(self._look.fps)) as pictures:
            # A page asks for the next picture when it has shown one, or it gets none.
            await room.acquire()
            async for picture in pictures:
                head = struct.pack("<HHI", number, place, picture.index % 2**32)
                with suppress(ConnectionResetError):
                    await channel.send_bytes(head + picture.data)
                await room.acquire()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """Multipart JPEG, which browsers show as a picture and other programs as a camera."""
        broadcast = self._broadcast(request)
        fps = self._rate(request)
        if self._watching >= self._max_clients:
            return self._too_many()
        self._watching += 1
        try:
            with self._lasting():
                kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
                response = web.StreamResponse(headers={**_HEADERS, "Content-Type": kind})
                await response.prepare(request)
                _keep_short(request)
                await response.write(f"--{_BOUNDARY}\r\n".encode())
                async with aclosing(broadcast.pictures(fps)) as pictures:
                    async for picture in pictures:
                        await asyncio.wait_for(response.write(_part(picture)), _PICTURE_S)
                        await _drained(request)
                return response
        finally:
            self._watching -= 1

    async def _snapshot(self, request: web.Request) -> web.StreamResponse:
        """The newest picture at the size of the frame."""
        broadcast = self._broadcast(request)
        name, view = request.match_info["name"], cast(View, request.match_info["view"])
        kind = request.match_info["kind"]
        if kind not in ("jpg", "png"):
            raise web.HTTPNotFound(text="A snapshot ends in .jpg or .png.")
        del broadcast
        newest = self._feeds[name].newest
        if newest is None:
            return _sentence(503, f"No mask of {name} was finished yet.")
        result = newest[1]

        def encode() -> bytes:
            picture = rendered(result, view, opacity=self._look.opacity)
            return encoded_png(picture) if kind == "png" else encoded_jpeg(picture, 92, sharp=True)

        async with self._encoding:
            data = await self._compute(encode)
        return web.Response(
            body=data,
            content_type="image/png" if kind == "png" else "image/jpeg",
            headers={"X-Frame-Index": str(result.index)},
        )

    def _broadcast(self, request: web.Request) -> Broadcast:
        name, view = request.match_info["name"], request.match_info["view"]
        if name not in self._feeds:
            raise web.HTTPNotFound(text=f"The sources are {', '.join(self._feeds)}.")
        if view not in VIEWS:
            raise web.HTTPNotFound(text=f"The views are {', '.join(VIEWS)}.")
        return self._broadcasts[name, view]

    def _rate(self, request: web.Request) -> float:
        """Pictures per second that a stream is asked for: its ``?fps=``, up to the page's own."""
        asked = request.query.get("fps")
        if asked is None:
            return self._look.fps
        try:
            fps = float(asked)
        except ValueError:
            fps = 0.0
        if not 0.1 <= fps <= 1000:
            raise web.HTTPBadRequest(text="fps is a number of pictures per second, 0.1 or more.")
        return min(fps, self._look.fps)

    def _encoder(self, view: View) -> Callable[[Result], Awaitable[bytes]]:
        look = self._look

        def encode(result: Result) -> bytes:
            picture = rendered(result, view, opacity=look.opacity, longest=look.longest)
            return encoded_jpeg(picture, look.quality, sharp=view == "mask")

        async def encoded(result: Result) -> bytes:
            # One picture at a time: watching never takes more than one core from the network.
            async with self._encoding:
                return await self._compute(lambda: encode(result))

        return encoded

    # --- recordings

    async def _recording_list(self) -> dict[str, object]:
        recordings = self._recordings

        def found() -> dict[str, object]:
            return {
                "running": [_running(state) for state in recordings.running()],
                "finished": [_video(video) for video in recordings.finished()],
                "notes": recordings.notes(),
            }

        return await self._compute(found)

    async def _list_recordings(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._recording_list())

    async def _start_recording(self, request: web.Request) -> web.StreamResponse:
        """``{"source": name}`` -> 201 and the recording's state."""
        body = await asyncio.wait_for(request.content.read(_LONGEST_BODY), _REQUEST_S)
        wish = _wish(body.decode("utf-8", "replace"))
        source = None if wish is None else wish.get("source")
        if not isinstance(source, str):
            return _sentence(400, 'A recording is asked for with {"source": NAME}.')
        feed = self._feeds.get(source)
        if feed is None:
            return _sentence(404, f"The sources are {', '.join(self._feeds)}.")
        async with self._filing:
            try:
                recording = await self._compute(lambda: self._recordings.start(source, feed.fps))
            except SinkError as error:
                return _sentence(409, str(error))
            feed.recording = recording
        return _json(_running(recording.state), status=201)

    async def _stop_recording(self, request: web.Request) -> web.StreamResponse:
        """200 and the finished video."""
        asked = request.match_info["id"]
        async with self._filing:
            found = [
                (feed, feed.recording)
                for feed in self._feeds.values()
                if feed.recording is not None and feed.recording.id == asked
            ]
            if not found:
                return _sentence(404, "No recording of that name runs.")
            (feed, recording), *_ = found
            feed.recording = None
            assert recording is not None
            try:
                video = await self._compute(lambda: self._recordings.stop(recording))
            except SinkError as error:
                return _sentence(500, str(error))
        if video is None:
            return _sentence(409, f"Nothing came from {recording.source} while it was recorded.")
        return _json(_video(video))

    async def _download(self, request: web.Request) -> web.StreamResponse:
        path = await self._compute(lambda: self._recordings.path(request.match_info["file"]))
        if path is None:
            return _sentence(404, "There is no finished recording of that name.")
        return web.FileResponse(
            path,
            headers={
                **_HEADERS,
                "Content-Type": "video/mp4",
                "Content-Disposition": f'attachment; filename="{path.name}"',
            },
        )

    # --- what they share

    async def _figures(self) -> Stats:
        """The run's figures, at most half a second old; asked for once, for all who want them."""
        if self._measured is not None and time.monotonic() - self._measured[0] < _FRESH_S:
            return self._measured[1]
        if self._measuring is None:
            self._measuring = asyncio.create_task(self._measure())
        return await asyncio.shield(self._measuring)

    async def _measure(self) -> Stats:
        try:
            stats = await self._compute(self._stats)
            self._measured = (time.monotonic(), stats)
            return stats
        finally:
            self._measuring = None

    async def _compute(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _lasting(self) -> _Lasting:
        """Keeps the task of a long answer, so that `end` can end it."""
        return _Lasting(self._long)

    def _too_many(self) -> web.Response:
        response = _sentence(
            503,
            f"{self._max_clients} viewers watch already, and more are not served; close one of "
            "their windows, or try again later.",
        )
        response.headers["Retry-After"] = "10"
        return response


class _Lasting:
    """Registers the running task while its block runs."""

    def __init__(self, tasks: set[asyncio.Task[Any]]) -> None:
        self._tasks = tasks
        self._task = asyncio.current_task()

    def __enter__(self) -> None:
        if self._task is not None:
            self._tasks.add(self._task)

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._tasks.discard(self._task)


def _sentence(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text.rstrip("\n") + "\n")


def _json(content: object, *, status: int = 200) -> web.Response:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return web.Response(status=status, text=text, content_type="application/json")


def _wish(text: object) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        wish = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return wish if isinstance(wish, dict) else None


def _are_numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) == count
        and all(type(value) is int for value in values)
    )


def _part(picture: Picture) -> bytes:
    """One picture of a multipart stream. Its boundary follows at once, for browsers show a part
    when they see its end."""
    head = f"Content-Type: image/jpeg\r\nContent-Length: {len(picture.data)}\r\n\r\n"
    return b"".join((head.encode(), picture.data, f"\r\n--{_BOUNDARY}\r\n".encode()))


def _running(state: RecordingState) -> dict[str, object]:
    return {**dataclasses.asdict(state), "seconds": round(state.seconds, 1)}


def _video(video: Video) -> dict[str, object]:
    return {**dataclasses.asdict(video), "url": f"/recordings/{video.file}"}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _keep_short(request: web.Request) -> None:
    """Makes the system's send buffer small: what waits in it is shown late."""
    if request.transport is None:
        return
    connection = request.transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


async def _drained(request: web.Request) -> None:
    """Waits until the system has taken all that was written; ends a viewer who takes nothing."""
    waited, pause = 0.0, 0.005
    while (transport := request.transport) is not None and transport.get_write_buffer_size() > 0:
        if waited > _PICTURE_S:
            transport.abort()
            raise ConnectionResetError("the viewer takes nothing")
        await asyncio.sleep(pause)
        waited += pause
        pause = min(pause * 1.5, 0.05)
