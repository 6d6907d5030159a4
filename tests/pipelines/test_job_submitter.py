"""What a submitter's pod runs, against Ray's own job server: submitted once, however many pods come, its log whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from reelway.platform.rollout.control.bearer_token import ensure_bearer_token

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_RAY = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_port=int(sys.argv[1]), log_to_driver=False,
         logging_level="warning")
print("up", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@dataclass(frozen=True)
class Server:
    """A Ray with a job server."""

    address: str
    token: Path

    def submitter(self, submission_id: str, entrypoint: str) -> subprocess.CompletedProcess[str]:
        """A pod of this job, ended."""
        given = {"RAY_DASHBOARD_ADDRESS": self.address, "RAY_JOB_SUBMISSION_ID": submission_id}
        return subprocess.run(
            [sys.executable, "-m", "reelway.pipelines.job_submitter", entrypoint], text=True, capture_output=True,
            env=with_token(self.token) | given, timeout=120, check=False,
        )  # fmt: skip


def with_token(token: Path) -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    token = tmp_path_factory.mktemp("ray") / "token"
    ensure_bearer_token(token)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", _RAY, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, env=with_token(token),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        yield Server(f"127.0.0.1:{port}", token)
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.communicate("", timeout=60)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_the_log_is_printed_whole_and_a_second_pod_submits_nothing(server: Server, tmp_path: Path) -> None:
    job, ran = uuid.uuid4().hex, tmp_path / "ran"
    entrypoint = f"sh -c 'echo once >> {ran}; seq 3; sleep 2; echo the end'"
    first = server.submitter(job, entrypoint)
    assert first.returncode == 0, first.stderr
    assert [line for line in first.stdout.splitlines() if line in ("1", "2", "3", "the end")] == [
        "1",
        "2",
        "3",
        "the end",
    ]
    second = server.submitter(job, entrypoint)
    assert second.returncode == 0, second.stderr
    assert "was submitted before" in second.stderr
    assert second.stdout.splitlines()[-1] == "the end"
    assert ran.read_text() == "once\n"


def test_how_a_job_ended_is_not_the_submitters_to_say(server: Server) -> None:
    """Kubernetes would start another pod for one that failed, which would print the same log again."""
    said = server.submitter(uuid.uuid4().hex, "sh -c 'echo last words; exit 3'")
    assert said.returncode == 0, said.stderr
    assert "last words" in said.stdout


def test_without_the_right_token_it_is_refused_and_submits_nothing(server: Server, tmp_path: Path) -> None:
    ensure_bearer_token(tmp_path / "other")
    said = Server(server.address, tmp_path / "other").submitter("job-2", f"touch {tmp_path}/ran")
    assert said.returncode == 1
    assert f"error: job job-2 at {server.address}: " in said.stderr
    assert not (tmp_path / "ran").exists()


def test_where_nobody_listens_it_fails_and_says_where(tmp_path: Path) -> None:
    said = Server("127.0.0.1:1", tmp_path / "none").submitter("job-1", "true")
    assert said.returncode == 1
    assert "job job-1 at 127.0.0.1:1" in said.stderr


def test_without_what_kuberay_sets_it_says_what_is_missing(tmp_path: Path) -> None:
    said = Server("", tmp_path / "none").submitter("", "true")
    assert said.returncode == 2
    assert "RAY_DASHBOARD_ADDRESS='' and RAY_JOB_SUBMISSION_ID=''" in said.stderr
