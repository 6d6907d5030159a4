"""One Prometheus for all tests that need one, because it takes five seconds to pick up a new target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.rollout.exporter import Exporter
from tests.support.rollout.observed_rollout import Monitoring, ObservedRollout
from tests.support.rollout.servers import free_address, prometheus

from reelway.platform.run_directory import RunDirectory


@pytest.fixture(scope="session")
def monitoring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitoring]:
    one, other = Exporter("", ""), Exporter("", "")
    alertmanager = free_address()
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(folder, one.address, other.address, alertmanager=alertmanager) as server:
        yield Monitoring(server, (one, other), alertmanager)
    one.stop()
    other.stop()


@pytest.fixture
def watched(monitoring: Monitoring, tmp_path: Path) -> Iterator[ObservedRollout]:
    rollout = ObservedRollout(monitoring, RunDirectory(tmp_path))
    with closing(rollout.through):
        rollout.after_a_scrape()
        yield rollout
