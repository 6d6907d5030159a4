"""Measures watch time per viewer-day of a live service over a frozen one, in copies of one simulated world.

Usage: python -m tests.benchmarks.bench_live_loop [--days 7] [--viewers 400] [--seed 0] [--ablations]

A service is simulated for two weeks, and one release is trained and built from its log. Then copies of the same world
continue for some days with the same requests, uploads, trends and drifting tastes, and the same draws of reactions:

- frozen: the rows, lists and videos of the release, and no memory of what was shown;
- frozen with memory: the router's memory of shown and watched videos and of follows as well;
- live: viewers' and videos' rows by the stream, lists by the list task, and uploads by the overlay writer as well.

The request path and the live parts are the product's classes in this process, under a simulated clock.
"""

from __future__ import annotations

import os

# One thread, as in a service's replicas.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import json
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tests.benchmarks.live_loop_service import LoopRelease, Part
from tests.benchmarks.live_loop_traffic import ArmTotals, loop_requests, run_arm
from tests.support.bench_results import Row, write_report

from reelway.pipelines.simulation.live_viewers import load_history, load_world
from reelway.platform.cli.processes import reelway_command, run_command
from reelway.platform.cli.terminal import print_status
from reelway.platform.run_directory import RunDirectory

FROZEN, REMEMBERED, LIVE = "frozen", "frozen with memory", "live"
BAR: Final = 1.15
RESAMPLES: Final = 2000
LOG_IMPRESSIONS: Final = 450
"""Impressions of the log per viewer: 4 pages on each of the 11.5 days for which a viewer has an account on average."""


@dataclass(frozen=True)
class LoopSize:
    """Size of the world and of the loop."""

    viewers: int = 400
    videos: int = 5_000
    log_days: int = 14
    days: int = 7
    pages_per_day: float = 4.0
    seed: int = 0


def prepare(folder: Path, size: LoopSize) -> RunDirectory:
    """Simulates, trains and builds a release, with the commands that an engineer would run. Skips what is done."""
    run = RunDirectory(folder / "run")
    run_option, seed = ["--run", str(run.path)], ["--seed", str(size.seed)]
    sizes = {"--viewers": size.viewers, "--videos": size.videos, "--days": size.log_days,
             "--impressions": LOG_IMPRESSIONS * size.viewers}  # fmt: skip
    for command in (
        ["simulate", *run_option, *seed, *(str(value) for pair in sizes.items() for value in pair)],
        ["features", "build", *run_option],
        ["features", "materialise", *run_option],
        ["train", *run_option, *seed, "--preset", "demo", "--no-ray"],
        ["evaluate", *run_option],
        ["release", "build", *run_option],
    ):
        run_command(reelway_command(*command))
    return run


def run_loop(run: RunDirectory, folder: Path, size: LoopSize, arms: Collection[str]) -> dict[str, ArmTotals]:
    """Runs the arms, one after the other, each in its own copy of the world. ``arms`` as in ``live_parts``."""
    info = json.loads((run.dataset / "dataset.json").read_text())
    release_id = run.record("release")["summary"]["release_id"]
    totals: dict[str, ArmTotals] = {}
    for name in arms:
        start = time.monotonic()
        world = load_world(info)
        history = load_history(world, run.dataset / "outcomes.parquet")
        requests = loop_requests(world, size.days, size.pages_per_day)
        release = LoopRelease(run, release_id, world, folder)
        if name in (FROZEN, REMEMBERED):
            service = release.frozen(memory=name == REMEMBERED)
            totals[name] = run_arm(name, world, history, service, requests, size.days)
        else:
            service, live = release.live(name, live_parts(name))
            with closing(live):
                totals[name] = run_arm(name, world, history, service, requests, size.days)
        print_status(f"{name}: {len(requests.time_s):,} requests in {time.monotonic() - start:.0f} s")
    return totals


def live_parts(name: str) -> frozenset[Part]:
    """Returns the parts of an arm by its name: ``live`` has all, and ``live without PART`` all but one."""
    return frozenset(Part) - {part for part in Part if name == without(part)}


def without(part: Part) -> str:
    return f"{LIVE} without {part}"


def ratio_interval(top: ArmTotals, bottom: ArmTotals, seed: int) -> tuple[float, float, float]:
    """Returns the ratio of watch time with its 95 % interval, by resampling viewers (paired)."""
    active = np.flatnonzero(top.watch_s.sum(axis=1) + bottom.watch_s.sum(axis=1))
    top_V, bottom_V = top.watch_s[active].sum(axis=1), bottom.watch_s[active].sum(axis=1)
    rng = np.random.default_rng(seed)
    times_GV = rng.multinomial(len(active), np.full(len(active), 1 / len(active)), size=RESAMPLES).astype(np.float64)
    low, high = np.quantile((times_GV @ top_V) / (times_GV @ bottom_V), [0.025, 0.975])
    return float(top_V.sum() / bottom_V.sum()), float(low), float(high)


def report_rows(totals: dict[str, ArmTotals], size: LoopSize) -> Iterator[Row]:
    """Yields the rows of the report: each arm, then the ratios."""
    for name, arm in totals.items():
        by_day = ", ".join(f"{watched_s:.0f}" for watched_s in arm.watch_s.sum(axis=0) / size.viewers)
        yield Row(f"{name}: watch time", arm.watch_s_per_viewer_day(size.viewers), f"s per viewer-day; days: {by_day}")
        yield Row(f"{name}: repeats", 100 * arm.repeats / arm.impressions, f"% of {arm.impressions:,} impressions")
        if arm.uploads_shown:
            share = 100 * arm.upload_impressions / arm.impressions
            yield Row(f"{name}: uploads shown", arm.uploads_shown, f"videos, {share:.1f} % of the impressions")
    for name, base in ((LIVE, REMEMBERED), (LIVE, FROZEN), *((LIVE, without(part)) for part in Part)):
        if name in totals and base in totals:
            ratio, low, high = ratio_interval(totals[name], totals[base], size.seed)
            judged = base == REMEMBERED
            yield Row(
                f"{name} over {base}", ratio, f"x, 95 % over viewers {low:.3f}..{high:.3f}",
                f">= {BAR}" if judged else "", ratio >= BAR if judged else None,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=LoopSize.days, help="days of the loop (default: 7)")
    parser.add_argument("--viewers", type=int, default=LoopSize.viewers, help="viewers of the world (default: 400)")
    parser.add_argument("--seed", type=int, default=LoopSize.seed, help="seed of the world and the training")
    parser.add_argument("--ablations", action="store_true", help="also run the live arm without each of its parts")
    parser.add_argument("--folder", type=Path, help="folder of the files, which is reused (default: a temporary one)")
    options = parser.parse_args()
    size = LoopSize(viewers=options.viewers, days=options.days, seed=options.seed)
    arms = [FROZEN, REMEMBERED, LIVE, *(without(part) for part in Part if options.ablations)]
    with tempfile.TemporaryDirectory(prefix="bench-live-loop-") as temporary:
        folder = options.folder or Path(temporary)
        run = prepare(folder, size)
        totals = run_loop(run, folder, size, arms)
    write_report("live_loop", list(report_rows(totals, size)))


if __name__ == "__main__":
    main()
