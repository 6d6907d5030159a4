"""What an impression records: the arm of the rollout, its slices and the length of the video."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.feature_names import VIDEO_LIVE_DENSE
from reelway.platform.rollout.policy import Slice
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.tokens import SLICE_BITS, ImpressionToken, TokenSigner
from reelway.serving.metrics import IngressMetrics
from reelway.serving.outcomes.exposures import exposure_rows
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import Recommendation, RequestPath, run_without_waiting
from reelway.serving.router import rollout_arm
from reelway.serving.slates import (
    NEW_VIDEO_S,
    NO_ROLLOUT,
    SMALL_CREATOR_FOLLOWERS,
    ImpressionContext,
    RolloutArm,
    slices_of,
)
from reelway.serving.video_table import VideoTable

SIGNER = TokenSigner(b"a secret of the tests, long enough")
CANARY = RolloutArm(Arm.CANARY, "r1", 0.75)
FOLLOWERS = VIDEO_LIVE_DENSE.index("creator_followers")


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> ReleaseLoader:
    folder = tmp_path_factory.mktemp("release")
    make_release_folder(folder)
    return ReleaseLoader(folder)


@pytest.fixture
def table(loader: ReleaseLoader) -> VideoTable:
    return loader.table()


def showing(recorded_arm: RolloutArm, now_s: float = NOW_S, *, new_viewer: bool = False) -> ImpressionContext:
    return ImpressionContext(1, 2, "r" * 64, recorded_arm, None, now_s, now_s, new_viewer)


def answered(loader: ReleaseLoader, recorded_arm: RolloutArm, row: dict[str, object]) -> Recommendation:
    path = RequestPath(
        loader.router_release(), loader.stages(), SIGNER, IngressMetrics(CollectorRegistry()), recorded_arm
    )
    return run_without_waiting(path.recommend(RecommendRequest(viewer_id=7, count=10), row, NOW_S, NOW_S + 5))


def tokens(answer: Recommendation) -> list[ImpressionToken]:
    return [SIGNER.read(video.token) for video in answer.response.videos]


def test_token_carries_the_impression_context(loader: ReleaseLoader, table: VideoTable) -> None:
    answer = answered(loader, CANARY, {"history_videos": [int(table.video_id[0])]})
    shown = tokens(answer)
    assert {(one.rollout, one.arm, one.weight, one.issued_at_s) for one in shown} == {
        ("r1", Arm.CANARY, 0.75, NOW_S + 5)
    }
    assert [one.slices for one in shown] == answer.exposure.slices.tolist()
    assert [one.creator_id for one in shown] == table.creator_id[answer.slate.rows].tolist()
    assert [one.topic for one in shown] == table.topic[answer.slate.rows].tolist()
    seconds = table.gather(answer.slate.rows, NOW_S).video_dense[:, 0]
    assert [one.duration_ms for one in shown] == (seconds * 1000).astype(int).tolist()


def test_viewer_without_history_is_new(loader: ReleaseLoader) -> None:
    bit = SLICE_BITS[Slice.NEW_VIEWERS]
    assert all(one.slices & bit for one in tokens(answered(loader, CANARY, {})))
    path = RequestPath(loader.router_release(), loader.stages(), SIGNER, IngressMetrics(CollectorRegistry()), CANARY)
    unread = run_without_waiting(path.recommend(RecommendRequest(viewer_id=7, count=10), None, NOW_S))
    assert not any(one.slices & bit for one in tokens(unread))


def test_token_outside_a_rollout_has_no_rollout_fields(loader: ReleaseLoader) -> None:
    shown = tokens(answered(loader, NO_ROLLOUT, {}))
    assert {(one.rollout, one.weight, one.slices) for one in shown} == {("", 0.0, 0)}


@given(hours=st.floats(0, 100), followers=st.one_of(st.floats(0, 1000, width=32), st.just(float("nan"))))
def test_slices_follow_upload_age_and_follower_count(loader: ReleaseLoader, hours: float, followers: float) -> None:
    table = loader.table()
    row = np.array([3], np.int32)
    live = table.live.at(row)
    live[0, FOLLOWERS] = followers
    table.overlay(row, live)
    now_s = float(table.uploaded_at_s[3]) + hours * 3600
    (mask,) = slices_of(row, showing(CANARY, now_s), table).tolist()
    assert bool(mask & SLICE_BITS[Slice.NEW_VIDEOS]) == (now_s - table.uploaded_at_s[3] < NEW_VIDEO_S)
    assert bool(mask & SLICE_BITS[Slice.SMALL_CREATORS]) == (not followers >= SMALL_CREATOR_FOLLOWERS)
    assert not mask & SLICE_BITS[Slice.NEW_VIEWERS]


@pytest.mark.parametrize("recorded_arm", [CANARY, NO_ROLLOUT])
def test_logged_exposure_matches_the_tokens(loader: ReleaseLoader, recorded_arm: RolloutArm) -> None:
    """Rollout evidence is the same whether it is computed from the tokens or from the log."""
    answer = answered(loader, recorded_arm, {})
    rows = exposure_rows([answer.exposure]).to_pylist()
    for row, token in zip(rows, tokens(answer), strict=True):
        expected = token._asdict()
        expected.pop("issued_at_s")
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert (row["shown_at"].timestamp(), row["request_time"].timestamp()) == (NOW_S + 5, NOW_S)
    assert [row["score"] for row in rows] == [video.score for video in answer.response.videos]


@pytest.mark.parametrize(
    ("arm", "weight"), [(Arm.CANARY, 0.9), (Arm.STABLE, 0.1), (Arm.HOLDOUT, 1.0), (Arm.SHADOW, 0.0)]
)
def test_overlap_weight_depends_on_the_arm(arm: Arm, weight: float) -> None:
    arms = (
        ArmRoute(arm=Arm.CANARY, release="c", weight_bp=900),
        ArmRoute(arm=Arm.STABLE, release="s", weight_bp=8100),
        ArmRoute(arm=Arm.HOLDOUT, release="s", weight_bp=1000),
    )
    recorded_arm = rollout_arm(Routing(salt="r1", rollout="r1", arms=arms), arm)
    assert recorded_arm.overlap_weight == pytest.approx(weight)
    assert recorded_arm.overlap_weight == float(np.float32(recorded_arm.overlap_weight))
    assert rollout_arm(Routing(salt="r1", arms=arms), arm) == RolloutArm(arm)
