"""Why: ``reelway operator`` is the laptop's controller with another memory, and all that a cluster asks of a program.

One namespace, one active process (``lease``). Everything that is known lies in the resources: it may be killed at any
instruction, and the next one goes on. It decides nothing: who may begin says ``admission``, all else ``decision``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from reelway.platform.cluster.admission import Begin, Refuse, Wait, admit
from reelway.platform.cluster.announcements import Announcer
from reelway.platform.cluster.health import operator_application
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.lanes import Lane, LaneSettings
from reelway.platform.cluster.lease import Lease
from reelway.platform.cluster.release_records import ReleaseRecords
from reelway.platform.cluster.resources import Backend, PolicyReference, RayServiceReference, Resource
from reelway.platform.cluster.rollout_store import KubeRolloutStore
from reelway.platform.cluster.shelf import PATH, ToldShelf
from reelway.platform.cluster.status import REFUSED, WAITING
from reelway.platform.cluster.watching import watch
from reelway.platform.errors import ConfigError, KubernetesError, ReelwayError, RolloutError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.control.bearer_token import bearer_token
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.controller_service import stopped_by_signals
from reelway.platform.rollout.control.webhook import serving
from reelway.platform.rollout.policy import RolloutPolicy, default_policy, parse_policy

log = logging.getLogger(__name__)

_NOTICED_S: Final = 0.1
_LOOK_S: Final = 2.0
_WATCH_ENDS_S: Final = 3.0
_COMPARED_S: Final = 20.0


@dataclass(frozen=True)
class OperatorSettings:
    """What ``reelway operator`` is started with."""

    webhook_token_file: Path
    """The bearer token that Alertmanager sends; made there when there is none and the folder can be written."""
    identity: str
    """Of this process, in the Lease and in Events: the pod's name."""
    host: str = "0.0.0.0"
    """Address of the webhook, the metrics and the health pages."""
    port: int = 8080
    """Their port; 0 chooses a free one."""
    lease: str = "reelway-operator"
    """Name of the Lease."""
    lease_duration_s: float = 10.0
    """A silent holder is gone after so long."""
    lanes: LaneSettings = field(default_factory=LaneSettings)
    ray_service: str = ""
    """RayService whose Serve config the operator composes from the chart's options; empty composes none."""
    releases: str | None = None
    """Path or URL of the store whose releases are recorded as resources; None records none."""


def run_operator(api: KubeApi, settings: OperatorSettings, stop: threading.Event | None = None) -> None:
    """Look after the namespace's rollouts until SIGTERM, Ctrl-C or ``stop``. What is under way is finished first.

    Raises:
        ConfigError: the address cannot be listened at.
        StorageError: the token cannot be read.
        KubernetesError: the Lease was lost, or the CRDs are not there.
    """
    stop = stop or threading.Event()
    with ExitStack() as stack:
        stack.enter_context(stopped_by_signals(stop.set))
        operator = Operator(api, settings)
        application = operator_application(operator, bearer_token(settings.webhook_token_file), operator.metrics)
        url = stack.enter_context(serving(application, settings.host, settings.port))
        log.info("operator of namespace %s: alerts at %s", api.namespace, url)
        operator.run(stop)
    log.info("operator of namespace %s: ended", api.namespace)


class Operator:
    """All lanes of a namespace. ``run`` is its life; the rest may be called from any thread."""

    def __init__(self, api: KubeApi, settings: OperatorSettings) -> None:
        self.metrics = ControllerMetrics()
        self._api, self._settings = api, settings
        self._shelf = ToldShelf()
        self._announcer: Announcer | None = None
        self._lanes: dict[str, Lane] = {}
        self._store = KubeRolloutStore(api, self._shelf)
        self._compared_at = 0.0
        self._active = False
        self._troubles: dict[str, str] = {}
        self._failure = ""

    def run(self, stop: threading.Event) -> None:
        """Wait for the Lease, then look until stopped.

        Raises:
            KubernetesError: as ``run_operator``.
        """
        lease = Lease(
            self._api, self._settings.lease, self._settings.identity, duration_s=self._settings.lease_duration_s
        )
        if not lease.acquire(stop):
            return
        renewing = threading.Event()
        threads = [
            threading.Thread(target=lease.hold, args=(renewing, lambda: self._fail("the lease was lost", stop))),
            threading.Thread(target=self._watch, args=(stop,), name="watch", daemon=True),
        ]
        if self._settings.releases:
            records = ReleaseRecords(self._api, self._settings.releases)
            threads.append(threading.Thread(target=records.run, args=(stop,), name="releases", daemon=True))
        try:
            self._active = True
            self._announcer = Announcer(self._api, self._settings.identity)
            self._compare()
            for thread in threads:
                thread.start()
            self._loop(stop)
        finally:
            stop.set()
            self._active = False
            for lane in self._lanes.values():
                lane.stop()
            if threads[1].ident is not None:
                threads[1].join(_WATCH_ENDS_S)  # it only reads: while it retries what was cut off, nobody waits for it
            renewing.set()
            if self._announcer is not None:
                self._announcer.close()
            if threads[0].ident is not None:
                threads[0].join()
            if not self._failure:
                lease.release()
        if self._failure:
            raise KubernetesError(f"{self._failure}; this process ends, so that another one can go on")

    def deliver(self, news: Iterable[KnownAlert], /) -> bool:
        """Alerts for every lane; see ``AlertBook.deliver``.

        One that says that it is of another namespace is not ours: the same release may be a canary there too.

        Raises:
            KubernetesError: another process is the active one, or they could not be stored: deliver them again.
        """
        if not self._active:
            raise KubernetesError("this operator waits for its lease, another one is active; try again")
        own = self._api.namespace
        told = [alert for alert in news if dict(alert.labels).get("namespace", own) == own]
        changed = [lane.book.deliver(told) for lane in list(self._lanes.values())]
        return any(changed)

    def wake(self) -> None:
        """Alerts came: look at them now."""
        for lane in list(self._lanes.values()):
            lane.wake.set()

    def problem(self) -> str:
        """What keeps it from its work for good; empty when nothing does."""
        ended = [lane.key for lane in list(self._lanes.values()) if self._active and not lane.lives]
        return f"the controller of {', '.join(ended)} has ended" if ended else ""

    @property
    def active(self) -> bool:
        """Whether it holds the Lease."""
        return self._active

    def may_go(self, uid: str) -> bool:
        """Whether a deleted rollout may go: its traffic is on stable, or there is nothing left that has traffic."""
        resource = self._shelf.by_uid(uid)
        if resource is None or resource.status.state is None or resource.status.superseded_by:
            return True
        if not resource.status.state.active:
            return True
        lane = self._lanes.get(resource.spec.backend.key)
        return lane is not None and lane.gone()

    def _loop(self, stop: threading.Event) -> None:
        while not stop.is_set():
            seen = self._shelf.changes(own=True)
            self._guarded("serve config", self._reconcile_serve_config)
            self._guarded("admission", self._look)
            if time.monotonic() - self._compared_at > _COMPARED_S:
                self._guarded("list", self._compare)
            deadline = time.monotonic() + _LOOK_S
            while not stop.is_set() and time.monotonic() < deadline and self._shelf.changes(own=True) == seen:
                stop.wait(_NOTICED_S)

    def _reconcile_serve_config(self) -> None:
        if not self._settings.ray_service:
            return
        lane = self._lane(Backend(ray_service=RayServiceReference(name=self._settings.ray_service)))
        if lane.serve_config is not None:
            lane.serve_config.reconcile()

    def _look(self) -> None:
        """Let rollouts begin whose turn it is; say of the others why it is not."""
        followed = [one for one in self._shelf.all() if not one.status.superseded_by and one.status.phase != REFUSED]
        for key in sorted({one.spec.backend.key for one in followed}):
            mine = sorted(
                (one for one in followed if one.spec.backend.key == key), key=lambda r: (r.created_at, r.name)
            )
            begun = [one for one in mine if one.status.state]
            waiting = [one for one in mine if not one.status.state and not one.deleting]
            if not (begun or waiting):
                continue
            try:
                lane = self._lane((begun or waiting)[0].spec.backend)
            except RolloutError as error:
                for resource in waiting:
                    self._set_aside(resource, Refuse(str(error)))
                continue
            for resource in waiting:
                if self._admit(lane, resource):
                    break  # the next one waits for this one

    def _admit(self, lane: Lane, resource: Resource) -> bool:
        """Whether it began."""
        before = self._begun_before(lane.key)
        try:
            policy = self._policy_of(resource)
        except ConfigError as error:
            mended = resource.spec.policy_ref is not None
            self._set_aside(resource, Wait(str(error)) if mended else Refuse(str(error)))
            return False
        live, unseen = (None, "") if before else _live(lane)
        verdict = admit(resource, policy, previous=before, live=live, unseen=unseen, now=time.time())
        if not isinstance(verdict, Begin):
            self._set_aside(resource, verdict)
            return False
        for one in self._shelf.all():
            if one.spec.backend.key == lane.key and one.status.state and not one.status.superseded_by:
                self._store.supersede(one, resource)
        lane.store.begin(resource, verdict.state, verdict.policy)
        log.info("%s begins: %s", verdict.state.id, verdict.state.reason)
        self._say(resource, "begin", verdict.state.reason)
        return True

    def _set_aside(self, resource: Resource, verdict: Wait | Refuse) -> None:
        phase, action = (WAITING, "wait") if isinstance(verdict, Wait) else (REFUSED, "refused")
        if self._store.set_aside(resource, phase, verdict.reason):
            log.info("%s: %s: %s", resource.name, action, verdict.reason)
            self._say(resource, action, verdict.reason)

    def _begun_before(self, key: str) -> Resource | None:
        begun = [(one.status.state.started_at, one) for one in self._shelf.all()
                 if one.status.state and one.spec.backend.key == key]  # fmt: skip
        return max(begun, key=lambda pair: pair[0])[1] if begun else None

    def _policy_of(self, resource: Resource) -> RolloutPolicy:
        """Raises ConfigError: there is none, or it is not one."""
        if resource.policy_problem:
            raise ConfigError(resource.policy_problem)
        reference = resource.spec.policy_ref
        if reference is None:
            return resource.spec.policy or default_policy()
        return self._referred(reference)

    def _referred(self, reference: PolicyReference) -> RolloutPolicy:
        found = self._api.get(f"v1/configmaps/{reference.name}")
        text = (found or {}).get("data", {}).get(reference.key)
        if text is None:
            raise ConfigError(
                f"spec.policyRef: there is no ConfigMap {reference.name} with a key {reference.key} in namespace "
                f"{self._api.namespace}; create it"
            )
        return parse_policy(text, source=f"ConfigMap {reference.name}, {reference.key}")

    def _lane(self, backend: Backend) -> Lane:
        lane = self._lanes.get(backend.key)
        if lane is None:
            told = self._announcer.told if self._announcer else lambda *_: None
            lane = Lane(self._api, self._shelf, backend, self._settings.lanes, self.metrics, told)
            self._lanes[backend.key] = lane
            lane.start()
        return lane

    def _compare(self) -> None:
        """What the watch may have missed: a list of versions, and what differs is read again."""
        self._compared_at = time.monotonic()
        versions = self._api.list_versions(PATH)
        known = {one.uid: one.resource_version for one in self._shelf.all()}
        for uid in known.keys() - versions.keys():
            self._shelf.forget(uid)
        if any(known.get(uid) != version for uid, version in versions.items()):
            for document in self._api.list(PATH):
                self._shelf.tell(document)

    def _watch(self, stop: threading.Event) -> None:
        try:
            watch(self._api, self._shelf, self.may_go, stop)
        except Exception:
            log.exception("the watch ended")
        if not stop.is_set():
            self._fail("the watch ended", stop)

    def _fail(self, why: str, stop: threading.Event) -> None:
        self._failure = why
        stop.set()

    def _say(self, resource: Resource, action: str, message: str) -> None:
        if self._announcer is not None:
            self._announcer.say(resource, action, message, time.time())

    def _guarded(self, kind: str, call: Callable[[], None]) -> None:
        try:
            call()
            text = ""
        except ReelwayError as error:
            text = str(error)
            self.metrics.failures.labels(kind).inc()
        except Exception:
            self.metrics.failures.labels(kind).inc()
            log.exception("%s failed, a bug; going on", kind)
            return
        if text != self._troubles.get(kind, ""):
            log.warning("%s: %s", kind, text) if text else log.info("%s: well again", kind)
        self._troubles[kind] = text


def _live(lane: Lane) -> tuple[str | None, str]:
    """The release that everybody is on, or why it cannot be seen."""
    seen = lane.backend.observe()
    if seen.routing is None:
        return None, seen.detail
    stable = [route.release for route in seen.routing.arms if route.arm.value == "stable" and route.weight_bp]
    return (stable[0], "") if stable else (None, "nobody is on a stable release")
