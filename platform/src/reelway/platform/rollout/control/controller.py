"""The loop that moves a rollout: observe, assess, decide, record, apply, until the observed traffic is the target.

A new state is recorded before traffic is changed, and traffic is compared with the recorded state on every reconcile.
The controller may therefore be killed at any instruction, and a lost write, a restarted service or a manual change is
corrected on the next reconcile. A firing alert rolls back without waiting for a reconcile (``Controller.react``).
Missing evidence and failed writes hold the rollout with a reason and never end the loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ReelwayError, RolloutError
from reelway.platform.rollout.assessment import Assessment, assess
from reelway.platform.rollout.control.alert_book import AlertBook
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.decision import Action, Decision, advance, decide_on
from reelway.platform.rollout.evidence import EvidenceSnapshot, nothing_heard
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.records import HistoryEntry, Rollout, RolloutStore, Sighting
from reelway.platform.rollout.source import AlertSource, EvidenceSource
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.summary import summary_of
from reelway.platform.rollout.traffic.target import TrafficBackend, TrafficObservation, TrafficTarget, target_of

log = logging.getLogger(__name__)

_CHANGES_EVERY_S = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Look:
    """One reconcile: what was observed, the decision, and what follows from the two."""

    rollout: Rollout
    observation: TrafficObservation | None
    """None in a reaction to an alert, which does not observe the traffic."""
    decision: Decision
    after: RolloutState
    evidence: dict[str, Any]
    """The assessed evidence as it is recorded (``summary.py``)."""
    now: float

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        observation: TrafficObservation | None,
        evidence: EvidenceSnapshot,
        verdicts: Assessment,
        decision: Decision,
        now: float,
    ) -> _Look:
        after = advance(rollout.state, decision, rollout.policy, now)
        return cls(rollout, observation, decision, after, summary_of(verdicts, evidence, now), now)


class Controller:
    """Moves the newest rollout of a store.

    Args:
        book: all alerts that webhooks and polls have delivered.
        alert_source: polled every ``poll_s`` seconds by ``run``; None if alerts arrive by webhook only.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: RolloutStore,
        backend: TrafficBackend,
        source: EvidenceSource,
        book: AlertBook,
        *,
        alert_source: AlertSource | None = None,
        poll_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        metrics: ControllerMetrics | None = None,
    ) -> None:
        self._store = store
        self._backend = backend
        self._source = source
        self._book = book
        self._alert_source = alert_source
        self._poll_s = poll_s
        self._clock = clock
        self._metrics = metrics or ControllerMetrics()
        self._acting = threading.Lock()
        """Held from the record of a state until traffic is written: a slow reconcile cannot overwrite a rollback."""
        self._troubles: dict[str, str] = {}

    def run(self, stop: threading.Event, wake: threading.Event, interval_s: float = 1.0) -> None:
        """Reconciles every ``interval_s`` seconds and after every command, until ``stop`` is set.

        ``alert_arrived`` triggers ``react`` immediately.
        """
        again = threading.Event()
        threads = [threading.Thread(target=self._react_when_woken, args=(stop, wake, again), name="reactions")]
        if self._alert_source is not None:
            threads.append(threading.Thread(target=self._poll_until, args=(stop, wake), name="alert-polls"))
        for thread in threads:
            thread.start()
        try:
            while not stop.is_set():
                again.clear()
                seen = self._guarded("tick", self._others_changes)
                self._guarded("tick", self.tick)
                deadline = time.monotonic() + interval_s
                while not (stop.is_set() or again.is_set()) and (left_s := deadline - time.monotonic()) > 0:
                    if self._guarded("tick", self._others_changes) != seen:
                        break
                    again.wait(min(_CHANGES_EVERY_S, left_s))
        finally:
            stop.set()
            wake.set()
            for thread in threads:
                thread.join()

    def tick(self) -> Decision | None:
        """One reconcile. Returns None if there is no rollout, or another process changed it meanwhile.

        Raises:
            ReelwayError: if the store cannot be read or written; no traffic was changed without a record.
        """
        with self._metrics.tick.time():
            self.react()
            rollout = self._store.latest()
            self._metrics.last_tick.set(self._clock())
            if rollout is None:
                return None
            look = self._look_at(rollout)
            return look.decision if self._act(look) else None

    def react(self) -> Decision | None:
        """Rolls back if an alert fires for the release, without a scrape or an observation; does nothing else.

        Raises:
            ReelwayError: see ``reconcile``.
        """
        began = time.perf_counter()
        rollout = self._store.latest()
        if rollout is None or not (firing := self._firing(rollout.state)):
            return None
        now = self._clock()
        evidence = EvidenceSnapshot(time=now, release=rollout.state.canary_release, alerts=firing)
        verdicts = assess(rollout.policy, evidence)
        decision = decide_on(rollout.policy, rollout.state, evidence, verdicts, now)
        # A deadline may also demand a rollback for lack of evidence, but no evidence was fetched here.
        if decision.action is not Action.ROLL_BACK or not verdicts.breaches:
            return None
        if not self._act(_Look.of(rollout, None, evidence, verdicts, decision, now)):
            return None
        self._metrics.reaction.observe(time.perf_counter() - began)
        return decision

    def poll_alerts(self) -> bool:
        """Polls the alert source once. Returns whether the known alerts changed."""
        assert self._alert_source is not None
        try:
            changed = self._book.poll(self._alert_source.poll())
        except RolloutError as error:
            self._trouble("poll", str(error))
            return False
        self._trouble("poll", "")
        return changed

    def _look_at(self, rollout: Rollout) -> _Look:
        state, policy, now = rollout.state, rollout.policy, self._clock()
        observation = self._observe()
        evidence = nothing_heard(state.canary_release, now) if _finished(state) else self._fetch(policy, state, now)
        failed = observation.failed.get(state.canary_release, "")
        evidence = replace(
            evidence,
            alerts=self._firing(state),
            weights=observation.weights(state),
            canary_ready=_ready(observation, state.canary_release),
            canary_gave_up=failed if state.canary_release in observation.gave_up else "",
        )
        verdicts = assess(policy, evidence)
        decision = decide_on(policy, state, evidence, verdicts, now)
        if state.phase is Phase.PREPARING and failed not in decision.reason:
            decision = replace(decision, reason=f"{decision.reason}; {short_id(state.canary_release)} failed: {failed}")
        return _Look.of(rollout, observation, evidence, verdicts, decision, now)

    def _act(self, look: _Look) -> bool:
        """Records the new state, then applies it. Returns False, and does neither, if the rollout changed meanwhile."""
        before, decision = look.rollout, look.decision
        with self._acting:
            newest = self._store.latest()
            if newest is None or newest.state.id != before.state.id:
                return False
            if _finished(before.state) and decision.action is Action.WAIT:
                if newest.version != before.version:
                    return False
                written = newest  # only timers would change, and a final rollout does not use them
            else:
                try:
                    written = self._store.record(before, look.after, _entry(look))
                except RolloutError as error:
                    log.info("reconcile skipped: %s", error)
                    return False
            self._tell(look, written.state)
            target = target_of(written.state)
            reached = look.observation is not None and _shows(look.observation, target)
            trouble = "" if reached else self._apply(target)
        self._store.see(_sighting(look, target, reached, trouble))
        return True

    def _tell(self, look: _Look, state: RolloutState) -> None:
        self._metrics.decisions.labels(look.decision.action.value).inc()
        self._metrics.show(state)
        if _worth_telling(look):
            log.info("%s %s: %s", state.id, look.decision.action.value, look.decision.reason)

    def _apply(self, target: TrafficTarget) -> str:
        try:
            self._backend.apply(target)
        except RolloutError as error:
            self._metrics.writes.labels("failed").inc()
            self._trouble("apply", str(error))
            return str(error)
        self._metrics.writes.labels("accepted").inc()
        self._trouble("apply", "")
        return ""

    def _observe(self) -> TrafficObservation:
        observation = self._backend.observe()
        self._trouble("observe", "" if observation.releases else observation.detail)
        return observation

    def _fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        try:
            evidence = self._source.fetch(policy, state, now)
        except ReelwayError as error:
            self._trouble("evidence", str(error))
            return nothing_heard(state.canary_release, now)
        self._trouble("evidence", "")
        return evidence

    def _firing(self, state: RolloutState) -> tuple[Any, ...]:
        return self._book.firing_for(state.canary_release, since=state.started_at)

    def _trouble(self, kind: str, text: str) -> None:
        """Counts every failure; logs when a failure begins, changes or ends."""
        if text:
            self._metrics.failures.labels(kind).inc()
        if text != self._troubles.get(kind, ""):
            log.warning("%s: %s", kind, text) if text else log.info("%s: recovered", kind)
        self._troubles[kind] = text

    def _others_changes(self) -> int:
        return self._store.changes(own=False)

    def _react_when_woken(self, stop: threading.Event, wake: threading.Event, again: threading.Event) -> None:
        while True:
            wake.wait()
            wake.clear()
            if stop.is_set():
                return
            self._guarded("react", self.react)
            again.set()

    def _poll_until(self, stop: threading.Event, wake: threading.Event) -> None:
        while not stop.is_set():
            if self._guarded("poll", self.poll_alerts):
                wake.set()
            stop.wait(self._poll_s)

    def _guarded(self, kind: str, call: Callable[[], _T]) -> _T | None:
        """Calls ``call`` and logs every exception: if the loop ended, no one would watch the canary."""
        try:
            return call()
        except ReelwayError as error:
            self._trouble(kind, str(error))
        except Exception:
            self._metrics.failures.labels(kind).inc()
            log.exception("%s failed with an unexpected error; continuing", kind)
        return None


def _finished(state: RolloutState) -> bool:
    """Whether the rollout is final. Its recorded traffic is still maintained."""
    return state.phase is Phase.ROLLED_BACK or state.retired


def _ready(observation: TrafficObservation, release: str) -> bool | None:
    if release in observation.ready:
        return True
    return False if observation.releases or observation.failed else None


def _shows(observation: TrafficObservation, target: TrafficTarget) -> bool:
    return observation.routing == target.routing and set(observation.releases) == set(target.releases)


def _worth_telling(look: _Look) -> bool:
    """Whether it is logged and recorded: a new phase, step, weight or retention, a rejection, the start of a hold."""
    before, after, decision = look.rollout.state, look.after, look.decision
    moved = any(
        getattr(before, name) != getattr(after, name)
        for name in ("phase", "step", "canary_bp", "holdout_bp", "shadow_bp", "retired")
    )
    held_s = {"telemetry_down": before.held_telemetry_s, "insufficient": before.held_insufficient_s}
    return moved or decision.action is Action.REFUSE or held_s.get(decision.holds_for, 1.0) == 0


def _entry(look: _Look) -> HistoryEntry | None:
    if not _worth_telling(look):
        return None
    after = look.after
    return HistoryEntry(
        rollout_id=after.id,
        time=look.now,
        action=look.decision.action.value,
        reason=look.decision.reason,
        phase_before=look.rollout.state.phase.value,
        phase=after.phase.value,
        step=after.step,
        canary_bp=after.canary_bp,
        evidence=look.evidence,
    )


def _sighting(look: _Look, target: TrafficTarget, reached: bool, trouble: str) -> Sighting:
    seen = look.observation or TrafficObservation(detail="not observed: rolled back on an alert")
    traffic: dict[str, Any] = {
        "reached": reached,
        "target": target.routing.model_dump(mode="json"),
        "routing": seen.routing.model_dump(mode="json") if seen.routing else None,
        "releases": list(seen.releases),
        "ready": sorted(seen.ready),
        "failed": dict(seen.failed),
        "detail": seen.detail,
        "trouble": trouble,
    }
    return Sighting(
        rollout_id=look.rollout.state.id,
        time=look.now,
        action=look.decision.action.value,
        reason=look.decision.reason,
        evidence=look.evidence,
        traffic=traffic,
    )
