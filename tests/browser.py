"""A page in headless Chromium: what it asks for, what it complains about, and how it looks."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@dataclass
class Visit:
    """problems: errors and warnings of the console, exceptions. requests: all but the page itself. found: by script."""

    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)


@contextmanager
def _running() -> Iterator[str]:
    """The address of a browser's socket."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "about:blank",
                     f"--user-data-dir={folder}", "--no-first-run", "--disable-background-networking"]  # fmt: skip
        assert CHROMIUM is not None
        browser = subprocess.Popen([CHROMIUM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            file, deadline = Path(folder) / "DevToolsActivePort", time.monotonic() + 60
            while not (file.exists() and file.read_text().count("\n")) and time.monotonic() < deadline:
                time.sleep(0.05)
            port = file.read_text().split()[0]
            pages = json.load(urlopen(f"http://127.0.0.1:{port}/json"))
            yield next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        finally:
            browser.kill()
            browser.wait()


def visit(
    page: Path, width: int, height: int, *, dark: bool = False, touch: bool = False, scripts: tuple[str, ...] = (),
    picture: Path | None = None, whole: bool = False, hover: str = "",
) -> Visit:  # fmt: skip
    """Opens a file, moves over what `hover` selects, runs scripts one after the other, pictures the window or all."""
    with _running() as address:
        return asyncio.run(_visit(address, page, width, height, dark, touch, scripts, picture, whole, hover))


async def _visit(address, page, width, height, dark, touch, scripts, picture, whole, hover) -> Visit:  # noqa: ANN001
    from tornado.websocket import websocket_connect

    socket, seen, number = await websocket_connect(address, max_message_size=2**28), Visit(), 0
    home = page.resolve().as_uri()

    def note(event: dict[str, Any]) -> None:
        what, content = event.get("method"), event.get("params", {})
        if what == "Runtime.exceptionThrown":
            seen.problems.append(json.dumps(content["exceptionDetails"])[:500])
        elif what == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            seen.problems.append(json.dumps(content["args"])[:500])
        elif what == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            seen.problems.append(content["entry"]["text"])
        elif what == "Network.requestWillBeSent":
            url = content["request"]["url"]
            if url != home and not url.startswith(("data:", "blob:")):
                seen.requests.append(url)

    async def ask(method: str, **parameters: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        await socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(await asyncio.wait_for(socket.read_message(), 60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            note(answer)

    async def run(script: str) -> Any:
        answer = await ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    for domain in ("Page", "Runtime", "Log", "Network"):
        await ask(f"{domain}.enable")
    await ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
    await ask("Emulation.setTouchEmulationEnabled", enabled=touch)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    await ask("Emulation.setEmulatedMedia", features=scheme)
    await ask("Page.navigate", url=home)
    settled = "new Promise((done) => requestIdleCallback(() => requestAnimationFrame(() => setTimeout(done, 300))))"
    await run("new Promise((done) => document.readyState == 'complete' ? done() : addEventListener('load', done))")
    for _ in range(100):
        if await run(
            "typeof Bokeh == 'object' && Bokeh.documents.length > 0 && Bokeh.documents.every((d) => d.is_idle)"
        ):
            break
        await asyncio.sleep(0.1)
    await run(settled)
    for place in range(await run(f"document.querySelectorAll('{hover}').length") if hover else 0):
        middle = "(box => [box.x + box.width / 2, box.y + box.height / 2])(each.getBoundingClientRect())"
        find = f"each = document.querySelectorAll('{hover}')[{place}]; each.scrollIntoView({{behavior: 'instant'}})"
        x, y = await run(f"(() => {{ const {find}; return {middle}; }})()")
        for shift in (-200, -100, 0, 100):
            await ask("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
    for script in scripts:
        seen.found.append(await run(script))
    if picture is not None:
        options: dict[str, Any] = {"format": "png"}
        if whole:
            tall = await run("document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
            options |= {"captureBeyondViewport": True, "clip": clip}
        await run(settled)
        picture.write_bytes(base64.b64decode((await ask("Page.captureScreenshot", **options))["data"]))
    socket.close()
    return seen
