"""The submitter pod's program against Ray's job server: one submission by any number of pods, and a complete log."""

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
from typing import Final, cast

import pytest
from ray.dashboard.modules.job import job_head
from ray.job_submission import JobSubmissionClient

from reelway.pipelines.job_submitter import AGENT_ATTEMPTS, AGENT_WAIT_S, AgentMissingError, submit
from reelway.platform.rollout.control.bearer_token import ensure_bearer_token

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NO_AGENT: Final = "No available agent to submit job, please try again later"
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
    """Address and token of Ray's job server."""

    address: str
    token: Path

    def submitter(self, submission_id: str, entrypoint: str) -> subprocess.CompletedProcess[str]:
        """Runs the program of one submitter pod of the job until it ends."""
        variables = {"RAY_DASHBOARD_ADDRESS": self.address, "RAY_JOB_SUBMISSION_ID": submission_id}
        return subprocess.run(
            [sys.executable, "-m", "reelway.pipelines.job_submitter", entrypoint], text=True, capture_output=True,
            env=with_token(self.token) | variables, timeout=120, check=False,
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


def test_second_pod_prints_the_log_without_a_submission(server: Server, tmp_path: Path) -> None:
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


def test_submitter_of_a_failed_job_exits_with_0(server: Server) -> None:
    """After another exit code, Kubernetes would start another pod, which would print the same log again."""
    result = server.submitter(uuid.uuid4().hex, "sh -c 'echo last words; exit 3'")
    assert result.returncode == 0, result.stderr
    assert "last words" in result.stdout


def test_submission_with_a_wrong_token_fails(server: Server, tmp_path: Path) -> None:
    ensure_bearer_token(tmp_path / "other")
    result = Server(server.address, tmp_path / "other").submitter("job-2", f"touch {tmp_path}/ran")
    assert result.returncode == 1
    assert f"error: job job-2 at {server.address}: " in result.stderr
    assert not (tmp_path / "ran").exists()


def test_unreachable_job_server_error_names_the_address(tmp_path: Path) -> None:
    result = Server("127.0.0.1:1", tmp_path / "none").submitter("job-1", "true")
    assert result.returncode == 1
    assert "job job-1 at 127.0.0.1:1" in result.stderr


class StartingRay:
    """Ray's job server whose agents start with a delay.

    Args:
        attempts: number of submissions that find no agent.
    """

    def __init__(self, attempts: int) -> None:
        self.attempts_left, self.submitted, self.slept_s = attempts, list[str](), 0.0

    def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
        if self.attempts_left:
            self.attempts_left -= 1
            raise RuntimeError(f"Request failed with status code 500: {NO_AGENT}.")
        self.submitted.append(f"{submission_id}: {entrypoint}")
        return submission_id

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


def test_submission_waits_for_an_agent() -> None:
    ray = StartingRay(3)
    assert submit(cast(JobSubmissionClient, ray), "job-1", "true", sleep=ray.sleep)
    assert ray.submitted == ["job-1: true"]
    assert ray.slept_s == 3 * AGENT_WAIT_S


def test_submission_without_an_agent_fails_in_the_end() -> None:
    ray = StartingRay(1_000)
    with pytest.raises(AgentMissingError, match=f"none of {AGENT_ATTEMPTS} submissions found a job agent"):
        submit(cast(JobSubmissionClient, ray), "job-1", "true", sleep=ray.sleep)
    assert (ray.submitted, ray.slept_s) == ([], (AGENT_ATTEMPTS - 1) * AGENT_WAIT_S)


def test_message_about_missing_agents_is_rays() -> None:
    assert NO_AGENT in Path(job_head.__file__).read_text()


def test_missing_environment_variables_are_named(tmp_path: Path) -> None:
    result = Server("", tmp_path / "none").submitter("", "true")
    assert result.returncode == 2
    assert "RAY_DASHBOARD_ADDRESS='' and RAY_JOB_SUBMISSION_ID=''" in result.stderr
