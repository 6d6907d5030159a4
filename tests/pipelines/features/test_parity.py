"""The parity replay accepts correctly served values and reports every kind of injected skew by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.features import views
from reelway.pipelines.features.parity.comparison import ParityReport, same_value
from reelway.pipelines.features.parity.progress import ReplayProgress, forget_vectors
from reelway.pipelines.features.parity.replay import ReplayOptions, replay
from reelway.pipelines.features.parity.run_files import RunFiles
from reelway.pipelines.features.training_rows import video_snapshot
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.feature_names import VIDEO_DENSE
from reelway.platform.errors import MalformedFileError, ParityError
from reelway.platform.features.assembly import assemble_videos, columns_from_table
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.vector_log import ServedVector, VectorLog
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.rollout.evidence import EvidenceState
from reelway.platform.rollout.sources.parity_findings import parity_path, read_parity
from reelway.platform.run_directory import RunDirectory
from reelway.platform.viewer_pseudonyms import viewer_pseudonym


def served_vectors(built: Any) -> list[ServedVector]:
    """Builds vectors as a server does: the viewer row from the online store, the videos from a release's table."""
    rows = ViewerRowReader(open_feature_store(built.run.features))
    snapshot = video_snapshot(built.run.features, built.until_s)
    vectors = []
    for request_id, viewer_id in enumerate(range(500, 512)):
        request_s = built.until_s + 60.0 * (request_id + 1)
        table = snapshot.slice(request_id, 8)
        dense = assemble_videos(columns_from_table(table), np.full(table.num_rows, request_s), DIMENSIONS).video_dense
        videos = [
            {**dict(zip(VIDEO_DENSE, values.tolist(), strict=True)), "video_id": row["video_id"], "topic": row["topic"],
             "creator_id": row["creator_id"], "video_language": row["video_language"]}
            for values, row in zip(dense, table.to_pylist(), strict=True)
        ]  # fmt: skip
        vectors.append(
            ServedVector(request_id, viewer_id, request_s, "phone", "r1", rows.read(viewer_id), videos,
                         videos_as_of_s=built.until_s)
        )  # fmt: skip
    return vectors


@pytest.fixture
def run(built: Any, tmp_path: Path) -> RunDirectory:
    """A copy of the built run, in which replays write."""
    shutil.copytree(built.run.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def replay_log(run: RunDirectory, path: Path, **options: Any) -> ParityReport:
    return replay(str(run.path), ReplayOptions(str(path), **options), 7.0)[0]


def replayed(run: RunDirectory, path: Path, vectors: list[ServedVector]) -> ParityReport:
    log = VectorLog(path, ratio=1.0)
    for vector in vectors:
        assert log.append(vector)
    return replay_log(run, path)


def test_values_served_from_the_same_rows_have_no_mismatch(built, run, tmp_path) -> None:
    report = replayed(run, tmp_path / "log", served_vectors(built))
    assert report.mismatches == []
    assert report.vectors == 12
    assert report.values > 12 * (23 + 8 * 30)
    report.raise_if_bad()


def test_changed_window_is_reported_with_the_feature_name(built, run, tmp_path, monkeypatch) -> None:
    shorter = tuple(
        dataclasses.replace(w, length_s=w.length_s // 2) if w.name == "7d" else w for w in views.names.VIDEO_WINDOWS
    )
    monkeypatch.setattr(views.names, "VIDEO_WINDOWS", shorter)
    report = replayed(run, tmp_path / "log", served_vectors(built))
    assert report.mismatches
    assert {m.view for m in report.mismatches} == {"video_engagement"}
    assert {m.feature for m in report.mismatches} <= {n for n in VIDEO_DENSE if n.endswith("_7d")}
    with pytest.raises(ParityError, match=r"video_engagement\.video_\w+_7d"):
        report.raise_if_bad()


def test_stale_viewer_row_is_reported(built, run, tmp_path) -> None:
    vectors = served_vectors(built)
    path = tmp_path / "log"
    late = [replace(v, viewer_as_of_s=built.until_s - 8 * 86_400) for v in vectors]
    report = replayed(run, path, late)
    features = {m.feature for m in report.mismatches}
    assert {"impressions_1d", "history_videos"} <= features
    assert {m.view for m in report.mismatches} <= {"viewer_activity", "viewer_history", "viewer_topic_affinity"}


@pytest.mark.parametrize(
    ("feature", "change"),
    [("created_at_s", str), ("region", lambda _: 7), ("history_videos", lambda _: "500"),
     ("impressions_30d", lambda value: value is not None)],
)  # fmt: skip
def test_type_change_is_reported(built, run, tmp_path, feature, change) -> None:
    vector = served_vectors(built)[3]
    assert vector.viewer[feature] is not None
    skewed = replace(vector, viewer={**vector.viewer, feature: change(vector.viewer[feature])})
    report = replayed(run, tmp_path / "log", [skewed])
    assert [(m.feature, m.entity) for m in report.mismatches] == [(feature, viewer_pseudonym(503))]


def test_unserved_field_is_reported(built, run, tmp_path) -> None:
    vector = served_vectors(built)[0]
    viewer = {name: value for name, value in vector.viewer.items() if name != "topic_affinity"}
    report = replayed(run, tmp_path / "log", [replace(vector, viewer=viewer)])
    assert [(m.feature, m.served) for m in report.mismatches] == [("topic_affinity", "<absent>")]


def test_mismatch_message_has_view_feature_entity_and_both_values(built, run, tmp_path) -> None:
    vector = served_vectors(built)[0]
    videos = [dict(vector.videos[0]) | {"duration_s": 1.5}, *vector.videos[1:]]
    report = replayed(run, tmp_path / "log", [replace(vector, videos=videos)])
    (miss,) = report.mismatches
    assert str(miss).startswith(
        f"video_content.duration_s of video {videos[0]['video_id']} (request 0): served 1.5, off"
    )


def test_findings_are_separate_per_release(built, run, tmp_path) -> None:
    first, second, third = served_vectors(built)[:3]
    videos = [dict(second.videos[0]) | {"duration_s": 1.5}, *second.videos[1:]]
    replayed(run, tmp_path / "log", [first, replace(second, videos=videos, release="r2"), replace(third, release="r2")])
    write_json(parity_path(run), ReplayProgress.read(RunFiles(run.path)).by_release())
    sound, differing, unknown = (read_parity(run).reading(release) for release in ("r1", "r2", "r3"))
    assert (sound.events, sound.trials) == (0, 9)
    assert (differing.events, differing.trials) == (1, 18)
    assert "duration_s" in differing.detail
    assert unknown.state is EvidenceState.INSUFFICIENT


def test_findings_add_up_and_expire_after_a_day(built, run, tmp_path) -> None:
    first, second, third = served_vectors(built)[:3]
    log = VectorLog(tmp_path / "log", ratio=1.0)
    options, rows = ReplayOptions(str(tmp_path / "log")), []
    for vector, checked_at in ((first, 0.0), (second, 3_600.0), (third, 30 * 3_600.0)):
        log.append(vector)
        rows.append(replay(str(run.path), options, checked_at)[1].by_release()["r1"]["rows"])
    assert rows == [9, 18, 9]


def test_replay_from_the_start_takes_all_vectors_again(built, run, tmp_path) -> None:
    vectors = served_vectors(built)
    assert replayed(run, tmp_path / "log", vectors).vectors == len(vectors)
    forget_vectors(RunFiles(run.path), 8.0)
    assert replay_log(run, tmp_path / "log").vectors == len(vectors)


def test_damaged_progress_is_reported_with_a_remedy(run, tmp_path) -> None:
    progress = run.path / "parity" / "progress.json"
    write_json(progress, {"version": 99})
    with pytest.raises(MalformedFileError, match="--from-start"):
        replay_log(run, tmp_path / "log")
    forget_vectors(RunFiles(run.path), 8.0)
    assert json.loads(progress.read_text())["next_file"] == 8


def test_empty_log_has_nothing_to_replay(run, tmp_path) -> None:
    report = replay_log(run, tmp_path / "none")
    assert (report.vectors, report.values) == (0, 0)


def test_values_of_different_types_are_unequal() -> None:
    assert same_value(1, 1.0)
    assert same_value(None, float("nan"))
    assert same_value([1.0, None], [1.0, None])
    assert not same_value("1.0", 1.0)
    assert not same_value(True, 1.0)
    assert not same_value([1.0], [1.0, 1.0])
    assert not same_value(0.0, None)
    assert not same_value(1.0001, 1.0)
    assert same_value(1e-7, 0.0)
