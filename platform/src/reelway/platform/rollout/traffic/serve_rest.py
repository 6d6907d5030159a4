"""Traffic backend over Ray Serve's REST API, used in local mode.

Imports no Ray. The address and the token of the service are read on every request, so that a restarted service is found
again. Every request has a timeout.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reelway.platform.errors import RolloutError
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import (
    ROUTER,
    config_from_details,
    find_routing,
    release_names,
    with_target,
)
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget
from reelway.platform.run_directory import RunDirectory

log = logging.getLogger(__name__)

SERVING_RECORD: Final = "serving.json"
RAY_TOKEN: Final = "ray.token"
_APPLICATIONS: Final = "/api/serve/applications/"
_CURRENT: Final = "/v1/releases/current"
_FAILED: Final = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
_SHOWN: Final = 500
"""Maximum characters of a response or failure in a message."""


class _ServingRecord(BaseModel):
    """``serving.json``: the fields that the backend uses."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    internal_url: str
    serve_api: str
    pid: int = 0


class _RouterStatus(BaseModel):
    """The router's ``GET /v1/releases/current``: the fields that the backend uses."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    routing: Routing
    open: tuple[str, ...] = ()
    faults: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServeAddress:
    """Address of a service without a run directory."""

    internal_url: str
    """URL of the internal API."""
    serve_api: str
    """URL of the Ray dashboard."""
    token_file: Path | None = None
    """File with Ray's token, read on every request."""


@dataclass(frozen=True, slots=True)
class _CachedConfig:
    """The Serve config that was last read or written, and the service it belongs to."""

    record: _ServingRecord
    config: Mapping[str, Any]


class ServeRestBackend:
    """``TrafficBackend`` over the REST API of one Ray Serve. Thread-safe.

    Args:
        service: a run directory that `reelway serve` serves, or an address.
        timeout_s: timeout of a request to the dashboard, which normally responds within tens of milliseconds.
        before_write: called right before each write; a RolloutError prevents the write.
        before_rollback: called instead of it before a rollback that is not recorded; by default ``before_write``.
    """

    def __init__(
        self,
        service: RunDirectory | ServeAddress,
        *,
        timeout_s: float = 5.0,
        before_write: Callable[[], None] = lambda: None,
        before_rollback: Callable[[], None] | None = None,
    ) -> None:
        self._service = service
        self._before_write = before_write
        self._before_rollback = before_rollback or before_write
        self._http = httpx.Client(timeout=timeout_s, trust_env=False)
        self._lock = threading.Lock()
        self._cached_config: _CachedConfig | None = None
        self._writes = 0

    def close(self) -> None:
        self._http.close()

    def observe(self) -> TrafficObservation:
        """Reads the state of Serve and of the router; see ``TrafficBackend.observe``."""
        writes = self._writes
        try:
            record = self._read_serving_record()
            details = self._call("GET", record, None).json()
            config = config_from_details(details)
        except (RolloutError, ValueError) as error:
            with self._lock:
                self._cached_config = None
            return TrafficObservation(detail=str(error))
        with self._lock:
            if writes == self._writes:  # else it may be older than a config written meanwhile
                self._cached_config = _CachedConfig(record, config)
        return self._observation(record, details["applications"], config)

    def apply(self, target: TrafficTarget) -> None:
        """Applies a target to the cached Serve config and writes it; see ``TrafficBackend.apply``.

        Sends a single request, so that a rollback is as fast as possible, and none if the config does not change.

        Raises:
            RolloutError: if Serve is not reachable or rejects the config, with its response, or if ``before_write``
                prevents the write.
        """
        record = self._read_serving_record()
        with self._lock:
            cached = self._cached_config
        if cached is None or cached.record != record:
            cached = _CachedConfig(record, config_from_details(self._call("GET", record, None).json()))
        config = with_target(cached.config, target)
        if not _equal_configs(config, cached.config):
            self._write(record, config)

    def write(self, document: Mapping[str, Any]) -> None:
        """Writes a complete Serve config, for backends that also store the config elsewhere.

        Raises:
            RolloutError: if the write fails, as in ``apply``.
        """
        self._write(self._read_serving_record(), document)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The Serve config that was last read or written; None if it is unknown."""
        with self._lock:
            return self._cached_config.config if self._cached_config else None

    def _write(self, record: _ServingRecord, document: Mapping[str, Any]) -> None:
        routing = _configured_routing(document)
        guard = self._before_rollback if routing and routing.rollback else self._before_write
        guard()
        with self._lock:
            self._writes += 1
            self._cached_config = None  # unknown until Serve has accepted the config
        self._call("PUT", record, document)
        with self._lock:
            self._writes += 1
            self._cached_config = _CachedConfig(record, document)

    def _observation(
        self, record: _ServingRecord, applications: Mapping[str, Any], config: Mapping[str, Any]
    ) -> TrafficObservation:
        releases = release_names(config)
        routing = _configured_routing(config)
        status = {name: str(applications[name]["status"]) for name in (*releases, ROUTER) if name in applications}
        failed = {name: _application_message(applications[name]) for name in releases if status.get(name) in _FAILED}
        given_up = frozenset(name for name in failed if status[name] == "DEPLOY_FAILED")
        if status.get(ROUTER) != "RUNNING":
            detail = f"the router is {_application_message(applications.get(ROUTER, {}))}"
            return TrafficObservation(None, releases, frozenset(), failed, given_up, detail, routing)
        try:
            current = self._current(record)
        except RolloutError as error:
            return TrafficObservation(None, releases, frozenset(), failed, given_up, str(error), routing)
        faults = {name: f"the router cannot open it: {_short(fault)}" for name, fault in current.faults.items()}
        ready = frozenset(name for name in releases if status.get(name) == "RUNNING" and name in current.open)
        detail = _routing_difference(find_routing(config), current)
        cached = None if detail else current.routing
        return TrafficObservation(cached, releases, ready, faults | failed, given_up, detail, routing)

    def _read_serving_record(self) -> _ServingRecord:
        if isinstance(self._service, ServeAddress):
            return _ServingRecord(internal_url=self._service.internal_url, serve_api=self._service.serve_api)
        path = self._service.path / SERVING_RECORD
        try:
            return _ServingRecord.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise RolloutError(f"{path} does not exist: the service is not running; start `reelway serve`") from None
        except (OSError, ValidationError) as error:
            raise RolloutError(f"{path}: not a valid serving record: {error}; restart `reelway serve`") from error

    def _call(self, method: str, record: _ServingRecord, document: Mapping[str, Any] | None) -> httpx.Response:
        url = record.serve_api.rstrip("/") + _APPLICATIONS
        token_file = (
            self._service.token_file if isinstance(self._service, ServeAddress) else self._service.keys / RAY_TOKEN
        )
        token = _token(token_file) if token_file else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self._request(method, url, headers, document)

    def _current(self, record: _ServingRecord) -> _RouterStatus:
        answer = self._request("GET", record.internal_url.rstrip("/") + _CURRENT, {}, None)
        try:
            return _RouterStatus.model_validate_json(answer.content)
        except ValidationError as error:
            raise RolloutError(f"{answer.url}: not a router's response: {error.errors()[0]['msg']}") from error

    def _request(
        self, method: str, url: str, headers: Mapping[str, str], document: Mapping[str, Any] | None
    ) -> httpx.Response:
        try:
            answer = self._http.request(method, url, headers=dict(headers), json=document)
        except httpx.HTTPError as error:
            raise RolloutError(
                f"{method} {url}: {type(error).__name__}: {error}; check that the service is running"
            ) from error
        if answer.status_code != 200:
            hint = "; check that keys/ray.token is the service's token" if answer.status_code in (401, 403) else ""
            raise RolloutError(f"{method} {url} answered {answer.status_code}: {_short(answer.text)}{hint}")
        return answer


def _configured_routing(config: Mapping[str, Any]) -> Routing | None:
    """Returns the routing of a Serve config; None if it has no valid one."""
    try:
        return Routing.model_validate(find_routing(config))
    except ValidationError:
        return None


def _routing_difference(user_config: Any, current: _RouterStatus) -> str:
    """Returns how the router's routing differs from the configured one; empty if they agree."""
    try:
        configured = Routing.model_validate(user_config)
    except ValidationError as error:
        return f"the router's user_config is not a routing: {error.errors()[0]['msg']}"
    applied = current.routing
    if (applied.salt, applied.rollout, applied.arms) == (configured.salt, configured.rollout, configured.arms):
        return ""
    closed = sorted(name[:12] for name in set(configured.releases) - set(current.open))
    return "the router has not applied its configured routing" + (f"; releases not open: {closed}" if closed else "")


def _application_message(application: Mapping[str, Any]) -> str:
    """Returns Serve's messages about an application that is not running."""
    messages = [str(application.get("message", ""))]
    for name, deployment in application.get("deployments", {}).items():
        if deployment.get("status") != "HEALTHY":
            messages.append(f"{name} is {deployment.get('status')}: {deployment.get('message', '')}")
    text = "; ".join(_short(message) for message in messages if message)
    return str(application.get("status", "absent")) + (f": {text}" if text else "")


def _equal_configs(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Returns whether two Serve configs are equal, regardless of the order of applications."""

    def ordered(config: Mapping[str, Any]) -> str:
        applications = sorted(config["applications"], key=lambda app: str(app["name"]))
        return json.dumps({**config, "applications": applications}, sort_keys=True)

    return ordered(first) == ordered(second)


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""  # Ray without authentication; with authentication Ray responds with 401
    except OSError as error:
        raise RolloutError(f"{path}: cannot read Ray's token: {error.strerror or error}") from error


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else "..." + text[-_SHOWN:]
