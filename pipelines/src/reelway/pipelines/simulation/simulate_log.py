"""Simulates weeks of traffic under the logging policy and returns them as a data set.

The same configuration and seed give the same bytes. Within a period the policy uses only events from before the period.
"""

# Shapes: B requests, S slate

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.datasets.store import Dataset
from reelway.pipelines.simulation.arrivals import DEVICES, draw_requests
from reelway.pipelines.simulation.config import SimulationConfig
from reelway.pipelines.simulation.logging_policy import SOURCES, LoggingPolicy
from reelway.pipelines.simulation.population import DIMENSIONS
from reelway.pipelines.simulation.responses import Responses, ShownSlates, responses_to_events
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.pipelines.simulation.world import World
from reelway.pipelines.simulation.world_constants import WORLD_VERSION

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

Progress = Callable[[int, int], None]
"""Called with the number of completed requests and the total."""


def _ignore_progress(_done: int, _all: int) -> None:
    return None


def simulate(config: SimulationConfig, seed: int, *, progress: Progress = _ignore_progress) -> Dataset:
    """Simulates about ``config.impressions`` impressions (complete slates) and their outcomes."""
    return simulate_traffic_log(World(config, seed), progress=progress)


def simulate_traffic_log(world: World, *, progress: Progress = _ignore_progress) -> Dataset:
    """Simulates traffic in an existing world."""
    config = world.config
    rng = np.random.default_rng(np.random.SeedSequence([world.seed, 1]))
    requests = draw_requests(world, max(config.impressions // config.slate, 1), rng)
    policy, history = LoggingPolicy(world), ViewingHistory(world.videos)
    bounds = np.arange(config.start_s, config.end_s, config.policy_period_s)
    cuts = [*np.searchsorted(requests.time_s, bounds), len(requests.time_s)]
    answers: list[tuple[I64, F32, NDArray[np.int8]]] = []
    responses: list[Responses] = []
    for start_s, first, end in zip(bounds, cuts[:-1], cuts[1:], strict=True):
        policy.begin_period(start_s)
        if first == end:
            continue
        viewer_ids = requests.viewer_ids[first:end]
        answers.append(policy.choose(viewer_ids, rng))
        responses.append(world.respond(viewer_ids, answers[-1][0], requests.time_s[first:end], rng, history))
        policy.learn(answers[-1][0], responses[-1])
        progress(int(end), len(requests.time_s))
    slates, propensity, source = (np.concatenate(column) for column in zip(*answers, strict=True))
    shown = ShownSlates(
        request_id=np.arange(len(requests.time_s), dtype=np.int64),
        viewer_ids=requests.viewer_ids,
        slates=slates,
        time_s=requests.time_s,
        propensity=propensity,
        source=source,
        sources=SOURCES,
        device=requests.device,
        devices=DEVICES,
    )
    impressions, outcomes = responses_to_events(shown, _joined(responses))
    info = {
        "name": "simulated",
        "source": "reelway simulate",
        "seed": world.seed,
        "config": asdict(config),
        "world_version": WORLD_VERSION,
    }
    return Dataset(
        world.viewers_table(), world.creators_table(), world.videos_table(), impressions, outcomes, info, DIMENSIONS
    )  # fmt: skip


def _joined(parts: list[Responses]) -> Responses:
    columns: dict[str, NDArray[Any]] = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Responses)
    }
    return Responses(**columns)
