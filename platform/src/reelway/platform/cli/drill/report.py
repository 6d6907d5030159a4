"""Why: what a rehearsed rollback proves is a few numbers, and they are read off the history, not off a stopwatch here.

Pure: from the rollout's recorded decisions. Refuses to call a rollback by hand a detection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from reelway.platform.cli.rollout.report import EvidenceReport
from reelway.platform.cli.rollout.views import span
from reelway.platform.rollout.state import Phase

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, Rollout


class DrillReport(BaseModel):
    """``reelway drill -o json``. Times are Unix seconds, by the controller's clock."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rollout: str
    release: str
    stable_release: str
    fault: str | None
    by: str
    within_s: float
    passed: bool = Field(description="rolled back by itself, in time, and everybody is on stable")
    on_stable: bool
    caught_by: tuple[str, ...] = Field(description="guardrails and outcomes that found it; empty: nothing did")
    reason: str
    weight_percent: float | None = Field(description="the release's share of the viewers when it was caught")
    viewers: int | None = Field(description="that the release had had")
    impressions: int | None
    met_at: float | None = Field(description="when viewers first met the release")
    alerted_at: float | None = Field(description="when the test alert was sent")
    detected_at: float | None
    detected_after_s: float | None = Field(description="since viewers met it, or since the alert; 0: before")
    decision_to_stable_ms: float | None = Field(description="decision -> all routers seen on stable")
    whole_s: float = Field(description="from start to end of the rollout")
    requests: int | None = Field(description="of the traffic report, during the drill")
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
    """What the history says.

    Args:
        exposure: viewers and impressions of the release at the last look before it was rolled back; an alert's own
            reaction does not look.
        traffic: requests and failed ones during the drill.
    """
    state = rollout.state
    met = next((entry for entry in history if entry.canary_bp > 0), None)
    caught = next((entry for entry in history if entry.action == "roll_back"), None)
    ended = next((entry for entry in history if entry.action == "complete_rollback"), None)
    names = caught_by(caught) if caught is not None else ()
    began = alerted_at if alerted_at is not None else met.time if met is not None else None
    after_s = None if caught is None else 0.0 if began is None else caught.time - began
    on_stable = state.phase is Phase.ROLLED_BACK
    seen = _exposure(caught, exposure)
    return DrillReport(
        rollout=state.id,
        release=state.canary_release,
        stable_release=state.stable_release,
        fault=fault,
        by=by,
        within_s=within_s,
        passed=on_stable and bool(names) and after_s is not None and _total(after_s, caught, ended) <= within_s,
        on_stable=on_stable,
        caught_by=names,
        reason=caught.reason if caught is not None else state.reason,
        weight_percent=_weight_before(history, caught) if caught is not None else None,
        viewers=seen.get("viewers"),
        impressions=seen.get("impressions"),
        met_at=met.time if met is not None else None,
        alerted_at=alerted_at,
        detected_at=caught.time if caught is not None else None,
        detected_after_s=after_s,
        decision_to_stable_ms=1000 * (ended.time - caught.time) if ended and caught else None,
        whole_s=(ended.time if ended else state.tick_at) - state.started_at,
        requests=traffic[0] if traffic else None,
        failed_requests=traffic[1] if traffic else None,
    )


def caught_by(entry: HistoryEntry) -> tuple[str, ...]:
    """Names of what was bad in the evidence that rolled back; nothing when a person or a deadline did."""
    by_evidence = not entry.reason.startswith("rolled back by ") and bool(entry.evidence)
    if not by_evidence:
        return ()
    evidence = EvidenceReport.model_validate(entry.evidence)
    if entry.reason.startswith("guardrail: "):
        return tuple(one.name for one in evidence.guardrails if one.state == "bad")
    return tuple(one.label for one in evidence.outcomes if one.finding == "harm_established")


def drill_table(report: DrillReport) -> Table:
    """For people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    verdict = "[bold green]PASSED[/]" if report.passed else "[bold red]FAILED[/]"
    table.add_row("drill", f"{verdict}   {report.rollout}, release {report.release[:12]} ({report.fault or 'given'})")
    table.add_row("caught by", ", ".join(report.caught_by) or "[bold red]nothing[/]")
    if report.detected_after_s is not None:
        since = "the alert" if report.alerted_at is not None else "viewers first met it"
        table.add_row("after", f"{report.detected_after_s:.1f} s since {since} (allowed {report.within_s:g} s)")
    if report.weight_percent is not None:
        table.add_row("at", f"{report.weight_percent:g} % of the viewers")
    if report.viewers is not None:
        table.add_row("exposed", f"{report.viewers:,} viewers, {report.impressions or 0:,} impressions")
    if report.decision_to_stable_ms is not None:
        table.add_row("back", f"all traffic on stable {report.decision_to_stable_ms:.0f} ms after the decision")
    if report.failed_requests is not None:
        table.add_row("failed", f"{report.failed_requests:,} of {report.requests or 0:,} requests")
    where = f"everybody is on {report.stable_release[:12]}" if report.on_stable else "[bold red]NOT on stable[/]"
    table.add_row("now", f"{where}; the whole took {span(report.whole_s)}")
    return table


def _total(after_s: float, caught: HistoryEntry | None, ended: HistoryEntry | None) -> float:
    return after_s + (ended.time - caught.time if ended and caught else 0.0)


def _exposure(caught: HistoryEntry | None, last_seen: dict[str, int]) -> dict[str, int]:
    recorded = dict(caught.evidence.get("exposure", {})) if caught is not None else {}
    return recorded if recorded.get("viewers") else last_seen


def _weight_before(history: Sequence[HistoryEntry], caught: HistoryEntry) -> float:
    earlier = [entry.canary_bp for entry in history if entry.number < caught.number]
    return (earlier[-1] if earlier else 0) / 100
