"""The event log: append and read. It keeps events in order for as long as its retention says.

::

    outcomes (serving) ─ append ─► event log ─ read ─► stream processor (pipelines)

An append that returned is durable. An append that raised may or may not be in the log, so it is sent again. Delivery is
at least once: a consumer recognises repeated records by the ids in them, and stores its offsets with its results. The
log gives each record the time at which it is appended. In local mode the log is a SQLite file, on a cluster a Kafka
topic.
"""

from reelway.platform.eventlog.addresses import open_event_log
from reelway.platform.eventlog.event_log import EventLog, LogRecord, Offsets, ReadBatch, StoredRecord

__all__ = ["EventLog", "LogRecord", "Offsets", "ReadBatch", "StoredRecord", "open_event_log"]
