"""Prometheus with two exporters, and rollouts whose evidence it holds."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.rollout.exporter import Exporter
from tests.support.rollout.series_fixtures import POLICY, state_of, sums
from tests.support.rollout.servers import SCRAPE_S, Server, eventually

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.evidence import EvidenceSnapshot, EvidenceState
from reelway.platform.rollout.sources import evidence_source
from reelway.platform.rollout.sources.series_reader import SeriesKey
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.run_directory import RunDirectory

QUICK = POLICY.model_copy(update={"evidence_max_age_s": 4 * SCRAPE_S})


_NUMBERS = itertools.count(1)


@dataclass
class Monitoring:
    """A Prometheus that scrapes two exporters and notifies an Alertmanager at ``alertmanager``."""

    prometheus: Server
    exporters: tuple[Exporter, Exporter]
    alertmanager: str


@dataclass
class ObservedRollout:
    """A rollout that has just begun, with its own releases on the exporters, and evidence about it."""

    monitoring: Monitoring
    run: RunDirectory
    number: int = field(default_factory=lambda: next(_NUMBERS))
    began_at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.exporter, self.other = self.monitoring.exporters
        for exporter in self.monitoring.exporters:
            exporter.name(self.canary[:12], self.stable[:12])
            exporter.sums.values = {}
        (self.run.path / "serving.json").write_text(json.dumps({"internal_url": f"http://{self.exporter.address}"}))
        self.through = evidence_source(self.run, self.monitoring.prometheus.url)

    @property
    def canary(self) -> str:
        return f"c{self.number:011}".ljust(64, "0")

    @property
    def stable(self) -> str:
        return f"5{self.number:011}".ljust(64, "0")

    @property
    def state(self) -> RolloutState:
        return state_of(
            id=f"r-{self.number}", canary_release=self.canary, stable_release=self.stable, phase=Phase.SHADOW,
            started_at=self.began_at, changed_at=self.began_at,
        )  # fmt: skip

    def evidence(self) -> EvidenceSnapshot:
        """Evidence from Prometheus at the current time."""
        return self.through.fetch(QUICK, self.state, time.time())

    def seen_when(self, holds: Callable[[EvidenceSnapshot], object]) -> EvidenceSnapshot:
        """Waits for the first snapshot that meets the condition."""
        return eventually(lambda: snapshot if holds(snapshot := self.evidence()) else None)

    def after_a_scrape(self) -> EvidenceSnapshot:
        """Waits for a snapshot from scrapes of both endpoints after this call."""
        now = time.time()
        return self.seen_when(
            lambda s: (
                s.time > now
                and all(
                    e.state is not EvidenceState.TELEMETRY_DOWN for e in (*s.metrics.values(), s.guardrails["p99_ms"])
                )
            )
        )

    def add_sums(self, canary: int, stable: int) -> None:
        """Sets the number of viewers in the collector's sums."""
        for arm, viewers, release in ((Arm.CANARY, canary, self.canary), (Arm.STABLE, stable, self.stable)):
            for key, value in sums(arm, viewers, rollout=self.state.id).items():
                labels = {**dict(key.labels), "release": release[:12]}
                self.exporter.sums.values[SeriesKey.of(key.name, labels)] = value
