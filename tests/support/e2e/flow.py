"""The installation, load and releases that e2e tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.bench_results import Row
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.installation import Installation
from tests.support.e2e.load_pod import Load
from tests.support.e2e.release_fixtures import ReleaseFixtures


@dataclass
class Flow:
    """What the scenes of the flow share."""

    installation: Installation
    load: Load
    releases: ReleaseFixtures
    rows: list[Row] = field(default_factory=list)
    live: str = ""
    """The release that everybody is on, as the scenes before left it."""

    @property
    def kubectl(self) -> Kubectl:
        """kubectl in the installation's namespace."""
        return self.installation.kubectl

    def note(self, metric: str, value: float, unit: str, bar: str = "", holds: bool | None = None) -> None:
        """A number for the report. It fails nothing: the scene does."""
        self.rows.append(Row(metric, value, unit, bar, holds))
