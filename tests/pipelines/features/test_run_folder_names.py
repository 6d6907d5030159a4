"""Run folders may have any name: no part of a path is taken for a partition or a pattern."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.training_rows import video_snapshot, viewer_snapshot
from reelway.platform.run_directory import RunDirectory

NAMES = (
    "region=eu/segment=5/viewer_id=7/event_timestamp=2020-01-01",
    "exp [1]/a*b?/[!a]",
    '50% #1/it\'s "x"/{a,b}/~me/a:b',
)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_a_run_do_not_depend_on_its_folder(built, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    run = RunDirectory(tmp_path / name)
    shutil.copytree(built.run.path, run.path)
    register_features(run.features, DIMENSIONS, "sqlite")
    (run.features / "views" / "viewer_profile" / "._bucket-0000.parquet").write_bytes(b"\0\5\26\7Mac OS X")
    viewers = sorted(built.tables["viewers"]["viewer_id"].to_pylist())
    expected = viewer_snapshot(built.run.features, viewers, built.until_s)
    assert len(set(expected["region"].to_pylist())) > 1
    assert viewer_snapshot(run.features, viewers, built.until_s).equals(expected)
    assert video_snapshot(run.features, built.until_s).equals(video_snapshot(built.run.features, built.until_s))
