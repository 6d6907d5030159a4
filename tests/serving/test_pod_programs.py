"""The program beside Ray in a pod, as a real process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from reelway.serving.free_ports import find_free_port


def test_pod_metrics_sum_over_the_processes_of_the_pod(tmp_path: Path) -> None:
    count = "from prometheus_client import Counter; Counter('reelway_test_total', 'x').inc(2)"
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], env=environment, check=True)
    port = find_free_port("127.0.0.1")
    command = [sys.executable, "-m", "reelway.serving.pod_metrics", "--port", str(port)]
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
