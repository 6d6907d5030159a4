"""Compares watch time per impression of the models and of popularity in the simulator, over several days.

``python -m tests.benchmarks.bench_closed_loop [seeds]``. For each seed, a service is simulated and models are trained
on the first 80 % of its log. Then copies of the same world, with the same viewing history, continue for some days with
the same requests. One copy shows the popular videos of the last day. Another shows the result of retrieval, ranking and
serving's re-ranking. No policy shows a viewer the same video twice. Both read the events that their own recommendations
caused.
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
"""Interval in seconds at which policies read new events. A viewer's shown videos are excluded at every request."""
BAR = 1.3
RESAMPLES = 1000


class Policy(Protocol):
    """A recommender that reads new events periodically and answers requests."""

    def refresh(self, at_s: float, /) -> None: ...

    def slates(self, viewer_ids: I64, devices: I64, at_s: float, seen: Bools, /) -> I64:
        """Returns video ids ``[B, S]``, without those of ``seen`` ``[B, M]``."""
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
    """Recommends the videos with the most long watches in the last day."""

    def __init__(self, world: World, live: LiveFeatures) -> None:
        self._world, self._live = world, live

    def refresh(self, at_s: float) -> None:
        self._policy = RecentPopularity(self._world, self._live.outcomes, at_s)

    def slates(self, viewer_ids: I64, _devices: I64, at_s: float, seen: Bools) -> I64:
        rng = np.random.default_rng(0)  # required by the interface, but not used
        return self._policy.slates(viewer_ids, at_s, self._world.config.slate, rng, seen=seen)


class ClosedLoopOracle:
    """Recommends by the true preferences of the simulator: the upper limit of watch time."""

    def __init__(self, world: World) -> None:
        self._world, self._policy = world, OraclePolicy(world)

    def refresh(self, _at_s: float) -> None:
        return None

    def slates(self, viewer_ids: I64, _devices: I64, at_s: float, seen: Bools) -> I64:
        return self._policy.slates(viewer_ids, at_s, self._world.config.slate, np.random.default_rng(0), seen=seen)


class AlsPolicy:
    """Recommends by ALS, tuned as in evaluation. It covers only videos of the log and reads no new events."""

    def __init__(self, world: World, run: RunDirectory, cut_s: float) -> None:
        self._slate = world.config.slate
        self._split = make_temporal_split(pq.read_table(run.features / LABELS_FILE), cut_s)
        self._als = tune_als(self._split)

    def refresh(self, _at_s: float) -> None:
        return None

    def slates(self, viewer_ids: I64, _devices: I64, _at_s: float, seen: Bools) -> I64:
        score_BM = np.full(seen.shape, -np.inf)
        score_BM[:, self._split.videos - 1] = self._als.scores(viewer_ids)
        score_BM[seen] = -np.inf
        best: I64 = np.argsort(-score_BM, axis=1, kind="stable")[:, : self._slate] + 1
        return best


class TwoStagePolicy:
    """Recommends by retrieval and ranking as in evaluation, and by the re-ranking of serving."""

    def __init__(self, world: World, live: LiveFeatures, models: TrainedModels, blend: Blend) -> None:
        self._world, self._live, self._blend, self._models = world, live, blend, models
        snapshot = live.videos(world.config.start_s)
        catalogue = make_catalogue(models, snapshot, world.config.start_s)
        self._stages = TwoStageRecommender(models, catalogue, blend)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "videos.arrow"
            write_videos(path, snapshot, catalogue.arrays, catalogue.embedding, models.dimensions)
            self._reranking = Reranking(VideoTable(pa.ipc.open_file(path).get_batch(0)), blend.reranking)

    def refresh(self, at_s: float) -> None:
        """Updates the live features of all videos. Their embeddings do not change."""
        snapshot = self._live.videos(at_s)
        moment_s = np.full(snapshot.num_rows, at_s)
        arrays = assemble_videos(columns_from_table(snapshot), moment_s, self._models.dimensions)
        self._stages.catalogue = replace(self._stages.catalogue, arrays=arrays)
        recent = RecentPopularity(self._world, self._live.outcomes, at_s)
        self._popularity_M = recent.counts[: self._world.config.videos]

    def slates(self, viewer_ids: I64, devices: I64, at_s: float, seen: Bools) -> I64:
        device_names = [DEVICES[code] for code in devices]
        viewers = make_viewers(self._models, self._live.viewers(viewer_ids, at_s), at_s, device_names)
        available_M = np.zeros(seen.shape[1], dtype=np.bool_)
        available_M[: len(self._world.available_videos(at_s))] = True
        head, slate = self._blend.reranking.head, self._world.config.slate
        rows_BK, values_BK = self._stages.order(viewers, ~seen & available_M, self._popularity_M, head)
        return np.stack([self._arrange(rows, values, slate) for rows, values in zip(rows_BK, values_BK, strict=True)])

    def _arrange(self, rows: I64, values: NDArray[np.float32], slate: int) -> I64:
        is_video = rows != PAD
        nothing = np.zeros(0, dtype=np.int32)
        source = np.zeros(int(is_video.sum()), dtype=np.int8)
        trigger_rows = np.full(len(source), -1, dtype=np.int32)
        slate_rows = self._reranking.rerank(
            ScoredCandidates(
                rows[is_video].astype(np.int32), source, trigger_rows, values[is_video], nothing, slate, seed=0
            )
        )
        return self._stages.catalogue.video_ids[slate_rows.rows]


def prepare(folder: Path, seed: int, config: SimulationConfig) -> RunDirectory:
    """Simulates, computes features and trains, with the commands that an engineer would run."""
    run = RunDirectory(folder / f"seed-{seed}")
    run_option = ["--run", str(run.path)]
    sizes = {"--viewers": config.viewers, "--videos": config.videos, "--days": config.days,
             "--impressions": config.impressions}  # fmt: skip
    options = [str(value) for pair in sizes.items() for value in pair]
    run_command(reelway_command("simulate", *run_option, "--seed", str(seed), *options))
    run_command(reelway_command("features", "build", *run_option))
    run_command(reelway_command("train", *run_option, "--seed", str(seed), "--preset", "demo", "--no-ray"))
    return run


def live_requests(world: World, start_s: float, seed: int) -> Requests:
    """Returns the requests after the cut, the same for every policy."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    drawn = draw_requests(world, world.config.impressions // world.config.slate, rng)
    inside = (drawn.time_s >= start_s) & (drawn.time_s < start_s + LOOP_DAYS * DAY_S)
    return Requests(drawn.viewer_ids[inside], drawn.time_s[inside], drawn.device[inside])


def run_loop(
    world: World,
    live: LiveFeatures,
    policy: Policy,
    requests: Requests,
    start_s: float,
) -> WatchTimeTotals:
    """Answers all requests with a policy, simulates the responses, and adds them to the live features."""
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
        policy.refresh(start_s + p * PERIOD_S)
        period_events = []
        for batch in _rounds(requests, np.flatnonzero(period == p)):
            viewers, time_s = requests.viewer_ids[batch], requests.time_s[batch]
            slates = policy.slates(viewers, requests.device[batch], float(time_s.min()), seen[viewers])
            responses = world.respond(viewers, slates, time_s, rng, history)
            seen[viewers[:, None], slates - 1] = True
            np.add.at(watch_s, viewers, responses.watch_ms.sum(axis=1) / 1000.0)
            np.add.at(impressions, viewers, responses.present.sum(axis=1))
            shown = ShownSlates(
                request_id=10**9 + done + np.arange(len(batch)), viewer_ids=viewers, slates=slates, time_s=time_s,
                propensity=np.ones(slates.shape, np.float32), source=np.zeros(slates.shape, np.int8), sources=("loop",),
                device=requests.device[batch], devices=DEVICES,
            )  # fmt: skip
            events = responses_to_events(
                shown, responses, first_impression_id=next_impression, first_outcome_id=next_outcome
            )
            done, next_impression = done + len(batch), next_impression + events[0].num_rows
            next_outcome += events[1].num_rows
            period_events.append(events)
        for events in period_events:
            live.add(*events)
    return WatchTimeTotals(watch_s, impressions)


def _rounds(requests: Requests, index: I64) -> list[I64]:
    """Splits the requests of a period into rounds in which no viewer occurs twice, in order of time."""
    viewer = requests.viewer_ids[index]
    order = np.argsort(viewer, kind="stable")
    first = np.flatnonzero(np.diff(viewer[order], prepend=-1))
    turn = np.empty(len(index), dtype=np.int64)
    turn[order] = np.arange(len(index)) - np.repeat(first, np.diff(np.append(first, len(index))))
    return [index[turn == t] for t in range(int(turn.max()) + 1)]


def ratio_interval(models: WatchTimeTotals, baseline: WatchTimeTotals, seed: int) -> tuple[float, float, float]:
    """Returns the ratio of watch time per impression with its 95 % interval, by resampling viewers (paired)."""
    active = np.flatnonzero(models.impressions + baseline.impressions)
    rng = np.random.default_rng(seed)
    times_GB = rng.multinomial(len(active), np.full(len(active), 1 / len(active)), size=RESAMPLES).astype(np.float64)
    top = (times_GB @ models.watch_s[active]) / (times_GB @ models.impressions[active])
    bottom = (times_GB @ baseline.watch_s[active]) / (times_GB @ baseline.impressions[active])
    low, high = np.quantile(top / bottom, [0.025, 0.975])
    return models.mean_s / baseline.mean_s, float(low), float(high)


def measure(seed: int, folder: Path, config: SimulationConfig | None = None) -> list[Row]:
    """Runs each policy in its own copy of one seed's world. ALS and the oracle are for reference."""
    config = config or SimulationConfig()
    run = prepare(folder, seed, config)
    models = load_models(run.models)
    cut_s = models.info.window_end_s
    totals: dict[str, WatchTimeTotals] = {}
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
        totals[name] = run_loop(world, live, policy, requests, cut_s)
        print_status(
            f"seed {seed}, {name}: {totals[name].mean_s:.3f} s per impression over {len(requests.time_s):,} requests"
        )
    ratio, low, high = ratio_interval(totals["ours"], totals["popularity"], seed)
    rows = [Row(f"seed {seed}: {name}", total.mean_s, "s per impression") for name, total in totals.items()]
    rows.append(Row(f"seed {seed}: ours / popularity", ratio, f"x, 95 % over viewers {low:.3f}..{high:.3f}"))
    return rows


def main(seeds: int) -> None:
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
