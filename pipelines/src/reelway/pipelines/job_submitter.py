"""The program of a RayJob's submitter pod: ``python -m reelway.pipelines.job_submitter ENTRYPOINT``.

It submits the job under the id that KubeRay set, unless an earlier pod has already submitted it. Ray accepts jobs only
some time after it has started, so the submission is repeated until Ray has an agent for it. Then it prints the
job's log until the job has ended. KubeRay reads the job's status from Ray, so a failed job is no failure of this
program. The program fails only if the log is interrupted, and Kubernetes then starts another pod, which continues.

The default submitter runs Ray's command line three times, and each start delays the job by seconds of CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Final

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient
from tenacity import RetryError, Retrying, retry_if_exception, stop_after_attempt, wait_fixed

ADDRESS_VARIABLE: Final = "RAY_DASHBOARD_ADDRESS"
SUBMISSION_ID_VARIABLE: Final = "RAY_JOB_SUBMISSION_ID"
"""Environment variables that KubeRay sets in the submitter's container."""
AGENT_ATTEMPTS: Final = 15
"""Number of submissions while Ray has no agent. Ray itself waits 10 s for an agent in each of them."""
AGENT_WAIT_S: Final = 2.0
_NO_AGENT: Final = "No available agent to submit job"
"""Part of Ray's error message while its job agents start."""
_ALREADY_EXISTS: Final = "already exists"
"""Part of Ray's error message for an id that was submitted before."""


class AgentMissingError(RuntimeError):
    """No node of Ray's cluster had an agent that starts jobs within the time."""


def submit(
    client: JobSubmissionClient, submission_id: str, entrypoint: str, *, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Submits the job. Returns False if it had been submitted before.

    Raises:
        AgentMissingError: if Ray had no agent for the job in all of ``AGENT_ATTEMPTS``.
        RuntimeError: if Ray rejects the job; the message is Ray's.
    """
    submit_again = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, RuntimeError) and _NO_AGENT in str(error)),
        stop=stop_after_attempt(AGENT_ATTEMPTS),
        wait=wait_fixed(AGENT_WAIT_S),
        sleep=sleep,
    )
    try:
        submit_again(client.submit_job, entrypoint=entrypoint, submission_id=submission_id)
    except RetryError as error:
        raise AgentMissingError(
            f"none of {AGENT_ATTEMPTS} submissions found a job agent on a node of the Ray cluster; check the log of "
            "the head's dashboard agent (/tmp/ray/session_latest/logs/dashboard_agent.log)"
        ) from error
    except RuntimeError as error:
        if _ALREADY_EXISTS not in str(error):
            raise
        return False
    return True


async def print_log(client: JobSubmissionClient, submission_id: str) -> None:
    """Prints the job's log from its first line until the job has ended.

    Raises:
        RuntimeError: if the log is interrupted, or the job does not exist.
    """
    async for lines in client.tail_job_logs(submission_id):
        print(lines, end="", flush=True)


def main() -> int:
    """Returns the exit code.

    0: the whole log was printed. 1: the log was interrupted, or the job was not accepted. 2: an environment variable is
    missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m reelway.pipelines.job_submitter",
        description=f"Submit a Ray job as {SUBMISSION_ID_VARIABLE} to {ADDRESS_VARIABLE} and print its log.",
    )
    parser.add_argument("entrypoint", help="Command line of the job, in shell syntax.")
    options = parser.parse_args()
    address, submission_id = os.environ.get(ADDRESS_VARIABLE, ""), os.environ.get(SUBMISSION_ID_VARIABLE, "")
    if not address or not submission_id:
        actual = f"{ADDRESS_VARIABLE}={address!r} and {SUBMISSION_ID_VARIABLE}={submission_id!r}"
        expected = "host and port of Ray's dashboard, and an id; KubeRay sets both in a submitter pod"
        print(f"error: {actual}, expected {expected}", file=sys.stderr)
        return 2
    try:
        client = JobSubmissionClient(address if "://" in address else f"http://{address}")
        if not submit(client, submission_id, options.entrypoint):
            print(f"job {submission_id} was submitted before; its log follows", file=sys.stderr)
        asyncio.run(print_log(client, submission_id))
    except (RuntimeError, ConnectionError, aiohttp.ClientError, RayError) as error:
        print(f"error: job {submission_id} at {address}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
