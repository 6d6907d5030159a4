"""A shared Prometheus and Alertmanager: tokens, certificates, and canaries of other namespaces."""

from __future__ import annotations

import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.support.rollout.exporter import Exporter
from tests.support.rollout.observed_rollout import QUICK
from tests.support.rollout.series_fixtures import CANARY, ROLLOUT, STABLE, state_of, sums
from tests.support.rollout.servers import alertmanager, eventually, free_address, prometheus

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ConfigError, RolloutError
from reelway.platform.rollout.alerts import PolledAlerts
from reelway.platform.rollout.evidence import EvidenceSnapshot, EvidenceState
from reelway.platform.rollout.policy import Slice
from reelway.platform.rollout.sources.alertmanager import AlertmanagerClient
from reelway.platform.rollout.sources.monitoring_access import MonitoringAccess
from reelway.platform.rollout.sources.parity_findings import ParityFindings
from reelway.platform.rollout.sources.prometheus_reader import PrometheusReader
from reelway.platform.rollout.sources.series_reader import Scope
from reelway.platform.rollout.sources.snapshot import build_snapshot
from reelway.platform.tls import TlsSettings

TOKEN = "a-token-of-a-service-account"


@pytest.fixture
def prod() -> Iterator[Exporter]:
    exporter = Exporter(CANARY[:12], STABLE[:12])
    yield exporter
    exporter.stop()


@pytest.fixture
def staging() -> Iterator[Exporter]:
    exporter = Exporter(CANARY[:12], STABLE[:12])
    yield exporter
    exporter.stop()


def test_installations_in_one_prometheus_do_not_mix(prod: Exporter, staging: Exporter, tmp_path: Path) -> None:
    started_at = time.time()
    state = state_of(started_at=started_at, changed_at=started_at)

    def evidence_of(namespace: str) -> EvidenceSnapshot:
        access = MonitoringAccess(labels={"namespace": namespace})
        with closing(PrometheusReader(server.url, access=access)) as reader:
            now = time.time()
            return build_snapshot(QUICK, state, reader.read(Scope.of(state), now), ParityFindings(), now)

    def errors(snapshot: EvidenceSnapshot) -> tuple[EvidenceState, float, float]:
        reading = snapshot.guardrails["error_ratio"]
        return reading.state, reading.events, reading.trials

    targets = (f"prod/{prod.address}", f"staging/{staging.address}")
    with prometheus(tmp_path, *targets, alertmanager=free_address()) as server:
        eventually(
            lambda: errors(evidence_of("prod"))[0] is errors(evidence_of("staging"))[0] is EvidenceState.INSUFFICIENT
        )
        prod.count(Arm.CANARY, times=50)
        staging.count(Arm.CANARY, "failed", 40)
        for exporter, viewers in ((prod, 100), (staging, 60)):
            for arm in (Arm.CANARY, Arm.STABLE):
                exporter.sums.values |= sums(arm, viewers, rollout=ROLLOUT)
        eventually(lambda: errors(evidence_of("prod")) == (EvidenceState.OK, 0, 50))
        eventually(lambda: errors(evidence_of("staging")) == (EvidenceState.OK, 40, 40))
        metric = ("long_watch_rate", Slice.OVERALL)
        eventually(
            lambda: [evidence_of(each).metrics[metric].canary.viewers for each in ("prod", "staging")] == [100, 60]
        )
        staging.stop()
        try:
            eventually(lambda: errors(evidence_of("staging"))[0] is EvidenceState.TELEMETRY_DOWN)
            assert errors(evidence_of("prod")) == (EvidenceState.OK, 0, 50)
            assert errors(evidence_of("another"))[0] is EvidenceState.TELEMETRY_DOWN
        finally:
            staging.start_again()


def test_target_that_is_scraped_twice_is_never_added_up(prod: Exporter, tmp_path: Path) -> None:
    """The same exporter with the labels of two replicas of Prometheus, without deduplication."""
    started_at = time.time()
    state = state_of(started_at=started_at, changed_at=started_at)

    def evidence(**labels: str) -> EvidenceSnapshot:
        with closing(PrometheusReader(server.url, access=MonitoringAccess(labels=labels))) as reader:
            now = time.time()
            return build_snapshot(QUICK, state, reader.read(Scope.of(state), now), ParityFindings(), now)

    def twice() -> bool:
        """Both jobs are refused. Two scrapes of each target are needed: one of each could be a change of labels."""
        read = evidence()
        states = {each.state for each in (*read.metrics.values(), read.guardrails["error_ratio"])}
        return states == {EvidenceState.TELEMETRY_DOWN}

    with prometheus(tmp_path, f"a/{prod.address}", f"b/{prod.address}", alertmanager=free_address()) as server:
        eventually(lambda: evidence(namespace="a").guardrails["error_ratio"].state is EvidenceState.INSUFFICIENT)
        prod.count(Arm.CANARY, times=50)
        for arm in (Arm.CANARY, Arm.STABLE):
            prod.sums.values |= sums(arm, 100, rollout=ROLLOUT)
        one = eventually(lambda: s if (s := evidence(namespace="a")).guardrails["error_ratio"].trials == 50 else None)
        metric = ("long_watch_rate", Slice.OVERALL)
        eventually(lambda: evidence(namespace="a").metrics[metric].canary.viewers == 100)
        eventually(twice)
        both = evidence()
    assert one.guardrails["error_ratio"].state is EvidenceState.OK
    assert {each.state for each in both.metrics.values()} == {EvidenceState.TELEMETRY_DOWN}
    detail = both.guardrails["error_ratio"].detail
    assert f"reelway-router at {prod.address} is in Prometheus twice (namespace 'a' and 'b')" in detail.replace(
        "'b' and 'a'", "'a' and 'b'"
    )


def test_poll_leaves_out_alerts_of_another_namespace(tmp_path: Path) -> None:
    address = free_address()
    ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    with (
        alertmanager(tmp_path, address, "http://127.0.0.1:9/", TOKEN) as server,
        closing(AlertmanagerClient(server.url, access=MonitoringAccess(labels={"namespace": "prod.eu"}))) as ours,
        closing(AlertmanagerClient(server.url)) as unfiltered,
    ):
        labels = [{"namespace": "prod.eu"}, {"namespace": "prodxeu"}, {"namespace": "staging"}, {}]
        alerts = [
            {"labels": {"alertname": f"A{i}", "release": "c" * 12, **more}, "endsAt": ends}
            for i, more in enumerate(labels)
        ]
        httpx.post(f"{server.url}/api/v2/alerts", json=alerts, trust_env=False).raise_for_status()
        eventually(lambda: len(unfiltered.poll(bool).alerts) == 4)
        assert {dict(alert.labels)["alertname"] for alert in ours.poll(bool).alerts} == {"A0", "A3"}


# TLS with a certificate of a private CA, and a bearer token


@dataclass
class TlsServer:
    """Answers requests that carry the token with an empty result, over TLS."""

    certificate: Path
    token: str = TOKEN
    url: str = ""
    refused: int = 0
    redirect: str = ""
    authorizations: list[str] = field(default_factory=list)


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[TlsServer]:
    certificate, key = _self_signed(tmp_path)
    tls_server = TlsServer(certificate)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            authorization = self.headers.get("Authorization", "")
            tls_server.authorizations.append(authorization)
            status = 200 if authorization == f"Bearer {tls_server.token}" else 401
            if tls_server.redirect:
                status = 302
            kind, result = "vector" if "%5B" not in self.path else "matrix", list[object]()
            if "time%28%29" in self.path:
                kind, result = "scalar", [1.0, "1.0"]
            body = json.dumps(
                [] if "/v2/" in self.path else {"status": "success", "data": {"resultType": kind, "result": result}}
            )
            self.send_response(status)
            if tls_server.redirect:
                self.send_header("Location", tls_server.redirect)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    tls_server.url = f"https://127.0.0.1:{server.server_address[1]}"
    yield tls_server
    server.shutdown()
    server.server_close()
    thread.join()


def test_token_is_read_on_every_request(tls_server: TlsServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    access = MonitoringAccess(TlsSettings(token_file=token, ca_file=tls_server.certificate))
    with closing(PrometheusReader(tls_server.url, access=access)) as reader:
        scope = Scope.of(state_of())
        assert reader.read(scope, 1.0).problem == ""
        tls_server.token = "renewed"
        assert "answered 401" in reader.read(scope, 1.0).problem
        token.write_text("renewed")
        assert reader.read(scope, 1.0).problem == ""
        token.unlink()
        assert f"{token}: cannot read the token for 127.0.0.1" in reader.read(scope, 1.0).problem
        token.write_text("")
        assert f"{token}: no token for 127.0.0.1" in reader.read(scope, 1.0).problem
    token.write_text("renewed")
    with closing(
        PrometheusReader(tls_server.url, access=MonitoringAccess(TlsSettings(token_file=token)))
    ) as without_certificate:
        assert "CERTIFICATE_VERIFY_FAILED" in without_certificate.read(scope, 1.0).problem


def test_alertmanager_requests_carry_the_token(tls_server: TlsServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with closing(
        AlertmanagerClient(
            tls_server.url, access=MonitoringAccess(TlsSettings(token_file=token, ca_file=tls_server.certificate))
        )
    ) as poll:
        assert poll.poll(bool) == PolledAlerts(())
        token.unlink()
        with pytest.raises(RolloutError, match="cannot read the token"):
            poll.poll(bool)
    with (
        closing(
            AlertmanagerClient(tls_server.url, access=MonitoringAccess(TlsSettings(ca_file=tls_server.certificate)))
        ) as bare,
        pytest.raises(RolloutError, match="401"),
    ):
        bare.poll(bool)


def test_token_does_not_follow_a_redirect(tls_server: TlsServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    tls_server.redirect = f"{tls_server.url}/elsewhere"
    with closing(
        PrometheusReader(
            tls_server.url,
            access=MonitoringAccess(TlsSettings(token_file=tmp_path / "token", ca_file=tls_server.certificate)),
        )
    ) as reader:
        assert "302" in reader.read(Scope.of(state_of()), 1.0).problem
    assert len(tls_server.authorizations) == 1


@pytest.mark.parametrize("text", [None, "", "not a certificate"])
def test_invalid_certificate_file_is_rejected_at_startup(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ca.crt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path}: cannot load CA certificates"):
        MonitoringAccess(TlsSettings(ca_file=path))


def _self_signed(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "monitoring")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "door.crt", folder / "door.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
