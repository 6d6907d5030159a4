"""Live traffic: simulated viewers request slates from a running service over HTTP and report outcomes.

The load is open-loop: requests are sent on schedule, whatever the service does, so a slow release shows as slow. One
process with one thread needs about 1 ms of CPU per slate and its outcomes, so that it can share two cores with the
service. ``live_viewers`` chooses the viewers and their reactions.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np

from reelway.pipelines.simulation.arm_stickiness import CANARY
from reelway.pipelines.simulation.live_viewers import LiveViewers, ShownSlate
from reelway.pipelines.simulation.traffic_report import ArmTraffic, TrafficStatistics
from reelway.platform.atomic_files import write_json
from reelway.platform.viewer_assertions import ViewerTokenSigner
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

MAX_OUTCOMES: Final = 1_000
"""Maximum outcomes per ``POST /v1/outcomes``."""
REACTION_INTERVAL_S: Final = 0.25
ROUTING_POLL_INTERVAL_S: Final = 0.5
REPORT_INTERVAL_S: Final = 1.0
IDLE_S: Final = 2.0
"""Connections that were idle for longer are not reused, because the service may be closing them."""
STOPPED_FINISH_S: Final = 8.0
"""Seconds after ``stop`` for the requests in flight; later ones are cancelled and not counted."""
OUTCOME_ATTEMPTS: Final = 4
_JSON: Final = {"Content-Type": "application/json"}

ReportCallback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrafficOptions:
    """Target, rate and duration of the traffic.

    ``max_in_flight`` bounds the requests in flight; further requests wait and are counted as ``held_back``. Without
    ``internal_url``, the canaries are unknown and arm changes are not counted.
    """

    url: str
    internal_url: str | None = None
    rate: float = 40.0
    seconds: float | None = None
    count: int = 10
    timeout_s: float = 10.0
    max_in_flight: int = 256
    seed: int = 0
    report: Path | None = None


class LiveTraffic:
    """Sends traffic until a deadline or ``stop``, then waits for the requests in flight.

    Args:
        on_report: called with the report about once a second.
        signer: proves each viewer's identity to a service that demands it. None: nothing is proven.
    """

    def __init__(
        self,
        options: TrafficOptions,
        viewers: LiveViewers,
        on_report: ReportCallback = lambda _: None,
        *,
        signer: ViewerTokenSigner | None = None,
    ) -> None:
        self._options = options
        self._viewers = viewers
        self._on_report = on_report
        self._tokens = ViewerTokens(signer) if signer else None
        self._rng = np.random.default_rng(np.random.SeedSequence([options.seed, 11]))
        self._tally = TrafficStatistics(options.url, options.rate)
        self._slots = asyncio.Semaphore(options.max_in_flight)
        self._in_flight: set[asyncio.Task[None]] = set()
        self._shown: list[tuple[ShownSlate, ArmTraffic]] = []
        self._arriving: asyncio.Task[None] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Stops requesting slates. The requests in flight get ``STOPPED_FINISH_S`` to finish."""
        self._stopped = True
        if self._arriving is not None:
            self._arriving.cancel()

    async def run(self) -> dict[str, Any]:
        """Sends until ``seconds`` have passed or ``stop`` is called. Writes and returns the report."""
        options = self._options
        connections = aiohttp.TCPConnector(limit=options.max_in_flight + 8, keepalive_timeout=IDLE_S)
        timeout = aiohttp.ClientTimeout(total=options.timeout_s)
        async with aiohttp.ClientSession(options.url, connector=connections, timeout=timeout) as client:
            self._arriving = asyncio.create_task(self._generate_arrivals(client))
            every = (
                (REACTION_INTERVAL_S, self._send_reactions),
                (ROUTING_POLL_INTERVAL_S, self._poll_routing),
                (REPORT_INTERVAL_S, self._report_progress),
            )
            repeated = [asyncio.create_task(_run_periodically(period_s, work, client)) for period_s, work in every]
            try:
                # the periodic tasks end only with an exception
                await asyncio.wait([self._arriving, *repeated], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (self._arriving, *repeated):
                    task.cancel()
                ends = await asyncio.gather(self._arriving, *repeated, return_exceptions=True)
            for end in ends:
                if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                    raise end
            try:
                async with asyncio.timeout(STOPPED_FINISH_S if self._stopped else None):
                    await self._finish(client)
            except TimeoutError:
                await asyncio.gather(*self._in_flight, return_exceptions=True)
        return await self._write(running=False)

    async def _finish(self, client: aiohttp.ClientSession) -> None:
        await asyncio.gather(*self._in_flight)
        await self._send_reactions(client)
        await asyncio.gather(*self._in_flight)
        await self._poll_routing(client)

    async def _generate_arrivals(self, client: aiohttp.ClientSession) -> None:
        """Starts requests at random times (a Poisson process), ``rate`` per second on average."""
        due = time.monotonic()
        until = math.inf if self._options.seconds is None else due + self._options.seconds
        while True:
            due += self._rng.exponential(1.0 / self._options.rate)
            await asyncio.sleep(max(min(due, until) - time.monotonic(), 0.0))
            if due > until:
                return
            if self._slots.locked():
                self._tally.held_back += 1
            await self._slots.acquire()
            viewer_id, device = self._viewers.next_viewer()
            self._start(self._request_slate(client, viewer_id, device, due))

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _request_slate(self, client: aiohttp.ClientSession, viewer_id: int, device: str, due: float) -> None:
        """Requests one slate. Latency counts from the scheduled time and includes the wait for ``max_in_flight``."""
        sent_s = time.time()
        body = {"viewer_id": viewer_id, "count": self._options.count, "context": {"device": device}}
        try:
            status, answer = await _post(client, "/v1/recommend", body, self._proof(viewer_id))
        except (aiohttp.ClientError, TimeoutError) as error:
            self._tally.record_failure(f"{viewer_pseudonym(viewer_id)}: {type(error).__name__}: {error}")
            return
        finally:
            self._slots.release()
        took_ms = 1000 * (time.monotonic() - due)
        if status != HTTPStatus.OK:
            self._tally.record_failure(f"{viewer_pseudonym(viewer_id)}: {status} {answer[:200]!r}")
            return
        slate = json.loads(answer)
        release, arm, videos = slate["release"], slate["arm"], slate["videos"]
        tally = self._tally.record_response(release, arm, viewer_id, slate["degraded"], sent_s, took_ms)
        shown = ShownSlate(viewer_id, [video["video_id"] for video in videos], [video["token"] for video in videos])
        self._shown.append((shown, tally))

    async def _send_reactions(self, client: aiohttp.ClientSession) -> None:
        """Draws reactions to all slates since the last call and sends their outcomes in batches.

        A batch has the outcomes of many viewers, or of a single one if viewers prove their identity.
        """
        shown, self._shown = self._shown, []
        reactions = self._viewers.react([slate for slate, _ in shown], self._viewers.simulated_time_s())
        outcomes: dict[int | None, list[dict[str, Any]]] = {}
        for (slate, tally), reaction in zip(shown, reactions, strict=True):
            self._tally.record_reaction(tally, reaction)
            outcomes.setdefault(slate.viewer_id if self._tokens else None, []).extend(reaction.outcomes)
        for viewer_id, batch in outcomes.items():
            for first in range(0, len(batch), MAX_OUTCOMES):
                self._start(self._send(client, batch[first : first + MAX_OUTCOMES], self._proof(viewer_id)))

    def _proof(self, viewer_id: int | None) -> dict[str, str]:
        """Returns the headers that prove a viewer's identity; none if nothing is proven."""
        return self._tokens.headers(viewer_id) if self._tokens and viewer_id is not None else {}

    async def _send(self, client: aiohttp.ClientSession, outcomes: list[dict[str, Any]], proof: dict[str, str]) -> None:
        """Sends outcomes with retries until they are acknowledged; the service ignores duplicates."""
        problem = ""
        for attempt in range(OUTCOME_ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.25 * 2**attempt)
            try:
                status, answer = await _post(client, "/v1/outcomes", {"outcomes": outcomes}, proof)
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if status in (HTTPStatus.OK, HTTPStatus.ACCEPTED):
                self._tally.outcome_posts += 1
                self._tally.outcomes_sent += len(outcomes)
                self._tally.outcomes_answered.update(_counts(json.loads(answer)))
                return
            problem = f"{status} {answer[:200]!r}"
            if status < HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.TOO_MANY_REQUESTS:
                break
        self._tally.outcome_posts_failed += 1
        self._tally.record_example(f"{len(outcomes)} outcomes: {problem}")

    async def _poll_routing(self, client: aiohttp.ClientSession) -> None:
        """Reads from the service's internal API which canaries have traffic."""
        if self._options.internal_url is None:
            return
        requested_s = time.time()
        try:
            async with client.get(f"{self._options.internal_url}/v1/releases/current") as answer:
                status, body = answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            return  # polled again soon; failures of the service are counted on viewers' requests
        if status == HTTPStatus.OK:
            routes = json.loads(body)["releases"]
            canaries = {r["release"] for r in routes if r["arm"] == CANARY and r["weight_basis_points"] > 0}
            self._tally.arms.record_routing(frozenset(canaries), requested_s)

    async def _report_progress(self, _: aiohttp.ClientSession) -> None:
        self._on_report(await self._write(running=True))

    async def _write(self, *, running: bool) -> dict[str, Any]:
        report = self._tally.report(running=running)
        if self._options.report is not None:
            await asyncio.to_thread(write_json, self._options.report, report)
        return report


class ViewerTokens:
    """The tokens of viewers, each used for most of its lifetime as a client would.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, signer: ViewerTokenSigner, clock: Callable[[], float] = time.time) -> None:
        self._signer = signer
        self._clock = clock
        self._tokens: dict[int, tuple[str, float]] = {}

    def headers(self, viewer_id: int) -> dict[str, str]:
        """Returns the headers that prove the viewer's identity."""
        now = self._clock()
        token, renew_at = self._tokens.get(viewer_id, ("", 0.0))
        if now >= renew_at:
            token = self._signer.sign(viewer_id, now)
            self._tokens[viewer_id] = token, now + 0.8 * self._signer.lifetime_s
        return {"Authorization": f"Bearer {token}"}


async def _post(
    client: aiohttp.ClientSession, path: str, body: dict[str, Any], proof: dict[str, str]
) -> tuple[int, bytes]:
    content = json.dumps(body, separators=(",", ":")).encode()
    async with client.post(path, data=content, headers=_JSON | proof) as answer:
        return answer.status, await answer.read()


async def _run_periodically(
    period_s: float, work: Callable[[Any], Awaitable[None]], client: aiohttp.ClientSession
) -> None:
    while True:
        await asyncio.sleep(period_s)
        await work(client)


def _counts(answer: dict[str, Any]) -> dict[str, int]:
    """Returns the numbers in a response to ``POST /v1/outcomes`` by name."""
    return {name: value for name, value in answer.items() if isinstance(value, int) and not isinstance(value, bool)}
