"""The demo's results come from records, and the demo fails if they differ from the expected ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from reelway.platform.cli.demo import rollouts as demo_rollouts
from reelway.platform.cli.demo.rollouts import (
    SCENARIOS,
    ScenarioResult,
    archive_previous_rollouts,
    check_results,
    scenario_result,
)
from reelway.platform.cli.rollout.policy_commands import policy_named
from reelway.platform.errors import ConfigError, RolloutError
from reelway.platform.rollout.records import HistoryEntry, Rollout
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.run_directory import RunDirectory

STABLE, CANARY = "a" * 64, "b" * 64
TRAINED, WORSE, ERRORS, SLOW = SCENARIOS


def entry(number: int, action: str, time: float, canary_bp: int, **evidence: Any) -> HistoryEntry:
    return HistoryEntry(
        number=number, rollout_id="r", time=time, action=action, reason=f"{action} because", phase_before="stepping",
        phase="stepping", step=0, canary_bp=canary_bp, evidence=evidence,
    )  # fmt: skip


def rollout(phase: Phase) -> Rollout:
    state = RolloutState(
        id="r", stable_release=STABLE, canary_release=CANARY, phase=phase, started_at=0, changed_at=0, tick_at=0
    )
    return Rollout(state=state, policy=policy_named("demo"), version=1)


def traffic(requests: int, failed: int, viewers: int = 0, **more: Any) -> dict[str, Any]:
    rows = [
        {"release": CANARY, "arm": "canary", "viewers": viewers},
        {"release": CANARY, "arm": "stable", "viewers": 900},
        {"release": STABLE, "arm": "stable", "viewers": 900},
    ]
    traffic_report = {
        "requests": requests, "failed": failed, "releases": rows, "arm_changes": 0, "failures": [],
        "arm_change_examples": [], "outcomes": {"sent": 10, "posts_failed": 0},
    }  # fmt: skip
    return traffic_report | more


def test_scenario_result_contains_evidence_weight_and_duration() -> None:
    history = [
        entry(1, "prepare", 100, 0),
        entry(2, "step", 110, 2_000),
        entry(3, "roll_back", 125, 0,
              guardrails=[{"name": "error_ratio", "state": "bad"}, {"name": "p99_ms", "state": "ok"}],
              outcomes=[{"label": "like_rate", "name": "like_rate", "finding": "undecided", "required": True}]),
        entry(4, "complete_rollback", 126, 0),
    ]  # fmt: skip
    result = scenario_result(ERRORS, rollout(Phase.ROLLED_BACK), history, traffic(100, 0), traffic(400, 0, viewers=37))
    assert (result.end, result.evidence, result.weight_bp) == ("rolled_back", "error_ratio", 2_000)
    assert (result.viewers, result.seconds, result.requests, result.failed) == (37, 15, 300, 0)
    assert result.as_expected


def test_deciding_evidence_names_harm_or_its_exclusion() -> None:
    def outcome(finding: str) -> dict[str, Any]:
        return {"label": "skip_rate on new_videos", "name": "skip_rate", "finding": finding, "required": True}

    harm = entry(1, "roll_back", 1, 0, guardrails=[], outcomes=[outcome("harm_established")])
    assert demo_rollouts.deciding_evidence(harm) == "skip_rate on new_videos"
    earned = entry(1, "promote", 1, 0, guardrails=[], outcomes=[outcome("harm_excluded")])
    assert demo_rollouts.deciding_evidence(earned) == "harm excluded"
    by_hand = entry(1, "roll_back", 1, 0)
    assert demo_rollouts.deciding_evidence(by_hand) == "roll_back because"


def ended(scene: demo_rollouts.RolloutScenario, end: str, failed: int = 0) -> ScenarioResult:
    return ScenarioResult(scene, CANARY, end, "error_ratio", 2_000, 37, 15, 300, failed)


def test_expected_results_pass_and_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    endings = [ended(TRAINED, "promoted"), *(ended(scene, "rolled_back") for scene in (WORSE, ERRORS, SLOW))]
    check_results(endings, traffic(900, 0))
    demo_rollouts.print_scenario_results(endings, traffic(900, 0))
    shown = capsys.readouterr().out
    assert "error_ratio" in shown
    assert "20 %" in shown
    assert max(len(line) for line in shown.splitlines()[:6]) <= 80


@pytest.mark.parametrize(
    ("ending", "traffic_report", "message"),
    [
        (ended(WORSE, "promoted"), traffic(9, 0), "rehearse-worse ended promoted"),
        (ended(TRAINED, "rolled_back"), traffic(9, 0), "release ended rolled_back"),
        (ended(SLOW, "rolled_back", failed=1), traffic(9, 0), "with 1 failed requests"),
        (ended(SLOW, "rolled_back"), traffic(9, 1, failures=["viewer 3: 503"]), "viewer 3: 503"),
        (ended(SLOW, "rolled_back"), traffic(9, 0, arm_changes=1, arm_change_examples=["viewer 5"]), "viewer 5"),
        (ended(SLOW, "rolled_back"), traffic(9, 0, outcomes={"sent": 1, "posts_failed": 1}), "traffic:"),
    ],
)
def test_unexpected_result_fails_the_demo(ending: ScenarioResult, traffic_report: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        check_results([ending], traffic_report)


def test_rollouts_of_an_earlier_demo_are_archived(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    archive_previous_rollouts(run)
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "state.db").write_text("history")
    record = {"url": "http://x", "internal_url": "http://x", "pid": os.getpid(), "release": STABLE}
    (tmp_path / "serving.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=f"served by process {os.getpid()}"):
        archive_previous_rollouts(run)
    (tmp_path / "serving.json").unlink()
    archive_previous_rollouts(run)
    assert not (tmp_path / "rollout").exists()
    assert [path.read_text() for path in (tmp_path / "earlier-rollouts").glob("*/state.db")] == ["history"]


def test_drill_releases_match_the_scenarios(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.step("release", config={}) as step:
        step.summary["release_id"] = CANARY
    commands = demo_rollouts.drill_release_commands(run, seed=3)
    built = {f"rehearse-{command[2]}" for command in commands}
    assert built == {scene.step for scene in SCENARIOS if scene is not TRAINED} | {"rehearse-popular"}
    assert all(command[command.index("--base") + 1] == CANARY[:12] for command in commands)
