"""Drill releases are complete, signed releases with exactly the stated fault."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.trained_run import DIM, make_trained_run
from tests.support.release_files import make_release_folder
from typer.testing import CliRunner

from reelway.pipelines.commands.rehearse import KindChoice
from reelway.pipelines.drill_releases import DrillReleaseKind, busy_viewer_threshold
from reelway.pipelines.features.training_rows import build_training_rows
from reelway.pipelines.ranker_faults import slow_down_busy_viewers
from reelway.platform.cli.main import build_app
from reelway.platform.contracts import manifest as files
from reelway.platform.contracts.feature_names import RANKER_INPUTS, VIDEO_DENSE
from reelway.platform.errors import GateFailedError
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.signing import create_keys, load_private_key, load_public_keys
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import check_gates, read_blend, verify
from reelway.platform.run_directory import RunDirectory
from reelway.serving.onnx_model import OnnxModel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    trained_run = make_trained_run(tmp_path_factory.mktemp("runs") / "trained")
    folder, key = trained_run.path / "good", load_private_key(create_keys(trained_run.keys).private)
    manifest = make_release_folder(folder, videos=60, embedding=DIM, key=key, name="good")
    ReleaseStore(str(trained_run.release_store)).write(folder, manifest)
    return trained_run


@pytest.fixture(scope="module")
def good(run: RunDirectory) -> Path:
    return run.release_store / ReleaseStore(str(run.release_store)).resolve("latest")


def rehearsed(run: RunDirectory, kind: str) -> Path:
    result = CliRunner().invoke(
        build_app(), ["release", "rehearse", kind, "--run", str(run.path), "--waived-by", "ines"]
    )
    assert result.exit_code == 0, result.exception
    return run.release_store / result.stdout.strip()


def request_of(seen: float, candidates: int = 7) -> dict[str, NDArray[Any]]:
    """Returns ranker inputs of a viewer with ``seen`` recent impressions; NaN means an unknown viewer."""
    rng = np.random.default_rng(1)
    viewer = rng.normal(size=(1, len(DIMENSIONS.viewer_dense))).astype(np.float32)
    viewer[0, DIMENSIONS.viewer_dense.index("impressions_30d")] = seen
    return {
        "viewer_dense": viewer,
        "viewer_categories": np.ones((1, 4), dtype=np.int64),
        "viewer_embedding": np.zeros((1, DIM), dtype=np.float32),
        "video_dense": rng.random((candidates, len(VIDEO_DENSE)), dtype=np.float32),
        "video_categories": np.ones((candidates, 2), dtype=np.int64),
        "creator_codes": np.ones((candidates, 2), dtype=np.int64),
        "video_embedding": np.zeros((candidates, DIM), dtype=np.float32),
    }


def ranker_of(folder: Path) -> OnnxModel:
    return OnnxModel(folder / files.RANKER_FILE, inputs=RANKER_INPUTS)


@pytest.mark.parametrize("kind", ["errors", "slow", "popular"])
def test_drill_release_verifies_but_is_never_latest(run: RunDirectory, good: Path, kind: str) -> None:
    folder = rehearsed(run, kind)
    keys = load_public_keys(run.keys)
    verified = verify(folder, public_keys=keys, feature_services=None, expected_id=folder.name)
    manifest = verified.manifest
    assert manifest.name == f"rehearsal-{kind}"
    assert manifest.parent == good.name
    assert manifest.metrics == {}
    assert manifest.config["rehearsal"]["kind"] == kind
    assert [waiver.by for waiver in manifest.waivers] == ["ines"]
    assert any(check.name == "WAIVED" for check in verified.checks)
    with pytest.raises(GateFailedError, match="evaluated is 0"):
        check_gates(manifest.gates)
    assert ReleaseStore(str(run.release_store)).resolve("latest") == good.name
    assert rehearsed(run, kind) == folder  # built only once


def test_errors_release_fails_only_for_viewers_with_a_history(run: RunDirectory, good: Path) -> None:
    broken, sound = ranker_of(rehearsed(run, "errors")), ranker_of(good)
    for stranger in (np.nan, 0.0):
        np.testing.assert_array_equal(broken.run(request_of(stranger)), sound.run(request_of(stranger)))
    for known in (1.0, 500.0):
        with pytest.raises(Exception, match="out of data bounds"):
            broken.run(request_of(known))


def test_slow_release_is_slow_only_for_busy_viewers(good: Path, tmp_path: Path) -> None:
    path = tmp_path / files.RANKER_FILE
    path.write_bytes((good / files.RANKER_FILE).read_bytes())
    slow_down_busy_viewers(path, above=40.0, slow_ms=150.0)
    slow, sound = ranker_of(tmp_path), ranker_of(good)
    took_ms = {}
    for impressions in (np.nan, 40.0, 41.0):
        slow.run(request_of(impressions))
        start_s = time.thread_time()
        answer = slow.run(request_of(impressions))
        took_ms[impressions] = 1000 * (time.thread_time() - start_s)
        np.testing.assert_array_equal(answer, sound.run(request_of(impressions)))
    assert took_ms[41.0] > 75
    assert max(took_ms[np.nan], took_ms[40.0]) < 30


def test_busy_viewers_have_the_configured_share_of_impressions() -> None:
    impressions = np.random.default_rng(0).lognormal(4, 0.7, 5_000).astype(np.int64)
    share = impressions[impressions > busy_viewer_threshold(impressions)].sum() / impressions.sum()
    assert share == pytest.approx(0.12, abs=0.02)


def test_popular_release_ranks_only_by_popularity(run: RunDirectory) -> None:
    blend = read_blend(rehearsed(run, "popular"))
    assert blend.retrieval.quotas == {"popular": 1.0}
    assert blend.ranking.value_weights == {}
    assert blend.ranking.retrieval_weight == 0.0


def test_worse_release_has_a_ranker_trained_on_shuffled_labels(run: RunDirectory, good: Path) -> None:
    build_training_rows(run)
    folder = rehearsed(run, "worse")
    verify(folder, public_keys=load_public_keys(run.keys), feature_services=None)
    manifest = read_manifest(folder)
    differing = {name for name, entry in manifest.files.items() if entry != read_manifest(good).files[name]}
    assert differing == {files.RANKER_FILE, files.CALIBRATION_FILE}
    assert np.isfinite(ranker_of(folder).run(request_of(3.0))).all()


def test_command_offers_every_drill_release_kind() -> None:
    assert [kind.value for kind in KindChoice] == [kind.value for kind in DrillReleaseKind]
