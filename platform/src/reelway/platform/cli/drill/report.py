"""Report of a drill, derived from the rollout's recorded decisions.

A rollback by command does not count as detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from reelway.platform.cli.rollout.status_report import EvidenceReport
from reelway.platform.cli.rollout.views import format_duration
from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout.state import Phase

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, Rollout


class DrillReport(BaseModel):
    """``reelway drill -o json``. Times are Unix seconds of the controller's clock."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rollout: str
    release: str
    stable_release: str
    fault: str | None
    by: str
    within_s: float
    passed: bool = Field(description="whether it was detected and rolled back in time, with all traffic on stable")
    on_stable: bool
    caught_by: tuple[str, ...] = Field(description="guardrails and outcome metrics that detected it; may be empty")
    reason: str
    weight_percent: float | None = Field(description="traffic weight of the release at detection")
    viewers: int | None = Field(description="viewers exposed to the release")
    impressions: int | None
    first_exposure_at: float | None = Field(description="time at which the release first had traffic")
    alerted_at: float | None = Field(description="time at which the test alert was sent")
    detected_at: float | None
    detected_after_s: float | None = Field(
        description="seconds from the first exposure, or from the alert; 0 if detected before any exposure"
    )
    decision_to_stable_ms: float | None = Field(description="time from the decision until all routers are on stable")
    total_s: float = Field(description="seconds from start to end of the rollout")
    requests: int | None = Field(description="requests during the drill, from the traffic report")
    failed_requests: int | None


def drill_report(
    rollout: Rollout,
    history: Sequence[HistoryEntry],
    *,
    fault: str | None,
    by: str,
    within_s: float,
    exposure: dict[str, int],
    alerted_at: float | None,
    traffic: tuple[int, int] | None,
) -> DrillReport:
    """Derives the report from the rollout's history.

    Args:
        exposure: viewers and impressions of the release at the last reconcile before the rollback, because a rollback
            by an alert reads no evidence.
        traffic: requests and failed requests during the drill.
    """
    state = rollout.state
    met = next((entry for entry in history if entry.canary_bp > 0), None)
    caught = next((entry for entry in history if entry.action == "roll_back"), None)
    ended = next((entry for entry in history if entry.action == "complete_rollback"), None)
    names = caught_by(caught) if caught is not None else ()
    started_at = alerted_at if alerted_at is not None else met.time if met is not None else None
    after_s = None if caught is None else 0.0 if started_at is None else caught.time - started_at
    on_stable = state.phase is Phase.ROLLED_BACK
    exposed = _exposure(caught, exposure)
    return DrillReport(
        rollout=state.id,
        release=state.canary_release,
        stable_release=state.stable_release,
        fault=fault,
        by=by,
        within_s=within_s,
        passed=on_stable and bool(names) and after_s is not None and _total_seconds(after_s, caught, ended) <= within_s,
        on_stable=on_stable,
        caught_by=names,
        reason=caught.reason if caught is not None else state.reason,
        weight_percent=_weight_before(history, caught) if caught is not None else None,
        viewers=exposed.get("viewers"),
        impressions=exposed.get("impressions"),
        first_exposure_at=met.time if met is not None else None,
        alerted_at=alerted_at,
        detected_at=caught.time if caught is not None else None,
        detected_after_s=after_s,
        decision_to_stable_ms=1000 * (ended.time - caught.time) if ended and caught else None,
        total_s=(ended.time if ended else state.tick_at) - state.started_at,
        requests=traffic[0] if traffic else None,
        failed_requests=traffic[1] if traffic else None,
    )


def caught_by(entry: HistoryEntry) -> tuple[str, ...]:
    """Returns the breached guardrails or harmed outcome metrics; empty after a command or a deadline."""
    by_evidence = not entry.reason.startswith("rolled back by ") and bool(entry.evidence)
    if not by_evidence:
        return ()
    evidence = EvidenceReport.model_validate(entry.evidence)
    if entry.reason.startswith("guardrail: "):
        return tuple(one.name for one in evidence.guardrails if one.state == "bad")
    return tuple(one.label for one in evidence.outcomes if one.finding == "harm_established")


def drill_table(report: DrillReport) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    verdict = "[bold green]PASSED[/]" if report.passed else "[bold red]FAILED[/]"
    table.add_row(
        "drill", f"{verdict}   {report.rollout}, release {short_id(report.release)} ({report.fault or 'given'})"
    )
    table.add_row("detected by", ", ".join(report.caught_by) or "[bold red]nothing[/]")
    if report.detected_after_s is not None:
        since = "the alert" if report.alerted_at is not None else "the first exposure"
        table.add_row("after", f"{report.detected_after_s:.1f} s from {since} (deadline {report.within_s:g} s)")
    if report.weight_percent is not None:
        table.add_row("at", f"{report.weight_percent:g} % of the viewers")
    if report.viewers is not None:
        table.add_row("exposed", f"{report.viewers:,} viewers, {report.impressions or 0:,} impressions")
    if report.decision_to_stable_ms is not None:
        table.add_row("rolled back", f"all traffic on stable {report.decision_to_stable_ms:.0f} ms after the decision")
    if report.failed_requests is not None:
        table.add_row("failed", f"{report.failed_requests:,} of {report.requests or 0:,} requests")
    traffic = f"all traffic on {short_id(report.stable_release)}" if report.on_stable else "[bold red]NOT on stable[/]"
    table.add_row("now", f"{traffic}; total time {format_duration(report.total_s)}")
    return table


def _total_seconds(after_s: float, caught: HistoryEntry | None, ended: HistoryEntry | None) -> float:
    return after_s + (ended.time - caught.time if ended and caught else 0.0)


def _exposure(caught: HistoryEntry | None, last_seen: dict[str, int]) -> dict[str, int]:
    recorded = dict(caught.evidence.get("exposure", {})) if caught is not None else {}
    return recorded if recorded.get("viewers") else last_seen


def _weight_before(history: Sequence[HistoryEntry], caught: HistoryEntry) -> float:
    earlier = [entry.canary_bp for entry in history if entry.number < caught.number]
    return (earlier[-1] if earlier else 0) / 100
