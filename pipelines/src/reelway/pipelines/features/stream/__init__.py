"""Streaming features: computes the batch job's features from the event log as it grows.

::

    event log ─► processor ─► engine ─► state (SQLite: buckets per entity, position, outbox; one transaction)
                                 │
                                 └─► rows: viewer views ─► Feast's online store
                                           video views  ─► changelog ─► the video table's overlay

**Values.** The row of an entity at a given time equals the row that the batch job would write from everything known by
that time. Labels, grid points and arithmetic (``features.views``) are those of the batch job. A row is written once and
never revised; a later outcome counts from its arrival. Rows older than a view's TTL become nulls, as in the
point-in-time join.

**Time** is the log's time. An outcome counts from when the outcomes service received it, if it reaches the log within
the allowed lateness. A later outcome counts from when it is read, and a metric counts it. If the data set ended long
ago, the stream's time continues from the end of the data set (``StreamProcessor.behind_us``).

**Impressions are known only by their outcomes.** An impression without outcomes is not in the log and counts nowhere
here.
"""
