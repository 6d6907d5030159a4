"""Runs the applications of ``noop_applications`` on a separate Ray until standard input ends: ``noop_service RUN``.

Writes ``serving.json`` as ``reelway serve`` does, once all applications are running.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import httpx


def main(run: Path) -> None:
    token = run / "keys" / "ray.token"
    os.environ.update(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), PYTHONPATH=str(Path.cwd()), RAY_SERVE_LOG_TO_STDERR="0"
    )
    import ray
    from ray import serve
    from tests.support.rollout.noop_document import document

    from reelway.platform.rollout.control.bearer_token import ensure_bearer_token
    from reelway.platform.rollout.traffic.routing import Routing

    bearer, api_port, port = ensure_bearer_token(token), _free_port(), _free_port()
    ray.init(
        address="local", num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=api_port,
        log_to_driver=False, logging_level="warning", namespace="reelway",
    )  # fmt: skip
    try:
        api = f"http://127.0.0.1:{api_port}"
        with httpx.Client(base_url=api, headers={"Authorization": f"Bearer {bearer}"}, timeout=60) as client:
            config = document(Routing.single_release("old"), port)
            while True:
                try:
                    answer = client.put("/api/serve/applications/", json=config)
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            assert answer.is_success, answer.text
            while True:
                running = client.get("/api/serve/applications/").json()["applications"]
                if {name: one["status"] for name, one in running.items()} == dict.fromkeys(
                    (one["name"] for one in config["applications"]), "RUNNING"
                ):
                    break
                time.sleep(0.1)
        url = f"http://127.0.0.1:{port}"
        record = {"url": url, "internal_url": url, "serve_api": api, "pid": os.getpid(), "release": "old"}
        (run / "serving.json").write_text(json.dumps(record))
        print("running", flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
