"""Starts Ray and the service on this machine and configures it through Serve's REST API, as on a cluster.

This module stops everything that it starts, in order: applications, Serve, Ray. Ray's processes stay in the process
group of the caller, which must be one of its own (``platform.cli.supervisor``): a signal to the group would end Ray's
control plane while Serve still needs it, and the proxy would be left behind. The REST API listens on 127.0.0.1 and
requires the run's token, because a client of the API can run code.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from reelway.platform.atomic_files import ensure_private_token
from reelway.platform.errors import ServingError
from reelway.platform.listen_address import url_host
from reelway.platform.rollout.control.webhook import serve_in_thread
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import compose_serve_config
from reelway.platform.rollout.traffic.serving_options import ServingOptions
from reelway.platform.stop_signals import ignored_stop_signals, preserved_stop_signals
from reelway.serving.access import InternalCredential
from reelway.serving.free_ports import find_free_port
from reelway.serving.internal_api import build_internal_api
from reelway.serving.serve_settings import haproxy_paths_and_ports
from reelway.serving.token_secrets import read_token_secrets

APPLICATIONS: Final = "/api/serve/applications/"
READY_TIMEOUT_S: Final = 180.0
LOCAL: Final = "127.0.0.1"


@dataclass(frozen=True)
class ServiceAddresses:
    """Addresses of the service, its internal API and Serve's REST API, and the file with the latter's bearer token."""

    url: str
    internal_url: str
    serve_api: str
    token: Path


@contextmanager
def running_service(
    routing: Routing, options: ServingOptions, token: Path, *, internal_port: int = 0
) -> Iterator[ServiceAddresses]:
    """Runs Ray and the service while the block runs; the service answers when the block is entered.

    Args:
        internal_port: port of the internal API; 0 chooses a free one.
        token: file of the REST API's token; created, readable by its owner only, if it does not exist.

    Raises:
        ServingError: if an application does not become healthy; the message includes Serve's messages.
    """
    options.metrics_dir.mkdir(parents=True, exist_ok=True)
    ensure_private_token(token)
    url = f"http://{url_host(options.host)}:{options.port}"
    internal_api = build_internal_api(url, InternalCredential(read_token_secrets(options.token_secrets)))
    with (
        serve_in_thread(internal_api, LOCAL, internal_port) as internal_url,
        tempfile.TemporaryDirectory(prefix="reelway-") as socket_dir,  # the path of a socket must be short
    ):
        authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        with _environment({**haproxy_paths_and_ports(Path(socket_dir)), **authentication}), _local_ray() as serve_api:
            addresses = ServiceAddresses(url, internal_url, serve_api, token)
            deploy(addresses, compose_serve_config(options, routing.releases, routing))
            yield addresses


def deploy(addresses: ServiceAddresses, document: Mapping[str, Any]) -> None:
    """Writes the Serve config and waits until all of its applications run and answer.

    Raises:
        ServingError: if Serve rejects the config, an application fails, or the wait exceeds ``READY_TIMEOUT_S``.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    with rest_client(addresses) as client:
        answer = _put_with_retry(client, deadline, document)
        if not answer.is_success:
            raise ServingError(f"Serve config: rejected with {answer.status_code}: {answer.text[:2000]}")
        _wait_until_running(client, {application["name"] for application in document["applications"]}, deadline)
    with httpx.Client(base_url=addresses.url, timeout=5, trust_env=False) as client:
        _wait_until_reachable(client, deadline)


def rest_client(addresses: ServiceAddresses) -> httpx.Client:
    """Returns a client of the REST API."""
    bearer = {"Authorization": f"Bearer {addresses.token.read_text().strip()}"}
    return httpx.Client(base_url=addresses.serve_api, headers=bearer, timeout=60, trust_env=False)


def _put_with_retry(client: httpx.Client, deadline: float, document: Mapping[str, Any]) -> httpx.Response:
    """Writes the Serve config and retries until the REST API, which starts shortly after Ray, accepts connections."""
    while True:
        try:
            return client.put(APPLICATIONS, json=document)
        except httpx.ConnectError as error:
            if time.monotonic() > deadline:
                raise ServingError(f"Ray's REST API {client.base_url}: no answer: {error}; see Ray's logs") from error
        time.sleep(0.1)


def _wait_until_running(client: httpx.Client, names: set[str], deadline: float) -> None:
    while True:
        applications = client.get(APPLICATIONS).raise_for_status().json()["applications"]
        statuses = {name: applications.get(name, {}).get("status", "NOT_STARTED") for name in names}
        if set(statuses.values()) == {"RUNNING"}:
            return
        failed = [name for name, status in statuses.items() if status == "DEPLOY_FAILED"]
        if failed or time.monotonic() > deadline:
            accounts = [_status_text(name, applications.get(name, {})) for name in failed or sorted(statuses)]
            raise ServingError("service: did not become healthy: " + "\n".join(accounts))
        time.sleep(0.1)


def _status_text(name: str, details: Mapping[str, Any]) -> str:
    """Returns Serve's messages about one application and its unhealthy deployments."""
    messages = [f"{name[:12]} is {details.get('status', 'NOT_STARTED')}", str(details.get("message", ""))]
    messages += [
        f"{deployment} is {status.get('status')}: {status.get('message', '')}"
        for deployment, status in details.get("deployments", {}).items()
        if status.get("status") != "HEALTHY"
    ]
    return "; ".join(message for message in messages if message)


def _wait_until_reachable(client: httpx.Client, deadline: float) -> None:
    """Waits until the proxy, which learns of running replicas with a delay, forwards requests to them."""
    while True:
        try:
            answer = client.get("/healthz")
            if answer.is_success:
                return
            last_answer = f"{answer.status_code} {answer.text[:200]}"
        except httpx.HTTPError as error:
            last_answer = str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise ServingError(
                f"{client.base_url}: the applications run, but the proxy does not reach them: {last_answer}"
            )
        time.sleep(0.05)


@contextmanager
def _local_ray() -> Iterator[str]:
    """Starts Ray with its dashboard server, which has the REST API, and yields the server's address."""
    with warnings.catch_warnings():
        # Ray Serve's own use of pydantic; users of `reelway serve` can do nothing about it.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.serve\.")
        import ray  # Ray reads its settings from the environment on import
        from ray import serve

    port = find_free_port(LOCAL)
    with preserved_stop_signals():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, 2),
            include_dashboard=True,
            dashboard_host=LOCAL,
            dashboard_port=port,
            log_to_driver=False,
            logging_level="warning",
            namespace="reelway",
        )
    try:
        yield f"http://{LOCAL}:{port}"
    finally:
        with ignored_stop_signals():
            serve.shutdown()
            ray.shutdown()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
