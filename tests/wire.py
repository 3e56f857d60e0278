"""One end of a connection on loopback that does what it is told, byte for byte, as no well-behaved server would."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from syncd.api import OpenDentalApi, PlacementSite

Talk = Callable[[socket.socket], object]


@contextmanager
def listening(talk: Talk) -> Iterator[int]:
    """Call `talk` with each connection, one after the other, then close it; gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                link, _ = listener.accept()
                with closing(link), suppress(OSError):
                    talk(link)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # also wakes the thread in accept
        listener.close()
        thread.join(5)


@contextmanager
def nobody_answering() -> Iterator[int]:
    """A port whose queue is full: whoever connects is neither answered nor refused, as behind a silent firewall."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = [socket.socket() for _ in range(4)]
    try:
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])
    finally:
        for each in (*waiting, listener):
            each.close()


def read_request(link: socket.socket) -> bytes:
    """One whole request, its body included. OSError: whoever asked has left."""
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += _received(link)
    head, _, body = asked.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while len(body) < int(lengths[0] if lengths else 0):
        body += _received(link)
    return head + b"\r\n\r\n" + body


def _received(link: socket.socket) -> bytes:
    received = link.recv(65536)
    if not received:
        raise ConnectionError("the other side has left")
    return received


def reset(link: socket.socket) -> None:
    """End the connection with RST instead of FIN."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answering(content: bytes, then: Talk = lambda _: None) -> Talk:
    """Read the request, send these bytes, then do something else to the connection."""

    def talk(link: socket.socket) -> None:
        read_request(link)
        link.sendall(content)
        then(link)

    return talk


def api_at(url: str, **changes: Any) -> OpenDentalApi:
    """The real door to an office at this address."""
    site = PlacementSite("sftp.example.org", "opendental", "s3cret")
    return OpenDentalApi(url, "DEV", "CUST", site, **{"deadline": 5.0, **changes})
