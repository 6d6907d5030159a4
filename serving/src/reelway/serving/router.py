"""Chooses the release that answers a request, by the viewer's arm. Imports no Ray.

The router's configuration is a ``Routing``, applied without a restart. The caller provides the function that opens a
release. A release that cannot be opened is reported, and its share of the traffic goes to stable. It affects no other
release, and it delays no weight change that needs only releases which are open already.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from prometheus_client import CollectorRegistry

from reelway.platform.contracts.api import OutcomesRequest, OutcomesResponse, RecommendRequest
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import OverloadedError, ServingError
from reelway.platform.features.viewer_memory import NO_MEMORY, ViewerMemory, ViewerMemoryState
from reelway.platform.features.viewer_rows import StoredViewer
from reelway.platform.rollout.sequential import overlap_weight
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.supervised_thread import supervise_task
from reelway.platform.tokens import TokenSigner
from reelway.serving import metrics
from reelway.serving.circuit_breaker import CircuitBreaker
from reelway.serving.http_api import CurrentReleases, PendingResponse, ServedRelease
from reelway.serving.outcomes import ExposureWriter, OutcomeIntake, SlateExposure
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.release_pool import OpenRelease, ReleasePool
from reelway.serving.request_path import Recommendation, RequestPath
from reelway.serving.shadow import MirroredRequest, ShadowMirror, is_mirrored
from reelway.serving.shown_memory import ShownMemory
from reelway.serving.slates import RolloutArm
from reelway.serving.stage_runner import VIEWER_ROW, StageRunner

log = logging.getLogger(__name__)

STARTUP_WAIT_S: Final = 10.0
"""How long a starting router waits for releases other than stable before it answers without them, in seconds."""


@dataclass
class RouterDependencies:
    """The dependencies and limits of a router.

    Args:
        read_viewer: returns a viewer's row and memory; blocks and raises ``FeatureError``. None: all viewers are
            unknown.
        memory: store that shown videos are written to; ``read_viewer`` reads it. None: nothing is remembered.
        viewer_row_ms: time budget of ``read_viewer`` in milliseconds.
        exposures: appends the slates that were shown to the event log. None: there is no event log.
        outcomes: accepts reported outcomes. None: they are rejected.
        max_ongoing_requests: requests in flight at one release; further requests are rejected with 429.
        max_ongoing_sustained: the same limit while the release has a standing queue; None: no lower limit.
    """

    signer: TokenSigner = field(repr=False)
    registry: CollectorRegistry
    read_viewer: Callable[[int], StoredViewer] | None = None
    memory: ViewerMemory | None = None
    viewer_row_ms: float = 250.0
    sample: ParitySampler | None = None
    exposures: ExposureWriter | None = None
    outcomes: OutcomeIntake | None = None
    max_ongoing_requests: int = 64
    max_ongoing_sustained: int | None = None


@dataclass(frozen=True, slots=True)
class _ArmPath:
    """A release with its request path for one arm."""

    release: OpenRelease
    path: RequestPath
    rollout_arm: RolloutArm
    runner: StageRunner  # reads the viewer's row


class Router:
    """Answers requests with the release of the viewer's arm; see the module docstring."""

    def __init__(self, open_release: Callable[[str], Awaitable[OpenRelease]], dependencies: RouterDependencies) -> None:
        self._dependencies = dependencies
        self._metrics = metrics.IngressMetrics(dependencies.registry)
        self._memory_metrics = metrics.ShownMemoryMetrics(dependencies.registry)
        self._shown = ShownMemory(dependencies.memory, self._memory_metrics) if dependencies.memory else None
        if dependencies.sample:
            dependencies.sample.report_losses(self._metrics.parity_samples_lost.inc)
        self._mirror = ShadowMirror(metrics.ShadowMetrics(dependencies.registry))
        self._within = CircuitBreaker(dependencies.viewer_row_ms)
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="viewer-row")
        self._releases = ReleasePool(open_release)
        self._requested: Routing | None = None
        self._routing: Routing | None = None
        self._arm_paths: dict[Arm, _ArmPath] = {}
        self._opening: set[asyncio.Task[None]] = set()

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Takes a new ``Routing``.

        The first routing is in effect when this method returns. A later routing takes effect immediately if every
        release with traffic is open. Otherwise it takes effect as soon as each of them is open or has failed, unless a
        newer routing has arrived by then. A rollback to stable therefore never waits for a canary to open.

        Raises:
            ValidationError: if ``config`` is not a ``Routing``; the routing in effect stays.
            ServingError: if this is the first routing and its stable release cannot be opened.
        """
        routing = Routing.model_validate(config)
        self._requested = routing
        if self._routing is None:
            await self._initialise(routing)
            return
        if not self._releases.is_missing_any(_with_traffic(routing)):
            self._apply_routing(routing)
        if self._routing is not routing or self._releases.is_missing_any(routing.releases):
            self._open_in_background(routing)

    async def recommend(self, request: RecommendRequest, *, authenticated: bool = False) -> PendingResponse:
        """Returns a slate by the release of the viewer's arm.

        Args:
            authenticated: whether the viewer proved its identity; recorded with the exposure.

        Raises:
            OverloadedError: if too many requests to that release are in flight. Mirrored requests do not count; they
                have a limit of their own and are dropped first.
            ServingError: if the router has no routing yet.
        """
        routing, arm_paths = self._routing, self._arm_paths
        if routing is None:
            raise ServingError("router: no release is open yet; retry when Ray Serve has configured the router")
        arm_path = arm_paths[routing.route_of(request.viewer_id).arm]
        self._shed_if_full(arm_path)
        request_time, clock_s = request.context.time, time.time()
        now_s = clock_s if request_time is None else request_time.timestamp()
        with arm_path.release.track_request():
            try:
                row, memory = await self._viewer(request.viewer_id, arm_path.runner)
                recommendation = await arm_path.path.recommend(
                    request, row, now_s, clock_s, memory, authenticated=authenticated
                )
            except Exception:
                arm_path.path.count_failed()
                raise
        if self._shown:
            self._shown.remember(request.viewer_id, recommendation.exposure.video_id, clock_s)
        afterwards = partial(
            self._after_response,
            arm_paths.get(Arm.SHADOW),
            routing,
            MirroredRequest(request, row, now_s, clock_s, memory),
            recommendation,
        )
        return PendingResponse(recommendation.response, afterwards)

    async def _after_response(
        self,
        shadow: _ArmPath | None,
        routing: Routing,
        mirrored_request: MirroredRequest,
        recommendation: Recommendation,
    ) -> None:
        """Queues the exposure and mirrors the request after the response was sent. Waits for nothing."""
        viewer_id = mirrored_request.request.viewer_id
        if self._dependencies.exposures:
            self._dependencies.exposures.record(recommendation.exposure)
        if shadow and routing.shadow and is_mirrored(viewer_id, routing.salt, routing.shadow.weight_bp):
            self._mirror.mirror(shadow.release, shadow.path, mirrored_request, recommendation)

    async def report_outcomes(self, request: OutcomesRequest, viewer_id: int | None = None) -> OutcomesResponse:
        """Records reported outcomes; see ``OutcomeIntake.accept``.

        Raises:
            ServingError: if the router has no event log.
        """
        if self._dependencies.outcomes is None:
            raise ServingError("router: no event log is configured, so outcomes are not accepted")
        return await self._dependencies.outcomes.accept(request, viewer_id)

    def close(self) -> None:
        """Appends the exposures and outcomes that are still queued, and writes the shown videos; blocks."""
        for writer in (self._dependencies.exposures, self._dependencies.outcomes):
            if writer:
                writer.close()
        if self._shown:
            self._shown.close()

    def count_lost_exposure(self, exposure: SlateExposure) -> None:
        """Counts a slate that was served and is not in the event log."""
        self._metrics.exposures_lost.labels(short_id(exposure.arm.release), exposure.arm.arm.value).inc()

    def has_traffic(self, release: str) -> bool:
        """Whether viewers are, or are about to be, on a release."""
        return any(release in _with_traffic(routing) for routing in (self._requested, self._routing) if routing)

    def count_foreign_features(self, release: str) -> None:
        """Counts a release with traffic that was opened although the feature store has other feature services."""
        self._metrics.foreign_features.labels(short_id(release)).inc()

    def current_releases(self) -> CurrentReleases:
        """Returns the routing in effect and the state of its releases."""
        routing = self._routing
        if routing is None:
            raise ServingError("router: no release is open yet; retry when Ray Serve has configured the router")
        served = [
            ServedRelease(release=route.release, arm=route.arm, weight_basis_points=route.weight_bp)
            for route in routing.arms
        ]
        return CurrentReleases(
            rollout=routing.rollout,
            salt=routing.salt,
            routing=routing,
            releases=served,
            open=self._releases.names,
            faults=dict(self._releases.faults),
        )

    async def metrics_text(self) -> bytes:
        """Returns the metrics of all processes of this node."""
        return await asyncio.to_thread(metrics.render_metrics, metrics.multiprocess_dir(), self._dependencies.registry)

    def record_rejected(self, kind: str) -> None:
        """Counts a request that was rejected before it reached a release."""
        self._metrics.refused.labels(kind).inc()

    def record_denied(self, reason: str) -> None:
        """Counts a request that was denied; the reason is that of an ``AccessError``."""
        self._metrics.denied.labels(reason).inc()

    def record_key_fault(self) -> None:
        """Counts a failed read of the keys that verify viewers."""
        self._metrics.key_faults.inc()

    def shed_before_read(self) -> None:
        """Rejects a request before it is read, if a single release answers all viewers and that release is full.

        Raises:
            OverloadedError: if the request is rejected.
        """
        if len(self._arm_paths) == 1:
            (arm_path,) = self._arm_paths.values()
            self._shed_if_full(arm_path)

    def _shed_if_full(self, arm_path: _ArmPath) -> None:
        dependencies = self._dependencies
        limit = dependencies.max_ongoing_requests
        sustained = limit if dependencies.max_ongoing_sustained is None else dependencies.max_ongoing_sustained
        if arm_path.release.admits(sustained, limit):
            return
        release = arm_path.release.release_id
        self._metrics.shed.labels(release[: metrics.SHORT_RELEASE], arm_path.rollout_arm.arm.value).inc()
        raise OverloadedError(
            f"release {short_id(release)}: {arm_path.release.requests} requests are in flight; try again"
        )

    async def _initialise(self, routing: Routing) -> None:
        stable = _fallback(routing).release
        opening = asyncio.create_task(self._releases.open_all(_with_traffic(routing)))
        await self._releases.open_all([stable])
        if self._releases.is_missing_any([stable]):
            reason = self._releases.faults[stable]
            raise ServingError(
                f"stable release {stable[:12]}: cannot be opened: {reason}; choose another stable release"
            )
        await asyncio.wait([opening], timeout=STARTUP_WAIT_S)
        self._apply_routing(routing)
        self._open_in_background(routing)

    def _open_in_background(self, routing: Routing) -> None:
        opening = asyncio.create_task(self._open_then_apply(routing))
        supervise_task(opening, "routing")
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _open_then_apply(self, routing: Routing) -> None:
        await self._releases.open_all(_with_traffic(routing))
        self._apply_if_current(routing)
        await self._releases.open_all(routing.releases)
        self._apply_if_current(routing)  # its shadow release may be open now
        if self._routing and self._requested:
            self._releases.retain({*self._routing.releases, *self._requested.releases})

    def _apply_if_current(self, routing: Routing) -> None:
        if self._requested is not routing:
            return  # a newer routing has arrived
        if self._releases.is_missing_any([_fallback(routing).release]):
            log.error("routing not applied: stable release %s cannot be opened", _fallback(routing).release[:12])
            return
        self._apply_routing(routing)

    def _apply_routing(self, routing: Routing) -> None:
        """Applies the routing to all new requests. Requests in flight finish on their present path."""
        effective = reassign_missing(routing, {name for name in routing.releases if self._releases.get(name) is None})
        arm_paths: dict[Arm, _ArmPath] = {}
        for route in effective.arms:
            if release := self._releases.get(route.release):
                arm_paths[route.arm] = self._arm_path(release, effective, route.arm)
        if effective.shadow and (release := self._releases.get(effective.shadow.release)):
            arm_paths[Arm.SHADOW] = self._arm_path(release, effective, Arm.SHADOW)
        self._routing, self._arm_paths = effective, arm_paths
        self._releases.retain(routing.releases)

    def _arm_path(self, release: OpenRelease, routing: Routing, arm: Arm) -> _ArmPath:
        dependencies = self._dependencies
        sample = None if arm is Arm.SHADOW else dependencies.sample
        served_arm = rollout_arm(routing, arm)
        path = RequestPath(
            release.router_release,
            release.stages,
            dependencies.signer,
            self._metrics,
            served_arm,
            sample,
            release.executor,
        )
        runner = StageRunner(self._metrics, release.release_id, {VIEWER_ROW.name: self._within})
        return _ArmPath(release, path, served_arm, runner)

    async def _viewer(self, viewer_id: int, runner: StageRunner) -> tuple[Mapping[str, Any] | None, ViewerMemoryState]:
        """Returns the viewer's row, or ``None`` if the store fails or is late, and the viewer's memory.

        A thread reads both, because the read blocks. The request path lists the missing row as a degradation. A memory
        that cannot be read is counted; what this router showed itself is known without the store.
        """
        stored = await self._stored_viewer(viewer_id, runner)
        memory, shown = stored.memory, self._shown
        if shown is None:
            return stored.row, memory or NO_MEMORY
        if memory is None:
            self._memory_metrics.faults.labels("read").inc()
            memory = NO_MEMORY
        return stored.row, shown.with_recent(viewer_id, memory)

    async def _stored_viewer(self, viewer_id: int, runner: StageRunner) -> StoredViewer:
        read = self._dependencies.read_viewer
        if read is None:
            return StoredViewer(None, NO_MEMORY)
        loop = asyncio.get_running_loop()

        def read_in_thread(viewer_id: int) -> Awaitable[StoredViewer]:
            return loop.run_in_executor(self._threads, read, viewer_id)

        return await runner.run(VIEWER_ROW, read_in_thread, viewer_id, lambda: StoredViewer(None), [])


def rollout_arm(routing: Routing, arm: Arm) -> RolloutArm:
    """Returns the arm, rollout and overlap weight that the arm's impressions carry.

    The rollout's steps never compare the holdout with another arm, so its impressions have weight 1.
    """
    if not routing.rollout or arm is Arm.SHADOW:
        return RolloutArm(arm)
    if arm is Arm.HOLDOUT:
        return RolloutArm(arm, routing.rollout, 1.0)
    canary_bp, stable_bp = routing.weight_of(Arm.CANARY), routing.weight_of(Arm.STABLE)
    weight = overlap_weight(canary_bp, stable_bp, canary=arm is Arm.CANARY)
    return RolloutArm(arm, routing.rollout, float(np.float32(weight)))


def _fallback(routing: Routing) -> ArmRoute:
    """Returns the route that traffic falls back to: stable, or the last arm if there is no stable arm."""
    return next((route for route in routing.arms if route.arm is Arm.STABLE), routing.arms[-1])


def _with_traffic(routing: Routing) -> list[str]:
    return [_fallback(routing).release, *(route.release for route in routing.arms if route.weight_bp)]


def reassign_missing(routing: Routing, missing: Collection[str]) -> Routing:
    """Moves the traffic of missing releases to stable and removes a missing shadow release.

    All arms stay in the routing, with weight 0 if their release is missing. Stable itself must not be missing.
    """
    fallback = _fallback(routing).arm
    shadow = routing.shadow if routing.shadow and routing.shadow.release not in missing else None
    lost = sum(route.weight_bp for route in routing.arms if route.release in missing)
    if not lost and shadow == routing.shadow:
        return routing

    def with_weight(route: ArmRoute) -> dict[str, Any]:
        weight_bp = 0 if route.release in missing else route.weight_bp + lost * (route.arm is fallback)
        return route.model_dump() | {"weight_bp": weight_bp}

    return Routing.model_validate(
        routing.model_dump()
        | {"arms": [with_weight(route) for route in routing.arms], "shadow": shadow and shadow.model_dump()}
    )
