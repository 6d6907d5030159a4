"""``reelway rollout status``: the text view at 80 and 120 columns, and the JSON report."""

from __future__ import annotations

import json
import time
from io import StringIO

import jsonschema
import pytest
from rich.console import Console
from tests.support.cli.rollout_fixtures import RunDirectoryEnvironment, SyntheticEvidence, dead_pid, reelway

from reelway.platform.cli.rollout.intervals import interval_bar, outcomes_table
from reelway.platform.cli.rollout.location import CONTROLLER_TIMEOUT_S
from reelway.platform.cli.rollout.status_report import EvidenceReport, OutcomeReport, StatusReport
from reelway.platform.cli.rollout.views import format_duration, status_view
from reelway.platform.cli.rollout.watch import read_status
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.state import Command
from reelway.platform.run_directory import RunDirectory

WIDTHS = (80, 120)


def status_text(world: RunDirectoryEnvironment, width: int, height: int | None = None) -> str:
    """Returns the status view as plain text."""
    console = Console(width=width, file=StringIO(), color_system=None)
    report = read_status(RunDirectory(world.run), world.store, None)
    console.print(status_view(report, width=width, height=height))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def evidence(world: RunDirectoryEnvironment, **seen: object) -> SyntheticEvidence:
    """Brings a rollout to the second step of the default policy, with this evidence in the last reconcile."""
    source = world.see_all(viewers=2_400)
    world.begin()
    world.tick(2)
    world.tick(6, after_s=120)
    for name, value in seen.items():
        setattr(source, name, value)
    world.catch_up()
    return source


@pytest.mark.parametrize("width", WIDTHS)
def test_status_view_shows_ramp_traffic_evidence_and_guardrails(world: RunDirectoryEnvironment, width: int) -> None:
    evidence(world)
    text = status_text(world, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for words in (
        "r-20260131-3fa91c   STEPPING   step 2 of 4", "canary cccccccccccc", "over aaaaaaaaaaaa", "policy default",
        "✔ prepare ─ ✔ 1 % ─ ▶ 5 % ─ · 20 % ─ · 50 % ─ · promoted", "stable 95 %   canary 5 %",
        "2,400 of 500 viewers ✔", "waits for  step 2 at 5 %: held", "last reconcile 0 s ago",
        "ok         p99 61 ms over 4800 requests is within the limit: 250 ms",
    ):  # fmt: skip
        assert words in text
    outcomes = {line.split()[0]: line for line in text.splitlines() if "●" in line and not line.startswith("  ")}
    assert set(outcomes) == {
        "long_watch_rate*", "watch_s_per_impression*", "like_rate*", "skip_rate*", "not_interested_rate", "report_rate",
    }  # fmt: skip
    assert outcomes["watch_s_per_impression*"].rstrip().endswith("no harm")
    assert outcomes["long_watch_rate*"].rstrip().endswith("undecided")
    assert ("2,400/7,200" in text) == (width == 120)


@pytest.mark.parametrize("width", WIDTHS)
def test_rolled_back_status_shows_the_evidence_of_the_rollback(world: RunDirectoryEnvironment, width: int) -> None:
    evidence(world, drop=0.15)
    world.tick(3, after_s=5)
    text = status_text(world, width)
    assert "ROLLED BACK" in text
    assert "✘ 5 %" in text
    assert "stable 100 %" in text
    long_watches = next(line for line in text.splitlines() if line.startswith("long_watch_rate*"))
    assert long_watches.rstrip().endswith("HARM")
    assert "which ended the ramp" in text
    assert "NO DATA" not in text
    assert "WARNING" not in text


def test_alert_rollback_status_shows_only_the_alert(world: RunDirectoryEnvironment) -> None:
    evidence(world)
    labels = (("alertname", "CanaryErrors"), ("release", "c" * 12))
    world.book.deliver([KnownAlert(group_key="g", labels=labels, starts_at=world.clock.now, resolved=False)])
    world.catch_up()
    text = status_text(world, 80)
    assert "BREACH     alerts firing for the release: CanaryErrors" in text
    assert "NO DATA" not in text


def test_missing_telemetry_is_shown_for_every_metric(world: RunDirectoryEnvironment) -> None:
    evidence(world, silent=True)
    text = status_text(world, 80)
    assert "HOLDING" in text
    assert "‖ 5 %" in text
    assert text.count("NO DATA") == 14


@pytest.mark.parametrize("silence", ["no controller", "dead controller", "stuck controller"])
def test_unresponsive_controller_warning_is_the_first_line(world: RunDirectoryEnvironment, silence: str) -> None:
    evidence(world)
    assert "WARNING" not in status_text(world, 80)
    if silence == "no controller":
        (world.run / "rollout" / "controller.json").unlink()
    elif silence == "dead controller":
        world.controlled(dead_pid())
    else:
        world.clock.now = time.time() - CONTROLLER_TIMEOUT_S - 5
        world.controller.reconcile()
    first = status_text(world, 80).splitlines()[0]
    assert first.startswith("WARNING")
    assert reelway("rollout", "status", "--run", world.run).out.startswith("WARNING")


def test_pending_command_is_shown(world: RunDirectoryEnvironment) -> None:
    evidence(world)
    world.store.submit_command(world.state.id, Command(id="1", verb="pause", actor="ana"))
    assert "command    pause by ana, not yet accepted" in status_text(world, 80)


def test_compact_view_fits_a_short_terminal_and_keeps_harm(world: RunDirectoryEnvironment) -> None:
    source = evidence(world)
    compact = status_text(world, 80, height=24)
    assert len(compact.splitlines()) <= 24
    assert "on new_viewers" not in compact
    assert "ok         error_ratio, empty_slate_ratio" in compact
    source.drop = 0.15
    world.catch_up()
    assert "HARM" in status_text(world, 80, height=24)


def test_status_before_the_first_rollout_shows_the_live_release(world: RunDirectoryEnvironment) -> None:
    text = status_text(world, 80)
    assert "live       release aaaaaaaaaaaa at http://127.0.0.1:1" in text
    assert "reelway rollout start RELEASE" in text
    ended = reelway("rollout", "status", "--run", world.run, "-o", "json")
    assert StatusReport.model_validate_json(ended.out).rollout is None
    assert reelway("rollout", "status", "--run", world.run, "--exit-code").code == 9


def test_status_json_matches_its_schema(world: RunDirectoryEnvironment) -> None:
    evidence(world)
    ended = reelway("rollout", "status", "--run", world.run, "-o", "json")
    assert ended.code == 0
    seen = json.loads(ended.out)
    jsonschema.validate(seen, StatusReport.model_json_schema(mode="serialization"))
    rollout = seen["rollout"]
    assert (rollout["phase"], rollout["result"], rollout["step"]) == ("stepping", "in progress", 2)
    assert rollout["weights"] == {"stable": 9500, "canary": 500, "holdout": 0}
    assert sum(rollout["weights"].values()) == 10_000
    assert rollout["evidence"]["exposure"]["viewers"] == 2_400
    assert rollout["waits_for"].startswith("step 2 at 5 %")
    assert seen["controller"]["running"]
    assert 0 <= seen["controller"]["seconds_since_reconcile"] < CONTROLLER_TIMEOUT_S
    assert seen["controller"]["last_reconcile_at"] == pytest.approx(seen["time"], abs=CONTROLLER_TIMEOUT_S)
    assert seen["serving"]["release"] == "a" * 64


def test_status_exits_with_the_rollout_state_only_with_exit_code(world: RunDirectoryEnvironment) -> None:
    evidence(world)

    def code(*more: str) -> int:
        return reelway("rollout", "status", "--run", world.run, *more).code

    assert (code(), code("--exit-code")) == (0, 11)
    world.store.submit_command(world.state.id, Command(id="1", verb="pause"))
    world.catch_up()
    assert code("--exit-code") == 12
    world.store.submit_command(world.state.id, Command(id="2", verb="promote", force=True))
    world.tick(2, after_s=1)
    assert code("--exit-code") == 0
    assert "rollback possible for 1 d 0 h" in status_text(world, 120)
    world.store.submit_command(world.state.id, Command(id="3", verb="rollback"))
    world.tick(2, after_s=1)
    assert (code(), code("--exit-code")) == (0, 10)


def outcome(low: float | None, harm: float | None, high: float | None, finding: str = "undecided") -> OutcomeReport:
    return OutcomeReport(
        name="long_watch_rate", slice="overall", label="long_watch_rate", finding=finding, state="ok", canary=0.4,
        stable=0.4, harm=harm, low=low, high=high, margin=0.02, viewers={"canary": 1, "stable": 1}, required=True,
        lower_is_better=False, sentence="",
    )  # fmt: skip


@pytest.mark.parametrize("width", [12, 19, 40])
def test_interval_ends_are_on_the_correct_side_of_zero_and_margin(width: int) -> None:
    empty = interval_bar(outcome(None, None, None), width).plain
    zero, margin = empty.index("┊"), empty.index("┃")
    assert len(empty) == width
    for low, high in ((-0.019, 0.0199), (-0.5, -0.001), (0.0201, 0.2), (0.001, 0.0201), (0.0, 0.019), (-9.0, 9.0)):
        bar = interval_bar(outcome(low, (low + high) / 2, high), width).plain
        ends = [i for i, mark in enumerate(bar) if mark in "├┤◀▶●"]
        assert len(bar) == width
        assert (ends[-1] > margin) == (high >= 0.02)
        assert (ends[0] > margin) == (low >= 0.02)
        assert (ends[0] > zero) == (low >= 0)


def test_small_rate_fits_its_column() -> None:
    table = outcomes_table(report_of(0.00819712), width=80)
    console = Console(width=80, file=StringIO(), color_system=None)
    console.print(table)
    assert "0.0082  0.0082" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def report_of(rate: float) -> EvidenceReport:
    one = outcome(-0.01, 0.0, 0.01).model_copy(update={"canary": rate, "stable": rate})
    return EvidenceReport(
        release="c" * 64, time=0.0, age_s=None, exposure={"viewers": 1, "impressions": 1}, outcomes=(one,),
        guardrails=(), suspicions=(), shadow_requests=0, weights=None, ready=True,
    )  # fmt: skip


def test_interval_beyond_the_axis_ends_in_arrows() -> None:
    bar = interval_bar(outcome(-3.0, 0.0, None), 19).plain
    assert (bar[0], bar[-1]) == ("◀", "▶")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 m 00 s"), (751, "12 m 31 s"), (11_100, "3 h 05 m"), (187_200, "2 d 4 h")],
)
def test_durations_are_formatted_with_two_units(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
