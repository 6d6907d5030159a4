"""Measures how soon what happens shows in slates, and what that costs, on a real Kafka broker and a real Redis.

Usage: python -m tests.benchmarks.bench_live [--only repeats,outcomes,...] [--videos N,N]

- repeats: videos that viewers get twice in 20 pages, with the stream and without it;
- outcomes: from an acknowledged outcome to the next slate;
- uploads: from an upload to the candidates, and from a takedown to the last slate;
- trend: from a planted trend to the top of the trending list;
- updates: slates while the catalogue changes;
- added: what memory, overlay and lists add to a slate;
- stream: outcomes per second of one and two processes of the stream, and members that are killed.

A replica of the router with its stages runs in this process; the stream, the overlay writer and the publisher run in
processes of their own, on the same cores.
"""

from __future__ import annotations

import os

# One thread per process, as in a service's replicas.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.benchmarks.live_latency import measure_outcomes, measure_trend, measure_uploads
from tests.benchmarks.live_service import LiveService, live_service
from tests.benchmarks.live_serving import measure_added, measure_repeats, measure_updates
from tests.benchmarks.live_stream import measure_stream
from tests.support.bench_results import Row, write_report

from reelway.platform.cli.terminal import print_status

Measure = Callable[[LiveService], Coroutine[None, None, list[Row]]]
STREAM: Final = "stream"
SMALL: Final = "small"
LARGE: Final = "large"
LARGE_VIDEOS: Final = 1_000_000


def main() -> None:
    options = _options()
    reports: defaultdict[str, list[Row]] = defaultdict(list)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-live-") as name:
            for report, part in _measured(options, Path(name)):
                reports[report] += part
    finally:  # keeps the rows measured before a failure
        if rows := reports[SMALL]:
            write_report("live", rows)
        if rows := reports[LARGE]:
            write_report("live_large", rows)
        if rows := reports[STREAM]:
            write_report("live_stream", rows)


def _parts(options: argparse.Namespace) -> dict[str, Measure]:
    """Returns the parts on one installation, in the order in which the overlay grows."""
    return {
        "repeats": lambda service: measure_repeats(service, options.viewers),
        "outcomes": lambda service: measure_outcomes(service, options.outcomes),
        "added": lambda service: measure_added(service, options.slates),
        "uploads": lambda service: measure_uploads(service, options.uploads),
        "trend": lambda service: measure_trend(service, options.trend_events_per_s),
        "updates": lambda service: measure_updates(service, options.updates_per_s, options.updates_s),
    }


def _measured(options: argparse.Namespace, path: Path) -> Iterator[tuple[str, list[Row]]]:
    """Yields the key of a report and rows of it: small and large catalogues and the stream have one each."""
    chosen = {name: measure for name, measure in _parts(options).items() if name in options.only}
    for videos in options.videos if chosen else ():
        with live_service(path / f"service-{videos}", videos) as service:
            print_status(f"a release of {videos:,} videos, Kafka and Redis are up")
            for name, measure in chosen.items():
                start = time.monotonic()
                rows = asyncio.run(measure(service))
                report = SMALL if videos < LARGE_VIDEOS else LARGE
                yield report, [replace(row, metric=f"{videos:,} videos: {row.metric}") for row in rows]
                print_status(f"{name}: {time.monotonic() - start:.0f} s")
    if STREAM in options.only:
        start = time.monotonic()
        yield STREAM, measure_stream(path / STREAM, options.stream_outcomes, options.kills)
        print_status(f"{STREAM}: {time.monotonic() - start:.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*_parts(argparse.Namespace()), STREAM]
    parser.add_argument(
        "--only", type=lambda given: given.split(","), default=names, help=f"parts, by commas: {', '.join(names)}"
    )
    parser.add_argument(
        "--videos", type=lambda given: [int(size) for size in given.split(",")], default=[20_000],
        help="sizes of the catalogue, by commas; every part but stream is measured with each",
    )  # fmt: skip
    parser.add_argument("--viewers", type=int, default=200, help="viewers of the part repeats")
    parser.add_argument("--outcomes", type=int, default=300, help="outcomes of the part outcomes")
    parser.add_argument("--uploads", type=int, default=100, help="uploads and takedowns of the part uploads")
    parser.add_argument("--trend-events-per-s", type=int, default=200, help="impressions per second of the part trend")
    parser.add_argument("--updates-per-s", type=int, default=5_500, help="updates published per second")
    parser.add_argument("--updates-s", type=float, default=8.0, help="duration; the overlay takes 50,000 rows")
    parser.add_argument("--slates", type=int, default=400, help="slates of each side of the part added")
    parser.add_argument("--stream-outcomes", type=int, default=1_000_000, help="outcomes of the stream; 0 leaves out")
    parser.add_argument("--kills", type=int, default=20, help="members of the stream that are killed; 0 leaves out")
    options = parser.parse_args()
    if unknown := sorted(set(options.only) - set(names)):
        parser.error(f"--only: unknown values {unknown}; use values among {names}")
    return options


if __name__ == "__main__":
    main()
