"""Ray Serve applications with the interfaces of the real ones: a release without work, a router and an outcome API.

``noop_document`` deploys them. A release named ``broken...`` fails to start.
"""

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from reelway.platform.rollout.traffic.routing import Routing


@serve.deployment(graceful_shutdown_timeout_s=2)
class Release:
    """Returns its name."""

    def __init__(self, release: str) -> None:
        if release.startswith("broken"):
            raise ValueError("no such file videos.arrow")
        self._release = release

    async def answer(self) -> str:
        return self._release


@serve.deployment(max_ongoing_requests=500)
class Router:
    """Applies a ``Routing`` as the real router does. ``open`` lists the releases that have responded."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._routing: Routing | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        self._routing = Routing.model_validate(config)
        self._handles = {name: handle for name, handle in self._handles.items() if name in self._routing.releases}
        for release in self._routing.releases:
            if release not in self._handles:
                self._tasks.add(asyncio.create_task(self._open(release)))

    async def _open(self, release: str) -> None:
        while self._routing and release in self._routing.releases:
            try:
                handle = serve.get_app_handle(release)
                await asyncio.wait_for(handle.answer.remote(), 5)
            except Exception:
                await asyncio.sleep(0.1)
            else:
                self._handles[release] = handle
                return

    async def __call__(self, request: Request) -> JSONResponse:
        assert self._routing is not None
        if request.url.path == "/v1/releases/current":
            routing = self._routing.model_dump(mode="json")
            return JSONResponse({"routing": routing, "open": sorted(self._handles), "faults": {}})
        route = self._routing.route_of(int(request.query_params.get("viewer", "0")))
        return JSONResponse({"release": await self._handles[route.release].answer.remote(), "arm": route.arm.value})


@serve.deployment
class Outcomes:
    """An application that is not a release."""

    async def __call__(self, _: Request) -> JSONResponse:
        return JSONResponse({})


def release(args: dict[str, Any]) -> Any:
    return Release.bind(args["release"])


def router(_: dict[str, Any]) -> Any:
    return Router.bind()


def outcomes(_: dict[str, Any]) -> Any:
    return Outcomes.bind()
