"""Row-level feature parity: recomputes what was served from the data set and the event log, and compares every value.

::

    vector log ─► replay ─► comparison ─► findings ─► the rollout's guardrail
                    │
                    ├─ event copy ─► versions of impressions ─┐
                    ├─ labels of the data set ────────────────┴─► rows of the views (``features.views``)
                    └─ upload copy ─► content of uploaded videos

The rows are computed by the batch job's functions from what was known at the time that the served row states, never by
the stream. A replay continues where the last one ended.
"""
