"""Rankers outside Ray Serve: created, removed and read by a thread of their own, so that traffic never waits for them.

A release is ready only if its ranker is. A call of the rankers' API may hang for seconds. A rollback therefore writes
its weights and then only states which rankers are needed; ``RankerReconciler`` creates and removes them in its thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

from reelway.platform.cluster.inference_service import RankerProvisioner, RankerState
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import KubernetesError, RolloutError
from reelway.platform.rollout.traffic.target import TrafficBackend, TrafficObservation, TrafficTarget

log = logging.getLogger(__name__)

INTERVAL_S: Final = 2.0
MAX_AGE_S: Final = 15.0
"""States that were read longer ago count as unknown."""


class RankerReconciler:
    """Creates the rankers that are needed, removes the retired ones and reads the states of all. Thread-safe.

    Only ``reconcile`` and ``run`` call the API; no other method waits.

    Args:
        before_write: called before each creation or removal; a RolloutError prevents it.
        on_failure: called after each pass that failed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        rankers: RankerProvisioner,
        *,
        before_write: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rankers, self._clock = rankers, clock
        self._before_write, self._on_failure = before_write, on_failure
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._prepared: frozenset[str] = frozenset()
        self._kept: frozenset[str] | None = None
        self._states: dict[str, RankerState] = {}
        self._read_at: float | None = None
        self._problem = ""

    def prepare(self, releases: Iterable[str]) -> None:
        """Requests rankers for these releases beside those of the traffic. Replaces the releases of the last call."""
        with self._lock:
            self._prepared = frozenset(releases)
        self._changed.set()

    def keep_only(self, releases: Iterable[str]) -> None:
        """Requests rankers for the releases of the traffic, and the removal of all others."""
        with self._lock:
            self._kept, self._prepared = frozenset(releases), frozenset()
        self._changed.set()

    @property
    def states(self) -> Mapping[str, RankerState] | None:
        """States by the first characters of the release id; None if they were not read within ``MAX_AGE_S``."""
        with self._lock:
            fresh = self._read_at is not None and self._clock() - self._read_at <= MAX_AGE_S
            return dict(self._states) if fresh else None

    @property
    def problem(self) -> str:
        """Why the last pass failed; empty if it succeeded."""
        return self._problem

    def run(self, stop: threading.Event) -> None:
        """Reconciles after every request, and at least every ``INTERVAL_S`` seconds, until ``stop`` is set."""
        while not stop.is_set():
            self._changed.clear()
            try:
                self.reconcile()
            except Exception:  # the thread must not end while releases need rankers
                self._on_failure()
                log.exception("rankers: failed with an unexpected error; continuing")
            self._changed.wait(INTERVAL_S)

    def reconcile(self) -> None:
        """Reads the rankers, creates missing ones and removes retired ones. Failures are reported, not raised."""
        errors: list[str] = []
        try:
            states = self._read()
            with self._lock:
                prepared, kept = self._prepared, self._kept
            required = prepared | (kept or frozenset())
            missing = sorted(release for release in required if short_id(release) not in states)
            retired = sorted(states.keys() - {short_id(release) for release in required}) if kept is not None else []
            errors = [*self._for_each(self._rankers.ensure, missing), *self._for_each(self._rankers.remove, retired)]
            if missing or retired:
                self._read()
        except KubernetesError as error:
            errors.append(str(error))
        problem = "; ".join(errors)
        if problem:
            self._on_failure()
        if problem != self._problem:
            log.warning("rankers: %s", problem) if problem else log.info("rankers: recovered")
        self._problem = problem

    def wake(self) -> None:
        """Ends the pause of ``run``, such as after ``stop`` was set."""
        self._changed.set()

    def _read(self) -> dict[str, RankerState]:
        began = self._clock()
        states = dict(self._rankers.states())
        with self._lock:
            self._states, self._read_at = states, began
        return states

    def _for_each(self, call: Callable[[str], None], releases: Iterable[str]) -> list[str]:
        errors = []
        for release in releases:
            try:
                self._before_write()
                call(release)
            except (KubernetesError, RolloutError) as error:
                errors.append(str(error))
        return errors


class RemoteRankerBackend:
    """A traffic backend whose releases each need a remote ranker.

    A release without a ranker counts as not running, so the next write requests it again. A release is ready only if
    its ranker is. Weights belong to the wrapped backend alone, and no method waits for a ranker.
    """

    def __init__(self, backend: TrafficBackend, rankers: RankerReconciler) -> None:
        self._backend, self._rankers = backend, rankers

    def observe(self) -> TrafficObservation:
        """Observes the traffic and adds the rankers' states as last read; see ``TrafficBackend.observe``."""
        observation = self._backend.observe()
        rankers, problem = self._rankers.states, self._rankers.problem
        problem = f"rankers: {problem}" if problem else ""
        if rankers is None:
            problem = problem or "rankers: their states are not read yet"
            return replace(observation, ready=frozenset(), detail=_join_messages(observation.detail, problem))
        states = {release: rankers.get(short_id(release)) for release in {*observation.releases, *observation.ready}}
        waiting = {release: state for release, state in states.items() if state is None or not state.ready}
        messages = [f"ranker of {short_id(release)}: {state.detail if state else 'it does not exist'}"
                for release, state in sorted(waiting.items())]  # fmt: skip
        failed = {release: f"ranker: {state.detail}" for release, state in waiting.items() if state and state.failed}
        return replace(
            observation,
            releases=tuple(release for release in observation.releases if states[release] is not None),
            ready=observation.ready - waiting.keys(),
            failed={**failed, **observation.failed},
            detail=_join_messages(observation.detail, problem, *messages),
        )

    def apply(self, target: TrafficTarget) -> None:
        """Writes the traffic, then requests the target's rankers and the removal of all others.

        Raises:
            RolloutError: if the traffic was rejected, or Serve accepted it and its declaration failed; the target's
                rankers are requested and no ranker is removed.
        """
        try:
            self._backend.apply(target)
        except RolloutError:
            self._rankers.prepare(target.releases)
            raise
        self._rankers.keep_only(target.releases)


def _join_messages(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
