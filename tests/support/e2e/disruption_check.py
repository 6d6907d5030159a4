"""Checks that an operation fails no request and neither restarts nor replaces a pod."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.e2e.shared_installation import SharedInstallation


@dataclass
class DisruptionReport:
    """Requests during the block. The fields are set when the block ends."""

    began: float
    ended: float = 0.0
    requests: int = 0
    failed: int = 0


@contextmanager
def expect_no_disruption(shared: SharedInstallation, operation: str, *components: str) -> Iterator[DisruptionReport]:
    """Fails if a request fails, or a pod of these components (default: all) is restarted or replaced in the block."""
    before, report = shared.installation.pods(*components), DisruptionReport(shared.load.now())
    yield report
    report.ended = shared.load.now()
    rows = shared.load.settled(since=report.began, before=report.ended)
    failures = rows[rows["status"] != 200]
    report.requests, report.failed = len(rows), len(failures)
    restarted = _changed(before, shared.installation.pods(*components))
    shared.note(
        f"{operation}: failed requests of {len(rows)}", float(len(failures)), "requests", "0", not len(failures)
    )
    shared.note(f"{operation}: pods restarted or replaced", float(len(restarted)), "pods", "0", not restarted)
    examples = [
        (float(r["sent"] - report.began), int(r["status"]), float(r["done"] - r["sent"])) for r in failures[:10]
    ]
    assert not len(failures), (
        f"{operation}: (s after the start, status, duration in s) {examples}; {shared.load.last_log_lines()}"
    )
    assert not restarted, f"{operation}: {restarted}"
    assert len(rows) >= 0.5 * shared.load.rate * (report.ended - report.began), (
        f"{operation}: only {len(rows)} were sent"
    )


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
