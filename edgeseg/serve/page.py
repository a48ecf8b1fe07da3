"""The web page of a run: what a program opens, feeds, and closes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgeseg.errors import RequestError
from edgeseg.serve.access import Access, new_token
from edgeseg.serve.address import WebAddress, is_loopback, reachable_host
from edgeseg.serve.feed import Feed
from edgeseg.serve.recordings import Recordings
from edgeseg.sink import Sink
from edgeseg.stats import Stats

if TYPE_CHECKING:
    from edgeseg.serve.site import Site

__all__ = ["WebPage"]

# Encoding, figures, and two for disks that hang. Of normal priority: a thread that is starved while
# it holds Python's lock would stop the pipeline's, which was measured to cost more than it gave.
_THREADS = 4
_START_S, _END_S = 10.0, 20.0


class WebPage:
    """A web page with the live pictures and figures of a run, in a thread of its own.

    ``address``: see `WebAddress.parse`. ``stats``: gives the figures, called from another thread,
    at most twice a second and only while somebody looks. ``names``: of the sources. ``legend``:
    class -> (red, green, blue), 0-255. ``fps``: pictures per second at most, per source and view.
    ``opacity`` of the overlay, also in recordings; with ``recording_legend`` these have a legend in
    the picture, which takes longer to draw than all the rest of it. ``recordings``: the folder for
    them, made if it is not there; None: there are none. ``max_clients``: viewers at most.

    On a loopback address the page is open to every program of this machine. At any other one each
    request has to bring ``token``, which is made where None came, and `warning` says what that
    means. Traffic is not encrypted.

    Feed it with `sink`, one per source, and close it, or use ``with``. RequestError when aiohttp
    is not installed, or for an address or token that cannot be; SinkError when it cannot listen
    there::

        with WebPage("8080", stats=streams.stats, names=list(sources), legend=colours) as page:
            print(page.url)
            for stream in streams:
                page.sink(stream.name).write(stream.result)
    """

    def __init__(
        self,
        address: str,
        *,
        stats: Callable[[], Stats],
        names: Sequence[str],
        legend: Mapping[str, tuple[int, int, int]],
        token: str | None = None,
        recordings: Path | None = None,
        fps: float = 15.0,
        opacity: float = 0.5,
        recording_legend: bool = False,
        max_clients: int = 16,
    ) -> None:
        _check(names, fps, opacity, max_clients)
        asked = WebAddress.parse(address)
        # An address that is open to others is found out before a socket is.
        site_type, look_type = _site_types()
        if token is not None:
            Access(token, "edgeseg")
        self._feeds = {name: Feed(name) for name in names}
        files = Recordings(recordings, opacity=opacity, legend=recording_legend)
        self._closing = threading.Lock()
        self._closed = False
        sockets = asked.listen()
        try:
            where = [str(listening.getsockname()[0]) for listening in sockets]
            self._port = int(sockets[0].getsockname()[1])
            self._open = not all(is_loopback(host) for host in where)
            if token is None and self._open:
                token = new_token()
            self._token = token
            self._host = _shown_host(asked.host, where, self._open)
            access = Access(token, f"edgeseg_{self._port}", frozenset({asked.host.lower()} - {""}))
            self._pool = ThreadPoolExecutor(_THREADS, "edgeseg-serve")
            site = site_type(
                stats=stats,
                feeds=self._feeds,
                recordings=files,
                access=access,
                look=look_type(legend=dict(legend), fps=fps, opacity=opacity),
                pool=self._pool,
                max_clients=max_clients,
            )
            self._loop: asyncio.AbstractEventLoop | None = None
            self._stop: asyncio.Event | None = None
            started: Future[None] = Future()
            self._thread = threading.Thread(
                target=self._run, args=(site, sockets, started), name="edgeseg-serve", daemon=True
            )
            self._thread.start()
            started.result(_START_S)
        except BaseException:
            for listening in sockets:
                listening.close()
            raise

    @property
    def url(self) -> str:
        """What to open in a browser, with the token where there is one."""
        query = "" if self._token is None else f"?token={self._token}"
        return f"http://{self._host}:{self._port}/{query}"

    @property
    def port(self) -> int:
        """The port it listens at."""
        return self._port

    @property
    def token(self) -> str | None:
        """What every request must bring; None on a loopback address without one."""
        return self._token

    @property
    def warning(self) -> str | None:
        """A sentence to print when others can reach the page; None when only this machine can."""
        if not self._open:
            return None
        return (
            "the web page can be reached from the network: whoever has the address with its token "
            "sees the pictures, and the connection is not encrypted; leave the host out of the "
            "address to keep it to this machine"
        )

    def sink(self, name: str, *, fps: float | None = None) -> Sink:
        """Where the results of a source go; it never waits, and shows the newest.

        ``fps``: frames per second that the source states, for recordings. RequestError for a name
        that the page was not made with.
        """
        feed = self._feeds.get(name)
        if feed is None:
            raise RequestError(
                f"the sources of the page are {', '.join(self._feeds)}, and {name!r} came"
            )
        if fps is not None:
            feed.fps = fps
        return feed

    def close(self) -> None:
        """Finishes the recordings, sends the viewers away, and ends its threads.

        A second call does nothing. Waits ten seconds at most for a disk that hangs.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
            loop, stop = self._loop, self._stop
            if loop is not None and stop is not None:
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(stop.set)
            self._thread.join(_END_S)
            self._pool.shutdown(wait=not self._thread.is_alive(), cancel_futures=True)

    def __enter__(self) -> WebPage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, site: Site, sockets: list[socket.socket], started: Future[None]) -> None:
        """Body of the page's thread."""
        try:
            asyncio.run(self._serve(site, sockets, started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, site: Site, sockets: list[socket.socket], started: Future[None]) -> None:
        from aiohttp import web

        loop = asyncio.get_running_loop()
        self._loop, self._stop = loop, asyncio.Event()
        for feed in self._feeds.values():
            feed.attach()
        runner = web.AppRunner(site.application(), **site.server_options)
        servers: list[asyncio.Server] = []
        watch: asyncio.Task[None] | None = None
        try:
            await runner.setup()
            server = runner.server
            assert server is not None

            def connection() -> asyncio.Protocol:
                if len(server.connections) >= site.max_connections:
                    return _Full(site.full())
                return server()

            for listening in sockets:
                servers.append(await loop.create_server(connection, sock=listening))
            watch = loop.create_task(site.watch(server))
            started.set_result(None)
            await self._stop.wait()
        finally:
            for opened in servers:
                opened.close()
            if watch is not None:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
            await site.end()
            await runner.cleanup()


class _Full(asyncio.Protocol):
    """A connection too many: it is told so, and closed."""

    def __init__(self, message: bytes) -> None:
        self._message = message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._message)
        transport.close()


def _check(names: Sequence[str], fps: float, opacity: float, max_clients: int) -> None:
    if not names or len(set(names)) != len(names):
        raise RequestError(
            f"a web page shows one source or more, of different names, and {list(names)} came"
        )
    if not 0 < fps <= 1000:
        raise RequestError(f"a page shows more than 0 pictures per second, and {fps} came")
    if not 0.0 <= opacity <= 1.0:
        raise RequestError(f"an opacity is between 0 and 1, and {opacity} came")
    if max_clients < 1:
        raise RequestError(f"a page has one viewer or more, and {max_clients} came")


def _site_types() -> tuple[Any, Any]:
    try:
        from edgeseg.serve.site import Look, Site
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "edgeseg":
            raise
        raise RequestError(
            f"the web page needs the package {error.name}, and it is not installed; "
            '`pip install "edgeseg[serve]"` adds it'
        ) from error
    return Site, Look


def _shown_host(asked: str, bound: Sequence[str], is_open: bool) -> str:
    """The host as it stands in an address: that which was asked for, if it means one machine."""
    host = asked
    if host in ("", "0.0.0.0", "::"):
        host = reachable_host() if is_open else bound[0]
    return f"[{host}]" if ":" in host else host
