"""Writes BENCHMARKS.md from the results of all benchmarks: ``make bench-report``.

``python -m tests.benchmarks.bench_report [--results build/bench] [--output BENCHMARKS.md]``

A benchmark without results is listed as not measured. A result of a benchmark that ``BENCHMARKS`` lacks is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.bench_results import FOLDER, RUN_SUFFIX, BenchmarkRun, Row, read_report


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, named as its files in ``build/bench``."""

    name: str
    description: str
    command: str


BENCHMARKS: Final = (
    Benchmark(
        "simulator",
        "Speed of the simulator on one core. Creating the viewers and videos is not counted.",
        "make bench-simulator",
    ),
    Benchmark(
        "features",
        "The feature batch job on one and two CPUs, the point-in-time join, the online store and a read from it.",
        "make bench-features",
    ),
    Benchmark(
        "ray_train",
        "Time of a training epoch under Ray Train against the same loop without Ray, one worker each.",
        "make bench-ray-train",
    ),
    Benchmark(
        "quality",
        "Retrieval and ranking against popularity and ALS on the later fifth of MovieLens-100K, three seeds.",
        "make bench-quality",
    ),
    Benchmark(
        "closed_loop",
        "Watch time per impression in the simulator when recommendations create the next day's data, three seeds.",
        "make bench-closed-loop",
    ),
    Benchmark(
        "source_mix",
        "The sources of a slate's videos, and the watch time that a least share of each source costs.",
        "python -m tests.benchmarks.bench_source_mix RUN",
    ),
    Benchmark(
        "serving",
        "The request path over HTTP against the same arithmetic in one process (the floor) and against the naive "
        "composition; its parts against their limits. All variants share the cores with the load generator.",
        "make bench-serving",
    ),
    Benchmark(
        "open_inference",
        "What a ranker behind the Open Inference Protocol adds to the request path, and how its scores differ.",
        "python -m tests.benchmarks.bench_open_inference",
    ),
    Benchmark(
        "stream",
        "Outcomes per second and core of the feature stream. Writing to the online store is not counted.",
        "make bench-stream",
    ),
    Benchmark(
        "parity",
        "The replay of served values with the stream on, whose process is killed meanwhile.",
        "make bench-parity",
    ),
    Benchmark(
        "live",
        "How soon outcomes, uploads, takedowns and trends show in slates, and what that adds to a slate, on a real "
        "Kafka broker and a real Redis. All processes share the cores.",
        "make bench-live",
    ),
    Benchmark(
        "live_large",
        "The same with a catalogue of 1,000,000 videos.",
        'make bench-live BENCH_LIVE="--videos 1000000"',
    ),
    Benchmark(
        "live_stream",
        "The stream on Quix Streams with a real Kafka broker on the same cores: throughput, and killed members.",
        'make bench-live BENCH_LIVE="--only stream"',
    ),
    Benchmark(
        "live_loop",
        "Watch time per viewer-day of one release for seven days in copies of a simulated world: frozen, frozen with "
        "memory of what was shown, and live.",
        "make bench-live-loop",
    ),
    Benchmark(
        "canary",
        "Error rates and power of the rollout decision in simulated rollouts, next to the rules of other tools.",
        "make bench-canary",
    ),
    Benchmark(
        "hostile",
        "Latency of honest requests at half of the capacity beside hostile requests and beside slow clients. Load "
        "generators and service share the cores.",
        "make bench-hostile",
    ),
    Benchmark(
        "rollout",
        "Rollouts on a running service under load: time to roll back, failed requests, stickiness of arms.",
        "make bench-rollout",
    ),
    Benchmark(
        "process_life",
        "How `reelway serve` ends on SIGTERM and SIGINT, sent to the process and to its group.",
        "make bench-process-life",
    ),
    Benchmark(
        "e2e",
        "Installation, rollouts, killed pods, upgrades and uninstallation on a real Kubernetes node.",
        "make e2e",
    ),
    Benchmark("jobs", "A release from `reelway submit` on a real Kubernetes node.", "make e2e"),
    Benchmark(
        "e2e_live",
        "Live parts with Kafka on a real Kubernetes node: what is done, uploaded and taken down.",
        "make e2e",
    ),
    Benchmark("e2e_kserve", "Rankers under KServe's controller on a real Kubernetes node.", "make e2e"),
    Benchmark(
        "cluster",
        "On a real Kubernetes node under load: time from webhook to rollback, and recovery from a killed Ray head.",
        "make bench-cluster",
    ),
    Benchmark(
        "alerts",
        "On a real Kubernetes node: time from a fault to the rollback through Prometheus and Alertmanager, by hop.",
        "make bench-alerts",
    ),
)

INTRODUCTION: Final = """\
# Benchmarks

Written by `make bench-report` from `build/bench/*.json`; do not edit. Each section is one run. "Bar" is the required
limit, and "holds" says whether the run met it. Absolute times depend on the machine; quote the ratios.
"""

Results = Mapping[str, tuple[BenchmarkRun, list[Row]]]


def load_results(folder: Path) -> Results:
    """Reads every result in the folder.

    Raises:
        ValueError: if a result belongs to no benchmark of ``BENCHMARKS``.
    """
    names = sorted(path.name.removesuffix(".json") for path in folder.glob("*.json") if RUN_SUFFIX not in path.name)
    unknown = set(names) - {benchmark.name for benchmark in BENCHMARKS}
    if unknown:
        raise ValueError(f"{folder}: unknown benchmarks {sorted(unknown)}; add them to BENCHMARKS in {__file__}")
    return {name: read_report(folder, name) for name in names}


def render_page(results: Results) -> str:
    """Returns the text of BENCHMARKS.md: an overview and one section per benchmark."""
    overview = ["| benchmark | command | date | commit | bars that hold |", "|---|---|---|---|---|"]
    sections = []
    for benchmark in BENCHMARKS:
        name, command = benchmark.name, f"`{benchmark.command}`"
        heading = f"\n## {name}\n\n{benchmark.description}\n"
        if name not in results:
            overview.append(f"| [{name}](#{name}) | {command} | not measured | | |")
            sections.append(f"{heading}\nNot measured. Command: {command}\n")
            continue
        run, rows = results[name]
        judged = [row for row in rows if row.holds is not None]
        met = f"{sum(bool(row.holds) for row in judged)} of {len(judged)}"
        overview.append(f"| [{name}](#{name}) | {command} | {run.date} | {run.commit} | {met} |")
        origin = f"Command: {command}. Date: {run.date}. Commit: {run.commit}. Machine: {run.machine}."
        sections.append("\n".join([heading, origin, "", *_table(rows), ""]))
    return INTRODUCTION + "\n" + "\n".join(overview) + "\n" + "".join(sections)


def _table(rows: list[Row]) -> list[str]:
    lines = ["| metric | value | unit | bar | holds |", "|---|---:|---|---|---|"]
    for row in rows:
        holds = "" if row.holds is None else "yes" if row.holds else "**no**"
        cells = (row.metric, row.formatted_value, row.unit, row.bar, holds)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON files (default: build/bench)")
    parser.add_argument("--output", type=Path, default=Path("BENCHMARKS.md"), help="page to write")
    options = parser.parse_args()
    try:
        page = render_page(load_results(options.results))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"bench-report: {error}")
    options.output.write_text(page)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
