"""Follows a job: prints its log, why it does not start, and ends with an exit code for scripts.

======  ========================================================================================================
code    meaning
======  ========================================================================================================
0       the job succeeded (or was submitted, with ``--detach``)
1 - 12  the command's own exit code: 2 usage, 3 data, 4 features, 5 training, 6 release rejected, ...
2       also: no kubeconfig, no Reelway or KubeRay in the namespace, an invalid option
7       also: the API server cannot be reached or rejects the request
13      the command did not end on its own: it never started, timed out, lost its pods or was stopped
130     Ctrl-C; the message states whether the job continues
other   a signal ended the command: 128 + its number (137: killed, usually for exceeding its memory limit)
======  ========================================================================================================

The first Ctrl-C asks whether to stop the job, and a second one leaves it running. Without a terminal the job continues.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rich.markup import escape

from reelway.platform.cli.rollout.location import print_unwrapped
from reelway.platform.cli.terminal import stderr_console
from reelway.platform.errors import CommandFailedError, JobError, KubernetesError

if TYPE_CHECKING:
    from reelway.platform.cluster.ray_job import RayJobs
    from reelway.platform.cluster.ray_job_status import RayJobStatus, StartupProblem

POLL_S: Final = 1.0
LOG_DRAIN_TIMEOUT_S: Final = 20.0
"""How long to wait for the rest of the log after the job has ended."""
API_OUTAGE_TIMEOUT_S: Final = 300.0
"""A longer outage of the API server is an error of the command; the job continues."""
TAIL_LINES: Final = 20
_SHOWN: Final = 500
_RAY_CLIENT_LOG_LINE: Final = re.compile(
    r"\d{4}-\d\d-\d\d [\d:,]+\t(INFO|SUCC|WARN|ERR) (cli|sdk|job_manager)\.py:\d+ -- "
)
INTERRUPTED: Final = 130


def follow_job(jobs: RayJobs, name: str, *, poll_s: float = POLL_S) -> RayJobStatus:
    """Prints a job's log until the job has ended. Returns the job with the id of the release that it built.

    Raises:
        ConfigError: if the job does not exist (any more).
        KubernetesError: if the API server cannot be reached for ``API_OUTAGE_TIMEOUT_S``.
        JobError: if the job cannot start without a change.
    """
    follower = _JobFollower(jobs, name)
    while not follower.poll():
        time.sleep(poll_s)
    late_s = time.monotonic() + LOG_DRAIN_TIMEOUT_S
    while not follower.drain_log() and time.monotonic() < late_s:
        time.sleep(poll_s)
    return follower.job


def raise_for_failure(job: RayJobStatus) -> None:
    """Returns if the job succeeded.

    Raises:
        CommandFailedError: if the command failed; carries the command's exit code.
        JobError: if the command did not end on its own.
    """
    from reelway.platform.cluster.ray_job_status import JobState

    if job.state is JobState.SUCCEEDED:
        return
    if job.exit_code:
        raise CommandFailedError([job.command], job.exit_code)
    if job.state is JobState.STOPPED:
        raise JobError(f"job {job.name} was stopped")
    message = job.message.partition("last available logs")[0].strip(" ,\n")[:_SHOWN]  # the log was printed already
    reason = ": ".join(part for part in (job.reason, message) if part) or "KubeRay gives no reason"
    raise JobError(f"job {job.name} {'never started' if job.never_started else 'was terminated'}: {reason}")


def follow_interactively(jobs: RayJobs, name: str) -> RayJobStatus | None:
    """Follows a job. On Ctrl-C asks whether to stop it, prints the outcome and returns None."""
    try:
        return follow_job(jobs, name)
    except KeyboardInterrupt:
        try:
            _prompt_to_stop(jobs, name)
        except KeyboardInterrupt:
            print_unwrapped("")
            _print_still_running(jobs, name)
        return None


class _JobFollower:
    """Follows one job and prints each state, startup problem and log line once."""

    def __init__(self, jobs: RayJobs, name: str) -> None:
        from reelway.platform.cluster.ray_job import LogCursor

        self._jobs = jobs
        self._cursor = LogCursor()
        self._printed: set[str] = set()
        self._tail: list[str] = []
        self._outage_since: float | None = None
        self._complete = False
        self.job: RayJobStatus = jobs.get(name)
        self._print_state()

    def poll(self) -> bool:
        """Polls once. Returns whether the job has ended."""
        self._tolerate_outage(self._poll)
        return self.job.state.ended

    def drain_log(self) -> bool:
        """Reads the rest of the log. Returns whether it is complete."""
        self._complete = False
        self._tolerate_outage(self._drain_log)
        return self._complete

    def _drain_log(self) -> None:
        complete = self._jobs.log_complete(self.job)
        self._read_log()
        self._complete = complete

    def _poll(self) -> None:
        from reelway.platform.cluster.ray_job_status import JobState

        previous, self.job = self.job, replace(self._jobs.get(self.job.name), release=self.job.release)
        if previous.state is not self.job.state:
            self._print_state()
        if self.job.state is JobState.STARTING:
            self._print_startup_problems(self._jobs.startup_problems(self.job))
        self._read_log()

    def _read_log(self) -> None:
        from reelway.platform.cluster.ray_job_status import release_id_in

        lines, cursor = self._jobs.read_log_since(self.job, self._cursor)
        if self._cursor.pod and cursor.pod != self._cursor.pod:
            print_unwrapped(f"the log continues in pod {cursor.pod}")
        self._cursor = cursor
        shown = [line for line in lines if not _RAY_CLIENT_LOG_LINE.match(line)]
        for line in shown:
            stderr_console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._tail = [*self._tail, *shown][-TAIL_LINES:]
        if self.job.kind == "release":
            self.job = replace(self.job, release=release_id_in(self._tail))

    def _print_state(self) -> None:
        job = self.job
        tried = f" (attempt {job.retries + 1})" if job.retries and not job.state.ended else ""
        print_unwrapped(f"job {job.name}: [bold]{job.state.value}[/]{tried}")

    def _print_startup_problems(self, problems: Sequence[StartupProblem]) -> None:
        for problem in problems:
            if problem.permanent:
                raise JobError(
                    f"job {self.job.name} cannot start: {problem.message}; fix this, or "
                    f"`reelway jobs delete {self.job.name}`"
                )
            if problem.message not in self._printed:
                self._printed.add(problem.message)
                print_unwrapped(f"[yellow]waiting:[/] {escape(problem.message)}")

    def _tolerate_outage(self, poll: Callable[[], object]) -> None:
        """Calls ``poll`` and tolerates an outage of the API server of up to ``API_OUTAGE_TIMEOUT_S``."""
        try:
            poll()
        except KubernetesError as error:
            now = time.monotonic()
            if self._outage_since is None:
                self._outage_since = now
                print_unwrapped(f"[yellow]waiting:[/] {escape(str(error))}")
            if now - self._outage_since > API_OUTAGE_TIMEOUT_S:
                raise
            return
        self._outage_since = None


def _prompt_to_stop(jobs: RayJobs, name: str) -> None:
    if not sys.stdin.isatty():
        _print_still_running(jobs, name)
        return
    answer = input(f"\nStop job {name}? Its files stay. [y/N, Ctrl-C: no] ")
    if answer.strip().lower() in ("y", "yes"):
        jobs.stop(name)
        print_unwrapped(f"job {name}: stopping")
    else:
        _print_still_running(jobs, name)


def _print_still_running(jobs: RayJobs, name: str) -> None:
    print_unwrapped(f"job {name} continues; follow it again with `reelway jobs follow {name} -n {jobs.namespace}`")
