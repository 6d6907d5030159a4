"""Ray and the service on this machine, told by Serve's REST API what to run, as a cluster would be.

Whatever is started here is ended here. The REST API listens on 127.0.0.1 and wants the run's own token, because
whoever may write there may run code.
"""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from reelway.platform.errors import ServingError
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import compose_serve_config
from reelway.platform.rollout.traffic.serving_options import ServingOptions
from reelway.serving.free_ports import free_port
from reelway.serving.serve_settings import own_haproxy_places

APPLICATIONS: Final = "/api/serve/applications/"
READY_S: Final = 180.0
LOCAL: Final = "127.0.0.1"


@dataclass(frozen=True)
class ServiceAddresses:
    """Where the service answers, and where it is told what to run (with the bearer token of ``token``)."""

    url: str
    serve_api: str
    token: Path


@contextmanager
def running_service(routing: Routing, options: ServingOptions, token: Path) -> Iterator[ServiceAddresses]:
    """Ray and the service, from answering until the block is left.

    Args:
        token: file of the REST API's token; made, readable by its owner only, where there is none.

    Raises:
        ServingError: an application did not become healthy; Serve's own account is in the message.
    """
    options.metrics_dir.mkdir(parents=True, exist_ok=True)
    make_token(token)
    with tempfile.TemporaryDirectory(prefix="reelway-") as place:  # a socket's path must be short
        authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        with _environment({**own_haproxy_places(Path(place)), **authentication}), _local_ray() as serve_api:
            addresses = ServiceAddresses(f"http://{options.host}:{options.port}", serve_api, token)
            deploy(addresses, compose_serve_config(options, routing.releases, routing))
            yield addresses


def make_token(path: Path) -> None:
    """Write a new token, unless there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as handle:
        handle.write(secrets.token_hex(32))


def deploy(addresses: ServiceAddresses, document: Mapping[str, Any]) -> None:
    """Write the document and wait until all of its applications run and answer.

    Raises:
        ServingError: it was refused, an application failed, or it took longer than ``READY_S``.
    """
    deadline = time.monotonic() + READY_S
    with rest_client(addresses) as client:
        answer = _patiently(client, deadline, document)
        if not answer.is_success:
            raise ServingError(f"Serve refused the configuration ({answer.status_code}): {answer.text[:2000]}")
        _wait_until_running(client, {one["name"] for one in document["applications"]}, deadline)
    with httpx.Client(base_url=addresses.url, timeout=5, trust_env=False) as client:
        _wait_until_reached(client, deadline)


def rest_client(addresses: ServiceAddresses) -> httpx.Client:
    """A client of the REST API."""
    bearer = {"Authorization": f"Bearer {addresses.token.read_text().strip()}"}
    return httpx.Client(base_url=addresses.serve_api, headers=bearer, timeout=60, trust_env=False)


def _patiently(client: httpx.Client, deadline: float, document: Mapping[str, Any]) -> httpx.Response:
    """The REST API comes up a moment after Ray."""
    while True:
        try:
            return client.put(APPLICATIONS, json=document)
        except httpx.ConnectError as error:
            if time.monotonic() > deadline:
                raise ServingError(f"Ray's REST API at {client.base_url} does not answer: {error}") from error
        time.sleep(0.1)


def _wait_until_running(client: httpx.Client, names: set[str], deadline: float) -> None:
    while True:
        seen = client.get(APPLICATIONS).raise_for_status().json()["applications"]
        statuses = {name: seen.get(name, {}).get("status", "NOT_STARTED") for name in names}
        if set(statuses.values()) == {"RUNNING"}:
            return
        failed = [name for name, status in statuses.items() if status == "DEPLOY_FAILED"]
        if failed or time.monotonic() > deadline:
            accounts = [_account(name, seen.get(name, {})) for name in failed or sorted(statuses)]
            raise ServingError("the service did not become healthy: " + "\n".join(accounts))
        time.sleep(0.1)


def _account(name: str, details: Mapping[str, Any]) -> str:
    """Serve's own words on one application."""
    words = [f"{name[:12]} is {details.get('status', 'NOT_STARTED')}", str(details.get("message", ""))]
    words += [
        f"{deployment} is {one.get('status')}: {one.get('message', '')}"
        for deployment, one in details.get("deployments", {}).items()
        if one.get("status") != "HEALTHY"
    ]
    return "; ".join(word for word in words if word)


def _wait_until_reached(client: httpx.Client, deadline: float) -> None:
    """Running replicas are reached through a proxy that hears of them a moment later."""
    while True:
        try:
            answer = client.get("/healthz")
            if answer.is_success:
                return
            seen = f"{answer.status_code} {answer.text[:200]}"
        except httpx.HTTPError as error:
            seen = str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise ServingError(f"the applications run, but {client.base_url} does not lead to them: {seen}")
        time.sleep(0.05)


@contextmanager
def _local_ray() -> Iterator[str]:
    """Ray with its dashboard's server, which is where the REST API is. Yields that server's address."""
    import ray  # its settings are read from the environment when it is imported
    from ray import serve

    port = free_port(LOCAL)
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
        with _uninterrupted():
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


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C while things are being ended must not leave half of them running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
