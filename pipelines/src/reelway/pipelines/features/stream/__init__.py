"""Features from the event log as it grows: what the batch job computes, moment by moment.

::

    event log ─► processor ─► engine ─► state (SQLite: cells per entity, position, outbox; one transaction)
                                 │
                                 └─► rows: viewer views ─► Feast's online store
                                           video views  ─► changelog ─► the video table's overlay

**What a row says.** The row of an entity at a moment is the one that the batch job would write over everything known
by that moment: same labels, same points of the same grids, same arithmetic (``features.views``). It is written once
and never taken back; an outcome that comes later counts from when it came. Rows older than a view's TTL become nulls,
as in the point-in-time join.

**Time** is the log's: an outcome counts from when the service heard of it, late by at most the allowed lateness;
later ones count from when they are read, and are counted. A data set that ended long ago goes on from its own end:
the days in between did not happen (``behind``).

**An impression is known by its outcomes.** One that nobody answered is not in the log and counts nowhere here.
"""
