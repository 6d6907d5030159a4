"""Watch time per impression when recommendations make the next day's data: ours against popularity, in the simulator.

``python -m tests.benchmarks.bench_closed_loop [seeds]``. Per seed a service is simulated and models are trained on
the first 80 % of its log. From there on two copies of the same world (same viewers opening the app at the same
moments, with the same viewing history) go on for some days: one is shown what was popular in the last day, the other
retrieval, ranking and the serving code's re-ranking. Neither shows a viewer the same video twice, both learn from what
they showed.
"""

# Shapes: B requests, S slate, M videos

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tests.support.bench_results import Row, write_report
from tests.support.live_features import LiveFeatures

from reelway.pipelines.evaluation.baselines import tune_als
from reelway.pipelines.evaluation.harness import make_temporal_split
from reelway.pipelines.evaluation.metrics import PAD
from reelway.pipelines.evaluation.recommender import TwoStageRecommender, make_catalogue, make_viewers
from reelway.pipelines.features.training_rows import LABELS_FILE
from reelway.pipelines.release_tables import write_videos
from reelway.pipelines.simulation.arrivals import DEVICES, Requests, draw_requests
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.policies import OraclePolicy, RecentPopularity
from reelway.pipelines.simulation.responses import ShownSlates, responses_to_events
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.pipelines.simulation.world import World
from reelway.pipelines.training.artifacts import TrainedModels, load_models
from reelway.platform.cli.processes import reelway_command, run_command
from reelway.platform.cli.terminal import print_status
from reelway.platform.contracts.blend import Blend
from reelway.platform.features.assembly import assemble_videos, columns_from_table
from reelway.platform.run_directory import RunDirectory
from reelway.serving.stages.arrays import ScoredCandidates
from reelway.serving.stages.reranking import Reranking
from reelway.serving.video_table import VideoTable

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

LOOP_DAYS = 2.0
PERIOD_S = 3 * 3600.0
"""How often both policies look at what has happened; a viewer's seen videos are kept up with every request."""
BAR = 1.3
RESAMPLES = 1000


class Policy(Protocol):
    """Looks at what has happened now and then, and answers requests."""

    def look(self, at_s: float, /) -> None: ...

    def slates(self, viewer_ids: I64, devices: I64, at_s: float, seen: Bools, /) -> I64:
        """Video ids ``[B, S]`` out of what ``seen`` ``[B, M]`` leaves."""
        ...


@dataclass(frozen=True)
class WatchTimeTotals:
    """Watched seconds and impressions per viewer (index = viewer id)."""

    watch_s: F64
    impressions: F64

    @property
    def mean_s(self) -> float:
        return float(self.watch_s.sum() / self.impressions.sum())


class RecentPopularityPolicy:
    """Long watches of the last day, from all events so far."""

    def __init__(self, world: World, live: LiveFeatures) -> None:
        self._world, self._live = world, live

    def look(self, at_s: float) -> None:
        self._policy = RecentPopularity(self._world, self._live.outcomes, at_s)

    def slates(self, viewer_ids: I64, _devices: I64, at_s: float, seen: Bools) -> I64:
        rng = np.random.default_rng(0)  # it draws nothing
        return self._policy.slates(viewer_ids, at_s, self._world.config.slate, rng, seen=seen)


class ClosedLoopOracle:
    """Knows every taste: what could be earned at most."""

    def __init__(self, world: World) -> None:
        self._world, self._policy = world, OraclePolicy(world)

    def look(self, _at_s: float) -> None:
        return None

    def slates(self, viewer_ids: I64, _devices: I64, at_s: float, seen: Bools) -> I64:
        return self._policy.slates(viewer_ids, at_s, self._world.config.slate, np.random.default_rng(0), seen=seen)


class AlsPolicy:
    """ALS as evaluation tunes it on the log; it knows no video that the log doesn't have, and does not learn on."""

    def __init__(self, world: World, run: RunDirectory, cut_s: float) -> None:
        self._slate = world.config.slate
        self._question = make_temporal_split(pq.read_table(run.features / LABELS_FILE), cut_s)
        self._als = tune_als(self._question)

    def look(self, _at_s: float) -> None:
        return None

    def slates(self, viewer_ids: I64, _devices: I64, _at_s: float, seen: Bools) -> I64:
        score_BM = np.full(seen.shape, -np.inf)
        score_BM[:, self._question.videos - 1] = self._als.scores(viewer_ids)
        score_BM[seen] = -np.inf
        best: I64 = np.argsort(-score_BM, axis=1, kind="stable")[:, : self._slate] + 1
        return best


class TwoStagePolicy:
    """Retrieval and ranking as evaluation asks them, arranged by the serving code's re-ranking."""

    def __init__(self, world: World, live: LiveFeatures, models: TrainedModels, blend: Blend) -> None:
        self._world, self._live, self._blend, self._models = world, live, blend, models
        snapshot = live.videos(world.config.start_s)
        catalogue = make_catalogue(models, snapshot, world.config.start_s)
        self._stages = TwoStageRecommender(models, catalogue, blend)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "videos.arrow"
            write_videos(path, snapshot, catalogue.arrays, catalogue.embedding, models.dimensions)
            self._reranking = Reranking(VideoTable(pa.ipc.open_file(path).get_batch(0)), blend.reranking)

    def look(self, at_s: float) -> None:
        """Read the live numbers of all videos; their embeddings stay."""
        snapshot = self._live.videos(at_s)
        moment_s = np.full(snapshot.num_rows, at_s)
        arrays = assemble_videos(columns_from_table(snapshot), moment_s, self._models.dimensions)
        self._stages.catalogue = replace(self._stages.catalogue, arrays=arrays)
        recent = RecentPopularity(self._world, self._live.outcomes, at_s)
        self._popularity_M = recent.counts[: self._world.config.videos]

    def slates(self, viewer_ids: I64, devices: I64, at_s: float, seen: Bools) -> I64:
        words = [DEVICES[code] for code in devices]
        viewers = make_viewers(self._models, self._live.viewers(viewer_ids, at_s), at_s, words)
        there_M = np.zeros(seen.shape[1], dtype=np.bool_)
        there_M[: len(self._world.available_videos(at_s))] = True
        head, slate = self._blend.reranking.head, self._world.config.slate
        rows_BK, values_BK = self._stages.order(viewers, ~seen & there_M, self._popularity_M, head)
        return np.stack([self._arrange(rows, values, slate) for rows, values in zip(rows_BK, values_BK, strict=True)])

    def _arrange(self, rows: I64, values: NDArray[np.float32], slate: int) -> I64:
        kept = rows != PAD
        nothing = np.zeros(0, dtype=np.int32)
        source = np.zeros(int(kept.sum()), dtype=np.int8)
        trigger_rows = np.full(len(source), -1, dtype=np.int32)
        found = self._reranking.rerank(
            ScoredCandidates(rows[kept].astype(np.int32), source, trigger_rows, values[kept], nothing, slate, seed=0)
        )
        return self._stages.catalogue.video_ids[found.rows]


def prepare(folder: Path, seed: int, config: SimulationConfig) -> RunDirectory:
    """Simulate, compute features, train: the commands an engineer types."""
    run = RunDirectory(folder / f"seed-{seed}")
    where = ["--run", str(run.path)]
    sizes = {"--viewers": config.viewers, "--videos": config.videos, "--days": config.days,
             "--impressions": config.impressions}  # fmt: skip
    words = [str(word) for pair in sizes.items() for word in pair]
    run_command(reelway_command("simulate", *where, "--seed", str(seed), *words))
    run_command(reelway_command("features", "build", *where))
    run_command(reelway_command("train", *where, "--seed", str(seed), "--preset", "demo", "--no-ray"))
    return run


def live_requests(world: World, start_s: float, seed: int) -> Requests:
    """Who opens the app when, after the cut; the same for every policy."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    drawn = draw_requests(world, world.config.impressions // world.config.slate, rng)
    inside = (drawn.time_s >= start_s) & (drawn.time_s < start_s + LOOP_DAYS * DAY_S)
    return Requests(drawn.viewer_ids[inside], drawn.time_s[inside], drawn.device[inside])


def run_loop(
    world: World,
    live: LiveFeatures,
    policy: RecentPopularityPolicy | ClosedLoopOracle | TwoStagePolicy,
    requests: Requests,
    start_s: float,
) -> WatchTimeTotals:
    """Show, watch what happens, learn, go on."""
    rng = np.random.default_rng(np.random.SeedSequence([world.seed, 8]))
    config = world.config
    history = ViewingHistory(world.videos)
    history.add_outcomes(live.outcomes)
    seen = np.zeros((config.viewers + 1, config.videos), dtype=np.bool_)
    seen[live.labels["viewer_id"].to_numpy(), live.labels["video_id"].to_numpy() - 1] = True
    watch_s, impressions = np.zeros(config.viewers + 1), np.zeros(config.viewers + 1)
    done, next_impression, next_outcome = 0, 10**9, 10**9
    period = ((requests.time_s - start_s) // PERIOD_S).astype(np.int64)
    for p in np.unique(period):
        policy.look(start_s + p * PERIOD_S)
        parts = []
        for some in _rounds(requests, np.flatnonzero(period == p)):
            viewers, time_s = requests.viewer_ids[some], requests.time_s[some]
            slates = policy.slates(viewers, requests.device[some], float(time_s.min()), seen[viewers])
            responses = world.respond(viewers, slates, time_s, rng, history)
            seen[viewers[:, None], slates - 1] = True
            np.add.at(watch_s, viewers, responses.watch_ms.sum(axis=1) / 1000.0)
            np.add.at(impressions, viewers, responses.present.sum(axis=1))
            shown = ShownSlates(
                request_id=10**9 + done + np.arange(len(some)), viewer_ids=viewers, slates=slates, time_s=time_s,
                propensity=np.ones(slates.shape, np.float32), source=np.zeros(slates.shape, np.int8), sources=("loop",),
                device=requests.device[some], devices=DEVICES,
            )  # fmt: skip
            events = responses_to_events(
                shown, responses, first_impression_id=next_impression, first_outcome_id=next_outcome
            )
            done, next_impression = done + len(some), next_impression + events[0].num_rows
            next_outcome += events[1].num_rows
            parts.append(events)
        for events in parts:
            live.add(*events)
    return WatchTimeTotals(watch_s, impressions)


def _rounds(requests: Requests, index: I64) -> list[I64]:
    """A period's requests such that no round has a viewer twice, in order of time."""
    viewer = requests.viewer_ids[index]
    order = np.argsort(viewer, kind="stable")
    first = np.flatnonzero(np.diff(viewer[order], prepend=-1))
    turn = np.empty(len(index), dtype=np.int64)
    turn[order] = np.arange(len(index)) - np.repeat(first, np.diff(np.append(first, len(index))))
    return [index[turn == t] for t in range(int(turn.max()) + 1)]


def ratio_interval(mine: WatchTimeTotals, theirs: WatchTimeTotals, seed: int) -> tuple[float, float, float]:
    """Ratio of watch time per impression with its 95 % interval, resampling viewers (paired)."""
    asked = np.flatnonzero(mine.impressions + theirs.impressions)
    rng = np.random.default_rng(seed)
    times_GB = rng.multinomial(len(asked), np.full(len(asked), 1 / len(asked)), size=RESAMPLES).astype(np.float64)
    top = (times_GB @ mine.watch_s[asked]) / (times_GB @ mine.impressions[asked])
    bottom = (times_GB @ theirs.watch_s[asked]) / (times_GB @ theirs.impressions[asked])
    low, high = np.quantile(top / bottom, [0.025, 0.975])
    return mine.mean_s / theirs.mean_s, float(low), float(high)


def measure(seed: int, folder: Path, config: SimulationConfig | None = None) -> list[Row]:
    """One seed: every policy in its own copy of the world; ALS and the oracle to see where the two stand."""
    config = config or SimulationConfig()
    run = prepare(folder, seed, config)
    models = load_models(run.models)
    cut_s = models.info.window_end_s
    earned: dict[str, WatchTimeTotals] = {}
    for name in ("popularity", "als", "ours", "oracle"):
        world, live = World(config, seed), LiveFeatures(run, cut_s)
        requests = live_requests(world, cut_s, seed)
        policy: Policy
        if name == "ours":
            policy = TwoStagePolicy(world, live, models, Blend())
        elif name == "als":
            policy = AlsPolicy(world, run, cut_s)
        else:
            policy = RecentPopularityPolicy(world, live) if name == "popularity" else ClosedLoopOracle(world)
        earned[name] = run_loop(world, live, policy, requests, cut_s)
        print_status(
            f"seed {seed}, {name}: {earned[name].mean_s:.3f} s per impression over {len(requests.time_s):,} requests"
        )
    ratio, low, high = ratio_interval(earned["ours"], earned["popularity"], seed)
    rows = [Row(f"seed {seed}: {name}", found.mean_s, "s per impression") for name, found in earned.items()]
    rows.append(Row(f"seed {seed}: ours / popularity", ratio, f"x, 95 % over viewers {low:.3f}..{high:.3f}"))
    return rows


def main(seeds: int) -> None:
    """Measure and print."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            rows += measure(seed, Path(folder))
    ratios = np.array([row.value for row in rows if row.metric.endswith("ours / popularity")])
    spread = f"{ratios.min():.3f}..{ratios.max():.3f}"
    rows.append(
        Row(f"mean of {seeds} seeds: ours / popularity", float(ratios.mean()), f"x, seeds {spread}", f">= {BAR}",
            bool(ratios.mean() >= BAR))
    )  # fmt: skip
    write_report("closed_loop", rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
