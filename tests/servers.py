"""A real HTTP server on loopback that fails as servers do, file by file."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder. `faults[name]` is a list: each request for that file takes the next fault from its front.

    Faults: an integer is answered as a status; "cut" sends half of the body under the whole's length; "whole" knows
    no ranges; "stall" stops in mid-body; "slow" sends it in small pieces; "damage" flips a bit of it.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.faults, self.always = folder, {}, {}
        self.requests: Counter[str] = Counter()
        self.bytes_sent, self.lock = 0, threading.Lock()
        self.stop_stalling = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, name: str) -> object:
        with self.lock:
            self.requests[name] += 1
            faults = self.faults.get(name) or []
            return faults.pop(0) if faults else self.always.get(name)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer()

    def answer(self, head: bool = False) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        fault = None if head else self.server.next_fault(name)
        path = self.server.folder / name
        if isinstance(fault, int) or not path.is_file():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, total = path.read_bytes(), path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", ""))
        if wanted and fault != "whole":
            first, last = int(wanted[1]), min(int(wanted[2] or total - 1), total - 1)
            if first >= total:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.send(data, fault)

    def send(self, data: bytes, fault: object) -> None:
        try:
            if fault == "damage":
                data = bytes([data[0] ^ 1]) + data[1:]
            pieces = [data]
            if fault in ("cut", "stall"):
                pieces = [data[: len(data) // 2]]
            elif fault == "slow":
                pieces = [data[i : i + len(data) // 8 + 1] for i in range(0, len(data), len(data) // 8 + 1)]
            for piece in pieces:
                with self.server.lock:  # before it is sent: who has read it all finds it counted
                    self.server.bytes_sent += len(piece)
                self.wfile.write(piece)
                self.wfile.flush()
                if fault == "slow":
                    time.sleep(0.15)
            if fault == "stall":
                self.server.stop_stalling.wait(60)
            if fault in ("cut", "stall"):
                self.close_connection = True
                self.connection.shutdown(2)
        except OSError:
            self.close_connection = True  # the client had enough


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[FaultyServer]:
    server = FaultyServer(folder, port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop_stalling.set()
        server.shutdown()
        server.server_close()
