"""Answers a `requests.Session` from an `Office` in the same thread: no socket, and any clock.

    session.mount("http://", OfficeAdapter(office))

Breaks and hangs become the exceptions that a network would give. A simulated clock runs on while the office works; an
answer that took longer than the read timeout is a ReadTimeout (the clock has then moved by the whole duration).
"""

import io
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import requests
from requests.adapters import BaseAdapter
from urllib3 import HTTPHeaderDict, HTTPResponse

from syncd.demo.office import Office
from syncd.demo.server import below_base
from syncd.demo.wire import Request, Response


class OfficeAdapter(BaseAdapter):
    """Carries requests into `office.handle`. `sent` counts them."""

    def __init__(self, office: Office) -> None:
        super().__init__()
        self.office = office
        self.sent = 0

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float | None, float | None] | None = None,
        verify: bool | str = True,
        cert: bytes | str | tuple[bytes | str, bytes | str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Answer one prepared request."""
        del verify, cert, proxies
        self.sent += 1
        clock = self.office.clock
        limit = timeout[1] if isinstance(timeout, tuple) else timeout
        started = clock.now()
        response = self.office.handle(_request(request))
        effect = response.effect
        if effect is not None and effect.kind == "hang":
            clock.sleep(effect.seconds if limit is None else min(limit, effect.seconds))
            if limit is None or limit > effect.seconds:
                raise requests.ConnectionError("Connection aborted.", request=request)
            raise requests.ReadTimeout("Read timed out.", request=request)
        if limit is not None and clock.now() - started > limit:
            raise requests.ReadTimeout("Read timed out.", request=request)
        if effect is not None and effect.kind == "cut" and effect.after < 0:
            raise requests.ConnectionError("Connection aborted.", request=request)
        answer = self._answer(request, response)
        if not stream:
            _ = answer.content
        return answer

    def close(self) -> None:
        """Nothing is held."""

    def _answer(self, request: requests.PreparedRequest, response: Response) -> requests.Response:
        body: Any = io.BytesIO(response.body)
        if response.effect is not None and response.effect.kind == "cut":
            body = io.BytesIO(response.body[: response.effect.after])
        elif response.effect is not None:
            body = _Drip(response, self.office)
        headers = HTTPHeaderDict({**response.headers, "Content-Length": str(len(response.body))})
        answer = requests.Response()
        answer.status_code = response.status
        answer.reason = str(response.status)
        answer.headers = requests.structures.CaseInsensitiveDict(headers)
        answer.url = request.url or ""
        answer.request = request
        answer.encoding = requests.utils.get_encoding_from_headers(answer.headers)
        answer.raw = HTTPResponse(
            body=body,
            headers=headers,
            status=response.status,
            preload_content=False,
            enforce_content_length=True,
            request_method=request.method,
        )
        return answer


class _Drip(io.RawIOBase):
    """A body that comes in pieces, the office's clock running on before each."""

    def __init__(self, response: Response, office: Office) -> None:
        super().__init__()
        self._left = response.body
        self._effect = response.effect
        self._clock = office.clock

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most one piece, as a socket gives it; everything for a negative size."""
        if self._effect is None or not self._left:
            return b""
        self._clock.sleep(self._effect.seconds)
        wanted = len(self._left) if size < 0 else min(size, self._effect.chunk)
        piece, self._left = self._left[:wanted], self._left[wanted:]
        return piece


def _request(request: requests.PreparedRequest) -> Request:
    url = urlsplit(request.url or "")
    body = request.body or b""
    content = body.encode() if isinstance(body, str) else body if isinstance(body, bytes) else b""
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    headers = {name: value if isinstance(value, str) else value.decode() for name, value in request.headers.items()}
    return Request(request.method or "GET", below_base(unquote(url.path)), query, headers, content)
