"""Ray's token is sent to Services of the namespace and to trusted hosts, whatever a resource or a setting says."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support.cluster.fake_api_server import FakeApiServer
from typer.testing import CliRunner

from reelway.platform.cli.main import build_app
from reelway.platform.cluster.operator_settings import RaySettings
from reelway.platform.cluster.resources import Backend
from reelway.platform.cluster.serve_address import serve_address
from reelway.platform.cluster.service_url import trusted_url
from reelway.platform.errors import ConfigError, RolloutError

LONG = "a" * 63
SERVICES = {
    "http://router:8000": "http://router.mine.svc:8000",
    "http://router": "http://router.mine.svc",
    "http://router/api/serve": "http://router.mine.svc/api/serve",
    "https://head.mine.svc:8265": "https://head.mine.svc:8265",
    "http://head.mine.svc.cluster.local:8265/": "http://head.mine.svc.cluster.local:8265/",
    "http://localhost:8265": "http://localhost.mine.svc:8265",
    f"http://{LONG}": f"http://{LONG}.mine.svc",
}
FOREIGN = [
    "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.1", "[::1]", "evil.mine", "evil.other.svc", "evil.com",
    "head.mine.svc.evil.com", "head.mine.svc.cluster.local.", "head.mine.svc.", "head..svc", ".mine.svc", "-head",
    "head-", "1head", "Head", "head_svc", f"{LONG}a", "a.b.mine.svc", "head.mine.svc.cluster", "mine.svc",
    "router.MINE.svc", "user@head.mine.svc", "head.mine.svc@evil.com", "evil.com#head.mine.svc", "he ad", "",
    "evil.com?head.mine.svc", "evil.com\\.mine.svc", "ʰead", "head\n.mine.svc", "head.mine.svc:", "head:0",
    "head:65536", "head:8000:9000", "head/../%2e", "[head]", "head%2emine",
]  # fmt: skip


@pytest.mark.parametrize("url", SERVICES)
def test_service_of_the_namespace_is_trusted(url: str) -> None:
    assert trusted_url(url, "mine", ()) == SERVICES[url]


@pytest.mark.parametrize("host", FOREIGN)
def test_every_other_host_is_rejected(host: str) -> None:
    for url in (f"http://{host}", f"http://{host}/path"):
        with pytest.raises(ValueError, match=r"expected|neither a Service of namespace mine"):
            trusted_url(url, "mine", ("10.0.0.9",))


@pytest.mark.parametrize("url", ["ftp://head", "//head", "head", "http:head", "http:///head", "HTTP://head"])
def test_other_schemes_are_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="expected http:// or https://"):
        trusted_url(url, "mine", ())


@pytest.mark.parametrize("host", ["10.0.0.9", "[fd00::9]", "ray.example.com"])
def test_host_of_the_settings_is_trusted(host: str) -> None:
    url = f"https://{host}:8265/ray"
    assert trusted_url(url, "mine", ("10.0.0.9", "fd00::9", "ray.example.com")) == url


@given(st.text(st.sampled_from("ab0x.-:/@#?\\%[]~_ svcmine"), max_size=30))
def test_accepted_url_names_a_service_of_the_namespace(rest: str) -> None:
    try:
        url = trusted_url(f"http://{rest}", "mine", ())
    except ValueError:
        return
    assert re.match(r"http://[a-z][-a-z0-9]*\.mine\.svc(\.cluster\.local)?(:\d+)?(/|$)", url)


@contextmanager
def catching() -> Iterator[tuple[int, list[str]]]:
    """Runs a server on this machine that notes the credentials it is sent."""
    caught: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            caught.append(self.headers.get("authorization", ""))
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            """Prints nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, caught
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1"])
def test_number_that_is_an_address_receives_no_token(host: str) -> None:
    with catching() as (port, caught):
        backend = Backend.model_validate({"serve": {"api": f"http://{host}:{port}", "url": f"http://{host}:{port}"}})
        with pytest.raises(RolloutError, match=r"spec\.backend: host"):
            serve_address(backend, "mine", RaySettings())
    assert not caught


@pytest.mark.parametrize("name", ["evil.com/", "evil.com?", "evil.com#", "user@evil", "a.b", "1reelway", "x" * 48, ""])
def test_name_of_a_ray_service_is_a_dns_label(name: str) -> None:
    """The operator's URL templates contain the name."""
    with pytest.raises(ValidationError):
        Backend.model_validate({"rayService": {"name": name}})


def test_ray_service_is_addressed_by_the_templates_of_the_settings() -> None:
    backend = Backend.model_validate({"rayService": {"name": "reelway"}})
    address = serve_address(backend, "mine", RaySettings(internal_url="http://{name}-router:8000"))
    assert address.serve_api == "http://reelway-head-svc.mine.svc:8265"
    assert address.internal_url == "http://reelway-router.mine.svc:8000"


@pytest.mark.parametrize("url", ["http://{name}.evil.com", "http://2130706433", "http://{name}.other.svc:8265"])
def test_template_to_another_host_needs_its_trust(url: str) -> None:
    with pytest.raises(ValidationError, match=r"dashboard_url: host .* is neither a Service"):
        RaySettings(dashboard_url=url)
    with pytest.raises(ValidationError, match="internal_url"):
        RaySettings(internal_url=url)


@pytest.mark.parametrize("field", ["api", "url"])
@pytest.mark.parametrize("url", ["http://user:pw@head", "http://head?x", "http://head/a b", "ftp://head", "http://"])
def test_endpoint_of_the_resource_is_a_plain_url(field: str, url: str) -> None:
    with pytest.raises(ValidationError):
        Backend.model_validate({"serve": {"api": "http://head", "url": "http://head", field: url}})


@pytest.mark.parametrize(
    "options",
    [("--ray-service", "evil.com/"), ("--serve-api", "http://user:pw@head:8265", "--serve-url", "http://router:8000")],
)
def test_command_names_a_wrong_backend(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeApiServer()
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    try:
        done = CliRunner().invoke(build_app(), ["rollout", "start", "3f9c" * 16, "-n", "test", *options])
    finally:
        server.close()
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("backend: ")
    assert options[1] in str(done.exception)
