"""Measures the CPU time per impression and outcome, from a router's buffer and a client's JSON to the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reelway.platform.contracts.api import OutcomesRequest
from reelway.platform.contracts.events import Arm
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.tokens import ImpressionToken, TokenSigner
from reelway.serving.outcomes import ArmKey, EventLogWriter, ExposureBuffer, OutcomeCollector
from reelway.serving.outcomes.reported import read_outcomes

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


def measure_ingest(
    folder: Path, *, requests: int = 20_000, viewers: int = 30_000, seed: int = 0, logged: bool = False
) -> Ingest:
    """Counts this many slates of 20 videos, then an outcome for every second video, 100 per request.

    Args:
        logged: every outcome goes to an event log as well.
    """
    rng = np.random.default_rng(seed)
    who = rng.integers(0, viewers, requests).tolist()
    masks = rng.choice([0, 2, 4, 6], size=(requests, SLATE), p=[0.6, 0.15, 0.15, 0.1]).tolist()
    bodies = list(_bodies(who, masks, rng))
    collector = OutcomeCollector(folder / "outcomes.db")
    appender = EventLogWriter(SqliteLog(folder / "log.db")) if logged else None
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        buffer = ExposureBuffer()
        waiting: list[Future[Any]] = []
        for number, (viewer, slices) in enumerate(zip(who, masks, strict=True)):
            buffer.add(ARMS[viewer % 2], viewer, 0.5, slices)
            if number % 100 == 99:
                _flush(buffer, collector, waiting)
        _flush(buffer, collector, waiting)
        for one in waiting:
            one.result()
        exposing = time.process_time() - cpu
        cpu, waiting = time.process_time(), []
        in_log: list[Future[None]] = []
        for body in bodies:
            columns, _ = read_outcomes(OutcomesRequest.model_validate_json(body).outcomes, SIGNER)
            waiting.append(collector.record_outcomes(columns))
            if appender:
                in_log.append(appender.append(columns))
        counted = sum(one.result()["counted"] for one in waiting)
        for one in in_log:
            one.result()
        counting, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        collector.close()
        if appender:
            appender.close()
    return Ingest(requests * SLATE, counted, exposing, counting, wall)


def _flush(buffer: ExposureBuffer, collector: OutcomeCollector, waiting: list[Future[Any]]) -> None:
    if batch := buffer.next_batch():
        waiting.append(collector.record_exposures(batch))
        buffer.acknowledge(batch)


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
