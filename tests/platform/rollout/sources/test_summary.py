"""The recorded summary of evidence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.support.rollout.canary_events import POLICY, HistoryGenerator

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.assessment import assess
from reelway.platform.rollout.evidence import EvidenceSnapshot, no_evidence
from reelway.platform.rollout.policy import parse_policy
from reelway.platform.rollout.summary import summarise_evidence

KINDS = HistoryGenerator(0).kinds
RULES = parse_policy(POLICY, source="test")


@pytest.mark.parametrize("kind", [*KINDS, "nothing heard"])
def test_summary_is_json_with_every_verdict(kind: str) -> None:
    snapshot: EvidenceSnapshot = no_evidence("canary", 5.0) if kind == "nothing heard" else KINDS[kind]
    verdicts = assess(RULES, snapshot)
    summary = summarise_evidence(verdicts, snapshot, now=snapshot.time + 3)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert [(o["name"], o["slice"], o["finding"], o["sentence"]) for o in summary["outcomes"]] == [
        (v.name, v.slice_.value, v.finding, v.sentence) for v in verdicts.outcomes
    ]
    assert [(g["name"], g["state"], g["sentence"]) for g in summary["guardrails"]] == [
        (v.name, v.state.value, v.sentence) for v in verdicts.guardrails
    ]
    assert summary["age_s"] == 3
    assert summary["weights"] == ({arm.value: bp for arm, bp in snapshot.weights.items()} if snapshot.weights else None)


def test_summary_has_the_assessed_numbers() -> None:
    snapshot = replace(KINDS["good"], weights={Arm.STABLE: 9_500, Arm.CANARY: 500}, canary_ready=True)
    verdicts = assess(RULES, snapshot)
    summary = summarise_evidence(verdicts, snapshot)
    first, verdict = summary["outcomes"][0], verdicts.outcomes[0]
    assert (first["canary"], first["harm"], first["low"], first["high"]) == (
        verdict.canary, verdict.harm, verdict.harm_low, verdict.harm_high,
    )  # fmt: skip
    assert first["low"] < first["harm"] < first["high"]
    assert first["viewers"] == {"canary": verdict.canary_viewers, "stable": verdict.stable_viewers}
    assert summary["exposure"] == {"viewers": verdicts.canary_viewers, "impressions": verdicts.canary_impressions}
    assert summary["weights"] == {"stable": 9_500, "canary": 500}
    assert (summary["age_s"], summary["ready"]) == (None, True)


def test_missing_number_is_null() -> None:
    snapshot = no_evidence("canary", float("nan"))
    summary = summarise_evidence(assess(RULES, snapshot), snapshot)
    assert summary["time"] is None
    assert {o["harm"] for o in summary["outcomes"]} == {None}
