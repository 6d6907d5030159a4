"""Takedowns on the request path: hidden from every source and list, from open releases and from those opened later."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tests.support.release_files import NOW_S, make_release_folder
from tests.support.serving.takedowns import follower, publish, takedown
from tests.support.serving.uploads import make_run

from reelway.platform.contracts.api import RecommendRequest, RecommendResponse
from reelway.platform.contracts.blend import Blend, RetrievalSettings
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.manifest import VIDEOS_FILE
from reelway.platform.errors import StorageError
from reelway.platform.eventlog.catalogue_events import Restore, TakedownState, as_record
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.rollout.traffic.serving_options import ReleaseArgs
from reelway.platform.tokens import TokenSigner
from reelway.serving.deployments.stages import RetrievalStage
from reelway.serving.metrics import IngressMetrics, TakedownMetrics
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import RequestPath, UnavailableStages, run_without_waiting
from reelway.serving.slates import RolloutArm
from reelway.serving.takedown_follower import READ_LIMIT, TakedownFollower
from reelway.serving.video_table import ABSENT, open_video_table
from reelway.serving.viewer_query import cold_start_query

VIDEOS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose slates of 60 videos contain the whole catalogue, each source included."""
    path = tmp_path_factory.mktemp("release")
    quotas = {"ann": 0.2, "trending": 0.2, "popular": 0.2, "neighbours": 0.2, "fresh": 0.2}
    blend = Blend(retrieval=RetrievalSettings(candidates=500, quotas=quotas, fresh_hours=24 * 31))
    make_release_folder(path, videos=VIDEOS, blend=blend)
    return path


@pytest.fixture
def events(tmp_path: Path) -> Path:
    return tmp_path / "events"


@pytest.fixture
def takedowns(events: Path) -> Iterator[TakedownFollower]:
    following = follower(events).start()
    yield following
    following.stop()


def path_of(
    loader: ReleaseLoader, *, arm: Arm = Arm.STABLE, stages: object = None, metrics: IngressMetrics | None = None
) -> RequestPath:
    return RequestPath(
        loader.router_release(), stages or loader.stages(), TokenSigner(b"s" * 32),  # type: ignore[arg-type]
        metrics or IngressMetrics(CollectorRegistry()), RolloutArm(arm),
    )  # fmt: skip


def slate(path: RequestPath, **row: object) -> RecommendResponse:
    request = RecommendRequest(viewer_id=1, count=VIDEOS)
    return run_without_waiting(path.recommend(request, row, NOW_S)).response


def shown(path: RequestPath, **row: object) -> set[int]:
    return {video.video_id for video in slate(path, **row).videos}


def wait_until_applied(loader: ReleaseLoader, video: int, *, hidden: bool) -> float:
    """Waits until the table hides (shows) the video and returns the time it took, in seconds."""
    table, began = loader.table(), time.monotonic()
    row = table.rows_of(np.array([video]))
    while (table.servable_rows(row)[0] == ABSENT) != hidden:
        assert time.monotonic() - began < 5, "the takedown was not applied"
        time.sleep(0.002)
    return time.monotonic() - began


def open_files(folder: Path) -> list[str]:
    """Returns the files in a folder that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.append(str(descriptor.readlink()))
    return [path for path in found if path.startswith(str(folder))]


def test_stopped_follower_has_no_open_file(events: Path) -> None:
    publish(events, *takedown(videos=[1]))
    following = follower(events).start()
    deadline = time.monotonic() + 30
    while not open_files(events):
        assert time.monotonic() < deadline, "the log was not opened"
        time.sleep(0.01)
    following.stop()
    assert open_files(events) == []


@pytest.mark.parametrize("arm", [Arm.STABLE, Arm.HOLDOUT])
def test_takedown_hides_a_video_until_it_is_restored(
    folder: Path, events: Path, takedowns: TakedownFollower, arm: Arm
) -> None:
    loader = ReleaseLoader(folder, takedowns=takedowns)
    path = path_of(loader, arm=arm)
    everything = shown(path)
    video = sorted(everything)[3]

    publish(events, *takedown(videos=[video]))
    assert wait_until_applied(loader, video, hidden=True) < 2.0
    assert shown(path) == everything - {video}

    publish(events, Restore(video_id=video, version=2))
    wait_until_applied(loader, video, hidden=False)
    assert shown(path) == everything


def test_takedown_of_a_creator_hides_all_its_videos(folder: Path, events: Path, takedowns: TakedownFollower) -> None:
    loader = ReleaseLoader(folder, takedowns=takedowns)
    table, path = loader.table(), path_of(loader)
    creators = table.creator_id.base
    creator = int(np.bincount(creators).argmax())
    theirs = set(table.video_id.base[creators == creator].tolist())
    assert theirs <= shown(path)
    publish(events, *takedown(creators=[creator]))
    wait_until_applied(loader, min(theirs), hidden=True)
    watched = {"history_videos": sorted(theirs), "history_weights": [1.0] * len(theirs)}
    assert not theirs & (shown(path) | shown(path, **watched) | shown(path_of(loader, stages=UnavailableStages())))


def test_release_that_opens_later_hides_earlier_takedowns(
    folder: Path, events: Path, takedowns: TakedownFollower
) -> None:
    first = ReleaseLoader(folder, takedowns=takedowns)
    video = int(first.table().video_id.base[5])
    publish(events, *takedown(videos=[video]))
    for following in (takedowns, follower(events).start()):  # the running process, and a replica that starts
        later = ReleaseLoader(folder, takedowns=following)
        assert video not in shown(path_of(later))
        following.stop()


def test_release_does_not_open_while_takedowns_are_unread(folder: Path, events: Path) -> None:
    publish(events, *takedown(videos=[1]))
    table = open_video_table(folder / VIDEOS_FILE)
    following = follower(events)  # not polled
    with pytest.raises(StorageError, match="not read to the end"):
        following.hide_in(table, timeout_s=0.05)
    opened = threading.Event()
    threading.Thread(target=lambda: (following.hide_in(table), opened.set()), daemon=True).start()
    assert not opened.wait(0.1)
    following.poll()
    assert opened.wait(5)


def test_last_check_removes_what_retrieval_still_proposes(
    folder: Path, events: Path, takedowns: TakedownFollower
) -> None:
    """The stages run in processes of their own, which may read a takedown later than the router."""
    behind, router = ReleaseLoader(folder), ReleaseLoader(folder, takedowns=takedowns)
    registry = CollectorRegistry()
    path = path_of(router, stages=behind.stages(), metrics=IngressMetrics(registry))
    video = int(router.table().video_id.base[9])
    assert video in shown(path)
    publish(events, *takedown(videos=[video]))
    wait_until_applied(router, video, hidden=True)
    assert video not in shown(path)
    request = RecommendRequest(viewer_id=1, count=VIDEOS)
    mirrored, _ = run_without_waiting(path.mirror(request, {}, NOW_S, seed=1))
    assert video not in mirrored
    labels = {"release": router.release_id()[:12], "arm": "stable"}
    assert registry.get_sample_value("reelway_ingress_withheld_videos_total", labels) == 2


def test_unreadable_log_keeps_the_last_state(folder: Path, events: Path) -> None:
    registry = CollectorRegistry()
    following = follower(events, registry)
    table = open_video_table(folder / VIDEOS_FILE)
    video = int(table.video_id.base[2])
    publish(events, *takedown(videos=[video]))
    following.poll()
    threading.Thread(target=following.follow, daemon=True).start()
    following.hide_in(table)

    def broken() -> None:
        raise StorageError("disk gone")

    following._open_log = broken  # type: ignore[assignment,method-assign]
    following._close_log()
    deadline = time.monotonic() + 10
    while not registry.get_sample_value("reelway_takedowns_age_seconds") or (
        registry.get_sample_value("reelway_takedowns_faults_total") or 0
    ) < 3:  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (registry.get_sample_value("reelway_takedowns_age_seconds") or 0) > 0.2
    assert table.servable_rows(np.array([2])).tolist() == [ABSENT]
    following.stop()


def test_age_grows_while_records_are_left_unread(tmp_path: Path) -> None:
    now = [NOW_S]
    log = SqliteLog(tmp_path / "takedowns.db", clock=lambda: now[0])
    registry = CollectorRegistry()
    following = TakedownFollower(lambda: log, TakedownMetrics(registry), clock=lambda: now[0])
    changes = takedown(videos=range(READ_LIMIT + 1))
    for part in (changes[:READ_LIMIT], changes[READ_LIMIT:]):
        now[0] += 10
        log.append([as_record(change, 1) for change in part])
    now[0] += 100
    ages = []
    for _ in range(2):
        following.poll()
        ages.append(registry.get_sample_value("reelway_takedowns_age_seconds"))
    assert ages == [110, 0]


def test_table_that_failed_is_corrected_by_the_next_read(
    folder: Path, events: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = follower(events).start()
    tables = [open_video_table(folder / VIDEOS_FILE) for _ in range(3)]
    for table in tables:
        following.hide_in(table)
    following.stop()
    videos = tables[0].video_id.base
    publish(events, *takedown(videos=videos[:2]))
    following.poll()

    def full(*_: object) -> None:
        raise ValueError("no memory")

    monkeypatch.setattr(tables[1], "_refresh_servable", full)
    publish(events, *takedown(videos=videos[2:3]), Restore(video_id=int(videos[0]), version=2))
    for _ in range(2):
        with pytest.raises(ValueError, match="no memory"):
            following.poll()
    rows, expected = np.arange(4), [0, ABSENT, ABSENT, 3]
    assert [table.servable_rows(rows).tolist() for table in (tables[0], tables[2])] == [expected] * 2
    monkeypatch.undo()
    following.poll()
    assert tables[1].servable_rows(rows).tolist() == expected


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.integers(0, 9), st.integers(0, 3)), max_size=12
    )
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_table_hides_exactly_what_is_taken_down(folder: Path, steps: list[tuple[bool, bool, int, int]]) -> None:
    table, state = open_video_table(folder / VIDEOS_FILE), TakedownState()
    ids, creators = table.video_id.base, table.creator_id.base
    for down, is_creator, index, version in steps:
        entity = {"creator_id": int(creators[index])} if is_creator else {"video_id": int(ids[index])}
        change = takedown(
            **{"creators" if is_creator else "videos": list(entity.values())}, version=version
        )[0] if down else Restore(**entity, version=version)  # fmt: skip
        changed = state.apply([change])
        table.take_down(state.taken_down(), changed)
    expected = np.isin(ids, state.taken_down().videos) | np.isin(creators, state.taken_down().creators)
    rows = np.arange(len(table), dtype=np.int32)
    np.testing.assert_array_equal(table.servable_rows(rows), np.where(expected, ABSENT, rows))


def test_taken_down_video_is_not_a_candidate(folder: Path, events: Path, takedowns: TakedownFollower) -> None:
    """The slot of a video that retrieval filters goes to another video: the slate stays full."""
    loader = ReleaseLoader(folder, takedowns=takedowns)
    path = path_of(loader)
    request = RecommendRequest(viewer_id=1, count=10)
    first = run_without_waiting(path.recommend(request, {}, NOW_S)).response.videos
    publish(events, *takedown(videos=[video.video_id for video in first]))
    wait_until_applied(loader, first[-1].video_id, hidden=True)
    second = run_without_waiting(path.recommend(request, {}, NOW_S)).response.videos
    assert len(second) == 10
    assert not {video.video_id for video in first} & {video.video_id for video in second}


def test_retrieval_replica_hides_takedowns(tmp_path: Path) -> None:
    """A process of the composition ``staged``, started from the arguments that Ray Serve passes."""
    run, folders = make_run(tmp_path / "run")
    events = run.path / "events"
    source = ReleaseArgs(
        release=folders[0].name, release_store=str(run.release_store), release_cache=folders[0].parent,
        public_keys=run.keys, overlay=str(run.overlay), events=str(events),
    )  # fmt: skip
    table = ReleaseLoader(folders[0]).table()
    query = cold_start_query(table)
    first = int(table.video_id.base[run_without_waiting(RetrievalStage(source).retrieve(query)).rows[0]])
    publish(events, *takedown(videos=[first]))
    later = table.video_id.base[run_without_waiting(RetrievalStage(source).retrieve(query)).rows]
    assert len(later)
    assert first not in later
