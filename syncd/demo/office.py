"""The vendor's API in front of the simulated practice: keys, throttle, faults, methods.

`Office.handle` answers one request, without any socket; `server.py` and `adapter.py` carry it over HTTP or into
requests.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from syncd.demo import documents, placements, queries, resources, sheets
from syncd.demo.call import Call, Interrupted, broken
from syncd.demo.clock import Clock, RealClock
from syncd.demo.faults import Fault, Faults
from syncd.demo.practice import Practice
from syncd.demo.schema import ALL_PERMISSIONS, READ_ALL
from syncd.demo.site import MemoryDrop, Site
from syncd.demo.throttle import Throttle
from syncd.demo.wire import Arrival, Effect, Refusal, Request, Response, json_response

_BAD, _UNAUTHORIZED, _MISSING, _TOO_MANY = 400, 401, 404, 429
_HIDDEN = ("SftpPassword", "rawBase64")

_Method = Callable[[Call], Response]
_METHODS: dict[tuple[str, str], tuple[_Method, str]] = {
    ("GET", "documents/#"): (documents.get_one, READ_ALL),
    ("GET", "documents"): (documents.get_many, READ_ALL),
    ("PUT", "documents/#"): (documents.update, "ApiDocuments"),
    ("DELETE", "documents/#"): (documents.delete, "ApiDocuments"),
    ("POST", "documents/Upload"): (documents.upload, "ApiDocuments"),
    ("POST", "documents/SetByUrl"): (documents.set_by_url, "ApiDocuments"),
    ("POST", "documents/UploadSftp"): (placements.upload_sftp, "ApiAllOthers"),
    ("POST", "documents/DownloadSftp"): (placements.download_sftp, "ApiAllOthers"),
    ("POST", "documents/DownloadMount"): (placements.download_mount, "ApiAllOthers"),
    ("POST", "documents/Thumbnails"): (placements.thumbnails, "ApiAllOthers"),
    ("GET", "sheets"): (sheets.get_many, READ_ALL),
    ("POST", "sheets"): (sheets.create, "ApiAllOthers"),
    ("POST", "sheets/DownloadSftp"): (sheets.download_sftp, "ApiAllOthers"),
    ("GET", "patients/Simple"): (resources.patients_simple, READ_ALL),
    ("GET", "appointments"): (resources.appointments, READ_ALL),
    ("GET", "securityperms"): (resources.security_permissions, READ_ALL),
    ("GET", "preferences"): (resources.preferences, READ_ALL),
    ("PUT", "queries/ShortQuery"): (queries.short_query, "ApiQueries"),
}
_RESOURCES = {path.split("/")[0] for _, path in _METHODS}


class Office:
    """One practice behind one customer key. All attributes may be switched while it runs.

    `practice`: the database behind the key (assign another one: "other database behind the key"). `permissions`: what
    the key may do; `(READ_ALL,)` can list, not download. `page_size`: 100 remote, 1000 local and service. `latency`:
    seconds that each method takes. `chunk_bytes`, `chunk_seconds`: how slowly files are written to the site.
    `version`: Open Dental's. Listing switches: `list_names` (FileName and ImgType in the list), `prefixed` (whose
    Description gets a date: "mounts" or "all"), `order` ("culture": by the formatted DateCreated string; "iso").
    `bare_errors`: explanations as bare text instead of JSON strings. `location`: form of the location header, with
    {address} and {path}. `strict`: unknown query parameters are refused with 400 by documents and patients (others
    ignore them). `arrivals`: every request, in order of arrival. `in_flight_most`: how many were in work at once, at
    most. `audit_rows`: rows that queries wrote into the practice's audit trail.
    """

    def __init__(
        self,
        practice: Practice,
        site: Site | None = None,
        *,
        clock: Clock | None = None,
        developer_key: str = "demo-developer-key",
        customer_key: str = "demo-customer-key",
        interval: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.practice = practice
        self.clock: Clock = clock or practice.clock or RealClock()
        self.site: Site = site or MemoryDrop(self.clock)
        self.developer_key = developer_key
        self.customer_key = customer_key
        self.permissions: tuple[str, ...] = ALL_PERMISSIONS
        self.throttle = Throttle(self.clock, interval)
        self.faults = Faults(seed)
        self.page_size = 100
        self.latency = 0.0
        self.chunk_bytes = 64 * 1024
        self.chunk_seconds = 0.0
        self.version = "25.4.48.0"
        self.list_names = False
        self.prefixed = "mounts"
        self.order = "culture"
        self.bare_errors = False
        self.location = "{address}"
        self.strict = True
        self.arrivals: list[Arrival] = []
        self.in_flight_most = 0
        self.audit_rows: list[str] = []
        self._in_flight = 0
        self._lock = threading.Lock()

    def handle(self, request: Request) -> Response:
        """The vendor's answer to one request."""
        arrival = self._arrive(request)
        try:
            response = self._answer(request, arrival)
        finally:
            with self._lock:
                self._in_flight -= 1
                arrival.duration = self.clock.now() - arrival.at
        cut = response.effect is not None and response.effect.kind != "drip"
        arrival.status = 0 if cut else response.status
        return response

    def _arrive(self, request: Request) -> Arrival:
        fields = {**request.query, **request.fields()}
        params = {name: value for name, value in fields.items() if name not in _HIDDEN}
        arrival = Arrival(self.clock.now(), request.came or time.monotonic(), request.method, request.path, params)
        with self._lock:
            self.arrivals.append(arrival)
            self._in_flight += 1
            self.in_flight_most = max(self.in_flight_most, self._in_flight)
        return arrival

    def _answer(self, request: Request, arrival: Arrival) -> Response:
        faults = self.faults.draw(request)
        call = Call(self, request, faults)
        try:
            self._check_headers(request)
            waited = self.throttle.enter()
            if waited is None:
                return self._too_many()
            arrival.waited = waited
            self.clock.sleep(self.latency)
            early = self._before(call)
            response = early or self._work(call)
        except Refusal as refusal:
            response = self._refused(refusal)
        except Interrupted as interrupted:
            return interrupted.response
        return self._after(call, response)

    def _check_headers(self, request: Request) -> None:
        """Headers first, then keys, as the vendor's own servers do before the office hears of it."""
        authorization = request.header("Authorization")
        if not authorization:
            raise Refusal(_BAD, "Missing request header: Authorization")
        if request.header("Content-Type").split(";")[0].strip().lower() != "application/json":
            raise Refusal(_BAD, "Content-Type must be application/json")
        scheme, _, keys = authorization.partition(" ")
        if scheme != "ODFHIR" or keys.strip() != f"{self.developer_key}/{self.customer_key}":
            raise Refusal(_UNAUTHORIZED, "Invalid credentials: the developer or customer key is invalid or disabled")

    def _too_many(self, seconds: float | None = None) -> Response:
        headers = {"Content-Type": "text/plain"}
        if self.throttle.retry_after:
            left = self.throttle.seconds_left() if seconds is None else seconds
            headers["Retry-After"] = str(max(1, round(left)))
        return Response(_TOO_MANY, b"Too many requests", headers)

    def _before(self, call: Call) -> Response | None:
        """Faults that strike before the practice does any work."""
        texts: dict[str, tuple[int, str]] = {
            "econnector_down": (_BAD, "The office's eConnector is not running"),
            "two_econnectors": (_BAD, "Two eConnectors are using the same registration key"),
            "key_revoked": (_UNAUTHORIZED, "The customer key has been disabled"),
        }
        for fault in call.faults:
            if fault.kind in texts:
                raise Refusal(*texts[fault.kind])
            if fault.kind in ("gateway_timeout", "cut") and fault.when == "before":
                return broken(self, fault)
            if fault.kind == "too_many":
                return self._too_many(fault.seconds)
            response = _instead(fault)
            if response is not None:
                return response
        return None

    def _work(self, call: Call) -> Response:
        """Find the method, check the permission, do it."""
        request = call.request
        parts = [part for part in request.path.split("/") if part]
        if not parts or parts[0] not in _RESOURCES:
            raise Refusal(_MISSING, f"'{parts[0] if parts else ''}' is not a valid resource.")
        if len(parts) > 1 and parts[1].isdigit():
            call.num, parts[1] = int(parts[1]), "#"
        found = _METHODS.get((request.method, "/".join(parts)))
        if found is None:
            raise Refusal(_BAD, f"'{request.method} {request.path}' is not a valid method.")
        method, permission = found
        if permission not in self.permissions:
            raise Refusal(_UNAUTHORIZED, f"The developer key does not have the permission {permission}")
        call.body = _read_body(request)
        return method(call)

    def _after(self, call: Call, response: Response) -> Response:
        """Faults that strike on the way back."""
        for fault in call.faults:
            if fault.kind in ("gateway_timeout", "cut") and fault.when == "after":
                return broken(self, fault)
            if fault.kind == "slow":
                self.clock.sleep(fault.seconds)
            if fault.kind == "location" and "location" in response.headers:
                headers = {**response.headers, "location": fault.text}
                response = Response(response.status, response.body, headers)
            effect = _effect(fault, response)
            if effect is not None:
                response = Response(response.status, response.body, response.headers, effect)
        return response

    def _refused(self, refusal: Refusal) -> Response:
        if self.bare_errors:
            return Response(refusal.status, refusal.text.encode(), {"Content-Type": "text/plain"})
        return json_response(refusal.text, refusal.status)


def _read_body(request: Request) -> dict[str, object]:
    if request.method not in ("POST", "PUT"):
        return {}
    try:
        body = json.loads(request.body)
    except ValueError as error:
        raise Refusal(_BAD, "The request body is not valid JSON") from error
    if not isinstance(body, dict):
        raise Refusal(_BAD, "The request body must be a JSON object")
    return body


def _instead(fault: Fault) -> Response | None:
    """The answer that a fault puts in place of the office's, or None."""
    plain, page = {"Content-Type": "text/plain"}, {"Content-Type": "text/html"}
    login = "<!DOCTYPE html><html><body>Please log in to the network</body></html>"
    answers: dict[str, Callable[[], Response]] = {
        "status": lambda: Response(fault.status, (fault.text or "Internal server error").encode(), plain),
        "html": lambda: Response(200, (fault.text or login).encode(), page),
        "wrong_shape": lambda: json_response({"Message": fault.text or "An error has occurred."}),
        "huge": lambda: Response(200, b'["' + b"x" * fault.size + b'"]', {"Content-Type": "application/json"}),
        "redirect": lambda: Response(302, b"", {"Location": fault.text or "https://example.org/"}),
        "hang": lambda: Response(200, b"", {}, Effect("hang", seconds=fault.seconds)),
    }
    answer = answers.get(fault.kind)
    return None if answer is None else answer()


def _effect(fault: Fault, response: Response) -> Effect | None:
    if fault.kind == "cut" and fault.when == "body":
        return Effect("cut", after=len(response.body) // 2)
    if fault.kind == "drip":
        return Effect("drip", chunk=max(1, fault.size), seconds=fault.seconds)
    return None
