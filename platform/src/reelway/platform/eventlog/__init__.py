"""What happened, kept in order until everybody who needs it has read it: append, read, commit.

::

    outcomes (serving) ─ append ─► event log ─ read, commit ─► stream processor (pipelines)

An append that returned is on disk and is never lost; one that raised may be there or not, so it is sent again. A
reader is handed records at least once, knows by the ids in them what it had before, and keeps its position where it
keeps its results. Here the log is a SQLite file, on a cluster Kafka; nothing else differs.
"""

from reelway.platform.eventlog.addresses import open_event_log
from reelway.platform.eventlog.log import EventLog, LogRecord, Position, ReadBatch, StoredRecord

__all__ = ["EventLog", "LogRecord", "Position", "ReadBatch", "StoredRecord", "open_event_log"]
