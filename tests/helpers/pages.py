"""Pages: read by an HTML parser, and opened in a browser that has no network."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


# What Chromium asks of its maker, whatever page is open.
_OWN_SERVICES = {f"{name}.googleapis.com" for name in ("update", "clientservices", "content-autofill", "safebrowsing")}
_OWN_SERVICES |= {"optimizationguide-pa.googleapis.com", "accounts.google.com", "clients2.google.com"}
_OWN_SERVICES |= {"redirector.gvt1.com", "edgedl.me.gvt1.com", "www.google.com"}
VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """
    What stands in a page. Fails where an element is not closed, or closed as another one.

    Attributes:
        elements (`list[tuple[str, dict]]`): name and attributes of each element.
        tables (`list[list[list[str]]]`): the texts of the cells of each table, row by row.
        text (`str`): all that is to be read.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.captions = 0
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, self._open

    def handle_startendtag(self, tag, attrs) -> None:
        assert "svg" in self._open, f"<{tag}/> closes itself outside of a drawing"
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.captions += tag == "caption"
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self._open and self._open[-1] == tag, (tag, self._open)
        self._open.pop()

    def handle_data(self, data) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a name."""
        return [attributes for name, attributes in self.elements if name == tag]


@contextmanager
def proxy() -> Iterator[tuple[int, list[str]]]:
    """A proxy that leads nowhere and notes what it is asked for: its port and its notes."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            host = self.path.removeprefix("http://").partition("/")[0].partition(":")[0]
            if host not in _OWN_SERVICES:
                asked.append(self.path)
            self.send_error(502)

        do_GET = do_POST = do_CONNECT = do_HEAD = refuse

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def browse(path: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """
    Open a page in Chromium, whose only way out is [`proxy`]. The test is skipped where there is no Chromium.

    Returns:
        `tuple[str, list[str], list[str]]`: the page as the browser holds it, what its console says, and what it has
        asked the network for.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    with proxy() as (port, asked):
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr"]
        command += [
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        command += [f"--user-data-dir={folder}", f"--proxy-server=127.0.0.1:{port}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line], asked
