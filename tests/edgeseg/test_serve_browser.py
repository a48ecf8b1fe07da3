"""The web page in a real browser: a headless Chromium shows it, and is asked what it shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgeseg.source import open_source
from edgeseg.stats import Stats
from tests.edgeseg.serving import camera, source_stats, stats, web_page

pytest.importorskip("aiohttp", reason="the web page needs aiohttp")

from tests.edgeseg.chromium import Chromium, Tab, chromium_path

PATH = chromium_path()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PATH is None, reason="there is no Chromium here"),
]

# The mean of the drawn pixels, and the number of the frame that they are of.
LEVEL = """(() => {
  const canvas = document.querySelector("canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return data.reduce((sum, value) => sum + value, 0) / data.length;
})()"""
FRAME = "Number(document.querySelector('canvas').dataset.frame || 0)"


def shown(work: Callable[[Chromium, Tab], Awaitable[None]]) -> None:
    """Runs an asynchronous test with a browser and an empty tab of it."""

    async def all_of_it() -> None:
        assert PATH is not None
        async with Chromium(PATH) as browser:
            await work(browser, await browser.tab())

    asyncio.run(all_of_it())


def text(selector: str) -> str:
    return f"document.querySelector('{selector}').textContent"


async def first_picture(tab: Tab) -> None:
    await tab.wait_for("document.querySelector('canvas') !== null")
    await tab.wait_for(f"{FRAME} > 0")
    await tab.wait_for(f"{text('#link')} === 'Live'")


def test_pictures_and_figures() -> None:
    async def look(_: Chromium, tab: Tab) -> None:
        await tab.show(page.url)
        await first_picture(tab)
        before = [await tab.evaluate(LEVEL), await tab.evaluate(FRAME)]
        await tab.wait_for(f"{FRAME} > {before[1]}")
        after = [await tab.evaluate(LEVEL), await tab.evaluate(FRAME)]
        assert before[0] != after[0]
        assert await tab.evaluate(
            "[document.querySelector('canvas').width, document.querySelector('canvas').height]"
        ) == [64, 48]
        for selector, expected in [
            ("#model", "halves"),
            ("#fps", "24.5"),
            ("#age50", "18.4"),
            ("#age99", "33.3"),
        ]:
            assert await tab.evaluate(text(selector)) == expected
        engine = await tab.evaluate(text("#engine"))
        assert "OpenVINO 2026.1" in engine
        assert "64×48" in engine
        assert "1 h 2 min" in engine
        stages = await tab.evaluate(text("#stages"))
        assert "network11.212.519.0" in stages
        # A stage that nobody recorded has no number.
        assert "output–––" in stages
        shares = await tab.evaluate(
            "[...document.querySelectorAll('#stack i')].map((part) => part.offsetWidth)"
        )
        assert shares[1] > 5 * sum(shares[2:])
        frames = await tab.evaluate(text("#frames"))
        for expected in ("finished1,178", "dropped56", "superseded3", "damaged7", "reconnected9×"):
            assert expected in frames
        machine = await tab.evaluate(text("#machine"))
        assert "CPU163 %" in machine
        assert "temperature61 °C" in machine
        assert "not available: GPU, GPU memory, power, throttled" in await tab.evaluate(
            text("#machine-note")
        )
        assert "street.mp4" in await tab.evaluate(text("#outlets"))
        legend = await tab.evaluate(
            "[...document.querySelectorAll('#legend li')].map((item) => [item.textContent, "
            "getComputedStyle(item.firstChild).backgroundColor])"
        )
        assert legend == [
            ["left50.0 %", "rgb(250, 20, 20)"],
            ["right side50.0 %", "rgb(20, 20, 250)"],
        ]
        # The charts have a line as soon as there is a second to show.
        await tab.wait_for("document.querySelectorAll('#fps-chart .line').length > 0")
        # The mask is as it is: a red half and a blue one.
        await tab.evaluate("document.querySelector('[data-value=mask]').click()")
        await tab.wait_for(
            "(() => { const pixel = document.querySelector('canvas').getContext('2d')"
            ".getImageData(5, 5, 1, 1).data; return pixel[0] > 235 && pixel[2] < 40; })()"
        )
        assert tab.errors == []

    with web_page() as page, camera(page):
        shown(look)


def test_every_width_and_both_schemes(tmp_path: Path) -> None:
    async def look(_: Chromium, tab: Tab) -> None:
        dark: dict[str, float] = {}
        for scheme in ("light", "dark"):
            await tab.scheme(scheme)
            for width, height, phone in [
                (360, 740, True),
                (390, 844, True),
                (768, 1024, True),
                (1024, 700, False),
                (1440, 900, False),
                (2560, 1300, False),
            ]:
                await tab.size(width, height, phone=phone)
                await tab.show(page.url)
                await first_picture(tab)
                wide = await tab.evaluate(
                    "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
                )
                assert wide[0] <= width, (scheme, width, wide)
                # Nothing stands out to the right of the window, cut off or not.
                beyond = await tab.evaluate(
                    "[...document.querySelectorAll('body *')].filter((node) => "
                    "node.getBoundingClientRect().right > innerWidth + 1 && "
                    "!node.closest('#tabs, svg')).map((node) => node.outerHTML.slice(0, 90))"
                )
                assert beyond == []
                hidden = await tab.evaluate(
                    "[...document.querySelectorAll('article')].filter((one) => "
                    "one.offsetParent === null).length"
                )
                # Tabs on a phone, all pictures elsewhere.
                assert hidden == (2 if width <= 640 else 0)
            picture = cv2.imdecode(
                np.frombuffer(await tab.screenshot(), np.uint8), cv2.IMREAD_COLOR
            )
            assert picture is not None
            dark[scheme] = float(np.median(picture))
        assert dark["dark"] < 60
        assert dark["light"] > 200
        assert tab.errors == []

    names = ("door", "a-camera-with-a-very-long-name-that-does-not-fit", "yard")
    with web_page(names=names, recordings=tmp_path) as page, camera(page, *names):
        shown(look)


def test_the_switches_work_with_the_keyboard() -> None:
    async def press(tab: Tab, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            await tab.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    async def look(_: Chromium, tab: Tab) -> None:
        await tab.size(390, 844, phone=True)
        await tab.show(page.url)
        await first_picture(tab)
        await tab.evaluate("document.querySelector('#views [aria-checked=true]').focus()")
        await press(tab, "ArrowRight", 39)
        assert await tab.evaluate("document.activeElement.textContent") == "Original"
        assert await tab.evaluate("document.activeElement.getAttribute('aria-checked')") == "true"
        # One of the group is reached with Tab, and not the others.
        assert await tab.evaluate(
            "[...document.querySelectorAll('#views button')].map((button) => button.tabIndex)"
        ) == [-1, 0, -1]
        await tab.evaluate("document.querySelector('#tabs [aria-selected=true]').focus()")
        await press(tab, "ArrowLeft", 37)
        assert await tab.evaluate(text("#of-name")) == "yard"
        await tab.wait_for("Number(document.querySelectorAll('canvas')[1].dataset.frame) > 1000")
        # The address keeps what was chosen.
        await tab.call("Page.reload")
        await tab.wait_for(f"document.querySelector('#of-name') && {text('#of-name')} === 'yard'")
        unnamed = await tab.evaluate(
            "[...document.querySelectorAll('button, a, canvas, svg, section, article')]"
            ".filter((node) => !(node.getAttribute('aria-label') || node.textContent.trim() || "
            "node.getAttribute('aria-labelledby'))).map((node) => node.outerHTML)"
        )
        assert unnamed == []
        assert tab.errors == []

    with web_page(names=("door", "yard")) as page, camera(page, "door", "yard"):
        shown(look)


def test_a_recording_by_button(tmp_path: Path) -> None:
    async def look(_: Chromium, tab: Tab) -> None:
        button = "document.querySelector('button.action')"
        await tab.show(page.url)
        await first_picture(tab)
        assert await tab.evaluate(f"{button}.textContent") == "Record"
        await tab.evaluate(f"{button}.click()")
        await tab.wait_for(f"{button}.getAttribute('aria-pressed') === 'true'")
        assert await tab.evaluate(text("#said")) == "door is being recorded"
        await tab.wait_for("!document.querySelector('.rec').hidden")
        await tab.wait_for(
            "/ [1-9]\\d* pictures/.test(document.querySelector('#recordings').textContent)"
        )
        await tab.evaluate(f"{button}.click()")
        await tab.wait_for(f"{button}.getAttribute('aria-pressed') === 'false'")
        await tab.wait_for("document.querySelector('#recordings a') !== null")
        (file,) = [path.name for path in tmp_path.iterdir()]
        link = "document.querySelector('#recordings a')"
        assert await tab.evaluate(f"[{link}.textContent, {link}.pathname]") == [
            file,
            f"/recordings/{file}",
        ]
        assert await tab.evaluate(f"fetch({link}.href).then((answer) => answer.status)") == 200
        assert tab.errors == []

    with web_page(recordings=tmp_path) as page, camera(page):
        shown(look)
    (video,) = tmp_path.iterdir()
    with open_source(str(video)) as source:
        assert len(list(source)) > 0


def test_a_recording_that_cannot_be_is_explained(tmp_path: Path) -> None:
    async def look(_: Chromium, tab: Tab) -> None:
        await tab.show(page.url)
        await first_picture(tab)
        folder.rmdir()
        await tab.evaluate("document.querySelector('button.action').click()")
        await tab.wait_for(f"{text('#recordings-note')}.includes('does not exist')")

    folder = tmp_path / "recordings"
    with web_page(recordings=folder) as page, camera(page):
        shown(look)


def test_states_are_told() -> None:
    sources = [source_stats()]

    def figures() -> Stats:
        return stats(*sources)

    async def look(_: Chromium, tab: Tab) -> None:
        await tab.show(page.url)
        await first_picture(tab)
        sources[:] = [source_stats(state="stalled", reason="nothing came for 10 s")]
        await tab.wait_for(f"/^stalled for [0-9]+ s$/.test({text('.source .state')})")
        assert "nothing came for 10 s" in await tab.evaluate(text(".over"))
        assert await tab.evaluate("document.querySelector('.over').hidden") is False
        assert await tab.evaluate(text("#said")) == "door: stalled"
        sources[:] = [source_stats()]
        await tab.wait_for(f"{text('.source .state')} === 'live'")
        assert await tab.evaluate("document.querySelector('.over').hidden") is True
        assert tab.errors == []

    with web_page(figures=figures) as page, camera(page):
        shown(look)


def test_a_lost_program_is_told_and_found_again() -> None:
    """It ends, it comes back at the same address with other sources, and the page follows."""
    with ExitStack() as stack:

        async def look(_: Chromium, tab: Tab) -> None:
            await tab.show(page.url)
            await first_picture(tab)
            await asyncio.get_running_loop().run_in_executor(None, stack.close)
            await tab.wait_for("!document.querySelector('#banner').hidden")
            assert "is lost since" in await tab.evaluate(text("#banner"))
            assert await tab.evaluate(text("#link")) == "No connection"
            with (
                web_page(f"127.0.0.1:{page.port}", names=("garden",)) as again,
                camera(again, "garden"),
            ):
                await tab.wait_for(
                    "document.querySelector('article') && "
                    "document.querySelector('article').ariaLabel === 'garden'"
                )
                await first_picture(tab)
                assert await tab.evaluate("document.querySelector('#banner').hidden") is True

        page = stack.enter_context(web_page())
        stack.enter_context(camera(page))
        shown(look)


def test_the_token_leaves_the_address() -> None:
    async def look(_: Chromium, tab: Tab) -> None:
        await tab.show(f"http://127.0.0.1:{page.port}/")
        await tab.wait_for("document.querySelector('input[name=token]') !== null")
        await tab.show(page.url)
        await first_picture(tab)
        assert "token" not in await tab.evaluate("location.href")
        # Scripts cannot read it.
        assert await tab.evaluate("document.cookie") == ""
        await tab.call("Page.reload")
        await first_picture(tab)

    with web_page(token="a-token-for-this") as page, camera(page):
        shown(look)


def test_a_window_in_the_background_costs_nothing() -> None:
    async def look(browser: Chromium, tab: Tab) -> None:
        await tab.show(page.url)
        await first_picture(tab)
        await tab.evaluate(
            "Object.defineProperty(document, 'hidden', { value: true, configurable: true }); "
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        deadline = time.monotonic() + 20
        while True:
            before = await tab.evaluate(FRAME)
            await asyncio.sleep(0.5)
            if await tab.evaluate(FRAME) == before:
                break
            assert time.monotonic() < deadline
        await tab.evaluate(
            "delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))"
        )
        await tab.wait_for(f"{FRAME} > {before}")

    with web_page() as page, camera(page):
        shown(look)


def test_more_sources_than_connections() -> None:
    """A browser has six connections to one host; eight sources all move, and figures come."""

    async def look(_: Chromium, tab: Tab) -> None:
        await tab.size(1440, 900)
        await tab.show(page.url)
        await first_picture(tab)
        frames = (
            "[...document.querySelectorAll('canvas')].map((one) => Number(one.dataset.frame || -1))"
        )
        await tab.wait_for(f"{frames}.every((frame) => frame >= 0)")
        before: list[Any] = await tab.evaluate(frames)
        await tab.wait_for(f"{frames}.every((frame, place) => frame > {before}[place])")
        assert tab.errors == []

    names = [f"camera-{place}" for place in range(8)]
    with web_page(names=names) as page, camera(page, *names, fps=10):
        shown(look)
