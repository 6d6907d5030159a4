"""Prometheus, Alertmanager and the webhook over TLS, with certificates that are renewed while clients run."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError
from tests.support.certificates import CertificateAuthority
from tests.support.rollout.series_fixtures import state_of
from tests.support.rollout.servers import WebTls, alertmanager, eventually, free_address, prometheus

from reelway.platform.errors import ConfigError, RolloutError
from reelway.platform.rollout.alerts import KnownAlert, Relevance
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.controller_settings import (
    AlertmanagerSettings,
    PrometheusSettings,
    WebhookSettings,
)
from reelway.platform.rollout.control.webhook import ALERTS_PATH, serve_in_thread, webhook_application
from reelway.platform.rollout.sources.prometheus_reader import PrometheusReader
from reelway.platform.rollout.sources.series_reader import Scope
from reelway.platform.tls import ServerCertificate, is_local_name

TOKEN = "webhook-token"


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority(tmp_path / "certificates")


@pytest.fixture
def tls(authority: CertificateAuthority) -> WebTls:
    return WebTls(authority.issue("server"), authority.issue("client"), authority.ca)


def files_of(tls: WebTls) -> dict[str, Path]:
    return {"ca_file": tls.ca, "cert_file": tls.client.cert, "key_file": tls.client.key}


class Deliveries:
    """Keeps what the webhook delivers."""

    def __init__(self) -> None:
        self.received: list[KnownAlert] = []
        self.arrived = threading.Event()

    def relevance(self) -> Relevance:
        return bool

    def deliver(self, news: Iterator[KnownAlert], /) -> bool:
        self.received += news
        self.arrived.set()
        return True


def test_prometheus_is_read_with_a_renewed_client_certificate(
    tmp_path: Path, authority: CertificateAuthority, tls: WebTls
) -> None:
    scope = Scope.of(state_of())
    (tmp_path / "server").mkdir()
    with prometheus(tmp_path / "server", alertmanager=free_address(), tls=tls) as server:
        settings = PrometheusSettings(url=server.url, **files_of(tls))
        with closing(PrometheusReader(server.url, access=settings.access())) as reader:
            assert reader.read(scope, time.time()).problem == ""
            authority.issue("client")
            assert reader.read(scope, time.time()).problem == ""
            tls.client.key.write_text("half a file")
            problem = reader.read(scope, time.time()).problem
            assert f"prometheus: {tls.client.cert} with {tls.client.key}: cannot load the certificate" in problem
            authority.issue("client")
            assert reader.read(scope, time.time()).problem == ""
        anonymous = PrometheusSettings(url=server.url, ca_file=tls.ca).access()
        with closing(PrometheusReader(server.url, access=anonymous)) as reader:
            assert "SSL" in reader.read(scope, time.time()).problem


def test_server_name_is_verified_instead_of_the_host(tmp_path: Path, authority: CertificateAuthority) -> None:
    scope = Scope.of(state_of())
    (tmp_path / "server").mkdir()
    tls = WebTls(authority.issue("server"), authority.issue("client"), authority.ca)
    with prometheus(tmp_path / "server", alertmanager=free_address(), tls=tls) as server:
        authority.issue("server", hosts=("prometheus.test",))  # read at the next handshake
        for name, problem in (
            ("prometheus.test", ""),
            ("", "IP address mismatch"),
            ("other.test", "Hostname mismatch"),
        ):
            settings = PrometheusSettings(url=server.url, server_name=name, **files_of(tls))
            with closing(PrometheusReader(server.url, access=settings.access())) as reader:
                found = reader.read(scope, time.time()).problem
                assert problem in found
                assert bool(problem) == bool(found)


def test_alertmanager_and_webhook_exchange_alerts_over_tls(tmp_path: Path, tls: WebTls) -> None:
    deliveries, metrics = Deliveries(), ControllerMetrics()
    webhook = WebhookSettings(cert_file=tls.server.cert, key_file=tls.server.key)
    application = webhook_application(deliveries, lambda: None, TOKEN, metrics)
    (tmp_path / "server").mkdir()
    ends = datetime.now(UTC) + timedelta(minutes=5)
    alert = {"labels": {"alertname": "A", "release": "abc"}, "endsAt": ends.isoformat()}
    with (
        serve_in_thread(application, "127.0.0.1", 0, webhook.certificate()) as url,
        alertmanager(tmp_path / "server", free_address(), url + ALERTS_PATH, TOKEN, tls) as manager,
    ):
        assert url.startswith("https://")
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https://", "http://") + "/healthz", trust_env=False)
        client = httpx.Client(verify=tls.context(), trust_env=False)
        client.post(f"{manager.url}/api/v2/alerts", json=[alert]).raise_for_status()
        assert deliveries.arrived.wait(15)
        assert dict(deliveries.received[0].labels)["release"] == "abc"
        with closing(AlertmanagerSettings(url=manager.url, **files_of(tls)).source()) as source:
            [polled] = eventually(lambda: source.poll(bool).alerts)
        assert dict(polled.labels)["alertname"] == "A"
        with (
            closing(AlertmanagerSettings(url=manager.url, ca_file=tls.ca).source()) as anonymous,
            pytest.raises(RolloutError, match=r"SSL.*certificate"),
        ):
            anonymous.poll(bool)
        client.close()


def serial_of(url: str, ca: Path) -> int:
    """Serial number of the certificate in a new handshake."""
    host, _, port = url.removeprefix("https://").rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        return int(str(secured.getpeercert()["serialNumber"]), 16)


def test_webhook_uses_a_renewed_certificate(authority: CertificateAuthority, caplog: pytest.LogCaptureFixture) -> None:
    files = authority.issue("webhook")
    application = webhook_application(Deliveries(), lambda: None, TOKEN, ControllerMetrics())
    with serve_in_thread(application, "127.0.0.1", 0, ServerCertificate(*files)) as url:
        first = serial_of(url, authority.ca)
        assert serial_of(url, authority.ca) == first
        authority.issue("webhook")
        second = serial_of(url, authority.ca)
        assert second != first
        files.cert.write_text("half a file")
        with caplog.at_level(logging.ERROR):
            assert serial_of(url, authority.ca) == second
        assert f"certificate not renewed: webhook: {files.cert} with {files.key}: cannot load" in caplog.text
        authority.issue("webhook")
        assert serial_of(url, authority.ca) not in (first, second)


@pytest.mark.parametrize("broken", ["missing", "foreign"])
def test_webhook_does_not_start_without_its_certificate(authority: CertificateAuthority, broken: str) -> None:
    files, other = authority.issue("webhook"), authority.issue("other")
    if broken == "missing":
        files.key.unlink()
    else:
        files.key.write_bytes(other.key.read_bytes())
    application = webhook_application(Deliveries(), lambda: None, TOKEN, ControllerMetrics())
    with (
        pytest.raises(ConfigError, match=f"webhook: .*{files.key}"),
        serve_in_thread(application, "127.0.0.1", 0, ServerCertificate(*files)),
    ):
        pass


@pytest.mark.parametrize("settings", [PrometheusSettings, AlertmanagerSettings])
def test_token_is_not_sent_in_clear_text_out_of_the_cluster(settings: type[PrometheusSettings], tmp_path: Path) -> None:
    token = tmp_path / "token"
    for url in ("http://prometheus.example.com:9090", "http://10.1.2.3", "http://prometheus.monitoring"):
        with pytest.raises(ValidationError, match=r"expected https://.*NAME\.NAMESPACE\.svc"):
            settings(url=url, token_file=token)
        settings(url=url)
    for url in ("https://prometheus.example.com", "http://prometheus.monitoring.svc:9090", "http://[::1]:9090"):
        settings(url=url, token_file=token)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("127.0.0.1", True), ("::1", True), ("prometheus", True), ("a.b.svc", True),
        ("a.b.svc.cluster.local.", True), ("10.0.0.1", False), ("2130706433", False), ("0x7f000001", False),
        ("a.b", False), ("evil-svc", True), ("evilsvc.com", False), ("a.svc.evil.com", False), ("fd00::1", False),
        ("127.evil.com", False), ("svc", True), ("x.svc", False), ("pod-0.a.b.svc", True), ("", False),
    ],
)  # fmt: skip
def test_local_names_are_those_of_machine_and_cluster(host: str, local: bool) -> None:
    assert is_local_name(host) is local


@pytest.mark.parametrize("given", ["cert_file", "key_file"])
@pytest.mark.parametrize("settings", [PrometheusSettings, WebhookSettings])
def test_certificate_without_its_key_is_rejected(settings: type[PrometheusSettings], given: str) -> None:
    with pytest.raises(ValidationError, match="expected both"):
        settings(**{given: Path("/a")})
