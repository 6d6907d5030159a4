"""Checks a data set, writes it atomically and prints a summary, at the end of every import and simulation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from reelway.pipelines.datasets.checks import CheckLimits, check_dataset
from reelway.pipelines.datasets.store import Dataset, cast_to_schema, write_dataset
from reelway.pipelines.datasets.summary import summarise, summary_tables
from reelway.platform.cli.terminal import stdout_console
from reelway.platform.contracts.feature_dimensions import FeatureDimensions


def write_checked_dataset(
    path: Path,
    tables: Mapping[str, pa.Table],
    info: Mapping[str, Any],
    limits: CheckLimits,
    *,
    dimensions: FeatureDimensions,
    extras: Mapping[str, pa.Table] | None = None,
) -> dict[str, Any]:
    """Checks ``tables``, writes the clean rows and ``rejected.parquet`` to ``path``, prints and returns a summary.

    Raises:
        DataError: if ``checks.check_dataset`` or ``store.write_dataset`` raises one.
    """
    conformed = {name: cast_to_schema(path / f"{name}.parquet", table, name) for name, table in tables.items()}
    checked = check_dataset(Dataset(**conformed, info=info, dimensions=dimensions), limits)
    write_dataset(
        path,
        checked.dataset.tables,
        checked.dataset.info,
        dimensions,
        extras={**(extras or {}), "rejected": checked.rejected},
    )
    summary = summarise(checked)
    for table in summary_tables(summary):
        stdout_console.print(table)
    return summary
