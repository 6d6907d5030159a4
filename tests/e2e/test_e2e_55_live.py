"""What is shown, done, uploaded and taken down counts within seconds, with an event log on Kafka and the live parts.

This module has its own installation, because the live parts need a run that a release was trained from. Its service
demands a proof of each viewer's identity. Its limits are for two cores that also run the node; `make bench-live`
measures the times without one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.bench_results import write_report
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.live_installation import (
    CATALOGUE_URL,
    OVERLAY_METRICS,
    STREAM_METRICS,
    LiveInstallation,
    live_images,
    live_installation,
)
from tests.support.e2e.pods import check_images
from tests.support.e2e.rollouts import HELD, begin, wait_until_phase
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
FIRST_SLATE_S: Final = 240.0
FOLLOWED_S: Final = 15.0
SHOWN_S: Final = 30.0
GONE_S: Final = 5.0
READ_S: Final = 20.0
"""Seconds in which slates are read after a takedown."""
AGE_LIMIT_S: Final = 30.0
ROLLOUT: Final = "counted"
AGES: Final = (
    "reelway_outcomes_log_age_seconds", "reelway_takedowns_age_seconds", "reelway_overlay_age_seconds",
    "reelway_stream_lag_seconds", "reelway_uploads_age_seconds", "reelway_lists_age_seconds",
)  # fmt: skip


@pytest.fixture(scope="module")
def live(cluster: Cluster) -> Iterator[LiveInstallation]:
    if cluster.own:
        check_images(cluster, live_images())
    with live_installation(cluster) as installed:
        try:
            yield installed
        finally:
            write_report("e2e_live", installed.rows)


def test_installation_with_an_event_log_answers(live: LiveInstallation) -> None:
    """The hook creates the topics before the pods that use them."""
    live.installation.install(None, "--timeout", "150s")
    taken_s = until("a slate", live.has_slates, FIRST_SLATE_S)
    live.note("live: helm install ended -> first slate", taken_s, "s", f"under {FIRST_SLATE_S:g}", True)
    live.installation.wait_until_ready()
    for workload in ("statefulset/reelway-stream", "statefulset/reelway-overlay", "deployment/reelway-catalogue"):
        live.kubectl.run("rollout", "status", workload, "--timeout=80s")
    until("the feature stream reads", lambda: _stream_reads(live), 120, lambda: _last_log(live.kubectl))
    assert "reelway_uploads_age_seconds" in live.metrics(OVERLAY_METRICS)


def test_only_the_proven_viewer_is_answered(live: LiveInstallation) -> None:
    viewer = live.new_viewers(2)
    slate, *_ = live.slates([viewer], 1)
    status = live.ask("identities", viewer=viewer, token=slate["videos"][0]["token"])
    assert status == {
        "slate_without": 401, "slate_of_another": 403, "outcome_without": 401, "accepted_of_another": 0, "slate": 200,
    }  # fmt: skip


def test_ten_pages_repeat_no_video(live: LiveInstallation) -> None:
    pages = live.slates([live.new_viewers(1)] * 10, 10)
    shown = [video["video_id"] for page in pages for video in page["videos"]]
    repeats = len(shown) - len(set(shown))
    live.note(
        f"live: repeats in {len(pages)} pages of one viewer, {len(shown)} videos", repeats, "videos", "0", not repeats
    )
    assert len(shown) == 100
    assert not repeats


def test_next_slate_has_no_video_of_a_blocked_creator(live: LiveInstallation) -> None:
    """Another new viewer, without blocks, is shown the creator in the same pages."""
    viewer, other = live.new_viewers(1), live.new_viewers(1)
    first, *_ = live.slates([viewer], 50)
    tokens = {video["creator_id"]: video["token"] for video in first["videos"]}
    _, *pages = live.slates([other] * 6, 50)
    of_other = Counter(creator for creator in _creators(pages) if creator in tokens)
    creator, count = of_other.most_common(1)[0]
    answer = live.ask("report", outcomes={viewer: [{"token": tokens[creator], "type": "block_creator"}]})
    assert answer == {"accepted": 1, "refused": []}
    after = _creators(live.slates([viewer] * 5, 50))
    live.note(
        f"live: videos of a blocked creator in the next 5 pages, {count} without the block", after.count(creator),
        "videos", "0", creator not in after,
    )  # fmt: skip
    assert creator not in after


def test_slate_follows_what_a_viewer_watched(live: LiveInstallation) -> None:
    durations_ms = {str(video): length_ms for video, length_ms in live.live_run.durations_ms().items()}
    found = live.ask("follow", viewer=live.new_viewers(1), durations_ms=durations_ms, within_s=20)
    print(f"stages without an answer before and after: {found['degraded']}")
    assert found["after_s"] is not None, _last_log(live.kubectl)
    taken_s = found["after_s"]
    live.note(
        "live: watched and liked -> slate that follows", taken_s, "s", f"under {FOLLOWED_S:g}", taken_s < FOLLOWED_S
    )
    assert taken_s < FOLLOWED_S


def test_erased_viewer_is_a_new_viewer(live: LiveInstallation) -> None:
    """All stores forget the viewer while the service runs. A second erasure finds what the stream wrote meanwhile."""
    viewer = live.new_viewers(1)
    first, *_ = live.slates([viewer] * 3, 20)
    liked = [{"token": video["token"], "type": "like"} for video in first["videos"][:3]]
    assert live.ask("report", outcomes={viewer: liked})["accepted"] == 3
    report = live.erase(viewer)
    assert report["removed"] > 0, report
    assert str(viewer) not in str(report)
    removed = {store["store"]: store["removed"] for store in report["stores"] if store["removed"]}
    assert "viewer memory" in removed, report
    taken_s = until("no store has the viewer", lambda: not _stored(live.erase(viewer)), 60, lambda: str(removed))
    live.note("live: erasure -> an erasure that finds nothing", taken_s, "s")


def test_uploaded_video_is_shown_and_disappears_when_taken_down(live: LiveInstallation) -> None:
    """The video that most slates contain is taken down, too."""
    video, token = live.live_run.new_video(), live.catalogue_token
    catalogue: dict[str, Any] = {"catalogue": CATALOGUE_URL, "token": token}
    found = live.ask("upload", **catalogue, video=video, viewer=live.new_viewers(5_000), within_s=60)
    assert found["answer"]["accepted"] == 1, found
    assert found["after_s"] is not None, f"video {video['video_id']} is in no slate"
    shown_s = found["after_s"]
    live.note("live: upload -> first slate with the video", shown_s, "s", f"under {SHOWN_S:g}", shown_s < SHOWN_S)
    usual, count = Counter(_videos(live.slates(_viewers(live, 20), 50))).most_common(1)[0]
    assert count >= 10, f"video {usual} is in {count} of 20 slates, so its absence would show nothing"
    live.taken_down = [int(video["video_id"]), usual]
    gone = live.ask("take_down", **catalogue, video_ids=live.taken_down, viewer=live.new_viewers(5_000), read_s=READ_S)
    assert gone["answer"]["accepted"] == 2, gone
    last_s = gone["last_s"]
    live.note(
        f"live: takedown -> last slate with the video, {gone['slates']} slates read", last_s, "s",
        f"under {GONE_S:g}", last_s < GONE_S,
    )  # fmt: skip
    assert shown_s < SHOWN_S
    assert last_s < GONE_S


def test_collector_counts_every_exposure_and_outcome(live: LiveInstallation) -> None:
    second = live.live_run.releases.ids[1]
    begin(live.kubectl, ROLLOUT, second, HELD)
    wait_until_phase(live.kubectl, ROLLOUT, "Stepping", "Holding", within_s=240)
    viewers = _viewers(live, 40)
    slates = live.slates(viewers, 10)
    assert {slate["arm"] for slate in slates} >= {"canary"}, "no viewer got the canary"
    outcomes = {
        viewer: [{"token": video["token"], "type": "watch", "value": 60_000} for video in slate["videos"][::2]]
        for viewer, slate in zip(viewers, slates, strict=True)
    }
    count = sum(len(of_viewer) for of_viewer in outcomes.values())
    answer = live.ask("report", outcomes=outcomes)
    assert answer == {"accepted": count, "refused": []}
    wanted = (sum(len(slate["videos"]) for slate in slates), count)
    taken_s = until(
        "all are counted", lambda: _counted(live) == wanted, 60, lambda: f"counted {_counted(live)} of {wanted}"
    )
    live.counted_of_canary, live.outcomes_counted = _counted(live, "canary"), count
    assert 0 < live.counted_of_canary[0] < wanted[0]
    live.note("live: outcomes accepted -> exposures and outcomes counted", taken_s, "s")


def test_age_of_every_reader_of_the_log_is_exported(live: LiveInstallation) -> None:
    def ages() -> dict[str, float]:
        text = live.metrics(live.router_metrics(), _collector(live), STREAM_METRICS, OVERLAY_METRICS)
        oldest: dict[str, float] = {}
        for name, _, value in _samples(text):
            if name in AGES:
                oldest[name] = max(value, oldest.get(name, 0.0))
        return oldest

    until("every reader is at the end of the log", lambda: _are_young(ages()), 60, lambda: str(ages()))
    for name, age_s in sorted(ages().items()):
        live.note(f"live: {name}", age_s, "s", f"under {AGE_LIMIT_S:g}", age_s < AGE_LIMIT_S)


def test_restarted_router_knows_takedowns_and_counts(live: LiveInstallation) -> None:
    """The head's volumes are lost with the pod. Its successor reads both from Kafka."""
    assert live.taken_down, "no video was taken down before"
    live.kubectl.run("delete", "releaserollout", ROLLOUT, "--ignore-not-found", "--timeout=80s")
    before = live.installation.pods("serving")
    live.kubectl.run("delete", "pod", live.installation.head(), "--grace-period=0", "--force", "--wait=true")
    live.installation.wait_until_other_head(before)
    shown: list[int] = []

    def has_slates_for_all() -> bool:  # the head that was killed may answer for a moment
        try:
            shown[:] = _videos(live.slates(_viewers(live, 40), 50))
        except AssertionError:
            return False
        return bool(shown)

    taken_s = until("slates for 40 viewers", has_slates_for_all, FIRST_SLATE_S)
    withheld = not set(live.taken_down) & set(shown)
    live.note("live: head pod killed -> slates for 40 viewers", taken_s, "s")
    live.note(
        "live: slates with a taken down video after a restart, of 40", float(not withheld), "slates", "0", withheld
    )
    assert shown
    assert withheld
    if canary := live.counted_of_canary:  # which has had no viewer since; stable's slates count for the rollout

        def sums() -> tuple[tuple[int, int], int]:
            return _counted(live, "canary"), _counted(live)[1]

        wanted = (canary, live.outcomes_counted)
        until("the sums are computed again", lambda: sums() == wanted, 90, lambda: f"counted {sums()} of {wanted}")


def _stored(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The stores in which an erasure found the viewer. Rows of Kafka stay until their retention and are not read."""
    return [store for store in report["stores"] if store["found"] and store["state"] == "erased"]


def _viewers(live: LiveInstallation, count: int) -> range:
    first = live.new_viewers(count)
    return range(first, first + count)


def _videos(slates: list[dict[str, Any]]) -> list[int]:
    return [video["video_id"] for slate in slates for video in slate["videos"]]


def _creators(slates: list[dict[str, Any]]) -> list[int]:
    return [video["creator_id"] for slate in slates for video in slate["videos"]]


def _collector(live: LiveInstallation) -> str:
    return f"{live.installation.internal_url}/v1/outcomes/metrics"


def _counted(live: LiveInstallation, arm: str = "") -> tuple[int, int]:
    """Impressions and outcomes of the rollout in the collector's sums, of one arm or of all."""
    impressions = outcomes = 0.0
    for name, labels, value in _samples(live.metrics(_collector(live))):
        if arm and labels.get("arm") != arm:
            continue
        if name == "reelway_outcomes_audience_total" and labels["statistic"] == "impressions":
            impressions += value
        if name == "reelway_outcomes_received_total" and labels["outcome"] == "counted":
            outcomes += value
    return round(impressions), round(outcomes)


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def _are_young(ages: dict[str, float]) -> bool:
    return ages.keys() == set(AGES) and max(ages.values()) < AGE_LIMIT_S


def _stream_reads(live: LiveInstallation) -> bool:
    """Whether a partition's lag is known, which a member exports once it has read a record."""
    return "reelway_stream_lag_records{" in live.metrics(STREAM_METRICS)


def _last_log(kubectl: Kubectl) -> str:
    return "log of the stream: " + kubectl.run("logs", "statefulset/reelway-stream", "--tail=15").strip()
