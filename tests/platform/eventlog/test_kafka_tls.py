"""The event log over TLS with client certificates, on a real broker."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.certificates import CertificateAuthority
from tests.support.eventlog.kafka_broker import BrokerTls, kafka_broker

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog import LogRecord, open_event_log
from reelway.platform.eventlog.addresses import SETTINGS_VARIABLE, TLS_PREFIX, client_settings

FILES = ("CA_FILE", "CERT_FILE", "KEY_FILE")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SETTINGS_VARIABLE, *(f"{TLS_PREFIX}_{file}" for file in FILES)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority(tmp_path / "certificates")


@pytest.mark.long
@pytest.mark.kafka
def test_log_is_used_with_a_client_certificate(
    tmp_path: Path, authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kafka"
    folder.mkdir()
    files = authority.issue("client")
    with kafka_broker(folder, BrokerTls(authority.issue("broker"), authority.ca)) as broker:
        topic = broker.topic(1)
        monkeypatch.setattr("reelway.platform.eventlog.kafka_log.REQUEST_TIMEOUT_S", 5.0)
        monkeypatch.setenv(f"{TLS_PREFIX}_CA_FILE", str(authority.ca))
        with pytest.raises(StorageError):  # the broker demands a client certificate
            open_event_log(f"kafka://{broker.tls_servers}/{topic}")
        monkeypatch.setenv(f"{TLS_PREFIX}_CERT_FILE", str(files.cert))
        monkeypatch.setenv(f"{TLS_PREFIX}_KEY_FILE", str(files.key))
        log = open_event_log(f"kafka://{broker.tls_servers}/{topic}")
        log.append([LogRecord("1", 0, b"over TLS")])
        [record] = log.read(log.offsets_at(0), limit=1, wait_s=10).records
        assert record.payload == b"over TLS"
        log.close()


def test_certificates_select_tls(authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{TLS_PREFIX}_CA_FILE", str(authority.ca))
    assert client_settings() == {"security.protocol": "ssl", "ssl.ca.location": str(authority.ca)}
    monkeypatch.setenv(SETTINGS_VARIABLE, "sasl.mechanism=PLAIN\nsasl.username=u")
    assert client_settings()["security.protocol"] == "sasl_ssl"
    monkeypatch.setenv(SETTINGS_VARIABLE, "security.protocol=sasl_plaintext")
    with pytest.raises(ConfigError, match=r"saw security\.protocol=sasl_plaintext .* expected ssl or sasl_ssl"):
        client_settings()


def test_unreadable_certificate_names_hop_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{TLS_PREFIX}_CA_FILE", str(tmp_path / "ca.crt"))
    with pytest.raises(ConfigError, match=f"Kafka: {tmp_path}/ca.crt: cannot load CA certificates"):
        client_settings()


def test_malformed_setting_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS_VARIABLE, "sasl.username=u\n\nsasl.password hunter2")
    with pytest.raises(ConfigError, match="REELWAY_KAFKA_SETTINGS, line 3: saw no name=value") as caught:
        client_settings()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", ["kafka://u:hunter2@kafka:9092/t", "redis://:hunter2@host"])
def test_address_with_credentials_is_rejected_without_showing_it(address: str) -> None:
    with pytest.raises(ConfigError, match="REELWAY_KAFKA_SETTINGS") as caught:
        open_event_log(address)
    assert "hunter2" not in str(caught.value)
