"""The two programs beside Ray in a pod, against a real HTTP server and real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from reelway.serving.document_keeper import keep_document
from reelway.serving.free_ports import free_port

DOCUMENT = {"applications": [{"name": "router"}]}


class Serve(BaseHTTPRequestHandler):
    """What Serve's REST API answers, as far as it is asked."""

    applications: dict[str, Any]
    writes: int

    def do_GET(self) -> None:
        self._answer({"applications": Serve.applications})

    def do_PUT(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Serve.applications = {one["name"]: {} for one in document["applications"]}
        Serve.writes += 1
        self._answer({})

    def _answer(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    Serve.applications, Serve.writes = {}, 0
    server = HTTPServer(("127.0.0.1", 0), Serve)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", trust_env=False) as opened:
        yield opened
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_serve_without_a_router_is_told_what_to_run(client: httpx.Client) -> None:
    assert keep_document(client, DOCUMENT)
    assert set(Serve.applications) == {"router"}


def test_what_a_rollout_made_of_it_is_left_alone(client: httpx.Client) -> None:
    Serve.applications = {"router": {}, "canary": {}}
    assert not keep_document(client, DOCUMENT)
    assert (Serve.writes, set(Serve.applications)) == (0, {"router", "canary"})


def test_a_pods_metrics_are_the_sum_of_its_processes(tmp_path: Path) -> None:
    count = "from prometheus_client import Counter; Counter('reelway_test_total', 'x').inc(2)"
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], env=environment, check=True)
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "reelway.serving.node_metrics", "--port", str(port)]
    answering = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert "reelway_test_total 4.0" in text
    finally:
        answering.terminate()
        assert answering.wait(10) == 0
