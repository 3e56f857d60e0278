"""The catalogue of faults, part A, what no other test shows: an API that is far away, broken, slow or somebody else."""

from __future__ import annotations

import datetime as dt
import gzip
import ipaddress
import json
import socket
import ssl
import time
import tracemalloc
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from syncd import api as door
from syncd.api import OpenDentalApi
from syncd.errors import OversizeError, SiteError, TransientError, UnansweredError
from tests.small import DAY, HOUR, backfilling, serving, settle, small, troubles, versions
from tests.wire import answering, api_at, listening, nobody_answering, read_request, reset
from tests.world import World

ROW = {
    "DocNum": 34, "MountNum": 0, "PatNum": "101", "DateCreated": "2021-04-08 08:12:21",
    "DateTStamp": "2021-04-18 11:45:01",
}  # fmt: skip
BODY = json.dumps([ROW] * 20).encode()
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n"  # all the rows, and no last chunk


def listing(api: OpenDentalApi) -> None:
    api.list_documents(101, 0, 100)


def place(api: OpenDentalApi) -> None:
    api.place_document(389, "syncd/a.png")


def failure_of(call: Callable[[OpenDentalApi], None], port: int, **changes: Any) -> TransientError:
    """How a request to that port ends."""
    with pytest.raises(TransientError) as caught:
        call(api_at(f"http://127.0.0.1:{port}", **changes))
    return caught.value


# --- nobody there


@pytest.mark.parametrize("call", [listing, place])
def test_host_that_has_no_address_is_named_and_nothing_was_asked(call: Callable[[OpenDentalApi], None]) -> None:
    with pytest.raises(TransientError) as caught:
        call(api_at("http://office.invalid/api/v1"))
    assert (type(caught.value), caught.value.reason) == (TransientError, "name_unknown")
    assert "office.invalid" in str(caught.value)
    assert not {"DEV", "CUST", "s3cret"} & set(str(caught.value).replace("/", " ").split())


@pytest.mark.parametrize("call", [listing, place])
def test_connection_that_nobody_takes_is_given_up_within_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[OpenDentalApi], None]
) -> None:
    assert door.CONNECT_TIMEOUT <= 10
    monkeypatch.setattr("syncd.api.CONNECT_TIMEOUT", 0.3)
    with nobody_answering() as port:
        began = time.monotonic()
        assert type(failure_of(call, port)) is TransientError  # nothing was asked
        assert 0.2 < time.monotonic() - began < 3


# --- answers that stop


@pytest.mark.parametrize("kept", [1, 20, len(WHOLE) - len(BODY), len(WHOLE) // 2, len(WHOLE) - 1])
@pytest.mark.parametrize(("call", "error"), [(listing, TransientError), (place, UnansweredError)])
def test_reset_connection_is_never_taken_for_an_answer(
    kept: int, call: Callable[[OpenDentalApi], None], error: type[TransientError]
) -> None:
    with listening(answering(WHOLE[:kept], reset)) as port:
        assert type(failure_of(call, port)) is error


@pytest.mark.parametrize("kept", [20, len(WHOLE) - len(BODY), len(WHOLE) - 1])
@pytest.mark.parametrize(("call", "error"), [(listing, TransientError), (place, UnansweredError)])
def test_office_that_goes_silent_within_its_answer_is_given_up_at_the_deadline(
    kept: int, call: Callable[[OpenDentalApi], None], error: type[TransientError]
) -> None:
    with listening(answering(WHOLE[:kept], lambda link: link.recv(1))) as port:
        began = time.monotonic()
        assert type(failure_of(call, port, deadline=0.3)) is error
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(("call", "error"), [(listing, TransientError), (place, UnansweredError)])
def test_answer_without_its_last_chunk_is_never_taken_for_whole(
    call: Callable[[OpenDentalApi], None], error: type[TransientError]
) -> None:
    with listening(answering(CHUNKED)) as port:
        assert type(failure_of(call, port)) is error


def test_office_that_drips_its_handshake_is_given_up_as_if_nobody_took_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("syncd.api.CONNECT_TIMEOUT", 0.3)

    def drip(link: socket.socket) -> None:
        link.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB begins: one byte of it every now and then
        while True:
            link.sendall(b"\0")
            time.sleep(0.05)

    with listening(drip) as port:
        began = time.monotonic()
        with pytest.raises(TransientError) as caught:
            place(api_at(f"https://127.0.0.1:{port}"))
        assert time.monotonic() - began < 3
        assert type(caught.value) is TransientError  # before the handshake is over nothing can have been asked


@pytest.mark.parametrize("call", [listing, place])
def test_each_request_has_a_connection_of_its_own_though_the_office_would_keep_the_last(
    call: Callable[[OpenDentalApi], None],
) -> None:
    """On a kept one nobody knows what a cut means: whether the office got the request, and what may be on the drop."""
    links = 0

    def keep(link: socket.socket) -> None:
        nonlocal links
        links += 1
        read_request(link)
        link.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n[]")
        link.settimeout(2)
        read_request(link)  # a second request of this connection is never answered

    with listening(keep) as port:
        api = api_at(f"http://127.0.0.1:{port}")
        for _ in range(3):
            call(api)
    assert links == 3


# --- answers that are too large


@pytest.mark.parametrize("layers", [1, 2])
def test_bomb_of_a_gigabyte_is_refused_in_little_memory(layers: int) -> None:
    body = gzip.compress(b" " * 10_000_000) * 100  # a gigabyte in a megabyte, or, packed again, in some kilobytes
    for _ in range(layers - 1):
        body = gzip.compress(body)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nContent-Encoding: {', '.join(['gzip'] * layers)}"
    with listening(answering(head.encode() + b"\r\n\r\n" + body)) as port:
        tracemalloc.start()
        try:
            with pytest.raises(OversizeError):
                listing(api_at(f"http://127.0.0.1:{port}", size_cap=4_000_000, deadline=30.0))
            assert tracemalloc.get_traced_memory()[1] < 32_000_000
        finally:
            tracemalloc.stop()


# --- somebody else


def certificate(folder: Path, days: int) -> Path:
    """A certificate of its own authority for 127.0.0.1 that ends in so many days, with its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "office")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=30))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "office.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.mark.parametrize(
    ("days", "newest", "answered"),
    [(30, ssl.TLSVersion.TLSv1_2, True), (-1, ssl.TLSVersion.TLSv1_3, False), (30, ssl.TLSVersion.TLSv1_1, False)],
    ids=["good", "expired", "downgraded"],
)
def test_office_is_believed_with_a_valid_certificate_and_a_modern_protocol_only(
    tmp_path: Path, days: int, newest: ssl.TLSVersion, answered: bool
) -> None:
    bundle = certificate(tmp_path, days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bundle)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # that is the point of it
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
    asked: list[bytes] = []

    def talk(link: socket.socket) -> None:
        with context.wrap_socket(link, server_side=True) as trusted:
            asked.append(read_request(trusted))
            trusted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

    with listening(talk) as port:
        api = api_at(f"https://127.0.0.1:{port}", ca_bundle=bundle)
        if answered:
            listing(api)
        for call in () if answered else (listing, place):
            with pytest.raises(SiteError) as caught:
                call(api)
            assert caught.value.reason == "tls_failed"
    assert len(asked) == answered


# --- the story of it


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A mirror of the small practice, complete."""
    started = serving(tmp_path, small())
    started.run()
    return started


def test_hundred_restarts_in_ten_seconds_send_no_request_too_many(tmp_path: Path) -> None:
    world = World.start(tmp_path, practice=small(documents=8).practice, interval=1.0)
    for _ in range(100):
        world.run(seconds=0.1)
        world.restart()
    starts = [arrival.at for arrival in world.office.arrivals]
    assert 5 <= len(starts) <= 11
    assert min(later - earlier for earlier, later in pairwise(starts)) >= 1.0


@pytest.mark.parametrize("status", [500, 502, 503])
def test_server_trouble_is_met_with_growing_distance(tmp_path: Path, status: int) -> None:
    world = backfilling(tmp_path, small())
    world.run(until=lambda: sum(versions(world)) >= 3)
    sent = len(world.office.arrivals)
    world.office.faults.add("status", status=status, times=None)
    world.run(hours=2)
    starts = [arrival.at for arrival in world.office.arrivals[sent:]]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert gaps[-1] >= 900
    assert min(gaps[1:]) >= 15
    assert all(later > 0.9 * min(earlier, 900) for earlier, later in pairwise(gaps[1:]))
    world.office.faults.clear()
    settle(world)


@pytest.mark.parametrize("status", [401, 403])
def test_revoked_key_is_tried_four_times_an_hour_and_makes_nothing_go_missing(world: World, status: int) -> None:
    sent = len(world.office.arrivals)
    world.office.faults.add("status", status=status, times=None)
    world.run(hours=3)
    assert troubles(world) == {"api": "key_refused"}
    assert 3 <= len(world.office.arrivals) - sent <= 13
    assert world.index.value("SELECT count(*) FROM item WHERE missing_since_at IS NOT NULL") == 0
    world.run(hours=3 * DAY / HOUR)
    world.office.faults.clear()
    world.run(hours=2)
    world.check()
    assert troubles(world) == {}


def test_not_found_for_every_patient_is_a_state_and_not_the_end_of_anything(tmp_path: Path) -> None:
    world = World.start(tmp_path, 6, interval=30.0)
    world.run()
    for path in ("/documents", "/sheets"):
        world.office.faults.add("status", path=path, status=404, text="Patient not found", times=None)
    world.run(hours=3)
    assert "bad_answers" in troubles(world).values()
    world.run(hours=6)
    assert world.index.value("SELECT count(*) FROM item WHERE missing_since_at IS NOT NULL") == 0
    world.office.faults.clear()
    world.run(hours=6)
    world.check()
    assert troubles(world) == {}
