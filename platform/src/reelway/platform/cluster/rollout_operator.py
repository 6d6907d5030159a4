"""Runs the rollouts of one namespace on Kubernetes: ``reelway operator``.

The operator starts one ``BackendController`` per traffic backend, with the controller of local mode and a store in the
rollouts' status. One replica is active (``leader_election``). While the API server cannot be reached, the active one
keeps running and may only roll back (``rollout/control/unrecorded_rollback``). All state is in the resources, so the
process may be killed at any instruction and another replica continues. ``admission`` decides whether a rollout may
start; ``decision`` decides everything after that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Final

from reelway.platform.cluster.admission import Admitted, Refused, Waiting, admit
from reelway.platform.cluster.backend_controller import BackendController
from reelway.platform.cluster.event_recorder import EventRecorder
from reelway.platform.cluster.finalizer import set_finalizer
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.kube_rollout_store import KubeRolloutStore
from reelway.platform.cluster.leader_election import LeaderElector
from reelway.platform.cluster.operator_http import operator_application
from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.cluster.release_checks import ReleaseChecks
from reelway.platform.cluster.release_reconciler import ReleaseReconciler
from reelway.platform.cluster.resources import FINALIZER, Backend, PolicyReference, RayServiceReference, RolloutResource
from reelway.platform.cluster.rollout_cache import InformerCache
from reelway.platform.cluster.rollout_watch import RolloutWatch
from reelway.platform.cluster.status import REFUSED, WAITING, may_move_traffic
from reelway.platform.errors import ConfigError, KubernetesError, ReelwayError, RolloutError
from reelway.platform.rollout.alerts import KnownAlert, Relevance
from reelway.platform.rollout.control.bearer_token import ensure_bearer_token
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.webhook import serve_in_thread
from reelway.platform.rollout.policy import RolloutPolicy, default_policy, parse_policy
from reelway.platform.stop_signals import stopped_by_signals
from reelway.platform.supervised_thread import SupervisedThread

log = logging.getLogger(__name__)

_CHANGE_POLL_INTERVAL_S: Final = 0.1
_ADMISSION_INTERVAL_S: Final = 2.0


def run_operator(api: KubeApi, settings: OperatorSettings, stop: threading.Event | None = None) -> None:
    """Manages the namespace's rollouts until SIGTERM, Ctrl-C or ``stop``, and finishes the current reconcile first.

    Raises:
        ConfigError: if the webhook's address cannot be bound.
        StorageError: if the webhook's token cannot be read.
        KubernetesError: if the Lease was lost or the CRDs are not installed.
    """
    stop = stop or threading.Event()
    with ExitStack() as stack:
        stack.enter_context(stopped_by_signals(stop.set))
        operator = RolloutOperator(api, settings)
        application = operator_application(operator, ensure_bearer_token(settings.webhook.token_file), operator.metrics)
        webhook = settings.webhook
        url = stack.enter_context(serve_in_thread(application, webhook.host, webhook.port, webhook.certificate()))
        log.info("operator of namespace %s: started, webhook at %s", api.namespace, url)
        operator.run(stop)
    log.info("operator of namespace %s: stopped", api.namespace)


class RolloutOperator:
    """All backend controllers of a namespace. ``run`` blocks; the other methods may be called from any thread."""

    def __init__(self, api: KubeApi, settings: OperatorSettings) -> None:
        self.metrics = ControllerMetrics()
        self._api, self._settings = api, settings
        self._cache = InformerCache()
        self._events: EventRecorder | None = None
        self._controllers: dict[str, BackendController] = {}
        self._store = KubeRolloutStore(api, self._cache)
        self._watch = RolloutWatch(api, self._cache)
        lease = settings.lease
        self._lease = LeaderElector(api, lease.name, settings.identity, duration_s=lease.duration_s)
        self._active = False
        self._controllers_known = False
        """Whether the started rollouts have controllers. An alert before that would reach none of them."""
        self._last_errors: dict[str, str] = {}
        self._failure = ""
        self._releases: ReleaseChecks | None = None
        if settings.release_store and settings.public_keys:
            self._releases = ReleaseChecks(settings.release_store, settings.public_keys)
        self._stop = threading.Event()

    def run(self, stop: threading.Event) -> None:
        """Waits for the Lease, then manages rollouts until stopped.

        Raises:
            KubernetesError: as ``run_operator``.
        """
        settings, lease, self._stop = self._settings, self._lease, stop
        if not lease.acquire(stop):
            return
        renewal_stop = threading.Event()
        renewal = SupervisedThread(
            lease.renew_until,
            args=(renewal_stop, lambda: self._fail("the lease was lost"), self.metrics.cut_off.set),
            name="lease",
            on_failure=lambda: self._fail("the renewal of the lease failed"),
        )
        # Neither writes traffic, so nothing waits for a request of theirs at the end.
        readers = [
            SupervisedThread(
                self._run_watch, args=(stop,), name="watch", daemon=True,
                on_failure=lambda: self._fail("the watch of rollouts failed"),
            )
        ]  # fmt: skip
        if settings.release_store:
            records = ReleaseReconciler(self._api, settings.release_store)
            readers.append(SupervisedThread(records.run, args=(stop,), name="releases", daemon=True, stop=stop))
        if self._releases is not None:
            readers.append(
                SupervisedThread(self._releases.run, args=(stop,), name="release-checks", daemon=True, stop=stop)
            )
        try:
            self._active = True
            renewal.start()
            self._events = EventRecorder(self._api, settings.identity)
            self._watch.sync()
            for thread in readers:
                thread.start()
            self._loop(stop)
        finally:
            stop.set()
            self._active = False
            for controller in self._controllers.values():
                controller.request_stop()
            for controller in self._controllers.values():
                controller.stop()
            if self._events is not None:
                self._events.close()
            renewal_stop.set()
            if renewal.ident is not None:
                renewal.join()
            if not self._failure:
                lease.release()
        if self._failure:
            raise KubernetesError(f"{self._failure}; this process exits so that another replica can take over")

    def relevance(self) -> Relevance:
        """Returns what selects the alerts that name a release of a rollout of this namespace.

        Alerts with the label of another namespace are ignored: the same release may be a canary there as well.

        Raises:
            KubernetesError: if another replica is active, or this one does not know the rollouts yet.
        """
        self._require_rollouts()
        namespace = self._api.namespace
        selects = [controller.alerts.relevance() for controller in list(self._controllers.values())]
        return lambda labels: labels.get("namespace", namespace) == namespace and any(one(labels) for one in selects)

    def deliver(self, news: Iterable[KnownAlert], /) -> bool:
        """Passes alerts to every backend controller; see ``AlertRegistry.deliver``.

        Raises:
            KubernetesError: if another replica is active or the alerts cannot be stored; deliver them again.
        """
        self._require_rollouts()
        news, changed, failure = list(news), False, None
        for controller in list(self._controllers.values()):
            try:
                changed |= controller.alerts.deliver(news)
            except ReelwayError as error:  # the others learn of the alerts nevertheless
                failure = error
        if failure is not None:
            raise failure
        return changed

    def _require_rollouts(self) -> None:
        if not (self._active and self._controllers_known):
            reason = "another replica is active" if not self._active else "it has just become active"
            raise KubernetesError(f"this operator is on standby: {reason}; send the alerts again")

    def wake(self) -> None:
        """Starts a reconcile of every backend controller now, because alerts arrived."""
        for controller in list(self._controllers.values()):
            controller.wake.set()

    def unhealthy_reason(self) -> str:
        """Returns why only a restart can help; empty if the operator is healthy."""
        ended = [
            controller.key
            for controller in list(self._controllers.values())
            if self._active and not controller.is_alive
        ]
        return f"the controller of {', '.join(ended)} has ended; restart the operator" if ended else ""

    @property
    def active(self) -> bool:
        """Whether this process holds the Lease."""
        return self._active

    def can_finalize(self, uid: str) -> bool:
        """Returns whether a deleted rollout may be removed: its traffic is on stable, or its backend is deleted."""
        resource = self._cache.by_uid(uid)
        if resource is None or resource.status.state is None or resource.status.superseded_by:
            return True
        if not resource.status.state.active:
            return True
        controller = self._controllers.get(resource.spec.backend.key)
        return controller is not None and controller.backend_deleted()

    def _loop(self, stop: threading.Event) -> None:
        while not stop.is_set():
            revision = self._cache.revision(include_own=True)
            self._controllers_known |= self._guarded("admission", self._admit_pending)
            self._guarded("finalizers", self._reconcile_finalizers)
            self._guarded("serve config", self._reconcile_serve_config)  # last, because Serve may be slow to answer
            deadline = time.monotonic() + _ADMISSION_INTERVAL_S
            while (
                not stop.is_set() and time.monotonic() < deadline and self._cache.revision(include_own=True) == revision
            ):
                stop.wait(_CHANGE_POLL_INTERVAL_S)

    def _reconcile_serve_config(self) -> None:
        if not self._settings.ray.service:
            return
        controller = self._controller_for(Backend(ray_service=RayServiceReference(name=self._settings.ray.service)))
        if controller.serve_config is not None:
            controller.serve_config.reconcile()

    def _admit_pending(self) -> None:
        """Starts the rollouts that may start, and writes to the others' status why they may not."""
        followed = [one for one in self._cache.all() if not one.status.superseded_by and one.status.phase != REFUSED]
        for key in sorted({one.spec.backend.key for one in followed}):
            of_backend = sorted(
                (one for one in followed if one.spec.backend.key == key), key=lambda r: (r.created_at, r.name)
            )
            started = [one for one in of_backend if one.status.state]
            waiting = [one for one in of_backend if not one.status.state and not one.deleting]
            if not (started or waiting):
                continue
            try:
                controller = self._controller_for((started or waiting)[0].spec.backend)
            except RolloutError as error:
                for resource in waiting:
                    self._record_not_started(resource, Refused(str(error)))
                continue
            for resource in waiting:
                if self._admit_one(controller, resource):
                    break  # the next rollout waits for this one

    def _reconcile_finalizers(self) -> None:
        """Keeps the finalizer on rollouts that may move traffic, and on no other ones."""
        for resource in self._cache.all():
            present = FINALIZER in resource.finalizers
            needed = (
                present and not self.can_finalize(resource.uid) if resource.deleting else may_move_traffic(resource)
            )
            if needed != present:
                set_finalizer(self._api, self._cache, resource, present=needed)

    def _admit_one(self, controller: BackendController, resource: RolloutResource) -> bool:
        """Starts a rollout if it may start. Returns whether the rollouts after it have to wait for it."""
        before = self._latest_started(controller.key)
        try:
            policy = self._policy_of(resource)
        except ConfigError as error:
            can_be_fixed = resource.spec.policy_ref is not None
            self._record_not_started(resource, Waiting(str(error)) if can_be_fixed else Refused(str(error)))
            return False
        live, unseen = (None, "") if before else _live(controller)
        verdict = admit(resource, policy, previous=before, live=live, unknown_reason=unseen, now=time.time())
        if isinstance(verdict, Admitted) and self._releases is not None:
            verdict = self._releases.problem(resource.spec.release) or verdict
        if not isinstance(verdict, Admitted):
            self._record_not_started(resource, verdict)
            return False
        protected = set_finalizer(self._api, self._cache, resource, present=True)
        if protected is None:
            return True  # the rollout changed or was deleted; the next pass sees its new state
        for one in self._cache.all():
            if one.spec.backend.key == controller.key and one.status.state and not one.status.superseded_by:
                self._store.supersede(one, resource)
        controller.store.begin(protected, verdict.state, verdict.policy)
        log.info("%s: started: %s", verdict.state.id, verdict.state.reason)
        self._record_event(resource, "begin", verdict.state.reason)
        return True

    def _record_not_started(self, resource: RolloutResource, verdict: Waiting | Refused) -> None:
        phase, action = (WAITING, "wait") if isinstance(verdict, Waiting) else (REFUSED, "refused")
        if self._store.record_not_started(resource, phase, verdict.reason):
            log.info("%s: %s: %s", resource.name, action, verdict.reason)
            self._record_event(resource, action, verdict.reason)

    def _latest_started(self, key: str) -> RolloutResource | None:
        started = [(one.status.state.started_at, one) for one in self._cache.all()
                 if one.status.state and one.spec.backend.key == key]  # fmt: skip
        return max(started, key=lambda pair: pair[0])[1] if started else None

    def _policy_of(self, resource: RolloutResource) -> RolloutPolicy:
        """Returns a rollout's policy. Raises ConfigError if it does not exist or is invalid."""
        if resource.policy_problem:
            raise ConfigError(resource.policy_problem)
        reference = resource.spec.policy_ref
        if reference is None:
            return resource.spec.policy or default_policy(parity=self._settings.parity_findings is not None)
        return self._policy_from_config_map(reference)

    def _policy_from_config_map(self, reference: PolicyReference) -> RolloutPolicy:
        found = self._api.get(f"v1/configmaps/{reference.name}")
        text = (found or {}).get("data", {}).get(reference.key)
        if text is None:
            raise ConfigError(
                f"spec.policyRef: namespace {self._api.namespace} has no ConfigMap {reference.name} with the key "
                f"{reference.key}; create it"
            )
        return parse_policy(text, source=f"ConfigMap {reference.name}, {reference.key}")

    def _controller_for(self, backend: Backend) -> BackendController:
        controller = self._controllers.get(backend.key)
        if controller is None:
            on_decision = self._events.record_decision if self._events else lambda *_: None
            controller = BackendController(
                self._api, self._cache, backend, self._settings, self.metrics, on_decision, self._lease,
                lambda: self._fail(f"the controller of {backend.key} failed"),
            )  # fmt: skip
            self._controllers[backend.key] = controller
            controller.start()
        return controller

    def _run_watch(self, stop: threading.Event) -> None:
        self._watch.run(stop)
        if not stop.is_set():
            self._fail("the watch of rollouts ended")

    def _fail(self, why: str) -> None:
        """Ends the operator with an error."""
        self._failure = why
        self._stop.set()

    def _record_event(self, resource: RolloutResource, action: str, message: str) -> None:
        if self._events is not None:
            self._events.record_event(resource, action, message, time.time())

    def _guarded(self, kind: str, call: Callable[[], None]) -> bool:
        """Calls ``call`` and logs every exception. Returns whether there was none."""
        try:
            call()
            text = ""
        except ReelwayError as error:
            text = str(error)
            self.metrics.failures.labels(kind).inc()
        except Exception:
            self.metrics.failures.labels(kind).inc()
            log.exception("%s failed with an unexpected error; continuing", kind)
            return False
        if text != self._last_errors.get(kind, ""):
            log.warning("%s: %s", kind, text) if text else log.info("%s: recovered", kind)
        self._last_errors[kind] = text
        return not text


def _live(controller: BackendController) -> tuple[str | None, str]:
    """Returns the stable release that has traffic, or None and the reason why it is unknown."""
    observation = controller.backend.observe()
    if observation.routing is None:
        return None, observation.detail
    stable = [route.release for route in observation.routing.arms if route.arm.value == "stable" and route.weight_bp]
    return (stable[0], "") if stable else (None, "no traffic is on a stable release")
