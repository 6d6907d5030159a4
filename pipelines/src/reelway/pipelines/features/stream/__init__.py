"""Streaming features: computes the batch job's features from the event log as it grows.

::

    exposures ─┐
               ├─► viewer half ─► rows of viewers ─► Feast's online store
    outcomes ──┘        │
                        └─► cells ─► video half ─► rows of videos ─► changelog ─► the video table's overlay

**Values.** The row of an entity at a given time equals the row that the batch job would write from everything known by
that time. Labels, grid points and arithmetic (``features.views``) are those of the batch job. A row is written once and
never revised. Rows older than a view's TTL become nulls, as in the point-in-time join.

**Time** is the log's time: an event counts from its record's append. No clock of a reader or a client matters, so a
replay computes the same rows. If the data set ended long ago, the stream's time continues from the end of the data set
(``StreamRules.behind_us``).

**Impressions** are known by their exposure or by their first outcome, whichever is in the log first. An impression
without outcomes counts as one that the viewer ignored.

**Hosts.** The halves (``viewer_task``, ``video_task``) read and write a small key-value store (``keyed_store``). On one
machine ``local_stream`` runs both over one SQLite file. On a cluster ``quix_stream`` runs both on Quix Streams.
"""
