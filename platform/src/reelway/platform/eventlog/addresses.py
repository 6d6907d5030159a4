"""Event log addresses: a path, or ``kafka://host:port[,host:port]/topic``. An address contains no secret."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from reelway.platform.errors import ConfigError
from reelway.platform.eventlog.event_log import EventLog
from reelway.platform.retention import HOUR_S, retention

KAFKA: Final = "kafka://"
SETTINGS_VARIABLE: Final = "REELWAY_KAFKA_SETTINGS"
"""Environment variable with more settings of librdkafka, such as credentials: lines of ``name=value``."""


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
    """Returns the settings of librdkafka in the environment.

    Raises:
        ConfigError: if they are not lines of ``name=value``.
    """
    settings = {}
    lines = os.environ.get(SETTINGS_VARIABLE, "").splitlines()
    for line in filter(None, (line.strip() for line in lines)):
        name, separator, value = line.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"{SETTINGS_VARIABLE}: saw {name[:40]!r}, expected lines of name=value")
        settings[name.strip()] = value.strip()
    return settings
