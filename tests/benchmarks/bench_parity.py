"""Replays served values with the stream on: mismatches, values per second and memory.

The stream and the stores are real. Its process is killed several times while viewers are served, and the log keeps
growing meanwhile. Serving is not measured, and the replay runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.bench_results import Row, write_report
from tests.support.pipelines.served_stream import ServedStream, build_run

from reelway.pipelines.features.parity.replay import ReplayOptions, replay
from reelway.platform.run_directory import RunDirectory

VALUES = 1_000_000
VALUES_PER_SLATE = 750
SLATE = 20
HOURS = 60
KILLS = 3
PEAK_BAR_MIB = 1024.0


def serve_and_kill_stream(run: RunDirectory, values: int) -> None:
    """Serves in child processes that are killed in the middle of the stream's work, all but the last."""
    slates = -(-values // (VALUES_PER_SLATE * HOURS))
    streamed = ServedStream(run, outcomes_per_hour=400)
    for part in range(KILLS + 1):
        streamed.serve(HOURS // (KILLS + 1), slates=slates, slate=SLATE)
        if part < KILLS:
            streamed = _killed_and_restarted(streamed)
    streamed.state.close()


def _killed_and_restarted(streamed: ServedStream) -> ServedStream:
    """Lets a child process run the stream over new outcomes until it is killed, then starts the stream again."""
    streamed.serve(2, stream_runs=False, slates=0)
    streamed.state.close()
    child = os.fork()
    if child == 0:
        streamed.start_stream()
        while True:
            streamed.run_stream()
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    streamed.start_stream()
    streamed.run_stream()
    return streamed


def measure_replay(run: RunDirectory) -> None:
    """Replays and prints what it took, as one line of JSON."""
    options = ReplayOptions(str(run.path / "serving" / "vectors.jsonl"), str(run.events))
    before_mib = peak_mib()
    began = time.perf_counter()
    report, _ = replay(str(run.path), options, time.time())
    taken_s = time.perf_counter() - began
    print(
        json.dumps(
            {
                "vectors": report.vectors, "values": report.values, "mismatches": report.mismatch_count,
                "first": [str(miss) for miss in report.mismatches[:5]], "taken_s": taken_s,
                "peak_mib": peak_mib(), "imports_mib": before_mib,
            }
        )
    )  # fmt: skip


def peak_mib() -> float:
    """Returns this process's peak of resident memory. ``ru_maxrss`` would include the parent's before ``exec``."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--values", type=int, default=VALUES)
    parser.add_argument("--replay", type=Path)
    arguments = parser.parse_args()
    if arguments.replay:
        measure_replay(RunDirectory(arguments.replay))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(Path(folder) / "run")
        serve_and_kill_stream(run, arguments.values)
        command = [sys.executable, "-m", "tests.benchmarks.bench_parity", "--replay", str(run.path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(*found["first"], sep="\n")
    write_report(
        "parity",
        [
            Row("values replayed", found["values"], "", f">= {VALUES:,}", found["values"] >= VALUES),
            Row("mismatches", found["mismatches"], "", "0", found["mismatches"] == 0),
            Row("values per second", found["values"] / found["taken_s"], "1/s"),
            Row("peak memory", found["peak_mib"], "MiB", f"<= {PEAK_BAR_MIB:g}", found["peak_mib"] <= PEAK_BAR_MIB),
            Row("of which imports", found["imports_mib"], "MiB"),
        ],
    )


if __name__ == "__main__":
    main()
