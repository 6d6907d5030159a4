"""Building a release from a trained run: contents, verification, waivers and failures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.trained_run import DIM, make_trained_run, write_evaluation
from typer.testing import CliRunner, Result

from reelway.pipelines.features.training_rows import viewer_snapshot
from reelway.pipelines.release_builder import build_release, load_blend_file, read_evaluation, required_feature_services
from reelway.pipelines.training.artifacts import load_models
from reelway.platform.cli.main import build_app
from reelway.platform.contracts import manifest as files
from reelway.platform.contracts.blend import Blend, RerankingSettings
from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import Manifest
from reelway.platform.contracts.release_files import POPULAR_SCHEMA, videos_schema
from reelway.platform.errors import (
    ConfigError,
    GateFailedError,
    MalformedFileError,
    ReleaseError,
    ReleaseNotFoundError,
    StorageError,
    TrainingError,
)
from reelway.platform.features.assembly import assemble_viewers, columns_from_table
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.tables import open_table
from reelway.platform.release.verify import read_calibration, verify
from reelway.platform.run_directory import RunDirectory

KEY = Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_trained_run(tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture(scope="module")
def built(original: RunDirectory) -> Path:
    blend = Blend(reranking=RerankingSettings(diversity=0.3))
    return original.release_store / build_release(original, name="first", key=KEY, blend=blend)


@pytest.fixture
def run(original: RunDirectory, tmp_path: Path) -> RunDirectory:
    copy = shutil.copytree(original.path, tmp_path / "run", ignore=shutil.ignore_patterns("releases"))
    return RunDirectory(Path(copy))


def manifest_of(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / files.MANIFEST_FILE).read_text())


def test_built_release_verifies_against_its_feature_store(built: Path, original: RunDirectory) -> None:
    services = {service.name: service.digest for service in required_feature_services(original.features)}
    verified = verify(built, public_keys=[KEY.public_key()], feature_services=services, expected_id=built.name)
    assert verified.manifest.name == "first"
    assert verified.manifest.dimensions.embedding == DIM
    assert verified.manifest.dimensions.videos == 60
    assert verified.manifest.seed == 3
    assert ReleaseStore(str(original.release_store)).resolve("latest") == built.name


def test_manifest_records_metrics(built: Path) -> None:
    manifest = manifest_of(built)
    assert manifest.metrics == {"recall_at_50": 0.4}
    assert manifest.config["undefined_metrics"] == ["auc_share"]
    assert manifest.config["notes"] == ["share had one class only"]
    assert [gate.name for gate in manifest.gates] == ["recall_at_50"]


def test_exported_tower_equals_the_trained_tower(built: Path, original: RunDirectory) -> None:
    at_s = manifest_of(built).config["video_features_as_of_s"]
    table = viewer_snapshot(original.features, list(range(500, 520)), at_s)
    viewers = assemble_viewers(columns_from_table(table), np.full(20, at_s), ["phone"] * 20, DIMENSIONS)
    (embedding,) = onnxruntime.InferenceSession(built / files.VIEWER_TOWER_FILE).run(None, viewers.as_inputs())
    tower = load_models(original.models).two_tower.viewer_tower
    with torch.inference_mode():
        expected = tower(*(torch.from_numpy(values) for values in viewers.as_inputs().values())).numpy()
    np.testing.assert_allclose(embedding, expected, atol=1e-4)
    videos = open_table(built / files.VIDEOS_FILE, videos_schema(DIM))
    vectors = videos["embedding"].flatten().to_numpy().reshape(-1, DIM)
    rows = faiss.read_index(str(built / files.INDEX_FILE)).search(embedding, 5)[1]
    np.testing.assert_array_equal(rows, np.argsort(-(embedding @ vectors.T), axis=1, kind="stable")[:, :5])


def test_release_contains_the_given_blend(built: Path) -> None:
    assert yaml.safe_load((built / files.BLEND_FILE).read_text())["reranking"]["diversity"] == 0.3
    assert list(read_calibration(built).curves) == ["like"]


def test_most_watched_video_leads_the_popular_list(built: Path, original: RunDirectory) -> None:
    labels = pq.read_table(original.features / "labels.parquet", columns=["video_id", "long_watch"])
    totals = labels.group_by("video_id").aggregate([("long_watch", "sum")])
    leader = totals.sort_by([("long_watch_sum", "descending"), ("video_id", "ascending")])["video_id"][0].as_py()
    first = open_table(built / files.POPULAR_FILE, POPULAR_SCHEMA).slice(0, 1).to_pylist()[0]
    assert (first["list"], first["rank"], first["video_id"]) == ("popular", 0, leader)


def test_failed_gates_are_named_without_a_build(run: RunDirectory) -> None:
    def gate(name: str, value: float, passed: bool) -> dict[str, Any]:
        return {"name": name, "value": value, "bound": 0.3, "comparison": ">=", "passed": passed}

    write_evaluation(run, gates=[gate("recall", 0.1, False), gate("ndcg", 0.5, True), gate("auc", 0.2, False)])
    before = sorted(path.name for path in run.path.iterdir())
    with pytest.raises(GateFailedError, match=r"2 of 3 gates failed: recall is 0\.1, .*; auc is 0\.2,"):
        build_release(run, name="x", key=KEY)
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_waiver_is_part_of_the_signed_manifest(run: RunDirectory) -> None:
    gate = {"name": "recall", "value": 0.1, "bound": 0.3, "comparison": ">=", "passed": False}
    write_evaluation(run, gates=[gate])
    rejected = reelway("build", "--run", run.path, "--waive", "recall")
    assert isinstance(rejected.exception, ConfigError)
    result = reelway("build", "--run", run.path, "--waive", "recall = first week", "--waived-by", "ines")
    assert result.exit_code == 0, result.exception
    waiver = manifest_of(run.release_store / result.stdout.strip()).waivers[0]
    assert (waiver.gate, waiver.reason, waiver.by) == ("recall", "first week", "ines")
    assert "WAIVED: gate recall failed; ines: first week" in reelway("verify", "--run", run.path).stderr
    assert "1 WAIVED" in reelway("list", "--run", run.path).stdout


def test_failed_store_write_leaves_no_files(run: RunDirectory) -> None:
    run.release_store.write_text("a file where the store should be")
    before = sorted(path.name for path in run.path.iterdir())
    with pytest.raises(StorageError):
        build_release(run, name="x", key=KEY)
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_interrupted_build_leaves_no_files(run: RunDirectory) -> None:
    before = sorted(path.name for path in run.path.iterdir())

    def interrupt(step: str) -> None:
        if step == "exporting the models":
            assert list(run.path.glob(".release.*/index.faiss")), "the build was under way"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_release(run, name="x", key=KEY, on_progress=interrupt)
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_missing_models_error_names_the_command(run: RunDirectory) -> None:
    shutil.rmtree(run.models)
    with pytest.raises(TrainingError, match="no finished training; run `reelway train`"):
        build_release(run, name="x", key=KEY)


def test_run_without_evaluation_is_rejected(run: RunDirectory) -> None:
    (run.evaluation / "evaluation.json").unlink()
    with pytest.raises(ReleaseError, match="reelway evaluate"):
        build_release(run, name="x", key=KEY)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"metrics": {}}', '{"metrics": {"a": "b"}, "gates": []}', '{"metrics": {}, "gates": [{"name": 1}]}'],
)
def test_invalid_evaluation_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(MalformedFileError, match=r"evaluation\.json"):
        read_evaluation(tmp_path / "evaluation.json")


def test_invalid_blend_file_is_rejected_with_its_field(tmp_path: Path) -> None:
    path = tmp_path / "blend.yaml"
    path.write_text("reranking: {max_per_creator: 1}")
    assert load_blend_file(path).reranking.max_per_creator == 1
    path.write_text("ranking: {value_weights: {likes: 1}}")
    with pytest.raises(MalformedFileError, match=r"ranking: .*likes"):
        load_blend_file(path)
    with pytest.raises(MalformedFileError, match=r"none\.yaml"):
        load_blend_file(tmp_path / "none.yaml")


def reelway(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), ["release", *(str(argument) for argument in arguments)])


def test_build_command_skips_an_existing_release(
    run: RunDirectory,
) -> None:
    first = reelway("build", "--run", run.path, "--name", "by-hand")
    assert first.exit_code == 0, first.exception
    release_id = first.stdout.strip()
    assert "created the run's signing key" in first.stderr
    again = reelway("build", "--run", run.path, "--name", "by-hand")
    assert "already done with the same inputs, skipped" in again.stderr
    assert again.stdout.strip() == release_id

    verified = reelway("verify", "--run", run.path)
    assert verified.exit_code == 0, verified.exception
    assert "training_row_v1, viewer_row_v1" in verified.stdout

    ReleaseStore(str(run.release_store)).remove(ReleaseId(release_id))
    rebuilt = reelway("build", "--run", run.path, "--name", "by-hand")
    assert "skipped" not in rebuilt.stderr
    assert (run.release_store / rebuilt.stdout.strip() / files.MANIFEST_FILE).exists()


def test_build_command_writes_to_the_named_store(run: RunDirectory, tmp_path: Path) -> None:
    store = tmp_path / "shared" / "releases"
    first = reelway("build", "--run", run.path, "--store", f"file://{store}")
    assert first.exit_code == 0, first.exception
    assert (store / first.stdout.strip() / files.MANIFEST_FILE).exists()
    assert not run.release_store.exists()
    assert "skipped" in reelway("build", "--run", run.path, "--store", f"file://{store}").stderr
    shutil.rmtree(store)
    assert "skipped" not in reelway("build", "--run", run.path, "--store", f"file://{store}").stderr


def test_unknown_parent_is_rejected_before_the_build(run: RunDirectory) -> None:
    ended = reelway("build", "--run", run.path, "--parent", "abc")
    assert isinstance(ended.exception, ReleaseNotFoundError)
    assert not run.release_store.exists()
