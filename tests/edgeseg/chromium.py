"""A headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io)."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

__all__ = ["Chromium", "Tab", "chromium_path"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_START_S, _ANSWER_S = 60.0, 60.0


def chromium_path() -> str | None:
    """The browser that is installed here, None where there is none."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class Tab:
    """One tab; ``errors`` are the messages that a developer would see in red."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and what it returned."""
        return await self._browser.call(method, parameters, self._session)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, promises waited for."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def wait_for(self, expression: str, seconds: float = 30.0) -> Any:
        """The value of the expression as soon as it is true; AssertionError when it never is."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not (value := await self.evaluate(expression)):
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"this was not so after {seconds:g} s: {expression}")
            await asyncio.sleep(0.1)
        return value

    async def show(self, url: str) -> None:
        """Opens an address."""
        await self.call("Page.navigate", url=url)

    async def size(self, width: int, height: int, *, phone: bool = False, scale: int = 1) -> None:
        """Sets the size of the window in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=phone,
        )

    async def scheme(self, name: str) -> None:
        """``light`` or ``dark``, as the system would have it."""
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": name}],
        )

    async def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of what the window shows, or of the whole page."""
        answer = await self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole
        )
        return base64.b64decode(answer["data"])


class Chromium:
    """The browser; use it in ``async with``."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        self._stack = AsyncExitStack()
        self._channel: Any

    async def __aenter__(self) -> Chromium:
        try:
            # Its helpers write into the folder while it is removed.
            folder = self._stack.enter_context(
                tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            )
            address = await self._stack.enter_async_context(self._process(Path(folder)))
            session = await self._stack.enter_async_context(aiohttp.ClientSession())
            self._channel = await self._stack.enter_async_context(
                session.ws_connect(address, max_msg_size=0)
            )
            listener = asyncio.create_task(self._listen())
            self._stack.callback(listener.cancel)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def tab(self) -> Tab:
        """A new, empty tab."""
        target = await self.call("Target.createTarget", {"url": "about:blank"})
        attached = await self.call(
            "Target.attachToTarget", {"targetId": target["targetId"], "flatten": True}
        )
        tab = self._tabs[attached["sessionId"]] = Tab(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        return tab

    async def call(
        self, method: str, parameters: dict[str, Any], session: str | None = None
    ) -> dict[str, Any]:
        """One command and its answer; AssertionError when it was refused."""
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        await self._channel.send_json(message)
        found = await asyncio.wait_for(answer, _ANSWER_S)
        if "error" in found:
            raise AssertionError(f"{method}: {found['error']}")
        result: dict[str, Any] = found["result"]
        return result

    @asynccontextmanager
    async def _process(self, folder: Path) -> AsyncIterator[str]:
        process = await asyncio.create_subprocess_exec(
            self._path,
            "--headless",
            # In a container there is no user to keep it from, and often no namespace to do it in.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            "about:blank",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            # It writes its port, and the rest of the address, when it listens.
            told = folder / "DevToolsActivePort"
            deadline = asyncio.get_running_loop().time() + _START_S
            while not (told.is_file() and len(lines := told.read_text().split("\n")) >= 2):
                if process.returncode is not None:
                    raise AssertionError(f"the browser ended with {process.returncode}")
                if asyncio.get_running_loop().time() > deadline:
                    raise AssertionError("the browser did not start")
                await asyncio.sleep(0.05)
            yield f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 10)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()

    async def _listen(self) -> None:
        async for message in self._channel:
            content = message.json()
            if "id" in content:
                answer = self._answers.pop(content["id"], None)
                if answer is not None and not answer.done():
                    answer.set_result(content)
                continue
            tab = self._tabs.get(content.get("sessionId", ""))
            if tab is not None and (error := _error_in(content)) is not None:
                tab.errors.append(error)


def _error_in(event: dict[str, Any]) -> str | None:
    parameters = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        return str(parameters["exceptionDetails"])
    if event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
        return str(parameters["args"])
    if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
        return str(parameters["entry"])
    return None
