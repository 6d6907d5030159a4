"""Measures the CPU time per impression and outcome: router, event log and collector, in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.api import OutcomesRequest
from reelway.platform.contracts.events import Arm
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.tokens import ImpressionToken, TokenSigner
from reelway.serving.outcomes import ArmKey, EventLogWriter, ExposureWriter, OutcomeCollector, SlateExposure
from reelway.serving.outcomes.reported import read_outcomes
from reelway.serving.stages.arrays import SOURCES

SIGNER = TokenSigner(b"a secret of the tests, long enough")
ARMS = (ArmKey("r-load", Arm.STABLE, "ab" * 32), ArmKey("r-load", Arm.CANARY, "cd" * 32))
SLATE = 20
PER_REQUEST = 100


@dataclass(frozen=True)
class Ingest:
    """CPU seconds of the process with both threads, and wall seconds, which include the disk."""

    impressions: int
    outcomes: int
    exposing_cpu_s: float
    counting_cpu_s: float
    wall_s: float

    @property
    def impressions_per_core_s(self) -> float:
        return self.impressions / self.exposing_cpu_s

    @property
    def outcomes_per_core_s(self) -> float:
        return self.outcomes / self.counting_cpu_s

    @property
    def core_share(self) -> float:
        """Share of one core at 20,000 impressions and 10,000 outcomes per second."""
        return 20_000 / self.impressions_per_core_s + 10_000 / self.outcomes_per_core_s

    def __str__(self) -> str:
        return (
            f"{self.impressions_per_core_s:,.0f} impressions or {self.outcomes_per_core_s:,.0f} outcomes per second "
            f"and core, SQLite included; 20,000 and 10,000 a second take {self.core_share:.0%} of one core "
            f"({self.wall_s:.1f} s for {self.impressions:,} and {self.outcomes:,})"
        )


def measure_ingest(folder: Path, *, requests: int = 20_000, viewers: int = 30_000, seed: int = 0) -> Ingest:
    """Logs and counts this many slates of 20 videos, then an outcome for every second video, 100 per request."""
    rng = np.random.default_rng(seed)
    who = rng.integers(0, viewers, requests).tolist()
    masks = rng.choice([0, 2, 4, 6], size=(requests, SLATE), p=[0.6, 0.15, 0.15, 0.1]).astype(np.int8)
    slates = [_slate(request, viewer, masks[request], rng) for request, viewer in enumerate(who)]
    bodies = list(_bodies(who, masks.tolist(), rng))
    open_log = partial(open_topic, folder / "events")
    collector = OutcomeCollector(folder / "outcomes.db", open_log)
    lost: list[SlateExposure] = []
    exposures = ExposureWriter(partial(open_log, Topic.EXPOSURES), lost.append, max_queued_rows=requests * SLATE)
    outcomes = EventLogWriter(partial(open_log, Topic.OUTCOMES))
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for slate in slates:
            exposures.record(slate)
        exposures.close()
        _count(collector)
        exposing = time.process_time() - cpu
        cpu, in_log = time.process_time(), list[Future[None]]()
        for body in bodies:
            columns, _ = read_outcomes(OutcomesRequest.model_validate_json(body).outcomes, SIGNER)
            in_log.append(outcomes.append(columns))
        for one in in_log:
            one.result()
        _count(collector)
        counting, wall = time.process_time() - cpu, time.perf_counter() - wall
        counted = sum(
            count for (*_, status), count in collector._ledger.snapshot.received.items() if status == "counted"
        )
    finally:
        exposures.close()
        outcomes.close()
        collector.close()
    if lost:
        raise AssertionError(f"{len(lost)} slates are not in the log")
    return Ingest(requests * SLATE, counted, exposing, counting, wall)


def _count(collector: OutcomeCollector) -> None:
    """Reads both topics to their ends."""
    idle = 0
    while idle < 3:
        idle = 0 if collector.advance() else idle + 1


def _slate(request: int, viewer: int, masks: NDArray[np.int8], rng: np.random.Generator) -> SlateExposure:
    ids, now_s = rng.integers(0, 2**53, SLATE), time.time()
    return SlateExposure(
        int(rng.integers(2**53)), viewer, ARMS[viewer % 2], 0.5, now_s, now_s, "phone", "eu", "en",
        impression_id=ids, video_id=ids >> 30, slices=masks, source=np.arange(SLATE) % len(SOURCES),
        score=rng.random(SLATE, np.float32), propensity=np.ones(SLATE, np.float32), creator_id=ids >> 40,
        topic=np.full(SLATE, request % 20, np.int32), duration_ms=np.full(SLATE, 20_000, np.int32),
    )  # fmt: skip


def _bodies(who: list[int], masks: list[list[int]], rng: np.random.Generator) -> Iterator[bytes]:
    kinds = rng.choice(["watch", "like", "skip"], p=[0.8, 0.1, 0.1], size=len(who) * SLATE // 2).tolist()
    gathered: list[dict[str, Any]] = []
    ids = rng.integers(0, 2**53, len(kinds)).tolist()
    for number, kind in enumerate(kinds):
        request, position = number * 2 // SLATE, number * 2 % SLATE
        arm = ARMS[who[request] % 2]
        token = ImpressionToken(
            ids[number], request, who[request], position, position, arm.release, arm.arm, "ann", 0.5, time.time(),
            arm.rollout, 0.5, masks[request][position], 20_000,
        )  # fmt: skip
        value = 9_000.0 if kind == "watch" else 1.0
        gathered.append({"token": SIGNER.sign(token), "type": kind, "value": value})
        if len(gathered) == PER_REQUEST:
            yield json.dumps({"outcomes": gathered}).encode()
            gathered = []
    if gathered:
        yield json.dumps({"outcomes": gathered}).encode()
