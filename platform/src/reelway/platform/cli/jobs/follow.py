"""Follows a job: prints its log, why it does not start, and ends with an exit code for scripts.

======  ========================================================================================================
code    meaning
======  ========================================================================================================
0       the job succeeded (or was submitted, with ``--detach``)
1 - 12  the command's own exit code: 2 usage, 3 data, 4 features, 5 training, 6 release refused, ...
2       also: no kubeconfig, no Reelway or KubeRay in the namespace, an invalid option
7       also: the API server cannot be reached or rejects the request
13      the command did not end on its own: it never started, timed out, lost its pods or was stopped
130     Ctrl-C; the message says whether the job continues
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

from reelway.platform.cli.rollout.place import tell
from reelway.platform.cli.terminal import console
from reelway.platform.errors import CommandFailedError, JobError, KubernetesError

if TYPE_CHECKING:
    from reelway.platform.cluster.ray_job import RayJobs
    from reelway.platform.cluster.ray_job_status import Job, Trouble

POLL_S: Final = 1.0
LATE_S: Final = 20.0
"""How long to wait for the rest of the log after the job has ended."""
SILENT_S: Final = 300.0
"""A longer outage of the API server is an error of the command; the job continues."""
LAST_LINES: Final = 20
_SHOWN: Final = 500
_OF_RAYS_CLIENT: Final = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\t(INFO|SUCC|WARN|ERR) (cli|sdk|job_manager)\.py:\d+ -- ")
INTERRUPTED: Final = 130


def follow(jobs: RayJobs, name: str, *, poll_s: float = POLL_S) -> Job:
    """Prints a job's log until the job has ended. Returns the job with the id of the release that it built.

    Raises:
        ConfigError: if the job does not exist (any more).
        KubernetesError: if the API server cannot be reached for ``API_OUTAGE_TIMEOUT_S``.
        JobError: if the job cannot start without a change.
    """
    watched = _Watched(jobs, name)
    while not watched.look():
        time.sleep(poll_s)
    late_s = time.monotonic() + LATE_S
    while not watched.rest() and time.monotonic() < late_s:
        time.sleep(poll_s)
    return watched.job


def raise_if_bad(job: Job) -> None:
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
    said = job.message.partition("last available logs")[0].strip(" ,\n")[:_SHOWN]  # the log was printed already
    why = ": ".join(part for part in (job.reason, said) if part) or "KubeRay gives no reason"
    raise JobError(f"job {job.name} {'never started' if job.never_began else 'was ended from outside'}: {why}")


def follow_or_ask(jobs: RayJobs, name: str) -> Job | None:
    """Follows a job. On Ctrl-C asks whether to stop it, prints the outcome and returns None."""
    try:
        return follow(jobs, name)
    except KeyboardInterrupt:
        try:
            _ask_to_stop(jobs, name)
        except KeyboardInterrupt:
            tell("")
            _say_it_goes_on(jobs, name)
        return None


class _Watched:
    """What was printed of a job, so that nothing is printed twice."""

    def __init__(self, jobs: RayJobs, name: str) -> None:
        from reelway.platform.cluster.ray_job import LogPlace

        self._jobs = jobs
        self._place = LogPlace()
        self._said: set[str] = set()
        self._tail: list[str] = []
        self._away_since: float | None = None
        self._whole = False
        self.job: Job = jobs.get(name)
        self._say_state()

    def look(self) -> bool:
        """Polls once. Returns whether the job has ended."""
        self._patiently(self._look)
        return self.job.state.ended

    def rest(self) -> bool:
        """Reads the rest of the log. Returns whether it is complete."""
        self._whole = False
        self._patiently(self._rest)
        return self._whole

    def _rest(self) -> None:
        whole = self._jobs.log_is_whole(self.job)
        self._read_log()
        self._whole = whole

    def _look(self) -> None:
        from reelway.platform.cluster.ray_job_status import JobState

        before, self.job = self.job, replace(self._jobs.get(self.job.name), release=self.job.release)
        if before.state is not self.job.state:
            self._say_state()
        if self.job.state is JobState.STARTING:
            self._say_troubles(self._jobs.troubles(self.job))
        self._read_log()

    def _read_log(self) -> None:
        from reelway.platform.cluster.ray_job_status import release_id_in

        lines, place = self._jobs.new_lines(self.job, self._place)
        if self._place.pod and place.pod != self._place.pod:
            tell(f"the log continues in pod {place.pod}")
        self._place = place
        shown = [line for line in lines if not _OF_RAYS_CLIENT.match(line)]
        for line in shown:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._tail = [*self._tail, *shown][-LAST_LINES:]
        if self.job.kind == "release":
            self.job = replace(self.job, release=release_id_in(self._tail))

    def _say_state(self) -> None:
        job = self.job
        tried = f" (attempt {job.tries + 1})" if job.tries and not job.state.ended else ""
        tell(f"job {job.name}: [bold]{job.state.value}[/]{tried}")

    def _say_troubles(self, troubles: Sequence[Trouble]) -> None:
        for trouble in troubles:
            if trouble.hopeless:
                raise JobError(
                    f"job {self.job.name} cannot start: {trouble.what}; fix this, or "
                    f"`reelway jobs delete {self.job.name}`"
                )
            if trouble.what not in self._said:
                self._said.add(trouble.what)
                tell(f"[yellow]waiting:[/] {escape(trouble.what)}")

    def _patiently(self, poll: Callable[[], object]) -> None:
        """Calls ``poll`` and tolerates an outage of the API server of up to ``API_OUTAGE_TIMEOUT_S``."""
        try:
            poll()
        except KubernetesError as error:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                tell(f"[yellow]waiting:[/] {escape(str(error))}")
            if now - self._away_since > SILENT_S:
                raise
            return
        self._away_since = None


def _ask_to_stop(jobs: RayJobs, name: str) -> None:
    if not sys.stdin.isatty():
        _say_it_goes_on(jobs, name)
        return
    answer = input(f"\nStop job {name}? Its files stay. [y/N, Ctrl-C: no] ")
    if answer.strip().lower() in ("y", "yes"):
        jobs.stop(name)
        tell(f"job {name}: stopping")
    else:
        _say_it_goes_on(jobs, name)


def _say_it_goes_on(jobs: RayJobs, name: str) -> None:
    tell(f"job {name} continues; follow it again with `reelway jobs follow {name} -n {jobs.namespace}`")
