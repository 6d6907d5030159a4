"""A minimal HTTP service for live traffic: routes viewers, returns slates and records all requests.

Slates are random or given in ``best``. Tests can inject failures and delays.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from reelway.pipelines.simulation.policies import OraclePolicy
from reelway.pipelines.simulation.world import World
from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.traffic.routing import Routing
from reelway.serving.access.assertions import JwtVerifier


@dataclass
class FakeService:
    """Behaviour of the service, and the requests that it received."""

    routing: Routing
    videos: int
    best: dict[int, list[int]] = field(default_factory=dict)
    delay_s: float = 0.0
    fail_viewers: frozenset[int] = frozenset()
    fail_next_outcomes: int = 0
    url: str = ""
    slates: Counter[tuple[str, str]] = field(default_factory=Counter)
    asked: dict[int, set[str]] = field(default_factory=dict)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    posts: list[int] = field(default_factory=list)
    verifier: JwtVerifier | None = None
    tokens: set[str] = field(default_factory=set)
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    async def recommend(self, request: Request) -> JSONResponse:
        body = await request.json()
        viewer, count = body["viewer_id"], body["count"]
        if self.verifier and await self._proven(request) != viewer:
            return JSONResponse({"error": "another viewer"}, 403)
        if viewer in self.fail_viewers:
            return JSONResponse({"error": "injected failure"}, 503)
        if self.delay_s:
            import asyncio

            await asyncio.sleep(self.delay_s)
        route = self.routing.route_of(viewer)
        self.slates[route.release, route.arm.value] += 1
        self.asked.setdefault(viewer, set()).add(route.release)
        chosen = self.best.get(viewer) or (self._rng.choice(self.videos, count, replace=False) + 1).tolist()
        videos = [
            {"video_id": video, "creator_id": 1, "position": i, "score": 0.5, "source": "popular", "reason": "liked",
             "title": None, "token": f"{route.release}-{sum(self.slates.values())}-{viewer}-{i}"}
            for i, video in enumerate(chosen)
        ]  # fmt: skip
        answer = {"request_id": 1, "viewer_id": viewer, "release": route.release, "arm": route.arm.value,
                  "degraded": [], "videos": videos}  # fmt: skip
        return JSONResponse(answer)

    async def outcome(self, request: Request) -> JSONResponse:
        body = await request.json()
        if self.fail_next_outcomes:
            self.fail_next_outcomes -= 1
            return JSONResponse({"error": "retry later"}, 503)
        if self.verifier:
            viewer = await self._proven(request)
            if {outcome["token"].split("-")[2] for outcome in body["outcomes"]} != {str(viewer)}:
                return JSONResponse({"error": "another viewer"}, 403)
        self.posts.append(len(body["outcomes"]))
        self.outcomes += body["outcomes"]
        return JSONResponse({"accepted": len(body["outcomes"]), "refused": []})

    async def _proven(self, request: Request) -> int:
        assert self.verifier is not None
        self.tokens.add(request.headers["authorization"])
        return await self.verifier.verify(request.scope["headers"])

    async def current(self, _: Request) -> JSONResponse:
        arms = [
            {"release": arm.release, "arm": arm.arm.value, "weight_basis_points": arm.weight_bp}
            for arm in self.routing.arms
        ]
        return JSONResponse({"releases": arms})


def with_canary(stable: str, canary: str, weight_bp: int) -> Routing:
    """Returns a routing of two releases with one salt."""
    arms = [
        {"arm": Arm.CANARY, "release": canary, "weight_bp": weight_bp},
        {"arm": Arm.STABLE, "release": stable, "weight_bp": 10_000 - weight_bp},
    ]
    return Routing.model_validate({"salt": "one", "rollout": "one", "arms": [a for a in arms if a["weight_bp"]]})


def liked_slates(world: World, time_s: float, count: int) -> dict[int, list[int]]:
    """Returns the oracle's slate for every viewer."""
    viewers = world.available_viewers(time_s)
    slates = OraclePolicy(world).slates(viewers, time_s, count, np.random.default_rng(0))
    return dict(zip(viewers.tolist(), slates.tolist(), strict=True))


@contextmanager
def running(service: FakeService) -> Iterator[FakeService]:
    """Runs the service on a free port until the block is left."""
    app = Starlette(
        routes=[
            Route("/v1/recommend", service.recommend, methods=["POST"]),
            Route("/v1/outcomes", service.outcome, methods=["POST"]),
            Route("/v1/releases/current", service.current),
        ]
    )
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    service.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join(10)
