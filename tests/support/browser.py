"""Headless Chromium, driven by the DevTools protocol over pipes; import as `browser`."""

import base64
import itertools
import json
import mimetypes
import os
import shlex
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TIMEOUT_S = 60


class BrowserError(Exception):
    """What a script in the page threw, or Chromium refused."""


class Browser:
    """One page, without any network.

    Attributes:
        files: bytes to answer requests with, by address; any other request fails.
        asked: the addresses of all requests, in order.
    """

    def __init__(self, source, sink):
        self._source, self._sink, self._received, self._session = source, sink, b"", None
        self._numbers = itertools.count(1)
        self.files, self.asked = {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Fetch.enable")
        self.call("Network.setCacheDisabled", cacheDisabled=True)

    def call(self, method, **parameters):
        """Give the result of a method of the protocol."""
        number = self._send(method, parameters)
        while (message := self._receive()).get("id") != number:
            if message.get("method") == "Fetch.requestPaused":
                self._answer(message["params"])
        if "error" in message:
            raise BrowserError(message["error"]["message"])
        return message["result"]

    def _send(self, method, parameters):
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._sink.write(
            json.dumps({"id": number, "method": method, "params": parameters, **session}).encode() + b"\0"
        )
        self._sink.flush()
        return number

    def _receive(self):
        parts = [self._received]
        while b"\0" not in parts[-1]:
            parts.append(self._source.read1(2**20))
            if not parts[-1]:
                raise BrowserError("Chromium ended")
        message, _, self._received = b"".join(parts).partition(b"\0")
        return json.loads(message)

    def _answer(self, paused):
        address, number = paused["request"]["url"], paused["requestId"]
        self.asked.append(address)
        if address not in self.files:
            self._send("Fetch.failRequest", {"requestId": number, "errorReason": "InternetDisconnected"})
            return
        kind = "text/javascript" if address.endswith("js") else mimetypes.guess_type(address)[0] or "text/html"
        headers = {"Content-Type": kind, "Access-Control-Allow-Origin": "*"}
        answer = {
            "requestId": number,
            "responseCode": 200,
            "responseHeaders": [{"name": name, "value": value} for name, value in headers.items()],
            "body": base64.b64encode(self.files[address]).decode(),
        }
        self._send("Fetch.fulfillRequest", answer)

    def open(self, address):
        """Open a page, and wait until it has been read."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def evaluate(self, script):
        """Give the value of an expression in the page; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(result["exceptionDetails"].get("exception", {}).get("description"))
        return result["result"].get("value")

    def wait(self, condition):
        """Wait until an expression is true."""
        end = time.monotonic() + TIMEOUT_S
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise BrowserError(
                    f"never true: {condition}; the page says {self.evaluate('document.body.innerText')}"
                )
            time.sleep(0.05)

    def choose(self, selector, file):
        """Choose a file in an input, as a person does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def type(self, selector, text):
        """Type into an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)


@contextmanager
def open_browser(profile):
    """Run a browser whose profile is a folder."""
    (their_source, sink), (source, their_sink) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    command = shlex.join([CHROMIUM, *options, "--remote-debugging-pipe"])  # which are files 3 and 4
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command} 3<&{their_source} 4>&{their_sink}"],
        pass_fds=[their_source, their_sink],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_source)
    os.close(their_sink)
    with os.fdopen(sink, "wb") as writer, os.fdopen(source, "rb") as reader:
        try:
            yield Browser(reader, writer)
        finally:
            process.terminate()
            process.wait(20)
