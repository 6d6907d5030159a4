"""What every benchmark leaves behind: a table for people and ``build/bench/<name>.json`` for machines.

It measures nothing and judges nothing: each row says by itself whether its bar holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from reelway.platform.cli.terminal import out
from reelway.platform.durable import write_json

FOLDER = Path("build/bench")


@dataclass(frozen=True)
class Row:
    """One measured number. ``bar`` is what it is held to, in words; ``holds`` is None where nothing is promised."""

    metric: str
    value: float
    unit: str
    bar: str = ""
    holds: bool | None = None


def write_report(name: str, rows: Sequence[Row]) -> Path:
    """Print ``rows`` and write them as a JSON list to ``build/bench/<name>.json``; return that path."""
    table = Table(title=name, title_justify="left")
    for column in ("metric", "value", "unit", "bar", "holds"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        holds = "" if row.holds is None else ("yes" if row.holds else "[bold red]NO")
        table.add_row(row.metric, f"{row.value:,.4g}" if abs(row.value) < 1e4 else f"{row.value:,.0f}", row.unit,
                      row.bar, holds)  # fmt: skip
    out.print(table)
    path = FOLDER / f"{name}.json"
    write_json(path, [asdict(row) for row in rows])
    out.print(f"written to {path}", highlight=False)
    return path
