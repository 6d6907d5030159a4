"""Why: whether a metric's interval lies on this side of its margin or beyond it is seen faster than read.

Draws evidence that was judged elsewhere. The axis of an interval is harm: zero and the margin stand in the same columns
on every line, and distances far from them are compressed (asinh), so that early, wide intervals still show where they
lie. Every colour comes with a word.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Final

from rich.table import Table
from rich.text import Text

from reelway.platform.cli.rollout.report import EvidenceReport, OutcomeReport

FINDING_WORDS: Final = {
    "harm_established": ("HARM", "bold red"),
    "harm_excluded": ("no harm", "green"),
    "undecided": ("undecided", "yellow"),
    "insufficient": ("too little", "cyan"),
    "telemetry_down": ("NOT HEARD", "bold magenta"),
}
STATE_WORDS: Final = {
    "ok": ("ok", "green"),
    "bad": ("BREACH", "bold red"),
    "insufficient": ("too little", "cyan"),
    "telemetry_down": ("NOT HEARD", "bold magenta"),
}
_BETTER_MARGINS: Final = 6.0
_WORSE_MARGINS: Final = 12.0
_BEYOND: Final = 100.0
"""Of margins: where there is no number the bar ends at the edge."""
WIDE: Final = 100
NUMBER: Final = 7


def outcomes_table(evidence: EvidenceReport, *, width: int, compact: bool = False) -> Table:
    """All outcomes, one line each. ``compact`` shows slices only where they are judged worse than fine."""
    wide = width >= WIDE
    bar = max(12, width - (78 if wide else 61))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", width=width)
    table.add_column("outcome", no_wrap=True, width=24)
    table.add_column("canary", justify="right", no_wrap=True, width=NUMBER)
    table.add_column("stable", justify="right", no_wrap=True, width=NUMBER)
    table.add_column("change", justify="right", no_wrap=True, width=NUMBER)
    table.add_column(axis_header(bar), no_wrap=True, width=bar)
    if wide:
        table.add_column("viewers", justify="right", no_wrap=True, width=16)
    table.add_column("finding", no_wrap=True, width=11)
    for outcome in evidence.outcomes:
        overall = outcome.slice == "overall"
        if compact and not overall and outcome.finding in ("harm_excluded", "undecided"):
            continue
        word, style = FINDING_WORDS[outcome.finding]
        name = outcome.name + ("*" if outcome.required else "") if overall else f"  on {outcome.slice}"
        cells: list[str | Text] = [
            Text(name, style="" if overall else "dim"),
            _number(outcome.canary),
            _number(outcome.stable),
            change_of(outcome),
            interval_bar(outcome, bar),
        ]
        viewers = [f"{outcome.viewers['canary']:,}/{outcome.viewers['stable']:,}"] if wide else []
        table.add_row(*cells, *viewers, Text(word, style=style))
    return table


def axis_header(width: int) -> Text:
    """Names of the two marks, above their columns."""
    zero, margin = _column(0.0, width), _column(1.0, width)
    line = [" "] * width
    for word, at in (("better", 0), ("worse", width - len("worse"))):
        if at + len(word) < zero or at > margin + 1:
            line[at : at + len(word)] = word
    line[zero], line[margin] = "0", "M"
    return Text("".join(line))


def interval_bar(outcome: OutcomeReport, width: int) -> Text:
    """The interval of a metric's harm against zero and its margin, ``width`` characters."""
    _, style = FINDING_WORDS[outcome.finding]
    zero, limit = _column(0.0, width), _column(1.0, width)
    marks: list[tuple[str, str]] = [(" ", "")] * width
    if outcome.harm is not None:
        low = -_BEYOND if outcome.low is None else outcome.low / outcome.margin
        high = _BEYOND if outcome.high is None else outcome.high / outcome.margin
        left, right = _beside(low, width), _beside(high, width)
        for at in range(left, right + 1):
            marks[at] = ("─", style)
        marks[left] = ("◀" if low < -_BETTER_MARGINS else "├", style)
        marks[right] = ("▶" if high > _WORSE_MARGINS else "┤", style)
        marks[_column(outcome.harm / outcome.margin, width)] = ("●", style)
    for at, mark in ((zero, "┊"), (limit, "┃")):
        if marks[at][0] in (" ", "─"):
            marks[at] = (mark, "bold" if mark == "┃" else "dim")
    return Text.assemble(*marks)


def change_of(outcome: OutcomeReport) -> str:
    """Canary against stable as the metric itself counts, signed."""
    if outcome.harm is None:
        return "-"
    return f"{(1 if outcome.lower_is_better else -1) * outcome.harm:+.1%}"


def guardrail_lines(evidence: EvidenceReport, *, width: int, compact: bool = False) -> Sequence[Text]:
    """Word and sentence of every guardrail; ``compact`` puts those that are fine on one line."""
    lines, fine = [], []
    for guardrail in evidence.guardrails:
        word, style = STATE_WORDS[guardrail.state]
        if compact and guardrail.state == "ok":
            fine.append(guardrail.name)
        else:
            lines.append(worded(word, style, guardrail.sentence, width))
    if fine:
        lines.append(worded("ok", "green", ", ".join(fine), width))
    return lines


def worded(word: str, style: str, sentence: str, width: int) -> Text:
    """A word in a column of its own, the sentence folded beside it."""
    indent = 11
    folded = textwrap.wrap(sentence, max(20, width - indent))
    line = Text(f"{word:<{indent}}", style=style)
    line.append(Text(("\n" + " " * indent).join(folded), style="default not bold"))
    return line


def _column(margins: float, width: int) -> int:
    """Column of a harm, given in margins."""
    low, high = math.asinh(-_BETTER_MARGINS), math.asinh(_WORSE_MARGINS)
    place = (math.asinh(margins) - low) / (high - low)
    return round(min(max(place, 0.0), 1.0) * (width - 1))


def _beside(margins: float, width: int) -> int:
    """Column of an interval's end: never on the marks, always on the side of them that it is on."""
    at, zero, limit = _column(margins, width), _column(0.0, width), _column(1.0, width)
    for mark, value in ((zero, 0.0), (limit, 1.0)):
        if margins >= value and at <= mark:
            at = mark + 1
        elif margins < value and at == mark:
            at = mark - 1
    return at


def _number(value: float | None) -> str:
    """As many digits as the column holds."""
    if value is None:
        return "-"
    return next(text for digits in (4, 3, 2, 1) if len(text := f"{value:.{digits}g}") <= NUMBER or digits == 1)
