"""The installation, load and releases that end-to-end tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.bench_results import Row
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.installation import Installation
from tests.support.e2e.load_pod import Load
from tests.support.e2e.release_fixtures import ReleaseFixtures


@dataclass
class SharedInstallation:
    """One installation under load, used by consecutive test modules."""

    installation: Installation
    load: Load
    releases: ReleaseFixtures
    rows: list[Row] = field(default_factory=list)
    live: str = ""
    """The release that serves all viewers, as earlier tests left it."""

    @property
    def kubectl(self) -> Kubectl:
        """kubectl in the installation's namespace."""
        return self.installation.kubectl

    def note(self, metric: str, value: float, unit: str, bar: str = "", holds: bool | None = None) -> None:
        """Adds a number to the report. It does not assert; the test does."""
        self.rows.append(Row(metric, value, unit, bar, holds))
