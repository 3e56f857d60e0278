"""The simulated API over real HTTP on loopback, with connections that break, drip and hang."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qsl

from werkzeug.serving import WSGIRequestHandler, make_server

from syncd.demo.office import Office
from syncd.demo.wire import Request, Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

BASE = "/api/v1"
"""Where the API begins on its server."""

_HEADER = "HTTP_"
_CAME = "syncd.came"
_SO_TIMESTAMPNS = 35  # socket(7): the kernel says when bytes arrived, however late a thread gets to read them


def below_base(path: str) -> str:
    """The part of a URL's path that names a method; a path elsewhere is left, and is no resource."""
    return path.removeprefix(BASE) or "/"


class _Connection(WSGIRequestHandler):
    """One request a connection, which is all that werkzeug can do; logs nothing."""

    protocol_version = "HTTP/1.1"
    open_links: ClassVar[set[socket.socket]]
    came: float = 0.0

    def setup(self) -> None:
        super().setup()
        with suppress(OSError):  # reset before the first byte: the reading ends the same way
            self.came = _arrived(self.connection)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.open_links.add(self.connection)

    def make_environ(self) -> WSGIEnvironment:
        return super().make_environ() | {_CAME: self.came}

    def finish(self) -> None:
        self.open_links.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log(self, *_: Any, **__: Any) -> None:
        """Nothing: `Office.arrivals` has it."""


class HttpServer:
    """The API at `url`, in threads. `port` 0: any free one."""

    def __init__(self, office: Office, host: str = "127.0.0.1", port: int = 0) -> None:
        self._office = office
        self._links: set[socket.socket] = set()
        connection = type("_OwnConnection", (_Connection,), {"open_links": self._links})
        self._server = make_server(host, port, self._application, threaded=True, request_handler=connection)
        self._server.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.port = self._server.server_port
        self.url = f"http://{host}:{self.port}{BASE}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the server and break the connections that are still open."""
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()
        for link in list(self._links):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def _application(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        response = self._office.handle(_request(environ))
        effect = response.effect
        if effect is not None and (effect.kind == "hang" or (effect.kind == "cut" and effect.after < 0)):
            time.sleep(effect.seconds)
            _break(environ)
            raise ConnectionAbortedError("told to break")
        headers = [*response.headers.items(), ("Content-Length", str(len(response.body)))]
        start_response(f"{response.status} {response.status}", headers)
        return _body(environ, response)


def _arrived(connection: socket.socket) -> float:
    """Wait for the first byte; when it came to this machine, in its monotonic seconds."""
    _, notes, _, _ = connection.recvmsg(1, 256, socket.MSG_PEEK)
    now = time.monotonic()
    for _, kind, note in notes:
        if kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("@qq", note[:16])
            return now - max(0.0, time.time() - float(seconds) - float(nanoseconds) / 1e9)
    return now


def _request(environ: WSGIEnvironment) -> Request:
    headers = {key.removeprefix(_HEADER).replace("_", "-"): environ[key] for key in environ if key.startswith(_HEADER)}
    headers["Content-Type"] = environ.get("CONTENT_TYPE", "")
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    path = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
    query = dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
    return Request(environ["REQUEST_METHOD"], below_base(path), query, headers, body, environ[_CAME])


def _body(environ: WSGIEnvironment, response: Response) -> Iterator[bytes]:
    effect = response.effect
    if effect is None:
        yield response.body
    elif effect.kind == "drip":
        for at in range(0, len(response.body), effect.chunk):
            yield response.body[at : at + effect.chunk]
            time.sleep(effect.seconds)
    else:
        yield response.body[: effect.after]
        _break(environ)


def _break(environ: WSGIEnvironment) -> None:
    with suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
