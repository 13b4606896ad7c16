"""The server's hardened defaults, over plain HTTP and a bare websocket handshake; no browser needed."""

from __future__ import annotations

import http.client
import re
import socket
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.browser


def get(server, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def handshake(server, host: str) -> int:
    """The status of a websocket handshake under a host name."""
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=10) as wire:
        wire.sendall(
            f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        return int(wire.recv(64).split()[1])


def test_only_loopback_is_bound(server):
    listening = [c for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_a_foreign_host_name_is_refused(server):
    port = urlsplit(server.url).port
    assert handshake(server, f"127.0.0.1:{port}") == 101
    assert handshake(server, f"localhost:{port}") == 101
    assert handshake(server, "evil.example") == 403
    assert get(server, "/", Host="evil.example").status == 403
    assert get(server, "/", Host=f"127.0.0.1.evil.example:{port}").status == 403


def test_every_answer_carries_a_strict_policy(server):
    for path in ("/", "/inspect", "/_stcore/health", "/api/artifacts/none"):
        answer = get(server, path)
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in policy["script-src"]
        assert re.search(r"'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
        assert policy["object-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "../catalog.sqlite",
        "../../etc/passwd",
        "%2e%2e/catalog.sqlite",
        "..%2fcatalog.sqlite",
        "/etc/passwd",
        "",
        "a%00b",
    ],
)
def test_artifacts_do_not_leave_their_folder(server, path):
    assert get(server, f"/api/artifacts/{path}").status in (400, 404)


def test_an_artifact_is_sent_whole_and_by_range(server):
    folder = server.home / "artifacts" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    answer = get(server, "/api/artifacts/abc/model.safetensors")
    assert (answer.status, answer.read()) == (200, bytes(range(256)))
    assert get(server, "/api/artifacts/abc/model.safetensors", Range="bytes=10-19").read() == bytes(
        range(10, 20)
    )


def test_a_link_out_of_the_store_is_not_followed(server):
    folder = server.home / "artifacts" / "link"
    folder.mkdir(parents=True)
    (folder / "catalog").symlink_to(server.home / "catalog.sqlite")
    assert get(server, "/api/artifacts/link/catalog").status == 404


def test_nothing_is_reported_to_anybody():
    settings = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert settings["browser"]["gatherUsageStats"] is False
    assert settings["server"]["address"] == "127.0.0.1"
    assert settings["server"]["allowedHosts"] == ["localhost", "127.0.0.1"]
