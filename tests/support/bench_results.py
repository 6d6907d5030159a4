"""Results of benchmarks: a table on the terminal and JSON files in ``build/bench``.

``<name>.json`` is a list of measurements. ``<name>.run.json`` states when, where and on which commit they were taken.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.table import Table

from reelway.platform.atomic_files import write_json
from reelway.platform.cli.terminal import stdout_console

FOLDER = Path("build/bench")
RUN_SUFFIX = ".run.json"
_CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One measured number. ``bar`` is its required limit as text; ``holds`` is None if there is no limit."""

    metric: str
    value: float
    unit: str
    bar: str = ""
    holds: bool | None = None

    @property
    def formatted_value(self) -> str:
        """The value with four significant digits, or without decimals from 10,000 on."""
        return f"{self.value:,.4g}" if abs(self.value) < 1e4 else f"{self.value:,.0f}"


@dataclass(frozen=True)
class BenchmarkRun:
    """When, where and on which commit a benchmark ran."""

    date: str
    commit: str
    machine: str


def write_report(name: str, rows: Sequence[Row]) -> Path:
    """Prints the rows and writes them and the run's description to ``build/bench``. Returns the path of the rows."""
    table = Table(title=name, title_justify="left")
    for column in ("metric", "value", "unit", "bar", "holds"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        holds = "" if row.holds is None else ("yes" if row.holds else "[bold red]NO")
        table.add_row(row.metric, row.formatted_value, row.unit, row.bar, holds)
    stdout_console.print(table)
    path = FOLDER / f"{name}.json"
    write_json(path, [asdict(row) for row in rows])
    write_json(FOLDER / f"{name}{RUN_SUFFIX}", asdict(describe_run()))
    stdout_console.print(f"written to {path}", highlight=False)
    return path


def read_report(folder: Path, name: str) -> tuple[BenchmarkRun, list[Row]]:
    """Reads what ``write_report`` wrote.

    Raises:
        FileNotFoundError: if either file is missing.
    """
    run = BenchmarkRun(**json.loads((folder / f"{name}{RUN_SUFFIX}").read_text()))
    return run, [Row(**row) for row in json.loads((folder / f"{name}.json").read_text())]


def describe_run() -> BenchmarkRun:
    """Describes a run that ends now, on this machine and from this checkout."""
    return BenchmarkRun(date=f"{datetime.now(UTC):%Y-%m-%d}", commit=_commit(), machine=_machine())


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        cwd=_CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or "unknown"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
