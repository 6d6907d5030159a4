"""Event log addresses: a path, or ``kafka://host:port[,host:port]/topic``. An address contains no secret."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from reelway.platform.errors import ConfigError
from reelway.platform.eventlog.event_log import EventLog
from reelway.platform.retention import HOUR_S, retention
from reelway.platform.tls import TlsSettings

KAFKA: Final = "kafka://"
SETTINGS_VARIABLE: Final = "REELWAY_KAFKA_SETTINGS"
"""Environment variable with more settings of librdkafka, such as credentials: lines of ``name=value``."""
TLS_PREFIX: Final = "REELWAY_KAFKA"
"""Prefix of ``_CA_FILE``, ``_CERT_FILE`` and ``_KEY_FILE``, which select TLS."""


def open_event_log(address: str | Path, clock: Callable[[], float] = time.time) -> EventLog:
    """Opens the log at an address. A missing SQLite file is created; a missing topic is not.

    Args:
        address: see the module docstring.
        clock: Unix seconds, from which the records of a SQLite file get their times.

    Raises:
        ConfigError: if the address or a setting is invalid.
        StorageError: if the log cannot be opened.
    """
    text = str(address)
    if "://" in text and "@" in text:  # the address is not shown, because it may contain a password
        raise ConfigError(
            f"event log: saw credentials in the address, expected {KAFKA}host:port/topic; put them into "
            f"{SETTINGS_VARIABLE} (sasl.username, sasl.password)"
        )
    if not text.startswith(KAFKA):
        if "://" in text:
            raise ConfigError(f"event log {text!r}: expected a path or kafka://host:port/topic")
        from reelway.platform.eventlog.sqlite_log import SqliteLog

        return SqliteLog(Path(text), retain_s=retention().event_hours * HOUR_S, clock=clock)
    servers, _, topic = text.removeprefix(KAFKA).partition("/")
    if not servers or not topic or "/" in topic:
        raise ConfigError(f"event log {text!r}: expected kafka://host:port[,host:port]/topic")
    from reelway.platform.eventlog.kafka_log import KafkaLog

    return KafkaLog(servers, topic, client_settings())


def client_settings() -> dict[str, Any]:
    """Returns the settings of librdkafka in the environment, with TLS if certificate files are set.

    Raises:
        ConfigError: if they are not lines of ``name=value``, a certificate file cannot be read, or the settings select
            a connection without TLS although certificate files are set.
    """
    settings = {}
    for number, line in enumerate(os.environ.get(SETTINGS_VARIABLE, "").splitlines(), 1):
        name, separator, value = line.partition("=")
        if not line.strip():
            continue
        if not separator or not name.strip():  # the line is not shown, because it may contain a password
            raise ConfigError(f"{SETTINGS_VARIABLE}, line {number}: saw no name=value; write one setting per line")
        settings[name.strip()] = value.strip()
    tls = TlsSettings.from_environment(TLS_PREFIX)
    return {**_tls_settings(tls, settings), **settings} if tls.files else settings


def _tls_settings(tls: TlsSettings, settings: Mapping[str, Any]) -> dict[str, Any]:
    protocol = settings.get("security.protocol", "")
    if protocol and not protocol.lower().endswith("ssl"):
        raise ConfigError(
            f"Kafka: saw security.protocol={protocol} in {SETTINGS_VARIABLE} with {TLS_PREFIX}_CA_FILE or "
            f"{TLS_PREFIX}_CERT_FILE, expected ssl or sasl_ssl; remove one of them"
        )
    tls.client_context("Kafka")  # names a file that cannot be used
    named = {
        "ssl.ca.location": tls.ca_file,
        "ssl.certificate.location": tls.cert_file,
        "ssl.key.location": tls.key_file,
    }
    sasl = any(name.startswith("sasl.") for name in settings)
    found = {name: str(path) for name, path in named.items() if path is not None}
    return {"security.protocol": "sasl_ssl" if sasl else "ssl", **found}
