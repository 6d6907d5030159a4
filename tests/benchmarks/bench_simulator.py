"""Measures the simulator: impressions per second on one core, with log, outcomes and both event tables.

Creating the viewers and videos is not counted.

``python -m tests.benchmarks.bench_simulator``
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import statistics
import time

import pyarrow as pa
from tests.support.bench_results import Row, write_report

from reelway.pipelines.simulation.config import SimulationConfig
from reelway.pipelines.simulation.simulate_log import simulate_traffic_log
from reelway.pipelines.simulation.world import World

BAR = 200_000.0
RUNS = 5


def measure(config: SimulationConfig, runs: int = RUNS) -> list[float]:
    """Returns the impressions per second of each run, after one warm-up run."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    world = World(config, seed=0)
    rates = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        dataset = simulate_traffic_log(world)
        rates.append(dataset.impressions.num_rows / (time.perf_counter() - start))
    return rates[1:]


def main() -> None:
    rates = measure(SimulationConfig())
    middle = statistics.median(rates)
    write_report(
        "simulator",
        [
            Row(f"simulator, median of {RUNS} runs", middle, "impressions/s/core", f">= {BAR:,.0f}", middle >= BAR),
            Row("simulator, slowest run", min(rates), "impressions/s/core"),
        ],
    )


if __name__ == "__main__":
    main()
