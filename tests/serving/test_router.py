"""The router without Ray: arms, routings applied in place, broken releases, and a failing or late store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.api import RecommendRequest, RecommendResponse, RequestContext
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import FeatureError, IncompatibleReleaseError, ServingError
from reelway.platform.features.viewer_rows import StoredViewer
from reelway.platform.rollout.traffic.bucketing import BUCKETS
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing, ShadowRoute
from reelway.platform.tokens import TokenSigner
from reelway.serving.outcomes import SlateExposure
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies, reassign_missing

T = TypeVar("T")
SALT = "a rollout"
SIGNER = TokenSigner(b"a secret of the tests, long enough")


class FakeViewerStore:
    """Viewer rows that can fail or be late."""

    def __init__(self) -> None:
        self.fails = False
        self.late_s = 0.0

    def read(self, viewer_id: int) -> StoredViewer:
        time.sleep(self.late_s)
        if self.fails:
            raise FeatureError(f"cannot read viewer {viewer_id}")
        return StoredViewer({"region": "eu"})


class FakeReleaseOpener:
    """Opens releases in this process; some are broken or slow to open. Records what a router opens and closes."""

    def __init__(self, store_folder: Path) -> None:
        self._store_folder = store_folder
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.broken: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}

    async def open(self, release: str) -> OpenRelease:
        self.opened.append(release)
        if gate := self.gates.get(release):
            await gate.wait()
        if release in self.broken:
            raise IncompatibleReleaseError(f"release {release[:12]} is broken")
        loader = ReleaseLoader(self._store_folder / release)

        async def close() -> None:
            self.closed.append(release)

        return OpenRelease(loader.router_release(), loader.stages(), close)


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("releases")


@pytest.fixture(scope="module")
def ids(store_folder: Path) -> list[str]:
    ids = []
    for seed in range(3):
        ids.append(make_release_folder(store_folder / str(seed), seed=seed).release_id)
        (store_folder / str(seed)).rename(store_folder / ids[-1])
    return ids


@pytest.fixture
def opener(store_folder: Path) -> FakeReleaseOpener:
    return FakeReleaseOpener(store_folder)


@pytest.fixture
def store() -> FakeViewerStore:
    return FakeViewerStore()


@pytest.fixture
def router(opener: FakeReleaseOpener, store: FakeViewerStore) -> Router:
    return Router(
        opener.open,
        RouterDependencies(SIGNER, CollectorRegistry(), read_viewer=lambda v: store.read(v), viewer_row_ms=100),
    )


def routing(
    *, stable: str, canary: str | None = None, canary_bp: int = 0, holdout_bp: int = 0, **fields: Any
) -> dict[str, Any]:
    """Returns a routing as Ray Serve passes it."""
    arms = [ArmRoute(arm=Arm.CANARY, release=canary, weight_bp=canary_bp)] if canary else []
    arms.append(ArmRoute(arm=Arm.STABLE, release=stable, weight_bp=BUCKETS - canary_bp - holdout_bp))
    if holdout_bp:
        arms.append(ArmRoute(arm=Arm.HOLDOUT, release=stable, weight_bp=holdout_bp))
    return Routing(salt=SALT, arms=tuple(arms), **fields).model_dump(mode="json")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def recommend(router: Router, viewer: int = 1, count: int = 20, **context: Any) -> RecommendResponse:
    answer = await router.recommend(RecommendRequest(viewer_id=viewer, count=count, context=RequestContext(**context)))
    if answer.background:
        await answer.background()
    return answer.response


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        await asyncio.sleep(0.005)


def counted(router: Router, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in router._dependencies.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_viewer_is_answered_by_the_release_of_the_arm(router: Router, ids: list[str]) -> None:
    configured = routing(stable=ids[0], canary=ids[1], canary_bp=3000, holdout_bp=1000, rollout="r1")
    expected = Routing.model_validate(configured)

    async def check() -> None:
        await router.reconfigure(configured)
        for viewer in range(60):
            answer, route = await recommend(router, viewer, count=1), expected.route_of(viewer)
            assert (answer.release, answer.arm) == (route.release, route.arm)
            assert SIGNER.read(answer.videos[0].token).arm is route.arm

    run(check())
    for arm in ("canary", "stable", "holdout"):
        assert counted(router, "reelway_ingress_requests_total", arm=arm, outcome="ok") > 0


def test_holdout_gets_the_popular_list_in_order(router: Router, ids: list[str], store_folder: Path) -> None:
    router_release = ReleaseLoader(store_folder / ids[0]).router_release()
    configuration = routing(stable=ids[0], holdout_bp=5000)
    viewer = next(v for v in range(100) if Routing.model_validate(configuration).route_of(v).arm is Arm.HOLDOUT)

    async def check() -> RecommendResponse:
        await router.reconfigure(configuration)
        return await recommend(router, viewer, count=10)

    answer = run(check())
    assert [video.video_id for video in answer.videos] == router_release.table.video_id[
        router_release.lists.current().popular[:10]
    ].tolist()
    assert answer.degraded == []
    assert counted(router, "reelway_ingress_stage_latency_seconds_count", stage="retrieval") == 0


def test_weight_change_reopens_no_release(router: Router, opener: FakeReleaseOpener, ids: list[str]) -> None:
    async def check() -> None:
        await router.reconfigure(routing(stable=ids[0], warm=(ids[1],)))
        await until(lambda: router.current_releases().open == sorted(ids[:2]))
        for weight in (500, 2000, 10_000):
            await router.reconfigure(routing(stable=ids[0], canary=ids[1], canary_bp=weight))
            assert (
                router.current_releases().routing.weight_of(Arm.CANARY) == weight
            )  # immediately, because the release is open
        assert opener.opened == ids[:2]
        await router.reconfigure(routing(stable=ids[1]))
        await until(lambda: opener.closed == [ids[0]])
        current = router.current_releases()
        assert [(one.release, one.arm, one.weight_basis_points) for one in current.releases] == [
            (ids[1], Arm.STABLE, 10_000)
        ]
        assert current.open == [ids[1]]

    run(check())


def test_share_of_a_broken_release_goes_to_stable(router: Router, opener: FakeReleaseOpener, ids: list[str]) -> None:
    opener.broken = {ids[1], ids[2]}
    shadow = ShadowRoute(release=ids[2], weight_bp=10_000)

    async def check() -> None:
        await router.reconfigure(routing(stable=ids[0]))
        await router.reconfigure(routing(stable=ids[0], canary=ids[1], canary_bp=4000, shadow=shadow, rollout="r1"))
        await until(lambda: router.current_releases().rollout == "r1")
        await until(lambda: set(router.current_releases().faults) == {ids[1], ids[2]})
        current = router.current_releases()
        assert {one.arm: one.weight_basis_points for one in current.releases} == {Arm.CANARY: 0, Arm.STABLE: 10_000}
        assert "is broken" in current.faults[ids[1]]
        assert current.routing.shadow is None
        assert {(await recommend(router, viewer, count=1)).release for viewer in range(40)} == {ids[0]}
        opener.broken = set()  # repaired: the next routing tries to open it again
        await router.reconfigure(routing(stable=ids[0], canary=ids[1], canary_bp=4000, rollout="r1"))
        await until(lambda: router.current_releases().routing.weight_of(Arm.CANARY) == 4000)
        assert router.current_releases().faults == {}

    run(check())


def test_rollback_does_not_wait_for_an_opening_release(
    router: Router, opener: FakeReleaseOpener, ids: list[str]
) -> None:
    async def check() -> None:
        opener.gates[ids[1]] = asyncio.Event()
        await router.reconfigure(routing(stable=ids[0]))
        await router.reconfigure(routing(stable=ids[0], canary=ids[1], canary_bp=9000, rollout="r1"))
        await asyncio.sleep(0.05)
        assert router.current_releases().rollout == ""  # unchanged while the canary is being opened
        assert (await recommend(router)).release == ids[0]
        await router.reconfigure(routing(stable=ids[0], rollout="back"))
        assert router.current_releases().rollout == "back"
        opener.gates[ids[1]].set()
        await until(lambda: opener.closed == [ids[1]])  # no routing names it any more
        assert router.current_releases().rollout == "back"

    run(check())


def test_requests_in_flight_finish_before_their_release_closes(
    router: Router, opener: FakeReleaseOpener, store: FakeViewerStore, ids: list[str]
) -> None:
    async def check() -> None:
        await router.reconfigure(routing(stable=ids[0], warm=(ids[1],)))
        await until(lambda: router.current_releases().open == sorted(ids[:2]))
        store.late_s = 0.08
        pending = asyncio.create_task(recommend(router))
        await asyncio.sleep(0.02)
        await router.reconfigure(routing(stable=ids[1]))
        await asyncio.sleep(0.02)
        assert opener.closed == []
        answer = await pending
        assert (answer.release, answer.degraded) == (ids[0], [])
        await until(lambda: opener.closed == [ids[0]])

    run(check())


def test_router_fails_to_start_without_stable(router: Router, opener: FakeReleaseOpener, ids: list[str]) -> None:
    opener.broken = {ids[0]}
    with pytest.raises(ServingError, match=r"stable.*is broken"):
        run(router.reconfigure(routing(stable=ids[0], canary=ids[1], canary_bp=100)))


def test_starting_router_waits_briefly_for_other_releases(
    router: Router, opener: FakeReleaseOpener, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelway.serving.router.STARTUP_WAIT_S", 0.05)

    async def check() -> None:
        opener.gates = {ids[1]: asyncio.Event(), ids[2]: asyncio.Event()}
        await router.reconfigure(routing(stable=ids[0], canary=ids[1], canary_bp=9000, warm=(ids[2],)))
        assert (await recommend(router)).release == ids[0]
        opener.gates[ids[1]].set()
        await until(lambda: router.current_releases().routing.weight_of(Arm.CANARY) == 9000)
        opener.gates[ids[2]].set()
        await until(lambda: router.current_releases().open == sorted(ids))

    run(check())


def test_broken_new_stable_keeps_the_previous_routing(
    router: Router, opener: FakeReleaseOpener, ids: list[str]
) -> None:
    opener.broken = {ids[1]}

    async def check() -> None:
        await router.reconfigure(routing(stable=ids[0]))
        await router.reconfigure(routing(stable=ids[1]))
        await until(lambda: ids[1] in router.current_releases().faults)
        assert (await recommend(router)).release == ids[0]

    run(check())


@pytest.mark.parametrize("weight", [9999, 20_000, -1])
def test_invalid_weights_keep_the_previous_routing(router: Router, ids: list[str], weight: int) -> None:
    wrong = routing(stable=ids[1])
    wrong["arms"][0]["weight_bp"] = weight

    async def check() -> None:
        await router.reconfigure(routing(stable=ids[0]))
        with pytest.raises(ValidationError):
            await router.reconfigure(wrong)
        assert (await recommend(router)).release == ids[0]

    run(check())


@given(
    weights=st.tuples(st.integers(0, 4000), st.integers(0, 4000)), missing=st.sets(st.sampled_from(["canary", "lists"]))
)
def test_reassigned_routing_covers_all_viewers(weights: tuple[int, int], missing: set[str]) -> None:
    arms = (
        ArmRoute(arm=Arm.CANARY, release="canary", weight_bp=weights[0]),
        ArmRoute(arm=Arm.STABLE, release="stable", weight_bp=BUCKETS - sum(weights)),
        ArmRoute(arm=Arm.HOLDOUT, release="lists", weight_bp=weights[1]),
    )
    complete = Routing(salt=SALT, arms=arms)
    left = reassign_missing(complete, missing)
    assert sum(route.weight_bp for route in left.arms) == BUCKETS
    assert {route.release for route in left.arms if route.weight_bp} & missing == set()
    assert left.releases == complete.releases
    for viewer in range(50):  # viewers of the other releases keep their arm
        before = complete.route_of(viewer)
        assert before.release in missing or left.route_of(viewer).release == before.release


def test_failed_store_does_not_fail_the_request(router: Router, store: FakeViewerStore, ids: list[str]) -> None:
    store.fails = True

    async def check() -> RecommendResponse:
        await router.reconfigure(routing(stable=ids[0]))
        return await recommend(router)

    answer = run(check())
    assert answer.degraded == ["no_viewer_row"]
    assert len(answer.videos) == 20
    assert counted(router, "reelway_ingress_faults_total", stage="viewer_row", kind="error") == 1
    assert counted(router, "reelway_ingress_degraded_total", rung="no_viewer_row") == 1
    assert counted(router, "reelway_ingress_requests_total", outcome="context_only") == 1


def test_late_store_does_not_delay_responses(router: Router, store: FakeViewerStore, ids: list[str]) -> None:
    store.late_s = 1.0

    async def both() -> tuple[list[RecommendResponse], float]:
        await router.reconfigure(routing(stable=ids[0]))
        start = time.monotonic()
        answers = await asyncio.gather(*(recommend(router, viewer, count=1) for viewer in range(2)))
        return answers, time.monotonic() - start

    answers, took_s = run(both())
    assert [answer.degraded for answer in answers] == [["no_viewer_row"]] * 2
    assert took_s < 1.0
    assert counted(router, "reelway_ingress_faults_total", stage="viewer_row", kind="timeout") == 2


def test_error_without_a_fallback_counts_as_failed(
    router: Router, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        await router.reconfigure(routing(stable=ids[0]))
        monkeypatch.setattr("reelway.serving.request_path.build_videos", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await recommend(router)

    run(check())
    assert counted(router, "reelway_ingress_requests_total", arm="stable", outcome="failed") == 1


def test_known_viewer_gets_a_slate_that_is_not_degraded(router: Router, ids: list[str]) -> None:
    async def check() -> RecommendResponse:
        await router.reconfigure(routing(stable=ids[0]))
        return await recommend(router)

    assert run(check()).degraded == []


@pytest.mark.parametrize("authenticated", [True, False])
def test_exposure_records_whether_the_viewer_is_proven(router: Router, ids: list[str], authenticated: bool) -> None:
    exposures: list[SlateExposure] = []

    class Recorder:
        def record(self, exposure: SlateExposure) -> None:
            exposures.append(exposure)

    async def ask() -> None:
        await router.reconfigure(routing(stable=ids[0]))
        router._dependencies.exposures = Recorder()  # type: ignore[assignment]
        answer = await router.recommend(RecommendRequest(viewer_id=1, count=5), authenticated=authenticated)
        assert answer.background is not None
        await answer.background()

    run(ask())
    assert [exposure.authenticated for exposure in exposures] == [authenticated]
