"""Metrics against direct implementations of their definitions, and the bootstrap against a known result."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from reelway.pipelines.evaluation import metrics


@st.composite
def answers(draw):
    """Slates of catalogue rows without repetition (some short), and each viewer's relevant set."""
    videos, positions = draw(st.integers(2, 15)), draw(st.integers(1, 12))
    viewers = draw(st.integers(1, 5))
    slates, relevant = [], []
    for _ in range(viewers):
        order = draw(st.permutations(range(videos)))[: draw(st.integers(0, min(positions, videos)))]
        slates.append(list(order) + [metrics.PAD] * (positions - len(order)))
        relevant.append(draw(st.sets(st.integers(0, videos - 1))))
    return np.array(slates), relevant, videos


def hits_of(slates, relevant):
    return np.array([[v in relevant[b] for v in row] for b, row in enumerate(slates)])


def counts_of(relevant):
    return np.array([len(r) for r in relevant])


@settings(max_examples=150, deadline=None)
@given(answers(), st.integers(1, 12))
def test_recall_is_the_share_of_relevant_videos_found(answer, k):
    slates, relevant, _ = answer
    actual = metrics.recall(hits_of(slates, relevant), counts_of(relevant), k)
    for b, relevant_videos in enumerate(relevant):
        if not relevant_videos:
            assert math.isnan(actual[b])
        else:
            assert actual[b] == pytest.approx(len(set(slates[b][:k]) & relevant_videos) / len(relevant_videos))


@settings(max_examples=150, deadline=None)
@given(answers(), st.integers(1, 12))
def test_ndcg_is_gain_over_the_ideal_orders_gain(answer, k):
    slates, relevant, _ = answer
    actual = metrics.ndcg(hits_of(slates, relevant), counts_of(relevant), k)
    for b, relevant_videos in enumerate(relevant):
        gain = sum(1 / math.log2(index + 2) for index, v in enumerate(slates[b][:k]) if v in relevant_videos)
        ideal = sum(1 / math.log2(index + 2) for index in range(min(k, len(relevant_videos))))
        assert math.isnan(actual[b]) if not relevant_videos else actual[b] == pytest.approx(gain / ideal)


@settings(max_examples=150, deadline=None)
@given(answers())
def test_reciprocal_rank_depends_on_the_first_hit_only(answer):
    slates, relevant, _ = answer
    actual = metrics.reciprocal_rank(hits_of(slates, relevant), counts_of(relevant))
    for b, relevant_videos in enumerate(relevant):
        indices = [index for index, v in enumerate(slates[b]) if v in relevant_videos]
        expected = math.nan if not relevant_videos else 1 / (indices[0] + 1) if indices else 0.0
        assert actual[b] == pytest.approx(expected, nan_ok=True)


@settings(max_examples=150, deadline=None)
@given(answers(), st.integers(0, 2**31))
def test_diversity_is_one_minus_the_mean_cosine_of_pairs(answer, seed):
    slates, _, videos = answer
    vectors = np.random.default_rng(seed).normal(size=(videos, 4))
    actual = metrics.intra_list_diversity(slates, vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for b, row in enumerate(slates):
        shown = [v for v in row if v != metrics.PAD]
        pairs = [float(unit[x] @ unit[y]) for i, x in enumerate(shown) for y in shown[i + 1 :]]
        assert actual[b] == pytest.approx(1 - np.mean(pairs) if pairs else math.nan, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(answers())
def test_coverage_counts_each_video_once(answer):
    slates, _, videos = answer
    assert metrics.coverage(slates, videos) == len({v for row in slates for v in row} - {metrics.PAD}) / videos


scored = st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3)), min_size=2, max_size=60)


@settings(max_examples=150, deadline=None)
@given(scored)
def test_auc_is_the_chance_that_a_positive_is_above_a_negative(rows):
    score, label, weight = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    actual = metrics.area_under_curve(score, label, weight)
    pairs = wins = 0.0
    for s, y, w in zip(score, label, weight, strict=True):
        for t, z, v in zip(score, label, weight, strict=True):
            if y and not z:
                pairs += w * v
                wins += w * v * (1.0 if s > t else 0.5 if s == t else 0.0)
    assert actual == pytest.approx(wins / pairs if pairs else math.nan, nan_ok=True)


def test_auc_and_log_loss_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    score, label = rng.random(500), (rng.random(500) < 0.3).astype(float)
    assert metrics.area_under_curve(score, label) == pytest.approx(roc_auc_score(label, score))
    assert metrics.log_loss(score, label) == pytest.approx(sklearn_log_loss(label, score))


def test_calibration_error_of_a_constant_gap_is_that_gap():
    rng = np.random.default_rng(1)
    rate = rng.uniform(0.2, 0.6, 300_000)
    label = (rng.random(len(rate)) < rate).astype(float)
    assert metrics.calibration_error(rate, label) < 0.006
    assert metrics.calibration_error(rate + 0.2, label) == pytest.approx(0.2, abs=0.006)


def test_head_with_one_class_has_an_undefined_auc():
    estimate = metrics.auc_estimate(np.array([0.1, 0.9]), np.ones(2), np.array([1, 2]))
    assert math.isnan(estimate.value)
    assert estimate.to_dict()["value"] is None


def test_interval_over_viewers_equals_that_of_the_mean():
    values = np.random.default_rng(2).normal(0.3, 0.2, 400)
    estimate = metrics.mean_estimate(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.low == pytest.approx(values.mean() - half, rel=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, rel=0.02)


def test_rows_of_one_viewer_widen_the_interval_as_one_observation():
    rng = np.random.default_rng(3)
    taste = rng.normal(size=50)
    alone = metrics.rows_estimate(lambda w: float((taste * w).sum() / w.sum()), np.arange(50))
    repeated = np.repeat(taste, 40)
    together = metrics.rows_estimate(lambda w: float((repeated * w).sum() / w.sum()), np.repeat(np.arange(50), 40))
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=1e-9)


def test_paired_difference_has_a_narrower_interval():
    rng = np.random.default_rng(4)
    base = rng.normal(0.3, 0.3, 300)
    better = base + 0.02 + rng.normal(0, 0.01, 300)
    assert metrics.mean_estimate(better).low < metrics.mean_estimate(base).high
    assert metrics.paired_difference(better, base).low > 0.015


def test_viewers_without_a_value_do_not_count():
    estimate = metrics.mean_estimate(np.array([1.0, np.nan, 0.0]))
    assert (estimate.value, estimate.viewers) == (0.5, 2)
    assert math.isnan(metrics.mean_estimate(np.array([np.nan])).value)
