"""The topics of an event log, and the address of each.

The address of an event log is a folder, whose SQLite files ``<topic>.db`` hold the topics, or
``kafka://host:port[,host:port][/prefix]``, whose topics have the names ``<prefix><topic>``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

from reelway.platform.errors import ConfigError
from reelway.platform.eventlog.addresses import KAFKA, open_event_log
from reelway.platform.eventlog.event_log import EventLog


class Topic(StrEnum):
    """A topic of the event log.

    ``exposures`` and ``outcomes`` are partitioned by viewer, both in the same way. ``catalogue`` holds the uploads and
    updates of videos, ``takedowns`` the takedowns and restorations of videos and creators; a compacted topic keeps the
    newest record of each key.
    """

    EXPOSURES = "exposures"
    OUTCOMES = "outcomes"
    CATALOGUE = "catalogue"
    TAKEDOWNS = "takedowns"


COMPACTED: Final = frozenset({Topic.CATALOGUE, Topic.TAKEDOWNS})
"""Topics that must keep the newest record of each key for ever. A SQLite file keeps all records."""
KEEP_ALL_S: Final = 1e9


def topic_address(events: str | Path, topic: Topic) -> str:
    """Returns the address of a topic, as ``open_event_log`` takes it.

    Args:
        events: address of the event log.

    Raises:
        ConfigError: if the address is invalid.
    """
    text = str(events)
    if not text.startswith(KAFKA):
        if "://" in text:
            raise ConfigError(f"event log {text!r}: expected a folder or kafka://host:port[/prefix]")
        return str(Path(text) / f"{topic}.db")
    servers, _, prefix = text.removeprefix(KAFKA).partition("/")
    if not servers or "/" in prefix:
        raise ConfigError(f"event log {text!r}: expected kafka://host:port[,host:port][/prefix]")
    return f"{KAFKA}{servers}/{prefix}{topic}"


def open_topic(events: str | Path, topic: Topic, clock: Callable[[], float] = time.time) -> EventLog:
    """Opens a topic of an event log. A missing SQLite file is created; a missing topic of Kafka is not.

    Args:
        events: address of the event log.
        topic: the topic.
        clock: Unix seconds, from which the records of a SQLite file get their times. Kafka's are those of its brokers.

    Raises:
        ConfigError: if the address or a setting is invalid.
        StorageError: if the topic cannot be opened.
    """
    address = topic_address(events, topic)
    if topic in COMPACTED and not address.startswith(KAFKA):
        from reelway.platform.eventlog.sqlite_log import SqliteLog

        return SqliteLog(Path(address), retain_s=KEEP_ALL_S, clock=clock)
    return open_event_log(address, clock)
