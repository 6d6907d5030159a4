"""Requests for the overlay of a release: which releases are served, and what a listing reads."""

from __future__ import annotations

from pathlib import Path

from reelway.platform.eventlog.upload_overlay import (
    OLD_REQUEST_INTERVAL_S,
    OLD_REQUEST_S,
    REQUEST_VALID_S,
    OverlayRequests,
)

NOW_S = 1_700_000_000.0


class CountedRequests(OverlayRequests):
    """Notes which requests are read."""

    def __init__(self, overlay: Path) -> None:
        super().__init__(overlay)
        self.read: list[str] = []

    def _requested_at_s(self, release: str) -> float:
        self.read.append(release)
        return super()._requested_at_s(release)


def test_listing_reads_the_requests_of_releases_only(tmp_path: Path) -> None:
    requests = CountedRequests(tmp_path)
    assert requests.served(NOW_S) == []
    requests.request("a" * 64, NOW_S)
    requests.request("b" * 64, NOW_S - REQUEST_VALID_S)
    for name in ("lists.arrow", "change-000001.arrow", ".writer.lock"):
        (tmp_path / name).write_bytes(b"")
    assert requests.served(NOW_S) == ["a" * 64]
    assert sorted(requests.read) == ["a" * 64, "b" * 64]


def test_old_request_is_read_again_once_per_interval(tmp_path: Path) -> None:
    requests, release = CountedRequests(tmp_path), "a" * 64
    requests.request(release, NOW_S - OLD_REQUEST_S - 1)
    for second in range(int(OLD_REQUEST_INTERVAL_S)):
        assert requests.served(NOW_S + second) == []
    assert requests.read == [release]
    requests.request(release, NOW_S)
    assert requests.served(NOW_S + OLD_REQUEST_INTERVAL_S) == [release]
    assert requests.served(NOW_S + OLD_REQUEST_INTERVAL_S + 1) == [release]


def test_folder_without_a_request_is_looked_at_every_time(tmp_path: Path) -> None:
    requests, release = CountedRequests(tmp_path), "a" * 64
    (tmp_path / release).mkdir()
    assert requests.served(NOW_S) == []
    requests.request(release, NOW_S)
    assert requests.served(NOW_S + 1) == [release]
