"""Evaluation of a complete run: evaluation.json, gates, printed table and recommendations of trained models."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.support.pipelines.event_tables import START_US
from tests.support.pipelines.trained_run import make_trained_run
from typer.testing import CliRunner

from reelway.pipelines.evaluation.gates import GateSettings, evaluate_gates
from reelway.pipelines.evaluation.harness import PAD, RankingResult, make_temporal_split
from reelway.pipelines.evaluation.heads import HeadQuality
from reelway.pipelines.evaluation.metrics import BootstrapEstimate
from reelway.pipelines.evaluation.recommender import recommenders_at_cut
from reelway.pipelines.evaluation.report import ALS, RETRIEVAL_ONLY, TWO_STAGE, EvaluationSettings, evaluate_run
from reelway.pipelines.features.training_rows import LABELS_FILE, build_training_rows
from reelway.pipelines.release_builder import read_evaluation
from reelway.pipelines.training.artifacts import load_models, save_models
from reelway.platform.cli.main import build_app
from reelway.platform.contracts.blend import Blend
from reelway.platform.errors import EmptyDatasetError
from reelway.platform.run_directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    trained_run = make_trained_run(tmp_path_factory.mktemp("evaluate") / "run", requests=400)
    build_training_rows(trained_run)
    models = load_models(trained_run.models)
    time_s = pq.read_table(trained_run.features / LABELS_FILE)["event_time"].cast("int64").to_numpy() / 1e6
    save_models(
        replace(models, info=replace(models.info, window_end_s=float(np.quantile(time_s, 0.7)))), trained_run.models
    )
    return trained_run


def test_evaluation_file_has_all_fields_that_a_release_needs(run):
    result = evaluate_run(run, EvaluationSettings(min_events=1))
    body = json.loads((run.evaluation / "evaluation.json").read_text())
    assert set(body) >= {"metrics", "intervals", "gates", "baselines"}
    assert body["metrics"]["recall_at_50"] == pytest.approx(float(np.nanmean(result.ranking[TWO_STAGE].recall)))
    assert body["intervals"]["ndcg_at_10"]["low"] <= body["metrics"]["ndcg_at_10"]
    assert set(body["baselines"]) == set(result.ranking) - {TWO_STAGE}
    read = read_evaluation(run.evaluation / "evaluation.json")
    assert [gate.name for gate in read.gates] == [gate.name for gate in result.gates]


def test_heads_are_judged_on_impressions_after_the_cut_only(run):
    result = evaluate_run(run, EvaluationSettings(min_events=1))
    labels = pq.read_table(run.features / LABELS_FILE)
    after = labels["event_time"].cast("int64").to_numpy() / 1e6 >= result.split.cut_s
    watched = next(head for head in result.heads if head.task == "long_watch")
    assert watched.rows == int(after.sum())
    assert watched.positives == int(labels["long_watch"].to_numpy()[after].sum())


def test_evaluate_command_skips_a_finished_evaluation(run):
    command = ["evaluate", "--run", str(run.path), "--min-events", "1"]
    runner = CliRunner()
    first = runner.invoke(build_app(), [*command, "--force"], env={"COLUMNS": "200"})
    assert first.exit_code == 0, first.output
    second = runner.invoke(build_app(), command)
    assert "already done with the same inputs" in second.output
    record = run.record("evaluate")
    assert record["summary"]["output"].endswith("evaluation.json")
    for shown in (TWO_STAGE, RETRIEVAL_ONLY, ALS, "Release gates", "long_watch"):
        assert shown in first.output


def test_ranking_returns_unseen_videos_by_descending_value(run):
    models = load_models(run.models)
    labels = pq.read_table(run.features / LABELS_FILE)
    split = make_temporal_split(labels, models.info.window_end_s, min_events=1)
    two_stage, _, catalogue = recommenders_at_cut(models, run.features, split, Blend())
    ranked_BK = two_stage.rank(split.viewer_ids, 10)
    rows_BK = np.searchsorted(split.videos, ranked_BK)
    assert not split.seen.has(split.viewer_ids, np.where(ranked_BK == PAD, PAD, rows_BK)).any()
    rows = np.searchsorted(catalogue.video_ids, ranked_BK[:, :5])
    embedding = two_stage.stages.embed(two_stage.viewers)
    values_BK = two_stage.stages.values(two_stage.viewers, embedding, rows)
    assert (np.diff(values_BK, axis=1) <= 1e-6).all()


def test_popularity_sources_fill_their_quota_of_candidates(run):
    models = load_models(run.models)
    split = make_temporal_split(pq.read_table(run.features / LABELS_FILE), models.info.window_end_s, min_events=1)
    blend = Blend.model_validate({"retrieval": {"candidates": 10, "quotas": {"ann": 0.6, "popular": 0.4}}})
    two_stage, _, catalogue = recommenders_at_cut(models, run.features, split, blend)
    rng = np.random.default_rng(0)
    similarity = rng.random((3, len(catalogue))).astype(np.float32)
    popularity = rng.permutation(len(catalogue)).astype(np.float64)
    allowed = rng.random(similarity.shape) < 0.7
    rows = two_stage.stages.candidates(similarity, allowed, popularity)
    for b in range(3):
        most_popular = set(np.argsort(-popularity * allowed[b])[:4].tolist())
        most_similar = np.argsort(-np.where(allowed[b], similarity[b], -1))[:6].tolist()
        assert most_popular | set(most_similar) <= set(rows[b].tolist())
        assert allowed[b][rows[b]].all()


def test_candidates_are_padded_when_too_few_videos_are_allowed(run):
    models = load_models(run.models)
    split = make_temporal_split(pq.read_table(run.features / LABELS_FILE), models.info.window_end_s, min_events=1)
    two_stage, _, catalogue = recommenders_at_cut(models, run.features, split)
    allowed = np.zeros((1, len(catalogue)), dtype=np.bool_)
    allowed[0, 3] = True
    rows = two_stage.stages.candidates(np.ones(allowed.shape, np.float32), allowed, np.ones(len(catalogue)))
    assert rows[rows != PAD].tolist() == [3]


def test_evaluation_rejects_models_trained_on_all_events(tmp_path):
    other = make_trained_run(tmp_path / "run", requests=60)
    models = load_models(other.models)
    save_models(replace(models, info=replace(models.info, window_end_s=float("inf"))), other.models)
    with pytest.raises(EmptyDatasetError, match="train_fraction"):
        evaluate_run(other)
    assert models.info.window_start_s == START_US / 1e6


# Gates, on numbers.


def ranking_of(recall: np.ndarray, coverage: float = 0.5) -> RankingResult:
    return RankingResult(recall, recall, coverage, {})


def head(auc: float, error: float, positives: int = 1000) -> HeadQuality:
    def about(value: float) -> BootstrapEstimate:
        return BootstrapEstimate(value, value - 0.01, value + 0.01, 100)

    return HeadQuality("like", 10_000, positives, about(auc), about(0.3), about(error), about(error))


POPULAR = np.random.default_rng(0).uniform(0, 0.4, 200)


def failed(own_metric: np.ndarray, heads=(), coverage: float = 0.5, settings: GateSettings | None = None) -> list[str]:
    gates = evaluate_gates(
        ranking_of(own_metric, coverage), ranking_of(POPULAR), list(heads), max_coverage=1.0, settings=settings
    )
    assert all(
        gate.passed == (gate.value >= gate.bound if gate.comparison == ">=" else gate.value <= gate.bound)
        for gate in gates
    )
    return [gate.name for gate in gates if not gate.passed]


def test_established_harm_against_popularity_fails():
    assert failed(POPULAR - 0.05) == ["recall_at_50_against_popularity", "ndcg_at_10_against_popularity"]


def test_noise_around_popularity_does_not_fail():
    noise = np.random.default_rng(1).normal(0, 0.2, 200)
    assert failed(POPULAR + noise - noise.mean() - 0.005) == []


def test_badly_calibrated_or_useless_head_fails_by_name():
    assert failed(POPULAR, [head(0.7, 0.25)]) == ["like_calibration_error"]
    assert failed(POPULAR, [head(0.45, 0.02)]) == ["like_auc"]


def test_head_with_too_few_positives_is_not_gated():
    assert failed(POPULAR, [head(0.3, 0.5, positives=20)]) == []


def test_coverage_gate_fails_when_all_viewers_get_the_same_videos():
    assert failed(POPULAR, coverage=0.001) == ["coverage"]


def test_undefined_metric_fails_its_gate():
    assert failed(np.full(200, np.nan)) == ["recall_at_50_against_popularity", "ndcg_at_10_against_popularity"]


def test_gates_can_be_switched_off():
    off = GateSettings(against_popularity=None, calibration_error=None, auc=None, coverage=None)
    assert failed(POPULAR - 1, [head(0.1, 0.9)], coverage=0.0, settings=off) == []
