"""Measures how `reelway serve` ends on SIGTERM and SIGINT: ``make bench-process-life``.

``python -m tests.benchmarks.bench_process_life [--repeats 20]``

The signals are sent to the process and to its group. Each repeat starts the service, sends requests, sends the signal,
and counts processes and ports that are left.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from pathlib import Path
from typing import Final

import httpx
from tests.support.bench_results import Row, write_report
from tests.support.process_life import STOP_BAR_S, Ending, marked_command
from tests.support.serving.served_run import make_run

from reelway.platform.cli.processes import reelway_command
from reelway.platform.cli.terminal import print_status

REQUESTS: Final = 20
CASES: Final = tuple((number, group) for number in (signal.SIGTERM, signal.SIGINT) for group in (False, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="Number of starts and stops per signal and target.")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="reelway-life-") as folder:
        run = Path(folder)
        make_run(run)
        rows = [row for number, group in CASES for row in measure(run, number, repeats, group=group)]
    write_report("process_life", rows)


def measure(run: Path, number: signal.Signals, repeats: int, *, group: bool) -> list[Row]:
    """Starts and stops the service ``repeats`` times."""
    name = f"{number.name} to the {'group' if group else 'process'}"
    endings = []
    for repeat in range(repeats):
        endings.append(ending := start_and_stop(run, number, group=group))
        print_status(f"{name} {repeat + 1}/{repeats}: {ending}")
    slowest = max(ending.seconds for ending in endings)
    processes = sum(len(ending.processes_left) for ending in endings)
    ports = sum(len(ending.ports_left) for ending in endings)
    return [
        Row(f"{name}: slowest of {repeats} ends", slowest, "s", f"<= {STOP_BAR_S:g}", slowest <= STOP_BAR_S),
        Row(f"{name}: processes left", processes, "processes", "0", processes == 0),
        Row(f"{name}: ports left", ports, "ports", "0", ports == 0),
    ]


def start_and_stop(run: Path, number: signal.Signals, *, group: bool) -> Ending:
    """Starts the service, sends requests and stops it."""
    log, record = run / "serve.log", run / "serving.json"
    record.unlink(missing_ok=True)

    def answers(_: object) -> bool:
        return record.exists() and json.loads(record.read_text())["url"] in log.read_text()

    with marked_command(reelway_command("serve", "--run", str(run), "--port", "0"), log, answers) as service:
        url = json.loads(record.read_text())["url"]
        with httpx.Client(base_url=url, timeout=30) as client:
            for viewer in range(REQUESTS):
                client.post("/v1/recommend", json={"viewer_id": viewer, "count": 10}).raise_for_status()
        return service.stop(number, group=group)


if __name__ == "__main__":
    main()
