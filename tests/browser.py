"""A headless Chromium for tests, spoken to through two pipes (its DevTools protocol): no driver to install."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (on Debian: apt install chromium)")
KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "End": 35, "Home": 36,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip
TEXT = {"Enter": "\r", "Space": " "}
PATIENCE = 60.0  # seconds, for what takes one


class Browser:
    """One page. What it asked for over the network or from the disk is in `requests`, what went wrong in `errors`."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._number, self._session = send, receive, 0, ""
        self._buffer = b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._do(f"{domain}.enable")

    def open(self, page: Path, width: int = 1200, height: int = 900, *, dark: bool = False) -> None:
        """A page of the disk, in a window of this size; returns when it is loaded."""
        self._do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._do("Emulation.setEmulatedMedia", features=[scheme])
        self._do("Page.navigate", url=page.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.href.startsWith('file:')")

    def js(self, expression: str) -> Any:
        """What it is in the page, a promise when it is kept."""
        told = self._do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, f"{expression}: {told['exceptionDetails']}"
        return told["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until it is true in the page."""
        end = time.monotonic() + PATIENCE
        while not self.js(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def press(self, *names: str) -> None:
        """Keys by name (`KEYS`) or by the character that they write; "Shift+Tab" holds one down."""
        for name in names:
            key = name.removeprefix("Shift+")
            char = " " if key == "Space" else key
            code = KEYS.get(key) or ord(key.upper())
            how = {"key": char, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if name != key else 0}
            text = TEXT.get(key) or ("" if key in KEYS else key)
            self._do("Input.dispatchKeyEvent", type="keyDown", **how, **({"text": text} if text else {}))
            self._do("Input.dispatchKeyEvent", type="keyUp", **how)

    def tab_to(self, selector: str, most: int = 200) -> None:
        """Press Tab until the element that a selector names has the focus."""
        for _ in range(most):
            if self.js(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            self.press("Tab")
        raise AssertionError(f"{most} times Tab, and {selector} was never reached")

    def point(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Move the pointer to a place of an element, in shares of its width and height."""
        box = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); "
            f"return [b.x, b.y, b.width, b.height] }})(document.querySelector({json.dumps(selector)}))"
        )
        x, y = box[0] + across * box[2], box[1] + down * box[3]
        self._do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> Path:
        """What the window shows, as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._do("Page.captureScreenshot")["data"]))
        return path

    def _do(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, f"{method}: {told['error']}"
                result: dict[str, Any] = told["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._receive, 1 << 16)
            assert piece, "chromium has ended"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(line)
        params = told.get("params", {})
        if told.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif told.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:2000])
        elif told.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return told


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser of its own, with its profile in this folder."""
    assert CHROMIUM is not None
    commands, send = os.pipe()
    receive, answers = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"]
    # Chromium reads file 3 and writes file 4.
    shell = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *options],
        pass_fds=(commands, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(send, receive)
    finally:
        process.terminate()
        process.wait()
        os.close(send)
        os.close(receive)
