"""One text that says which event log: a path, or ``kafka://host:port[,host:port]/topic``. Nothing secret is in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from reelway.platform.errors import ConfigError
from reelway.platform.eventlog.log import EventLog

KAFKA: Final = "kafka://"
SETTINGS_VARIABLE: Final = "REELWAY_KAFKA_SETTINGS"
"""Environment variable with further settings of librdkafka, ``name=value`` lines: security, credentials."""


def open_event_log(address: str | Path) -> EventLog:
    """The log at the address; a SQLite file is made when absent, a topic is not.

    Raises:
        ConfigError: not an address, or a setting that is not one.
        StorageError: it cannot be opened.
    """
    text = str(address)
    if not text.startswith(KAFKA):
        if "://" in text:
            raise ConfigError(f"event log {text!r}: expected a path or kafka://host:port/topic")
        from reelway.platform.eventlog.sqlite_log import SqliteLog

        return SqliteLog(Path(text))
    servers, _, topic = text.removeprefix(KAFKA).partition("/")
    if not servers or not topic or "/" in topic:
        raise ConfigError(f"event log {text!r}: expected kafka://host:port[,host:port]/topic")
    from reelway.platform.eventlog.kafka_log import KafkaLog

    return KafkaLog(servers, topic, _settings(os.environ.get(SETTINGS_VARIABLE, "")))


def _settings(text: str) -> dict[str, Any]:
    settings = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, separator, value = line.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"{SETTINGS_VARIABLE}: saw {name[:40]!r}, expected lines of name=value")
        settings[name.strip()] = value.strip()
    return settings
