"""Runs a Ray Serve application at a host with the service's settings: ``serve_at_host HOST``.

Prints the status code of a request to each loopback address, IPv4's first.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from reelway.serving.free_ports import find_free_port
from reelway.serving.serve_settings import SERVE_SETTINGS, haproxy_paths_and_ports

READY_S = 30.0


def main(host: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rw-") as folder:
        os.environ.update(SERVE_SETTINGS | haproxy_paths_and_ports(Path(folder)) | {"RAY_AUTH_MODE": "disabled"})
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions

        @serve.deployment
        def answer(_: Any) -> str:
            return "ok"

        port = find_free_port("127.0.0.1")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
        try:
            serve.start(http_options=HTTPOptions(host=host, port=port))
            serve.run(answer.bind(), name="one", route_prefix="/one")
            for loopback in ("127.0.0.1", "[::1]"):
                print(status_of(f"http://{loopback}:{port}/one"), flush=True)
        finally:
            serve.shutdown()
            ray.shutdown()


def status_of(url: str) -> int:
    """Status code of a request; 0 if nothing answers within ``READY_S``."""
    deadline, status = time.monotonic() + READY_S, 0
    with closing(httpx.Client(timeout=3)) as client:
        while status != httpx.codes.OK and time.monotonic() < deadline:
            try:
                status = client.get(url).status_code
            except httpx.HTTPError:
                time.sleep(0.2)
    return status


if __name__ == "__main__":
    main(sys.argv[1])
