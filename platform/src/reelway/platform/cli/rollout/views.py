"""Terminal view of a ``StatusReport``: state, reason, traffic, evidence and controller warnings.

Fits into 80 columns; short terminals get a compact form. Each colour is accompanied by a label, for plain logs and
colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from reelway.platform.cli.rollout.intervals import (
    guardrail_status_lines,
    labelled_line,
    outcomes_table,
    suspicion_lines,
)
from reelway.platform.cli.rollout.status_report import EvidenceReport, RolloutReport, StatusReport
from reelway.platform.contracts.ids import short_id

PHASE_STYLES: Final = {
    "pending": "cyan",
    "preparing": "cyan",
    "shadow": "cyan",
    "stepping": "bold blue",
    "holding": "bold yellow",
    "paused": "bold yellow",
    "promoting": "bold green",
    "promoted": "bold green",
    "rolling_back": "bold red",
    "rolled_back": "bold red",
}
ARM_STYLES: Final = {"canary": "yellow", "stable": "blue", "holdout": "magenta"}
_LABEL: Final = 11
_MARKS: Final = {"done": ("✔", "green"), "now": ("▶", "bold blue"), "next": ("·", "dim"), "held": ("‖", "bold yellow")}


def status_view(report: StatusReport, *, width: int, height: int | None = None) -> RenderableType:
    """Returns the full view, or the compact one if the full view has more than ``height`` lines."""
    if report.rollout is None:
        return Group(*_nothing_yet(report, width))
    full = _lines(report, report.rollout, width, compact=False)
    if height is None or _height(full) <= height:
        return Group(*full)
    return Group(*_lines(report, report.rollout, width, compact=True))


def _lines(report: StatusReport, rollout: RolloutReport, width: int, *, compact: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [*_controller_warning(report, rollout, width), *_head(report, rollout, width)]
    if not rollout.waits_for or rollout.waits_for != rollout.reason:
        parts.append(
            labelled_line("why", "bold", _truncated_reason(rollout.reason, width) if compact else rollout.reason, width)
        )
    if rollout.waits_for:
        parts.append(labelled_line("waits for", "bold", rollout.waits_for, width))
    parts += _ages(report, rollout, width)
    if rollout.evidence is not None:
        parts += _evidence(rollout, rollout.evidence, width, compact=compact)
    return parts


def _truncated_reason(reason: str, width: int) -> str:
    """Returns the first three lines of the reason and names the command that prints all of it."""
    room = 3 * (width - _LABEL) - 40
    return reason if len(reason) <= room + 40 else f"{reason[:room]}... (reelway rollout explain)"


def _nothing_yet(report: StatusReport, width: int) -> Sequence[RenderableType]:
    serving = report.serving
    if serving is None:
        first = [labelled_line("not served", "bold yellow", f"run `reelway serve --run {report.run}`", width)]
    else:
        first = [labelled_line("live", "bold green", f"release {short_id(serving.release)} at {serving.url}", width)]
    begin = f"no rollout yet; start one with `reelway rollout start RELEASE --run {report.run}`"
    return [*first, labelled_line("rollout", "bold", begin, width)]


def _controller_warning(report: StatusReport, rollout: RolloutReport, width: int) -> list[RenderableType]:
    """Returns a warning, shown above everything else, if no controller reconciles an unfinished rollout."""
    kept_warm = rollout.warm_for_s is not None
    if not report.controller.unresponsive or not (rollout.active or kept_warm or rollout.command is not None):
        return []
    message = (
        f"{report.controller.problem}: rollouts do not advance until "
        f"`reelway rollout controller --run {report.run}` runs"
    )
    warning = labelled_line("WARNING", "", message, width)
    warning.stylize("bold white on red")
    return [warning]


def _head(report: StatusReport, rollout: RolloutReport, width: int) -> list[RenderableType]:
    phase = rollout.phase.replace("_", " ").upper()
    first = Text.assemble((rollout.id, "bold"), "   ", (phase, PHASE_STYLES[rollout.phase]))
    if rollout.step > 0 and rollout.active:
        first.append(f"   step {rollout.step} of {len(rollout.steps)}")
    if rollout.phase in ("stepping", "holding", "paused"):
        first.append(f", {rollout.phase_s:.0f} of {rollout.steps[rollout.step - 1].hold_s:g} s")
    if rollout.forced:
        first.append("   forced", style="yellow")
    moment = ("started", rollout.started_at) if rollout.active else ("ended", rollout.changed_at)
    clock = f"{moment[0]} {format_duration(report.time - moment[1])} ago"
    first.append(" " * max(2, width - first.cell_len - len(clock)) + clock)
    releases = Text.assemble(
        "canary ", (short_id(rollout.canary_release), ARM_STYLES["canary"]), "   over ",
        (short_id(rollout.stable_release), ARM_STYLES["stable"]), f"   policy {rollout.policy}",
    )  # fmt: skip
    return [first, releases, Text(), *_ramp(rollout, width), *_traffic(rollout, width)]


def _ramp(rollout: RolloutReport, width: int) -> list[RenderableType]:
    """Returns the stages of the ramp with the current one marked."""
    stages = ["prepare", *(["shadow"] if rollout.shadowed else [])]
    before = len(stages)
    stages += [f"{step.weight_percent:g} %" for step in rollout.steps] + ["promoted"]
    at = {"pending": 0, "preparing": 0, "shadow": 1, "promoting": len(stages) - 1, "promoted": len(stages)}
    current = at.get(rollout.phase, before + rollout.step - 1 if rollout.step else before - 1)
    line = Text(f"{'ramp':<{_LABEL}}", style="bold")
    for i, stage in enumerate(stages):
        mark, style = _MARKS["done" if i < current else "next" if i > current else _current_stage(rollout.phase)]
        if i == current and rollout.phase in ("rolling_back", "rolled_back"):
            mark, style = "✘", "bold red"
        line.append(f"{mark} {stage}", style=f"not bold {style}")
        if i + 1 < len(stages):
            line.append(" ─ ", style="dim")
    if line.cell_len <= width:
        return [line]
    position = f"step {rollout.step} of {len(rollout.steps)}" if rollout.step else "before the first step"
    return [labelled_line("ramp", "bold", position, width)]


def _current_stage(phase: str) -> str:
    return "held" if phase in ("paused", "holding") else "now"


def _traffic(rollout: RolloutReport, width: int) -> list[RenderableType]:
    """Returns the recorded traffic weights, and a line if the routers differ from them."""
    shares = [(arm, weight) for arm in ("stable", "canary", "holdout") if (weight := rollout.weights.get(arm, 0))]
    bar = Text(f"{'traffic':<{_LABEL}}", style="bold")
    room = width - _LABEL
    cells = {arm: max(1, round(weight / 10_000 * room)) for arm, weight in shares}
    widest = max(cells, key=cells.__getitem__)
    cells[widest] += room - sum(cells.values())
    for arm, _ in shares:
        bar.append(("█" if arm == "stable" else "▓" if arm == "canary" else "░") * cells[arm], style=ARM_STYLES[arm])
    weights_text = Text(" " * _LABEL)
    for arm, weight in shares:
        weights_text.append(f"{arm} {weight / 100:g} %   ", style=ARM_STYLES[arm])
    if rollout.shadow_bp:
        weights_text.append(f"mirrored {rollout.shadow_bp / 100:g} %", style="cyan")
    weights_text.rstrip()
    return [bar, weights_text, *_routing_mismatch(rollout, width)]


def _routing_mismatch(rollout: RolloutReport, width: int) -> list[RenderableType]:
    traffic = rollout.traffic
    messages = []
    if failed := traffic.get("failed"):
        messages += [f"{short_id(release)} failed: {reason}" for release, reason in failed.items()]
    if apply_error := traffic.get("trouble"):
        messages.append(f"the last traffic write failed: {apply_error}")
    elif traffic and not traffic.get("reached") and (detail := traffic.get("detail")):
        messages.append(f"routers differ from the recorded traffic: {detail}")
    return [labelled_line("ROUTERS", "bold magenta", one, width) for one in messages]


def _evidence(rollout: RolloutReport, evidence: EvidenceReport, width: int, *, compact: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if rollout.phase == "shadow":
        parts.append(labelled_line("mirrored", "bold", f"{evidence.shadow_requests:,} requests compared", width))
    if rollout.phase not in ("pending", "preparing", "shadow"):
        parts.append(_exposure(rollout, evidence))
    if rollout.evidence_entry is not None:
        parts.append(Text(f"{'':<{_LABEL}}evidence of decision {rollout.evidence_entry}, which ended the ramp", "dim"))
    guardrails = guardrail_status_lines(evidence, width=width, compact=compact)
    rolled_back_by_alert = evidence.breached and not evidence.has_outcome_data
    if rolled_back_by_alert:  # an alert rolls back before evidence is read: the other guardrails are not without data
        only_breaches = evidence.model_copy(
            update={"guardrails": tuple(one for one in evidence.guardrails if one.state == "bad")}
        )
        guardrails = guardrail_status_lines(only_breaches, width=width)
    if rollout.phase not in ("pending", "preparing", "shadow") and not rolled_back_by_alert:
        parts.append(Rule("outcomes", style="dim", align="left"))
        parts.append(outcomes_table(evidence, width=width, compact=compact))
        if not compact:
            note = "0: no change, M: margin; *: promotion requires that harm is excluded"
            parts.append(Text(note, style="dim"))
    if suspicions := suspicion_lines(evidence, width=width, compact=compact):
        parts.append(Rule("audiences", style="dim", align="left"))
        parts += suspicions
    parts.append(Rule("guardrails", style="dim", align="left"))
    parts += guardrails
    return parts


def _exposure(rollout: RolloutReport, evidence: EvidenceReport) -> Text:
    step = rollout.steps[max(0, min(rollout.step, len(rollout.steps)) - 1)]
    line = Text(f"{'exposure':<{_LABEL}}", style="bold")
    for name, least in (("viewers", step.minimum_viewers), ("impressions", step.minimum_impressions)):
        exposed = evidence.exposure.get(name, 0)
        enough = exposed >= least
        line.append(f"{exposed:,} of {least:,} {name}", style="default not bold" if enough else "cyan not bold")
        line.append(" ✔   " if enough else "     ", style="green")
    line.rstrip()
    return line


def _ages(report: StatusReport, rollout: RolloutReport, width: int) -> list[RenderableType]:
    ages = []
    if rollout.evidence_age_s is not None:
        ages.append(f"evidence {format_duration(rollout.evidence_age_s)} old")
    reconciled_at = report.controller.last_reconcile_at
    if reconciled_at is not None:
        ages.append(f"last reconcile {format_duration(report.time - reconciled_at)} ago")
    if rollout.warm_for_s is not None:
        ages.append(f"rollback possible for {format_duration(rollout.warm_for_s)}")
    lines: list[RenderableType] = [labelled_line("updated", "bold", " · ".join(ages), width)] if ages else []
    if rollout.command is not None:
        pending = f"{rollout.command.verb} by {rollout.command.actor}, not yet accepted"
        lines.append(labelled_line("command", "bold yellow", pending, width))
    return lines


def format_duration(seconds: float) -> str:
    """Formats a duration as ``4 s``, ``12 m 31 s``, ``3 h 05 m`` or ``2 d 4 h``."""
    whole_s = round(max(0.0, seconds))
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} m {whole_s % 60:02d} s"
    if whole_s < 86400:
        return f"{whole_s // 3600} h {whole_s % 3600 // 60:02d} m"
    return f"{whole_s // 86400} d {whole_s % 86400 // 3600} h"


def format_utc_time(time_s: float) -> str:
    """Formats a Unix time in UTC, for tables."""
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S}"


def _height(parts: Sequence[RenderableType]) -> int:
    """Returns the number of lines of the parts. Tables and rules contain no folded text."""
    lines = 0
    for part in parts:
        if isinstance(part, Text):
            lines += part.plain.count("\n") + 1
        else:
            rows = getattr(part, "row_count", None)
            lines += 1 if rows is None else rows + 1
    return lines
