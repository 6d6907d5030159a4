"""Why: at three in the morning one look must say where a rollout stands, why, what it waits for and who minds it.

Draws a ``StatusReport`` and nothing else; computes no verdict. Every colour comes with a word, so that a plain log and
a colour-blind reader lose nothing. Fits 80 columns; a short terminal gets the compact form.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from reelway.platform.cli.rollout.intervals import guardrail_lines, outcomes_table, worded
from reelway.platform.cli.rollout.report import EvidenceReport, RolloutReport, StatusReport

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
    """The whole picture. ``height`` None shows everything; otherwise the compact form is taken when it is too tall."""
    if report.rollout is None:
        return Group(*_nothing_yet(report, width))
    full = _lines(report, report.rollout, width, compact=False)
    if height is None or _height(full) <= height:
        return Group(*full)
    return Group(*_lines(report, report.rollout, width, compact=True))


def _lines(report: StatusReport, rollout: RolloutReport, width: int, *, compact: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [*_alarm(report, rollout, width), *_head(report, rollout, width)]
    if not rollout.waits_for or rollout.waits_for != rollout.reason:
        parts.append(worded("why", "bold", _shortened(rollout.reason, width) if compact else rollout.reason, width))
    if rollout.waits_for:
        parts.append(worded("waits for", "bold", rollout.waits_for, width))
    parts += _ages(report, rollout, width)
    if rollout.evidence is not None:
        parts += _evidence(rollout, rollout.evidence, width, compact=compact)
    return parts


def _shortened(reason: str, width: int) -> str:
    """Three lines of it, and where the rest is."""
    room = 3 * (width - _LABEL) - 40
    return reason if len(reason) <= room + 40 else f"{reason[:room]}... (reelway rollout explain)"


def _nothing_yet(report: StatusReport, width: int) -> Sequence[RenderableType]:
    serving = report.serving
    if serving is None:
        first = [worded("not served", "bold yellow", f"start it with `reelway serve --run {report.run}`", width)]
    else:
        first = [worded("live", "bold green", f"release {serving.release[:12]} at {serving.url}", width)]
    begin = f"no rollout yet; begin one with `reelway rollout start RELEASE --run {report.run}`"
    return [*first, worded("rollout", "bold", begin, width)]


def _alarm(report: StatusReport, rollout: RolloutReport, width: int) -> list[RenderableType]:
    """Loud, above everything else: nobody looks after a rollout that still moves."""
    kept_warm = rollout.warm_for_s is not None
    if not report.controller.silent or not (rollout.active or kept_warm or rollout.command is not None):
        return []
    said = f"{report.controller.problem}: nothing moves until `reelway rollout controller --run {report.run}` runs"
    loud = worded("SILENT", "", said, width)
    loud.stylize("bold white on red")
    return [loud]


def _head(report: StatusReport, rollout: RolloutReport, width: int) -> list[RenderableType]:
    word = rollout.phase.replace("_", " ").upper()
    first = Text.assemble((rollout.id, "bold"), "   ", (word, PHASE_STYLES[rollout.phase]))
    if rollout.step > 0 and rollout.active:
        first.append(f"   step {rollout.step} of {len(rollout.steps)}")
    if rollout.phase in ("stepping", "holding", "paused"):
        first.append(f", {rollout.phase_s:.0f} of {rollout.steps[rollout.step - 1].hold_s:g} s")
    if rollout.forced:
        first.append("   forced", style="yellow")
    moment = ("began", rollout.started_at) if rollout.active else ("ended", rollout.changed_at)
    clock = f"{moment[0]} {span(report.time - moment[1])} ago"
    first.append(" " * max(2, width - first.cell_len - len(clock)) + clock)
    releases = Text.assemble(
        "canary ", (rollout.canary_release[:12], ARM_STYLES["canary"]), "   over ",
        (rollout.stable_release[:12], ARM_STYLES["stable"]), f"   policy {rollout.policy}",
    )  # fmt: skip
    return [first, releases, Text(), *_ramp(rollout, width), *_traffic(rollout, width)]


def _ramp(rollout: RolloutReport, width: int) -> list[RenderableType]:
    """The way that a rollout goes, and where on it this one is."""
    places = ["prepare", *(["shadow"] if rollout.shadowed else [])]
    before = len(places)
    places += [f"{step.weight_percent:g} %" for step in rollout.steps] + ["promoted"]
    at = {"pending": 0, "preparing": 0, "shadow": 1, "promoting": len(places) - 1, "promoted": len(places)}
    here = at.get(rollout.phase, before + rollout.step - 1 if rollout.step else before - 1)
    line = Text(f"{'ramp':<{_LABEL}}", style="bold")
    for i, place in enumerate(places):
        mark, style = _MARKS["done" if i < here else "next" if i > here else _here(rollout.phase)]
        if i == here and rollout.phase in ("rolling_back", "rolled_back"):
            mark, style = "✘", "bold red"
        line.append(f"{mark} {place}", style=f"not bold {style}")
        if i + 1 < len(places):
            line.append(" ─ ", style="dim")
    if line.cell_len <= width:
        return [line]
    word = f"step {rollout.step} of {len(rollout.steps)}" if rollout.step else "before the first step"
    return [worded("ramp", "bold", word, width)]


def _here(phase: str) -> str:
    return "held" if phase in ("paused", "holding") else "now"


def _traffic(rollout: RolloutReport, width: int) -> list[RenderableType]:
    """Who gets which release, as recorded, and a line when the routers do otherwise."""
    shares = [(arm, weight) for arm in ("stable", "canary", "holdout") if (weight := rollout.weights.get(arm, 0))]
    bar = Text(f"{'traffic':<{_LABEL}}", style="bold")
    room = width - _LABEL
    cells = {arm: max(1, round(weight / 10_000 * room)) for arm, weight in shares}
    widest = max(cells, key=cells.__getitem__)
    cells[widest] += room - sum(cells.values())
    for arm, _ in shares:
        bar.append(("█" if arm == "stable" else "▓" if arm == "canary" else "░") * cells[arm], style=ARM_STYLES[arm])
    words = Text(" " * _LABEL)
    for arm, weight in shares:
        words.append(f"{arm} {weight / 100:g} %   ", style=ARM_STYLES[arm])
    if rollout.shadow_bp:
        words.append(f"mirrored {rollout.shadow_bp / 100:g} %", style="cyan")
    words.rstrip()
    return [bar, words, *_disagreement(rollout, width)]


def _disagreement(rollout: RolloutReport, width: int) -> list[RenderableType]:
    traffic = rollout.traffic
    said = []
    if failed := traffic.get("failed"):
        said += [f"{release[:12]} failed: {why}" for release, why in failed.items()]
    if trouble := traffic.get("trouble"):
        said.append(f"the last write was refused: {trouble}")
    elif traffic and not traffic.get("reached") and (detail := traffic.get("detail")):
        said.append(f"routers not yet as recorded: {detail}")
    return [worded("ROUTERS", "bold magenta", one, width) for one in said]


def _evidence(rollout: RolloutReport, evidence: EvidenceReport, width: int, *, compact: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if rollout.phase == "shadow":
        parts.append(worded("mirrored", "bold", f"{evidence.shadow_requests:,} requests compared", width))
    if rollout.phase not in ("pending", "preparing", "shadow"):
        parts.append(_exposure(rollout, evidence))
    if rollout.evidence_entry is not None:
        parts.append(Text(f"{'':<{_LABEL}}evidence of decision {rollout.evidence_entry}, which ended the ramp", "dim"))
    guardrails = guardrail_lines(evidence, width=width, compact=compact)
    before_looking = evidence.breached and not evidence.heard_outcomes
    if before_looking:  # an alert goes before the looking: what was not asked is not silence
        only_breaches = evidence.model_copy(
            update={"guardrails": tuple(one for one in evidence.guardrails if one.state == "bad")}
        )
        guardrails = guardrail_lines(only_breaches, width=width)
    if rollout.phase not in ("pending", "preparing", "shadow") and not before_looking:
        parts.append(Rule("outcomes", style="dim", align="left"))
        parts.append(outcomes_table(evidence, width=width, compact=compact))
        if not compact:
            note = "0 no change, M margin; * harm must be excluded before promotion"
            parts.append(Text(note, style="dim"))
    parts.append(Rule("guardrails", style="dim", align="left"))
    parts += guardrails
    return parts


def _exposure(rollout: RolloutReport, evidence: EvidenceReport) -> Text:
    step = rollout.steps[max(0, min(rollout.step, len(rollout.steps)) - 1)]
    line = Text(f"{'exposure':<{_LABEL}}", style="bold")
    for name, least in (("viewers", step.minimum_viewers), ("impressions", step.minimum_impressions)):
        seen = evidence.exposure.get(name, 0)
        enough = seen >= least
        line.append(f"{seen:,} of {least:,} {name}", style="default not bold" if enough else "cyan not bold")
        line.append(" ✔   " if enough else "     ", style="green")
    line.rstrip()
    return line


def _ages(report: StatusReport, rollout: RolloutReport, width: int) -> list[RenderableType]:
    said = []
    if rollout.evidence_age_s is not None:
        said.append(f"evidence {span(rollout.evidence_age_s)} old")
    looked = report.controller.last_look_at
    if looked is not None:
        said.append(f"controller looked {span(report.time - looked)} ago")
    if rollout.warm_for_s is not None:
        said.append(f"rollback in one command for {span(rollout.warm_for_s)}")
    lines: list[RenderableType] = [worded("seen", "bold", " · ".join(said), width)] if said else []
    if rollout.command is not None:
        asked = f"{rollout.command.verb} by {rollout.command.actor}, not yet taken"
        lines.append(worded("asked", "bold yellow", asked, width))
    return lines


def span(seconds: float) -> str:
    """A duration as people say it: ``4 s``, ``12 m 31 s``, ``3 h 05 m``, ``2 d 4 h``."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def clock_of(time_s: float) -> str:
    """A moment, in UTC, for tables."""
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S}"


def _height(parts: Sequence[RenderableType]) -> int:
    """Lines that the parts take; tables and rules hold no folded text."""
    lines = 0
    for part in parts:
        if isinstance(part, Text):
            lines += part.plain.count("\n") + 1
        else:
            rows = getattr(part, "row_count", None)
            lines += 1 if rows is None else rows + 1
    return lines
