"""Checks that an operation fails no request and neither restarts nor replaces a pod."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.e2e.flow import Flow


@dataclass
class DisruptionReport:
    """Requests during the block; filled when the block is left."""

    began: float
    ended: float = 0.0
    requests: int = 0
    failed: int = 0


@contextmanager
def expect_no_disruption(flow: Flow, what: str, *components: str) -> Iterator[DisruptionReport]:
    """Fails if a request fails, or a pod of these components (default: all) is restarted or replaced in the block."""
    before, watched = flow.installation.pods(*components), DisruptionReport(flow.load.now())
    yield watched
    watched.ended = flow.load.now()
    rows = flow.load.settled(since=watched.began, before=watched.ended)
    failures = rows[rows["status"] != 200]
    watched.requests, watched.failed = len(rows), len(failures)
    restarted = _changed(before, flow.installation.pods(*components))
    flow.note(f"{what}: failed requests of {len(rows)}", float(len(failures)), "requests", "0", not len(failures))
    flow.note(f"{what}: pods restarted or replaced", float(len(restarted)), "pods", "0", not restarted)
    some = [(float(r["sent"] - watched.began), int(r["status"]), float(r["done"] - r["sent"])) for r in failures[:10]]
    assert not len(failures), f"{what}: (s after the start, status, duration in s) {some}; {flow.load.last_words()}"
    assert not restarted, f"{what}: {restarted}"
    assert len(rows) >= 0.5 * flow.load.rate * (watched.ended - watched.began), f"{what}: only {len(rows)} were sent"


def _changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
