"""The web page: who may ask, what is answered, and that nobody who looks slows anybody down."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.errors import RequestError, SinkError
from edgeseg.frame import Frame
from edgeseg.result import Result
from edgeseg.serve import WebPage
from edgeseg.serve.access import Access, new_token
from edgeseg.serve.address import WebAddress, is_loopback
from edgeseg.serve.broadcast import Broadcast
from edgeseg.serve.feed import Feed
from edgeseg.serve.recordings import Recording, Recordings
from edgeseg.serve.views import VIEWS, encoded_jpeg, rendered
from edgeseg.sink import Sink
from edgeseg.source import open_source
from tests.edgeseg.serving import (
    camera,
    result,
    source_stats,
    stats,
    web_page,
)

aiohttp = pytest.importorskip("aiohttp", reason="the web page needs aiohttp")

Client = Any


def run(work: Callable[[Client, str], Awaitable[None]], page: WebPage, **options: Any) -> None:
    """Runs an asynchronous test with a client of the page."""

    async def all_of_it() -> None:
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout, **options) as client:
            await work(client, f"http://127.0.0.1:{page.port}")

    asyncio.run(all_of_it())


def pixels(data: bytes) -> NDArray[np.uint8]:
    """The picture in a JPEG or PNG."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return picture  # type: ignore[return-value]


async def parts(response: Any) -> AsyncIterator[NDArray[np.uint8]]:
    """The pictures of a multipart answer, read as its Content-Type says."""
    reader = aiohttp.MultipartReader.from_response(response)
    while (part := await reader.next()) is not None:
        assert part.headers["Content-Type"] == "image/jpeg"
        yield pixels(bytes(await part.read()))


def grey_level(picture: NDArray[np.uint8]) -> float:
    """The mean of a picture of the original view: every pixel of `result` has one level."""
    return float(picture.mean())


# --- where it listens


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("", "127.0.0.1", 8080),
        ("8081", "127.0.0.1", 8081),
        ("0", "127.0.0.1", 0),
        (" 127.0.0.1:8080 ", "127.0.0.1", 8080),
        ("localhost:9", "localhost", 9),
        ("jetson.local", "jetson.local", 8080),
        (":8080", "", 8080),
        ("0.0.0.0:80", "0.0.0.0", 80),
        ("[::1]:8080", "::1", 8080),
        ("[::]:65535", "::", 65535),
        ("[fe80::1]", "fe80::1", 8080),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert WebAddress.parse(text) == WebAddress(host, port)


@pytest.mark.parametrize(
    "text",
    ["65536", "host:", "host:99999", "host:8080:1", "::1", "[::1]8080", "[::1]:", "[host]:80",
     "http://host:80", "a b:80", "host:8o", "host/path:80", "user@host:80", "-1", "host:-1", ":"],
)  # fmt: skip
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="HOST:PORT"):
        WebAddress.parse(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False),
     ("192.168.1.4", False), ("::", False), ("localhost", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_port_that_is_taken_is_told_in_one_sentence() -> None:
    with web_page() as page, pytest.raises(SinkError, match=r"in use.*choose another port, or 0"):
        web_page(f"127.0.0.1:{page.port}")


def test_a_host_that_is_not_here() -> None:
    # RFC 5737: an address that nobody has.
    with pytest.raises(SinkError, match=r"cannot listen at 192\.0\.2\.1, port 8080"):
        web_page("192.0.2.1:8080")
    with pytest.raises(SinkError, match="not known"):
        web_page("no-such-host.invalid:8080")


def test_ipv6() -> None:
    try:
        with closing(socket.socket(socket.AF_INET6)) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with web_page("[::1]:0") as page:
        assert page.url == f"http://[::1]:{page.port}/"
        assert page.warning is None

        async def ask() -> None:
            async with aiohttp.ClientSession() as client, client.get(page.url) as answer:
                assert answer.status == 200

        asyncio.run(ask())


def test_without_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "edgeseg.serve.site", raising=False)
    with pytest.raises(RequestError, match=r'pip install "edgeseg\[serve\]"'):
        web_page()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"names": ()}, "one source or more"),
        ({"names": ("a", "a")}, "different names"),
        ({"fps": 0}, "more than 0"),
        ({"opacity": 1.5}, "opacity"),
        ({"max_clients": 0}, "one viewer"),
        ({"token": "short"}, "8 to 200"),
        ({"token": "with a blank in it"}, "letters, digits"),
    ],
)
def test_wrong_requests(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        web_page(**options)


# --- who may ask


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"Host": "localhost:8080"}, True),
        ({"Host": "127.0.0.1"}, True),
        ({"Host": "[::1]:8080"}, True),
        ({"Host": "LOCALHOST."}, True),
        ({"Host": "board.lan:8080"}, True),
        ({"Host": "evil.example:8080"}, False),
        ({"Host": "localhost.evil.example"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Host": "10.0.0.5"}, False),
        ({"Host": "localhost:8080@evil.example"}, False),
        ({}, False),
    ],
)
def test_a_page_of_this_machine_answers_to_its_names(
    headers: dict[str, str], allowed: bool
) -> None:
    access = Access(None, "edgeseg", frozenset({"board.lan"}))
    refusal = access.refusal("GET", headers, given=None, changing=False)
    assert (refusal is None) is allowed
    assert refusal is None or refusal.status == 403


HERE = {"Host": "localhost:8080"}


@pytest.mark.parametrize(
    ("method", "headers", "changing", "allowed"),
    [
        ("POST", {"Origin": "http://localhost:8080"}, True, True),
        ("POST", {"Origin": "https://LOCALHOST:8080"}, True, True),
        ("POST", {}, True, True),
        ("POST", {"Origin": "http://localhost:3000"}, True, False),
        ("POST", {"Origin": "http://evil.example"}, True, False),
        ("POST", {"Origin": "null"}, True, False),
        ("POST", {"Origin": "http://["}, True, False),
        ("DELETE", {"Sec-Fetch-Site": "cross-site"}, True, False),
        ("DELETE", {"Sec-Fetch-Site": "same-origin"}, True, True),
        # A WebSocket is a GET, which browsers let other sites open.
        ("GET", {"Origin": "http://evil.example"}, True, False),
        ("GET", {"Origin": "http://evil.example"}, False, True),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, False, False),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False, True),
        ("GET", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, False, True),
    ],
)
def test_other_sites_ask_for_nothing(
    method: str, headers: dict[str, str], changing: bool, allowed: bool
) -> None:
    access = Access(None, "edgeseg")
    refusal = access.refusal(method, HERE | headers, given=None, changing=changing)
    assert (refusal is None) is allowed


def test_tokens() -> None:
    token = new_token()
    assert len({new_token() for _ in range(100)}) == 100
    assert len(token) == 24
    access = Access(token, "edgeseg")
    assert access.refusal("GET", {"Host": "any"}, given=token, changing=False) is None
    for wrong in (None, "", token[:-1], token + "x", "ä" * 24):
        refusal = access.refusal("GET", {"Host": "any"}, given=wrong, changing=False)
        assert refusal is not None
        assert refusal.status == 401
    bearer = {"Authorization": f"bearer {token}"}
    assert access.token_in(bearer, {"token": "other"}, {}) == token
    assert access.token_in({}, {"token": "a"}, {"edgeseg": "b"}) == "a"
    assert access.token_in({}, {}, {"edgeseg": "b"}) == "b"


PATHS = (
    "/", "/style.css", "/app.js", "/icon.svg", "/page.json", "/stats.json", "/events", "/live",
    "/stream/door/overlay.mjpg", "/snapshot/door/mask.png", "/metrics", "/healthz", "/recordings",
    "/recordings/a.mp4", "/no-such-thing",
)  # fmt: skip


def test_every_address_wants_the_token() -> None:
    async def ask(client: Client, url: str) -> None:
        for path in PATHS:
            async with client.get(url + path) as answer:
                assert answer.status == 401, path
                assert "needs its token" in await answer.text()
        async with client.post(url + "/recordings", json={"source": "door"}) as answer:
            assert answer.status == 401
        async with client.delete(url + "/recordings/door") as answer:
            assert answer.status == 401
        async with client.get(url + "/", headers={"Accept": "text/html"}) as answer:
            assert answer.status == 401
            assert '<input name="token"' in await answer.text()
        async with client.get(url + "/page.json?token=wrong-token") as answer:
            assert answer.status == 401
            assert "Set-Cookie" not in answer.headers
        bearer = {"Authorization": "Bearer right-token"}
        async with client.get(url + "/page.json", headers=bearer) as answer:
            assert answer.status == 200
        async with client.get(url + "/?token=right-token") as answer:
            assert answer.status == 200
            cookie = answer.headers["Set-Cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=Strict" in cookie
            name, _, value = cookie.partition(";")[0].partition("=")
            assert value == "right-token"
        cookies = {"Cookie": f"{name}={value}"}
        async with client.get(url + "/page.json", headers=cookies) as answer:
            assert answer.status == 200

    with web_page(token="right-token") as page:
        assert page.url == f"http://127.0.0.1:{page.port}/?token=right-token"
        assert page.warning is None

        async def all_of_it() -> None:
            async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as client:
                await ask(client, f"http://127.0.0.1:{page.port}")

        asyncio.run(all_of_it())


def test_beyond_this_machine_there_is_a_token_and_a_warning() -> None:
    async def ask(client: Client, url: str) -> None:
        async with client.get(url + "/stats.json") as answer:
            assert answer.status == 401
        async with client.get(f"{url}/stats.json?token={page.token}") as answer:
            assert answer.status == 200

    with web_page("0.0.0.0:0") as page:
        assert page.token is not None
        assert len(page.token) == 24
        assert page.url.endswith(f"/?token={page.token}")
        assert "0.0.0.0" not in page.url
        assert page.warning is not None
        assert "not encrypted" in page.warning
        run(ask, page)


def test_rebinding_and_foreign_pages_are_refused() -> None:
    async def ask(client: Client, url: str) -> None:
        async with client.get(url + "/", headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403
        foreign = {"Origin": "http://evil.example"}
        async with client.post(
            url + "/recordings", json={"source": "door"}, headers=foreign
        ) as answer:
            assert answer.status == 403
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await client.ws_connect(url + "/live", headers=foreign)

    with web_page() as page:
        run(ask, page)


def test_requests_are_bounded() -> None:
    async def ask(client: Client, url: str) -> None:
        async with client.get(url + "/?" + "a" * 10_000) as answer:
            assert answer.status == 400
        async with client.get(url + "/", headers={"X-Long": "a" * 10_000}) as answer:
            assert answer.status == 400
        async with client.post(url + "/recordings", data=b"a" * 100_000) as answer:
            assert answer.status == 400
        async with client.put(url + "/recordings") as answer:
            assert answer.status == 405
            assert "POST" in answer.headers["Allow"]

    with web_page() as page:
        run(ask, page)


# --- what it says


def test_the_page_is_whole_and_loads_nothing_from_elsewhere() -> None:
    async def ask(client: Client, url: str) -> None:
        for path, kind in [
            ("/", "text/html"),
            ("/style.css", "text/css"),
            ("/app.js", "text/javascript"),
            ("/icon.svg", "image/svg+xml"),
        ]:
            async with client.get(url + path) as answer:
                assert answer.status == 200
                assert answer.content_type == kind
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert "aiohttp" not in answer.headers["Server"]
                text = (await answer.text()).replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|url\(|@import|[\"']//", text)
            assert "<style" not in text
            assert " style=" not in text
            assert "onclick=" not in text

    with web_page() as page:
        run(ask, page)


def test_what_does_not_change() -> None:
    async def ask(client: Client, url: str) -> None:
        async with client.get(url + "/page.json") as answer:
            told = await answer.json()
        assert told["names"] == ["door", "yard"]
        assert told["legend"] == [["left", "#fa1414"], ["right_side", "#1414fa"]]
        assert told["views"] == list(VIEWS)
        assert told["recordings"] is False

    with web_page(names=("door", "yard")) as page:
        run(ask, page)


def test_figures_are_those_of_the_run() -> None:
    there = stats(source_stats("door", fps=12.5))
    calls = []

    def figures() -> Any:
        calls.append(threading.current_thread().name)
        return there

    async def ask(client: Client, url: str) -> None:
        answers = await asyncio.gather(*(client.get(url + "/stats.json") for _ in range(5)))
        for answer in answers:
            told = await answer.json()
            # Time goes on between two readings.
            told["sources"][0]["status"].pop("for_s")
            expected = json.loads(json.dumps(there.to_dict()))
            expected["sources"][0]["status"].pop("for_s")
            assert told == expected
        async with client.get(url + "/metrics") as answer:
            assert answer.content_type == "text/plain"
            text = await answer.text()
        assert "12.5" in text
        assert 'source="door"' in text

    with web_page(figures=figures) as page:
        run(ask, page)
    # Several who ask at once cost as much as one.
    assert len(calls) <= 2
    assert calls[0].startswith("edgeseg-serve")


@pytest.mark.parametrize(
    ("states", "hanging_s", "status"),
    [
        (("live",), 0.0, 200),
        (("reconnecting",), 0.0, 200),
        (("ended", "live"), 0.0, 200),
        (("ended", "ended"), 0.0, 503),
        (("live",), 60.0, 503),
    ],
)
def test_health(states: tuple[Any, ...], hanging_s: float, status: int) -> None:
    names = [f"s{place}" for place in range(len(states))]

    def figures() -> Any:
        sources = [
            source_stats(name, state=state) for name, state in zip(names, states, strict=True)
        ]
        return replace(stats(*sources), in_engine_s=hanging_s)

    async def ask(client: Client, url: str) -> None:
        async with client.get(url + "/healthz") as answer:
            assert answer.status == status
            told = await answer.json()
        assert (told["status"] == "ok") is (status == 200)
        assert list(told["sources"].values()) == list(states)

    with web_page(names=names, figures=figures) as page:
        run(ask, page)


async def events(client: Client, url: str, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with client.get(url + "/events") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        while len(found) < count:
            line = (await answer.content.readline()).decode()
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
    return found


def test_events_tell_everything_and_the_past_once() -> None:
    async def ask(client: Client, url: str) -> None:
        first, second, third = await events(client, url, 3)
        assert first["stats"]["sources"][0]["fps"] == 24.5
        assert first["shares"] == {"door": {"left": 0.5, "right_side": 0.5}}
        assert first["recordings"] == {"running": [], "finished": [], "notes": {}}
        told = [entry for event in (first, second, third) for entry in event["past"]["door"]]
        seconds = [at for at, _, _ in told]
        assert len(seconds) >= 2
        assert seconds == sorted(set(seconds))
        assert all(at < third["now"] for at in seconds)
        assert any(masks > 0 and age == pytest.approx(12, abs=8) for _, masks, age in told)

    with web_page() as page:
        page.sink("door").write(result(0))
        with camera(page):
            run(ask, page)


def test_the_past_has_its_quiet_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("edgeseg.serve.feed.time.monotonic", lambda: now[0])
    feed = Feed("door")
    for age_ms in (10.0, 30.0, 20.0):
        feed.write(aged(age_ms))
    now[0] = 1003.5
    feed.write(aged(5.0))
    assert feed.past(0)[0].age_ms == pytest.approx(20, abs=2)
    assert [(second.at, second.masks) for second in feed.past(0)] == [
        (1000, 3),
        (1001, 0),
        (1002, 0),
    ]
    now[0] = 1004.0
    assert [(second.at, second.masks) for second in feed.past(1001)] == [(1002, 0), (1003, 1)]
    # A clock that stood for a day makes no list of a day.
    now[0] = 90_000.0
    assert len(feed.past(0)) == 300


def aged(age_ms: float) -> Result:
    made = result(0)
    captured_ns = made.finished_ns - int(age_ms * 1e6)
    return replace(made, frame=replace(made.frame, captured_ns=captured_ns))


# --- pictures


def test_views() -> None:
    made = result(0, level=100)
    assert (rendered(made, "original") == 100).all()
    mask = rendered(made, "mask")
    # Blue, green, red.
    assert (mask[:, :32] == (20, 20, 250)).all()
    assert (mask[:, 32:] == (250, 20, 20)).all()
    overlay = rendered(made, "overlay", opacity=0.5)
    assert np.abs(overlay[:, :32].astype(int) - (60, 60, 175)).max() <= 1
    for view in VIEWS:
        assert rendered(result(0, size=(100, 300)), view, longest=150).shape == (50, 150, 3)
        assert rendered(result(0, size=(100, 300)), view, longest=1000).shape == (100, 300, 3)


def test_the_mask_keeps_its_colours_in_a_jpeg() -> None:
    mask = rendered(result(0, level=100), "mask")
    back = pixels(encoded_jpeg(mask, 80, sharp=True))
    assert np.abs(back.astype(int) - mask).max() < 12


def test_streams_show_what_was_taken() -> None:
    async def ask(client: Client, url: str) -> None:
        for view in VIEWS:
            seen: list[float] = []
            async with client.get(f"{url}/stream/door/{view}.mjpg?fps=1000") as answer:
                assert answer.status == 200
                assert answer.content_type == "multipart/x-mixed-replace"
                async for picture in parts(answer):
                    assert picture.shape == (48, 64, 3)
                    seen.append(grey_level(picture))
                    if len(seen) == 5:
                        break
            if view == "mask":
                assert len(set(seen)) == 1
            else:
                assert len(set(seen)) == 5

    with web_page(fps=100) as page, camera(page):
        run(ask, page)


def test_streams_are_read_by_our_own_source() -> None:
    with (
        web_page() as page,
        camera(page),
        open_source(f"{page.url}stream/door/original.mjpg") as source,
    ):
        taken = iter(source)
        frames = [next(taken) for _ in range(3)]
    assert [frame.pixels.shape for frame in frames] == [(48, 64, 3)] * 3


def test_two_sources_are_kept_apart() -> None:
    async def ask(client: Client, url: str) -> None:
        for name, level in [("door", 60), ("yard", 180)]:
            async with client.get(f"{url}/snapshot/{name}/original.png") as answer:
                assert answer.status == 200
                assert (pixels(await answer.read()) == level).all()

    with web_page(names=("door", "yard")) as page:
        page.sink("door").write(result(0, level=60))
        page.sink("yard").write(result(0, level=180))
        with pytest.raises(RequestError, match="door, yard"):
            page.sink("roof")
        run(ask, page)


def test_snapshots() -> None:
    async def ask(client: Client, url: str) -> None:
        async with client.get(url + "/snapshot/yard/overlay.png") as answer:
            assert answer.status == 503
            assert "No mask of yard" in await answer.text()
        for kind in ("png", "jpg"):
            async with client.get(f"{url}/snapshot/door/mask.{kind}") as answer:
                assert answer.status == 200
                assert answer.headers["X-Frame-Index"] == "41"
                picture = pixels(await answer.read())
            # At the size of the frame, whatever the live pictures have.
            assert picture.shape == (1500, 2000, 3)
            assert np.abs(picture[:, :900].astype(int) - (20, 20, 250)).max() < 12
        for path, says in [
            ("/snapshot/roof/mask.png", "door, yard"),
            ("/snapshot/door/depth.png", "overlay, original, mask"),
            ("/snapshot/door/mask.gif", ".jpg or .png"),
            ("/stream/roof/mask.mjpg", "door, yard"),
        ]:
            async with client.get(url + path) as answer:
                assert answer.status == 404
                assert says in await answer.text()
        async with client.get(url + "/stream/door/mask.mjpg?fps=nan") as answer:
            assert answer.status == 400

    with web_page(names=("door", "yard")) as page:
        page.sink("door").write(result(41, size=(1500, 2000)))
        run(ask, page)


def test_a_picture_is_encoded_once_for_all() -> None:
    async def work() -> None:
        feed = Feed("door")
        feed.attach()
        calls: list[int] = []

        async def encode(made: Result) -> bytes:
            calls.append(made.index)
            await asyncio.sleep(0.002)
            return b"%d" % made.index

        broadcast = Broadcast(feed, encode)
        seen: list[list[int]] = [[] for _ in range(4)]

        async def look(into: list[int], fps: float) -> None:
            pictures = broadcast.pictures(fps)
            async for picture in pictures:
                assert picture.data == b"%d" % picture.index
                into.append(picture.index)
                if len(into) == 10:
                    break
            await pictures.aclose()

        async def feeding() -> None:
            for index in range(10_000):
                feed.write(result(index))
                await asyncio.sleep(0.003)

        source = asyncio.create_task(feeding())
        await asyncio.gather(*(look(into, 200) for into in seen))
        source.cancel()
        assert len(calls) == len(set(calls)) == broadcast.encoded
        assert broadcast.viewers == 0
        for into in seen:
            # Newest first: numbers only grow, and none comes twice.
            assert into == sorted(set(into))
            assert set(into) <= set(calls)
        # Four who watch ten pictures each cost about as much as one who does.
        assert len(calls) < 30
        # Nobody watches, nothing is encoded.
        before = len(calls)
        feed.write(result(20_000))
        await asyncio.sleep(0.03)
        assert len(calls) == before

    asyncio.run(work())


def test_a_viewer_is_shown_at_most_what_it_asked_for() -> None:
    async def work() -> None:
        feed = Feed("door")
        feed.attach()

        async def encode(made: Result) -> bytes:
            return b"%d" % made.index

        broadcast = Broadcast(feed, encode)
        feed.write(result(0))
        pictures = broadcast.pictures(2.0)
        assert (await pictures.__anext__()).index == 0
        for index in range(1, 6):
            feed.write(result(index))
        # The next one is due in half a second; nothing is encoded for nobody before.
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(
                asyncio.shield(again := asyncio.ensure_future(pictures.__anext__())), 0.1
            )
        assert broadcast.encoded == 1
        feed.write(result(6))
        assert (await again).index == 6
        await pictures.aclose()

    asyncio.run(work())


def test_an_encoder_that_fails_ends_its_viewers_and_nothing_else() -> None:
    async def work() -> None:
        feed = Feed("door")
        feed.attach()
        fails = [True]

        async def encode(made: Result) -> bytes:
            if fails[0]:
                raise SinkError("no JPEG today")
            return b"fine"

        broadcast = Broadcast(feed, encode)
        feed.write(result(0))
        with pytest.raises(SinkError, match="no JPEG"):
            await broadcast.pictures(10).__anext__()
        await asyncio.sleep(0)
        fails[0] = False
        pictures = broadcast.pictures(10)
        assert (await pictures.__anext__()).data == b"fine"
        await pictures.aclose()

    asyncio.run(work())


def test_a_viewer_that_never_reads_slows_nobody() -> None:
    """Its connection stays open and full; writes go on, and so does everybody else's picture."""

    async def ask(client: Client, url: str) -> None:
        seen = []
        async with client.get(url + "/stream/door/original.mjpg") as answer:
            async for picture in parts(answer):
                seen.append(grey_level(picture))
                if len(seen) == 8:
                    break
        assert len(set(seen)) >= 6

    # Noise does not compress: a few pictures fill every buffer.
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)

    with ExitStack() as stack:
        page = stack.enter_context(web_page(fps=100))
        for view in ("overlay", "original"):
            deaf = stack.enter_context(closing(socket.create_connection(("127.0.0.1", page.port))))
            deaf.sendall(
                f"GET /stream/door/{view}.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            )
        sink = page.sink("door")
        slowest = 0.0
        for index in range(200):
            made = result(index, size=(480, 640))
            made = replace(made, frame=replace(made.frame, pixels=noise))
            started = time.thread_time()
            sink.write(made)
            slowest = max(slowest, time.thread_time() - started)
            time.sleep(0.002)
        with camera(page):
            run(ask, page)
    # Processor time of this thread, which a busy machine does not stretch.
    assert slowest < 0.05


def test_the_channel_of_the_page() -> None:
    async def picture(channel: Any) -> tuple[int, int, int, NDArray[np.uint8]]:
        message = await channel.receive(timeout=10)
        assert message.type is aiohttp.WSMsgType.BINARY, message
        number, place, index = struct.unpack("<HHI", message.data[:8])
        return number, place, index, pixels(message.data[8:])

    async def ask(client: Client, url: str) -> None:
        async with client.ws_connect(url + "/live") as channel:
            watched = [["door", "original"], ["yard", "mask"]]
            await channel.send_json({"watch": watched, "round": 7})
            found = [await picture(channel) for _ in range(4)]
            assert {number for number, *_ in found} == {7}
            # Two of each are on their way, and no more before they were shown.
            assert sorted(place for _, place, *_ in found) == [0, 0, 1, 1]
            for _, place, index, _ in found:
                assert (index >= 1000) is (place == 1)
            with pytest.raises(asyncio.TimeoutError):
                await channel.receive(timeout=0.3)
            await channel.send_json({"shown": [7, 1]})
            assert (await picture(channel))[:2] == (7, 1)
            # What was asked for before, or is no number of this list, is nobody's.
            for stale in ([6, 0], [7, 2], [7, -1]):
                await channel.send_json({"shown": stale})
            with pytest.raises(asyncio.TimeoutError):
                await channel.receive(timeout=0.3)
            await channel.send_json({"watch": [["yard", "overlay"]], "round": 8})
            assert (await picture(channel))[:2] == (8, 0)
            await channel.send_json({"watch": [], "round": 9})
        for wrong in (
            "no JSON", "[]", '{"watch": [["roof", "mask"]], "round": 1}',
            '{"watch": [["door"]], "round": 1}', '{"watch": [["door", "mask"]]}',
            '{"watch": [["door", "mask"]], "round": 99999}', '{"watch": 3, "round": 1}',
            '{"watch": [["door", "mask"], ["door", "mask"], ["door", "mask"]], "round": 1}',
        ):  # fmt: skip
            async with client.ws_connect(url + "/live") as channel:
                await channel.send_str(wrong)
                message = await channel.receive(timeout=10)
                assert message.type is aiohttp.WSMsgType.CLOSE, wrong
                assert message.data == 1008

    with web_page(names=("door", "yard")) as page, camera(page, "door", "yard"):
        run(ask, page)


def test_viewers_are_counted() -> None:
    async def ask(client: Client, url: str) -> None:
        stream = url + "/stream/door/overlay.mjpg"
        async with client.get(stream) as first:
            assert first.status == 200
            async with client.ws_connect(url + "/live"):
                async with client.get(stream) as third:
                    assert third.status == 503
                    assert "2 viewers watch already" in await third.text()
                with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                    await client.ws_connect(url + "/live")
                # Figures have a count of their own.
                assert await events(client, url, 1)
        for _ in range(100):
            async with client.get(stream) as again:
                if again.status == 200:
                    return
            await asyncio.sleep(0.05)
        raise AssertionError("the place of a viewer who left is not given back")

    with web_page(max_clients=2) as page, camera(page):
        run(ask, page)


def test_connections_are_counted() -> None:
    with ExitStack() as stack:
        page = stack.enter_context(web_page(max_clients=1))
        for _ in range(20):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", page.port))))
            # One after the other, so that each is seen before the next.
            time.sleep(0.005)
        late = stack.enter_context(closing(socket.create_connection(("127.0.0.1", page.port))))
        late.settimeout(10)
        told = b""
        while piece := late.recv(4096):
            told += piece
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"Too many connections" in told


def test_connections_that_say_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeseg.serve.site._REQUEST_S", 0.2)
    monkeypatch.setattr("edgeseg.serve.site._WATCH_S", 0.05)
    with (
        web_page() as page,
        closing(socket.create_connection(("127.0.0.1", page.port))) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        connection.settimeout(10)
        assert connection.recv(100) == b""


# --- recordings


def test_a_recording_is_started_stopped_and_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "recordings"

    async def ask(client: Client, url: str) -> None:
        async with client.post(url + "/recordings", json={"source": "door 1"}) as answer:
            assert answer.status == 201, await answer.text()
            started = await answer.json()
        assert started["source"] == "door 1"
        assert started["file"].startswith("door-1-")
        async with client.post(url + "/recordings", json={"source": "door 1"}) as answer:
            assert answer.status == 409
            assert "being recorded already" in await answer.text()
        running = started
        while running["written"] < 10:
            (event,) = await events(client, url, 1)
            (running,) = event["recordings"]["running"]
            await asyncio.sleep(0.05)
        assert running["error"] is None
        async with client.delete(f"{url}/recordings/{started['id']}") as answer:
            assert answer.status == 200, await answer.text()
            video = await answer.json()
        async with client.delete(f"{url}/recordings/{started['id']}") as answer:
            assert answer.status == 404
        async with client.get(url + "/recordings") as answer:
            told = await answer.json()
        assert told["running"] == []
        assert [entry["file"] for entry in told["finished"]] == [video["file"]]
        async with client.get(url + video["url"]) as answer:
            assert answer.status == 200
            assert answer.content_type == "video/mp4"
            assert "attachment" in answer.headers["Content-Disposition"]
            data = await answer.read()
        assert data == (folder / video["file"]).read_bytes()
        assert len(data) == video["size"]

    with web_page(names=("door 1",), recordings=folder) as page, camera(page, "door 1"):
        run(ask, page)
    (path,) = folder.iterdir()
    with open_source(str(path)) as source:
        frames = list(source)
        assert source.fps == pytest.approx(25)
    assert len(frames) >= 10
    # The two halves have their colours, the left one red and the right one blue.
    last = frames[-1].pixels
    assert last[40:, :28, 2].mean() > last[40:, :28, 0].mean() + 50
    assert last[40:, 36:, 0].mean() > last[40:, 36:, 2].mean() + 50


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"source": "roof"}', 404, "door"),
        (b'{"source": 3}', 400, "source"),
        (b"[]", 400, "source"),
        (b"\xff", 400, "source"),
        (b"", 400, "source"),
    ],
)
def test_recordings_that_are_asked_for_wrongly(
    body: bytes, status: int, says: str, tmp_path: Path
) -> None:
    async def ask(client: Client, url: str) -> None:
        async with client.post(url + "/recordings", data=body) as answer:
            assert answer.status == status
            assert says in await answer.text()

    with web_page(recordings=tmp_path) as page:
        run(ask, page)


def test_without_a_folder_nothing_is_recorded() -> None:
    async def ask(client: Client, url: str) -> None:
        async with client.post(url + "/recordings", json={"source": "door"}) as answer:
            assert answer.status == 409
            assert "--recordings FOLDER" in await answer.text()

    with web_page() as page:
        run(ask, page)


def test_nothing_outside_of_the_folder_can_be_had(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    (folder / "notes.txt").write_bytes(b"secret")
    (folder / ".hidden.mp4").write_bytes(b"secret")
    (folder / "link.mp4").symlink_to(secret)
    (folder / "folder.mp4").mkdir()
    (folder / "good.mp4").write_bytes(b"a film")

    async def ask(client: Client, url: str) -> None:
        from yarl import URL

        for path in (
            "../secret.mp4", "..%2fsecret.mp4", "%2e%2e/secret.mp4", "..%5csecret.mp4",
            "....//secret.mp4", "notes.txt", ".hidden.mp4", "link.mp4", "folder.mp4", "",
            "good.mp4%00.txt", "good.mp4/", "%2fetc%2fpasswd", "good.mp4%0a",
        ):  # fmt: skip
            async with client.get(URL(f"{url}/recordings/{path}", encoded=True)) as answer:
                assert answer.status in (400, 404), path
                assert b"secret" not in await answer.read()
        async with client.get(url + "/recordings/good.mp4") as answer:
            assert await answer.read() == b"a film"
        async with client.get(url + "/recordings") as answer:
            told = await answer.json()
        assert [entry["file"] for entry in told["finished"]] == ["good.mp4"]

    with web_page(recordings=folder) as page:
        run(ask, page)


def test_a_full_disk_starts_nothing_and_ends_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = Recordings(tmp_path, reserve=1)
    running = recordings.start("door", 25.0)
    running.offer(result(0))
    assert recordings.failing() == []
    monkeypatch.setattr("edgeseg.serve.recordings.shutil.disk_usage", lambda _: Usage(free=0))
    with pytest.raises(SinkError, match=r"less than .* MB left"):
        recordings.start("yard", 25.0)
    ((found, reason),) = recordings.failing()
    assert found is running
    recordings.give_up(found, reason)
    assert "MB left" in recordings.notes()["door"]
    assert recordings.running() == []
    # What was written is kept.
    assert len(recordings.finished()) == 1


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SinkError, match="for recordings cannot be made"):
        web_page(recordings=tmp_path / "file" / "folder")


class Numbers(Sink):
    """Keeps the numbers of what it is given."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def write(self, result: Result) -> None:
        self.numbers.append(result.index)


@pytest.mark.parametrize(
    ("period_ms", "expected"),
    [
        # A fast file is thinned out, a camera of the same rate gives each of its frames, ...
        (10, list(range(21))),
        (40, list(range(26))),
        # ... and the numbers of a slow one have gaps, which a video fills.
        (100, [0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25]),
    ],
)
def test_a_recording_keeps_the_pace_of_the_clock(
    period_ms: int, expected: list[int], tmp_path: Path
) -> None:
    taken = Numbers()
    recording = Recording("door.mp4", "door", taken, tmp_path / "part", 25.0)
    made = result(0)
    count = 80 if period_ms == 10 else len(expected)
    for index in range(count):
        captured_ns = 10**12 + index * period_ms * 1_000_000
        frame = Frame(made.frame.pixels, captured_ns, index * 7)
        recording.offer(replace(made, frame=frame))
        while recording.state.written + recording.state.dropped < len(taken.numbers):
            time.sleep(0.001)
        time.sleep(0.002)
    recording.finish()
    assert taken.numbers == expected
    with pytest.raises(SinkError):
        recording.offer(replace(made, frame=Frame(made.frame.pixels, 2 * 10**12, 0)))


# --- the end


def serving_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("edgeseg-")]


def test_closing_ends_viewers_recordings_and_threads(tmp_path: Path) -> None:
    page = web_page(recordings=tmp_path)

    async def ask(client: Client, url: str) -> None:
        async with client.post(url + "/recordings", json={"source": "door"}) as answer:
            assert answer.status == 201
        async with (
            client.get(url + "/stream/door/overlay.mjpg") as stream,
            client.get(url + "/events") as figures,
            client.ws_connect(url + "/live") as channel,
        ):
            await channel.send_json({"watch": [["door", "mask"]], "round": 1})
            await channel.receive(timeout=10)
            await figures.content.readline()
            await stream.content.readany()
            await asyncio.sleep(0.3)
            await asyncio.get_running_loop().run_in_executor(None, page.close)
            message = await channel.receive(timeout=10)
            while message.type is aiohttp.WSMsgType.BINARY:
                message = await channel.receive(timeout=10)
            assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)

    with camera(page):
        run(ask, page)
        # What feeds it need not know that it is gone.
        page.sink("door").write(result(0))
    page.close()
    assert serving_threads() == []
    (video,) = tmp_path.iterdir()
    with open_source(str(video)) as source:
        assert len(list(source)) > 0


def test_many_pages_leave_nothing_behind() -> None:
    for _ in range(10):
        with web_page() as page:
            page.sink("door").write(result(0))
    assert serving_threads() == []


def test_it_costs_nothing_before_it_is_used() -> None:
    """The device side starts fast: aiohttp is read when a page is opened."""
    code = "import sys, edgeseg.serve; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
