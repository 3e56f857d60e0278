"""The network below the API's door: a requests adapter that shows the socket in flight and cuts what takes too long."""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool


class Wire(HTTPAdapter):
    """The network, with a view of the socket in flight: None until connected (with TLS: until trusted)."""

    sock: socket.socket | None = None
    hold: Callable[[], None] | None = None
    sent: Callable[[], None] | None = None
    end = float("inf")  # of the exchange in hand, a steady time
    _watch: threading.Thread | None = None

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> HTTPConnectionPool:
        """Have the pool make connections that show their socket."""
        pool: HTTPConnectionPool = super().get_connection_with_tls_context(*args, **kwargs)
        wire, usual = self, type(pool).ConnectionCls

        class Shown(usual):  # type: ignore[misc,valid-type]  # plain or with TLS, as the pool is
            def connect(self) -> None:
                super().connect()
                wire.sock = self.sock
                if wire.hold:
                    wire.hold()

            def request(self, *args: Any, **kwargs: Any) -> None:
                try:
                    super().request(*args, **kwargs)
                finally:
                    if wire.sent:
                        wire.sent()

        pool.ConnectionCls = Shown
        return pool

    def watched(self, pause: float) -> None:
        """From now on what takes too long is cut. One thread for all: to start one costs each request milliseconds."""
        if self._watch is None:
            self._watch = threading.Thread(target=_cut_when_late, args=(weakref.ref(self), pause), daemon=True)
            self._watch.start()


def _cut_when_late(wire_of: Callable[[], Wire | None], pause: float) -> None:
    """Wake whoever reads from the socket too long. From another thread, so without touching the state of TLS."""
    while (wire := wire_of()) is not None:
        sock, late = wire.sock, time.monotonic() >= wire.end
        if late and sock is not None:
            with suppress(OSError):  # already closed
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        del wire, sock
        time.sleep(pause)
