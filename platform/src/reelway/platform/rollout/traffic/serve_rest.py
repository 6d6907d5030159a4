"""Why: the local profile's traffic is Ray Serve's, seen and changed through its REST API and nothing else.

It converges to a target and says what it sees; it knows no phases and imports no Ray. Where the service is and its
token are read at each use, so that a restarted service is found again. Every request has a time limit.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reelway.platform.errors import RolloutError
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import ROUTER, config_of, releases_in, routing_in, with_target
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget
from reelway.platform.runs import RunDirectory

log = logging.getLogger(__name__)

SERVING_RECORD: Final = "serving.json"
RAY_TOKEN: Final = "ray.token"
_APPLICATIONS: Final = "/api/serve/applications/"
_CURRENT: Final = "/v1/releases/current"
_FAILED: Final = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
_SHOWN: Final = 500
"""Characters of an answer or a failure that are repeated in a message."""


class _Place(BaseModel):
    """``serving.json``, as far as it is needed here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    serve_api: str
    pid: int = 0


class _Current(BaseModel):
    """The router's ``GET /v1/releases/current``, as far as it is needed here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    routing: Routing
    open: tuple[str, ...] = ()
    faults: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServeAddress:
    """Where a service is that no run directory tells of."""

    url: str
    """Of the router."""
    serve_api: str
    """Of the Ray dashboard."""
    token_file: Path | None = None
    """Ray's token, read at each use."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """The document as it was last seen or written, and where."""

    place: _Place
    config: Mapping[str, Any]


class ServeRestBackend:
    """``traffic.TrafficBackend`` over one Serve's REST API. Safe between threads.

    Args:
        where: a run directory that `reelway serve` serves, or an address.
        timeout_s: of one request to the dashboard, which answers in tens of milliseconds when it is well.
    """

    def __init__(self, where: RunDirectory | ServeAddress, *, timeout_s: float = 5.0) -> None:
        self._where = where
        self._http = httpx.Client(timeout=timeout_s, trust_env=False)
        self._lock = threading.Lock()
        self._seen: _Seen | None = None
        self._writes = 0

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def observe(self) -> TrafficObservation:
        """Look at Serve and at the router; see ``TrafficBackend.observe``."""
        writes = self._writes
        try:
            place = self._place()
            details = self._call("GET", place, None).json()
            config = config_of(details)
        except (RolloutError, ValueError) as error:
            with self._lock:
                self._seen = None
            return TrafficObservation(detail=str(error))
        with self._lock:
            if writes == self._writes:  # else it may be older than what was written meanwhile
                self._seen = _Seen(place, config)
        return self._observation(place, details["applications"], config)

    def apply(self, target: TrafficTarget) -> None:
        """Write the document with ``target`` in it, made from the last one seen; see ``TrafficBackend.apply``.

        One request, so that a way back to stable is as short as it can be. What is so already is not written.

        Raises:
            RolloutError: Serve could not be reached or refused it; its answer is in the message.
        """
        place = self._place()
        with self._lock:
            seen = self._seen
        if seen is None or seen.place != place:
            seen = _Seen(place, config_of(self._call("GET", place, None).json()))
        wanted = with_target(seen.config, target)
        if not _same(wanted, seen.config):
            self._write(place, wanted)

    def write(self, document: Mapping[str, Any]) -> None:
        """Write a whole document, whatever runs: for a backend in which it is kept elsewhere too.

        Raises:
            RolloutError: as ``apply``.
        """
        self._write(self._place(), document)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The document as it was last seen or written; None before, and while that is unknown."""
        with self._lock:
            return self._seen.config if self._seen else None

    def _write(self, place: _Place, document: Mapping[str, Any]) -> None:
        with self._lock:
            self._writes += 1
            self._seen = None  # until it is known to have been taken
        self._call("PUT", place, document)
        with self._lock:
            self._writes += 1
            self._seen = _Seen(place, document)

    def _observation(
        self, place: _Place, applications: Mapping[str, Any], config: Mapping[str, Any]
    ) -> TrafficObservation:
        releases = releases_in(config)
        status = {name: str(applications[name]["status"]) for name in (*releases, ROUTER) if name in applications}
        failed = {name: _account(applications[name]) for name in releases if status.get(name) in _FAILED}
        gave_up = frozenset(name for name in failed if status[name] == "DEPLOY_FAILED")
        if status.get(ROUTER) != "RUNNING":
            detail = f"the router is {_account(applications.get(ROUTER, {}))}"
            return TrafficObservation(None, releases, frozenset(), failed, gave_up, detail)
        try:
            current = self._current(place)
        except RolloutError as error:
            return TrafficObservation(None, releases, frozenset(), failed, gave_up, str(error))
        faults = {name: f"the router cannot open it: {_short(fault)}" for name, fault in current.faults.items()}
        ready = frozenset(name for name in releases if status.get(name) == "RUNNING" and name in current.open)
        detail = _difference(routing_in(config), current)
        seen = None if detail else current.routing
        return TrafficObservation(seen, releases, ready, faults | failed, gave_up, detail)

    def _place(self) -> _Place:
        if isinstance(self._where, ServeAddress):
            return _Place(url=self._where.url, serve_api=self._where.serve_api)
        path = self._where.path / SERVING_RECORD
        try:
            return _Place.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise RolloutError(f"{path} is not there: the service does not run; start `reelway serve`") from None
        except (OSError, ValidationError) as error:
            raise RolloutError(f"{path} does not say where the service is: {error}; restart `reelway serve`") from error

    def _call(self, method: str, place: _Place, document: Mapping[str, Any] | None) -> httpx.Response:
        url = place.serve_api.rstrip("/") + _APPLICATIONS
        told = self._where.token_file if isinstance(self._where, ServeAddress) else self._where.keys / RAY_TOKEN
        token = _token(told) if told else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self._asked(method, url, headers, document)

    def _current(self, place: _Place) -> _Current:
        answer = self._asked("GET", place.url.rstrip("/") + _CURRENT, {}, None)
        try:
            return _Current.model_validate_json(answer.content)
        except ValidationError as error:
            raise RolloutError(f"{answer.url}: not what a router says: {error.errors()[0]['msg']}") from error

    def _asked(
        self, method: str, url: str, headers: Mapping[str, str], document: Mapping[str, Any] | None
    ) -> httpx.Response:
        try:
            answer = self._http.request(method, url, headers=dict(headers), json=document)
        except httpx.HTTPError as error:
            raise RolloutError(f"{method} {url}: {type(error).__name__}: {error}; does the service run?") from error
        if answer.status_code != 200:
            hint = "; is keys/ray.token the service's?" if answer.status_code in (401, 403) else ""
            raise RolloutError(f"{method} {url} answered {answer.status_code}: {_short(answer.text)}{hint}")
        return answer


def _difference(told: Any, current: _Current) -> str:
    """What the router does otherwise than it was told; empty when every viewer goes where it was told."""
    try:
        wanted = Routing.model_validate(told)
    except ValidationError as error:
        return f"the router's user_config is no routing: {error.errors()[0]['msg']}"
    acted = current.routing
    if (acted.salt, acted.rollout, acted.arms) == (wanted.salt, wanted.rollout, wanted.arms):
        return ""
    closed = sorted(name[:12] for name in set(wanted.releases) - set(current.open))
    return "the router acts upon another routing than it was told" + (f"; not open there: {closed}" if closed else "")


def _account(application: Mapping[str, Any]) -> str:
    """Serve's own words on an application that does not run."""
    words = [str(application.get("message", ""))]
    for name, deployment in application.get("deployments", {}).items():
        if deployment.get("status") != "HEALTHY":
            words.append(f"{name} is {deployment.get('status')}: {deployment.get('message', '')}")
    said = "; ".join(_short(word) for word in words if word)
    return str(application.get("status", "absent")) + (f": {said}" if said else "")


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two documents are the same, whatever the order of their applications."""

    def ordered(config: Mapping[str, Any]) -> str:
        applications = sorted(config["applications"], key=lambda app: str(app["name"]))
        return json.dumps({**config, "applications": applications}, sort_keys=True)

    return ordered(one) == ordered(other)


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""  # a Ray without authentication; with it, the answer is 401 and says so
    except OSError as error:
        raise RolloutError(f"{path}: cannot read Ray's token: {error.strerror or error}") from error


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else "..." + text[-_SHOWN:]
