"""Compares the request path with its floor and with the naive composition, and its parts with their bars.

Usage: python -m tests.benchmarks.bench_serving [--only features,ranking,...] [--sides naive,staged,fused] [--videos N]

- floor: the same arithmetic in one process without Ray Serve (for throughput, one process per core);
- naive: the composition that the guides of Ray Serve, Feast and torch lead to (``serving_naive``);
- ``staged``: three deployments behind the router;
- ``fused``: the stages in the routers.

All variants answer the same viewers from the same release and read viewer rows from the same online store. The load
generator is a separate process on the same cores, so it costs every variant the same. Compared values are of one run.
"""

from __future__ import annotations

import os

# One thread per process, as in a service's replicas: two processes whose libraries start a thread per core lose two
# thirds of their throughput.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.benchmarks.bench_open_inference import added_by
from tests.benchmarks.serving_fixture import SQLITE, ServingFixture, make_serving_fixture, online_store
from tests.benchmarks.serving_path import SIDES, measure_overload, measure_path
from tests.support.bench_results import Row, write_report

from reelway.platform.cli.terminal import print_status

SECTIONS: Final = ("features", "ranking", "retrieval", "growth", "cold", "path", "overload", "kserve")
LARGE: Final = ("retrieval", "growth", "cold")


def main() -> None:
    options = _options()
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
            for row in _measured(options, Path(name)):
                rows.append(row)
    finally:  # keeps the rows measured before a failure
        write_report("serving", rows)


def _measured(options: argparse.Namespace, path: Path) -> Iterator[Row]:
    if set(options.only) & set(LARGE):
        with _timed(f"a release of {options.large:,} videos"):
            large = make_serving_fixture(path / "large", options.large)
        yield from _of_large(options, path, large)
    if set(options.only) - set(LARGE):
        with _timed(f"a release of {options.videos:,} videos"):
            fixture = make_serving_fixture(path / "place", options.videos)
        with online_store(fixture) as address:
            print_status(f"the online store is {address.partition(':')[0]}")
            if address == SQLITE:
                print_status(
                    "without redis-server on the PATH, SQLite keeps viewers' rows; not measured: the variant naive, "
                    "and the features of videos from the online store"
                )
                options.sides = [side for side in options.sides if side != "naive"]
            yield from _of_service(options, fixture, with_store=address != SQLITE)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        type=_words,
        default=list(SECTIONS),
        help=f"sections to measure, separated by commas: {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--sides",
        type=_words,
        default=list(SIDES),
        help=f"variants to measure, separated by commas: {', '.join(SIDES)}",
    )
    parser.add_argument("--videos", type=int, default=200_000, help="videos of the catalogue")
    parser.add_argument("--large", type=int, default=1_000_000, help="videos of the largest catalogue")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement under load")
    parser.add_argument("--overload-s", type=float, default=60.0, help="duration of the overload")
    options = parser.parse_args()
    for name, known in (("only", SECTIONS), ("sides", SIDES)):
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name}: unknown values {unknown}; use values among {list(known)}")
    return options


def _words(given: str) -> list[str]:
    return given.split(",")


def _of_large(options: argparse.Namespace, path: Path, large: ServingFixture) -> Iterator[Row]:
    from tests.benchmarks import serving_parts as parts

    if "retrieval" in options.only:
        with _timed("retrieval"):
            yield from parts.measure_retrieval(large)
    if "growth" in options.only:
        with _timed("growth"):
            yield from parts.measure_growth(path, large, (options.large // 100, options.large // 10))
    if "cold" in options.only:
        with _timed("cold start"):
            yield from parts.measure_cold_start(large)


def _of_service(options: argparse.Namespace, fixture: ServingFixture, *, with_store: bool) -> Iterator[Row]:
    from tests.benchmarks import serving_parts as parts

    if "features" in options.only:
        with _timed("features"):
            yield from parts.measure_features(fixture, with_store=with_store)
    if "ranking" in options.only:
        with _timed("ranking"):
            yield from parts.measure_ranking(fixture)
    if "path" in options.only:
        with _timed("the path"):
            yield from measure_path(fixture, options.seconds, options.sides)
    if "overload" in options.only:
        with _timed("overload"):
            yield from measure_overload(fixture, options.seconds, options.overload_s, options.sides)
    if "kserve" in options.only:
        with _timed("the ranker behind KServe's protocol"):
            yield from added_by(fixture.release_folder, requests=300)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print_status(f"{what}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
