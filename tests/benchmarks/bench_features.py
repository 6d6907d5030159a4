"""Measures the feature batch job on one and two CPUs, the point-in-time join and the online store.

``python -m tests.benchmarks.bench_features [impressions]``. Both runs do the same work on the same data. The start-up
time of Ray is a separate row, because it does not grow with the data.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from tests.support.bench_results import Row, write_report
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset, write_dataset

from reelway.pipelines.features.batch import BatchSettings, build_views
from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.training_rows import build_training_rows
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

SLATE = 10


def _batch_s(run: RunDirectory, cpus: int) -> tuple[float, float, int]:
    """Returns the seconds of Ray's start with warm workers, the seconds of the batch job, and its view rows."""
    clock = time.perf_counter()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        warm_up = BatchSettings(ViewSettings(DIMENSIONS), cpus=cpus, buckets=cpus)
        build_views(run, warm_up)  # warms the workers' imports and the disk cache
        start_s = time.perf_counter() - clock
        clock = time.perf_counter()
        report = build_views(run, BatchSettings(ViewSettings(DIMENSIONS), cpus=cpus))
        return start_s, time.perf_counter() - clock, sum(report.rows.values())
    finally:
        ray.shutdown()


def _read_ms(run: RunDirectory, viewers: int) -> float:
    rows = ViewerRowReader(open_feature_store(run.features))
    times_s = []
    for viewer in range(500, 500 + min(viewers, 1000)):
        clock = time.perf_counter()
        rows.read(viewer)
        times_s.append(time.perf_counter() - clock)
    return float(np.median(times_s) * 1e3)


def main(impressions: int) -> None:
    viewers = max(impressions // 60, 10)
    with tempfile.TemporaryDirectory() as name:
        run = RunDirectory(Path(name) / "run")
        write_dataset(
            run.dataset,
            random_dataset(
                viewers=viewers, creators=max(viewers // 10, 2), video_count=viewers, requests=impressions // SLATE,
                slate=SLATE, days=30,
            ),
        )  # fmt: skip
        rows: list[Row] = []
        rates = []
        for cpus in (1, 2):
            start_s, batch_s, view_rows = _batch_s(run, cpus)
            rates.append(impressions / batch_s)
            rows += [
                Row(f"batch views, {cpus} CPU", rates[-1], "impressions/s"),
                Row(f"batch views, {cpus} CPU", view_rows / batch_s, "view rows/s"),
                Row(f"start of Ray with {cpus} CPU, including a warm-up run", start_s, "s"),
            ]
        rows.append(Row("speed-up of two CPUs over one", rates[1] / rates[0], "x"))
        register_features(run.features, DIMENSIONS, "sqlite")
        clock = time.perf_counter()
        build_training_rows(run)
        join_s = time.perf_counter() - clock
        bar_s = 60.0 * max(impressions / 300_000, 1.0)
        rows.append(Row("training rows by point-in-time join", impressions / join_s, "rows/s"))
        rows.append(Row("training rows by point-in-time join", join_s, "s", f"under {bar_s:.0f} s", join_s < bar_s))
        end_s = 1_700_006_400.0 + 30 * 86_400
        clock = time.perf_counter()
        materialise(run.features, end_s)
        rows.append(Row("online store filled", viewers / (time.perf_counter() - clock), "viewers/s"))
        read_ms = _read_ms(run, viewers)
        rows.append(Row("read of one viewer's row from SQLite, median", read_ms, "ms", "under 3 ms", read_ms < 3.0))
        write_report("features", rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300_000)
