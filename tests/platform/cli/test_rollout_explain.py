"""``history`` and ``explain``: the reason of a decision, its evidence, and what would have changed the decision."""

from __future__ import annotations

import json

import jsonschema
import pytest
from tests.support.cli.rollout_fixtures import RunDirectoryEnvironment, SyntheticEvidence, reelway

from reelway.platform.cli.rollout.explain import Explanation
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.records import HistoryEntry
from reelway.platform.rollout.state import Command


def explain_json(world: RunDirectoryEnvironment, *more: object) -> Explanation:
    """Runs ``explain -o json`` and validates the output against its schema."""
    ended = reelway("rollout", "explain", "--run", world.run, "-o", "json", *more)
    assert ended.code == 0, ended.err
    jsonschema.validate(json.loads(ended.out), Explanation.model_json_schema(mode="serialization"))
    return Explanation.model_validate_json(ended.out)


@pytest.fixture
def second_step(world: RunDirectoryEnvironment) -> RunDirectoryEnvironment:
    """A rollout at the second step of the default policy."""
    world.see_all(viewers=2_400)
    world.begin()
    world.tick(2)
    world.tick(6, after_s=120)
    return world


def source(world: RunDirectoryEnvironment) -> SyntheticEvidence:
    return world.source  # type: ignore[return-value]


def entry_with(world: RunDirectoryEnvironment, action: str) -> HistoryEntry:
    return next(entry for entry in reversed(world.store.history()) if entry.action == action)


def test_harm_is_explained_by_its_bound_and_the_policy(second_step: RunDirectoryEnvironment) -> None:
    source(second_step).drop = 0.15
    assert second_step.tick(2, after_s=1) == ["roll_back", "complete_rollback"]
    entry, explanation = entry_with(second_step, "roll_back"), explain_json(second_step)
    assert (explanation.entry, explanation.action, explanation.reason) == (entry.number, "roll_back", entry.reason)
    assert explanation.numbers[1].startswith("long_watch_rate: canary 0.34")
    assert "margin 2.0% worse" in explanation.numbers[1]
    low = next(o for o in entry.evidence["outcomes"] if o["label"] == "long_watch_rate")["low"]
    assert f"a margin of {low:.3f} or more would not have rolled back" in explanation.otherwise[0]
    assert any(
        line.startswith("outcomes[0]: name long_watch_rate") and "margin 0.02" in line for line in explanation.policy
    )
    assert explanation.policy[-1] == "alpha.rollback: 0.005 over all 10 tests"


def test_breach_is_explained_by_the_guardrail_and_its_limit(second_step: RunDirectoryEnvironment) -> None:
    source(second_step).errors = 2_000
    second_step.tick(1, after_s=1)
    explanation = explain_json(second_step, "--entry", entry_with(second_step, "roll_back").number)
    assert explanation.numbers[1].startswith("error_ratio 41.67%")
    assert "maximum 0.02" in explanation.otherwise[0]
    assert explanation.policy == (
        "guardrails.error_ratio: maximum 0.02, minimum_requests 20", "guardrails.significance: 1e-06",
    )  # fmt: skip


def test_alert_rollback_is_explained_by_the_alert_alone(second_step: RunDirectoryEnvironment) -> None:
    labels = (("alertname", "CanaryErrors"), ("release", "c" * 64))
    second_step.book.deliver(
        [KnownAlert(group_key="g", labels=labels, starts_at=second_step.clock.now, resolved=False)]
    )
    second_step.tick(1, after_s=1)
    explanation = explain_json(second_step, "--entry", entry_with(second_step, "roll_back").number)
    assert explanation.numbers == ("alerts firing for the release: CanaryErrors",)
    assert "no alert with the release's label" in explanation.otherwise[0]


def test_active_rollout_is_explained_by_the_missing_evidence(second_step: RunDirectoryEnvironment) -> None:
    explanation = explain_json(second_step)
    assert (explanation.entry, explanation.action) == (None, "wait")
    assert (
        explanation.policy[0] == "steps[1]: weight_percent 5, hold_s 900, minimum_viewers 500, minimum_impressions 5000"
    )
    source(second_step).viewers = 400
    second_step.tick(1, after_s=1)
    explanation = explain_json(second_step)
    assert explanation.otherwise[0] == "100 more viewers on the canary"
    assert explanation.otherwise[1].endswith("more impressions on the canary")


def test_last_step_explanation_estimates_the_viewers_still_needed(second_step: RunDirectoryEnvironment) -> None:
    second_step.tick(40, after_s=120)
    assert second_step.state.step == 3
    explanation = explain_json(second_step)
    need = [line for line in explanation.otherwise if "times the viewers" in line]
    assert any(
        line.startswith("long_watch_rate: the upper bound of the harm") and "must fall below 2.0%" in line
        for line in need
    )
    source(second_step).drop = 0.03
    second_step.tick(1, after_s=1)
    assert any("impossible at the observed difference" in line for line in explain_json(second_step).otherwise)


def test_missing_telemetry_is_explained_with_its_deadline(second_step: RunDirectoryEnvironment) -> None:
    source(second_step).silent = True
    second_step.tick(1, after_s=1)
    explanation = explain_json(second_step)
    assert explanation.otherwise[0].startswith(
        "the rollout continues when these have data again: empty_slate_ratio, error_"
    )
    assert "deadlines.telemetry_down: after_s 1800, action pause" in explanation.policy
    second_step.tick(20, after_s=120)
    paused = explain_json(second_step, "--entry", entry_with(second_step, "pause").number)
    assert "missing data proves neither harm nor its absence" in paused.otherwise[0]
    assert paused.policy == ("deadlines.telemetry_down: after_s 1800, action pause",)


def test_user_command_is_not_explained_by_evidence(second_step: RunDirectoryEnvironment) -> None:
    for number, verb in enumerate(("pause", "rollback")):
        second_step.store.submit_command(
            second_step.state.id, Command(id=str(number), verb=verb, actor="ana", note="late")
        )  # type: ignore[arg-type]
        second_step.tick(1, after_s=1)
        explanation = explain_json(second_step, "--entry", second_step.store.history()[-1].number)
        assert explanation.reason.endswith("by ana: late")
        assert explanation.otherwise[0].startswith("nothing in the evidence: a user requested the ")


def test_every_history_entry_can_be_explained(second_step: RunDirectoryEnvironment) -> None:
    source(second_step).viewers = 60_000
    second_step.tick(40, after_s=120)
    entries = second_step.store.history()
    assert [entry.action for entry in entries][-2:] == ["promote", "complete_promotion"]
    for entry in entries:
        assert explain_json(second_step, "--entry", entry.number).reason == entry.reason
    promotion = explain_json(second_step)
    assert promotion.action == "promote"
    assert "alpha.promotion: 0.005" in promotion.policy
    printed = reelway("rollout", "explain", "--run", second_step.run).out
    assert printed.startswith(f"r-20260131-3fa91c, decision {entries[-2].number} at ")
    assert all(word in printed for word in ("\nwhy        ", "\nnumbers    ", "\notherwise  ", "\npolicy     "))


def test_history_lists_every_decision_as_text_or_json(second_step: RunDirectoryEnvironment) -> None:
    entries = list(second_step.store.history())
    listed = json.loads(reelway("rollout", "history", "--run", second_step.run, "-o", "json").out)
    assert [HistoryEntry.model_validate(one) for one in listed] == entries
    text = reelway("rollout", "history", "--run", second_step.run).out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert " ".join(text.split()).count(entries[-1].reason) == 1
    every = json.loads(reelway("rollout", "history", "--all", "--run", second_step.run, "-o", "json").out)
    assert [(one["rollout"]["id"], one["result"], len(one["history"])) for one in every] == [
        ("r-20260131-3fa91c", "in progress", len(entries))
    ]
    assert "in progress" in reelway("rollout", "history", "--all", "--run", second_step.run).out


def test_unknown_entry_is_rejected_with_the_existing_entries(second_step: RunDirectoryEnvironment) -> None:
    ended = reelway("rollout", "explain", "--run", second_step.run, "--entry", 99)
    assert (ended.code, "existing entries: 1..3" in ended.err) == (9, True)


def test_explain_without_a_decision_names_the_controller_command(world: RunDirectoryEnvironment) -> None:
    world.begin()
    ended = reelway("rollout", "explain", "--run", world.run)
    assert (ended.code, "check that `reelway rollout controller` is running" in ended.err) == (9, True)
