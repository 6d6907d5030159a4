"""Where evidence and alerts really come from: the service's own pages, Prometheus, Alertmanager."""

from __future__ import annotations

from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.sources.access import Access
from reelway.platform.rollout.sources.alertmanager import AlertmanagerPoll
from reelway.platform.rollout.sources.direct_scrape import DirectScrape, served_at
from reelway.platform.rollout.sources.heard_series import WINDOW_S, Scope, SeriesReader
from reelway.platform.rollout.sources.parity_report import read_parity
from reelway.platform.rollout.sources.prometheus_reader import PrometheusReader
from reelway.platform.rollout.sources.snapshot import snapshot_of
from reelway.platform.rollout.state import RolloutState
from reelway.platform.runs import RunDirectory

__all__ = ["Access", "RunEvidence", "alert_source", "evidence_source"]


class RunEvidence:
    """An ``EvidenceSource``: the evidence of one run, from whichever reader."""

    def __init__(self, run: RunDirectory, reader: SeriesReader, window_s: float = WINDOW_S) -> None:
        self._run = run
        self._reader = reader
        self._window_s = window_s

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        """See ``EvidenceSource.fetch``: what cannot be heard is ``telemetry_down`` and never an exception."""
        heard = self._reader.read(Scope.of(state, self._window_s), now)
        return snapshot_of(policy, state, heard, read_parity(self._run), now, window_s=self._window_s)

    def close(self) -> None:
        """Let go of the connections."""
        self._reader.close()


def evidence_source(run: RunDirectory, prometheus: str | None = None, *, window_s: float = WINDOW_S) -> RunEvidence:
    """Evidence from Prometheus at this URL; scraped from the run's service itself when there is none.

    Args:
        window_s: seconds that the guardrails look back.
    """
    reader: SeriesReader = PrometheusReader(prometheus) if prometheus else DirectScrape(lambda: served_at(run))
    return RunEvidence(run, reader, window_s)


def alert_source(url: str, access: Access | None = None) -> AlertmanagerPoll:
    """An ``AlertSource``: alerts polled from the Alertmanager at this URL."""
    return AlertmanagerPoll(url, access=access)
