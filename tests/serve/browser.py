"""Headless Chromium, driven over the DevTools pipe: JSON messages that end with a zero byte."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60.0  # the longest wait for anything


class Page:
    """One tab."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._number = to, back, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a method of the DevTools protocol. Events that come before it are kept."""
        self._number += 1
        session = {"sessionId": self._session} if "_session" in vars(self) and self._session else {}
        message = {"id": self._number, "method": method, "params": params} | session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], end - time.monotonic())
            assert ready, "Chromium does not answer"
            piece = os.read(self._back, 2**16)
            assert piece, "Chromium has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        # The page gets the title when it knows its model and the engine, which it asks for after the names.
        self.until("document.readyState === 'complete' && document.title === document.querySelector('#choice').value")

    def write(self, text: str) -> None:
        """Type a text where the cursor is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, text: str = "") -> None:
        code = {"Enter": 13, "Tab": 9, "Escape": 27}[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def asked(self) -> set[str]:
        """The addresses of all requests so far."""
        return {e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"}

    def named(self) -> set[tuple[str, str]]:
        """Roles and names that a screen reader is told."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return {
            (node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"] if "name" in node
        }


@contextlib.contextmanager
def page(profile: Path) -> Iterator[Page]:
    """A tab of a new Chromium."""
    assert CHROMIUM is not None
    to_chromium, ours_to = os.pipe()
    ours_back, from_chromium = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-pipe", "--window-size=900,700", f"--user-data-dir={profile}"]
    # Chromium reads from descriptor 3 and writes to 4. A shell moves ours there.
    line = f'exec "$0" "$@" 3<&{to_chromium} 4>&{from_chromium}'
    popen = subprocess.Popen(
        ["bash", "-c", line, CHROMIUM, *options],
        pass_fds=(to_chromium, from_chromium),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_chromium)
    os.close(from_chromium)
    try:
        yield Page(ours_to, ours_back)
    finally:
        popen.terminate()
        popen.wait()
        os.close(ours_to)
        os.close(ours_back)
