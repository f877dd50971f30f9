"""A TCP connection's middle, on which anything can go wrong."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Hands bytes on between whoever connects and `upstream`, as long as it is left alone.

    Attributes:
        happened: set when what was asked for has happened.
        least: bytes of what it happens to, at once: pages, not words.
    """

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.happened = threading.Event()
        self.least = 4096
        self._free = threading.Event()
        self._free.set()
        self._lock = threading.Lock()
        self._what, self._left = "", 0
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def after(self, size: int, what: str) -> None:
        """What happens after so many more bytes from upstream: "cut" ends every connection, "hold" hands nothing on until
        `release`, "spoil" changes a byte."""
        with self._lock:
            self.happened.clear()
            self._what, self._left = what, size

    def release(self) -> None:
        """Nothing is held any more, or goes wrong later."""
        with self._lock:
            self._what = ""
        self._free.set()

    def cut(self) -> None:
        """Ends every connection."""
        with self._lock:
            ending, self._open = self._open, set()
        for one in ending:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listener.close()
        self.release()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                try:
                    outer = socket.create_connection(("127.0.0.1", self._upstream), 2.0)
                except OSError:
                    inner.close()
                    continue
                outer.settimeout(None)
                with self._lock:
                    self._open |= {inner, outer}
                threading.Thread(target=self._pump, args=(inner, outer, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(outer, inner, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, watched: bool) -> None:
        try:
            while data := source.recv(65536):
                if watched:
                    data = self._happens(data)
                self._free.wait()
                sink.sendall(data)
        except OSError:
            pass
        finally:
            with self._lock:
                self._open -= {source, sink}
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _happens(self, data: bytes) -> bytes:
        with self._lock:
            self._left -= len(data)
            what = self._what if self._left <= 0 and len(data) > self.least else ""
            if what:
                self._what = ""
        if what == "spoil":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]
        elif what == "hold":
            self._free.clear()
        elif what == "cut":
            self.cut()
        if what:
            self.happened.set()
        return data
