"""Why: a job begins when its submitter has spoken to Ray, and Ray's command line starts three times before it has.

``python -m reelway.pipelines.job_submitter ENTRYPOINT`` is what the submitter's pod of a RayJob runs: it submits under
the id that KubeRay gave, or finds that a pod before it did, and prints the job's log until the job has ended. How it
ended is KubeRay's to say: this process fails only when the log broke off, so that another pod goes on with it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import Final

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

ADDRESS_VARIABLE: Final = "RAY_DASHBOARD_ADDRESS"
SUBMISSION_ID_VARIABLE: Final = "RAY_JOB_SUBMISSION_ID"
"""Environment variables that KubeRay sets in the submitter's container."""
_ALREADY_EXISTS: Final = "already exists"
"""Of Ray's answer to an id that it has."""


def submit(client: JobSubmissionClient, submission_id: str, entrypoint: str) -> bool:
    """Start the job. False where it had been before.

    Raises:
        RuntimeError: Ray refused it, in Ray's words.
    """
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=submission_id)
    except RuntimeError as error:
        if _ALREADY_EXISTS not in str(error):
            raise
        return False
    return True


async def print_log(client: JobSubmissionClient, submission_id: str) -> None:
    """The job's log from its first line until the job has ended.

    Raises:
        RuntimeError: it broke off, or there is no such job.
    """
    async for lines in client.tail_job_logs(submission_id):
        print(lines, end="", flush=True)


def main() -> int:
    """0 when the log was printed whole, 1 when it broke off or nobody took the job, 2 for a wrong environment."""
    parser = argparse.ArgumentParser(
        prog="python -m reelway.pipelines.job_submitter",
        description=f"Submit a Ray job as {SUBMISSION_ID_VARIABLE} to {ADDRESS_VARIABLE} and print its log.",
    )
    parser.add_argument("entrypoint", help="the job's command line, as a shell would read it")
    options = parser.parse_args()
    address, submission_id = os.environ.get(ADDRESS_VARIABLE, ""), os.environ.get(SUBMISSION_ID_VARIABLE, "")
    if not address or not submission_id:
        seen = f"{ADDRESS_VARIABLE}={address!r} and {SUBMISSION_ID_VARIABLE}={submission_id!r}"
        wanted = "the host and port of Ray's dashboard, and an id; KubeRay sets both in a submitter's pod"
        print(f"error: {seen}, expected {wanted}", file=sys.stderr)
        return 2
    try:
        client = JobSubmissionClient(address if "://" in address else f"http://{address}")
        if not submit(client, submission_id, options.entrypoint):
            print(f"job {submission_id} was submitted before; this is its log", file=sys.stderr)
        asyncio.run(print_log(client, submission_id))
    except (RuntimeError, ConnectionError, aiohttp.ClientError, RayError) as error:
        print(f"error: job {submission_id} at {address}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
