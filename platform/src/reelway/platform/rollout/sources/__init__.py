"""Sources of evidence and alerts: direct scrapes of the service, Prometheus, Alertmanager and parity findings."""

from __future__ import annotations

from collections.abc import Callable

from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.sources.alertmanager import AlertmanagerClient
from reelway.platform.rollout.sources.direct_scrape import DirectScrapeReader, internal_url
from reelway.platform.rollout.sources.monitoring_access import MonitoringAccess
from reelway.platform.rollout.sources.parity_findings import ParityFindings, read_parity
from reelway.platform.rollout.sources.prometheus_reader import PrometheusReader
from reelway.platform.rollout.sources.series_reader import WINDOW_S, Scope, SeriesReader
from reelway.platform.rollout.sources.snapshot import build_snapshot
from reelway.platform.rollout.state import RolloutState
from reelway.platform.run_directory import RunDirectory

__all__ = ["MonitoringAccess", "SeriesEvidenceSource", "alert_source", "evidence_source"]


class SeriesEvidenceSource:
    """An ``EvidenceSource`` from a series reader and the parity findings.

    Args:
        parity: returns the current findings without blocking; raises nothing.
    """

    def __init__(self, reader: SeriesReader, parity: Callable[[], ParityFindings], window_s: float = WINDOW_S) -> None:
        self._reader = reader
        self._parity = parity
        self._window_s = window_s

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        """See ``EvidenceSource.fetch``. What cannot be read is ``telemetry_down``; no exception is raised."""
        read_result = self._reader.read(Scope.of(state, self._window_s), now)
        return build_snapshot(policy, state, read_result, self._parity(), now, window_s=self._window_s)

    def close(self) -> None:
        """Closes the connections."""
        self._reader.close()


def evidence_source(
    run: RunDirectory,
    prometheus: str | None = None,
    *,
    access: MonitoringAccess | None = None,
    window_s: float = WINDOW_S,
) -> SeriesEvidenceSource:
    """Returns evidence from Prometheus at this URL; scraped from the run's service itself when there is none.

    Args:
        access: credentials and label selectors for Prometheus; none by default.
        window_s: seconds that the guardrails look back.
    """
    reader: SeriesReader = (
        PrometheusReader(prometheus, access=access) if prometheus else DirectScrapeReader(lambda: internal_url(run))
    )
    return SeriesEvidenceSource(reader, lambda: read_parity(run), window_s)


def alert_source(url: str, access: MonitoringAccess | None = None) -> AlertmanagerClient:
    """Returns an ``AlertSource``: alerts polled from the Alertmanager at this URL."""
    return AlertmanagerClient(url, access=access)
