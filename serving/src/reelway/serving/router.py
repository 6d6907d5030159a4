"""Why: one place decides who is answered by which release, once per request, and can be told otherwise at any moment.

Its configuration is a ``Routing``, taken in place. It knows no Ray: how a release is opened is given to it. A release
that cannot be opened is reported and its share goes to stable; it never takes the others with it, and it never delays
weights that need only what is open already.
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

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import FeatureError, OverloadedError, ServingError
from reelway.platform.rollout.sequential import overlap_weight
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.tokens import TokenSigner
from reelway.serving import metrics
from reelway.serving.graph import Answered, RequestPath
from reelway.serving.http_api import Answer, CurrentReleases, ServedRelease
from reelway.serving.open_releases import OpenRelease, OpenReleases
from reelway.serving.outcomes.exposures import ExposedArm, ExposureBuffer
from reelway.serving.parity_sample import ParitySample
from reelway.serving.shadow import Asked, ShadowMirror, is_mirrored
from reelway.serving.slates import RolloutSide
from reelway.serving.time_budget import TimeBudget

log = logging.getLogger(__name__)

OTHERS_S: Final = 10.0
"""How long a router that has just started waits for releases beside stable before it answers without them."""


@dataclass
class RouterParts:
    """What a router works with.

    ``read_viewer`` blocks and raises ``FeatureError``; None serves everybody as unknown. ``exposures`` takes what is
    shown; somebody else sends it on. ``at_once`` requests may be under way at one release, ``standing`` of them where
    its queue has not been empty for a while; more are sent away.
    """

    signer: TokenSigner = field(repr=False)
    registry: CollectorRegistry
    read_viewer: Callable[[int], Mapping[str, Any]] | None = None
    viewer_row_ms: float = 250.0
    sample: ParitySample | None = None
    exposures: ExposureBuffer | None = None
    at_once: int = 64
    standing: int | None = None


@dataclass(frozen=True, slots=True)
class _Way:
    """A release with its path for one arm."""

    release: OpenRelease
    path: RequestPath
    side: RolloutSide


class Router:
    """Decides the arm and asks its release; see the module's docstring."""

    def __init__(self, open_release: Callable[[str], Awaitable[OpenRelease]], parts: RouterParts) -> None:
        self._parts = parts
        self._metrics = metrics.IngressMetrics(parts.registry)
        self._mirror = ShadowMirror(metrics.ShadowMetrics(parts.registry))
        self._within = TimeBudget(parts.viewer_row_ms)
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="viewer-row")
        self._releases = OpenReleases(open_release)
        self._wanted: Routing | None = None
        self._routing: Routing | None = None
        self._ways: dict[Arm, _Way] = {}
        self._opening: set[asyncio.Task[None]] = set()

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Take a new ``Routing``.

        The first one is acted upon when this returns. A later one is acted upon at once where every release with
        traffic is open, and otherwise as soon as each is open or has failed, unless a newer one came meanwhile. So a
        way back to stable never waits for a canary that is being opened.

        Raises:
            ValidationError: not a ``Routing``; what was acted upon before stays.
            ServingError: the first one, and its stable release cannot be opened.
        """
        routing = Routing.model_validate(config)
        self._wanted = routing
        if self._routing is None:
            await self._start_with(routing)
            return
        if not self._releases.lacks(_with_traffic(routing)):
            self._act(routing)
        if self._routing is not routing or self._releases.lacks(routing.releases):
            self._open_aside(routing)

    async def recommend(self, request: RecommendRequest) -> Answer:
        """A slate by the release of the viewer's arm.

        Raises:
            OverloadedError: too many are being answered by that release already. Waiting longer than anybody wants is
                not offered; a mirrored request does not count, it is dropped first.
        """
        routing, ways = self._routing, self._ways
        if routing is None:
            raise ServingError("the router has no releases yet; it was asked before its configuration came")
        way = ways[routing.route_of(request.viewer_id).arm]
        self._refuse_if_full(way)
        given, clock_s = request.context.time, time.time()
        now_s = clock_s if given is None else given.timestamp()
        with way.release.in_use():
            try:
                row = await self._viewer_row(request.viewer_id, way.release.edge.release_id)
                answered = await way.path.answer(request, row, now_s, clock_s)
            except Exception:
                way.path.count_failed()
                raise
        afterwards = partial(self._after, way, ways.get(Arm.SHADOW), routing, Asked(request, row, now_s), answered)
        return Answer(answered.response, afterwards)

    async def _after(self, way: _Way, shadow: _Way | None, routing: Routing, asked: Asked, answered: Answered) -> None:
        """What a slate leads to once it is on its way. Starts things and waits for nothing."""
        viewer_id = asked.request.viewer_id
        if (buffer := self._parts.exposures) and way.side.rollout:
            lost = buffer.dropped
            arm = ExposedArm(way.side.rollout, way.side.arm, way.release.edge.release_id)
            buffer.add(arm, viewer_id, way.side.overlap_weight, answered.slices)
            if buffer.dropped > lost:
                self._metrics.exposures_lost.inc(buffer.dropped - lost)
        if shadow and routing.shadow and is_mirrored(viewer_id, routing.salt, routing.shadow.weight_bp):
            self._mirror.offer(shadow.release, shadow.path, asked, answered)

    def current_releases(self) -> CurrentReleases:
        """What this router acts upon."""
        routing = self._routing
        if routing is None:
            raise ServingError("the router has no releases yet")
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
        """All processes' metrics of this node."""
        return await asyncio.to_thread(metrics.scrape, metrics.shared_folder(), self._parts.registry)

    def count_refused(self) -> None:
        """Add an invalid request."""
        self._metrics.refused.inc()

    def refuse_unread(self) -> None:
        """Send a request away before it is read, where one release answers everybody. Raises ``OverloadedError``."""
        if len(self._ways) == 1:
            (way,) = self._ways.values()
            self._refuse_if_full(way)

    def _refuse_if_full(self, way: _Way) -> None:
        parts = self._parts
        if way.release.takes(parts.at_once if parts.standing is None else parts.standing, parts.at_once):
            return
        release = way.release.edge.release_id
        self._metrics.shed.labels(release[: metrics.SHORT], way.side.arm.value).inc()
        raise OverloadedError(f"release {release[:12]} answers {way.release.requests} requests now; try again")

    async def _start_with(self, routing: Routing) -> None:
        stable = _fallback(routing).release
        opening = asyncio.create_task(self._releases.hold(_with_traffic(routing)))
        await self._releases.hold([stable])
        if self._releases.lacks([stable]):
            reason = self._releases.faults[stable]
            raise ServingError(f"release {stable[:12]}, which is stable, cannot be opened: {reason}")
        await asyncio.wait([opening], timeout=OTHERS_S)
        self._act(routing)
        self._open_aside(routing)

    def _open_aside(self, routing: Routing) -> None:
        opening = asyncio.create_task(self._open_then_act(routing))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _open_then_act(self, routing: Routing) -> None:
        await self._releases.hold(_with_traffic(routing))
        self._act_if_wanted(routing)
        await self._releases.hold(routing.releases)
        self._act_if_wanted(routing)  # its shadow may be open now
        if self._routing and self._wanted:
            self._releases.keep_only({*self._routing.releases, *self._wanted.releases})

    def _act_if_wanted(self, routing: Routing) -> None:
        if self._wanted is not routing:
            return  # a newer one has come
        if self._releases.lacks([_fallback(routing).release]):
            log.error(
                "stable release %s cannot be opened; the routing before it stays", _fallback(routing).release[:12]
            )
            return
        self._act(routing)

    def _act(self, routing: Routing) -> None:
        """From here on every new request goes by this routing. Requests under way end on the path they are on."""
        effective = without(routing, {name for name in routing.releases if self._releases.get(name) is None})
        ways: dict[Arm, _Way] = {}
        for route in effective.arms:
            if release := self._releases.get(route.release):
                ways[route.arm] = self._way(release, effective, route.arm)
        if effective.shadow and (release := self._releases.get(effective.shadow.release)):
            ways[Arm.SHADOW] = self._way(release, effective, Arm.SHADOW)
        self._routing, self._ways = effective, ways
        if self._parts.exposures:
            sides = (ExposedArm(effective.rollout, route.arm, route.release) for route in effective.arms)
            self._parts.exposures.announce(sides)
        self._releases.keep_only(routing.releases)

    def _way(self, release: OpenRelease, routing: Routing, arm: Arm) -> _Way:
        parts = self._parts
        sample = None if arm is Arm.SHADOW else parts.sample
        side = side_of(routing, arm)
        path = RequestPath(release.edge, release.stages, parts.signer, self._metrics, side, sample, release.place)
        return _Way(release, path, side)

    async def _viewer_row(self, viewer_id: int, release: str) -> Mapping[str, Any] | None:
        """The viewer's row, or ``None`` where the store fails or is late. A thread reads it: the loop never waits."""
        read = self._parts.read_viewer
        if read is None:
            return None
        loop = asyncio.get_running_loop()
        try:
            with metrics.timed(self._metrics.stage_latency.labels(release[: metrics.SHORT], "viewer_row")):
                return await self._within(lambda: loop.run_in_executor(self._threads, read, viewer_id))
        except (FeatureError, TimeoutError) as fault:
            kind = "timeout" if isinstance(fault, TimeoutError) else "error"
            self._metrics.faults.labels(release[: metrics.SHORT], "viewer_row", kind).inc()
            log.warning("viewer row: %s", fault)
            return None


def side_of(routing: Routing, arm: Arm) -> RolloutSide:
    """What an impression shown on this arm says of itself.

    The holdout is compared with nobody step by step, so its impressions all count 1.
    """
    if not routing.rollout or arm is Arm.SHADOW:
        return RolloutSide(arm)
    if arm is Arm.HOLDOUT:
        return RolloutSide(arm, routing.rollout, 1.0)
    canary_bp, stable_bp = routing.weight_of(Arm.CANARY), routing.weight_of(Arm.STABLE)
    weight = overlap_weight(canary_bp, stable_bp, canary=arm is Arm.CANARY)
    return RolloutSide(arm, routing.rollout, float(np.float32(weight)))


def _fallback(routing: Routing) -> ArmRoute:
    """Where everything falls back to: stable, or the last arm where there is none."""
    return next((route for route in routing.arms if route.arm is Arm.STABLE), routing.arms[-1])


def _with_traffic(routing: Routing) -> list[str]:
    return [_fallback(routing).release, *(route.release for route in routing.arms if route.weight_bp)]


def without(routing: Routing, missing: Collection[str]) -> Routing:
    """The routing with the share of releases that are missing given to stable, and without a shadow that is missing.

    The arms stay, so that the same releases are named; stable itself must not be missing.
    """
    fallback = _fallback(routing).arm
    shadow = routing.shadow if routing.shadow and routing.shadow.release not in missing else None
    lost = sum(route.weight_bp for route in routing.arms if route.release in missing)
    if not lost and shadow == routing.shadow:
        return routing

    def kept(route: ArmRoute) -> dict[str, Any]:
        weight_bp = 0 if route.release in missing else route.weight_bp + lost * (route.arm is fallback)
        return route.model_dump() | {"weight_bp": weight_bp}

    return Routing.model_validate(
        routing.model_dump()
        | {"arms": [kept(route) for route in routing.arms], "shadow": shadow and shadow.model_dump()}
    )
