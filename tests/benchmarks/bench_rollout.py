"""Measures rollouts on a running service under constant load: ``python -m tests.benchmarks.bench_rollout``.

Uses Ray Serve, the local controller and its webhook. Measures

- the time from an alert to the last new request on the faulty release;
- failed requests while releases are added, promoted, rolled back and removed;
- answers by an arm that does not match the viewer's bucket;
- how evenly a million viewers are distributed over buckets.

Each round is a complete rollout that starts and stops the release's replicas. A hundred rounds take a quarter of an
hour.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from scipy.stats import chisquare
from tests.support.bench_results import Row, write_report
from tests.support.constant_load import constant_load, read_record
from tests.support.release_files import make_release_folder

from reelway.platform.cli.processes import child_process, reelway_command
from reelway.platform.cli.terminal import print_status, progress
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.policy import RolloutPolicy, parse_policy
from reelway.platform.rollout.state import Command, Phase, RolloutState
from reelway.platform.rollout.traffic.bucketing import BUCKETS, bucket_of, buckets_of
from reelway.platform.rollout.transition import start_state

BAR_S = 1.0
START_S = 240.0
PHASE_S = 120.0
SEEN_ANSWERS = 10
POLICY = """
steps: [{weight_percent: 50, hold_s: 3600}]
outcomes: [{name: long_watch_rate, margin: 0.02}]
guardrails: {parity_mismatches: null, p99_ms: null, error_ratio: null}
cooldown_s: 0
retention_s: %s
"""
KEPT = parse_policy(POLICY % 3600, source="kept warm")
RETIRED = parse_policy(POLICY % 3, source="retired at once")


@dataclass
class Bench:
    """The service under load, and the rollouts started on it."""

    run: Path
    record: Path
    store: SqliteRolloutStore
    rollouts: list[RolloutState] = field(default_factory=list)

    def begin(self, release: str, policy: RolloutPolicy) -> RolloutState:
        """Starts a rollout and waits until viewers get the release."""
        previous = self.store.latest()
        stable = previous.state.live_release if previous else json.loads(_text(self.run / "serving.json"))["release"]
        number = len(self.rollouts)
        state = start_state(
            policy, rollout_id=f"bench-{number}", canary_release=release, stable_release=stable, now=time.time(),
            previous=previous.state if previous else None, force=True,
        )  # fmt: skip
        began = time.time()
        self.store.create(state, policy)
        self.rollouts.append(state)
        self.until(lambda: len(self.answers(release, since=began)) >= SEEN_ANSWERS, f"{release[:12]} answers")
        return state

    def answers(self, release: str, *, since: float) -> NDArray[np.void]:
        """Returns the answers of a release to requests sent after a time."""
        rows = read_record(self.record)
        return rows[(rows["release"] == release[:12].encode()) & (rows["sent"] > since)]

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PHASE_S
        while not holds():
            if time.monotonic() > deadline:
                latest = self.store.latest()
                raise RuntimeError(f"{what}: timeout after {PHASE_S:g} s; the rollout is {latest and latest.state}")
            time.sleep(0.02)

    def until_phase(self, phase: Phase) -> None:
        """Waits until the latest rollout is in a phase."""
        self.until(lambda: (r := self.store.latest()) is not None and r.state.phase is phase, phase.value)

    def submit(self, verb: str) -> float:
        """Submits a command as a user does. Returns the time."""
        moment = time.time()
        command = Command(id=f"{verb}-{moment}", verb=verb, actor="bench", force=True)  # type: ignore[arg-type]
        self.store.submit_command(self.rollouts[-1].id, command)
        return moment

    def last_answer_s(self, release: str, moment: float) -> float:
        """Returns the seconds from a time to the last sent request that the release answered."""
        time.sleep(0.7)  # lets answers in flight arrive
        sent = self.answers(release, since=moment)["sent"]
        return float(sent.max() - moment) if len(sent) else 0.0


def alert(bench: Bench, release: str) -> float:
    """Sends an alert about a release as Alertmanager does. Returns the time before it was sent."""
    controller = json.loads(_text(bench.run / "rollout" / "controller.json"))
    token = _text(bench.run / "keys" / "webhook.token").strip()
    labels = {"alertname": "CanaryErrors", "release": release[:12], "severity": "page"}
    fired = datetime.now(UTC).isoformat()
    body = {
        "version": "4", "groupKey": f"bench-{len(bench.rollouts)}", "status": "firing", "receiver": "reelway",
        "groupLabels": {}, "commonLabels": labels, "commonAnnotations": {}, "externalURL": "",
        "alerts": [{"status": "firing", "labels": labels, "annotations": {}, "startsAt": fired, "endsAt":
                    "0001-01-01T00:00:00Z", "generatorURL": "", "fingerprint": f"{len(bench.rollouts):016x}"}],
    }  # fmt: skip
    moment = time.time()
    url = f"{controller['url']}/api/v1/alerts"
    httpx.post(url, json=body, headers={"Authorization": f"Bearer {token}"}, timeout=10).raise_for_status()
    return moment


def by_webhook(bench: Bench, release: str, rounds: int) -> list[Row]:
    """Repeats a rollout that an alert rolls back."""
    taken_s = []
    with progress() as bar:
        task = bar.add_task("webhook to stable", total=rounds)
        for _ in range(rounds):
            bench.begin(release, KEPT)
            moment = alert(bench, release)
            bench.until_phase(Phase.ROLLED_BACK)
            taken_s.append(bench.last_answer_s(release, moment))
            bar.advance(task)
    p50, p99, worst = np.percentile(taken_s, [50, 99, 100])
    title = f"webhook to last new request on the faulty release, {rounds} rounds under load"
    return [
        Row(f"{title}, p99", float(p99), "s", f"under {BAR_S:g}", bool(p99 < BAR_S)),
        Row(f"{title}, p50", float(p50), "s"),
        Row(f"{title}, worst", float(worst), "s"),
    ]


def by_hand(bench: Bench, first: str, second: str) -> list[Row]:
    """Promotes, rolls back, then promotes and removes the previous release."""
    bench.begin(second, KEPT)
    requested_s = bench.submit("promote")
    bench.until_phase(Phase.PROMOTED)
    promoted_s = bench.last_answer_s(first, requested_s)
    requested_s = bench.submit("rollback")
    bench.until_phase(Phase.ROLLED_BACK)
    back_s = bench.last_answer_s(second, requested_s)
    bench.begin(second, RETIRED)
    bench.submit("promote")
    bench.until(lambda: (r := bench.store.latest()) is not None and r.state.retired, "retired")
    time.sleep(5)  # the previous release is being removed
    return [
        Row("promote command to last new request on the previous release", promoted_s, "s"),
        Row("rollback command after a promotion to last new request on the release", back_s, "s", f"under {BAR_S:g}",
            back_s < BAR_S),
    ]  # fmt: skip


def seen_by_viewers(bench: Bench) -> list[Row]:
    """Returns failed requests, and answers by an arm that does not match the viewer's bucket."""
    rows = read_record(bench.record)
    failed = rows[rows["status"] != 200]
    for one in failed[:5]:
        print_status(
            f"failed: status {one['status']} for viewer {one['viewer']} after {one['done'] - one['sent']:.2f} s"
        )
    ramped = BUCKETS // 2
    wrong = 0
    canary = rows[rows["arm"] == b"canary"]
    starts = np.array([rollout.started_at for rollout in bench.rollouts])
    promoted = _promotions(bench)
    for one in canary:
        rollout = bench.rollouts[int(np.searchsorted(starts, one["sent"])) - 1]
        before_promotion = one["sent"] < promoted.get(rollout.id, float("inf"))
        wrong += before_promotion and bucket_of(int(one["viewer"]), rollout.salt) >= ramped
    p = float(chisquare(np.bincount(buckets_of(np.arange(1_000_000), "bench"), minlength=BUCKETS)).pvalue)
    return [
        Row(f"failed requests of {len(rows):,} over {len(bench.rollouts)} rollouts", float(len(failed)), "requests",
            "0", not len(failed)),
        Row("answers without a stage that was late", 100 * float(rows["degraded"].mean()), "%"),
        Row(f"answers by an arm that does not match the viewer's bucket, of {len(canary):,} by canaries", float(wrong),
            "answers", "0", not wrong),
        Row("p of the chi-square test, a million viewers over 10,000 buckets", p, "", "1e-4 .. 1 - 1e-4",
            1e-4 < p < 1 - 1e-4),
    ]  # fmt: skip


def _promotions(bench: Bench) -> dict[str, float]:
    """Returns when each rollout was promoted."""
    return {entry.rollout_id: entry.time for entry in bench.store.history() if entry.phase == Phase.PROMOTING.value}


def _text(path: Path) -> str:
    deadline = time.monotonic() + START_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} was not written within {START_S:g} s")
        time.sleep(0.1)
    return path.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--videos", type=int, default=2_000)
    options = parser.parse_args()
    run = Path(tempfile.mkdtemp(prefix="bench-rollout-"))
    try:
        write_report("rollout", measure(run, options.rounds, options.rate, options.videos))
    except BaseException:
        print_status(f"files are kept in {run}: load (requests), rollout/state.db, rollout/controller.log")
        raise
    shutil.rmtree(run)


def measure(run: Path, rounds: int, rate: float, videos: int) -> list[Row]:
    """Starts service and load, runs all rounds and returns the measurements."""
    with ExitStack() as stack:
        key = load_private_key(create_keys(run / "keys").private)
        store = ReleaseStore(str(run / "releases"))
        folders = [run / f"release-{seed}" for seed in (0, 1)]
        first, second = (
            store.write(folder, make_release_folder(folder, videos=videos, seed=seed, key=key))
            for seed, folder in enumerate(folders)
        )
        print_status("starting the service and the controller")
        command = reelway_command("serve", "--run", str(run), "--port", "0", "--release", first)
        stack.enter_context(child_process(command, log=run / "serve.log"))
        url = json.loads(_text(run / "serving.json"))["url"]
        _text(run / "rollout" / "controller.json")
        stack.enter_context(constant_load(url, run / "load", rate=rate, viewers=5_000))
        bench = Bench(run, run / "load", SqliteRolloutStore(run / "rollout" / "state.db"))
        return [*by_webhook(bench, second, rounds), *by_hand(bench, first, second), *seen_by_viewers(bench)]


if __name__ == "__main__":
    main()
