"""Servers listen at all interfaces of both IP families."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from reelway.platform.errors import ConfigError
from reelway.platform.listen_address import all_interfaces, create_listener, resolve_host, url_host
from reelway.platform.rollout.control.webhook import serve_in_thread

SOURCES = Path(__file__).parents[2]
needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")


@contextmanager
def listening(host: str) -> Iterator[int]:
    with closing(create_listener(host, 0)) as listener:
        yield int(listener.getsockname()[1])


def accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


@needs_ipv6
@pytest.mark.parametrize("host", ["*", "::"])
def test_all_interfaces_take_both_families(host: str) -> None:
    with listening(host) as port:
        assert accepts("127.0.0.1", port)
        assert accepts("::1", port)


@needs_ipv6
@pytest.mark.parametrize(("host", "other"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1"), ("0.0.0.0", "::1")])
def test_one_address_takes_its_family_only(host: str, other: str) -> None:
    with listening(host) as port:
        assert accepts("::1" if ":" in host else "127.0.0.1", port)
        assert not accepts(other, port)


def test_machine_without_ipv6_listens_at_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert (all_interfaces(), resolve_host("*"), resolve_host("::1")) == ("0.0.0.0", "0.0.0.0", "::1")
    with listening("*") as port:
        assert accepts("127.0.0.1", port)


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("a.test", "a.test")])
def test_url_has_an_ipv6_address_in_brackets(host: str, shown: str) -> None:
    assert url_host(host) == shown


@needs_ipv6
@pytest.mark.parametrize("host", ["*", "::1"])
def test_http_server_answers_at_the_url_it_reports(host: str) -> None:
    application = Starlette(routes=[Route("/", lambda _: PlainTextResponse("ok"))])
    with serve_in_thread(application, host, 0) as url:
        assert httpx.get(url).text == "ok"
        port = httpx.URL(url).port
        assert httpx.get(f"http://[::1]:{port}").text == "ok"
        if host == "*":
            assert httpx.get(f"http://127.0.0.1:{port}").text == "ok"


@needs_ipv6
def test_metrics_are_scraped_over_both_families() -> None:
    server, thread = start_http_server(0, all_interfaces(), registry=CollectorRegistry())
    try:
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{server.server_port}/metrics").is_success
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_used_port_is_reported_with_its_address() -> None:
    with (
        listening("127.0.0.1") as port,
        pytest.raises(ConfigError, match=rf"127\.0\.0\.1 port {port}"),
        serve_in_thread(Starlette(), "127.0.0.1", port),
    ):
        pass


def test_no_program_listens_at_a_fixed_family() -> None:
    allowed = {"platform/src/reelway/platform/listen_address.py", "serving/src/reelway/serving/serve_settings.py"}
    found = [
        str(path.relative_to(SOURCES))
        for part in ("platform", "serving", "pipelines")
        for path in (SOURCES / part / "src").rglob("*.py")
        if re.search(r"0\.0\.0\.0|start_http_server\((?!.*all_interfaces)", path.read_text())
    ]
    assert set(found) <= allowed
