"""Draws the confidence intervals of outcome metrics and the guardrails as text.

The axis of an interval is harm. Zero and the margin are in the same columns on every line. Distances beyond them are
compressed (asinh), so that early, wide intervals stay visible. Each colour is accompanied by a label.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Final

from rich.table import Table
from rich.text import Text

from reelway.platform.cli.rollout.status_report import EvidenceReport, OutcomeReport

FINDING_LABELS: Final = {
    "harm_established": ("HARM", "bold red"),
    "harm_excluded": ("no harm", "green"),
    "undecided": ("undecided", "yellow"),
    "insufficient": ("not enough", "cyan"),
    "telemetry_down": ("NO DATA", "bold magenta"),
}
STATE_LABELS: Final = {
    "ok": ("ok", "green"),
    "bad": ("BREACH", "bold red"),
    "insufficient": ("not enough", "cyan"),
    "telemetry_down": ("NO DATA", "bold magenta"),
}
_AXIS_BETTER_MARGINS: Final = 6.0
_AXIS_WORSE_MARGINS: Final = 12.0
_COMPRESSION_SCALE: Final = 100.0
"""In margins. An unknown bound is drawn this far out, which is the edge of the axis."""
WIDE_TERMINAL_COLUMNS: Final = 100
NUMBER_COLUMN_WIDTH: Final = 7


def outcomes_table(evidence: EvidenceReport, *, width: int, compact: bool = False) -> Table:
    """Returns a table of all outcomes, one line each. ``compact`` omits slices without harm and undecided slices."""
    wide = width >= WIDE_TERMINAL_COLUMNS
    bar = max(12, width - (78 if wide else 61))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", width=width)
    table.add_column("outcome", no_wrap=True, width=24)
    table.add_column("canary", justify="right", no_wrap=True, width=NUMBER_COLUMN_WIDTH)
    table.add_column("stable", justify="right", no_wrap=True, width=NUMBER_COLUMN_WIDTH)
    table.add_column("change", justify="right", no_wrap=True, width=NUMBER_COLUMN_WIDTH)
    table.add_column(axis_header(bar), no_wrap=True, width=bar)
    if wide:
        table.add_column("viewers", justify="right", no_wrap=True, width=16)
    table.add_column("finding", no_wrap=True, width=11)
    for outcome in evidence.outcomes:
        overall = outcome.slice == "overall"
        if compact and not overall and outcome.finding in ("harm_excluded", "undecided"):
            continue
        label, style = FINDING_LABELS[outcome.finding]
        name = outcome.name + ("*" if outcome.required else "") if overall else f"  on {outcome.slice}"
        cells: list[str | Text] = [
            Text(name, style="" if overall else "dim"),
            _number(outcome.canary),
            _number(outcome.stable),
            change_of(outcome),
            interval_bar(outcome, bar),
        ]
        viewers = [f"{outcome.viewers['canary']:,}/{outcome.viewers['stable']:,}"] if wide else []
        table.add_row(*cells, *viewers, Text(label, style=style))
    return table


def axis_header(width: int) -> Text:
    """Returns the axis header, with ``0`` and ``M`` above the columns of zero and margin."""
    zero, margin = _column(0.0, width), _column(1.0, width)
    line = [" "] * width
    for word, at in (("better", 0), ("worse", width - len("worse"))):
        if at + len(word) < zero or at > margin + 1:
            line[at : at + len(word)] = word
    line[zero], line[margin] = "0", "M"
    return Text("".join(line))


def interval_bar(outcome: OutcomeReport, width: int) -> Text:
    """Returns the interval of a metric's harm relative to zero and its margin, ``width`` characters wide."""
    _, style = FINDING_LABELS[outcome.finding]
    zero, limit = _column(0.0, width), _column(1.0, width)
    marks: list[tuple[str, str]] = [(" ", "")] * width
    if outcome.harm is not None:
        low = -_COMPRESSION_SCALE if outcome.low is None else outcome.low / outcome.margin
        high = _COMPRESSION_SCALE if outcome.high is None else outcome.high / outcome.margin
        left, right = _end_column(low, width), _end_column(high, width)
        for at in range(left, right + 1):
            marks[at] = ("─", style)
        marks[left] = ("◀" if low < -_AXIS_BETTER_MARGINS else "├", style)
        marks[right] = ("▶" if high > _AXIS_WORSE_MARGINS else "┤", style)
        marks[_column(outcome.harm / outcome.margin, width)] = ("●", style)
    for at, mark in ((zero, "┊"), (limit, "┃")):
        if marks[at][0] in (" ", "─"):
            marks[at] = (mark, "bold" if mark == "┃" else "dim")
    return Text.assemble(*marks)


def change_of(outcome: OutcomeReport) -> str:
    """Returns the signed relative change of the metric from stable to canary."""
    if outcome.harm is None:
        return "-"
    return f"{(1 if outcome.lower_is_better else -1) * outcome.harm:+.1%}"


def guardrail_status_lines(evidence: EvidenceReport, *, width: int, compact: bool = False) -> Sequence[Text]:
    """Returns the label and sentence of every guardrail; ``compact`` puts all guardrails that are ok on one line."""
    lines, within_limit = [], []
    for guardrail in evidence.guardrails:
        label, style = STATE_LABELS[guardrail.state]
        if compact and guardrail.state == "ok":
            within_limit.append(guardrail.name)
        else:
            lines.append(labelled_line(label, style, guardrail.sentence, width))
    if within_limit:
        lines.append(labelled_line("ok", "green", ", ".join(within_limit), width))
    return lines


def suspicion_lines(evidence: EvidenceReport, *, width: int, compact: bool = False) -> Sequence[Text]:
    """Returns the label and sentence of every comparison of audiences; with ``compact`` only of suspicious ones."""
    return [
        labelled_line(*(("SUSPECTED", "bold red") if one.suspected else ("ok", "green")), one.sentence, width)
        for one in evidence.suspicions
        if one.suspected or not compact
    ]


def labelled_line(label: str, style: str, sentence: str, width: int) -> Text:
    """Returns a label column followed by the folded sentence."""
    indent = 11
    folded = textwrap.wrap(sentence, max(20, width - indent))
    line = Text(f"{label:<{indent}}", style=style)
    line.append(Text(("\n" + " " * indent).join(folded), style="default not bold"))
    return line


def _column(margins: float, width: int) -> int:
    """Returns the column of a harm, given in margins."""
    low, high = math.asinh(-_AXIS_BETTER_MARGINS), math.asinh(_AXIS_WORSE_MARGINS)
    fraction = (math.asinh(margins) - low) / (high - low)
    return round(min(max(fraction, 0.0), 1.0) * (width - 1))


def _end_column(margins: float, width: int) -> int:
    """Returns the column of an interval's end: never on the marks for zero and margin, always on the correct side."""
    at, zero, limit = _column(margins, width), _column(0.0, width), _column(1.0, width)
    for mark, value in ((zero, 0.0), (limit, 1.0)):
        if margins >= value and at <= mark:
            at = mark + 1
        elif margins < value and at == mark:
            at = mark - 1
    return at


def _number(value: float | None) -> str:
    """Formats a number with as many significant digits as fit the column."""
    if value is None:
        return "-"
    return next(
        text for digits in (4, 3, 2, 1) if len(text := f"{value:.{digits}g}") <= NUMBER_COLUMN_WIDTH or digits == 1
    )
