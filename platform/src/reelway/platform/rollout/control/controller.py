"""The loop that moves a rollout: observe, assess, decide, record, apply, until the observed traffic is the target.

A new state is recorded before traffic is changed, and traffic is compared with the recorded state on every reconcile.
The controller may therefore be killed at any instruction, and a lost write, a restarted service or a manual change is
corrected on the next reconcile. A rollback that cannot be recorded is written all the same and recorded later
(``unrecorded_rollback``). A firing alert rolls back without waiting for a reconcile (``Controller.react``).
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
from reelway.platform.rollout.control.alert_polls import AlertPolls
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.unrecorded_rollback import UnrecordedRollback
from reelway.platform.rollout.decision import Action, Decision, advance, decide_on
from reelway.platform.rollout.evidence import EvidenceSnapshot, no_evidence
from reelway.platform.rollout.evidence_source import AlertSource, EvidenceSource
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.records import HistoryEntry, LastReconcile, Rollout, RolloutStore
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.summary import summarise_evidence
from reelway.platform.rollout.traffic.target import TrafficBackend, TrafficObservation, TrafficTarget, traffic_target
from reelway.platform.supervised_thread import SupervisedThread

log = logging.getLogger(__name__)

_CHANGE_POLL_INTERVAL_S = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _ReconcilePass:
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
    ) -> _ReconcilePass:
        after = advance(rollout.state, decision, rollout.policy, now)
        return cls(rollout, observation, decision, after, summarise_evidence(verdicts, evidence, now), now)


class Controller:
    """Moves the newest rollout of a store.

    Args:
        alerts: all alerts that webhooks and polls have delivered.
        alert_source: polled every ``poll_s`` seconds by ``run``; None if alerts arrive by webhook only.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: RolloutStore,
        backend: TrafficBackend,
        source: EvidenceSource,
        alerts: AlertRegistry,
        *,
        alert_source: AlertSource | None = None,
        poll_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        metrics: ControllerMetrics | None = None,
    ) -> None:
        self._store = store
        self._backend = backend
        self._source = source
        self._alerts = alerts
        self._polls = AlertPolls(alert_source, alerts, clock)
        self._poll_s = poll_s
        self._clock = clock
        self._metrics = metrics or ControllerMetrics()
        self._apply_lock = threading.RLock()
        """Held from the record of a state until traffic is written: a slow reconcile cannot overwrite a rollback."""
        self._unrecorded = UnrecordedRollback()
        self._last_errors: dict[str, str] = {}

    def run(self, stop: threading.Event, alert_arrived: threading.Event, interval_s: float = 1.0) -> None:
        """Reconciles every ``interval_s`` seconds and after every command, until ``stop`` is set.

        ``alert_arrived`` triggers ``react`` immediately.
        """
        reconcile_now = threading.Event()
        threads = [
            SupervisedThread(
                self._react_when_woken, args=(stop, alert_arrived, reconcile_now), name="reactions", stop=stop
            )
        ]
        if self._polls.enabled:
            threads.append(
                SupervisedThread(self._poll_alerts_until, args=(stop, alert_arrived), name="alert-polls", stop=stop)
            )
        for thread in threads:
            thread.start()
        try:
            while not stop.is_set():
                reconcile_now.clear()
                revision = self._guarded("tick", self._external_revision)
                self._guarded("tick", self.reconcile)
                deadline = time.monotonic() + interval_s
                while not (stop.is_set() or reconcile_now.is_set()) and (left_s := deadline - time.monotonic()) > 0:
                    if self._guarded("tick", self._external_revision) != revision:
                        break
                    reconcile_now.wait(min(_CHANGE_POLL_INTERVAL_S, left_s))
        finally:
            stop.set()
            alert_arrived.set()
            for thread in threads:
                thread.join()

    def reconcile(self) -> Decision | None:
        """Reconciles once. Returns None if there is no rollout, or another process changed it meanwhile.

        Raises:
            ReelwayError: if the store cannot be read or written; no traffic was changed without a record, except by a
                rollback.
        """
        with self._metrics.tick.time():
            self.react()
            rollout = self._store.latest()
            self._metrics.last_tick.set(self._clock())
            if rollout is None:
                return None
            reconcile_pass = self._evaluate(rollout)
            return reconcile_pass.decision if self._record_and_apply(reconcile_pass) else None

    def react(self) -> Decision | None:
        """Rolls back if an alert fires for the release, without a scrape or an observation; does nothing else.

        Raises:
            ReelwayError: see ``reconcile``.
        """
        with self._apply_lock:  # a reconcile that records meanwhile would make this record fail
            return self._react()

    def _react(self) -> Decision | None:
        started_s = time.perf_counter()
        rollout = self._store.latest()
        if rollout is None or self._unrecorded.decision(rollout.state) or not (firing := self._firing(rollout.state)):
            return None
        now = self._clock()
        evidence = EvidenceSnapshot(time=now, release=rollout.state.canary_release, alerts=firing)
        verdicts = assess(rollout.policy, evidence)
        decision = decide_on(rollout.policy, rollout.state, evidence, verdicts, now)
        # A deadline may also demand a rollback for lack of evidence, but no evidence was fetched here.
        if decision.action is not Action.ROLL_BACK or not verdicts.breaches:
            return None
        if not self._record_and_apply(_ReconcilePass.of(rollout, None, evidence, verdicts, decision, now)):
            return None
        self._metrics.reaction.observe(time.perf_counter() - started_s)
        return decision

    def poll_alerts(self) -> bool:
        """Polls the alert source once. Returns whether alerts may have become known."""
        try:
            changed = self._polls.poll()
        except ReelwayError as error:
            self._report_failure("poll", str(error))
            return True  # known and not stored
        self._report_failure("poll", self._polls.failure)
        return changed

    def _evaluate(self, rollout: Rollout) -> _ReconcilePass:
        state, policy, now = rollout.state, rollout.policy, self._clock()
        observation = self._observe()
        evidence = no_evidence(state.canary_release, now) if _is_final(state) else self._fetch(policy, state, now)
        failed = observation.failed.get(state.canary_release, "")
        alerts_problem = self._polls.problem(policy.evidence_max_age_s)
        self._report_failure("alerts", alerts_problem)
        evidence = replace(
            evidence,
            alerts=self._firing(state),
            alerts_problem=alerts_problem,
            weights=observation.weights(state),
            canary_ready=_ready(observation, state.canary_release),
            canary_failure=failed if state.canary_release in observation.failed_permanently else "",
        )
        verdicts = assess(policy, evidence)
        with self._apply_lock:
            self._unrecorded.observe(state, observation)
            unrecorded = self._unrecorded.decision(state)
        decision = unrecorded or decide_on(policy, state, evidence, verdicts, now)
        if state.phase is Phase.PREPARING and failed not in decision.reason:
            decision = replace(decision, reason=f"{decision.reason}; {short_id(state.canary_release)} failed: {failed}")
        return _ReconcilePass.of(rollout, observation, evidence, verdicts, decision, now)

    def _record_and_apply(self, reconcile_pass: _ReconcilePass) -> bool:
        """Records the new state, then applies it. Returns False, and does neither, if the rollout changed meanwhile."""
        before, decision = reconcile_pass.rollout, reconcile_pass.decision
        with self._apply_lock:
            newest = self._store.latest()
            if newest is None or newest.state.id != before.state.id:
                return False
            if decision.action is not Action.ROLL_BACK and self._unrecorded.decision(before.state):
                return False  # decided before the rollback that waits for its record
            if _is_final(before.state) and decision.action is Action.WAIT:
                if newest.version != before.version:
                    return False
                written = newest  # only timers would change, and a final rollout does not use them
            else:
                try:
                    written = self._store.record(before, reconcile_pass.after, _history_entry(reconcile_pass))
                except RolloutError as error:
                    log.info("reconcile skipped: %s", error)
                    return False
                except ReelwayError:
                    self._unrecorded.record_failed()
                    if decision.action is Action.ROLL_BACK:
                        self._roll_back_unrecorded(reconcile_pass)
                    raise
                self._unrecorded.record_succeeded(written.state)
            self._report_decision(reconcile_pass, written.state)
            target = traffic_target(written.state)
            reached = reconcile_pass.observation is not None and _is_at_target(reconcile_pass.observation, target)
            apply_error = "" if reached else self._apply(target)
        self._store.save_last_reconcile(_last_reconcile(reconcile_pass, target, reached, apply_error))
        return True

    def _roll_back_unrecorded(self, reconcile_pass: _ReconcilePass) -> None:
        """Writes a rollback to the traffic whose record failed, unless another controller writes the traffic."""
        state, decision = reconcile_pass.rollout.state, reconcile_pass.decision
        if self._unrecorded.superseded:
            self._report_failure("apply", "rollback not written: another controller has changed the traffic")
            return
        if self._unrecorded.begin(state, decision, reconcile_pass.now):
            self._metrics.unrecorded_rollbacks.inc()
            log.warning("%s %s, not recorded: %s", state.id, decision.action.value, decision.reason)
        self._apply(self._unrecorded.target(traffic_target(reconcile_pass.after)))

    def _report_decision(self, reconcile_pass: _ReconcilePass, state: RolloutState) -> None:
        self._metrics.decisions.labels(reconcile_pass.decision.action.value).inc()
        self._metrics.set_state(state)
        suspicions = reconcile_pass.evidence["suspicions"]
        self._metrics.set_suspicions({one["name"]: one["suspected"] for one in suspicions})
        if _is_notable(reconcile_pass):
            log.info("%s %s: %s", state.id, reconcile_pass.decision.action.value, reconcile_pass.decision.reason)

    def _apply(self, target: TrafficTarget) -> str:
        try:
            self._backend.apply(target)
        except RolloutError as error:
            self._metrics.writes.labels("failed").inc()
            self._report_failure("apply", str(error))
            return str(error)
        self._metrics.writes.labels("accepted").inc()
        self._report_failure("apply", "")
        return ""

    def _observe(self) -> TrafficObservation:
        observation = self._backend.observe()
        self._report_failure("observe", "" if observation.releases else observation.detail)
        return observation

    def _fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        try:
            evidence = self._source.fetch(policy, state, now)
        except ReelwayError as error:
            self._report_failure("evidence", str(error))
            return no_evidence(state.canary_release, now)
        self._report_failure("evidence", "")
        return evidence

    def _firing(self, state: RolloutState) -> tuple[Any, ...]:
        return self._alerts.firing_for(state)

    def _report_failure(self, kind: str, text: str) -> None:
        """Counts every failure; logs when a failure begins, changes or ends."""
        if text:
            self._metrics.failures.labels(kind).inc()
        if text != self._last_errors.get(kind, ""):
            log.warning("%s: %s", kind, text) if text else log.info("%s: recovered", kind)
        self._last_errors[kind] = text

    def _external_revision(self) -> int:
        return self._store.revision(include_own=False)

    def _react_when_woken(
        self, stop: threading.Event, alert_arrived: threading.Event, reconcile_now: threading.Event
    ) -> None:
        while True:
            alert_arrived.wait()
            alert_arrived.clear()
            if stop.is_set():
                return
            self._guarded("react", self.react)
            reconcile_now.set()

    def _poll_alerts_until(self, stop: threading.Event, alert_arrived: threading.Event) -> None:
        while not stop.is_set():
            if self._guarded("poll", self.poll_alerts):
                alert_arrived.set()
            stop.wait(self._poll_s)

    def _guarded(self, kind: str, call: Callable[[], _T]) -> _T | None:
        """Calls ``call`` and logs every exception, so that the loop never ends while a canary has traffic."""
        try:
            return call()
        except ReelwayError as error:
            self._report_failure(kind, str(error))
        except Exception:
            self._metrics.failures.labels(kind).inc()
            log.exception("%s failed with an unexpected error; continuing", kind)
        return None


def _is_final(state: RolloutState) -> bool:
    """Returns whether the rollout is final. Its recorded traffic is still maintained."""
    return state.phase is Phase.ROLLED_BACK or state.retired


def _ready(observation: TrafficObservation, release: str) -> bool | None:
    if release in observation.ready:
        return True
    return False if observation.releases or observation.failed else None


def _is_at_target(observation: TrafficObservation, target: TrafficTarget) -> bool:
    return observation.routing == target.routing and set(observation.releases) == set(target.releases)


def _is_notable(reconcile_pass: _ReconcilePass) -> bool:
    """Returns whether a decision is recorded: a new phase, step or weight, retirement, a rejection, a new hold."""
    before, after, decision = reconcile_pass.rollout.state, reconcile_pass.after, reconcile_pass.decision
    changed = any(
        getattr(before, name) != getattr(after, name)
        for name in ("phase", "step", "canary_bp", "holdout_bp", "shadow_bp", "retired")
    )
    held_s = {"telemetry_down": before.held_telemetry_s, "insufficient": before.held_insufficient_s}
    return changed or decision.action is Action.REFUSE or held_s.get(decision.holds_for, 1.0) == 0


def _history_entry(reconcile_pass: _ReconcilePass) -> HistoryEntry | None:
    if not _is_notable(reconcile_pass):
        return None
    after = reconcile_pass.after
    return HistoryEntry(
        rollout_id=after.id,
        time=reconcile_pass.now,
        action=reconcile_pass.decision.action.value,
        reason=reconcile_pass.decision.reason,
        phase_before=reconcile_pass.rollout.state.phase.value,
        phase=after.phase.value,
        step=after.step,
        canary_bp=after.canary_bp,
        evidence=reconcile_pass.evidence,
    )


def _last_reconcile(
    reconcile_pass: _ReconcilePass, target: TrafficTarget, reached: bool, apply_error: str
) -> LastReconcile:
    observation = reconcile_pass.observation or TrafficObservation(detail="not observed: rolled back on an alert")
    traffic: dict[str, Any] = {
        "reached": reached,
        "target": target.routing.model_dump(mode="json"),
        "routing": observation.routing.model_dump(mode="json") if observation.routing else None,
        "releases": list(observation.releases),
        "ready": sorted(observation.ready),
        "failed": dict(observation.failed),
        "detail": observation.detail,
        "trouble": apply_error,
    }
    return LastReconcile(
        rollout_id=reconcile_pass.rollout.state.id,
        time=reconcile_pass.now,
        action=reconcile_pass.decision.action.value,
        reason=reconcile_pass.decision.reason,
        evidence=reconcile_pass.evidence,
        traffic=traffic,
    )
