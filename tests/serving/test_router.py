"""The router without Ray: arms, weights taken in place, and a store that fails or is late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.release_files import make_release_folder

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ConfigError, FeatureError
from reelway.platform.rollout.bucketing import arm_of
from reelway.serving.release_loader import ReleaseLoader

pytest.importorskip("ray")
from reelway.serving.deployments import BudgetsMs, Router, ServiceOptions

T = TypeVar("T")
SALT = "a rollout"


class Store:
    """Viewer rows that can fail or be late."""

    def __init__(self) -> None:
        self.fails = False
        self.late_s = 0.0

    def read(self, viewer_id: int) -> dict[str, Any]:
        time.sleep(self.late_s)
        if self.fails:
            raise FeatureError(f"cannot read viewer {viewer_id}")
        return {"region": "eu"}


class LocalRouter(Router):
    """The router over stages in its own process."""

    def __init__(self, options: ServiceOptions, store: Store) -> None:
        super().__init__(options)
        self._rows = store  # type: ignore[assignment]
        self.opened: list[str] = []

    async def _open(self, release: str) -> Any:
        self.opened.append(release)
        loader = ReleaseLoader(self._options.releases_dir / release)
        return loader.edge(), loader.stages()


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    place = tmp_path_factory.mktemp("releases")
    ids = []
    for seed in range(2):
        ids.append(make_release_folder(place / str(seed), seed=seed).release_id)
        (place / str(seed)).rename(place / ids[-1])
    return place, ids


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def router(releases: tuple[Path, list[str]], store: Store, tmp_path: Path) -> LocalRouter:
    budgets = BudgetsMs(viewer_row=100)
    options = ServiceOptions(releases[0], tmp_path, (b"a secret of the tests, long enough",), budgets=budgets)
    made = LocalRouter(options, store)
    run(made.reconfigure({"salt": SALT, "weights": {releases[1][0]: 10_000}}))
    return made


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def counted(router: LocalRouter, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in router._registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_each_viewer_is_answered_by_the_release_of_their_arm(
    router: LocalRouter, releases: tuple[Path, list[str]]
) -> None:
    stable, canary = releases[1]
    weights = {canary: 3000, stable: 7000}
    run(router.reconfigure({"salt": SALT, "weights": weights}))
    for viewer in range(40):
        answer = run(router.recommend(RecommendRequest(viewer_id=viewer, count=1)))
        assert answer.release == arm_of(viewer, SALT, weights)
        assert answer.arm == (Arm.CANARY if answer.release == canary else Arm.STABLE)
    assert counted(router, "reelway_ingress_requests_total", arm="canary", release=canary[:12]) > 0


def test_a_change_of_weights_opens_only_what_is_new_and_forgets_what_left(
    router: LocalRouter, releases: tuple[Path, list[str]]
) -> None:
    stable, canary = releases[1]
    for weights in ({canary: 500, stable: 9500}, {canary: 2000, stable: 8000}, {canary: 10_000}):
        run(router.reconfigure({"salt": SALT, "weights": weights}))
    assert router.opened == [stable, canary]
    (only,) = router.current_releases().releases
    assert (only.release, only.arm, only.weight_basis_points) == (canary, Arm.STABLE, 10_000)


@pytest.mark.parametrize("weight", [9999, 20_000, -1])
def test_weights_that_leave_viewers_out_are_refused_and_the_old_ones_stay(
    router: LocalRouter, releases: tuple[Path, list[str]], weight: int
) -> None:
    stable, canary = releases[1]
    with pytest.raises(ConfigError, match="basis points"):
        run(router.reconfigure({"salt": SALT, "weights": {canary: weight, stable: 0}}))
    assert [one.release for one in router.current_releases().releases] == [stable]
    assert run(router.recommend(RecommendRequest(viewer_id=1))).release == stable


def test_a_store_that_fails_costs_the_row_and_not_the_slate(router: LocalRouter, store: Store) -> None:
    store.fails = True
    answer = run(router.recommend(RecommendRequest(viewer_id=1)))
    assert answer.degraded == ["no_viewer_row"]
    assert len(answer.videos) == 20
    assert counted(router, "reelway_ingress_faults_total", stage="viewer_row", kind="error") == 1
    assert counted(router, "reelway_ingress_degraded_total", rung="no_viewer_row") == 1


def test_a_store_that_is_late_holds_up_neither_its_own_answer_nor_another(router: LocalRouter, store: Store) -> None:
    store.late_s = 1.0

    async def both() -> tuple[Any, float]:
        start = time.monotonic()
        answers = await asyncio.gather(
            *(router.recommend(RecommendRequest(viewer_id=viewer, count=1)) for viewer in range(2))
        )
        return answers, time.monotonic() - start

    answers, took_s = run(both())
    assert [answer.degraded for answer in answers] == [["no_viewer_row"]] * 2
    assert took_s < 1.0
    assert counted(router, "reelway_ingress_faults_total", stage="viewer_row", kind="timeout") == 2


def test_a_viewer_known_to_the_store_is_not_degraded(router: LocalRouter) -> None:
    assert run(router.recommend(RecommendRequest(viewer_id=1))).degraded == []
