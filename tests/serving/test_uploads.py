"""Uploads on the request path: from the event log by the overlay writer into the slates of every replica."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tests.support.release_files import NOW_S
from tests.support.serving.feature_changes import change, rows_of
from tests.support.serving.takedowns import follower, publish, takedown
from tests.support.serving.uploads import make_run, overlay_writer, upload, writer_options

from reelway.pipelines.features.stream.overlay_writer import OverlayWriter, OverlayWriterMetrics, run_overlay_writer
from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.blend import Blend, RerankingSettings, RetrievalSettings
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.feature_names import VIDEO_LIVE_DENSE
from reelway.platform.errors import StorageError
from reelway.platform.eventlog.feature_changelog import CREATORS, ENGAGEMENT, FeatureChange, FeatureChangelog
from reelway.platform.eventlog.upload_overlay import OverlayRequests, UploadChangelog
from reelway.platform.run_directory import RunDirectory
from reelway.platform.tokens import TokenSigner
from reelway.serving.live_overlay import FeatureOverlay, UploadOverlay
from reelway.serving.metrics import IngressMetrics
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import LocalStages, RequestPath, run_without_waiting
from reelway.serving.slates import RolloutArm
from reelway.serving.stages.sources import SourceQuery
from reelway.serving.video_table import ABSENT, VideoTable
from reelway.serving.viewer_query import cold_start_query

VIDEOS = 60
BLEND = Blend(
    retrieval=RetrievalSettings(
        quotas={"ann": 0.4, "trending": 0.1, "popular": 0.2, "neighbours": 0.1, "fresh": 0.2}, fresh_hours=48
    ),
    reranking=RerankingSettings(max_per_creator=100),
)


@dataclass
class Replica:
    """One replica of a release whose overlay the test polls."""

    loader: ReleaseLoader
    overlay: Path

    def __post_init__(self) -> None:
        table = self.table
        width = table.embedding.shape[1]
        self.uploads = UploadOverlay(table, UploadChangelog(self.overlay, self.loader.release_id(), width))
        self.features = FeatureOverlay(table, FeatureChangelog(self.overlay))

    @property
    def table(self) -> VideoTable:
        return self.loader.table()

    def poll(self) -> int:
        appended = self.uploads.poll()
        self.features.poll()
        return appended

    def path(self, stages: LocalStages | None = None, arm: Arm = Arm.STABLE) -> RequestPath:
        metrics = IngressMetrics(CollectorRegistry())
        signer = TokenSigner(b"s" * 32)
        release = self.loader.router_release()
        return RequestPath(release, stages or self.loader.stages(), signer, metrics, RolloutArm(arm))

    def slate(self, stages: LocalStages | None = None, arm: Arm = Arm.STABLE, **row: object) -> dict[int, str | None]:
        """Returns video id -> title of a slate of all videos."""
        work = self.path(stages, arm).recommend(RecommendRequest(viewer_id=1, count=100), row, NOW_S)
        answer = run_without_waiting(work).response
        assert not answer.degraded
        return {video.video_id: video.title for video in answer.videos}


@pytest.fixture
def made(tmp_path: Path) -> tuple[RunDirectory, list[Path]]:
    return make_run(tmp_path / "run", releases=2, videos=VIDEOS, blend=BLEND)


@pytest.fixture
def run(made: tuple[RunDirectory, list[Path]]) -> RunDirectory:
    return made[0]


@pytest.fixture
def replica(made: tuple[RunDirectory, list[Path]]) -> Replica:
    return Replica(ReleaseLoader(made[1][0]), made[0].overlay)


@pytest.fixture
def writer(made: tuple[RunDirectory, list[Path]]) -> Iterator[OverlayWriter]:
    run, folders = made
    OverlayRequests(run.overlay).request(folders[0].name, time.time())
    with overlay_writer(run) as writing:
        yield writing


def events(run: RunDirectory) -> Path:
    return run.path / "events"


def test_upload_is_a_candidate_of_the_index_and_the_fresh_source(
    run: RunDirectory, writer: OverlayWriter, replica: Replica
) -> None:
    stages = replica.loader.stages()
    publish(events(run), upload(1), upload(2, age_s=3 * 86_400))
    writer.step()
    assert 1 not in replica.slate(stages)
    assert replica.poll() == 2
    slate = replica.slate(stages)
    assert (slate[1], slate[2]) == ("Upload 1", "Upload 2")

    retrieval = stages.retrieval
    sources = dict(zip(("ann", "trending", "popular", "neighbours", "fresh"), retrieval._sources, strict=True))
    query = cold_start_query(replica.table)
    embedding = replica.table.embedding[np.array([VIDEOS])]
    nearest = sources["ann"].propose(SourceQuery(query, embedding, 5))
    assert nearest.rows[0] == VIDEOS
    assert nearest.similarity is not None
    assert abs(float(nearest.similarity[0]) - 1) < 1e-5
    assert (np.diff(nearest.similarity) <= 0).all()
    object.__setattr__(query, "now_s", NOW_S)
    fresh = sources["fresh"].propose(SourceQuery(query, embedding, 50)).rows
    assert fresh[0] == VIDEOS
    assert VIDEOS + 1 not in fresh  # older than 48 hours
    assert (np.diff(replica.table.uploaded_at_s[fresh]) <= 0).all()


def test_row_of_an_upload_equals_the_row_of_a_build(run: RunDirectory, writer: OverlayWriter, replica: Replica) -> None:
    """The features of the ranker are those that the batch's functions give."""
    publish(events(run), upload(1, topic=7, language=None, audio=None, title=None))
    writer.step()
    replica.poll()
    gathered = replica.table.gather(np.array([VIDEOS]), NOW_S)
    dense = gathered.video_dense[0]
    assert dense[:4].tolist() == [9.0, 1.0, 0.0, 1.0]  # duration_s, has_visual, has_audio, has_text
    assert np.isnan(dense[4 : 4 + 25]).all()  # no engagement yet
    assert dense[-1] == pytest.approx(60 / 3600)
    assert gathered.video_categories[0].tolist() == [8, 0]
    same_creator = np.flatnonzero(replica.table.creator_id.base == 5)
    assert gathered.creator_codes[0].tolist() == replica.table.gather(same_creator[:1], NOW_S).creator_codes[0].tolist()
    assert np.linalg.norm(gathered.video_embedding) == pytest.approx(1, abs=1e-4)
    assert replica.table.titles(np.array([VIDEOS, ABSENT])) == [None, None]


@pytest.mark.parametrize("known", [True, False])
def test_update_replaces_the_former_row(
    run: RunDirectory, writer: OverlayWriter, replica: Replica, known: bool
) -> None:
    """Also of a video that the release itself has, and in its popular list."""
    video = int(replica.table.video_id.base[replica.loader.router_release().lists.current().popular[0]]) if known else 7
    if not known:
        publish(events(run), upload(video, title="old"))
        writer.step()
        replica.poll()
    publish(events(run), upload(video, title="new", version=2))
    writer.step()
    replica.poll()
    assert replica.slate()[video] == "new"
    row = int(replica.table.rows_of(np.array([video]))[0])
    assert row == VIDEOS + (not known)
    if known:
        assert replica.slate(arm=Arm.HOLDOUT)[video] == "new"
    publish(events(run), upload(video, title="older", version=1))
    writer.step()
    assert replica.poll() == 0


def test_takedown_hides_an_upload_in_whatever_order_they_are_read(run: RunDirectory, replica: Replica) -> None:
    takedowns = follower(events(run)).start()
    hiding = Replica(ReleaseLoader(replica.loader.folder, takedowns=takedowns), run.overlay)
    OverlayRequests(run.overlay).request(replica.loader.release_id(), time.time())
    publish(events(run), *takedown(videos=[1], creators=[77]), upload(1), upload(2), upload(3, creator_id=77))
    takedowns.hide_in(hiding.table)
    with overlay_writer(run) as writer:
        writer.step()
        assert hiding.poll() == 3
        assert {1, 2, 3} & set(hiding.slate()) == {2}
        publish(events(run), *takedown(videos=[2]), upload(2, version=2), upload(1, version=5))
        takedowns.hide_in(hiding.table)
        writer.step()
        hiding.poll()
    assert not {1, 2, 3} & set(hiding.slate())
    takedowns.stop()


def test_stages_that_are_behind_drop_rows_instead_of_failing(
    made: tuple[RunDirectory, list[Path]], run: RunDirectory, writer: OverlayWriter
) -> None:
    """Composition ``staged``: every process reads the overlay at its own times; row numbers agree."""
    publish(events(run), upload(1), upload(2))
    writer.step()
    names = ("router", "retrieval", "ranking", "reranking")
    for ahead in itertools.product([False, True], repeat=4):
        processes = {name: Replica(ReleaseLoader(made[1][0]), run.overlay) for name in names}
        for process, polls in zip(processes.values(), ahead, strict=True):
            if polls:
                assert process.poll() == 2
        stages = LocalStages(*(
            getattr(processes[name].loader, name)() for name in names[1:]
        ))  # fmt: skip
        watched = {"history_videos": [1], "history_weights": [-1.0]} if ahead[0] else {}
        slate = processes["router"].slate(stages, **watched)
        assert ({1, 2} & set(slate) == ({2} if ahead[0] else {1, 2})) == all(ahead)
        assert len(set(slate) - {1, 2}) > 20


def test_tables_fed_at_different_times_agree_on_row_numbers(
    made: tuple[RunDirectory, list[Path]], run: RunDirectory, writer: OverlayWriter, replica: Replica
) -> None:
    late = Replica(ReleaseLoader(made[1][0]), run.overlay)
    for number in range(70):  # beyond the first snapshot
        publish(events(run), upload(number % 50, version=number, title=f"v{number}"))
        writer.step()
        if number % 7 == 0:
            replica.poll()
    replica.poll()
    assert late.poll() == 70
    rows = np.arange(VIDEOS, VIDEOS + 70)
    for name in ("video_id", "creator_id", "uploaded_at_s", "embedding"):
        np.testing.assert_array_equal(getattr(replica.table, name)[rows], getattr(late.table, name)[rows])
    assert replica.table.titles(rows) == late.table.titles(rows)
    everything = np.arange(VIDEOS + 70, dtype=np.int32)
    np.testing.assert_array_equal(replica.table.servable_rows(everything), late.table.servable_rows(everything))
    assert len(list((run.overlay / replica.loader.release_id()).glob("snapshot-*.arrow"))) == 1


def test_killed_writer_continues_without_loss_or_repetition(
    run: RunDirectory, writer: OverlayWriter, replica: Replica
) -> None:
    publish(events(run), upload(1), upload(2))
    writer.step()
    publish(events(run), upload(3))
    with overlay_writer(run) as successor:  # the first writer's memory is gone
        successor.step()
        publish(events(run), upload(4), upload(1, version=0))
        successor.step()
    replica.poll()
    assert replica.table.video_id.added.tolist() == [1, 2, 3, 4]


def test_release_that_opens_later_gets_all_uploads_with_its_own_embedding(
    made: tuple[RunDirectory, list[Path]], run: RunDirectory, writer: OverlayWriter, replica: Replica
) -> None:
    publish(events(run), upload(1), upload(1, version=2, title="new"), upload(2))
    writer.step()
    assert replica.poll() == 2
    canary = Replica(ReleaseLoader(made[1][1]), run.overlay)
    OverlayRequests(run.overlay).request(canary.loader.release_id(), time.time())
    with overlay_writer(run) as successor:
        successor.step()
    canary.poll()
    assert canary.table.video_id.added.tolist() == [1, 2]
    assert canary.slate()[1] == "new"


def test_refused_uploads_are_counted_and_block_nothing(run: RunDirectory, replica: Replica) -> None:
    registry, release = CollectorRegistry(), replica.loader.release_id()
    OverlayRequests(run.overlay).request(release, time.time())
    OverlayRequests(run.overlay).request("f" * 64, time.time())  # is not in the store
    publish(events(run), upload(1, visual=[1.0]), upload(2, topic=32), upload(3))
    with overlay_writer(run, registry) as writer:
        writer.step()
        writer._overlays[release]._capacity = 2
        publish(events(run), upload(4), upload(5))
        writer.step()

    def refused(kind: str) -> float | None:
        labels = {"release": release[:12], "kind": kind}
        return registry.get_sample_value("reelway_uploads_refused_total", labels)

    assert (refused("dimensions"), refused("capacity"), refused("unreadable")) == (2, 1, 0)
    assert registry.get_sample_value("reelway_uploads_faults_total") == 1
    replica.poll()
    assert replica.table.video_id.added.tolist() == [3, 4]


def test_age_grows_while_a_requested_release_is_not_written(run: RunDirectory, replica: Replica) -> None:
    registry, now_s = CollectorRegistry(), [time.time()]
    requests, missing = OverlayRequests(run.overlay), "f" * 64

    def age_s() -> float | None:
        return registry.get_sample_value("reelway_uploads_age_seconds")

    requests.request(replica.loader.release_id(), now_s[0])
    with closing(OverlayWriter(writer_options(run), OverlayWriterMetrics(registry), lambda: now_s[0])) as writer:
        writer.step()
        assert age_s() == 0
        now_s[0] += 7
        assert age_s() == 7  # the writer does not step
        writer.step()
        assert age_s() == 0
        requests.request(missing, now_s[0])
        now_s[0] += 7
        writer.step()
        writer.step()
        assert age_s() == 7
        (run.overlay / missing / "requested").unlink()
        now_s[0] += 7
        writer.step()
        assert age_s() == 0


def test_age_grows_while_the_catalogue_cannot_be_read(writer: OverlayWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    age = writer._metrics.age
    writer.step()
    monkeypatch.setattr(writer._uploads, "step", _fail_to_read)
    now_s = time.time()
    writer._clock = lambda: now_s + 30
    assert writer.step() == 0
    assert 29 < age.collect()[0].samples[0].value < 31


def _fail_to_read() -> None:
    raise StorageError("no broker")


def test_upsert_that_the_release_has_already_gets_no_row(writer: OverlayWriter, replica: Replica) -> None:
    """Uploads that were folded into a release do not take room in its overlay."""
    writer.step()
    overlay = writer._overlays[replica.loader.release_id()]
    rows = overlay._rows
    own = rows._table.slice(0, 3)
    again = pa.Table.from_batches([own]).replace_schema_metadata(None)
    assert rows.differ_from_release(again).tolist() == [False, False, False]
    for name in ("title", "creator_id", "embedding"):
        index = again.schema.get_field_index(name)
        changed = again.set_column(index, again.schema.field(index), again[name].take([1, 2, 0]))
        assert rows.differ_from_release(changed).any()


def test_creator_statistics_reach_uploads_of_the_creator(
    run: RunDirectory, writer: OverlayWriter, replica: Replica
) -> None:
    log = FeatureChangelog(run.overlay)
    log.append(change(1, rows_of(CREATORS, {5: 0.25, 900: 0.75}), rows_of(ENGAGEMENT, {2: 0.5})))
    replica.poll()
    publish(events(run), upload(1), upload(2, creator_id=900))
    writer.step()
    replica.poll()
    followers, likes = (VIDEO_LIVE_DENSE.index(name) for name in ("creator_followers", "video_like_rate_1h"))
    added = np.array([VIDEOS, VIDEOS + 1])
    assert replica.table.live.at(added)[:, followers].tolist() == [0.25, 0.75]
    assert np.isnan(replica.table.live.at(added)[0, likes])
    assert replica.table.live.at(added)[1, likes] == 0.5  # streamed before the row was read
    log.append(FeatureChange(2, 2_000_000, change(2, rows_of(CREATORS, {900: 1.0})).rows))
    publish(events(run), upload(2, creator_id=900, version=2))
    writer.step()
    replica.poll()
    newest = replica.table.rows_of(np.array([2]))
    assert replica.table.live.at(newest)[0, [followers, likes]].tolist() == [1.0, 0.5]


@given(versions=st.permutations(range(6)), cut=st.integers(0, 6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_versions_ends_in_the_same_catalogue(
    tmp_path_factory: pytest.TempPathFactory, shared_run: tuple[RunDirectory, list[Path]], versions: list[int], cut: int
) -> None:
    """Versions of two videos, read in two parts by two writers."""
    (source, folders), folder = shared_run, tmp_path_factory.mktemp("order")
    run = RunDirectory(folder)
    for name in ("releases", "keys", "serving"):
        (folder / name).symlink_to(source.path / name)
    replica = Replica(ReleaseLoader(folders[0]), run.overlay)
    OverlayRequests(run.overlay).request(replica.loader.release_id(), time.time())
    for part in (versions[:cut], versions[cut:]):
        publish(events(run), *(upload(1 + v % 2, version=v, title=f"v{v}") for v in part))
        with overlay_writer(run) as writer:
            while writer.step():
                pass
        replica.poll()
    rows = replica.table.rows_of(np.array([1, 2]))
    assert replica.table.titles(replica.table.servable_rows(rows)) == ["v4", "v5"]


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, list[Path]]:
    return make_run(tmp_path_factory.mktemp("shared"), videos=VIDEOS, blend=BLEND)


def test_upload_is_servable_within_five_seconds(made: tuple[RunDirectory, list[Path]], run: RunDirectory) -> None:
    """The whole chain with its own threads: log, overlay writer, overlay files, follower of the replica."""
    stop = threading.Event()
    writing = threading.Thread(target=run_overlay_writer, args=(writer_options(run), stop))
    writing.start()
    loader = ReleaseLoader(made[1][0], overlay=str(run.overlay))
    loader.table()
    try:
        for video in (1, 2, 3):
            publish(events(run), upload(video))
            began = time.monotonic()
            while loader.table().rows_of(np.array([video]))[0] == ABSENT:
                assert time.monotonic() - began < 30
                time.sleep(0.01)
            assert video == 1 or time.monotonic() - began < 5  # the first waits for the release to be opened
    finally:
        stop.set()
        writing.join(10)
    assert not writing.is_alive()
