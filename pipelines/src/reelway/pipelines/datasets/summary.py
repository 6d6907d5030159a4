"""Summarises a checked data set: rows, rates and rejected rows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from reelway.pipelines.datasets.checks import CheckedDataset, summary_counts
from reelway.platform.contracts.events import OutcomeType


def summarise(checked: CheckedDataset) -> dict[str, Any]:
    """Returns counts and rates as JSON values, for the step record."""
    dataset = checked.dataset
    shown = dataset.impressions.num_rows
    counted = pc.value_counts(dataset.outcomes["type"].combine_chunks().cast(pa.string())).to_pylist()
    per_type = {entry["values"]: entry["counts"] for entry in counted}
    watched = dataset.outcomes.filter(pc.equal(dataset.outcomes["type"].cast(pa.string()), OutcomeType.WATCH.value))
    watch_ms = pc.sum(watched["value"].cast(pa.float64())).as_py() or 0.0
    span = pc.min_max(dataset.impressions["event_time"]).as_py()
    return {
        "rows": {name: table.num_rows for name, table in dataset.tables.items()},
        "first_time": span["min"].isoformat(),
        "last_time": span["max"].isoformat(),
        "watch_s_per_impression": round(watch_ms / 1000.0 / shown, 3),
        "outcomes_per_impression": {k.value: round(per_type.get(k.value, 0) / shown, 5) for k in OutcomeType},
        "rejected": {name: dict(reasons) for name, reasons in checked.counts.items() if reasons},
    }


def summary_tables(summary: dict[str, Any]) -> list[Table]:
    """Returns the summary as tables for the terminal."""
    rows = Table(title="data set", title_justify="left")
    rows.add_column("property")
    rows.add_column("value", justify="right")
    for name, count in summary["rows"].items():
        rows.add_row(name, f"{count:,}")
    rows.add_row("from", summary["first_time"][:19])
    rows.add_row("to", summary["last_time"][:19])
    rows.add_row("watch seconds per impression", f"{summary['watch_s_per_impression']:.2f}")
    for name, rate in summary["outcomes_per_impression"].items():
        rows.add_row(f"{name} per impression", f"{rate:.2%}")
    tables = [rows]
    rejected = Table(title="rejected by the data checks (rejected.parquet)", title_justify="left")
    for column in ("table", "reason", "rows"):
        rejected.add_column(column, justify="right" if column == "rows" else "left")
    for table, reason, count in summary_counts(summary["rejected"]):
        rejected.add_row(table, reason, f"{count:,}")
    if not rejected.row_count:
        rejected.add_row("", "none", "0")
    return [*tables, rejected]
